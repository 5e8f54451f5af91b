"""The alarm for shifted scores on a box: raised from findings, kept over restarts, reported, audited, acknowledged; nothing stops."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.cli.main import main
from appliance.lifecycle.activation import Activator
from appliance.lifecycle.exchange import box_report
from appliance.lifecycle.model_control import activate
from appliance.lifecycle.score_monitor import ScoreMonitors
from appliance.lifecycle.score_shift import ShiftEvidence
from appliance.store.database import Database
from appliance.store.score_alarms import ScoreAlarms
from appliance.store.store import Store
from model_sync.agent.report import BoxReport
from tests.bench.drift import AFTER, BEFORE, sample
from tests.support.activation_box import LINE, Box, watched
from tests.support.box_database import TEST_KEY
from tests.support.old_database import old_database


@pytest.fixture
def box(tmp_path: Path, store: Store) -> Iterator[Box]:
    made = Box(tmp_path, store)
    activate(store, watched(made.bundle("1.0.0"), max_score_drift=None), "test")  # the alarm alone, not the bound that rolls back
    yield made
    store.database.verify_audit()


class Findings:
    """Findings of the active model, each of a new study unless told otherwise, without the images' files."""

    def __init__(self, box: Box) -> None:
        self._box, self._rng = box, random.Random(11)
        box.scan()
        box.work(0.3)

    def add(self, scores: list[float], *, is_same_study: bool = False) -> None:
        digest = self._box.active()
        with self._box.store.database.transaction() as tx:
            for score in scores:
                tables = ("studies", "series", "instances", "jobs")
                numbers = {name: tx.execute(f"SELECT max(id) FROM {name}").fetchone()[0] for name in tables}  # noqa: S608
                for name in ("instances", "jobs") if is_same_study else numbers:
                    row = dict(tx.execute(f"SELECT * FROM {name} WHERE id = ?", (numbers[name],)).fetchone())  # noqa: S608
                    numbers[name] = row["id"] = numbers[name] + 1
                    row |= {key: f"{row[key]}{row['id']}" for key in row if key.endswith("_uid") or key in ("path", "file", "sha256")}
                    row |= {"study_id": numbers["studies"]} if name == "series" else {}
                    row |= {"series_id": numbers["series"]} if name == "instances" else {}
                    row |= {"instance_id": numbers["instances"], "model_digest": digest} if name == "jobs" else {}
                    Database.insert(tx, name, **row)
                finding = dict(tx.execute("SELECT * FROM findings ORDER BY id DESC LIMIT 1").fetchone())
                del finding["id"]
                finding |= {"job_id": numbers["jobs"], "instance_id": numbers["instances"], "score": score, "model_digest": digest}
                Database.insert(tx, "findings", **finding)

    def usual(self, count: int) -> None:
        self.add(sample(self._rng, BEFORE, count))

    def shifted(self, count: int) -> None:
        self.add(sample(self._rng, AFTER, count))


def alarms(box: Box) -> list[str]:
    return [alarm.note.detail for alarm in ScoreAlarms(box.store.database).active()]


def check(box: Box) -> int:
    """All looks that there are to take, by a worker that was started anew."""
    monitors = ScoreMonitors(box.store.database)
    return sum(monitors.check() for _ in range(8))


def audited(box: Box, key: str) -> list[dict[str, Any]]:
    rows = [json.loads(row["entry"]) for row in box.store.database.query("SELECT entry FROM audit ORDER BY seq")]
    return [entry for entry in rows if entry["detail"].get(key) == "scores.shifted"]


