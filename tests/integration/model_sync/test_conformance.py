"""The executable that the public conformance suite drives, by tests of our own; and the suite itself where there is a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata

from tests.support.bad_server import BadServer
from tests.support.library_site import Site, make_site, tiny_bundle
from tests.support.sync_box import LINE, days, forge, newest

ROOT = Path(__file__).resolve().parents[3]
CLIENT = ROOT / "tests" / "support" / "tuf_conformance_client"
TARGET = f"models/{LINE}/0.1.0/gate.json"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = make_site(tmp_path / "library")
    site.publish(tiny_bundle(tmp_path))
    return site


@pytest.fixture
def server(site: Site) -> Iterator[BadServer]:
    with BadServer(directory=site.public) as server:
        yield server


class TufClient:
    def __init__(self, directory: Path, url: str, root: Path) -> None:
        self.metadata = directory / "metadata"
        self.targets = directory / "targets"
        self.metadata.mkdir(parents=True)
        self._url = url
        assert self.run("init", str(root)) == 0

    def run(self, *command: str, at: str | None = None) -> int:
        early = ["faketime", at] if at else []
        options = ["--metadata-url", f"{self._url}/metadata", "--metadata-dir", str(self.metadata)]
        return subprocess.run([*early, sys.executable, str(CLIENT), *options, *command], check=False).returncode

    def download(self, *names: str, at: str | None = None) -> int:
        wanted = [word for name in names for word in ("--target-name", name)]
        return self.run("--target-dir", str(self.targets), "--target-base-url", f"{self._url}/targets", *wanted, "download", at=at)

    def version(self, role: str) -> int | None:
        file = self.metadata / f"{role}.json"
        return int(Metadata.from_file(str(file)).signed.version) if file.exists() else None


@pytest.fixture
def client(site: Site, server: BadServer, tmp_path: Path) -> TufClient:
    return TufClient(tmp_path / "client", server.url, site.root)


def test_init_asks_nobody_and_trusts_the_root(client: TufClient, server: BadServer) -> None:
    assert server.log == []
    assert sorted(path.name for path in client.metadata.glob("*.json")) == ["root.json"]
    assert client.version("root") == 1
    assert client.run("init", "/no/such/root.json") == 1


def test_refresh_keeps_unversioned_metadata(client: TufClient, site: Site) -> None:
    assert client.run("refresh") == 0
    for role in ("root", "timestamp", "snapshot", "targets"):
        assert client.version(role) == newest(site, role).signed.version
    assert client.version(LINE) is None, "a delegated role comes when a target asks for it"


def test_a_target_is_downloaded_once(client: TufClient, server: BadServer, site: Site) -> None:
    assert client.download(TARGET) == 0
    (file,) = client.targets.iterdir()
    expected = newest(site, LINE).signed.targets[TARGET]
    expected.verify_length_and_hashes(file.read_bytes())
    server.log.clear()
    assert client.download(TARGET) == 0
    assert not any(request.path.startswith("/targets/") for request in server.log)


def test_several_targets_cost_one_refresh(client: TufClient, server: BadServer) -> None:
    assert client.download(TARGET, f"models/{LINE}/0.1.0/MODEL_CARD.md") == 0
    assert [request.path for request in server.log].count("/metadata/timestamp.json") == 1
    assert len(list(client.targets.iterdir())) == 2


def test_a_target_that_is_not_there_fails_and_stops(client: TufClient) -> None:
    assert client.download("models/none", TARGET) == 1
    assert not list(client.targets.iterdir())


def test_a_wrong_signature_fails_and_keeps_what_was_trusted(client: TufClient, site: Site) -> None:
    assert client.run("refresh") == 0
    trusted = client.version("timestamp")
    forge(site, {}, signers={"timestamp": [CryptoSigner.generate_ed25519()]})
    assert client.run("refresh") == 1
    assert client.version("timestamp") == trusted


def test_expired_metadata_fails_at_that_time(client: TufClient) -> None:
    assert client.run("refresh") == 0
    assert client.run("refresh", at=days(60).strftime("%Y-%m-%d %H:%M:%S")) == 1
    assert client.run("refresh") == 0, "a clock that ran ahead has poisoned nothing"


def test_a_server_that_is_away_fails(client: TufClient, server: BadServer) -> None:
    server.stop()
    assert client.run("refresh") == 1


@pytest.mark.timeout(1800)
def test_the_public_suite_passes_whole() -> None:
    checkout = os.environ.get("TUF_CONFORMANCE")
    if not checkout:
        pytest.skip(
            "the public suite is not vendored: git clone https://github.com/theupdateframework/tuf-conformance, "
            "then TUF_CONFORMANCE=<checkout> python -m pytest tests/integration/model_sync/test_conformance.py"
        )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tuf_conformance",
        "-q",
        "-p",
        "no:cacheprovider",
        "--entrypoint",
        f"{sys.executable} {CLIENT}",
    ]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "xfailed" not in done.stdout
