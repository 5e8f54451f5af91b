"""Decode compressed pixels and pictures in a process of their own, since the decoders are native code and the data may be hostile.

A decoder that crashes, runs forever or allocates without limit ends its process and nothing else: the file gets a coded error, and a new
process decodes the next file. Each process of the box that decodes has one decoder process, started with its first compressed frame
(:func:`start` does so earlier), and never more than one frame in it. Uncompressed pixels need no decoder.

Costs and alternatives: docs/adr/0057.
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

DEADLINE_S: Final = 45.0
"""Longest that one frame may take, unless :func:`set_deadline` was called; three times what the largest frames take."""

JOB_SHARE: Final = 0.75
"""Which share of ``job_deadline_s`` one frame may take: the deadline of a job kills the worker."""

MEMORY_BYTES: Final = 1 << 30
"""Most private memory of a decoder process; the largest frames in ``PixelCaps`` need less."""

_START_S: Final = 20.0
# The largest frame, of four bytes per sample where the header implies one; memory that is not written is not taken.
_SHARED_BYTES: Final = 512 << 20
# The process frees memory when it is idle (decoder_child) and not after each frame, as the supervisor makes the others do: taking 40 MB
# anew for each frame of 8 MB costs 40 ms.
_ENVIRONMENT: Final = {"MALLOC_TRIM_THRESHOLD_": str(64 << 20), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
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
        self.deadline_s, self._memory_bytes = deadline_s, memory_bytes
        self._lock = threading.Lock()
        self._process: LimitedProcess | None = None
        self._is_ready = False
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
            self._start()

    def decode(self, header: dict[str, Any], coded: bytes) -> NDArray[Any]:
        """Decode a frame or picture; a process that is killed from outside is replaced, and the data decoded again, once.

        Raises:
            PixelError: ``pixel.decoder_*``: the decoder crashed or exceeded a limit; ``pixel.undecodable``: the process cannot be
                started; else as the decoder reports.
            MemoryError: the machine is short of memory: nothing is known about the data.
        """
        import numpy as np

        arrays = {"coded": np.frombuffer(coded, np.uint8) if coded else np.empty(0, np.uint8)}
        with self._lock:
            for _ in range(2):
                process = self._ready_process()
                try:
                    return self._pixels(process.call(header, arrays, self.deadline_s))
                except ProcessEndedError as ended:
                    self._start()  # at once, so that the next file does not wait for it
                    if ended.end != "killed":
                        raise PixelError(_ENDS[ended.end], ended.detail) from ended
        raise MemoryError("the decoder process was killed from outside")

    def close(self) -> None:
        """End the process."""
        with self._lock:
            if self._process is not None:
                self._process.close()
            self._process = None
        self._starter.shutdown()

    def _start(self) -> LimitedProcess:
        """Return the process, a new one where there is none or it has ended; the new one may not be ready yet."""
        if self._process is None or self._process.pid is None:
            self._is_ready = False
            try:
                started = self._starter.submit(LimitedProcess, self.module, self._memory_bytes, _SHARED_BYTES, _ENVIRONMENT)
                self._process = started.result()
            except OSError as error:
                raise MemoryError("no decoder process can be started") from error
        return self._process

    def _ready_process(self) -> LimitedProcess:
        """Return the process once it has imported its decoders: the time of that does not count for a frame."""
        process = self._start()
        if not self._is_ready:
            try:
                process.call({}, {}, _START_S)
            except ProcessEndedError as ended:
                if ended.end in ("killed", "memory"):
                    raise MemoryError("the decoder process was killed at its start") from ended
                raise PixelError("pixel.undecodable", f"no decoder process can be started: {ended.detail}") from ended
            self._is_ready = True
        return process

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


def set_deadline(seconds: float) -> None:
    """Set how long one frame may take in this process."""
    _decoder.deadline_s = seconds


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
