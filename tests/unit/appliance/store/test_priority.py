"""What a sender calls urgent, and what became of that: real terms alone, odd values say nothing, the oldest urgent one first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian

from appliance.core.domain import Note, Source
from appliance.core.errors import StoreError
from appliance.ingest.ingest import Ingest
from appliance.store.database import Database
from appliance.store.priority import Urgency
from appliance.store.store import Store
from appliance.store.worklist import Worklist
from tests.support.box_database import TEST_KEY
from tests.support.old_database import old_database
from tests.support.scans import dataset, encode, scan_bytes

ROOM = Source("dimse", "CR_ROOM1")


def take(store: Store, data: bytes, source: Source = ROOM) -> Any:
    """Bring one scan through the door and close its series."""
    accepted = Ingest(store).accept(data, source)
    store.planner.close_series([accepted.stored.series_id])
    return accepted.stored


def with_priority(value: object, representation: str = "SH", **changes: Any) -> bytes:
    """A scan whose Requested Procedure Priority is whatever is given, in whatever representation."""
    made = dataset(**changes)
    made.add_new(0x00401003, representation, value)
    return encode(made)


def kept(store: Store, image: int) -> str:
    """The priority as the door kept it."""
    row = store.database.one("SELECT requested_procedure_priority AS term FROM instances WHERE id = ?", image)
    assert row
    return str(row["term"])


def why(store: Store, study: int) -> Urgency | None:
    return Worklist(store).study(study).row.urgent


def entries(store: Store, study: int) -> list[dict[str, Any]]:
    """What the audit says of a study's urgency."""
    rows = [json.loads(row["entry"]) for row in store.database.query("SELECT entry FROM audit ORDER BY seq")]
    return [row for row in rows if row["object"] == f"study:{study}" and "urgent" in row["detail"]]


def order(store: Store) -> list[int]:
    """Images in the order in which a worker would take them."""
    taken = []
    while (job := store.queue.claim_job("test", 60)) is not None:
        taken.append(job.instance_id)
    return taken


@pytest.mark.parametrize("term", ["STAT", "HIGH", "stat ", " High"])
def test_a_sender_that_says_stat_or_high_is_heard(store: Store, term: str) -> None:
    stored = take(store, with_priority(term))
    told = why(store, stored.study_id)
    assert told
    assert (told.origin, told.actor, told.term) == ("sender", "CR_ROOM1", term.strip().upper())
    assert kept(store, stored.instance_id) == told.term
    assert [(item["actor"], item["detail"]["origin"], item["detail"]["term"]) for item in entries(store, stored.study_id)] == [
        ("CR_ROOM1", "sender", told.term)
    ]
    assert {row["priority"] for row in store.database.query("SELECT priority FROM jobs")} == {1}


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_it_is_heard_in_any_encoding(store: Store, syntax: str) -> None:
    made = dataset(transfer_syntax_uid=syntax, RequestedProcedurePriority="STAT")
    assert why(store, take(store, encode(made)).study_id)


@pytest.mark.parametrize("term", ["ROUTINE", "MEDIUM", "LOW"])
def test_what_is_not_urgent_is_kept_as_such(store: Store, term: str) -> None:
    stored = take(store, with_priority(term))
    assert (why(store, stored.study_id), kept(store, stored.instance_id)) == (None, term)
    assert entries(store, stored.study_id) == []


NESTED = Dataset()
NESTED.RequestedProcedurePriority = "STAT"


@pytest.mark.parametrize(
    ("value", "representation"),
    [
        ("", "SH"), ("STAT\\ROUTINE", "SH"), ("STATIM", "SH"), ("STAT; DROP TABLE jobs", "LT"), ("S" * 100_000, "UT"),
        (b"\xff\xfe\x00STAT", "UN"), (b"", "UN"), (b"STAT" * 40, "OB"), (7, "US"), (1.5, "FD"), ([NESTED], "SQ"), ([], "SQ"),
    ],
)  # fmt: skip
def test_an_odd_value_is_not_urgent_and_refuses_no_image(store: Store, value: object, representation: str) -> None:
    stored = take(store, with_priority(value, representation))
    assert stored.outcome == "stored"
    assert (why(store, stored.study_id), kept(store, stored.instance_id)) == (None, "")


