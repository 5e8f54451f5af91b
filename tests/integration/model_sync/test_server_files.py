"""The library's files over the server: validators, ranges, nothing but the public tree, and python-tuf's own updater."""

from __future__ import annotations

import hashlib
import http.client
import re
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from tuf.ngclient import Updater

from tests.support.fleet_site import Centre
from tests.support.library_site import tiny_bundle

LINE = "models/cxr-pneumonia/line.json"


@pytest.fixture(scope="module")
def centre(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Centre]:
    running = Centre(tmp_path_factory.mktemp("centre"))
    running.site.publish(tiny_bundle(tmp_path_factory.mktemp("bundle"), "0.1.0"))
    running.site.rollout("stable", "cxr-pneumonia", "0.1.0")
    (running.site.library.files.directory / "secret.json").write_text("secret")
    yield running.start()
    running.close()


@pytest.fixture(scope="module")
def model(centre: Centre) -> Path:
    """The published ONNX file."""
    return next((centre.site.public / "targets" / "models" / "cxr-pneumonia" / "0.1.0").glob("*.model_fp32.onnx"))


def url_of(centre: Centre, path: Path) -> str:
    return f"/{path.relative_to(centre.site.public)}"


def raw(centre: Centre, path: str) -> http.client.HTTPResponse:
    """One request whose path nobody tidies up."""
    context = ssl.create_default_context(cafile=str(centre.ca))
    connection = http.client.HTTPSConnection("127.0.0.1", int(centre.url.rpartition(":")[2]), context=context, timeout=10)
    connection.putrequest("GET", path, skip_accept_encoding=True)
    connection.endheaders()
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer


