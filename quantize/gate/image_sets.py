"""Calibration and evaluation sets: directories of DICOM, PNG, JPEG or npz files, read by the box's own preprocessing.

A DICOM file is processed as on the box (decode, display, letterbox, resize: ``appliance.imaging.preprocessing.to_tensor``); PNG and JPEG
are pictures as displayed, read as an upload on the box; an npz holds ``pixels``, uint8 [rows, columns] or [n, rows, columns], as
displayed. So the gate sees the same tensors as a clinic. Tensors are stored on disk, because sets are large.

An evaluation set has a ``labels.csv`` beside its pictures: the column ``file``, one column of 0 and 1 per label of the model, and
optionally ``source``, ``patient`` and ``index`` (which picture of an npz, from 0).
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from model_sync.bundle import InputSpec
from quantize.draft import Population
from quantize.errors import QuantizeError
from quantize.gate.image_files import SUFFIXES, UnreadableError, count_images, find_image_files, read_image
from quantize.gate.roc_statistics import Flags, Scored
from quantize.messages import Code
from quantize.progress import OnProgress, no_progress

LABELS_FILE: Final = "labels.csv"
MIN_CALIBRATION: Final = 32
_KNOWN_COLUMNS: Final = ("file", "source", "patient", "index")
_SHOWN: Final = 5
_FORMATS: Final = "DICOM (.dcm or without a suffix), " + ", ".join(sorted(SUFFIXES - {".dcm", ".dicom"}))


@dataclass(frozen=True)
class Row:
    """One picture of a set.

    Attributes:
        path: its file.
        index: which picture of the file.
        labels: 0 or 1 per label of the model; empty in a calibration set.
        source: where it comes from, "" when unknown.
        patient: whose it is, "" when unknown.
    """

    path: Path
    index: int
    labels: tuple[bool, ...] = ()
    source: str = ""
    patient: str = ""


@dataclass(frozen=True)
class ImageSet:
    """The images of one directory as tensors.

    Attributes:
        directory: where it was.
        rows: its pictures, in the order of ``tensors``.
        tensors: float32 [n, channels, height, width], mapped from a file.
        digests: SHA-256 of each picture's file.
        digest: of files, labels and preprocessing together: it changes with each of them.
    """

    directory: Path
    rows: tuple[Row, ...]
    tensors: NDArray[np.float32]
    digests: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def positive(self) -> Flags:
        """The labels, [n, labels]."""
        return np.array([row.labels for row in self.rows], bool).reshape(len(self.rows), -1)

    def scored(self, label: int, score: NDArray[np.float64]) -> Scored:
        """The set with the scores [n] of one label."""
        return Scored(self.positive[:, label], np.array([row.source or "-" for row in self.rows]), score)


def read_calibration(
    directory: Path, spec: InputSpec, modalities: Sequence[str], work: Path, *, limit: int = 256, on_progress: OnProgress = no_progress
) -> ImageSet:
    """Read the calibration set, on which the ranges of the activations are measured.

    Args:
        directory: of the pictures; a ``labels.csv`` in it names patients and sources where they are known.
        spec: the model's input.
        modalities: what the model applies to; a DICOM file of another modality is an error.
        work: directory for the tensors.
        limit: of more pictures, this many are used at equal distances: further ones cost time and do not change the ranges.
        on_progress: called as it goes.

    Raises:
        QuantizeError: ``data.missing``, ``data.empty``, ``data.too_few``, ``data.modality``, ``data.unreadable``, ``data.labels``.
    """
    table = directory / LABELS_FILE
    rows = _labelled(directory, table, ()) if table.is_file() else [Row(path, i) for path, i in _list_images(directory)]
    if len(rows) < MIN_CALIBRATION:
        raise QuantizeError(
            f"the calibration set holds {len(rows)} pictures, at least {MIN_CALIBRATION} are needed",
            hint="add pictures of the kind that the clinics send; 200 to 500 from several devices are good",
            code=Code.DATA_TOO_FEW,
        )
    if len(rows) > limit:
        rows = [rows[round(i * (len(rows) - 1) / (limit - 1))] for i in range(limit)]
    return _read(directory, rows, spec, modalities, work / "calibration.npy", on_progress)


def read_evaluation(
    directory: Path, spec: InputSpec, modalities: Sequence[str], labels: Sequence[str], work: Path, *, on_progress: OnProgress = no_progress
) -> ImageSet:
    """Read the labelled set of the gate.

    Args:
        directory: of the pictures and ``labels.csv``.
        spec: the model's input.
        modalities: what the model applies to.
        labels: names of the model's labels; none (segmentation) means that no ``labels.csv`` is needed.
        work: directory for the tensors.
        on_progress: called as it goes.

    Raises:
        QuantizeError: as :func:`read_calibration`, and ``data.one_class`` for a label without positive or negative pictures.
    """
    table = directory / LABELS_FILE
    labelled = labels or table.is_file()
    rows = _labelled(directory, table, labels) if labelled else [Row(path, i) for path, i in _list_images(directory)]
    for number, label in enumerate(labels):
        positive = sum(row.labels[number] for row in rows)
        if positive in (0, len(rows)):
            raise QuantizeError(
                f"the evaluation set holds {positive} positive and {len(rows) - positive} negative pictures of {label!r}",
                hint="sensitivity and specificity need both: add pictures with and without the finding",
                code=Code.DATA_ONE_CLASS,
            )
    return _read(directory, rows, spec, modalities, work / "evaluation.npy", on_progress)


def evaluation_digest(images: ImageSet, labels: Sequence[str]) -> str:
    """Return the digest that ``gate.json`` names the evaluation set by: SHA-256 over one line per image, sorted, after the label names.

    A line is a JSON array: the SHA-256 of the file, the index of the image in it, its labels as 0 and 1, its source, and a pseudonym of
    its patient, which is the least image (file and index) of the same patient, so that no identifier enters. File names, their order and
    the preprocessing do not change the digest; an image, a label, a source, or which images are of one patient does.

    Args:
        images: the set.
        labels: names of its labels, in their order.
    """
    keys = _keys(images)
    pseudonyms: dict[str, tuple[str, int]] = {}
    for row, key in zip(images.rows, keys, strict=True):
        pseudonyms[row.patient] = min(key, pseudonyms.get(row.patient, key))
    lines = [
        json.dumps([*key, [int(label) for label in row.labels], row.source, list(pseudonyms[row.patient]) if row.patient else None])
        for row, key in zip(images.rows, keys, strict=True)
    ]
    return hashlib.sha256("\n".join((json.dumps(list(labels)), *sorted(lines), "")).encode()).hexdigest()


def check_disjoint(calibration: ImageSet, evaluation: ImageSet) -> None:
    """Refuse an image or a patient that is in both sets, because the gate must not measure on calibration data.

    Raises:
        QuantizeError: ``data.overlap``. It names files, never patients.
    """
    hint = "leave these pictures out of one of the two sets; split by patient, never by picture"
    seen = set(_keys(evaluation))
    if same := [_shown(row) for row, key in zip(calibration.rows, _keys(calibration), strict=True) if key in seen]:
        raise QuantizeError(f"in both sets: {_some(same)}", hint=hint, code=Code.DATA_OVERLAP)
    patients = {row.patient for row in evaluation.rows} - {""}
    shared = [_shown(row) for row in calibration.rows if row.patient in patients]
    if shared:
        message = f"patients of the evaluation set are in the calibration set too: {_some(shared)}"
        raise QuantizeError(message, hint=hint, code=Code.DATA_OVERLAP)


def check_populations(evaluation: ImageSet, populations: Sequence[Population]) -> None:
    """Check that every population has images, and that no source belongs to several of them.

    Raises:
        QuantizeError: ``data.population``, before anything is measured.
    """
    sources = sorted({row.source for row in evaluation.rows})
    for population in populations:
        if not any(map(population.includes_source, sources)):
            raise QuantizeError(
                f"no picture of the evaluation set comes from {' or '.join(population.sources)}",
                hint=f"the sources in {LABELS_FILE} are: {', '.join(source or '-' for source in sources)}",
                code=Code.DATA_POPULATION,
            )
    for source in sources:
        if sum(population.includes_source(source) for population in populations) > 1:
            raise QuantizeError(
                f"the source {source!r} belongs to several populations",
                hint="give each source to the population that it states",
                code=Code.DATA_POPULATION,
            )


def _keys(images: ImageSet) -> list[tuple[str, int]]:
    return [(digest, row.index) for row, digest in zip(images.rows, images.digests, strict=True)]


def _list_images(directory: Path) -> Iterator[tuple[Path, int]]:
    _check_directory(directory)
    bad = []
    for path in find_image_files(directory):
        try:
            yield from ((path, i) for i in range(count_images(path)))
        except UnreadableError as error:
            bad.append(f"{path.relative_to(directory)} ({error})")
    _refuse_unreadable(bad)


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise QuantizeError(f"{directory} is no directory", hint="name the directory that holds the pictures", code=Code.DATA_MISSING)
    if not any(True for _ in find_image_files(directory)):
        raise QuantizeError(f"there is no picture in {directory}", hint=f"what can be read: {_FORMATS}", code=Code.DATA_EMPTY)


def _labelled(directory: Path, table: Path, labels: Sequence[str]) -> list[Row]:
    _check_directory(directory)
    if not table.is_file():
        columns = ",".join(("file", *labels, "source", "patient"))
        raise QuantizeError(
            f"{directory} has no {LABELS_FILE}",
            hint=f"write one with the columns {columns}; source and patient may be left out",
            code=Code.DATA_LABELS,
        )
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            _check_columns(reader.fieldnames or (), labels)
            rows = [_row(directory, reader.line_num, record, labels) for record in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise _bad_labels(f"{LABELS_FILE} cannot be read: {error}", "save it as CSV in UTF-8") from error
    times = Counter((row.path, row.index) for row in rows)
    if twice := sorted({_shown(row) for row in rows if times[row.path, row.index] > 1}):
        raise _bad_labels(f"{LABELS_FILE} names a picture twice: {_some(twice)}", "keep one line per picture")
    named = {row.path for row in rows}
    if unnamed := [str(path.relative_to(directory)) for path in find_image_files(directory) if path not in named]:
        raise _bad_labels(f"{LABELS_FILE} does not name {_some(unnamed)}", "add them, or take them out of the directory")
    return rows


def _check_columns(columns: Sequence[str], labels: Sequence[str]) -> None:
    known = {*_KNOWN_COLUMNS, *labels}
    if missing := [name for name in ("file", *labels) if name not in columns]:
        raise _bad_labels(f"{LABELS_FILE} lacks the column {', '.join(missing)}", f"its columns are {', '.join(columns) or 'none'}")
    # A calibration set may have any other columns: they are not used.
    if labels and (unknown := [name for name in columns if name not in known]):
        raise _bad_labels(f"{LABELS_FILE} has unknown columns: {', '.join(unknown)}", f"known are {', '.join(sorted(known))}")
    if len(set(columns)) != len(columns):
        raise _bad_labels(f"{LABELS_FILE} has a column twice", f"its columns are {', '.join(columns)}")


def _row(directory: Path, line: int, record: dict[str | Any, Any], labels: Sequence[str]) -> Row:
    where = f"{LABELS_FILE} line {line}"
    if None in record or None in record.values():
        raise _bad_labels(f"{where} has more or fewer fields than the first line", "a text with a comma stands in quotation marks")
    values = {name: str(value).strip() for name, value in record.items()}
    path = directory / values["file"]
    if not path.is_file() or not path.resolve().is_relative_to(directory.resolve()):
        raise QuantizeError(
            f"{where} names {values['file']!r}, which does not exist", hint="file is relative to the directory", code=Code.DATA_MISSING
        )
    for label in labels:
        if values[label] not in ("0", "1"):
            raise _bad_labels(f"{where}: {label} is {values[label]!r}", "a label is 0 or 1")
    index = values.get("index") or "0"
    if not index.isdecimal() or int(index) >= _count_images(path, where):
        raise _bad_labels(f"{where}: the file has no picture {index}", "index counts from 0")
    return Row(path, int(index), tuple(values[label] == "1" for label in labels), values.get("source", ""), values.get("patient", ""))


def _count_images(path: Path, where: str) -> int:
    try:
        return count_images(path)
    except UnreadableError as error:
        raise QuantizeError(
            f"{where}: {path.name} cannot be read: {error}", hint=f"what can be read: {_FORMATS}", code=Code.DATA_UNREADABLE
        ) from error


def _read(directory: Path, rows: list[Row], spec: InputSpec, modalities: Sequence[str], target: Path, on_progress: OnProgress) -> ImageSet:
    target.parent.mkdir(parents=True, exist_ok=True)
    shape = (len(rows), *spec.shape)
    # NumPy 2.2, the newest for Python 3.10, has no types for this function.
    tensors: NDArray[np.float32] = np.lib.format.open_memmap(  # type: ignore[no-untyped-call, unused-ignore]
        target, mode="w+", dtype=np.float32, shape=shape
    )
    bad, foreign, rows_read, digests = [], [], [], []
    for number, row in enumerate(rows):
        try:
            image = read_image(row.path, row.index, spec)
        except UnreadableError as error:
            bad.append(f"{_shown(row, directory)} ({error})")
            continue
        finally:
            on_progress((number + 1) / len(rows))
        if image.modality is not None and image.modality not in modalities:
            foreign.append(f"{_shown(row, directory)} ({image.modality or 'none'})")
        tensors[number] = image.tensor[0]
        digests.append(hashlib.sha256(row.path.read_bytes()).hexdigest())
        rows_read.append(Row(row.path, row.index, row.labels, row.source or image.source, row.patient or image.patient))
    _refuse_unreadable(bad)
    if foreign:
        raise QuantizeError(
            f"pictures of another modality than {', '.join(modalities)}: {_some(foreign)}",
            hint="take them out, or let applies_to.modality name them if the model is for them",
            code=Code.DATA_MODALITY,
        )
    return ImageSet(directory, tuple(rows_read), tensors, tuple(digests), _digest(rows_read, digests, spec))


def _digest(rows: Sequence[Row], digests: Sequence[str], spec: InputSpec) -> str:
    digest_of_set = hashlib.sha256(spec.model_dump_json().encode())
    for row, digest in zip(rows, digests, strict=True):
        digest_of_set.update(f"{digest}\0{row.index}\0{row.labels}\0{row.source}\0{row.patient}\n".encode())
    return digest_of_set.hexdigest()


def _refuse_unreadable(bad: Sequence[str]) -> None:
    if bad:
        hint = f"take them out or export them again; what can be read: {_FORMATS}"
        raise QuantizeError(f"{len(bad)} pictures cannot be read: {_some(bad)}", hint=hint, code=Code.DATA_UNREADABLE)


def _bad_labels(message: str, hint: str) -> QuantizeError:
    return QuantizeError(message, hint=hint, code=Code.DATA_LABELS)


def _shown(row: Row, directory: Path | None = None) -> str:
    name = str(row.path.relative_to(directory)) if directory is not None else row.path.name
    return f"{name}[{row.index}]" if row.index else name


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
