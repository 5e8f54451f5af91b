"""Pictures that are no frontal chest film, for training and testing the input check: real ones of ``../shared``, and drawn ones.

Real pictures are split by file, clip or series before anything is trained. Clips whose licence forbids commercial use are for tests only.
The drawn ones are simple: rays of a hand, a knee, a pelvis, noise, shapes, text. They keep the network from taking whatever it has never
seen for a chest; a figure measured on them says little about real hands and knees.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from appliance.core.errors import PixelError
from appliance.imaging.greyscale import pixel_aspect
from appliance.imaging.pixels import decode_frame, frame_count
from appliance.imaging.preprocessing import display_image, from_display
from model_sync.bundle import InputSpec
from quantize.reference.phantom import Phantom, display

Picture = NDArray[np.uint8]
# One in so many DICOM files is held out, by the digest of its name.
_HELD_OUT_ONE_IN: Final = 3
_FRAMES_OF_A_FILE: Final = 3
_DRAWN_SIDE: Final = 160
# Seeds below this number draw the golden cases and the samples, which no network is trained on.
FIRST_TRAINING_SEED: Final = 1000


@dataclass(frozen=True)
class OtherPicture:
    """A displayed picture (uint8 [rows, columns], MONOCHROME2) that is no frontal chest film, and the kind it is counted under."""

    kind: str
    pixels: Picture


def real(shared: Path, spec: InputSpec, *, held_out: bool) -> Iterator[OtherPicture]:
    """Yield the real pictures for training, or those held out for testing."""
    data = shared / "data"
    yield from _dicom_files(data, spec, held_out=held_out)
    yield from _blood_smears(data / "tasks" / "bccd", held_out=held_out)
    yield from _ultrasound(data / "tasks" / "lus", spec, held_out=held_out)
    if held_out:
        yield from _slices(data / "series" / "mr_pd_ge_bigendian", spec, "MR of another head", every=2)
        yield from _laterals(data)
    else:
        yield from _slices(data / "series" / "ct_head_ge_jpegls", spec, "CT of a head", every=2)
        yield from _slices(data / "series" / "mr_t1_uih", spec, "MR of a head", every=4)
        yield from projections(data / "series" / "ct_head_ge_jpegls")


def _shown(path: Path, spec: InputSpec, frame: int) -> Picture:
    """Return a frame of a DICOM file as displayed, scaled so that its pixels are square."""
    ds = pydicom.dcmread(path, force=True)
    pixels = display_image(ds, decode_frame(ds, frame), spec, frame)[0]
    aspect = pixel_aspect(ds, frame)
    if abs(aspect - 1) < 0.01:
        return pixels
    rows, columns = pixels.shape
    return np.asarray(Image.fromarray(pixels).resize((columns, max(1, round(rows * aspect)))))


def _dicom_files(data: Path, spec: InputSpec, *, held_out: bool) -> Iterator[OtherPicture]:
    """Yield up to three frames of each DICOM file that is no CR, one of those that look the same in the model's input."""
    with (data / "dicom_manifest.csv").open(encoding="utf-8", newline="") as stream:
        names = sorted(row["file"] for row in csv.DictReader(stream) if row["expectation"] == "ok" and row["modality"] != "CR")
    seen: set[bytes] = set()
    for name in names:
        try:
            count = frame_count(pydicom.dcmread(data / name, force=True, stop_before_pixels=True))
            frames = sorted({0, count // 2, count - 1})[:_FRAMES_OF_A_FILE]
            pictures = [_shown(data / name, spec, frame) for frame in frames]
        except PixelError:
            continue  # files that the box does not display reach no input check
        alike = {from_display(pixels, spec).tensor.tobytes() for pixels in pictures}
        is_held_out = hashlib.sha256(Path(name).name.encode()).digest()[0] % _HELD_OUT_ONE_IN == 0
        if is_held_out == held_out and not alike & seen:
            yield from (OtherPicture(f"DICOM {Path(name).name.split('_')[0]}", pixels) for pixels in pictures)
        seen |= alike


def _blood_smears(folder: Path, *, held_out: bool) -> Iterator[OtherPicture]:
    with (folder / "split.csv").open(encoding="utf-8", newline="") as stream:
        names = [row["file"] for row in csv.DictReader(stream) if (row["split"] != "train") == held_out]
    for name in names:
        with Image.open(folder / name) as picture:
            yield OtherPicture("photograph of a blood smear", np.asarray(picture.convert("L")))


def _ultrasound(folder: Path, spec: InputSpec, *, held_out: bool) -> Iterator[OtherPicture]:
    """Yield frames of the clips: for training those of the training part whose licence is no NC one, for testing all others."""
    with (folder / "lus.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        if (row["split"] == "train" and "NC" not in row["licence"]) != held_out:
            yield from (OtherPicture("ultrasound of a lung", _shown(folder / row["file"], spec, frame)) for frame in range(0, 25, 8))


def _slices(folder: Path, spec: InputSpec, kind: str, every: int) -> Iterator[OtherPicture]:
    for path in sorted(path for path in folder.rglob("*") if path.is_file())[::every]:
        yield OtherPicture(kind, _shown(path, spec, 0))


def _laterals(data: Path) -> Iterator[OtherPicture]:
    with (data / "cxr_labels.csv").open(encoding="utf-8", newline="") as stream:
        names = [row["file"] for row in csv.DictReader(stream) if row["view"] == "L"]
    for name in names:
        with Image.open(data / name) as picture:
            yield OtherPicture("lateral chest film", np.asarray(picture.convert("L")))


def projections(folder: Path, count: int = 48) -> Iterator[OtherPicture]:
    """Yield simulated skull films: a head CT turned by random angles about its axis and summed along the beam."""
    datasets = [pydicom.dcmread(path) for path in folder.rglob("*") if path.is_file()]
    datasets.sort(key=lambda ds: float(ds.ImagePositionPatient[2]))
    planes = [decode_frame(ds) * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in datasets]
    # Attenuation relative to water: air 0, water 1, bone up to 3.
    small = [Image.fromarray(np.clip(plane / 1000 + 1, 0, 3).astype(np.float32)).resize((128, 128)) for plane in planes]
    thickness = abs(float(datasets[1].ImagePositionPatient[2]) - float(datasets[0].ImagePositionPatient[2]))
    pitch = float(datasets[0].PixelSpacing[0]) * datasets[0].Columns / 128
    rng = np.random.default_rng(5)
    for _ in range(count):
        angle = rng.uniform(0, 360)
        film = np.stack([np.asarray(plane.rotate(angle, Image.Resampling.BILINEAR)).sum(0) for plane in reversed(small)])
        grey = Image.fromarray(np.clip(255 * (film / film.max()) ** rng.uniform(0.7, 1.4), 0, 255).astype(np.uint8))
        yield OtherPicture("simulated film of a skull", np.asarray(grey.resize((128, round(len(small) * thickness / pitch)))))


def drawn(seed: int, count: int) -> Iterator[OtherPicture]:
    """Yield ``count`` drawn pictures of each kind; another seed draws others."""
    rng = np.random.default_rng(seed)
    for kind, draw in _KINDS.items():
        for _ in range(count):
            yield OtherPicture(kind, draw(rng))


def lateral_phantoms(seeds: range) -> Iterator[OtherPicture]:
    """Yield drawn lateral chests, in several shapes."""
    for seed in seeds:
        yield OtherPicture("lateral chest phantom", display(Phantom(320, 260 + seed % 5 * 30, seed=seed, view="LL")))


def _canvas(rng: np.random.Generator) -> tuple[int, int]:
    return int(_DRAWN_SIDE * rng.uniform(0.6, 1)), int(_DRAWN_SIDE * rng.uniform(0.6, 1))


def _grey(rng: np.random.Generator, low: int = 0, high: int = 255) -> int:
    return int(rng.integers(low, high + 1))


def _noise(rng: np.random.Generator) -> Picture:
    """Draw noise of one size or the sum of several, which looks like clouds."""
    rows, columns = _canvas(rng)
    total = np.zeros((rows, columns), np.float32)
    coarsest, finest = np.sort(rng.choice(7, 2, replace=False)).tolist()
    for power in range(coarsest + 1, finest + 1):
        coarse = Image.fromarray(rng.standard_normal((2**power, 2**power), dtype=np.float32))
        total += np.asarray(coarse.resize((columns, rows), Image.Resampling.BICUBIC)) * 2 ** (-power * rng.uniform(0, 1.2))
    total = rng.standard_normal((rows, columns), dtype=np.float32) if rng.random() < 0.2 else total
    return np.asarray(np.clip(total / (total.std() + 1e-6) * rng.uniform(10, 60) + rng.uniform(60, 190), 0, 255), np.uint8)


def _gradient(rng: np.random.Generator) -> Picture:
    """Draw a ramp or a round glow, sometimes in steps."""
    rows, columns = _canvas(rng)
    y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    plane = x * np.cos(angle) + y * np.sin(angle) if rng.random() < 0.5 else np.hypot(x - rng.uniform(-1, 1), y - rng.uniform(-1, 1))
    plane = np.round(plane * rng.integers(2, 8)) if rng.random() < 0.4 else plane
    return np.asarray((plane - plane.min()) / (np.ptp(plane) + 1e-6) * rng.uniform(40, 255), np.uint8)


def _blank(rng: np.random.Generator) -> Picture:
    rows, columns = _canvas(rng)
    return np.clip(_grey(rng) + rng.standard_normal((rows, columns)) * rng.uniform(0, 6), 0, 255).astype(np.uint8)


def _shapes(rng: np.random.Generator) -> Picture:
    """Draw rectangles, ellipses, lines and polygons of any grey."""
    rows, columns = _canvas(rng)
    picture = Image.new("L", (columns, rows), _grey(rng))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(1, 12))):
        points = (rng.random((2, 2)) * (columns, rows)).tolist()
        box = [*np.min(points, 0).tolist(), *(np.max(points, 0) + 1).tolist()]
        match rng.integers(4):
            case 0:
                draw.rectangle(box, fill=_grey(rng))
            case 1:
                draw.ellipse(box, fill=_grey(rng), outline=_grey(rng))
            case 2:
                draw.line(box, fill=_grey(rng), width=int(rng.integers(1, 12)))
            case _:
                draw.polygon([tuple(point) for point in (rng.random((5, 2)) * (columns, rows)).tolist()], fill=_grey(rng))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 3))))


