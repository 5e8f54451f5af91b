"""The measured accuracy of groups of patients in words: for the result of a patient, and for a model as a whole."""

from __future__ import annotations

from collections.abc import Sequence

from flask_babel import gettext

from appliance.core.applicable_accuracy import PatientGroup
from appliance.core.domain import Rate, rate_of
from appliance.model_queries import MeasuredLabel
from webui.formatting import format_count, format_percent, format_ratio, localize, untranslated
from webui.view_models import DASH, View


def accuracy_table(measured: MeasuredLabel) -> View:
    """What was measured for a label of a model: a row per group of patients, then one of all test images, then who was not measured.

    A row has ``patients``, ``cases``, ``rates`` (sensitivity and specificity) and ``sources``.
    """
    total = _row(str(gettext("All test images, of mixed ages")), measured, (measured.sensitivity, measured.specificity), ())
    rest = gettext("Patients of other ages") if measured.groups else gettext("Children and adults, each alone")
    nobody = {"patients": str(rest), "cases": DASH, "rates": [_not_measured(), _not_measured()], "sources": []}
    rows = [
        _row(group_words(group), group, (rate_of(group.sensitivity), rate_of(group.specificity)), group.sources)
        for group in measured.groups
    ]  # fmt: skip
    title = localize(measured.title["zh"], measured.title["en"])
    return {"caption": gettext("%(label)s, from a score of %(threshold)s", label=title, threshold=format_ratio(measured.threshold)),
            "rows": [*rows, total, nobody]}  # fmt: skip


def group_row(group: PatientGroup) -> View:
    """A group of patients with its accuracy, without intervals, in a table beside other figures."""
    return {
        "patients": group_words(group),
        "cases": case_counts(group),
        "sensitivity": _percent(rate_of(group.sensitivity)),
        "specificity": _percent(rate_of(group.specificity)),
    }


def group_words(group: PatientGroup) -> str:
    """A group of patients in words."""
    ages = {"youngest": f"{group.min_years:g}", "oldest": f"{group.max_years:g}"}
    if group.population == "child":
        return str(gettext("Children of %(youngest)s to %(oldest)s years", **ages))
    return str(gettext("Adults of %(youngest)s to %(oldest)s years", **ages))


def case_counts(measured: PatientGroup | MeasuredLabel) -> str:
    """The number of test images with and without the finding."""
    return f"{format_count(measured.n_positive)} / {format_count(measured.n_negative)}"


def rate_view(rate: Rate | None) -> View:
    """Sensitivity or specificity with its 95 % confidence interval, in words; a dash where it was not measured."""
    if rate is None:
        return {"value": DASH, "interval": gettext("not measured for these patients")}
    value, low, high = (format_percent(item) for item in rate)
    return {"value": value, "interval": gettext("95%% CI %(low)s to %(high)s", low=low, high=high)}


def _row(patients: str, measured: PatientGroup | MeasuredLabel, rates: Sequence[Rate | None], sources: Sequence[str]) -> View:
    shown = [rate_view(rate) if rate else _not_measured() for rate in rates]
    return {"patients": patients, "cases": case_counts(measured), "rates": shown, "sources": [untranslated(text) for text in sources]}


def _not_measured() -> View:
    return {"value": gettext("not measured"), "interval": ""}


def _percent(rate: Rate | None) -> str:
    return format_percent(rate[0]) if rate else DASH
