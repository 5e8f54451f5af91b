"""The codes and the words of the report of ``quantize``; :mod:`appliance.messages` has those of what runs on a box."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from typing_extensions import Self

from model_sync.errors import TextEnum
from model_sync.messages import Message, register

# fmt: off  (a table reads best with one code in a line)
_MODEL: Final = "Nothing was written. Export the float model again; docs/quantize.md says what it must be."
_PICTURES: Final = "Nothing was written. Correct the picture set; docs/quantize.md says what it must contain."
_MODELOPT: Final = "Correct its environment, or leave it out with --no-modelopt."
_RECORD: Final = "Give BUNDLE.report.json, as `quantize run` wrote it beside the bundle."


class Code(TextEnum):
    """Why a step failed or a variant was refused, with what it means and what to do; the values are stored in records and ``gate.json``."""

    message: Message

    def __new__(cls, value: str, text: str, hint: str = "") -> Self:
        """Make a member whose value is the code alone."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.message = Message(text, hint)
        return member

    FAILED = (
        "quantize.failed",
        "A step failed, and no bundle was written",
        "The detail says what is wrong with the model or the pictures; docs/quantize.md explains what is needed.",
    )
    DISK = "quantize.disk", "A file cannot be read or written", "Check the path, its permissions and the space on the disk."
    INTERRUPTED = "quantize.interrupted", "The command was interrupted", "What was done is kept: the same command continues it."
    BUNDLE_GOLDEN = (
        "bundle.golden",
        "A variant does not reproduce its golden cases",
        "Choose golden pictures that resemble the evaluation set.",
    )
    BUNDLE_INVALID = "bundle.invalid", "What was made is not a valid bundle", "Report it with the model: nothing was published."
    DATA_EMPTY = "data.empty", "The directory has no picture that can be read", _PICTURES
    DATA_LABELS = "data.labels", "The labels file is missing or not valid", _PICTURES
    DATA_MISSING = "data.missing", "A directory or a picture of the set is missing", _PICTURES
    DATA_MODALITY = "data.modality", "Pictures of the set are of another modality than the model's", _PICTURES
    DATA_ONE_CLASS = "data.one_class", "The evaluation set lacks positive or negative pictures", _PICTURES
    DATA_OVERLAP = "data.overlap", "The calibration and the evaluation set share pictures or patients", _PICTURES
    DATA_POPULATION = "data.population", "The sources of the evaluation set and the populations of the draft do not agree", _PICTURES
    DATA_TOO_FEW = "data.too_few", "The calibration set has too few pictures", _PICTURES
    DATA_UNREADABLE = "data.unreadable", "Pictures of the set cannot be read", _PICTURES
    DRAFT_INVALID = "draft.invalid", "The draft manifest is not valid", "docs/quantize.md lists its fields."
    DRAFT_MISSING = "draft.missing", "The draft manifest does not exist", "docs/quantize.md shows one to start from."
    GOLDEN_EMPTY = (
        "golden.empty",
        "There are no golden pictures",
        "Give PNG or DICOM files without patients' data: a bundle needs golden cases.",
    )
    GOLDEN_UNREADABLE = "golden.unreadable", "A golden picture cannot be read", "Give PNG or DICOM files without patients' data."
    MODEL_CLEANED = "model.cleaned", "The simplified graph computes another result than the given model", _MODEL
    MODEL_OUTPUT = "model.output", "The outputs of the model do not match the draft manifest", _MODEL
    MODEL_RUNS = "model.runs", "The float model does not run or does not pass its own gate", _MODEL
    MODEL_THRESHOLD = (
        "model.threshold",
        "The model reaches the wanted sensitivity at no threshold",
        "Choose a lower sensitivity, or check the labels and the outputs of the model.",
    )
    MODELOPT_ABSENT = "modelopt.absent", "nvidia-modelopt is not in the given environment", _MODELOPT
    MODELOPT_FAILED = "modelopt.failed", "nvidia-modelopt failed", _MODELOPT
    MODELOPT_WROTE = "modelopt.wrote", "nvidia-modelopt wrote a model that cannot be used", _MODELOPT
    OUT_EXISTS = "out.exists", "The output exists already", "Nothing was overwritten. Name another directory, or add --replace."
    REPORT_MATPLOTLIB = "report.matplotlib", "matplotlib is not installed, so the report cannot be drawn", "pip install -e '.[quantize]'"
    REPORT_RECORD = "report.record", "The record of the run cannot be used", _RECORD
    SPEED_FAILED = "speed.failed", "A variant failed while it was timed", "Start the command again: what was done is kept."
    WORK_BUSY = "work.busy", "Another run works in this directory", "Wait until it has ended, or name another directory."
    WORK_DAMAGED = "work.damaged", "The work directory is damaged", "Remove it and start again."
    GATE_AUC = "gate.auc", "the AUC differs too much from the float model's"
    GATE_SENSITIVITY = "gate.sensitivity", "the sensitivity leaves the float model's confidence interval"
    GATE_SPECIFICITY = "gate.specificity", "the specificity leaves the float model's confidence interval"
    GATE_SCORE = "gate.score", "a single score changes too much"
    GATE_CAM = "gate.cam", "the class activation map changes too much"
    GATE_DICE = "gate.dice", "the masks overlap too little with the float model's"
    GATE_NOT_FINITE = "gate.not_finite", "an output holds NaN or Inf"
    GATE_OUTPUT = "gate.output", "an output is missing"
    GATE_UNTESTED = "gate.untested", "no runtime of this computer could run it"
    MAKE_FAILED = "make.failed", "it could not be made"
    CALIBRATION_OTHER_BETTER = "calibration.other_better", "another calibration of the same recipe is more accurate"
    SPEED_SLOWER = "speed.slower", "no faster than a more exact variant"
    SPEED_OTHER_BETTER = "speed.other_better", "another variant of its kind is faster, or as fast and more accurate"