def _text_page(rng: np.random.Generator) -> Picture:
    """Draw a page of letters, dark on light or light on dark."""
    rows, columns = _canvas(rng)
    light = rng.random() < 0.7
    picture = Image.new("L", (columns, rows), _grey(rng, 180) if light else _grey(rng, 0, 60))
    draw = ImageDraw.Draw(picture)
    size = rng.uniform(5, 20)
    for y in np.arange(rng.uniform(2, 12), rows - size, size * rng.uniform(1.1, 2)):
        line = "".join(chr(int(letter)) for letter in rng.integers(33, 122, int(rng.integers(4, 40))))
        draw.text((rng.uniform(2, 12), y), line, fill=_grey(rng, 0, 90) if light else _grey(rng, 150), font=ImageFont.load_default(size))
    return np.asarray(picture)


def _thick(plane: NDArray[np.float32], points: NDArray[np.float64], radius: float, weight: float) -> None:
    """Add the attenuation of a tube along ``points`` ((x, y) in pixels) to ``plane``: a bone is densest at its rim."""
    height, width = plane.shape
    mask = Image.new("L", (width, height))
    inner = Image.new("L", (width, height))
    for picture, r in ((mask, radius), (inner, radius * 0.6)):
        draw = ImageDraw.Draw(picture)
        draw.line([tuple(point) for point in points.tolist()], fill=255, width=max(1, round(2 * r)), joint="curve")
        for x, y in points.tolist():
            draw.ellipse((x - r * 1.15, y - r * 1.15, x + r * 1.15, y + r * 1.15), fill=255)
    plane += weight * (np.asarray(mask, np.float32) - 0.45 * np.asarray(inner, np.float32)) / 255


