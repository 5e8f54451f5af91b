"""The signed documents: strict, canonical, and a rollout decision that every box can make alone."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_sync.errors import TrustError
from model_sync.trust.documents import LineIndex, Release, Rollout, RolloutStep, Withdrawal, decide, line_patterns, older

NOW = datetime(2026, 11, 21, tzinfo=timezone.utc)
DIGEST = "a" * 64


def index(**changes: object) -> LineIndex:
    values = {
        "line": "cxr",
        "minimum_version": "0.2.0",
        "versions": [Release(version=version, digest=DIGEST, published_at=NOW) for version in ("0.1.0", "0.2.0", "0.3.0")],
        "withdrawn": [Withdrawal(version="0.3.0", reason="wrong laterality", at=NOW)],
    } | changes
    return LineIndex(**values)  # type: ignore[arg-type]


def test_the_offline_check_does_not_load_the_schema_of_manifests() -> None:
    """The box starts it before every activation, and a manifest's schema costs as much as everything else in it."""
    code = "import sys, model_sync.trust.offline_check; print([name for name in sys.modules if name.startswith('model_sync.bundle')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_documents_round_trip_and_their_bytes_are_canonical() -> None:
    rollout = Rollout(ring="canary", issued_at=NOW, lines={"cxr": RolloutStep(version="0.2.0", percent=10, start=NOW)})
    for document in (index(), rollout):
        again = type(document).parse(document.to_json())
        assert again == document
        assert again.to_json() == document.to_json()


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"\xff", index().to_json().replace(b'"line"', b'"lin"'), index().to_json().replace(b'"schema": 1', b'"schema": 2')]
)
def test_a_signed_document_that_is_not_understood_is_a_trust_error(raw: bytes) -> None:
    with pytest.raises(TrustError):
        LineIndex.parse(raw)


def parsed(**changes: object) -> LineIndex:
    return LineIndex.parse(json.dumps(json.loads(index().to_json()) | changes).encode())


@pytest.mark.parametrize(
    "version", ["1.0.0-01", "1.0.0-a..b", "1.0.0-", "1.0", "01.0.0", "1.0.0+", "1.0.0+a" + "b" * 60, "1.0.0\n", "\u0661.0.0"]
)
def test_a_version_that_cannot_be_compared_is_no_version(version: str) -> None:
    with pytest.raises(TrustError):
        parsed(minimum_version=version)


@given(st.from_regex(r"[0-9]{1,2}\.[0-9]{1,2}\.[0-9]{1,2}(-[0-9A-Za-z.-]{1,12})?(\+[0-9A-Za-z.-]{1,12})?", fullmatch=True))
def test_whatever_passes_for_a_version_can_be_compared(version: str) -> None:
    try:
        minimum = parsed(minimum_version=version).minimum_version
    except TrustError:
        return
    assert older(minimum, "1.0.0") in (True, False)


@pytest.mark.parametrize(
    "moment", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-10:00", "1970-01-01T00:00:00Z", "2026-01-01T00:00:00"]
)
def test_a_time_out_of_the_world_is_refused(moment: str) -> None:
    with pytest.raises(TrustError):
        parsed(withdrawn=[{"version": "0.1.0", "reason": "x", "at": moment}])
    step = {"version": "0.2.0", "percent": 10, "start": moment, "duration_h": 10}
    with pytest.raises(TrustError):
        Rollout.parse(json.dumps({"schema": 1, "ring": "a", "issued_at": NOW.isoformat(), "lines": {"cxr": step}}).encode())


def test_a_bulky_index_is_refused_before_it_can_starve_other_lines() -> None:
    with pytest.raises(TrustError):
        parsed(withdrawn=[{"version": "0.1.0", "reason": "x" * 301, "at": NOW.isoformat()}])
    release = {"digest": DIGEST, "published_at": NOW.isoformat()}
    with pytest.raises(TrustError):
        parsed(versions=[release | {"version": f"1.0.{number}"} for number in range(501)], withdrawn=[])


def test_an_index_says_what_a_box_must_not_run() -> None:
    assert index().refusal("0.2.0") is None
    assert index().refusal("0.1.0") == "below_minimum"
    assert index().refusal("0.3.0") == "withdrawn"
    assert index().refusal("0.4.0") == "unknown"


def test_versions_are_compared_by_precedence_not_by_text() -> None:
    assert older("0.9.0", "0.10.0")
    assert older("1.0.0-rc.1", "1.0.0")
    assert not older("1.0.0+build.2", "1.0.0")


def test_patterns_cover_every_depth_a_bundle_has() -> None:
    from tuf.api.metadata import DelegatedRole

    role = DelegatedRole("cxr", [], 1, terminating=True, paths=line_patterns("cxr"))
    for path in ("models/cxr/line.json", "models/cxr/0.1.0/manifest.json", "models/cxr/0.1.0/golden/a/b.npz", "deltas/cxr/a-b.tensor"):
        assert role.is_delegated_path(path)
    for path in ("models/other/line.json", "models/cxr", "rollout/stable.json", "models/cxr2/0.1.0/manifest.json"):
        assert not role.is_delegated_path(path)


@given(st.text(min_size=1, max_size=30), st.floats(0, 100), st.floats(0, 100), st.floats(0, 200))
def test_a_wider_rollout_only_adds_boxes_and_time_only_lets_more_in(box: str, narrow: float, wide: float, hours: float) -> None:
    narrow, wide = sorted((narrow, wide))
    later = NOW + timedelta(hours=hours)
    small = RolloutStep(version="1.0.0", percent=narrow, start=NOW)
    large = RolloutStep(version="1.0.0", percent=wide, start=NOW)
    assert not decide(small, "cxr", box, later).take or decide(large, "cxr", box, later).take
    slow = RolloutStep(version="1.0.0", percent=wide, start=NOW, duration_h=100)
    decision = decide(slow, "cxr", box, later)
    assert decision.take == (decision.code == "")
    if decision.code == "not_yet":
        assert decision.at is not None
        assert later < decision.at <= NOW + timedelta(hours=100)
        assert decide(slow, "cxr", box, decision.at).take


def test_a_rollout_reaches_about_its_percentage_and_everybody_at_100() -> None:
    step = RolloutStep(version="1.0.0", percent=10, start=NOW)
    taken = sum(decide(step, "cxr", f"box-{number}", NOW).take for number in range(10_000))
    assert 800 < taken < 1200
    everybody = step.model_copy(update={"percent": 100.0})
    assert all(decide(everybody, "cxr", f"box-{number}", NOW).take for number in range(1000))
    assert not decide(everybody, "cxr", "box-1", NOW - timedelta(seconds=1)).take
    assert decide(everybody.model_copy(update={"paused": True}), "cxr", "box-1", NOW).code == "paused"
