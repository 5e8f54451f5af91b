"""The live feed: nothing is missed over a reconnect, and readers of it never starve the pages."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from appliance.core.settings import Settings
from tests.support.scans import scan_bytes
from tests.web_box import Box, Person, in_process, result, served, wait_for


@pytest.fixture
def box(settings: Settings) -> Iterator[Box]:
    with in_process(settings) as running:
        yield running


@contextmanager
def stream(person: Person, path: str = "/api/v1/events", **headers: str) -> Iterator[requests.Response]:
    answer = person.get(path, stream=True, headers=headers)
    try:
        yield answer
    finally:
        answer.close()


def next_event(answer: requests.Response) -> tuple[int, dict[str, Any]]:
    """The next event's id and data."""
    number = 0
    for line in answer.iter_lines():
        if line.startswith(b"id: "):
            number = int(line[4:])
        if line.startswith(b"data: "):
            return number, json.loads(line[6:])
    raise AssertionError("the stream ended")


def test_a_change_is_told_at_once_and_a_reconnect_misses_nothing(box: Box) -> None:
    box.activate()
    person = box.person()
    with stream(person) as answer:
        assert answer.headers["Content-Type"] == "text/event-stream"
        first = box.take(scan_bytes())
        number, told = next_event(answer)
        assert told["studies"][-1] == {
            "id": first.study_id,
            "state": told["studies"][-1]["state"],
            "position": told["studies"][-1]["position"],
            "urgent": False,
        }
        assert told["revision"] == number
    box.work(result())
    second = box.take(scan_bytes())
    with stream(person, **{"Last-Event-ID": str(number)}) as answer:
        number, told = next_event(answer)
        assert {item["id"]: item["state"] for item in told["studies"]} == {first.study_id: "ai_ready", second.study_id: "queued"}
        assert told["queue"] == 1
    with stream(person, f"/api/v1/events?since={number - 1}") as answer:
        assert next_event(answer)[0] == number
    assert person.get("/api/v1/revision").json() == {"revision": number}


def test_readers_beyond_the_bound_are_told_to_ask_at_intervals(tmp_path: Path) -> None:
    with served(tmp_path / "box", web_threads=6) as (_, box):
        _fill_the_streams(box.person())


def _fill_the_streams(person: Person) -> None:
    with stream(person) as first, stream(person) as second:
        assert (first.status_code, second.status_code) == (200, 200)
        refused = person.get("/api/v1/events")
        assert refused.status_code == 503
        assert refused.headers["Retry-After"] == "30"
        assert person.get("/").status_code == 200
    wait_for(lambda: _opens(person))


def _opens(person: Person) -> bool:
    with stream(person) as answer:
        return answer.status_code == 200


def test_a_stream_ends_with_its_session(box: Box) -> None:
    person = box.person()
    with stream(person) as answer:
        lines = answer.iter_lines()
        assert next(lines) == b"retry: 2000"
        person.open("/")
        person.post("/logout")
        assert b"".join(lines) == b""
    assert person.get("/api/v1/events").status_code == 401


def test_odd_places_to_go_on_from_are_refused(box: Box) -> None:
    person = box.person()
    for odd in ("x", "-1", "9" * 30):
        assert person.get("/api/v1/events", headers={"Last-Event-ID": odd}).status_code == 400
    for odd in ("²", "٣", "1.5", "-1"):
        assert person.get("/api/v1/events", params={"since": odd}).status_code == 400


def test_a_long_stream_ends_and_a_quiet_one_says_that_it_lives(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    from webui import events

    monkeypatch.setattr(events, "_HEARTBEAT_S", 0.0)
    monkeypatch.setattr(events, "_LONGEST_S", 0.5)
    with stream(box.person()) as answer:
        assert b": still here" in answer.content


def test_closed_pages_give_their_places_back_at_once(tmp_path: Path) -> None:
    with served(tmp_path / "box", web_threads=6) as (server, box):
        person = box.person()
        for _ in range(6):
            wait_for(lambda: _opens(person), 30)
        opened = threading.Event()
        bodies: list[bytes] = []

        def reader() -> None:
            while not opened.is_set():
                with stream(person) as answer:
                    if answer.status_code == 200:
                        opened.set()
                        bodies.append(answer.content)

        thread = threading.Thread(target=reader)
        thread.start()
        assert opened.wait(10)
        assert server.stop() == 0
        thread.join(10)
        assert bodies[0].startswith(b"retry:")
