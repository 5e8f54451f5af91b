"""The public folder behind a real nginx: ranges, entity tags, missing roots, and a real python-tuf Updater that downloads."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import requests
from securesystemslib.signer import CryptoSigner
from tuf.ngclient import Updater

from model_sync.trust.documents import LineIndex
from tests.library_site import Site, make_site, tiny_bundle

LINE = "cxr-pneumonia"
# The same lines as in docs/model-library.md, which a test compares.
LOCATIONS = """\
    root /srv/models/public;
    etag on;
    location = /metadata/timestamp.json { add_header Cache-Control "no-cache"; }
    location ~ ^/metadata/[0-9]+\\.root\\.json$ { add_header Cache-Control "no-cache"; }
    location /metadata/ { add_header Cache-Control "public, max-age=31536000, immutable"; }
    location /targets/ { add_header Cache-Control "public, max-age=31536000, immutable"; }
"""
ROOT = Path(__file__).resolve().parent.parent.parent


class Served(NamedTuple):
    site: Site
    url: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    assert nginx, "nginx is missing: run `make setup-test`"
    base = tmp_path_factory.mktemp("nginx")
    site = make_site(base / "lib")
    site.publish(tiny_bundle(base, "0.1.0", seed=1, hidden=300))
    site.publish(tiny_bundle(base, "0.2.0", seed=1, hidden=300, drift=1e-4))
    site.rollout("stable", LINE, "0.2.0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (base / "spool").mkdir()
    temporary = "".join(f"{kind}_temp_path {base}/spool/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    configuration = base / "nginx.conf"
    user = "user root;\n" if os.geteuid() == 0 else ""  # else its workers cannot enter the test's folder
    configuration.write_text(
        f"{user}daemon off;\npid {base}/nginx.pid;\nerror_log {base}/error.log;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{temporary}server {{\n    listen 127.0.0.1:{port};\n"
        f"{LOCATIONS.replace('/srv/models/public', str(site.public))}}}\n}}\n"
    )
    process = subprocess.Popen([nginx, "-e", str(base / "error.log"), "-c", str(configuration)], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            try:
                requests.get(url, timeout=5).close()
                break
            except requests.ConnectionError:
                assert process.poll() is None, (base / "error.log").read_text()
                time.sleep(0.05)
        yield Served(site, url)
    finally:
        process.terminate()
        process.wait(timeout=20)


def weights(served: Served) -> tuple[str, bytes]:
    path = next((served.site.public / "targets").rglob("*.onnx"))
    return f"{served.url}/{path.relative_to(served.site.public).as_posix()}", path.read_bytes()


def get(url: str, **headers: str) -> requests.Response:
    return requests.get(url, headers={"Accept-Encoding": "identity", **{k.replace("_", "-"): v for k, v in headers.items()}}, timeout=20)


def test_a_download_is_resumed_by_range_and_entity_tag(served: Served) -> None:
    url, data = weights(served)
    whole = get(url)
    tag = whole.headers["ETag"]
    assert (whole.status_code, whole.content) == (200, data)
    assert not tag.startswith("W/")
    rest = get(url, Range="bytes=1000-", If_Range=tag)
    assert rest.status_code == 206
    assert rest.headers["Content-Range"] == f"bytes 1000-{len(data) - 1}/{len(data)}"
    assert rest.content == data[1000:]


def test_a_range_of_another_file_is_answered_whole(served: Served) -> None:
    url, data = weights(served)
    answer = get(url, Range="bytes=1000-", If_Range='"another"')
    assert (answer.status_code, answer.content) == (200, data)


def test_a_range_behind_the_end_is_416(served: Served) -> None:
    url, data = weights(served)
    answer = get(url, Range=f"bytes={len(data)}-")
    assert answer.status_code == 416
    assert answer.headers["Content-Range"] == f"bytes */{len(data)}"


def test_the_next_root_is_404(served: Served) -> None:
    assert get(f"{served.url}/metadata/1.root.json").status_code == 200
    assert get(f"{served.url}/metadata/2.root.json").status_code == 404


def test_what_changes_is_not_cached_and_what_does_not_is(served: Served) -> None:
    assert get(f"{served.url}/metadata/timestamp.json").headers["Cache-Control"] == "no-cache"
    assert get(f"{served.url}/metadata/1.root.json").headers["Cache-Control"] == "no-cache"
    assert "immutable" in get(f"{served.url}/metadata/1.snapshot.json").headers["Cache-Control"]
    assert "immutable" in get(weights(served)[0]).headers["Cache-Control"]


@pytest.mark.parametrize("path", ["library.json", "staged/", "online/", "../library.json", "%2e%2e/library.json", "metadata/"])
def test_nothing_but_the_public_folder_is_served(served: Served, path: str) -> None:
    with socket.create_connection(("127.0.0.1", int(served.url.rsplit(":", 1)[1])), timeout=20) as raw:
        raw.sendall(f"GET /{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        status = int(raw.recv(100).split()[1])
    assert status in (400, 403, 404)


def test_a_real_updater_takes_every_file_and_follows_a_root_rotation(served: Served, tmp_path: Path) -> None:
    def updater() -> Updater:
        arguments = (str(tmp_path), f"{served.url}/metadata/", str(tmp_path), f"{served.url}/targets/")
        return Updater(*arguments, bootstrap=served.site.root.read_bytes())

    client = updater()
    info = client.get_targetinfo(f"models/{LINE}/line.json")
    assert info is not None
    index = LineIndex.parse(Path(client.download_target(info)).read_bytes())
    for path in served.site.library.targets(LINE).targets:
        target = client.get_targetinfo(path)
        assert target is not None
        client.download_target(target)
    assert [release.version for release in index.versions] == ["0.1.0", "0.2.0"]
    fresh = CryptoSigner.generate_ed25519()
    served.site.library.signers[fresh.public_key.keyid] = fresh
    served.site.library.rotate_key("timestamp", served.site.holders["timestamp"][0].public_key.keyid, fresh.public_key)
    updater().refresh()
    assert (tmp_path / "root_history" / "2.root.json").is_file()


def test_the_guide_has_the_configuration_that_is_tested() -> None:
    guide = (ROOT / "docs" / "model-library.md").read_text("utf-8")
    assert all(line.strip() in guide for line in LOCATIONS.splitlines())
