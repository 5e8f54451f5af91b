"""The fleet page tells the truth: what is completed, which boxes are never green, why a rollout is paused, what the log holds."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from model_sync.agent.report import BoxReport, ReportError, StatusReport
from model_sync.errors import SettingsError
from model_sync.fleet.cli import main
from model_sync.fleet.database import Fleet
from model_sync.fleet.device_classes import differing_boxes
from model_sync.fleet.event_log import EventLog
from model_sync.fleet.page import _card_state
from model_sync.fleet.tables import SCHEMA, actions, boxes, meta
from model_sync.fleet.views import STATES, TROUBLES, Filters, counts, list_boxes, plan_tally
from model_sync.library import publish, rollouts
from model_sync.library.history import LibraryHistory
from model_sync.library.library import Library
from model_sync.trust.documents import RolloutStep, place_of
from tests.support.fleet_site import Centre, Person, box_report, status_json
from tests.support.library_site import tiny_bundle

LINE = "cxr-pneumonia"


@pytest.fixture(scope="module")
def centre(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Centre]:
    base = tmp_path_factory.mktemp("centre")
    running = Centre(base, rollout_key=True)
    for number, version in enumerate(("0.1.0", "0.2.0")):
        running.site.publish(tiny_bundle(base / "bundles", version, number), deltas=False)
    yield running.start("--requests-per-minute", "6000")
    running.close()


@pytest.fixture
def person(centre: Centre) -> Person:
    somebody = Person(centre)
    assert somebody.log_in("wang", centre.operator()).status_code == 302
    return somebody


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(f"sqlite:///{tmp_path}/fleet.db")
    yield made
    made.close()


def take(
    fleet: Fleet, box_id: str, ring: str, report: dict[str, Any] | None = None, *, sync: str = "ok", age_s: int = 0,
    before: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Store a report of a box that is enrolled without a connection; without one the box has never reported.

    ``before`` is the box's part of a report that comes first.
    """
    if before is not None:
        take(fleet, box_id, ring, before)
    with fleet.writing() as tx:
        tx.execute(fleet.insert(boxes).values(box_id=box_id, ring=ring, enrolled_at=1).on_conflict_do_nothing())
        sequence = tx.execute(select(boxes.c.sequence).where(boxes.c.box_id == box_id)).scalar_one() + 1
    if report is not None:
        raw = status_json(box_id, sequence, ring, box=report, sync={"state": sync, "code": "unlisted" if sync != "ok" else "ok"})
        fleet.store_report(StatusReport.model_validate_json(raw), per_hour=1000)
        with fleet.writing() as tx:
            tx.execute(boxes.update().where(boxes.c.box_id == box_id).values(last_seen=fleet.now() - age_s))


def article(page: str, ring: str) -> str:
    """Return the card of a ring's rollout."""
    return page.partition(f'id="rollout-{ring}-{LINE}"')[2].partition("</article>")[0]


def over(site: Any, ring: str, version: str = "0.2.0", percent: float = 100.0) -> None:
    """Sign a rollout whose time is over."""
    site.rollout(ring, LINE, version, percent, datetime.now(timezone.utc) - timedelta(hours=2), 1.0)


ALARM = box_report("0.2.0", "good", "scores.shifted")

AUDIT = {"head": {"entries": 7, "digest": "ab" * 32}, "anchors": []}
LESS = {"head": {"entries": 6, "digest": "ab" * 32}, "anchors": []}

TROUBLED = {
    "audit": {"report": box_report("0.2.0") | {"audit": LESS}, "before": box_report("0.2.0") | {"audit": AUDIT}},
    "alarm": {"report": ALARM},
    "failed": {"report": box_report("0.2.0") | {"activations": box_report("0.3.0", "failed", "model.self_test")["activations"]}},
    "silent": {"report": box_report("0.2.0"), "age_s": 90_000},
    "never": {},
    "unreachable": {"report": box_report("0.2.0"), "sync": "unreachable"},
    "untrusted": {"report": box_report("0.2.0"), "sync": "untrusted"},
    "outdated": {"report": box_report("0.2.0"), "sync": "outdated"},
    "error": {"report": box_report("0.2.0"), "sync": "error"},
    "unknown": {"report": box_report("0.2.0"), "sync": "unknown"},
}


# -- completed


