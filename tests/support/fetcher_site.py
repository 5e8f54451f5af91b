"""A fetcher on a server that misbehaves, as the tests of downloads use it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from model_sync.settings import SyncSettings
from model_sync.transport.errors import Unreachable
from model_sync.transport.fetcher import Fetcher
from model_sync.transport.parts import part_name
from tests.support.bad_server import GOOD, BadServer, Reply

SIZE = 400_000
DATA = random.Random(3).randbytes(SIZE)
NAME = f"targets/models/line/1.0.0/{hashlib.sha256(DATA).hexdigest()}.model.onnx"
PLAIN = "targets/models/line/1.0.0/model.onnx"
METADATA = b'{"signatures": [], "signed": {"_type": "timestamp"}}'


def sync_settings(directory: Path, **values: Any) -> SyncSettings:
    """Settings with short waits."""
    base = {
        "state_dir": directory / "state", "exchange_dir": directory / "exchange", "root": directory / "root.json", "box_id": "box-1",
        "attempts": 4, "backoff_s": 0.0, "max_backoff_s": 0.0, "connect_timeout_s": 5.0, "read_timeout_s": 5.0, "disk_reserve_bytes": 0,
    }  # fmt: skip
    return SyncSettings.parse(base | values)


Make = Callable[..., Fetcher]


@pytest.fixture
def server() -> Iterator[BadServer]:
    """A server with one target under a hashed and a plain name, and a timestamp."""
    with BadServer({f"/{NAME}": DATA, f"/{PLAIN}": DATA, "/metadata/timestamp.json": METADATA}) as running:
        yield running


@pytest.fixture
def make(tmp_path: Path, server: BadServer) -> Iterator[Make]:
    """Makes fetchers that share one parts directory, as runs of one agent do."""
    made: list[Fetcher] = []

    def new(urls: list[str] | None = None, options: dict[str, Any] | None = None, **values: Any) -> Fetcher:
        chosen = sync_settings(tmp_path, urls=[server.url] if urls is None else urls, **values)
        made.append(Fetcher(chosen, tmp_path / "parts", **(options or {})))
        return made[-1]

    yield new
    for fetcher in made:
        fetcher.close()


def fetch(fetcher: Fetcher, name: str = NAME, size: int = SIZE) -> bytes:
    """Download a target as the Updater does."""
    with fetcher.download_file(f"library:{name}", size) as stream:
        return stream.read()


def part_of(tmp_path: Path, name: str = NAME) -> Path:
    """Where a target's part lies."""
    return tmp_path / "parts" / part_name(name)


def leave_part(make: Make, server: BadServer, size: int, name: str = NAME) -> None:
    """Let a download break after ``size`` bytes."""
    server.script(f"/{name}", Reply(cut_after=size))
    server.always(f"/{name}", Reply(hang_up=True))
    with pytest.raises(Unreachable):
        fetch(make(), name)
    server.always(f"/{name}", GOOD)
    server.log.clear()
