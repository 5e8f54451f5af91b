"""A child of ``appliance.tuning.candidate_process`` whose runtime does what its file is called: crash, hang, eat memory, print."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from appliance.core.child_protocol import pack
from appliance.core.errors import InferenceError
from appliance.tuning.candidate_child import run

_GARBAGE = b'RT01\xff\xfe\x00garbage {"error": 1}\n'


def segfault() -> None:
    ctypes.string_at(0)


def bad_alloc() -> None:
    os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n")
    os.abort()


def hog() -> None:
    held = []
    while True:
        held.append(np.ones(1 << 24, np.uint8))


def grandchild() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(os.environ["GRANDCHILD"]).write_text(str(child.pid))
    time.sleep(600)


def noise() -> None:
    for _ in range(200):
        os.write(1, _GARBAGE * 40)
        os.write(2, _GARBAGE * 40)
    print("flushed late", flush=True)


def nonsense() -> None:
    answers = int(sys.argv[2])
    os.write(answers, _GARBAGE * 10)


def starves() -> None:
    raise MemoryError


def says() -> None:
    """A whole message with the header that the test wants."""
    for buffer in pack(json.loads(os.environ["HEADER"])):
        os.write(int(sys.argv[2]), buffer)


def builds() -> None:
    raise InferenceError("runtime.build", "no kernel for\x1b[31m it\n" + "x" * 1000)


ACTIONS: dict[str, Any] = {
    "segfault": segfault, "abort": bad_alloc, "hang": lambda: time.sleep(600), "hog": hog, "grandchild": grandchild, "noise": noise,
    "nonsense": nonsense, "exit": lambda: os._exit(7), "killed": lambda: os.kill(os.getpid(), signal.SIGKILL), "builds": builds,
    "says": says, "starves": starves,
    "raises": lambda: [].pop(), "mute": lambda: (os.close(int(sys.argv[2])), time.sleep(600)), "fine": lambda: None,
}  # fmt: skip


class Misbehaving:
    """Twice the input, after doing ``<action>-in-<load|infer>``."""

    def __init__(self, action: str, where: str) -> None:
        self._action, self._where = action, where

    def act(self, where: str) -> None:
        if where == self._where:
            ACTIONS[self._action]()

    def infer(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.act("infer")
        return {f"{name}*2": value * 2 for name, value in inputs.items()}

    def warm_up(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to free."""

    def describe(self) -> dict[str, Any]:
        return {"runtime": "misbehaving", "precision": "fp32"}


def opener(path: Path, spec: Any, candidate: Any, *, cache: Path | None, on_progress: Any) -> Any:
    action, _, where = candidate.file.partition("-in-")
    runtime = Misbehaving(action, where)
    for done in (0.0, 0.5, 1.0):
        on_progress(done)
    runtime.act("load")
    return runtime


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], opener))
