"""The number by which an open page notices a change: nothing is missed, and many open pages exhaust nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.core.settings import Settings
from tests.support.scans import scan_bytes
from tests.support.web_box import Box, Person, in_process, result, served


@pytest.fixture
def box(settings: Settings) -> Iterator[Box]:
    with in_process(settings) as running:
        yield running


def poll(person: Person, etag: str) -> tuple[int, str]:
    """Ask as an open page does; returns the status and the ETag to ask with next time."""
    answer = person.get("/api/v1/revision", headers={"X-Background": "1", "If-None-Match": etag})
    if answer.status_code == 200:
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["ETag"] == f'"{answer.json()["revision"]}"'
    else:
        assert (answer.status_code, answer.content) == (304, b"")
    assert answer.headers["Cache-Control"] == "no-store"
    return answer.status_code, answer.headers["ETag"]


def test_every_change_is_noticed_and_nothing_else(box: Box) -> None:
    box.activate()
    person = box.person()
    _, etag = poll(person, "")
    assert poll(person, etag) == (304, etag)
    box.take(scan_bytes())
    status, after_upload = poll(person, etag)
    assert status == 200
    assert int(after_upload.strip('"')) > int(etag.strip('"'))
    box.work(result())
    status, after_result = poll(person, after_upload)
    assert status == 200
    assert poll(person, after_result) == (304, after_result)
    assert poll(person, f"W/{after_result}") == (304, after_result)  # as a proxy that compresses writes it


def test_a_page_that_shows_an_older_revision_is_told_so(box: Box) -> None:
    box.take(scan_bytes())
    person = box.person()
    shown = person.open("/").split('data-revision="')[1].split('"')[0]
    assert poll(person, f'"{shown}"')[0] == 304
    box.take(scan_bytes())
    assert poll(person, f'"{shown}"')[0] == 200


def test_it_ends_with_the_session(box: Box) -> None:
    person = box.person()
    assert person.get("/api/v1/revision").status_code == 200
    person.open("/")
    person.post("/logout")
    assert person.get("/api/v1/revision").status_code == 401


@pytest.mark.parametrize("odd", ["x", "-1", '"', "*", '"' + "9" * 30 + '"', "W/", "²"])
def test_an_odd_etag_is_no_error(box: Box, odd: str) -> None:
    answer = box.person().get("/api/v1/revision", headers={"If-None-Match": odd.encode()})
    assert answer.status_code == (304 if odd == "*" else 200)


def test_eleven_open_pages_of_one_user_exhaust_nothing(tmp_path: Path) -> None:
    with served(tmp_path / "box", web_threads=6) as (_, box):
        first = box.person()
        pages = []
        for _ in range(11):
            page = Person(box.base)
            page.cookies.update(first.cookies)
            pages.append(page)
        assert all(page.get("/").status_code == 200 for page in pages)
        answers: list[int] = []

        def stay_open(page: Person) -> None:
            etag = ""
            for _ in range(20):
                status, etag = poll(page, etag)
                answers.append(status)

        threads = [threading.Thread(target=stay_open, args=(page,)) for page in pages]
        for thread in threads:
            thread.start()
        assert all(first.get(path).status_code == 200 for path in ("/", "/health", "/upload") * 3)
        for thread in threads:
            thread.join(60)
        assert sorted(answers) == [200] * 11 + [304] * (11 * 19)
