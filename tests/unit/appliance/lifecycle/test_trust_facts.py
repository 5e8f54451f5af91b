"""What a check says, however odd: each line by itself, and what one line forbids is learnt whatever the others say."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.child_process import Child, printable_text
from appliance.lifecycle.journal import Journal
from appliance.lifecycle.journal_queries import PERMANENT_FAILURES
from appliance.lifecycle.library_follower import apply_facts
from appliance.lifecycle.trust_facts import TrustFacts
from appliance.store.store import Store

LINE, OTHER = "cxr-pneumonia", "bone-age"
GOOD: dict[str, Any] = {
    "minimum_version": "1.0.0", "withdrawn": {"1.1.0": {"reason": "漏诊气胸", "at": "2026-03-01T00:00:00Z"}},
    "versions": {"1.0.0": "a" * 64, "1.1.0": "b" * 64}, "valid_until": "2099-01-01T00:00:00Z", "expired": False,
}  # fmt: skip


def said(**lines: Any) -> str:
    top = {"ok": True, "now": "2026-03-02T00:00:00Z", "valid_until": "2099-01-01T00:00:00Z", "expired": False, "troubles": {}}
    return json.dumps(top | {"lines": {name.replace("_", "-"): line for name, line in lines.items()}})


def alarms(store: Store) -> list[tuple[str, str, int]]:
    entries = [json.loads(row["entry"]) for row in store.database.query("SELECT entry FROM audit ORDER BY seq")]
    return [(e["detail"].get("line", ""), e["detail"]["code"], e["outcome"]) for e in entries if e["object"] == "library"]


ODD: dict[str, Any] = {
    "minimum that is none": GOOD | {"minimum_version": "1.0.0-01"},
    "version of 65 characters": GOOD | {"versions": {"1.0.0-" + "a" * 59: "a" * 64}},
    "digest that is none": GOOD | {"versions": {"1.0.0": "x"}},
    "withdrawal of what is no version": GOOD | {"withdrawn": {"all": {"reason": "x"}}},
    "no minimum": {"versions": {}},
    "no object": ["x"],
    "nothing": None,
    "time that is none": GOOD | {"valid_until": "soon"},
}


@pytest.mark.parametrize("name", ODD)
def test_a_line_that_does_not_fit_is_a_trouble_of_its_own(store: Store, name: str) -> None:
    facts = TrustFacts.parse(said(cxr_pneumonia=GOOD, bone_age=ODD[name]))
    journal = Journal(store)
    for _ in range(3):
        apply_facts(store, journal, facts)
    barred = journal.find_restriction(LINE, "1.1.0")
    assert barred
    assert "漏诊气胸" in barred.detail
    assert journal.find_restriction(LINE, "0.9.0")
    assert alarms(store) == [(OTHER, "trust.document", 8)]  # once, and of that line alone
    refused = facts.find_refusal(OTHER, "1.0.0", "a" * 64)
    assert refused
    assert refused.code == "trust.document"
    assert facts.find_refusal(LINE, "1.0.0", "a" * 64) is None
    apply_facts(store, journal, TrustFacts.parse(said(cxr_pneumonia=GOOD, bone_age=GOOD)))
    assert alarms(store)[1:] == [(OTHER, "", 0)]


def test_a_reason_of_any_length_and_kind_is_cut_and_holds(store: Store) -> None:
    for number, reason in enumerate(["x" * 5_000_000, "\ud800", "\x1b[2J\x00", 7, ["漏"]]):
        journal, line = Journal(store), f"line-{number}"
        text = json.dumps(json.loads(said()) | {"lines": {line: GOOD | {"withdrawn": {"1.1.0": {"reason": reason}}}}})
        apply_facts(store, journal, TrustFacts.parse(text))
        barred = journal.find_restriction(line, "1.1.0")
        assert barred
        assert barred.code == "model.withdrawn"
        assert len(barred.detail) < 400
        assert barred.detail.isprintable()


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, '{"ok": true, "lines": 3}', '{"lines": {}}', '{"ok":1,"now":"x"}'])
def test_what_is_no_answer_is_none(text: str) -> None:
    with pytest.raises(ValueError):
        TrustFacts.parse(text)


_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda more: st.lists(more) | st.dictionaries(st.text(), more)
)


@given(_json, st.sampled_from(sorted(GOOD)))
def test_whatever_one_line_says_the_other_is_learnt(value: Any, field: str) -> None:
    facts = TrustFacts.parse(said(cxr_pneumonia=GOOD, bone_age=GOOD | {field: value}))
    assert set(facts.lines[LINE].withdrawn) == {"1.1.0"}
    assert (OTHER in facts.lines) != (OTHER in facts.troubles)


def test_each_line_is_judged_by_its_own_expiry() -> None:
    past = GOOD | {"expired": True}
    facts = TrustFacts.parse(json.dumps(json.loads(said(cxr_pneumonia=GOOD, bone_age=past)) | {"expired": True}))
    assert facts.find_refusal(LINE, "1.0.0", "a" * 64) is None
    refused = facts.find_refusal(OTHER, "1.0.0", "a" * 64)
    assert refused
    assert refused.code == "trust.expired"
    assert set(facts.lines[OTHER].withdrawn) == {"1.1.0"}
    without = {key: value for key, value in GOOD.items() if key != "expired"}
    facts = TrustFacts.parse(json.dumps(json.loads(said(cxr_pneumonia=without)) | {"expired": True}))
    refused = facts.find_refusal(LINE, "1.0.0", "a" * 64)  # of a line that does not say, all of it counts
    assert refused
    assert refused.code == "trust.expired"


def test_a_child_that_says_much_is_heard_and_one_that_says_too_much_is_ended(tmp_path: Path) -> None:
    (tmp_path / "much.json").write_text(json.dumps(["漏" * 1000] * 3000, ensure_ascii=False))
    for limit_bytes, whole in ((32 << 20, True), (1 << 20, False)):
        child = Child(["json.tool", "--no-ensure-ascii", str(tmp_path / "much.json")], 60.0, limit_bytes)
        while not child.listen():
            assert not child.late()
            time.sleep(0.001)
        assert child.exceeded_output is not whole
        if whole:
            assert json.loads(child.text()) == ["漏" * 1000] * 3000
        child.end()


def test_text_of_another_process_is_whole_and_short() -> None:
    assert printable_text("\ud800漏\n\x1b", 10) == "?漏  "
    assert printable_text("x" * 10, 3) == "xxx"
    assert "trust.document" not in PERMANENT_FAILURES  # once its line is mended the version is taken


def test_a_line_that_was_not_received_is_a_trouble_only_where_it_is_known(store: Store) -> None:
    missing = json.dumps(json.loads(said()) | {"troubles": {LINE: {"code": "trust.missing", "message": "x"}}})
    apply_facts(store, Journal(store), TrustFacts.parse(missing))
    assert alarms(store) == []
    apply_facts(store, Journal(store), TrustFacts.parse(said(cxr_pneumonia=GOOD)))
    apply_facts(store, Journal(store), TrustFacts.parse(missing))
    assert alarms(store) == [(LINE, "trust.missing", 8)]
    assert Journal(store).find_restriction(LINE, "1.1.0")  # what was learnt stays in force
