"""Convert the pixels of an image to the input tensor of a model, by the steps of the manifest's ``InputSpec``. Pure functions.

The reference is the pipeline that a model card describes (display image, pad to a square, resize by Pillow, divide by 255). These steps
give the same numbers. Values are looked up, not computed (see ``greyscale``), and pixels have 8 bits until the image is as small as the
input of the model: 2048 x 2048 pixels of 16 bits take 12 ms on one core.

Images with non-square pixels are padded and resized so that pixels are square in the tensor and anatomy keeps its shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image

from appliance.core.correction import NOTHING_DECIDED, Correction
from appliance.core.domain import Note
from appliance.core.errors import InferenceError
from appliance.imaging.display_frame import eight_bits, palette_rgb
from appliance.imaging.greyscale import display_grey, grey_header, pixel_aspect, without_windows_outside
from appliance.imaging.orientation import UPRIGHT, Orientation, orientation_of
from appliance.imaging.pixels import decode_frame
from model_sync.bundle import Letterbox, ModalityLut, Monochrome2, Normalise, Resize, Scale, ToUint8, Voi

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pydicom.dataset import Dataset

    from model_sync.bundle import InputSpec

_FILTERS: Final = {
    "antialias_bilinear": Image.Resampling.BILINEAR,
    "antialias_bicubic": Image.Resampling.BICUBIC,
    "area": Image.Resampling.BOX,
}
# Pixels this close to square are treated as square.
_SQUARE: Final = 0.01

# Limits of `check_quality`.
_QUALITY_SIDE: Final = 128
_MIN_SIDE: Final = 100
_MIN_RANGE: Final = 8.0
_MIN_SPREAD: Final = 24.0
_MAX_EXTREME: Final = 0.9
_MAX_ROUGHNESS: Final = 0.6


@dataclass(frozen=True)
class Geometry:
    """The exact mapping between pixels of the upright image and of the model's input.

    Coordinates are (x, y) with the origin at the top left corner: the centre of the first pixel is (0.5, 0.5).
    ``x_input = x_image * scale_x + pad_x``, and the same for y. ``orientation`` turned the image of the file upright.
    """

    rows: int
    columns: int
    scale_x: float
    scale_y: float
    pad_x: float
    pad_y: float
    input_h: int
    input_w: int
    orientation: Orientation = UPRIGHT

    def to_input(self, x: float, y: float) -> tuple[float, float]:
        """Map a point of the image to the model's input."""
        return x * self.scale_x + self.pad_x, y * self.scale_y + self.pad_y

    def to_file(self, x: float, y: float) -> tuple[float, float]:
        """Map a point of the upright image to the image as the file has it."""
        return self.orientation.restore_point(x, y, self.rows, self.columns)


@dataclass(frozen=True)
class PreparedInput:
    """An image prepared for a model.

    Attributes:
        tensor: float32 [1, channels, height, width].
        display: uint8 [rows, columns], the display image, turned upright.
        aspect: height of a pixel of ``display`` as a multiple of its width.
        geometry: mapping between image and tensor.
        steps: description of the steps.
    """

    tensor: NDArray[np.float32]
    display: NDArray[np.uint8]
    geometry: Geometry
    steps: tuple[str, ...]
    notes: tuple[Note, ...] = ()
    aspect: float = 1.0


def to_tensor(
    ds: Dataset, input_spec: InputSpec, frame: int = 0, pixels: NDArray[Any] | None = None, correction: Correction = NOTHING_DECIDED
) -> PreparedInput:
    """Prepare one frame of an image: turned by its header, then corrected as a person decided.

    ``pixels`` are its values where they are decoded already.

    Raises:
        PixelError: the frame cannot be decoded, or its header is invalid.
    """
    values = decode_frame(ds, frame) if pixels is None else pixels
    display, shown, notes = display_image(ds, values, input_spec, frame)
    aspect = pixel_aspect(ds, frame)
    orientation = orientation_of(ds).then_turn(correction.degrees)
    if not orientation.is_upright:
        display, shown = np.ascontiguousarray(orientation.apply(display)), (*shown, f"turned {orientation.description}")
        aspect = 1 / aspect if orientation.transpose else aspect
    if correction.inverts:
        display, shown = 255 - display, (*shown, "inverted by a person")
    return _prepare(display, input_spec, 1.0 if abs(aspect - 1) < _SQUARE else aspect, shown, orientation, notes)


def from_display(pixels: NDArray[np.uint8], input_spec: InputSpec, aspect: float = 1.0) -> PreparedInput:
    """Prepare a display image (uint8 [rows, columns], MONOCHROME2), as golden cases contain it; ``aspect`` as in the result."""
    return _prepare(pixels, input_spec, aspect, ())


def display_image(
    ds: Dataset, values: NDArray[Any], input_spec: InputSpec, frame: int = 0
) -> tuple[NDArray[np.uint8], tuple[str, ...], tuple[Note, ...]]:
    """Convert a frame to the image that a person would see: uint8 [rows, columns], a description of the steps, and cautions.

    Raises:
        PixelError: the transformations in the header are invalid, or the palette cannot be read.
    """
    voi_step = _display_steps(input_spec)
    if str(ds.get("PhotometricInterpretation")).strip() == "PALETTE COLOR":
        values = palette_rgb(ds, values)
        return _luminance(eight_bits(values, 8 * values.dtype.itemsize)), ("palette to grey",), ()
    if values.ndim == 3:
        return _luminance(eight_bits(values, int(ds.get("BitsStored") or 8))), ("colour to grey",), ()
    header = without_windows_outside(grey_header(ds, frame), values)
    display, voi = display_grey(values, header, voi_step.default, int(ds.get("BitsStored") or 32))
    return display, (f"rescale {header.slope:g} {header.intercept:g}", voi, *(("inverted",) if header.inverse else ())), header.notes