def test_a_rollout_whose_time_is_over_is_not_completed_while_a_box_is_missing(centre: Centre, person: Person) -> None:
    over(centre.site, "late")
    take(centre.fleet, "late-1", "late", box_report("0.2.0"))
    take(centre.fleet, "late-2", "late", box_report("0.1.0"))
    card = article(person.see(), "late")
    assert "Time is over, not completed" in card
    assert "✓" not in card
    assert "Of the 2 boxes of the plan, 1 are on the version and well." in card
    assert "1 are not on it." in card
    take(centre.fleet, "late-2", "late", box_report("0.2.0"))
    card = article(person.see(), "late")
    assert "✓ Completed" in card


def test_a_rollout_without_a_box_is_not_completed(centre: Centre, person: Person) -> None:
    over(centre.site, "empty")
    assert "✓" not in article(person.see(), "empty")


@pytest.mark.parametrize("trouble", TROUBLED)
def test_a_rollout_is_not_completed_while_a_box_on_the_version_is_not_well(fleet: Fleet, trouble: str) -> None:
    step = RolloutStep(version="0.2.0", percent=100, start=datetime.now(timezone.utc) - timedelta(hours=2), duration_h=1)
    take(fleet, "good-1", "stable", box_report("0.2.0"))
    take(fleet, "bad-1", "stable", **TROUBLED[trouble])  # type: ignore[arg-type]
    tally = plan_tally(fleet, "stable", LINE, step)
    assert (tally.boxes, tally.well) == (2, 1)
    assert _card_state(step, tally, datetime.now(timezone.utc), "") == "overdue"
    fleet.deny("bad-1", "test")
    tally = plan_tally(fleet, "stable", LINE, step)
    assert (tally.boxes, tally.well) == (1, 1)
    assert _card_state(step, tally, datetime.now(timezone.utc), "") == "complete"
    assert _card_state(step, tally, datetime.now(timezone.utc), "withdrawn") == "overdue"


def test_a_box_in_its_trial_is_not_completed_yet(fleet: Fleet) -> None:
    step = RolloutStep(version="0.2.0", percent=100, start=datetime.now(timezone.utc) - timedelta(hours=2), duration_h=1)
    take(fleet, "box-1", "stable", box_report("0.2.0", "trial"))
    assert plan_tally(fleet, "stable", LINE, step) == (1, 0, 1, 0, 0)


def test_only_the_boxes_of_the_plan_count(fleet: Fleet) -> None:
    step = RolloutStep(version="0.2.0", percent=40, start=datetime.now(timezone.utc) - timedelta(hours=2), duration_h=1)
    names = [f"box-{number}" for number in range(20)]
    planned = [name for name in names if place_of(LINE, "0.2.0", name) < 40]
    for name in names:
        take(fleet, name, "stable", box_report("0.2.0" if name in planned else "0.1.0"))
    tally = plan_tally(fleet, "stable", LINE, step)
    assert 0 < len(planned) < 20
    assert (tally.boxes, tally.well) == (len(planned), len(planned))


# -- never green, and in need of attention


@pytest.mark.parametrize("trouble", TROUBLED)
def test_a_box_in_trouble_is_never_green_and_needs_attention(centre: Centre, person: Person, trouble: str) -> None:
    name = f"sick-{trouble}"
    take(centre.fleet, name, "sick", **TROUBLED[trouble])  # type: ignore[arg-type]
    row = re.search(rf'<tr>\s*<th scope="row"><a href="/fleet/box/{name}">.*?</tr>', person.see(f"/fleet?name={name}"), re.DOTALL)
    assert row
    assert 'class="badge done"' not in row[0]
    assert "✓" not in row[0]
    assert name in person.see(f"/fleet?state=attention&name={name}")
    assert f'href="/fleet/box/{name}"' not in person.see(f"/fleet?state=fine&name={name}")
    detail = person.see(f"/fleet/box/{name}")
    assert 'class="badge done"' not in detail


