"""Decoders that crash, hang, eat memory or are killed: the file gets its true reason, the next file is decoded, nothing else ends."""

from __future__ import annotations

import io
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import psutil
import pydicom
import pytest
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit

from appliance.core.child_protocol import Message
from appliance.core.errors import ApplianceError, IngestError, PixelError
from appliance.imaging import decoder_process
from appliance.imaging.decoder_process import DecoderProcess
from appliance.imaging.pixels import decode_frame
from tests.support import hostile_images
from tests.support.processes import has_ended

PIXELS = np.add.outer(np.arange(40), np.arange(56)).astype(np.uint8)
HEADER: dict[str, Any] = {
    "syntax": str(JPEGBaseline8Bit),
    "options": {
        "rows": 40, "columns": 56, "number_of_frames": 1, "samples_per_pixel": 1, "photometric_interpretation": "MONOCHROME2",
        "planar_configuration": 0, "pixel_representation": 0, "bits_allocated": 8, "bits_stored": 8,
    },
}  # fmt: skip


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[DecoderProcess]:
    """A process of its own whose decoders do what the data says."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(hostile_images.DECODERS), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("HOSTILE_ONCE", str(tmp_path / "once"))
    monkeypatch.setenv("HOSTILE_FILE", str(tmp_path / "written"))
    made = DecoderProcess(deadline_s=3.0, memory_bytes=700 << 20)
    yield made
    made.close()


def decode(decoder: DecoderProcess, action: str = "") -> Any:
    return decoder.decode(HEADER, hostile_images.coded_frame(PIXELS, action))


def refused(decoder: DecoderProcess, action: str) -> ApplianceError:
    with pytest.raises(PixelError) as caught:
        decode(decoder, action)
    return caught.value


@pytest.mark.parametrize(
    ("action", "code", "detail"),
    [
        ("segfault", "pixel.decoder_crashed", "SIGSEGV"),
        ("abort", "pixel.decoder_crashed", "SIGABRT"),
        ("exit", "pixel.decoder_crashed", "exit code 3"),
        ("hang", "pixel.decoder_deadline", "more than 3 s"),
        ("eat", "pixel.decoder_memory", "more than 700 MiB"),
        ("starve", "pixel.decoder_memory", "more than 700 MiB"),
        ("raise", "pixel.corrupt", "pop from empty list"),
        ("write", "pixel.corrupt", "File too large"),
    ],
)
def test_decoder_that_misbehaves_is_a_coded_error_and_the_next_frame_is_decoded(
    decoder: DecoderProcess, action: str, code: str, detail: str, tmp_path: Path
) -> None:
    """The detail quotes nothing that a decoder printed, which could be a patient's name."""
    good = decode(decoder)
    first = decoder.pid
    error = refused(decoder, action)
    assert (error.code, detail in error.detail, "Zhang" in error.detail) == (code, True, False)
    assert np.array_equal(decode(decoder), good)
    is_ended = action in ("segfault", "abort", "exit", "hang")
    assert first is not None and (decoder.pid != first) == is_ended
    assert not is_ended or has_ended(first)
    assert not (tmp_path / "written").exists() or (tmp_path / "written").stat().st_size == 0


def test_process_that_is_killed_once_is_replaced_and_nobody_notices(decoder: DecoderProcess, tmp_path: Path) -> None:
    (tmp_path / "once").mkdir()
    good = decode(decoder)
    first = decoder.pid
    assert np.array_equal(decode(decoder, "once"), good)
    assert not (tmp_path / "once").exists() and decoder.pid != first


def test_process_that_is_killed_again_and_again_says_nothing_about_the_file(decoder: DecoderProcess) -> None:
    with pytest.raises(MemoryError):
        decode(decoder, "killed")
    assert decode(decoder).shape == (40, 56)