def _film(plane: NDArray[np.float32], rng: np.random.Generator) -> Picture:
    """Convert attenuation to a displayed film, blurred and grainy, sometimes turned."""
    plane = plane / (plane.max() + 1e-6)
    grey = np.clip(255 * plane ** rng.uniform(0.5, 1.2) * rng.uniform(0.7, 1.1) + rng.uniform(0, 30), 0, 255).astype(np.uint8)
    picture = Image.fromarray(grey).filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.8)))
    grainy = np.asarray(picture) + rng.standard_normal(plane.shape) * rng.uniform(0, 5)
    return np.ascontiguousarray(np.rot90(np.clip(grainy, 0, 255).astype(np.uint8), int(rng.integers(4))))


def _hand(rng: np.random.Generator) -> Picture:
    """Draw one hand, or two: five rays of four bones, a wrist and two bones of the forearm, in soft tissue."""
    plane = np.zeros((_DRAWN_SIDE, int(_DRAWN_SIDE * rng.uniform(0.7, 1))), np.float32)
    hands = int(rng.integers(1, 3))
    for part in range(hands):
        wide = plane.shape[1] / hands
        wrist = np.array([(part + 0.5) * wide, _DRAWN_SIDE * rng.uniform(0.7, 0.85)])
        spread, length = rng.uniform(0.12, 0.3), _DRAWN_SIDE * rng.uniform(0.5, 0.7) / hands**0.3
        for ray, part_of in enumerate((0.62, 0.9, 1.0, 0.94, 0.75)):
            angle = (ray - 2) * spread - (0.45 if ray == 0 else 0) + rng.normal(0, 0.03)
            way = np.array([np.sin(angle), -np.cos(angle)]) * length * part_of
            _thick(plane, np.stack([wrist, wrist + way]), wide * rng.uniform(0.06, 0.09), 0.3)
            for start, end in ((0.12, 0.42), (0.46, 0.68), (0.71, 0.85), (0.87, 0.97)):
                _thick(plane, np.stack([wrist + start * way, wrist + end * way]), wide * 0.028, 0.5)
        for side in (-1, 1):
            foot = np.array([wrist[0] + side * wide * 0.09, _DRAWN_SIDE + 9.0])
            _thick(plane, np.stack([wrist + np.array([side * wide * 0.07, wide * 0.05]), foot]), wide * 0.06, 0.6)
        _thick(plane, np.stack([wrist, np.array([wrist[0], _DRAWN_SIDE + 9.0])]), wide * 0.2, 0.3)
    return _film(np.minimum(plane, 1.6), rng)