def test_every_box_is_fine_or_needs_attention_or_is_denied(fleet: Fleet) -> None:
    for trouble, values in TROUBLED.items():
        take(fleet, f"box-{trouble}", "stable", **values)  # type: ignore[arg-type]
    take(fleet, "box-fine", "stable", box_report("0.2.0"))
    take(fleet, "box-denied", "stable", box_report("0.2.0"))
    fleet.deny("box-denied", "test")
    numbers = counts(fleet)
    assert numbers["total"] == len(TROUBLED) + 2
    assert (numbers["attention"], numbers["fine"], numbers["denied"]) == (len(TROUBLED), 1, 1)
    shown = {row["box_id"]: row["health"] for row in list_boxes(fleet, Filters(), 1).boxes}
    assert shown == {f"box-{trouble}": trouble for trouble in TROUBLED} | {"box-fine": "fine", "box-denied": "denied"}
    assert set(TROUBLED) == set(TROUBLES)
    assert set(STATES) - {"attention", "denied", "fine"} <= set(TROUBLES)


def test_what_needs_attention_is_listed_worst_first(fleet: Fleet) -> None:
    for number, trouble in enumerate(reversed(TROUBLES)):
        take(fleet, f"box-{number}", "stable", **TROUBLED[trouble])  # type: ignore[arg-type]
    take(fleet, "box-longest", "stable", box_report("0.2.0"), age_s=900_000)
    rows = list_boxes(fleet, Filters(state="attention"), 1).boxes
    assert [row["health"] for row in rows] == [
        "audit",
        "untrusted",
        "failed",
        "alarm",
        "error",
        "silent",
        "silent",
        "unreachable",
        "outdated",
        "never",
        "unknown",
    ]
    assert rows[5]["box_id"] == "box-longest"


def test_an_open_alarm_of_shifted_scores_needs_attention_until_somebody_acknowledges_it(centre: Centre, person: Person) -> None:
    """R44: on the list, and on the page of the box, with the reason in both languages."""
    take(centre.fleet, "shift-1", "shift", ALARM)
    for language, reason, word in (
        ("zh", "模型的评分发生偏移", "模型报警"),
        ("en", "The scores of the model shifted", "Model alarm"),
    ):
        person.cookies.set("lang", language)
        for path in ("/fleet?state=attention", "/fleet?state=alarm", "/fleet/box/shift-1"):
            page = person.see(path)
            assert (reason in page, word in page, "shift-1" in page) == (True, True, True), (language, path)
    take(centre.fleet, "shift-1", "shift", box_report("0.2.0"))
    assert "shift-1" not in person.see("/fleet?state=attention")


def test_an_alarm_of_a_version_that_does_not_run_any_more_is_none(fleet: Fleet) -> None:
    """The first version of a line keeps the reason of its alarm; a later one replaced it."""
    report = box_report("0.2.0")
    old = ALARM["activations"][0] | {"version": "0.1.0", "digest": "0" * 64, "code": "activation.failures"}
    take(fleet, "box-1", "stable", report | {"activations": [old, *report["activations"]]})
    assert [row["health"] for row in list_boxes(fleet, Filters(), 1).boxes] == ["fine"]


def test_a_failed_version_and_an_alarm_are_both_shown(centre: Centre, person: Person) -> None:
    failed = box_report("0.3.0", "failed", "model.self_test")["activations"][0] | {"digest": "1" * 64}
    take(centre.fleet, "both-1", "both", ALARM | {"activations": [*ALARM["activations"], failed]})
    page = person.see("/fleet/box/both-1")
    assert "0.2.0 · " in page
    assert "0.3.0 · " in page
    assert "The scores of the model shifted" in page


# -- why it is paused


def test_a_rollout_that_a_person_paused_says_who_and_why(centre: Centre, person: Person) -> None:
    over(centre.site, "why")
    take(centre.fleet, "why-1", "why", box_report("0.1.0"))
    person.see()
    person.submit("/fleet/pause", ring="why", line=LINE, action="pause", version="0.2.0", why="too many\n<b>false</b> alarms in Baoji")
    card = article(person.see(), "why")
    assert "wang paused it" in card
    assert "Reason: too many &lt;b&gt;false&lt;/b&gt; alarms in Baoji" in card


def test_a_rollout_that_the_failure_budget_paused_says_how_many_failed_and_for_what(centre: Centre, person: Person) -> None:
    over(centre.site, "spent")
    for number in range(4):
        bad = number < 2
        take(centre.fleet, f"spent-{number}", "spent", box_report("0.2.0", "failed" if bad else "good", "model.self_test" if bad else None))
    from model_sync.fleet.rollout_pause_policy import RolloutPausePolicy
    from model_sync.fleet.rollouts import Rollouts
    from model_sync.library.keys import load_signer
    from tests.support.fleet_site import PASSPHRASE

    signer = load_signer(str(centre.rollout_key), lambda _what: PASSPHRASE)
    assert RolloutPausePolicy(
        centre.fleet, Rollouts(centre.site.library.files.directory, centre.fleet, signer, lambda _what: PASSPHRASE)
    ).check("spent")
    card = article(person.see(), "spent")
    assert "The failure budget paused it" in card
    assert "2 of 4 boxes failed." in card
    assert "2 × The model failed its self-test <code>model.self_test</code>" in card