def test_r44_the_alarm_of_a_box_is_raised_reported_and_acknowledged(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    findings = Findings(box)
    findings.usual(200)
    assert check(box) == 0
    findings.shifted(50)
    before = box.last()
    activator = box.activator()
    changes = activator.journal.changes
    box.settle(activator)
    (detail,) = alarms(box)
    assert detail.startswith("pneumonia: median 0.")
    assert activator.journal.changes > changes  # a new report is written
    assert box.last() == before  # nothing is switched off
    assert box.active()
    (entry,) = audited(box, "code")
    assert (entry["actor"], entry["outcome"], entry["detail"]["measured"]) == ("worker", 4, detail)
    report = box_report(box.store)
    assert report["activations"][0]["at"] >= entry["at"]  # the fleet knows an event by its time
    assert BoxReport.parse(json.dumps(report).encode()).activations[0].code == "scores.shifted"

    data = ["--data-dir", str(box.store.settings.data_dir)]
    (box.store.settings.data_dir / "box.toml").write_text("web_port = 0\ndicom_port = 0\n")
    assert main(["models", "list", *data]) == 0
    assert detail in capsys.readouterr().out
    assert main(["models", "list", "--json", *data]) == 0
    (model,) = json.loads(capsys.readouterr().out)
    assert [(alarm["code"], alarm["label"]) for alarm in model["alarms"]] == [("scores.shifted", "pneumonia")]
    assert main(["models", "acknowledge", LINE, *data]) == 0
    assert "1" in capsys.readouterr().out
    assert main(["models", "acknowledge", *data]) == 2
    assert alarms(box) == []
    assert [entry["actor"] for entry in audited(box, "acknowledged")] == ["cli"]
    assert box_report(box.store)["activations"][0]["code"] is None
    findings.shifted(100)  # acknowledged: it is usual now
    assert check(box) == 0


def test_a_restart_loses_no_evidence(box: Box) -> None:
    findings = Findings(box)
    findings.usual(200)
    check(box)
    raised = 0
    for _ in range(50):
        findings.shifted(1)
        raised += check(box)  # a new worker each time
    assert raised == 1


def test_one_image_of_a_study_counts(box: Box) -> None:
    findings = Findings(box)
    findings.usual(200)
    findings.shifted(1)
    findings.add([0.9] * 100, is_same_study=True)
    assert check(box) == 0
    row = box.store.database.one("SELECT * FROM score_monitors")
    assert row
    assert (row["studies"], len(json.loads(row["evidence"])["history"])) == (202, 202)
    assert row["last_finding"] == box.store.database.number("SELECT max(id) FROM findings")


def test_another_version_has_scores_of_its_own(box: Box) -> None:
    findings = Findings(box)
    findings.usual(200)
    check(box)
    activate(box.store, watched(box.bundle("1.1.0"), max_score_drift=None), "test")
    box.scan("new")
    box.work(0.5)
    findings.shifted(40)
    assert check(box) == 0
    assert box.store.database.number("SELECT count(*) FROM score_monitors") == 2


@pytest.mark.parametrize("stored", ["{", "[]", '{"history": [2, 1], "own": [], "against_reference": []}', '{"history": [1e999]}'])
def test_evidence_that_cannot_be_read_begins_anew(box: Box, stored: str) -> None:
    findings = Findings(box)
    findings.usual(20)
    check(box)
    with box.store.database.transaction() as tx:
        tx.execute("UPDATE score_monitors SET evidence = ?", (stored,))
    findings.usual(5)
    assert check(box) == 0
    row = box.store.database.one("SELECT evidence FROM score_monitors")
    assert row
    assert len(json.loads(row["evidence"])["history"]) == 5


def test_an_alarm_that_cannot_be_read_is_an_alarm(box: Box) -> None:
    Findings(box).usual(3)
    check(box)
    with box.store.database.transaction() as tx:
        tx.execute("UPDATE score_monitors SET alarm = '['")
    assert [alarm.note.code for alarm in ScoreAlarms(box.store.database).active()] == ["scores.shifted"]
    assert ScoreAlarms(box.store.database).acknowledge(LINE, "admin") == 1
    assert ScoreAlarms(box.store.database).acknowledge(LINE, "admin") == 0


def test_an_old_database_gets_the_table(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite3"
    connection = old_database(path, 8)
    connection.commit()
    connection.close()
    database = Database(path, b"k" * 32, TEST_KEY)
    assert ScoreAlarms(database).active() == []
    database.close()


def test_the_evidence_of_the_store_is_that_of_the_test(box: Box) -> None:
    """Read back, evidence is what was stored, to the last bit."""
    findings = Findings(box)
    findings.usual(30)
    check(box)
    rows = box.store.database.query("SELECT score FROM findings ORDER BY id")
    expected = ShiftEvidence()
    for row in rows:
        expected.add(row["score"], None)
    stored = box.store.database.one("SELECT evidence FROM score_monitors")
    assert stored
    assert json.loads(stored["evidence"])["own"] == list(expected.own)


def test_the_activator_looks_by_itself(box: Box) -> None:
    findings = Findings(box)
    findings.usual(100)
    activator: Activator = box.activator()
    box.step_until(activator, lambda: box.store.database.number("SELECT sum(studies) FROM score_monitors") == 101)