def _limb(rng: np.random.Generator) -> Picture:
    """Draw one knee, elbow or leg, or two: long bones that meet at a joint, in soft tissue."""
    plane = np.zeros((_DRAWN_SIDE, int(_DRAWN_SIDE * rng.uniform(0.5, 1))), np.float32)
    limbs = int(rng.integers(1, 3))
    for part in range(limbs):
        wide = plane.shape[1] / limbs
        middle = (part + 0.5) * wide
        joint = np.array([middle + rng.normal(0, 4), _DRAWN_SIDE * rng.uniform(0.35, 0.65)])
        top, bottom = np.array([middle + rng.normal(0, 9), -9.0]), np.array([middle + rng.normal(0, 9), _DRAWN_SIDE + 9.0])
        thin = wide * rng.uniform(0.09, 0.16)
        _thick(plane, np.stack([top, joint, bottom]), wide * rng.uniform(0.25, 0.42), 0.45)
        _thick(plane, np.stack([top, joint - np.array([0, thin * 1.2])]), thin, 0.8)
        _thick(plane, np.stack([joint + np.array([0, thin * 1.2]), bottom]), thin, 0.8)
        if rng.random() < 0.7:
            _thick(plane, np.stack([joint + np.array([thin * 1.5, thin * 2]), bottom + np.array([thin * 1.6, 0])]), thin * 0.45, 0.6)
    return _film(plane, rng)


def _abdomen(rng: np.random.Generator) -> Picture:
    """Draw a belly with spine, pelvis and gas; or only the spine, or only the pelvis."""
    rows, columns = _DRAWN_SIDE, int(_DRAWN_SIDE * rng.uniform(0.7, 1))
    plane = np.full((rows, columns), rng.uniform(0.35, 0.7), np.float32)
    middle = columns * rng.uniform(0.45, 0.55)
    height = rows / rng.uniform(6, 11)
    for y in np.arange(-height, rows * rng.uniform(0.6, 1.1), height):
        _thick(plane, np.array([[middle - height * 0.5, y + height / 2], [middle + height * 0.5, y + height / 2]]), height * 0.4, 0.35)
    if rng.random() < 0.7:
        hip = np.array([middle, rows * rng.uniform(0.55, 0.75)])
        for side in (-1, 1):
            wing = np.array([[0.08, 0.1], [0.2, -0.12], [0.36, -0.05], [0.3, 0.14], [0.12, 0.3]]) * (side * columns, rows)
            _thick(plane, wing + hip, columns * 0.05, 0.35)
            _thick(plane, np.array([[0.3, 0.18], [0.4, 0.25], [0.38, 0.6]]) * (side * columns, rows) + hip, columns * 0.06, 0.4)
    gas = Image.new("L", (columns, rows))
    draw = ImageDraw.Draw(gas)
    for _ in range(int(rng.integers(0, 14))):
        x, y, r = rng.random() * columns, rng.random() * rows, rng.uniform(3, 16)
        draw.ellipse((x - r, y - r * rng.uniform(0.5, 1.2), x + r, y + r), fill=255)
    plane -= np.asarray(gas.filter(ImageFilter.GaussianBlur(3)), np.float32) / 255 * rng.uniform(0.1, 0.35)
    return _film(np.maximum(plane, 0.02), rng)


_KINDS: Final[dict[str, Callable[[np.random.Generator], Any]]] = {
    "noise": _noise,
    "gradient": _gradient,
    "blank": _blank,
    "shapes": _shapes,
    "page of text": _text_page,
    "drawn hand": _hand,
    "drawn limb": _limb,
    "drawn abdomen": _abdomen,
}