WORDS: Final[Mapping[str, Message]] = {
    "page.report": Message("Quantization report"),
    "page.summary": Message("In words"),
    "page.variants": Message("Variants and the gate"),
    "page.roc": Message("ROC: float against each variant"),
    "page.scatter": Message("Scores: float (across) against the variant (up)"),
    "page.layers": Message("Error of each layer quantized by itself"),
    "page.speed": Message("Speed and size"),
    "page.sources": Message("Per source"),
    "page.sets": Message("The pictures used"),
    "page.refused": Message("Candidates left out, and why"),
    "page.environment": Message("Where it was measured"),
    "page.calibration": Message("calibration set"),
    "page.evaluation": Message("evaluation set"),
    "page.variant": Message("variant"),
    "page.runtime": Message("runtime"),
    "page.gate": Message("gate"),
    "page.passed": Message("passed"),
    "page.failed": Message("failed"),
    "page.shipped": Message("shipped"),
    "page.left_out": Message("left out"),
    "page.auc_difference": Message("AUC difference"),
    "page.sensitivity": Message("sensitivity"),
    "page.specificity": Message("specificity"),
    "page.largest": Message("largest change"),
    "page.mean": Message("mean change"),
    "page.sides": Message("crossed the threshold"),
    "page.map": Message("map difference"),
    "page.size": Message("size"),
    "page.median": Message("median"),
    "page.ratio": Message("against fp32"),
    "page.load": Message("load"),
    "page.memory": Message("memory"),
    "page.really": Message("what really ran (layers)"),
    "page.source": Message("source"),
    "page.counts": Message("positive / negative"),
    "page.gated": Message("gated"),
    "page.yes": Message("yes"),
    "page.too_few": Message("too few, listed only"),
    "page.reason": Message("reason"),
    "page.threshold": Message("threshold"),
    "page.auc": Message("AUC"),
    "page.absent": Message("not measured here"),
    "page.absent_note": Message("the golden cases decide on the box"),
    "page.tolerance": Message("tolerance of the golden cases"),
    "page.notes": Message("Remarks"),
    "page.not_on": Message("not on"),
    "page.no_layers": Message("Per-layer errors were not measured."),
    "page.method": Message("recipe"),
}
# fmt: on
register("quantize", {**{code.value: code.message for code in Code}, **WORDS})