def test_a_rollout_that_was_signed_as_paused_says_so(centre: Centre, person: Person) -> None:
    centre.site.rollout("signed", LINE, "0.2.0", paused=True)
    assert "It was signed as paused with model-library" in article(person.see(), "signed")


def test_a_rollout_to_a_barred_version_says_so(tmp_path: Path) -> None:
    centre = Centre(tmp_path / "centre")
    for number, version in enumerate(("0.1.0", "0.2.0")):
        centre.site.publish(tiny_bundle(tmp_path / "bundles", version, number), deltas=False)
    for ring, version in (("old", "0.1.0"), ("bad", "0.2.0")):
        over(centre.site, ring, version)
        take(centre.fleet, f"{ring}-1", ring, box_report(version))
    centre.site.withdraw(LINE, "0.2.0")
    publish.set_minimum(centre.site.library, LINE, "0.2.0")
    centre.start()
    try:
        person = Person(centre)
        person.log_in("wang", centre.operator())
        page = person.see()
        assert "0.2.0 is withdrawn: no box installs it" in article(page, "bad")
        assert "0.1.0 is below the minimum 0.2.0: no further box takes it; boxes that run it go on" in article(page, "old")
        assert "✓ Completed" not in page
    finally:
        centre.close()


# -- the log


def test_the_log_holds_publications_withdrawals_rollouts_signatures_and_expiries(tmp_path: Path) -> None:
    centre = Centre(tmp_path / "centre")
    site = centre.site
    for number, version in enumerate(("0.1.0", "0.2.0")):
        site.publish(tiny_bundle(tmp_path / "bundles", version, number), deltas=False)
    site.rollout("stable", LINE, "0.2.0", 25.0)
    site.withdraw(LINE, "0.1.0", "misses effusions")
    publish.set_minimum(site.library, LINE, "0.2.0")
    site.library.renew("root")
    rollouts.rollout(site.by_hand(), "canary", LINE, "0.2.0")
    centre.fleet.record("wang", "paused", ring="stable", line=LINE, subject="0.2.0", figures="", note="looks odd")
    events = {entry.action: entry for entry in reversed(EventLog(centre.fleet, site.library.files.directory).read().entries)}
    assert events["published"].subject.startswith(f"{LINE} · 0.2.0 · {LINE} v")
    assert (events["withdrawn"].subject.startswith(f"{LINE} · 0.1.0"), events["withdrawn"].note) == (True, "misses effusions")
    assert events["minimum"].subject.startswith(f"{LINE} · 0.2.0")
    assert events["rollout"].subject.startswith(f"stable · {LINE} · 0.2.0")
    assert events["rollout"].note == "25\u00a0% / 0\u00a0h"
    assert events["signed"].who == "alice, bob, carol"
    assert (events["waiting"].subject, events["waiting"].note) == ("rollout v3", "0/1")
    assert events["paused"].note == "looks odd"
    centre.start(later="+25d")
    try:
        person = Person(centre)
        person.log_in("wang", centre.operator())
        page = person.see("/fleet/log")
        for words in (
            "published",
            "withdrew the version",
            "signed the rollout",
            "alice, bob, carol",
            "waits for signatures",
            "expired",
            "expires soon",
        ):
            assert words in page, words
        assert "misses effusions" in page
        front = person.see()
        assert "timestamp v" in front
        assert "boxes keep their models and accept nothing new" in front
        assert 'href="/fleet/log"' in front
    finally:
        centre.close()


def test_an_expiry_that_was_mended_stays_in_the_log(tmp_path: Path) -> None:
    centre = Centre(tmp_path / "centre")
    centre.close()
    now = datetime.now(timezone.utc)
    past = Library(centre.site.library.files.directory, centre.site.library.signers.values(), clock=lambda: now - timedelta(days=400))
    past.renew("root")
    expired = past.published("root")
    assert expired is not None
    centre.site.library.renew("root")
    events = LibraryHistory(centre.site.library.files.directory).events()
    assert (expired.signed.expires, "expired", ("root v2",)) in [(event.at, event.kind, event.subject) for event in events]


