"""Every refusal leaves an entry in the audit, and no stranger can fill the disk with them (R9, R11)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from appliance.core.settings import Settings
from appliance.store.audit_refusals import MAX_ENTRIES, PERIOD_S, SUMMARY_CODE, Refusals
from appliance.store.store import Store
from tests.support.web_box import Box, Person, in_process


@pytest.fixture
def box(settings: Settings) -> Iterator[Box]:
    with in_process(settings) as running:
        yield running


def entries(store: Store, code: str) -> list[dict[str, Any]]:
    every = [json.loads(row["entry"]) for row in store.database.query("SELECT entry FROM audit ORDER BY seq")]
    return [entry for entry in every if entry["detail"].get("code") == code]


def test_r9_a_page_that_the_role_may_not_see_leaves_an_entry(box: Box) -> None:
    person = box.person("tech", "technician")
    assert person.get("/rejected").status_code == 403
    (entry,) = entries(box.store, "web.forbidden")
    assert (entry["actor"], entry["event"], entry["outcome"]) == ("tech", "110113", 4)
    assert entry["detail"]["endpoint"] == "admin.rejected"
    assert entry["detail"]["peer"] == "127.0.0.1"
    assert entry["detail"]["type"] == "110132"


def test_r9_a_request_without_its_csrf_token_leaves_an_entry(box: Box) -> None:
    person = box.person()
    person.token = ""
    assert person.post("/logout").status_code == 400
    assert Person(box.base).post("/login", data={"username": "doctor"}).status_code == 400
    first, second = entries(box.store, "web.csrf")
    assert (first["actor"], first["detail"]["endpoint"]) == ("doctor", "auth.logout")
    assert (second["actor"], second["detail"]["endpoint"]) == ("unknown", "auth.login")


def test_r9_a_foreign_host_name_leaves_an_entry(box: Box) -> None:
    person = box.person()
    assert person.get("/", headers={"Host": "evil.example"}).status_code == 400
    (entry,) = entries(box.store, "web.host")
    assert (entry["actor"], entry["detail"]["type"]) == ("unknown", "110126")


def test_r9_an_ordinary_bad_request_leaves_none(box: Box) -> None:
    person = box.person()
    before = box.store.database.number("SELECT max(seq) FROM audit")
    assert person.get("/nowhere").status_code == 404
    assert person.post("/language", data={"language": "fr"}).status_code == 400
    assert box.store.database.number("SELECT max(seq) FROM audit") == before


def test_r11_a_flood_of_refusals_is_bounded_and_counted_and_drops_no_entry_of_a_person(store: Store) -> None:
    now = [0.0]
    refusals = Refusals(store.database, clock=lambda: now[0])
    for number in range(5000):
        refusals.record("", f"10.0.{number % 40}.1", "web.csrf" if number % 2 else "web.host")
        if number % 100 == 0:
            refusals.record("doctor", "10.0.0.9", "web.forbidden")
    assert store.database.number("SELECT count(*) FROM audit") == MAX_ENTRIES + 50
    assert len(entries(store, "web.forbidden")) == 50
    now[0] += PERIOD_S
    refusals.record("", "10.9.9.9", "web.csrf")
    (summary,) = entries(store, SUMMARY_CODE)
    assert sum(summary["detail"]["refused"].values()) == 5000 - MAX_ENTRIES
    assert summary["detail"]["refused"]["web.csrf"] == 2500 - MAX_ENTRIES // 2
    assert len(summary["detail"]["peers"]) == 20
    refusals.flush()
    assert len(entries(store, SUMMARY_CODE)) == 1


def test_r11_what_was_counted_is_written_when_the_process_ends(settings: Settings) -> None:
    with in_process(settings) as box:
        person = Person(box.base)
        for _ in range(MAX_ENTRIES + 3):
            assert person.get("/", headers={"Host": "evil.example"}).status_code == 400
    store = Store(settings)
    (summary,) = entries(store, SUMMARY_CODE)
    assert summary["detail"]["refused"] == {"web.host": 3}
    assert len(entries(store, "web.host")) == MAX_ENTRIES
    store.close()
