"""The decoder of each compressed transfer syntax: imagecodecs as a plugin of pydicom, and the alternatives where it is absent.

All of this runs native code on the data of a stranger: the box does so only in :mod:`appliance.imaging.decoder_child`.

Measured in milliseconds per frame of 2048 x 2048 pixels of a real chest X-ray (12 bits in 16, or the upper 8), the best of 12
through pydicom 3.0.2 on two busy cores of an AMD EPYC; "check" is what ``codestream.check_frame`` adds:

| syntax | used | check | others |
|---|---|---|---|
| RLE | imagecodecs 11 | 0 | pylibjpeg-rle 14, pydicom 88 |
| JPEG 8 bit | imagecodecs 6.0 | 7 | Pillow 6.5, GDCM 23 |
| JPEG 12 bit | imagecodecs 29 | 21 | none |
| JPEG lossless | imagecodecs (libjpeg-turbo) 31 | 32 | GDCM 94 |
| JPEG-LS | imagecodecs (CharLS) 78 | 0 | pyjpegls 81, GDCM 123 |
| JPEG 2000 | imagecodecs (OpenJPEG, 2 threads) 203 to 334 | 0 | GDCM 274, Pillow 381, pylibjpeg-openjpeg 378 |
| HTJ2K | imagecodecs (OpenJPEG, 2 threads) 33 to 50 | 0 | pylibjpeg-openjpeg 49 |

With the second core free GDCM is never the fastest, and pydicom imports it wherever it is installed (18 MB in every process), so it
is not installed. OpenJPH (imagecodecs, 21 ms) is not used for HTJ2K: it returned an image for 22 of 30 truncated frames, OpenJPEG for
none. pylibjpeg-libjpeg is not used because it is GPL-3.0 and this project is Apache-2.0. DCT decoders may differ by one grey level
(ITU-T T.83, PS3.5 8.2.1); libjpeg-turbo's and pylibjpeg-libjpeg's do.

imagecodecs is imported with the first compressed frame, codec by codec, so that an idle process does not pay for it.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from pydicom.encaps import encapsulate
from pydicom.pixels.common import PhotometricInterpretation
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID, RLELossless

from appliance.core.errors import PixelError
from appliance.imaging.codestream import COMPRESSED, HT_JPEG_2000, JPEG, JPEG_2000, JPEG_LS
from appliance.imaging.pixel_checks import VALUE_ERRORS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from pydicom.pixels.decoders.base import DecodeRunner

_PLUGIN: Final = "imagecodecs"
# Plugins of pydicom, the fastest first. Only one is tried: the output of a second decoder for damaged data would be a guess.
_PREFERENCE: Final = (_PLUGIN, "pylibjpeg", "pyjpegls", "gdcm", "pillow", "pydicom")
# More threads than this gain nothing on a chest X-ray and multiply OpenJPEG's buffers.
_MAX_THREADS: Final = 4

DECODER_DEPENDENCIES: Final = dict.fromkeys(COMPRESSED, ("imagecodecs",))  # pydicom reads this name from its plugins


def is_available(uid: str) -> bool:
    """Whether the plugin can decode a transfer syntax here; pydicom calls this. Nothing is imported."""
    return uid in COMPRESSED and find_spec("imagecodecs") is not None


class _NoMemoryError(BaseException):
    """A MemoryError in a plugin; pydicom catches every Exception there, and the frame would count as damaged."""


@functools.cache
def register_decoders() -> None:
    """Register imagecodecs with pydicom, once per process."""
    for syntax in COMPRESSED:
        get_decoder(syntax).add_plugin(_PLUGIN, (__name__, "decode_with_imagecodecs"))
    # pydicom logs a traceback for each frame that a plugin refuses; here it is reported once, as a PixelError.
    logging.getLogger("pydicom.pixels.decoders.base").setLevel(logging.CRITICAL)


def best_plugin(syntax: UID) -> str:
    """The name of the fastest plugin available for a compressed transfer syntax; empty where there is none."""
    register_decoders()
    available = get_decoder(syntax).available_plugins
    return next((name for name in _PREFERENCE if name in available), "")


def decode_coded_frame(syntax: UID, coded: bytes, options: dict[str, Any]) -> NDArray[Any]:
    """Decode one coded frame.

    Args:
        syntax: a compressed transfer syntax.
        coded: the frame without its encapsulation; ``codestream.check_frame`` has passed it.
        options: what pydicom's ``Decoder.as_array`` needs to know from the header of the image.

    Raises:
        PixelError: ``pixel.corrupt``, or ``pixel.undecodable`` where no decoder is installed.
        MemoryError: it needs more memory than this process may have.
    """
    plugin = best_plugin(syntax)
    if not plugin:
        raise PixelError("pixel.undecodable", f"no decoder for {syntax.name} is installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            array: NDArray[Any] = get_decoder(syntax).as_array(
                encapsulate([coded], has_bot=False), index=0, decoding_plugin=plugin, **options
            )[0]
        except _NoMemoryError as error:
            raise MemoryError from error
        except (*VALUE_ERRORS, RuntimeError) as error:
            raise PixelError("pixel.corrupt", last_line(error)) from error
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def last_line(error: Exception) -> str:
    """The last line of an error's text; its class where it has none."""
    return str(error).splitlines()[-1].strip() if str(error) else type(error).__name__


