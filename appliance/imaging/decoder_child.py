"""The process in which :class:`appliance.imaging.decoder_process.DecoderProcess` runs the decoders.

It writes no file and needs no database, key or setting; what it imports is loaded before the first request.
"""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from pydicom.uid import UID

from appliance.core import limited_child
from appliance.core.child_protocol import Message
from appliance.core.errors import ApplianceError
from appliance.core.process import release_memory
from appliance.imaging.decoders import decode_coded_frame

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from appliance.core.limited_child import Channel

MEMORY: Final = "memory"
"""In the place of a code: the process needs more memory than it may have."""

_DETAIL_CHARS: Final = 200
_IDLE_S: Final = 1.0


def serve(channel: Channel) -> None:
    """Answer requests until the pipe is closed."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    while True:
        if not channel.wait(_IDLE_S):
            release_memory()
        channel.send(_answer(channel.receive()))


def _answer(request: Message) -> Message:
    if not request.arrays:  # the parent asks whether this process is ready
        return Message({}, {})
    try:
        return Message({}, {"pixels": _decode(request.header, request.arrays["coded"].tobytes())})
    except ApplianceError as error:
        return Message({"code": error.code, "detail": error.detail[:_DETAIL_CHARS]}, {})
    except MemoryError:
        return Message({"code": MEMORY, "detail": ""}, {})


def _decode(header: dict[str, Any], coded: bytes) -> NDArray[Any]:
    if "syntax" in header:
        return decode_coded_frame(UID(header["syntax"]), coded, header["options"])
    from appliance.imaging.pictures import grey_values

    return np.asarray(grey_values(coded))


if __name__ == "__main__":
    sys.exit(limited_child.run(sys.argv[1:], serve))
