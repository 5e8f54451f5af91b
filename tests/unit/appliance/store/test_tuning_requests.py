"""A record of a measuring that cannot be read stops nothing: it counts as none, and that is said."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.domain import utc_now
from appliance.store.database import Database
from appliance.store.store import Store
from appliance.store.tuning_requests import TuningRequest, TuningRequests

DIGEST = "0" * 64
KNOWN = TuningRequest(DIGEST, "cxr", "asked", "doctor", utc_now(), utc_now())


def note(database: Database, text: str) -> None:
    """Put a record into the database as it is."""
    with database.transaction() as tx:
        tx.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"tuning:{DIGEST}", text))


def changed(**changes: Any) -> str:
    """A record with other fields."""
    return json.dumps(json.loads(KNOWN.to_json()) | changes)


UNREADABLE = {
    "empty": "",
    "cut short": KNOWN.to_json()[:40],
    "no object": "[]",
    "a field missing": json.dumps({"digest": DIGEST}),
    "an unknown state": changed(state="pondering"),
    "no time": changed(asked_at="yesterday"),
    "a time without a zone": changed(asked_at="2026-11-21T00:00:00"),
    "of another model": changed(digest="1" * 64),
    "attempts as text": changed(attempts="3"),
    "progress as text": changed(progress="half"),
    "a reason without a code": changed(reason={"detail": "x"}),
    "a reason that is a text": changed(reason="late"),
}


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_counts_as_none_and_is_said(store: Store, text: str) -> None:
    note(store.database, text)
    tunings = TuningRequests(store.database)
    assert tunings.next() is None
    read = tunings.of(DIGEST)
    assert read is not None
    assert (read.state, read.open, read.reason.code if read.reason else "") == ("failed", False, "tune.unreadable")
    assert tunings.ask(DIGEST, "cxr", "doctor").state == "asked"
    following = tunings.next()
    assert (following.digest if following else None) == DIGEST


def test_a_field_of_a_newer_appliance_is_left_out(store: Store) -> None:
    note(store.database, changed(eta_s=3))
    assert TuningRequests(store.database).of(DIGEST) == KNOWN


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELDS: dict[str, st.SearchStrategy[Any]] = dict.fromkeys(json.loads(KNOWN.to_json()), JSON)


@given(st.text() | JSON.map(json.dumps) | st.fixed_dictionaries({}, optional=FIELDS).map(lambda fields: changed(**fields)))
def test_reading_never_raises(text: str) -> None:
    read = TuningRequest.from_json(DIGEST, text)
    assert (read.digest, read.state in ("asked", "measuring", "done", "failed")) == (DIGEST, True)
    assert TuningRequest.from_json(DIGEST, read.to_json()).state == read.state
