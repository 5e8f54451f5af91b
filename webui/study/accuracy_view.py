"""The accuracy of a result in words: that of patients like this one, or that there is none; other patients' figures stay folded."""

from __future__ import annotations

from flask_babel import gettext

from appliance.core.applicable_accuracy import AccuracyBasis
from appliance.core.domain import Finding
from webui.formatting import untranslated
from webui.models.patient_groups import case_counts, group_row, group_words, rate_view
from webui.view_models import View


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
    rates = [rate_view(rate) for rate in finding.own_rates]
    return {
        "basis": accuracy.basis.value,
        "patients": _patients(finding),
        "sensitivity": rates[0],
        "specificity": rates[1],
        "cases": case_counts(accuracy.group) if accuracy.group else "",
        "sources": [untranslated(text) for text in _sources(finding)],
        "notice": _NOTICES[accuracy.basis]() if accuracy.basis in _NOTICES else "",
        "others": [group_row(group) for group in accuracy.other_groups],
    }


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
