"""``make bench ARGS="--only truth"``: what enters, counted per kind on variants of real films that no test has seen.

Each variant goes the real way (ingest, queue, worker with the reference model) on a box of its own. A row counts the variants that got
what a user expects: the score of the upright film and a note, or the reason why there is none.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

from appliance.core.domain import ScanState, Source
from appliance.core.errors import IngestError
from appliance.core.settings import Settings
from appliance.imaging.orientation import Orientation, orientation_of
from appliance.inference.worker import Worker
from appliance.ingest.ingest import Ingest
from appliance.lifecycle.model_control import activate, reference_bundle
from appliance.store.store import Store
from appliance.store.worklist import InstanceView, Worklist

_SEED: Final = 2026
_NEAR: Final = 0.02
_SIDE: Final = 560
_FILMS: Final = 12
_DIRECTIONS: Final = ["L\\H", "R\\F", "R\\H", "F\\L", "F\\R", "H\\L", "H\\R"]
_SURNAMES, _GIVEN = "王李张刘陈杨黄赵吴周徐孙马朱胡郭何高林郑", "伟芳娜敏静丽强磊军洋勇艳杰娟涛明超秀霞平"
_CHEST: Final = ["CHEST AP", "CHEST_2_VIEWS", "Thorax", "TORAX PA", "胸片", "胸部", "LUNGS", "Brustkorb", "CXR PORTABLE"]
_OTHERS: Final = ["KNEE", "手腕", "ABDOMEN", "Hand links", "RODILLA", "FOOT_AP", "腰椎", "SKULL", "PELVIS AP"]
_FRONTAL: Final = ["PA", "AP SUPINE", "正位", "后前位", "FRONTAL", "AP PORTABLE", "Postero-Anterior"]
_LATERAL: Final = ["LATERAL", "侧位", "LL", "LAT", "左侧位", "RL", "Lateral left"]
_WINDOWS: Final = [(2048, 0), (2048, -4096), ("NaN", 4096), (2048, "NaN"), (1e6, 100), (-90000, 4096), ("", "")]


@dataclass
class Row:
    """How many variants of one kind got what a user expects; ``wrong`` names the others."""

    kind: str
    expected: str
    right: int = 0
    total: int = 0
    wrong: list[str] = field(default_factory=list)

    def count(self, name: str, is_right: bool) -> None:
        """Count one variant."""
        self.total += 1
        self.right += is_right
        if not is_right:
            self.wrong.append(name)


class Box:
    """A box of its own with the reference model, in this process."""

    def __init__(self, directory: Path) -> None:
        self.store = Store(Settings.parse({"data_dir": directory, "disk_reserve_bytes": 0, "tune_at_activation": False}))
        activate(self.store, reference_bundle(), "bench")
        self._worker = Worker(self.store, lambda _seconds: None)
        self._worker.prepare()

    def verdict(self, data: bytes) -> tuple[InstanceView, str]:
        """Analyse one file: its image and the patient's name; raises IngestError where it is refused."""
        accepted = Ingest(self.store).accept(data, Source("cli", "bench"))
        self.store.planner.close_series([accepted.stored.series_id])
        while self._worker.run_once():
            pass
        worklist = Worklist(self.store)
        return worklist.instance(accepted.stored.instance_id), worklist.study(accepted.stored.study_id).row.patient_name


def run(scratch: Path, shared: Path) -> list[Row]:
    """Analyse every variant; ``shared`` holds the films."""
    box, films = Box(scratch), list(_films(shared))
    scores = {name: _score(box, _file(pixels)) for name, pixels in films}
    rows = [_good(box, films), *_turned(box, films, scores), _negative(box, films), _other_images(box, shared)]
    name, film = films[0]
    return [*rows, _names(box, film), *_words(box, film), _windows(box, film, scores[name]), _broken(box, film, scores[name])]


