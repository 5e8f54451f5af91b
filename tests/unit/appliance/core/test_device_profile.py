"""What makes this box this box: GPU, driver and every runtime are in it, serial numbers are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from appliance import __version__
from appliance.core import device_profile

H200 = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:17:25 UTC 2025
GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)
"""
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release Build  (dvs-builder)  Sat May 24 06:47:14 UTC 2025\n"
TEGRA = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n"
INFORMATION = "Model: \t\t NVIDIA H200\nIRQ:   \t\t 17\nGPU UUID: \t GPU-b6b2a1f0-0000-1111-2222-333344445555\nVideo BIOS: \t 96.00.99\n"


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A box without GPU whose files of the system are below ``tmp_path``."""
    for name in ("_BOARD", "_DRIVER", "_GPUS", "_TEGRA"):
        monkeypatch.setattr(device_profile, name, tmp_path / name)
    return tmp_path


def lay_gpu(bare: Path, driver: str = H200) -> None:
    (bare / "_DRIVER").write_text(driver)
    (bare / "_GPUS" / "0000:01:00.0").mkdir(parents=True)
    (bare / "_GPUS" / "0000:01:00.0" / "information").write_text(INFORMATION)


def test_box_without_gpu(bare: Path) -> None:
    assert (device_profile.gpu_names(), device_profile.gpu_driver()) == ([], "")
    assert "GPU" not in device_profile.profile()
    assert device_profile.profile().endswith(f"; appliance {__version__}")
    assert "onnxruntime " in device_profile.profile()
    assert device_profile.digest() == device_profile.digest()


@pytest.mark.parametrize(("text", "driver"), [(H200, "580.65.06"), (OPEN, "575.57.08"), ("", ""), ("NVRM version: none\n", "")])
def test_driver(bare: Path, text: str, driver: str) -> None:
    (bare / "_DRIVER").write_text(text)
    assert device_profile.gpu_driver() == driver


def test_jetson(bare: Path) -> None:
    (bare / "_TEGRA").write_text(TEGRA)
    (bare / "_BOARD").write_bytes(b"NVIDIA Jetson Orin Nano Developer Kit\0")
    assert device_profile.gpu_driver() == "R36.4.3"
    assert device_profile.profile().startswith("NVIDIA Jetson Orin Nano Developer Kit; driver R36.4.3; ")


def test_gpu_and_driver_make_another_device_and_serial_numbers_stay_out(bare: Path) -> None:
    before = device_profile.digest()
    lay_gpu(bare)
    assert "; GPU NVIDIA H200; driver 580.65.06; " in device_profile.profile()
    assert "UUID" not in device_profile.profile()
    assert "b6b2a1f0" not in device_profile.profile()
    with_gpu = device_profile.digest()
    (bare / "_DRIVER").write_text(H200.replace("580.65.06", "580.82.07"))
    assert len({before, with_gpu, device_profile.digest()}) == 3


def test_a_device_class_is_the_kind_of_a_box(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_profile, "_CPU_INFO", bare / "cpuinfo")
    info = "processor\t: 0\nmodel name\t: Intel(R) N100\nserial\t: 1234\ncpu MHz\t: 801.1\nflags\t\t: fpu avx2 avx_vnni\n"
    (bare / "cpuinfo").write_text(info)
    first = device_profile.device_class()
    assert (len(first), int(first, 16) >= 0) == (16, True)
    (bare / "cpuinfo").write_text(info.replace("1234", "5678").replace("801.1", "3400.0").replace("fpu ", "fpu ibrs "))
    (bare / "_DRIVER").write_text(H200)  # a driver alone is no other hardware
    monkeypatch.setattr(device_profile, "__version__", "9.9.9")
    assert device_profile.device_class() == first
    others = {first}
    for changed in (info.replace("N100", "N200"), info.replace(" avx_vnni", ""), "Features\t: asimd asimddp\n", ""):
        (bare / "cpuinfo").write_text(changed)
        others.add(device_profile.device_class())
    lay_gpu(bare)
    others.add(device_profile.device_class())
    monkeypatch.setattr(device_profile.os, "cpu_count", lambda: 77)
    assert len(others | {device_profile.device_class()}) == 7


def test_every_runtime_counts(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"onnxruntime-gpu": "1.30", "tensorrt-cu12-bindings": "10.3.0"}

    def version(package: str) -> str:
        if package not in have:
            raise device_profile.PackageNotFoundError(package)
        return have[package]

    monkeypatch.setattr(device_profile, "version", version)
    assert "; onnxruntime 1.30; tensorrt 10.3.0; appliance " in device_profile.profile()
    before = device_profile.digest()
    have["openvino"] = "2026.4.1"
    assert device_profile.digest() != before


def test_cheap_and_without_the_runtimes_themselves() -> None:
    heavy = ("onnxruntime", "openvino", "tensorrt", "cuda")
    check = f"import sys; from appliance.core import device_profile; device_profile.digest(); print({set(heavy)!r} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.strip() == "set()"
