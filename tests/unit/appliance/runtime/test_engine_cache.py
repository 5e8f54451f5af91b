"""Engines on the disk: what fits this box is read back, anything else is built again with its reason, and nothing crashes."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.runtime import engine_cache
from appliance.runtime.engine_cache import EngineProfile
from tests.conftest import ROOT

PROFILE = EngineProfile("NVIDIA Orin", "8.7", "10.3.0", "R36.4.3", "fp16", 4, (1, 224, 224), 2, "ab" * 32)
ENGINE = bytes(range(256)) * 40


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    path = engine_cache.write(tmp_path, PROFILE, ENGINE, {"batch": 4})
    found = engine_cache.read(tmp_path, PROFILE)
    assert (found.data, found.why, found.notes) == (ENGINE, "", {"batch": 4})
    assert path.name == PROFILE.file_name
    assert path.stat().st_mode & 0o777 == 0o600
    assert [item.name for item in tmp_path.iterdir()] == [path.name]  # no part is left


def test_nothing_there_is_no_reason(tmp_path: Path) -> None:
    assert engine_cache.read(tmp_path, PROFILE) == engine_cache.CacheEntry(b"")
    assert engine_cache.read(tmp_path / "absent", PROFILE) == engine_cache.CacheEntry(b"")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"gpu": "NVIDIA H200"}, "GPU NVIDIA Orin -> NVIDIA H200"),
        ({"compute_capability": "9.0"}, "compute capability 8.7 -> 9.0"),
        ({"tensorrt": "10.13.3"}, "TensorRT 10.3.0 -> 10.13.3"),
        ({"driver": "R36.5.0"}, "driver R36.4.3 -> R36.5.0"),
    ],
)
def test_engine_of_another_box_is_rebuilt(tmp_path: Path, change: dict[str, str], why: str, caplog: pytest.LogCaptureFixture) -> None:
    engine_cache.write(tmp_path, PROFILE, ENGINE, {})
    now = replace(PROFILE, **change)
    with caplog.at_level(logging.WARNING):
        found = engine_cache.read(tmp_path, now)
    assert (found.data, found.why) == (b"", why)
    assert why in caplog.text
    engine_cache.write(tmp_path, now, b"new", {})  # takes the place of the old one
    assert engine_cache.read(tmp_path, now).data == b"new"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "change", [{"batch": 8}, {"precision": "int8"}, {"shape": (1, 512, 512)}, {"level": 3}, {"onnx_sha256": "cd" * 32}]
)
def test_another_model_or_way_is_another_file(tmp_path: Path, change: dict[str, object]) -> None:
    engine_cache.write(tmp_path, PROFILE, ENGINE, {})
    other = replace(PROFILE, **change)  # type: ignore[arg-type]
    assert engine_cache.read(tmp_path, other) == engine_cache.CacheEntry(b"")
    assert other.file_name != PROFILE.file_name


def test_engine_under_the_name_of_another(tmp_path: Path) -> None:
    engine_cache.write(tmp_path, PROFILE, ENGINE, {})
    other = replace(PROFILE, onnx_sha256="cd" * 32)
    (tmp_path / PROFILE.file_name).rename(tmp_path / other.file_name)
    assert engine_cache.read(tmp_path, other).why == "model changed"


def test_key_covers_every_field() -> None:
    changes: list[dict[str, object]] = [
        {"gpu": "x"}, {"compute_capability": "x"}, {"tensorrt": "x"}, {"driver": "x"}, {"precision": "x"}, {"batch": 9}, {"shape": (9,)},
        {"level": 9}, {"onnx_sha256": "x"},
    ]  # fmt: skip
    keys = {replace(PROFILE, **change).key for change in changes}  # type: ignore[arg-type]
    assert len(keys | {PROFILE.key}) == 10
    assert len(changes) == len(PROFILE.to_json())
    assert EngineProfile.from_json(PROFILE.to_json()) == PROFILE


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_means_rebuild_and_never_a_crash(tmp_path: Path, data: st.DataObject) -> None:
    path = engine_cache.write(tmp_path, PROFILE, ENGINE[:64], {"batch": 4})
    whole = path.read_bytes()
    kind = data.draw(st.sampled_from(["flip", "cut", "longer", "other"]))
    at = data.draw(st.integers(0, len(whole) - 1))
    if kind == "flip":
        bits = data.draw(st.integers(1, 255))
        damaged = whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1 :]
    elif kind == "cut":
        damaged = whole[:at]
    else:
        extra = data.draw(st.binary(min_size=1, max_size=64))
        damaged = whole + extra if kind == "longer" else whole[: data.draw(st.sampled_from([0, 8, 12]))] + extra
    path.write_bytes(damaged)
    found = engine_cache.read(tmp_path, PROFILE)
    assert found.data == b""
    assert found.why.startswith("the stored engine is damaged (")


@given(st.binary(max_size=200), st.sampled_from([b"", b"CEATRT1\n", b"CEATRT1\n\0\0\0\2{}"]))
def test_parser_of_any_bytes(content: bytes, start: bytes) -> None:
    try:
        header, _ = engine_cache.parse(start + content)
    except ValueError:
        return
    assert isinstance(header, dict)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(PROFILE.to_json())), value=_json, whole=_json)
def test_header_with_a_profile_that_is_none(tmp_path: Path, name: str, value: object, whole: object) -> None:
    """Signed with its own digest, and still no profile of ours: a header of another release."""
    for profile in (PROFILE.to_json() | {name: value}, PROFILE.to_json() | {"more": value}, whole):
        engine_cache.pack(tmp_path / PROFILE.file_name, {"profile": profile}, ENGINE[:16])
        found = engine_cache.read(tmp_path, PROFILE)
        assert (found.data == b"") == (profile != PROFILE.to_json())


@pytest.mark.parametrize("what", ["directory", "pipe", "link"])
def test_what_is_no_file_is_rebuilt_too(tmp_path: Path, what: str) -> None:
    path = tmp_path / PROFILE.file_name
    if what == "directory":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    assert "damaged" in engine_cache.read(tmp_path, PROFILE).why


def test_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine_cache.write(tmp_path, PROFILE, ENGINE, {})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        engine_cache.write(tmp_path, PROFILE, b"new", {})
    assert engine_cache.read(tmp_path, PROFILE).data == ENGINE
    assert len(list(tmp_path.iterdir())) == 1


def test_timings_are_the_gpus_whatever_was_built(tmp_path: Path) -> None:
    assert engine_cache.read_timings(tmp_path, PROFILE) == b""
    engine_cache.write_timings(tmp_path, PROFILE, b"conv")
    assert engine_cache.read_timings(tmp_path, replace(PROFILE, precision="int8", onnx_sha256="cd" * 32)) == b"conv"
    assert engine_cache.read_timings(tmp_path, replace(PROFILE, driver="R36.5.0")) == b""
    (tmp_path / PROFILE.timings_name).write_bytes(b"CEATRT1\nrotten")
    assert engine_cache.read_timings(tmp_path, PROFILE) == b""


def test_engines_of_no_installed_model_are_swept(tmp_path: Path) -> None:
    gone = replace(PROFILE, onnx_sha256="cd" * 32)
    kept = engine_cache.write(tmp_path, PROFILE, ENGINE, {}).name
    removed = engine_cache.write(tmp_path, gone, ENGINE, {}).name
    engine_cache.write_timings(tmp_path, PROFILE, b"conv")
    for name in ("build-0ld", "build-new", "build-held"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "engine").write_bytes(b"half")
    held = os.open(tmp_path / "build-held", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_SH)
    for name in ("x.engine.1234.part", "y.engine.1234.part"):
        (tmp_path / name).write_bytes(b"half")
    for name in ("build-0ld", "build-held", "x.engine.1234.part"):
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / "somebody's.txt").write_text("not ours")
    assert engine_cache.sweep(tmp_path, [PROFILE.onnx_sha256]) == sorted([removed, "x.engine.1234.part", "build-0ld"])
    left = {kept, PROFILE.timings_name, "somebody's.txt", "build-new", "build-held", "y.engine.1234.part"}
    assert {item.name for item in tmp_path.iterdir()} == left
    os.close(held)
    assert engine_cache.sweep(tmp_path, [PROFILE.onnx_sha256]) == ["build-held"]
    assert engine_cache.sweep(tmp_path / "absent", []) == []


def test_what_a_killed_build_left_goes_with_the_next_and_at_the_next_sweep(tmp_path: Path) -> None:
    """A deadline or a power cut: the directory stays, with hundreds of megabytes in it."""
    code = (
        "import os, signal, sys, pathlib\n"
        "from appliance.runtime import engine_cache\n"
        "with engine_cache.build_directory(pathlib.Path(sys.argv[1])) as own:\n"
        "    (own / 'engine').write_bytes(b'half')\n"
        "    print(own.name, flush=True)\n"
        "    sys.stdin.read() or os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert child.stdout is not None and child.stdin is not None
    left = tmp_path / child.stdout.readline().strip()
    os.utime(left, (1, 1))
    assert engine_cache.sweep(tmp_path, []) == []  # somebody is at work in it
    with engine_cache.build_directory(tmp_path):
        assert left.is_dir()
    child.stdin.close()
    assert child.wait(30) == -signal.SIGKILL
    child.stdout.close()
    assert left.is_dir()
    with engine_cache.build_directory(tmp_path) as own:
        assert [path.name for path in tmp_path.iterdir()] == [own.name]
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_is_named_like_a_build_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "patients").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "build-link").symlink_to(tmp_path / "patients", target_is_directory=True)
    os.utime(tmp_path / "cache" / "build-link", (1, 1), follow_symlinks=False)
    assert engine_cache.sweep(tmp_path / "cache", []) == []
    assert (tmp_path / "patients").is_dir()
