"""The box's own floor: facts that are behind what it has learnt bring nothing new, under one root; another root begins anew."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from appliance.core.settings import Settings
from appliance.lifecycle.rollback_protection import RollbackProtection
from appliance.lifecycle.trust_facts import TrustFacts
from appliance.store.store import Store

LINE, OTHER = "cxr-pneumonia", "bone-age"
# Ahead of any clock of today, which the judgement takes as well: only the floor judges here.
NOW = datetime.now(timezone.utc).replace(microsecond=0) + timedelta(days=1000)
DIGEST = "a" * 64


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root.json"
    path.write_text("one library")
    return path


@pytest.fixture
def box(settings: Settings, root: Path) -> Iterator[Store]:
    made = Store(settings.model_copy(update={"library_root": root}))
    yield made
    made.close()


def facts(minimum: str = "1.0.0", withdrawn: tuple[str, ...] = (), days: float = 7.0, now: datetime | None = None) -> TrustFacts:
    now = now or NOW
    until = (now + timedelta(days=days)).isoformat()
    line = {"minimum_version": minimum, "versions": {"1.5.0": DIGEST, "2.0.0": DIGEST}, "valid_until": until}
    other = line | {"minimum_version": "1.0.0"}
    lines = {LINE: line | {"withdrawn": {version: {"reason": "x"} for version in withdrawn}}, OTHER: other}
    return TrustFacts.model_validate({"ok": True, "now": now.isoformat(), "valid_until": until, "lines": lines})


def code(held: TrustFacts, line: str = LINE, version: str = "2.0.0") -> str:
    refused = held.find_refusal(line, version, DIGEST)
    return refused.code if refused else ""


def hold(box: Store, given: TrustFacts, clock: datetime | None = None) -> TrustFacts:
    return RollbackProtection.load(box).check(given, clock or NOW)


def test_a_line_that_says_less_than_before_brings_nothing_new(box: Store) -> None:
    assert code(hold(box, facts("1.0.0"))) == ""
    assert code(hold(box, facts("1.1.0", ("1.5.0",)))) == ""
    for behind in (facts("1.0.0", ("1.5.0",)), facts("1.1.0")):
        held = hold(box, behind)
        assert code(held) == "trust.rollback"
        assert code(held, OTHER) == ""  # the other lines are not touched by it
    assert code(hold(box, facts("1.6.0"))) == ""  # what is below the minimum need not be listed any more
    assert code(hold(box, facts("1.5.0"))) == "trust.rollback"


def test_time_does_not_go_back(box: Store) -> None:
    hold(box, facts())
    long_ago = NOW - timedelta(days=900)
    assert code(hold(box, facts(now=long_ago), clock=long_ago)) == "trust.expired"
    assert code(hold(box, facts(), clock=long_ago)) == ""


def test_a_clock_that_ran_ahead_does_not_make_the_metadata_of_the_day_after_old(box: Store) -> None:
    assert code(hold(box, facts(), clock=NOW + timedelta(days=4000))) == "trust.expired"
    tomorrow = NOW + timedelta(days=1)
    assert code(hold(box, facts(now=tomorrow), clock=tomorrow)) == ""


def test_a_new_root_begins_anew(box: Store, root: Path) -> None:
    hold(box, facts("9.0.0", ("1.5.0",)))
    assert code(hold(box, facts("1.0.0"))) == "trust.rollback"
    root.write_text("another library")
    assert code(hold(box, facts("1.0.0"))) == ""
    root.unlink()
    assert code(hold(box, facts("1.0.0"))) == ""


def test_what_is_not_verified_moves_nothing(box: Store) -> None:
    hold(box, TrustFacts(ok=False, code="trust.signature"))
    assert RollbackProtection.load(box).lines == {}
