"""The accuracy of a result in words: that of patients like this one, or that there is none; other patients' figures stay folded."""

from __future__ import annotations

from flask_babel import gettext

from appliance.core.applicable_accuracy import AccuracyBasis, PatientGroup
from appliance.core.domain import Finding, Rate, rate_of
from webui.formatting import format_count, format_percent, untranslated
from webui.view_models import DASH, View


def accuracy_view(finding: Finding) -> View:
    """The accuracy that applies to the patient.

    ``basis`` is for scripts; ``patients`` says whom the figures were measured on, or is empty where there is none; ``notice`` says why
    there is none, and ``explanation`` more of it; ``sources`` are the test images; ``others`` has a row per group that the patient does
    not belong to.
    """
    accuracy = finding.accuracy
    if not finding.has_verified_accuracy:
        explanation = gettext("This model version does not prove that it was measured with these weights at this threshold.")
        return {"basis": "not_verified", "notice": gettext("not verified"), "explanation": explanation}
    rates = [_rate(rate) for rate in finding.own_rates]
    return {
        "basis": accuracy.basis.value,
        "patients": _patients(finding),
        "sensitivity": rates[0],
        "specificity": rates[1],
        "cases": _cases(accuracy.group) if accuracy.group else "",
        "sources": [untranslated(text) for text in _sources(finding)],
        "notice": _NOTICES[accuracy.basis]() if accuracy.basis in _NOTICES else "",
        "others": [group_row(group) for group in accuracy.other_groups],
    }


def group_row(group: PatientGroup) -> View:
    """A group of patients with its accuracy, in a table."""
    return {
        "patients": group_words(group),
        "cases": _cases(group),
        "sensitivity": _percent(rate_of(group.sensitivity)),
        "specificity": _percent(rate_of(group.specificity)),
    }


def group_words(group: PatientGroup) -> str:
    """A group of patients in words."""
    ages = {"youngest": f"{group.min_years:g}", "oldest": f"{group.max_years:g}"}
    if group.population == "child":
        return str(gettext("Children of %(youngest)s to %(oldest)s years", **ages))
    return str(gettext("Adults of %(youngest)s to %(oldest)s years", **ages))


_NOTICES = {
    AccuracyBasis.AGE_UNKNOWN: lambda: gettext("The patient's age is not known, so no measured accuracy applies."),
    AccuracyBasis.NOT_MEASURED: lambda: gettext("Not measured for patients like this one."),
}


def _patients(finding: Finding) -> str:
    if finding.accuracy.group:
        return group_words(finding.accuracy.group)
    return str(gettext("All test images, of mixed ages")) if finding.accuracy.basis is AccuracyBasis.MIXED else ""


def _sources(finding: Finding) -> list[str]:
    if finding.accuracy.group:
        return finding.accuracy.group.sources
    return [finding.measured_on] if finding.accuracy.basis is AccuracyBasis.MIXED else []


def _cases(group: PatientGroup) -> str:
    return f"{format_count(group.n_positive)} / {format_count(group.n_negative)}"


def _percent(rate: Rate | None) -> str:
    return format_percent(rate[0]) if rate else DASH


def _rate(rate: Rate | None) -> View:
    """Sensitivity or specificity with its 95 % confidence interval, in words; a dash where it was not measured."""
    if rate is None:
        return {"value": DASH, "interval": gettext("not measured for these patients")}
    value, low, high = (format_percent(item) for item in rate)
    return {"value": value, "interval": gettext("95%% CI %(low)s to %(high)s", low=low, high=high)}
