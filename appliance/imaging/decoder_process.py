"""Decode compressed pixels and pictures in a process of their own, since the decoders are native code and the data may be hostile.

A decoder that crashes, runs forever or allocates without limit ends its process and nothing else: the file gets a coded error, and a new
process decodes the next file. Each process of the box that decodes has one decoder process, started with its first compressed frame
(:func:`start` does so earlier), and never more than one frame in it. Uncompressed pixels need no decoder.

Costs measured by ``python -m tests.bench.decoder_process``, limits and alternatives: docs/adr/0055.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from appliance.core.child_process import printable_text
from appliance.core.errors import IngestError, PixelError
from appliance.core.limited_process import LimitedProcess, ProcessEndedError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pydicom.uid import UID

    from appliance.core.child_protocol import Message

DEADLINE_S: Final = 30.0
"""Longest that one frame may take. Half of ``job_deadline_s``, and several times what the largest frames take on a slow box."""

MEMORY_BYTES: Final = 1 << 30
"""Most private memory of a decoder process; the largest frames in ``PixelCaps`` need less."""

# The largest frame, of four bytes per sample where the header implies one; memory that is not written is not taken.
_SHARED_BYTES: Final = 512 << 20
_DETAIL_CHARS: Final = 200
_CODES: Final = ("pixel.corrupt", "pixel.undecodable", "ingest.unsupported_image", "ingest.absurd_dimensions")
_CRASHED: Final = "pixel.decoder_crashed"
_ENDS: Final = {"crashed": _CRASHED, "deadline": "pixel.decoder_deadline", "memory": "pixel.decoder_memory"}


class DecoderProcess:
    """The decoder process of this process; thread-safe, one frame at a time.

    Args:
        deadline_s: longest that one frame may take.
        memory_bytes: its limit of private memory; the limit of this process holds too.
    """

    module = "appliance.imaging.decoder_child"

    def __init__(self, deadline_s: float = DEADLINE_S, memory_bytes: int = MEMORY_BYTES) -> None:
        self._deadline_s, self._memory_bytes = deadline_s, memory_bytes
        self._lock = threading.Lock()
        self._process: LimitedProcess | None = None
        # The child dies with the thread that started it, so that is a thread which lasts as long as this process.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="decoder-start")

    @property
    def pid(self) -> int | None:
        """Process number of the decoder process; None while there is none."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the process where it does not run, without waiting until it is ready.

        Raises:
            MemoryError: it cannot be started.
        """
        with self._lock:
            self._running()

    def decode(self, header: dict[str, Any], coded: bytes) -> NDArray[Any]:
        """Decode a frame or picture; a process that is killed from outside is replaced, and the data decoded again, once.

        Raises:
            PixelError: ``pixel.decoder_*``: the decoder crashed or exceeded a limit; else as the decoder reports.
            MemoryError: the machine is short of memory: nothing is known about the data.
        """
        import numpy as np

        arrays = {"coded": np.frombuffer(coded, np.uint8) if coded else np.empty(0, np.uint8)}
        with self._lock:
            for _ in range(2):
                try:
                    return self._pixels(self._running().call(header, arrays, self._deadline_s))
                except ProcessEndedError as ended:
                    self._process = None
                    if ended.end != "killed":
                        self._running()  # so that the next file does not wait for the start
                        raise PixelError(_ENDS[ended.end], ended.detail) from ended
        raise MemoryError("the decoder process was killed from outside")

    def close(self) -> None:
        """End the process."""
        with self._lock:
            if self._process is not None:
                self._process.close()
            self._process = None
        self._starter.shutdown()

    def _running(self) -> LimitedProcess:
        if self._process is None:
            try:
                self._process = self._starter.submit(LimitedProcess, self.module, self._memory_bytes, _SHARED_BYTES).result()
            except OSError as error:
                raise MemoryError("no decoder process can be started") from error
        return self._process

    def _pixels(self, response: Message) -> NDArray[Any]:
        """The array of a response; the process that wrote it may have been corrupted, so that nothing in it is trusted."""
        code, detail = response.header.get("code"), printable_text(response.header.get("detail", ""), _DETAIL_CHARS)
        if code == "memory":
            raise PixelError("pixel.decoder_memory", f"more than {self._memory_bytes >> 20} MiB")
        if code in _CODES:
            raise (PixelError if code.startswith("pixel") else IngestError)(code, detail)
        if set(response.arrays) != {"pixels"}:
            raise PixelError(_CRASHED, "invalid response")
        return response.arrays["pixels"]


_decoder = DecoderProcess()


def start() -> None:
    """Start the decoder process of this process in the background; raises MemoryError where it cannot be started."""
    _decoder.start()


def decode_coded_frame(syntax: UID, coded: bytes, options: dict[str, Any]) -> NDArray[Any]:
    """Decode one coded frame in the decoder process, see :func:`appliance.imaging.decoders.decode_coded_frame`.

    Raises:
        PixelError: ``pixel.corrupt``, ``pixel.undecodable``, or ``pixel.decoder_*`` when the decoder crashed or exceeded a limit.
        MemoryError: the machine is short of memory.
    """
    return _decoder.decode({"syntax": str(syntax), "options": options}, coded)


def decode_picture(data: bytes) -> NDArray[Any]:
    """Decode a PNG or JPEG in the decoder process, see :func:`appliance.imaging.pictures.grey_values`.

    Raises:
        IngestError: ``ingest.unsupported_image``, ``ingest.absurd_dimensions``; ``ingest.decoder`` when the decoder crashed or exceeded a
            limit.
        MemoryError: the machine is short of memory.
    """
    try:
        pixels = _decoder.decode({}, data)
    except PixelError as error:
        raise IngestError("ingest.decoder", f"{error.code}: {error.detail}") from error
    if pixels.ndim != 2 or pixels.dtype.name not in ("uint8", "uint16"):
        raise IngestError("ingest.decoder", f"an array of {pixels.shape}")
    return pixels