def test_the_request_attributes_have_no_priority_in_the_standard(store: Store) -> None:
    """PS3.3 Table 10-9; what stands there all the same is nobody's word."""
    assert why(store, take(store, scan_bytes(RequestAttributesSequence=[NESTED])).study_id) is None


def test_an_image_that_says_stat_brings_forward_what_waits_of_its_study(store: Store) -> None:
    first, other = take(store, scan_bytes(StudyInstanceUID="1.2.3")), take(store, scan_bytes())
    revision = Worklist(store).revision()
    stat = take(store, with_priority("STAT", StudyInstanceUID="1.2.3"))
    later = take(store, scan_bytes(StudyInstanceUID="1.2.3"))
    assert stat.study_id == later.study_id == first.study_id
    assert [row.id for row in Worklist(store).page() if row.revision > revision] == [first.study_id]
    assert order(store) == [first.instance_id, stat.instance_id, later.instance_id, other.instance_id]
    assert [item["detail"]["urgent"] for item in entries(store, first.study_id)] == [1]  # said once, however many images say it


def test_a_sender_that_marks_everything_breaks_nothing_and_the_oldest_goes_first(store: Store) -> None:
    routine = take(store, scan_bytes())
    marked = [take(store, with_priority("STAT")) for _ in range(5)]
    again = take(store, with_priority("STAT", StudyInstanceUID="1.2.3"))
    assert store.queue.make_urgent(again.study_id, "doctor") == 0
    assert [item["actor"] for item in entries(store, again.study_id)] == ["CR_ROOM1"]
    assert store.queue.make_urgent(routine.study_id, "doctor") == 1  # among what is urgent the oldest is first
    assert order(store) == [item.instance_id for item in (routine, *marked, again)]
    store.database.verify_audit()


def test_the_same_image_again_changes_nothing(store: Store) -> None:
    data = with_priority("STAT")
    stored = take(store, data)
    revision = Worklist(store).revision()
    assert take(store, data).outcome == "duplicate"
    assert Worklist(store).revision() == revision
    assert len(entries(store, stored.study_id)) == 1


def test_who_asked_first_stays_on_record(store: Store) -> None:
    stored = take(store, scan_bytes(StudyInstanceUID="1.2.3"))
    assert store.queue.make_urgent(stored.study_id, "wang") == 1
    take(store, with_priority("STAT", StudyInstanceUID="1.2.3"))
    told = store.queue.urgency_of(stored.study_id)
    assert told
    assert (told.origin, told.actor, told.term) == ("person", "wang", "")
    assert [item["actor"] for item in entries(store, stored.study_id)] == ["wang"]
    assert store.queue.study_progress(stored.study_id) == "waits"


def test_an_urgent_job_that_failed_is_urgent_when_it_is_tried_again(store: Store) -> None:
    stored, other = take(store, with_priority("STAT")), take(store, scan_bytes())
    for _ in range(store.settings.job_max_attempts):
        job = store.queue.claim_job("test", 60)
        assert job
        assert job.instance_id == stored.instance_id
        store.queue.fail_job(job, Note("job.error"))
    assert store.queue.study_progress(stored.study_id) == "unread"
    assert store.queue.retry(stored.instance_id, "wang")
    assert order(store) == [stored.instance_id, other.instance_id]


def test_a_study_that_is_not_here_cannot_be_urgent(store: Store) -> None:
    with pytest.raises(StoreError, match=r"store\.missing"):
        store.queue.make_urgent(17, "doctor")
    with pytest.raises(StoreError, match=r"store\.missing"):
        store.queue.make_routine(17, "doctor")
    assert store.queue.urgency_of(17) is None


