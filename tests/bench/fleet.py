"""``python -m tests.bench.fleet``: what an idle poll costs the line, and ten thousand boxes that poll one library on this machine.

The idle poll is the real client's; its bytes are counted on the TCP connection, headers, TLS and all. The ten thousand boxes repeat
exactly its requests, each on a connection of its own, a hundred at a time, from a process beside the server: on the same cores, so a
server alone on them does more.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model_sync.agent.client import Client
from model_sync.settings import SyncSettings
from tests.fleet_site import ROOT, Centre, Recorder, recorded
from tests.library_site import tiny_bundle

BOXES = 10_000
_AT_ONCE = 100
_POLLS_A_DAY = 24 * 4
_MOST_S = 90.0


def run(boxes: int = BOXES) -> list[dict[str, Any]]:
    """Measure; rows have name, measured, target, unit, and what else was seen."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-fleet-") as directory:
        base = Path(directory)
        centre = Centre(base / "centre")
        for number, version in enumerate(("0.1.0", "0.2.0", "0.3.0")):
            centre.site.publish(tiny_bundle(base / "bundles", version, number))
        centre.site.rollout("stable", "cxr-pneumonia", "0.3.0")
        try:
            with nginx(base / "nginx", centre.site.public) as port:
                idle, requests = idle_poll(centre, base / "a", f"http://127.0.0.1:{port}")
                rows += _poll_rows("nginx, http", idle, len(requests))
                rows += _crowd_rows("nginx", boxes, port, requests)
            centre.start()
            idle, _ = idle_poll(centre, base / "b", centre.url)
            rows += _poll_rows("serve, https", idle, len(requests))
            centre.stop()
            centre.start("--behind-proxy", tls=False)
            rows += _crowd_rows("serve", boxes, _port(centre.url), requests)
        finally:
            centre.close()
    return rows


def idle_poll(centre: Centre, directory: Path, url: str) -> tuple[int, list[bytes]]:
    """Let a real client fetch everything, then look again; returns the bytes of the second look, and its requests (http only)."""
    with recorded(_port(url)) as line:
        settings = SyncSettings.parse(
            {
                "state_dir": directory / "state", "exchange_dir": directory / "exchange", "root": centre.site.root, "box_id": "box-1",
                "urls": [url.replace(str(_port(url)), str(line.port))], "ca_certificate": centre.ca, "disk_reserve_bytes": 0,
            }
        )  # fmt: skip
        assert Client(settings).pull().changed
        _quiet(line)
        before, sent = line.total, len(line.up)
        assert not Client(settings).pull().changed
        _quiet(line)
        blocks = bytes(line.up[sent:]).split(b"\r\n\r\n")[:-1]
        return line.total - before, [block + b"\r\n\r\n" for block in blocks if block.startswith(b"GET ")]


def crowd(port: int, boxes: int, requests: list[bytes]) -> dict[str, float]:
    """Let ``boxes`` poll, a hundred at a time; returns polls, seconds and failures. At most a minute and a half."""
    asked = json.dumps({"port": port, "boxes": boxes, "requests": [request.decode("ascii") for request in requests]})
    ended = subprocess.run([sys.executable, "-m", "tests.bench.fleet", "--crowd"], input=asked, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, float] = json.loads(ended.stdout)
    return found


async def _crowd(port: int, boxes: int, requests: list[bytes]) -> dict[str, float]:
    left, done, failed, begin = boxes, 0, 0, time.perf_counter()

    async def ask() -> None:
        nonlocal left, done, failed
        while left > 0 and time.perf_counter() - begin < _MOST_S:
            left -= 1
            try:
                await _one_poll(port, requests)
                done += 1
            except (OSError, asyncio.IncompleteReadError):
                failed += 1

    await asyncio.gather(*(ask() for _ in range(_AT_ONCE)))
    return {"polls": done, "failed": failed, "s": time.perf_counter() - begin}


async def _one_poll(port: int, requests: list[bytes]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for request in requests:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
            if b"\r\nconnection: close" in head.lower():
                writer.close()
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
    finally:
        writer.close()


def _poll_rows(name: str, idle: int, requests: int) -> list[dict[str, Any]]:
    return [
        {"name": f"idle poll, {name}", "measured": idle / 1000, "target": 5.0, "unit": "KB", "requests": requests},
        {"name": f"a box's idle day, polls every 15 min, {name}", "measured": idle * _POLLS_A_DAY / 1e6, "target": None, "unit": "MB"},
    ]


def _crowd_rows(name: str, boxes: int, port: int, requests: list[bytes]) -> list[dict[str, Any]]:
    seen = crowd(port, boxes, requests)
    rate = seen["polls"] / seen["s"]
    more = {"boxes": boxes, "polls": seen["polls"], "failed": seen["failed"], "seconds": seen["s"]}
    return [
        {"name": f"{boxes:,} boxes polling {name}", "measured": rate * len(requests), "target": None, "unit": "requests/s"} | more,
        {"name": f"boxes that {name} carries at one poll in 15 min", "measured": rate * 900, "target": None, "unit": "boxes"},
    ]


@contextmanager
def nginx(directory: Path, public: Path) -> Iterator[int]:
    """Serve a folder with nginx, as its own defaults have it; yields the port."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    assert program, "nginx is missing: run `make setup-test`"
    directory.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    spool = "".join(f"{kind}_temp_path {directory}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    user = "user root;\n" if os.geteuid() == 0 else ""
    (directory / "nginx.conf").write_text(
        f"{user}daemon off;\nworker_processes 1;\npid {directory}/pid;\nerror_log {directory}/error.log;\n"
        f"events {{ worker_connections 1000; }}\nhttp {{\naccess_log off;\n{spool}types {{ application/json json; }}\n"
        f"server {{ listen 127.0.0.1:{port} backlog=1024; root {public}; etag on; }}\n}}\n"
    )
    process = subprocess.Popen([program, "-c", str(directory / "nginx.conf"), "-e", str(directory / "error.log")])
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(20)


def _quiet(line: Recorder) -> None:
    """Wait until nothing has moved for a moment: kept connections end after their owner."""
    seen = -1
    while seen != line.total:
        seen = line.total
        time.sleep(0.3)


def _port(url: str) -> int:
    return int(url.rpartition(":")[2])


if __name__ == "__main__":
    if "--crowd" in sys.argv:
        told = json.load(sys.stdin)
        print(json.dumps(asyncio.run(_crowd(told["port"], told["boxes"], [request.encode() for request in told["requests"]]))))
    else:
        for row in run():
            print(json.dumps(row))
