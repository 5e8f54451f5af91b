"""Prepare a run: check and clean up the model, add its class activation map, and read both image sets."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from model_sync.bundle import sha256_of
from quantize.draft import Draft
from quantize.errors import QuantizeError
from quantize.gate import image_sets
from quantize.gate.image_sets import ImageSet
from quantize.gate.predictions import Heads
from quantize.graph.class_activation_map import add_cam
from quantize.graph.model_checks import read_model
from quantize.graph.onnx_graph import clean_up, input_name, output_names, session, shape_of
from quantize.messages import Code
from quantize.progress import OnProgress, Progress
from quantize.work_directory import WorkDirectory

CAM: Final = "cam"
# The largest change of an output by the clean-up, relative to its range: sums are added in another order.
_SAME: Final = 1e-4


@dataclass(frozen=True)
class FloatModel:
    """The float model.

    Attributes:
        draft: the draft, with the activation map among its outputs where one was added.
        clean: the cleaned graph that every variant is made from.
        path: the file that is shipped as fp32: the given one byte for byte where nothing had to be added to it.
        digest: SHA-256 of the given file and what is beside it.
        heads: the outputs that are compared.
        notes: what was added or could not be added, for the report.
    """

    draft: Draft
    clean: Any
    path: Path
    digest: str
    heads: Heads
    notes: tuple[str, ...]


def read_float(model_path: Path, draft: Draft, work: WorkDirectory, on_progress: OnProgress) -> FloatModel:
    """Check the float model, clean it up and give it a class activation map where it can have one.

    Raises:
        QuantizeError: see ``model_checks.read_model``; ``model.cleaned``: the cleaned graph computes something else.
    """
    model = read_model(model_path, draft.input, draft.outputs)
    on_progress(0.2)
    digest = sha256_of(model_path.resolve())

    def make(directory: Path) -> list[str]:
        cleaned = clean_up(model)
        on_progress(0.6)
        added: list[str] = []
        if wanted := _missing_cam(draft, cleaned):
            cleaned, added = _with_cam(cleaned, draft, wanted)
        _check_same(model, cleaned, draft)
        onnx.save(cleaned, directory / "clean.onnx")
        # As it was validated, byte for byte, where nothing had to be added.
        if not added and _is_plain(model_path):
            shutil.copyfile(model_path, directory / "fp32.onnx")
        else:
            onnx.save(cleaned, directory / "fp32.onnx")
        return added

    directory, notes = work.step("float", [digest, draft.model_dump(mode="json")], make)
    clean = onnx.load(directory / "clean.onnx")
    draft = _with_cam_output(draft, clean)
    return FloatModel(draft, clean, directory / "fp32.onnx", digest, Heads.of(draft.outputs), tuple(notes))


def _missing_cam(draft: Draft, model: Any) -> str:
    """The name of the map to be added: the draft lists it or lists none, and the graph has none."""
    name = draft.output("cam") or CAM
    return "" if name in output_names(model) or draft.output("probability") is None else name


def _with_cam(model: Any, draft: Draft, name: str) -> tuple[Any, list[str]]:
    probability = draft.output("probability")
    assert probability is not None
    try:
        return add_cam(model, probability, name), [f"added the class activation map {name!r}"]
    except QuantizeError as error:
        if draft.output("cam") is not None:  # somebody wants it
            raise
        return model, [f"without a class activation map: {error.message}"]


def _with_cam_output(draft: Draft, clean: Any) -> Draft:
    if draft.output("cam") is not None or CAM not in output_names(clean) or draft.output("probability") is None:
        return draft
    shape = shape_of(clean, CAM) or []
    return draft.with_cam(CAM, ["n", *(int(size) for size in shape[1:])])


def _is_plain(path: Path) -> bool:
    """Whether the file has no external data, an opset that the oldest TensorRT reads, and fixed axes except the batch."""
    model = onnx.load(path, load_external_data=False)
    outside = any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer)
    dynamic = any(axis.HasField("dim_param") for value in model.graph.input for axis in list(value.type.tensor_type.shape.dim)[1:])
    return not outside and not dynamic and any(entry.domain == "" and entry.version >= 11 for entry in model.opset_import)


def _check_same(model: Any, cleaned: Any, draft: Draft) -> None:
    tensor = np.random.default_rng(0).random((1, *draft.input.shape), np.float32)
    names = [name for name in output_names(model) if name in output_names(cleaned)]
    before, after = (session(one, optimised=False).run(names, {input_name(one): tensor}) for one in (model, cleaned))
    for name, one, other in zip(names, before, after, strict=True):
        span = max(1.0, float(np.abs(one).max()))
        if not np.abs(one - other).max() <= _SAME * span:
            raise QuantizeError(
                f"the cleaned graph computes another {name!r} than the given one",
                hint="report this with the model; export it with constants folded and BatchNorm in inference mode meanwhile",
                code=Code.MODEL_CLEANED,
            )


def read_sets(
    float_model: FloatModel, calibration: Path, evaluation: Path, limit: int, work: WorkDirectory, progress: Progress
) -> tuple[ImageSet, ImageSet]:
    """Read both sets and check that they share no image and no patient.

    Raises:
        QuantizeError: see ``quantize.gate.image_sets``.
    """
    draft = float_model.draft
    directory = work.directory / "tensors"
    on_progress = progress.begin("calibration set", f"reading the calibration pictures in {calibration}")
    one = image_sets.read_calibration(calibration, draft.input, draft.applies_to.modality, directory, limit=limit, on_progress=on_progress)
    on_progress = progress.begin("evaluation set", f"reading the labelled pictures in {evaluation}")
    other = image_sets.read_evaluation(
        evaluation,
        draft.input,
        draft.applies_to.modality,
        draft.label_names,
        directory,
        on_progress=on_progress,
    )
    image_sets.check_disjoint(one, other)
    image_sets.check_populations(other, draft.populations)
    return one, other