def test_the_mark_can_be_taken_back_and_what_waits_waits_in_its_turn(store: Store) -> None:
    routine, stat = take(store, scan_bytes()), take(store, with_priority("STAT", StudyInstanceUID="1.2.3"))
    revision = Worklist(store).revision()
    assert store.queue.make_routine(stat.study_id, "wang") == 1
    assert store.queue.make_routine(stat.study_id, "wang") is None
    assert why(store, stat.study_id) is None
    assert [row.id for row in Worklist(store).page() if row.revision > revision] == [stat.study_id]
    rows = [json.loads(row["entry"]) for row in store.database.query("SELECT entry FROM audit ORDER BY seq")]
    taken_back = [(row["actor"], row["object"], row["detail"]) for row in rows if "not_urgent" in row["detail"]]
    assert taken_back == [("wang", f"study:{stat.study_id}", {"not_urgent": 1, "origin": "person"})]
    again = take(store, with_priority("STAT", StudyInstanceUID="1.2.3"))  # the machine says so with every image
    assert why(store, stat.study_id) is None
    assert order(store) == [routine.instance_id, stat.instance_id, again.instance_id]
    store.database.verify_audit()


def test_a_person_may_make_it_urgent_once_more(store: Store) -> None:
    routine, stat = take(store, scan_bytes()), take(store, with_priority("STAT", StudyInstanceUID="1.2.3"))
    store.queue.make_routine(stat.study_id, "wang")
    assert store.queue.make_urgent(stat.study_id, "li") == 1
    assert order(store) == [stat.instance_id, routine.instance_id]
    assert store.queue.make_routine(stat.study_id, "cli", "cli") == 1  # what is taken and has no result yet counts, as at the way in
    store.queue.make_urgent(stat.study_id, "li")
    told = why(store, stat.study_id)
    assert told
    assert (told.origin, told.actor) == ("person", "li")


def test_idle_series_of_urgent_studies_are_planned_alone(store: Store) -> None:
    door = Ingest(store)
    routine = door.accept(scan_bytes(), ROOM).stored
    stat = door.accept(with_priority("STAT"), ROOM).stored
    with store.database.transaction() as tx:
        tx.execute("UPDATE series SET last_received_at = last_received_at - 1000")
    assert store.planner.close_idle_series(urgent=True) == 1
    assert order(store) == [stat.instance_id]
    assert store.planner.close_idle_series() == 1
    assert order(store) == [routine.instance_id]


def test_what_was_urgent_before_this_was_written_down_is_urgent_still(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite3"
    raw = old_database(path, 3)
    for number in (1, 2):
        raw.execute(
            "INSERT INTO studies VALUES (?, ?, 'k', '', '', '', '', NULL, '', '', '', '', '2026-01-01T00:00:00.000+00:00', 0, 1)",
            (number, f"1.{number}"),
        )
        raw.execute("INSERT INTO series VALUES (?, ?, '1', 'CR', '', 0, 0)", (number, number))
        raw.execute(
            "INSERT INTO instances VALUES"
            " (?, ?, '1', '1', '1', ?, 1, 'CR', '', '', 1, 1, 1, NULL, 'cli', '', '', 0, 'queued', NULL, '[]', 0)",
            (number, number, str(number)),
        )
        raw.execute(
            "INSERT INTO jobs (kind, instance_id, model_digest, priority, state, created_at, notes)"
            " VALUES ('infer', ?, '', ?, 'done', '', '[]')",
            (number, number - 1),
        )
    raw.commit()
    raw.close()
    database = Database(path, b"key", TEST_KEY)
    told = [Urgency.of(row["urgent"]) for row in database.query("SELECT urgent FROM studies ORDER BY id")]
    assert told == [None, Urgency("cli", "cli", "")]  # nobody wrote down when
    database.close()
