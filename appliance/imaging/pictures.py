"""Decode a PNG or JPEG to grey values with Pillow."""

from __future__ import annotations

import struct
import warnings
from io import BytesIO
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from appliance.core.errors import IngestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_PIXELS: Final = 100_000_000
MAX_SIDE: Final = 0xFFFF  # Rows and Columns are unsigned shorts
_FORMATS: Final = ("PNG", "JPEG")
# The exceptions of Pillow for damaged files and damaged EXIF.
_PICTURE_ERRORS: Final = (
    UnidentifiedImageError, OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, OverflowError, MemoryError,
    struct.error,
)  # fmt: skip


def grey_values(data: bytes) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Decode a PNG or JPEG to grey values [rows, columns], upright; a 16-bit PNG keeps its depth.

    This runs native code in the calling process; a file of a stranger goes through
    :func:`appliance.imaging.decoder_process.decode_picture`.

    Raises:
        IngestError: ``ingest.unsupported_image``, ``ingest.absurd_dimensions``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings about damaged EXIF
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(BytesIO(data), formats=_FORMATS)
            if picture.width * picture.height > MAX_PIXELS or max(picture.size) > MAX_SIDE:
                raise IngestError("ingest.absurd_dimensions", f"{picture.width}x{picture.height}")
            upright = ImageOps.exif_transpose(picture)
            if upright.mode.startswith("I"):
                return np.asarray(upright).astype(np.uint16)
            return np.asarray(_flatten(upright))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise IngestError("ingest.absurd_dimensions", "too many pixels") from error
    except _PICTURE_ERRORS as error:
        is_truncated = isinstance(error, OSError) and "truncated" in str(error)  # Pillow has no exception of its own for it
        detail = "not enough memory" if isinstance(error, MemoryError) else "cut short" if is_truncated else "damaged"
        raise IngestError("ingest.unsupported_image", detail) from error


def _flatten(picture: Image.Image) -> Image.Image:
    """Convert colour to grey by luminance; transparent pixels become black, like the border of a film."""
    if picture.mode in ("LA", "RGBA", "PA") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, rgba).convert("L")
    return picture.convert("L")