def _films(shared: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Frontal films of different patients, none of them in the field cases, at a size that keeps this short."""
    with (shared / "data" / "cxr_labels.csv").open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["view"] in ("PA", "AP")]
    for row in [rows[index] for index in np.random.default_rng(_SEED).permutation(len(rows))[:_FILMS]]:
        with Image.open(shared / "data" / row["file"]) as picture:
            grey = picture.convert("L")
            grey.thumbnail((_SIDE, _SIDE))
            yield row["patient"], np.asarray(grey)


def _file(pixels: np.ndarray, encoding: str = "utf-8", **attributes: Any) -> bytes:
    """A DX file of display pixels, uint8 [rows, columns]; attributes are set as they are, valid or not, in ``encoding``."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID = generate_uid(), generate_uid()
    ds.SpecificCharacterSet, ds.PatientName, ds.PatientID, ds.PatientAge = "ISO_IR 192", "Bench", generate_uid()[-12:], "040Y"
    ds.Modality, ds.BodyPartExamined, ds.ViewPosition = "DX", "CHEST", "PA"
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.PixelData = (np.ascontiguousarray(pixels).astype(np.uint16) * 16).tobytes()
    ds.WindowCenter, ds.WindowWidth = "2048", "4096"
    markers = {}
    for number, (keyword, value) in enumerate(attributes.items()):
        if value is None:
            delattr(ds, keyword)
        elif isinstance(value, str) and not value.isascii():  # pydicom would encode it as the header says
            text = value.encode(encoding)
            marker = f"{number}Q".ljust(len(text), "Z")
            markers[marker.encode()] = text
            setattr(ds, keyword, marker)
        else:
            setattr(ds, keyword, value)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    stream = BytesIO()
    pydicom.dcmwrite(stream, ds, enforce_file_format=True)
    raw = stream.getvalue()
    for marker_bytes, text in markers.items():
        raw = raw.replace(marker_bytes, text)
    return raw


def _score(box: Box, data: bytes) -> float:
    image, _ = box.verdict(data)
    return image.findings[0].score if image.findings else math.nan


def _reason(image: InstanceView) -> str:
    return image.reason.code if image.reason else ""


def _codes(image: InstanceView) -> set[str]:
    return {note.code for note in (*image.notes, *(note for job in image.jobs for note in job.notes))}


def _good(box: Box, films: list[tuple[str, np.ndarray]]) -> Row:
    row = Row("upright films, and mirrored ones that nothing states", "analysed")
    for name, film in films:
        for what, pixels in (("", film), (" mirrored", film[:, ::-1])):
            row.count(name + what, box.verdict(_file(pixels))[0].state is ScanState.AI_READY)
    return row


def _turned(box: Box, films: list[tuple[str, np.ndarray]], scores: dict[str, float]) -> Iterator[Row]:
    stated = Row("turned or mirrored, Patient Orientation states it", "the score of the upright film, with a note")
    for name, film in films:
        for directions in _DIRECTIONS:
            header = Dataset()
            header.PatientOrientation = directions.split("\\")
            orientation: Orientation = orientation_of(header)
            image, _ = box.verdict(_file(orientation.restore(film), PatientOrientation=directions.split("\\")))
            near = bool(image.findings) and abs(image.findings[0].score - scores[name]) <= _NEAR
            stated.count(f"{name} {directions}", near and "caution.turned" in _codes(image))
    yield stated
    silent = Row("turned, nothing states it", "stopped as turned by these degrees")
    for name, film in films:
        for quarters in (1, 2, 3):
            image, _ = box.verdict(_file(np.rot90(film, -quarters)))
            reason = image.reason
            silent.count(
                f"{name} {90 * quarters}", reason is not None and (reason.code, reason.detail) == ("quality.turned", str(90 * quarters))
            )
    yield silent


def _negative(box: Box, films: list[tuple[str, np.ndarray]]) -> Row:
    row = Row("negative polarity, nothing states it", "stopped as a negative")
    for name, film in films:
        row.count(name, _reason(box.verdict(_file(255 - film))[0]) == "quality.negative")
    return row


def _other_images(box: Box, shared: Path) -> Row:
    row = Row("not a chest film, labelled CHEST PA", "stopped")
    rng = np.random.default_rng(_SEED)
    pictures = {path.stem: path for path in sorted((shared / "data" / "tasks").rglob("*.png"))[:200] if "lungs" not in path.parts}
    pictures |= {path.stem: path for path in sorted((shared / "data" / "tasks").rglob("*.jpg"))[:200] if "lungs" not in path.parts}
    for name in sorted(pictures)[:: max(1, len(pictures) // 8)]:
        with Image.open(pictures[name]) as picture:
            row.count(name, box.verdict(_file(np.asarray(picture.convert("L"))))[0].state is ScanState.QUALITY_REJECTED)
    for number in range(4):
        shape = (rng.random((18, 16)) * 255).astype(np.uint8)
        blocks = np.asarray(Image.fromarray(shape).resize((420, 480)))
        row.count(f"clouds {number}", box.verdict(_file(blocks))[0].state is ScanState.QUALITY_REJECTED)
    return row


def _names(box: Box, film: np.ndarray) -> Row:
    row, rng = Row("Chinese names under a wrong or missing character set", "the name"), np.random.default_rng(_SEED)
    headers = [("ISO_IR 100", "gb18030"), (None, "gb18030"), (None, "utf-8"), ("ISO_IR 192", "gbk"), ("ISO_IR 100", "utf-8")]
    for number in range(20):
        name = rng.choice(list(_SURNAMES)) + "^" + "".join(rng.choice(list(_GIVEN), 2))
        for character_set, encoding in headers:
            _, found = box.verdict(_file(film, encoding, SpecificCharacterSet=character_set, PatientName=name))
            row.count(f"{number} {encoding} under {character_set}", found == name)
    return row


def _words(box: Box, film: np.ndarray) -> Iterator[Row]:
    def is_body_part(image: InstanceView) -> bool:
        return _reason(image) == "scope.body_part"

    kinds: list[tuple[str, str, str, list[str], Callable[[InstanceView], bool]]] = [
        ("body part in other words", "analysed", "BodyPartExamined", _CHEST, lambda image: image.state is ScanState.AI_READY),
        ("another body part", "out of scope", "BodyPartExamined", _OTHERS, lambda image: image.state is ScanState.OUT_OF_SCOPE),
        ("another body part in the description only", "out of scope", "SeriesDescription", _OTHERS, is_body_part),
        ("frontal view in other words", "analysed", "ViewPosition", _FRONTAL, lambda image: image.state is ScanState.AI_READY),
        ("lateral view in other words", "out of scope", "ViewPosition", _LATERAL, lambda image: _reason(image) == "scope.view"),
    ]  # fmt: skip
    for kind, expected, keyword, words, is_right in kinds:
        row = Row(kind, expected)
        for word in words:
            absent = {"BodyPartExamined": None} if keyword == "SeriesDescription" else {}
            row.count(word, is_right(box.verdict(_file(film, **absent, **{keyword: word}))[0]))
        yield row
    row = Row("animals, quality control, for processing", "out of scope, or a caution")
    for keyword, value in (
        ("PatientSpeciesDescription", "Feline"), ("PatientSpeciesDescription", "犬"), ("QualityControlImage", "YES"),
        ("PresentationIntentType", "FOR PROCESSING"),
    ):  # fmt: skip
        image, _ = box.verdict(_file(film, **{keyword: value}))
        row.count(f"{keyword} {value}", image.state is ScanState.OUT_OF_SCOPE)
    yield row


def _windows(box: Box, film: np.ndarray, score: float) -> Row:
    row = Row("invalid or useless windows, decimal commas", "near the score of the film, with a caution where one was given")
    for center, width in [*_WINDOWS, ("2048,0", "4096,0")]:
        is_inverting = isinstance(width, int) and width < 0  # such senders store high values for what is to be dark
        raw = _file(255 - film if is_inverting else film, WindowCenter="11111", WindowWidth="22222")
        for marker, value in ((b"11111 ", center), (b"22222 ", width)):
            text = (str(value) if value == value else "NaN").encode()[:6].ljust(6)
            raw = raw.replace(marker, text)
        image, _ = box.verdict(raw)
        near = bool(image.findings) and abs(image.findings[0].score - score) <= 0.1
        row.count(f"{center}/{width}", near and (center == "" or bool(_codes(image) & {"caution.window", "caution.decimal_comma"})))
    return row


def _broken(box: Box, film: np.ndarray, score: float) -> Row:
    row = Row("broken but whole files", "the score of the film, with a caution")
    compressed = pydicom.dcmread(BytesIO(_file(film)))
    compressed.compress(JPEG2000Lossless, generate_instance_uid=False)
    stream = BytesIO()
    compressed.save_as(stream)
    closed = stream.getvalue()
    variants = {
        "encapsulated, never closed": closed[:-8],
        "encapsulated, closed by zeros": closed[:-8] + bytes(8),
        "without preamble": _file(film)[132:],
    }
    for name, data in variants.items():
        try:
            image, _ = box.verdict(data)
        except IngestError as error:
            row.count(f"{name}: {error.code}", False)
            continue
        near = bool(image.findings) and abs(image.findings[0].score - score) <= _NEAR
        row.count(name, near and "caution.repaired" in _codes(image))
    return row


def print_rows(rows: list[Row]) -> None:
    """Print the table, and the variants that did not get what a user expects."""
    print("\n| kind | expected | right | of |\n|---|---|--:|--:|")
    for row in rows:
        print(f"| {row.kind} | {row.expected} | {row.right} | {row.total} |")
    for row in rows:
        if row.wrong:
            print(f"\n{row.kind}: {'; '.join(row.wrong[:20])}")
