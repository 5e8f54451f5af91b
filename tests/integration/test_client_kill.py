"""kill -9 of a real pull at a hundred random moments: nothing half-made is ever seen, and nothing is fetched twice."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.bad_server import BadServer
from tests.library_site import make_site, tiny_bundle
from tests.sync_box import LINE, Box, make_box, write_config

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, KILLS = 5, 20
# One process has loaded everything and forks a pull per line it reads: a hundred real processes without a hundred starts of Python.
NURSERY = """
import os, sys
from model_sync.agent import service
from model_sync.agent import client
from model_sync.transport import fetcher
from model_sync.agent import staging
from model_sync.agent.cli import main
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        sys.stdin.close()
        code = main(["--config", line.strip(), "pull"])
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Nursery:
    def __init__(self, process: subprocess.Popen[str], config: Path) -> None:
        self._process = process
        self._config = config

    def start(self) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self._config}\n")
        self._process.stdin.flush()
        return self._number()

    def wait(self) -> int:
        return self._number()

    def _number(self) -> int:
        assert self._process.stdout is not None
        while True:
            line = self._process.stdout.readline()
            assert line, "the nursery died"
            with contextlib.suppress(ValueError):  # the pull's own lines stand between
                return int(line)


@contextmanager
def nursery(config: Path) -> Iterator[Nursery]:
    command = [sys.executable, "-c", NURSERY]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
    ) as process:
        try:
            yield Nursery(process, config)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(30)


def arrived(box: Box) -> int:
    """Bytes of bundle files that are on the disk, finished or not."""
    parts = sum(file.stat().st_size for file in (box.settings.state_dir / "parts").glob("*.part"))
    hidden = (path for folder in box.settings.exchange_dir.glob("bundles/.*.part") for path in folder.rglob("*"))
    return parts + sum(file.stat().st_size for file in hidden if file.is_file() and file.suffix != ".part")


@pytest.mark.slow
def test_a_hundred_kills_leave_a_verified_library_and_whole_bundles(tmp_path: Path) -> None:
    site = make_site(tmp_path / "library")
    site.publish(tiny_bundle(tmp_path, hidden=8))
    site.rollout("stable", LINE, "0.1.0")
    draw = random.Random(20261121)
    moments = 0
    with BadServer(directory=site.public) as server:
        box = make_box(tmp_path / "box", site, server.url, rate_limit_bytes_per_s=600_000)
        box.pull()
        with nursery(write_config(box)) as children:
            for number in range(2, 2 + ROUNDS):
                version = f"0.{number}.0"
                bundle = tiny_bundle(tmp_path, version, seed=number, hidden=500)
                size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
                site.publish(bundle, deltas=False)
                site.rollout("stable", LINE, version)
                visible = box.bundles()
                for _ in range(KILLS):
                    pid = children.start()
                    time.sleep(draw.uniform(0.0, 0.25))
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                    moments += children.wait() == -signal.SIGKILL
                    assert visible <= box.bundles() <= visible | {version}
                    assert box.facts().lines[LINE].index.release("0.1.0")
                    wanted = box.wants()
                    assert wanted in box.bundles()
                have = arrived(box)
                done = version in box.bundles()
                server.log.clear()
                children.start()
                assert children.wait() == 0
                again = sum(request.body_bytes for request in server.log if request.path.startswith(f"/targets/models/{LINE}/{version}/"))
                largest = max(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
                assert again <= (0 if done else size - have + largest)
                assert box.wants() == version
                assert box.status()["state"] == "ok"
                assert not list(box.settings.exchange_dir.glob("bundles/.*"))
                assert not list((box.settings.state_dir / "parts").glob("*.part"))
    assert moments > ROUNDS * KILLS / 3, "most kills must have struck a pull at work"