def decode_with_imagecodecs(src: bytes, runner: DecodeRunner) -> memoryview:
    """Decode one frame; called by pydicom (see its guide "Decoding plugins").

    Raises:
        ValueError: the size differs from the DICOM header; the codecs raise errors of their own.
    """
    try:
        return _decode_checked(src, runner)
    except MemoryError as error:
        raise _NoMemoryError from error


def _decode_checked(src: bytes, runner: DecodeRunner) -> memoryview:
    syntax = runner.transfer_syntax
    if syntax == RLELossless:
        return _decode_rle(src, runner)
    array = _decode(syntax, src, runner.samples_per_pixel)
    transformed = (PhotometricInterpretation.YBR_ICT, PhotometricInterpretation.YBR_RCT)
    if syntax in JPEG_2000 and runner.photometric_interpretation in transformed:
        runner.set_option("photometric_interpretation", PhotometricInterpretation.RGB)  # OpenJPEG reverses the transform
    runner.set_option("bits_allocated", array.dtype.itemsize * 8)
    return _checked(array, runner)


def _decode(syntax: UID, src: bytes, samples: int) -> NDArray[np.generic]:
    import imagecodecs

    array: Any
    if syntax in JPEG:
        # The same colour space in and out leaves the components as they are coded; pydicom converts them.
        colour = "RGB" if samples == 3 else None
        array = imagecodecs.jpeg8_decode(src, colorspace=colour, outcolorspace=colour)
    elif syntax in JPEG_LS:
        array = imagecodecs.jpegls_decode(src)
    else:
        assert syntax in JPEG_2000 | HT_JPEG_2000
        array = imagecodecs.jpeg2k_decode(src, numthreads=min(_MAX_THREADS, os.cpu_count() or 1))
    return array  # type: ignore[no-any-return]


def _decode_rle(src: bytes, runner: DecodeRunner) -> memoryview:
    """RLE codes byte planes, one sample after the other (PS3.5 G.2): the result is planar."""
    import imagecodecs

    item = runner.bits_allocated // 8
    frame = imagecodecs.dicomrle_decode(src, dtype=f"<u{item}")
    if len(frame) != runner.rows * runner.columns * runner.samples_per_pixel * item:
        raise ValueError("the RLE segments do not fill the frame")
    runner.set_option("planar_configuration", 1)
    return memoryview(frame)


def _checked(array: NDArray[np.generic], runner: DecodeRunner) -> memoryview:
    import numpy as np

    rows, columns, samples = runner.rows, runner.columns, runner.samples_per_pixel
    shape = (rows, columns) if samples == 1 else (rows, columns, samples)
    planar = samples > 1 and array.shape == (samples, rows, columns) != shape
    if array.shape != shape and not planar:
        raise ValueError(f"decoded {array.shape}, the header says {shape}")
    if samples > 1:
        runner.set_option("planar_configuration", int(planar))
    return np.ascontiguousarray(array).data.cast("B")