def test_a_target_has_its_digest_as_a_strong_validator_and_never_expires(centre: Centre, model: Path) -> None:
    answer = centre.get(url_of(centre, model))
    digest = hashlib.sha256(answer.content).hexdigest()
    assert answer.headers["ETag"] == f'"{digest}"'
    assert "immutable" in answer.headers["Cache-Control"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Accept-Ranges"] == "bytes"


def test_the_timestamp_is_asked_for_anew_each_time_and_versioned_metadata_never(centre: Centre) -> None:
    assert centre.get("/metadata/timestamp.json").headers["Cache-Control"] == "no-cache"
    assert "immutable" in centre.get("/metadata/1.root.json").headers["Cache-Control"]


def test_an_unchanged_timestamp_costs_304(centre: Centre) -> None:
    first = centre.get("/metadata/timestamp.json")
    again = centre.get("/metadata/timestamp.json", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    centre.site.library.refresh_timestamp()
    changed = centre.get("/metadata/timestamp.json", headers={"If-None-Match": first.headers["ETag"]})
    assert (changed.status_code, changed.headers["ETag"] != first.headers["ETag"]) == (200, True)


@pytest.mark.parametrize(
    ("wanted", "begin", "end"), [("bytes=0-9", 0, 10), ("bytes=100-", 100, None), ("bytes=-7", -7, None), ("bytes=5-5", 5, 6)]
)
def test_a_range_is_exactly_that_range(centre: Centre, model: Path, wanted: str, begin: int, end: int | None) -> None:
    data = model.read_bytes()
    answer = centre.get(url_of(centre, model), headers={"Range": wanted})
    assert (answer.status_code, answer.content) == (206, data[begin:end])
    first = begin % len(data)
    assert answer.headers["Content-Range"] == f"bytes {first}-{first + len(answer.content) - 1}/{len(data)}"


def test_a_range_of_a_file_that_changed_is_the_whole_new_file(centre: Centre, model: Path) -> None:
    headers = {"Range": "bytes=5-", "If-Range": '"another"'}
    answer = centre.get(url_of(centre, model), headers=headers)
    assert (answer.status_code, answer.content) == (200, model.read_bytes())
    headers["If-Range"] = answer.headers["ETag"]
    assert centre.get(url_of(centre, model), headers=headers).status_code == 206


@pytest.mark.parametrize("wanted", ["bytes=99999999-", "bytes=9-3", "bytes=x", "lines=1-2", "bytes=1-2,4-5"])
def test_a_range_that_there_is_not_is_refused_or_ignored_but_never_wrong(centre: Centre, model: Path, wanted: str) -> None:
    answer = centre.get(url_of(centre, model), headers={"Range": wanted})
    assert answer.status_code in (200, 416)
    if answer.status_code == 200:
        assert answer.content == model.read_bytes()
    else:
        assert answer.headers["Content-Range"] == f"bytes */{model.stat().st_size}"


@pytest.mark.parametrize(
    "path",
    [
        "/targets/../secret.json", "/targets/../../library.json", "/targets/%2e%2e/%2e%2e/library.json", "/metadata/..%2f..%2flibrary.json",
        "/metadata/../../library.json", "/targets//etc/passwd", "/targets/%2fetc/passwd", "/targets/models/../../../library.json",
        "/targets/..%5c..%5clibrary.json", "/metadata/timestamp.json%00.json", "/metadata/.hidden.json",
        "/targets/", "/metadata/", "/targets",
        "/targets/models", "/targets/models/", "/online/timestamp.pem", "/staged/root.json", "/library.json", "/fleet.db",
        "/targets/" + "a" * 3000,
        "/metadata/timestamp.json/", "/metadata/timestamp.json/x",
    ],
)  # fmt: skip
def test_nothing_but_the_public_files_is_served(centre: Centre, path: str) -> None:
    answer = raw(centre, path)
    assert answer.status in (404, 400)


def test_a_link_out_of_the_tree_shows_nothing_of_it(centre: Centre) -> None:
    outside = centre.site.public / "targets" / "link"
    outside.symlink_to("/etc")
    try:
        assert centre.get("/targets/link/passwd").status_code == 404
    finally:
        outside.unlink()


def test_other_methods_are_refused(centre: Centre) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        answer = requests.request(method, f"{centre.url}/metadata/timestamp.json", verify=str(centre.ca), timeout=10)
        assert answer.status_code == 405
    head = requests.head(f"{centre.url}/metadata/timestamp.json", verify=str(centre.ca), timeout=10)
    assert (head.status_code, head.content, int(head.headers["Content-Length"]) > 0) == (200, b"", True)


def test_python_tufs_own_updater_gets_a_target(centre: Centre, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(centre.ca))
    monkeypatch.setenv("SSL_CERT_FILE", str(centre.ca))
    (tmp_path / "targets").mkdir()
    updater = Updater(
        str(tmp_path / "metadata"), f"{centre.url}/metadata/", str(tmp_path / "targets"), f"{centre.url}/targets/",
        bootstrap=centre.site.root.read_bytes(),
    )  # fmt: skip
    updater.refresh()
    info = updater.get_targetinfo("models/cxr-pneumonia/0.1.0/model_fp32.onnx")
    assert info
    assert Path(updater.download_target(info)).read_bytes() == model.read_bytes()
    assert updater.get_targetinfo(LINE)


def test_old_tls_is_refused(centre: Centre) -> None:
    context = ssl.create_default_context(cafile=str(centre.ca))
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    port = int(centre.url.rpartition(":")[2])
    with pytest.raises((ssl.SSLError, ConnectionError)), socket.create_connection(("127.0.0.1", port), 10) as plain:
        context.wrap_socket(plain, server_hostname="127.0.0.1")


def test_silent_and_slow_connections_do_not_keep_others_out(centre: Centre) -> None:
    port = int(centre.url.rpartition(":")[2])
    idle = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(60)]
    try:
        assert centre.get("/healthz").text == "ok\n"
    finally:
        for connection in idle:
            connection.close()


def test_the_server_says_that_it_is_well(centre: Centre) -> None:
    assert centre.get("/healthz").status_code == 200


def test_it_stops_when_asked(tmp_path: Path) -> None:
    centre = Centre(tmp_path / "stop").start()
    process = centre.process
    assert process
    centre.stop()
    assert process.returncode == 0
    centre.close()


def test_the_log_has_no_tracebacks(centre: Centre) -> None:
    assert not re.search(r"Traceback|crashed", centre.log.read_text())