def test_the_log_of_a_copy_without_earlier_documents_still_has_the_signatures(tmp_path: Path) -> None:
    centre = Centre(tmp_path / "centre")
    centre.close()
    centre.site.publish(tiny_bundle(tmp_path / "bundles", "0.1.0"), deltas=False)
    for path in (centre.site.public / "targets" / "models" / LINE).glob("*.line.json"):
        path.unlink()
    events = LibraryHistory(centre.site.library.files.directory).events()
    assert ("signed", (f"{LINE} v2",)) in [(event.kind, event.subject) for event in events]


def test_the_log_has_pages_and_merges_both_sources_by_time(centre: Centre) -> None:
    log = EventLog(centre.fleet, centre.site.library.files.directory)
    first = log.read(1, 5)
    assert first.pages > 1
    entries = [entry for number in range(1, first.pages + 1) for entry in log.read(number, 5).entries]
    assert entries == log.read(1, 10_000).entries
    assert [entry.at for entry in entries] == sorted((entry.at for entry in entries), reverse=True)
    assert log.read(10_000, 5).page == first.pages


# -- boxes of one device class


def reported(device_class: str | None, precision: str, runtime: str = "onnxruntime 1.20.1") -> dict[str, Any]:
    """Return a box report of a box of this class; None is a report of an older appliance."""
    report = box_report("0.2.0")
    report["models"][0] |= {"precision": precision, "runtime": runtime}
    return report if device_class is None else report | {"device_class": device_class}


@pytest.mark.parametrize(
    ("language", "mark", "banner"),
    [
        ("en", "differs from its class", "than most boxes with the same processor and GPU: 2. Run `appliance tune`"),
        ("zh", "与同类设备不同", "相同）不同的设备：2 台。请在其空闲时运行 `appliance tune`"),
    ],
)
def test_boxes_that_chose_otherwise_than_their_class_are_marked_and_can_be_listed(
    centre: Centre, person: Person, language: str, mark: str, banner: str
) -> None:
    take(centre.fleet, "same-1", "classes", reported("0" * 16, "int8", "onnxruntime 1.20.1"))
    take(centre.fleet, "same-2", "classes", reported("0" * 16, "int8", "onnxruntime 1.23.0"))
    take(centre.fleet, "unlike-1", "classes", reported("1" * 16, "int8"))
    take(centre.fleet, "unlike-2", "classes", reported("1" * 16, "fp16"))
    take(centre.fleet, "old-1", "classes", reported(None, "fp32"))
    person.cookies.set("lang", language)
    page = person.see("/fleet?ring=classes")
    rows = {name: row for row in page.split("<tr>") for name in re.findall(r'href="/fleet/box/([^"]+)"', row)}
    assert {name for name, row in rows.items() if mark in row} == {"unlike-1", "unlike-2"}
    assert rows.keys() == {"same-1", "same-2", "unlike-1", "unlike-2", "old-1"}
    assert banner in page
    filtered = person.see("/fleet?differs=yes")
    assert set(re.findall(r'href="/fleet/box/([^"]+)"', filtered)) == {"unlike-1", "unlike-2"}
    assert mark in person.see("/fleet/box/unlike-1")
    assert mark not in person.see("/fleet/box/same-1")
    assert "1" * 16 in person.see("/fleet/box/unlike-1")


def test_a_denied_box_is_not_compared(fleet: Fleet) -> None:
    take(fleet, "a", "stable", reported("2" * 16, "int8"))
    take(fleet, "b", "stable", reported("2" * 16, "fp32"))
    assert differing_boxes(fleet) == {"a": {LINE}, "b": {LINE}}
    fleet.deny("b", "wang")
    assert differing_boxes(fleet) == {}


def test_a_report_without_a_class_is_taken_and_one_that_is_text_is_refused(fleet: Fleet) -> None:
    take(fleet, "a", "stable", reported(None, "int8"))
    for device_class in ("Intel N100", "0" * 15, "0" * 17, "G" * 16, "", 7):
        with pytest.raises(ReportError, match="device_class"):
            BoxReport.parse(json.dumps(box_report() | {"device_class": device_class}).encode())
    assert BoxReport.parse(json.dumps(reported("0" * 16, "int8")).encode()).device_class == "0" * 16


