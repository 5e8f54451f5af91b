"""Valid images whose data makes the decoders of ``hostile_decoders`` do what it says."""

from __future__ import annotations

import io
from pathlib import Path

import imagecodecs
import numpy as np
from PIL import Image, PngImagePlugin
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit

from quantize.reference.phantom import Phantom, dataset
from tests.support.scans import encode

DECODERS = Path(__file__).with_name("hostile_decoders")


def coded_frame(pixels: np.ndarray, action: str = "") -> bytes:
    """A JPEG (8 bits); with an ``action`` its first comment names that."""
    coded = bytes(imagecodecs.jpeg8_encode(pixels, level=95))
    if not action:
        return coded
    comment = f"HOSTILE {action}!".encode()
    return coded[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + coded[2:]


def jpeg_chest(seed: int, action: str = "") -> bytes:
    """A chest phantom as a DICOM file, compressed with JPEG."""
    made = dataset(Phantom(rows=512, cols=512, seed=seed), name=f"test-{seed}")
    pixels = (made.pixel_array >> (int(made.BitsStored) - 8)).astype(np.uint8)
    made.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    made.BitsAllocated = made.BitsStored = 8
    made.HighBit = 7
    for name in ("SmallestImagePixelValue", "LargestImagePixelValue", "WindowCenter", "WindowWidth"):
        if name in made:
            delattr(made, name)
    made.PixelData = encapsulate([coded_frame(pixels, action)])
    made["PixelData"].is_undefined_length = True
    made["PixelData"].VR = "OB"
    return encode(made)


def png(action: str = "", seed: int = 0) -> bytes:
    """A picture; with an ``action`` its text chunk names that."""
    info = PngImagePlugin.PngInfo()
    if action:
        info.add_text("Comment", f"HOSTILE {action}!")
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (96, 80), np.uint8)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
