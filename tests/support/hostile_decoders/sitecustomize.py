"""Decoders that crash, hang or eat memory where the data says so, in every process whose ``PYTHONPATH`` begins with this folder.

What they do is real: a segmentation fault, native code that never returns and holds the interpreter lock, memory without end.
"""

import ctypes
import os
import signal
from pathlib import Path
from typing import Any

import imagecodecs
import PIL.Image

MARK = b"HOSTILE "
_ONCE = os.environ.get("HOSTILE_ONCE", "")


def _eat() -> None:
    held = []
    while True:
        held.append(bytearray(1 << 26))


def _kill_once() -> None:
    """As the kernel does when memory is short, the first time only."""
    try:
        os.rmdir(_ONCE)
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def _starve() -> None:
    raise MemoryError


def _exit() -> None:
    print("Zhang^San", flush=True)
    os._exit(3)


ACTIONS: dict[bytes, Any] = {
    b"segfault": lambda: ctypes.string_at(0), b"hang": lambda: ctypes.PyDLL(None).pause(), b"abort": os.abort, b"exit": _exit,
    b"killed": lambda: os.kill(os.getpid(), signal.SIGKILL), b"once": _kill_once, b"eat": _eat, b"starve": _starve,
    b"raise": lambda: [].pop(), b"write": lambda: Path(os.environ["HOSTILE_FILE"]).write_bytes(b"x"),
}  # fmt: skip


def _act(data: bytes) -> None:
    place = data.find(MARK)
    if place >= 0:
        ACTIONS[data[place + len(MARK) :].split(b"!", 1)[0]]()


def _hostile(function: Any) -> Any:
    def decode(data: Any, *arguments: Any, **options: Any) -> Any:
        _act(data if isinstance(data, bytes) else data.getvalue())
        return function(data, *arguments, **options)

    return decode


imagecodecs.jpeg8_decode = _hostile(imagecodecs.jpeg8_decode)
PIL.Image.open = _hostile(PIL.Image.open)