def _display_steps(spec: InputSpec) -> Voi:
    """Return the VOI step of a pipeline; raises InferenceError where the pipeline does not start with the four display steps."""
    match spec.pipeline[:4]:
        case [ModalityLut(), Voi() as voi, Monochrome2(), ToUint8()]:
            return voi
    raise InferenceError("job.error", "the model's pipeline must begin with modality_lut, voi, monochrome2 and to_uint8")


def _luminance(colour: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Convert RGB to grey by ITU-R BT.601, as the YBR photometric interpretations do."""
    return np.asarray(Image.fromarray(colour).convert("L"))


def _prepare(
    display: NDArray[np.uint8],
    spec: InputSpec,
    aspect: float,
    shown: tuple[str, ...],
    orientation: Orientation = UPRIGHT,
    notes: tuple[Note, ...] = (),
) -> PreparedInput:
    _display_steps(spec)
    rows, columns = display.shape
    picture: NDArray[Any] = display
    steps, pad_x, pad_y = list(shown), 0, 0
    padded_h, padded_w = rows, columns
    for step in spec.pipeline[4:]:
        if isinstance(step, (Letterbox, Resize)) and picture.ndim != 2:
            raise InferenceError("job.error", "the model's pipeline must letterbox and resize before it normalises")
        if isinstance(step, Letterbox):
            picture, pad_x, pad_y = _letterbox(picture, spec.width / spec.height * aspect, step.fill)
            padded_h, padded_w = picture.shape
            steps.append(f"letterbox {padded_w}x{padded_h}" + (f", pixels {aspect:.3g} times as high as wide" if aspect != 1 else ""))
        elif isinstance(step, Resize):
            picture = np.asarray(Image.fromarray(picture).resize((step.width, step.height), _FILTERS[step.filter]))
            steps.append(f"resize {step.width}x{step.height} {step.filter}")
        elif isinstance(step, (Scale, Normalise)):
            picture = _normalise(picture, step)
            steps.append(step.step)
        else:
            raise InferenceError("job.error", f"the model's pipeline has {step.step} after to_uint8")
    scale_x, scale_y = spec.width / padded_w, spec.height / padded_h
    tensor = np.empty((1, spec.channels, spec.height, spec.width), np.float32)
    tensor[:] = picture
    geometry = Geometry(rows, columns, scale_x, scale_y, pad_x * scale_x, pad_y * scale_y, spec.height, spec.width, orientation)
    return PreparedInput(tensor, display, geometry, tuple(steps), notes, aspect)


def _letterbox(picture: NDArray[Any], ratio: float, fill: int) -> tuple[NDArray[Any], int, int]:
    """Pad to ``ratio`` (columns / rows) with the image in the centre; returns also the columns and rows added before it."""
    rows, columns = picture.shape
    width, height = max(columns, round(rows * ratio)), max(rows, round(columns / ratio))
    left, top = (width - columns) // 2, (height - rows) // 2
    if (height, width) == (rows, columns):
        return picture, 0, 0
    padded = np.full((height, width), fill, picture.dtype)
    padded[top : top + rows, left : left + columns] = picture
    return padded, left, top


def _normalise(picture: NDArray[Any], step: Scale | Normalise) -> NDArray[np.float32]:
    """Convert grey values to scaled floats; ``Normalise`` makes one plane per channel."""
    values: NDArray[np.float32] = picture.astype(np.float32)
    if isinstance(step, Scale):
        scaled: NDArray[np.float32] = values / np.float32(step.divide_by)
        return scaled
    mean, std = (np.asarray(numbers, np.float32)[:, None, None] for numbers in (step.mean, step.std))
    result: NDArray[np.float32] = (values - mean) / std
    return result


@dataclass(frozen=True)
class QualityVerdict:
    """Whether the quality of an image allows an analysis; ``code`` is the reason where not, ``measures`` the measured values."""

    ok: bool
    code: str | None
    measures: dict[str, float]


def check_quality(display: NDArray[np.uint8]) -> QualityVerdict:
    """Check whether an image is blank, saturated or too small for an analysis.

    The image, uint8 [rows, columns] as displayed, is first reduced by averaging to at least 128 pixels a side, so that noise is not taken
    for content. The thresholds leave a wide margin to real images: of 6,769 training and 139 test chest X-rays the smallest spread between
    the 2nd and the 98th percentile is 55 grey levels, the greatest roughness 0.19, the largest share of black and white pixels 0.59.
    """
    side = min(display.shape)
    small = np.asarray(Image.fromarray(display).reduce(max(1, side // _QUALITY_SIDE))).astype(np.float32)
    low, high = np.percentile(small, (2, 98))
    deviation = float(small.std())
    measures = {
        "side": float(side),
        "range": float(np.ptp(small)),
        "spread": float(high - low),
        "extreme": float(np.mean((small <= 4) | (small >= 251))),
        "roughness": float(np.abs(np.diff(small, axis=1)).mean() / deviation) if deviation and small.shape[1] > 1 else 0.0,
    }
    code = None
    if side < _MIN_SIDE:
        code = "quality.too_small"
    elif measures["range"] < _MIN_RANGE:
        code = "quality.blank"
    elif measures["extreme"] > _MAX_EXTREME:
        code = "quality.saturated"
    elif measures["spread"] < _MIN_SPREAD or measures["roughness"] > _MAX_ROUGHNESS:
        code = "quality.blank"
    return QualityVerdict(code is None, code, measures)
