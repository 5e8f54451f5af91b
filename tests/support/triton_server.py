"""A real Triton Inference Server on this machine: the one that NVIDIA's wheel ``nvidia-pytriton`` carries, started by hand.

``make setup-test`` puts the wheel below ``var/triton`` where it runs at all (x86-64 Linux); it brings no ONNX Runtime backend, so the
tests bring one: Triton takes a directory with a ``model.py`` as a backend written in Python, and this one runs the file that was given
through the repository API with the real ONNX Runtime. NumPy 1.26 lies beside it, because the wheel's interface to Python is older than 2.
"""

from __future__ import annotations

import os
import shutil
import site
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import requests

from tests.support.paths import ROOT

HOME = ROOT / "var" / "triton"
_SERVER = HOME / "pytriton" / "tritonserver"
_BACKEND = """
import sys
sys.path[:0] = {paths!r}
import os
import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        return config

    def initialize(self, args):
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        names = [item.name for item in self.session.get_outputs()]
        answers = []
        for request in requests:
            given = {{item.name: pb_utils.get_input_tensor_by_name(request, item.name).as_numpy() for item in self.session.get_inputs()}}
            values = self.session.run(names, given)
            tensors = [pb_utils.Tensor(name, np.ascontiguousarray(value)) for name, value in zip(names, values)]
            answers.append(pb_utils.InferenceResponse(tensors))
        return answers
"""


def why_not() -> str:
    """Why there is no Triton server here; empty when there is one."""
    stub = _SERVER / "python_backend_stubs" / _python() / "triton_python_backend_stub"
    if not (HOME / ".installed").is_file():
        return "no Triton server below var/triton (make setup-test puts it there on x86-64 Linux)"
    if not stub.is_file():
        return f"this Triton server has no backend for Python {_python()}"
    missing = [line.split()[0] for line in _run("ldd", str(stub)).splitlines() if "not found" in line]
    return f"Triton's Python backend needs {', '.join(missing)}" if missing else ""


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _libraries() -> str:
    return f"{sysconfig.get_config_var('LIBDIR')}:{HOME / 'nvidia_pytriton.libs'}"


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"LD_LIBRARY_PATH": _libraries()}).stdout


class TritonServer:
    """A server under EXPLICIT model control with an empty repository, on a port of its own; ``address`` is where it answers."""

    def __init__(self, directory: Path) -> None:
        python, onnx = directory / "backends" / "python", directory / "backends" / "onnxruntime"
        for path in (python, onnx, directory / "repository"):
            path.mkdir(parents=True)
        shutil.copytree(_SERVER / "backends" / "python", python, dirs_exist_ok=True)
        stub = shutil.copy(_SERVER / "python_backend_stubs" / _python() / "triton_python_backend_stub", python)
        server = shutil.copy(_SERVER / "bin" / "tritonserver", directory)
        for path in (stub, server):  # the wheel has them without the right to run
            os.chmod(path, 0o700)
        (onnx / "model.py").write_text(_BACKEND.format(paths=[str(HOME), *site.getsitepackages()]))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self._log = open(directory / "log.txt", "wb")  # noqa: SIM115 - as long as the server lives
        self._process = subprocess.Popen(
            [server, f"--model-repository={directory / 'repository'}", "--model-control-mode=explicit", "--http-address=127.0.0.1",
             f"--backend-directory={directory / 'backends'}", f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false"],
            stdout=self._log, stderr=self._log, env=os.environ | {"LD_LIBRARY_PATH": _libraries()},
        )  # fmt: skip
        self._wait(directory / "log.txt")

    def _wait(self, log: Path) -> None:
        limit = time.monotonic() + 60
        while time.monotonic() < limit and self._process.poll() is None:
            try:
                if requests.get(f"http://{self.address}/v2/health/ready", timeout=1).ok:
                    return
            except requests.RequestException:
                time.sleep(0.1)
        said = log.read_text(errors="replace")[-2000:]
        self.close()
        raise AssertionError(f"Triton did not start: {said}")

    def close(self) -> None:
        """End it, and its backends with it."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