# -- times, and the database


def test_times_are_marked_as_utc_for_the_script_of_the_page(centre: Centre, person: Person) -> None:
    take(centre.fleet, "clock-1", "clock", box_report("0.2.0"))
    for path in ("/fleet", "/fleet/log", "/fleet/box/clock-1"):
        page = person.see(path)
        assert re.search(r'<time datetime="\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ">\d{4}-\d\d-\d\d \d\d:\d\d</time>', page)
        assert re.search(r'<span data-zone="[^"]+Z">UTC</span>', page)
        assert "&lt;time" not in page
    answer = person.get(person.base + re.findall(r'src="(/fleet/script.js[^"]+)"', page)[0], timeout=30)
    assert answer.headers["Content-Type"].startswith("text/javascript")
    assert "script-src 'self'" in answer.headers["Content-Security-Policy"]


def test_a_database_of_the_first_schema_is_migrated_with_its_log(tmp_path: Path) -> None:
    path = tmp_path / "fleet.db"
    old = Fleet(f"sqlite:///{path}")
    old.record("wang", "paused", ring="stable", line=LINE, subject="0.2.0", figures="1/2")
    old.close()
    database = sqlite3.connect(path)
    database.execute("ALTER TABLE actions DROP COLUMN note")
    database.execute("ALTER TABLE boxes DROP COLUMN device_class")
    for index in ("boxes_by_alarm", "boxes_by_audit_state"):
        database.execute(f"DROP INDEX {index}")
    for column in ("alarm", "alarm_line", "alarm_version", "audit_heads", "audit_state"):
        database.execute(f"ALTER TABLE boxes DROP COLUMN {column}")
    for column in ("failures INTEGER", "locked_until BIGINT"):
        database.execute(f"ALTER TABLE operators ADD COLUMN {column} NOT NULL DEFAULT 0")
    database.execute("UPDATE meta SET value = '1' WHERE key = 'schema'")
    database.commit()
    database.close()
    shutil.copyfile(path, tmp_path / "copy.db")
    for _ in range(2):  # a second start finds nothing to do
        fleet = Fleet(f"sqlite:///{path}")
        with fleet.reading() as tx:
            assert [(row.figures, row.note) for row in tx.execute(select(actions))] == [("1/2", "")]
            assert tx.execute(select(meta.c.value).where(meta.c.key == "schema")).scalar_one() == str(SCHEMA)
        take(fleet, "box-1", "stable", ALARM)
        assert [row["health"] for row in list_boxes(fleet, Filters(), 1).boxes] == ["alarm"]
        fleet.close()
    database = sqlite3.connect(tmp_path / "copy.db")
    database.execute("UPDATE meta SET value = '99' WHERE key = 'schema'")
    database.commit()
    database.close()
    with pytest.raises(SettingsError, match="tables of version 99"):
        Fleet(f"sqlite:///{tmp_path}/copy.db")


def test_r10_an_audit_that_went_backwards_is_marked_until_a_person_acknowledges_it(centre: Centre, person: Person) -> None:
    fleet = centre.fleet
    take(fleet, "audited", "audited", box_report("0.2.0") | {"audit": AUDIT})
    assert "Audit changed" not in person.see("/fleet/box/audited")
    take(fleet, "audited", "audited", box_report("0.2.0") | {"audit": LESS})
    take(fleet, "audited", "audited", box_report("0.2.0") | {"audit": AUDIT})  # that it is back does not explain it
    page = person.see("/fleet/box/audited")
    assert "It has fewer entries than it had" in page
    assert "model-library acknowledge-audit audited" in page
    library = ["--db", centre.db]
    assert main(["acknowledge-audit", "audited", "--note", "restored from its backup, case 9", *library]) == 0
    take(fleet, "audited", "audited", box_report("0.2.0") | {"audit": LESS})
    assert "It has fewer entries" not in person.see("/fleet/box/audited")
    with fleet.reading() as tx:
        notes = [row.note for row in tx.execute(select(actions).where(actions.c.action == "audit"))]
    assert notes == ["restored from its backup, case 9"]
    assert main(["acknowledge-audit", "nobody", "--note", "x", *library]) != 0