def test_picture_that_crashes_its_decoder_is_refused(decoder: DecoderProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_process, "_decoder", decoder)
    for action, why in (("segfault", "pixel.decoder_crashed: SIGSEGV"), ("hang", "pixel.decoder_deadline: more than 3 s")):
        with pytest.raises(IngestError) as caught:
            decoder_process.decode_picture(hostile_images.png(action))
        assert (caught.value.code, caught.value.detail) == ("ingest.decoder", why)
    with pytest.raises(IngestError) as caught:
        decoder_process.decode_picture(hostile_images.png()[:60])
    assert caught.value.code == "ingest.unsupported_image"
    with pytest.raises(IngestError, match="unsupported_image"):
        decoder_process.decode_picture(b"")
    assert decoder_process.decode_picture(hostile_images.png()).shape == (96, 80)


@pytest.mark.parametrize("header", [{}, {"code": "store.tampered", "detail": "x"}, {"code": ["pixel.corrupt"]}])
def test_response_that_is_none_is_a_crash_of_the_decoder(decoder: DecoderProcess, monkeypatch: pytest.MonkeyPatch, header: Any) -> None:
    """A process whose memory was overwritten may write anything: arrays of other sizes, codes that are not its own."""
    assert decode(decoder).shape == (40, 56)
    with pytest.raises(PixelError) as caught:
        decoder._pixels(Message(header, {}))
    assert caught.value.code == "pixel.decoder_crashed"
    monkeypatch.setattr(decoder_process, "_decoder", decoder)
    made = pydicom.dcmread(io.BytesIO(hostile_images.jpeg_chest(1)))
    monkeypatch.setattr(decoder, "decode", lambda *_: np.zeros((512, 511), np.uint8))
    with pytest.raises(PixelError) as caught:
        decode_frame(made)
    assert caught.value.code == "pixel.decoder_crashed"


def test_decoder_that_cannot_be_started_is_named(decoder: DecoderProcess) -> None:
    decoder.module = "appliance.imaging.no_such_module"
    assert refused(decoder, "").code == "pixel.undecodable"
    decoder.module = DecoderProcess.module
    assert decode(decoder).shape == (40, 56)


def test_process_outlives_the_thread_that_needed_it_first(decoder: DecoderProcess) -> None:
    """PR_SET_PDEATHSIG is sent when a thread ends; threads of a web server come and go."""
    thread = threading.Thread(target=decode, args=(decoder,))
    thread.start()
    thread.join()
    pid = decoder.pid
    assert decode(decoder).shape == (40, 56) and decoder.pid == pid


def test_large_frames_leave_no_memory_behind() -> None:
    made = DecoderProcess()
    shape = (4096, 4100)
    large = np.zeros(shape, np.uint8)
    options = HEADER["options"] | {"rows": shape[0], "columns": shape[1], "bits_allocated": 8}
    assert made.decode({"syntax": HEADER["syntax"], "options": options}, hostile_images.coded_frame(large)).shape == shape
    assert made.pid is not None
    assert psutil.Process(made.pid).memory_full_info().uss < 200 << 20
    made.close()
    assert made.pid is None


@pytest.mark.parametrize("kills", [3, pytest.param(60, marks=pytest.mark.long)])
def test_process_killed_at_random_moments_loses_no_frame(decoder: DecoderProcess, kills: int) -> None:
    """Some frames need another try, as the queue gives it; none is said to be damaged. Most of the time is spent in the decoder."""
    pixels = np.random.default_rng(0).integers(0, 4096, (1024, 1024), np.uint16)
    options = HEADER["options"] | {"rows": 1024, "columns": 1024, "bits_allocated": 16, "bits_stored": 16}
    coded = bytes(imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", reversible=True))
    header = {"syntax": str(JPEG2000Lossless), "options": options}
    assert np.array_equal(decoder.decode(header, coded), pixels)
    stop, rng, killed = threading.Event(), random.Random(1), list[int]()

    def kill() -> None:
        while not stop.wait(rng.uniform(0.4, 2.5)):
            pid = decoder.pid
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        decoded, failed = 0, 0
        while len(killed) < kills or not decoded:
            try:
                assert np.array_equal(decoder.decode(header, coded), pixels)
                decoded, failed = decoded + 1, 0
            except MemoryError:
                failed += 1
                assert failed < 20
    finally:
        stop.set()
        thread.join()
    assert np.array_equal(decoder.decode(header, coded), pixels)
