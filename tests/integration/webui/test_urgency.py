"""STAT by the doors that people have: the button on worklist and study page, the same for scripts, and what is told of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from appliance.cli.main import main
from appliance.core.domain import JobResult, Note, ScanState, Source
from appliance.core.settings import Settings
from appliance.ingest.ingest import Ingest
from tests.support.scans import scan_bytes
from tests.support.web_box import HOSTILE, Box, Person, in_process, result, row, words

BUTTON = re.compile(r'<button class="first" form="read-first" formaction="(/studies/\d+/urgent)"')
UNDO = re.compile(r'<button class="not-first" form="read-first" formaction="(/studies/\d+/routine)"')


@pytest.fixture
def box(settings: Settings) -> Iterator[Box]:
    with in_process(settings) as running:
        running.activate()
        yield running


def line(person: Person, study: int) -> str:
    """The HTML of one line of the worklist."""
    found = re.search(rf'<tr id="study-{study}".*?</tr>', person.get("/").text, re.DOTALL)
    assert found
    return found[0]


def audited(box: Box) -> list[tuple[str, dict[str, Any]]]:
    """Who made what urgent."""
    rows = [json.loads(item["entry"]) for item in box.store.database.query("SELECT entry FROM audit ORDER BY seq")]
    return [(item["actor"], item["detail"]) for item in rows if "urgent" in item["detail"]]


@pytest.mark.parametrize(
    ("language", "press", "badge", "done", "again"),
    [
        ("en", "Analyse first", "Urgent", "will be analysed first", "is already being analysed first"),
        ("zh", "优先分析", "加急", "该检查将优先分析", "已在优先分析中"),
    ],
)
def test_the_button_of_the_study_page(box: Box, language: str, press: str, badge: str, done: str, again: str) -> None:
    before, study = box.take(scan_bytes()), box.take(scan_bytes()).study_id
    person = box.person("wang", language=language)
    page = person.open(f"/studies/{study}")
    assert BUTTON.findall(page) == [f"/studies/{study}/urgent"]
    assert press in words(page)
    assert badge not in row(person, study)
    answer = person.post(f"/studies/{study}/urgent")
    assert (answer.status_code, answer.headers["Location"]) == (302, f"/studies/{study}")
    page = person.open(f"/studies/{study}")
    assert not BUTTON.findall(page)
    said = words(page)
    assert done in said
    assert badge in said
    assert "wang" in said.split(badge)[1]
    assert badge in row(person, study)
    assert 'data-urgent="1"' in line(person, study)
    assert audited(box) == [("wang", {"urgent": 1, "origin": "person"})]
    person.post(f"/studies/{study}/urgent")
    assert again in words(person.open(f"/studies/{study}"))
    assert len(audited(box)) == 1
    job = box.store.queue.claim_job("test", 60)
    assert job
    assert box.store.database.query("SELECT id FROM instances WHERE id = ?", job.instance_id)[0]["id"] != before.instance_id


def test_the_button_of_the_worklist_comes_back_to_where_it_was_pressed(box: Box) -> None:
    studies = [box.take(scan_bytes(PatientName="Li^Hua")).study_id for _ in range(2)]
    person = box.person()
    person.open("/")
    assert BUTTON.findall(person.get("/").text) == [f"/studies/{study}/urgent" for study in reversed(studies)]
    assert ", Li Hua" in row(person, studies[0])  # whose button it is, for who cannot see the line
    assert re.search(r'<form id="read-first" method="post".*?name="csrf_token"', person.get("/").text, re.DOTALL)
    answer = person.post(f"/studies/{studies[0]}/urgent", data={"back": "worklist", "q": "", "before": ""})
    assert (answer.status_code, answer.headers["Location"]) == (302, "/")
    assert "will be analysed first" in words(person.get("/").text)
    assert BUTTON.findall(person.get("/").text) == [f"/studies/{studies[1]}/urgent"]
    assert "no. 1" in row(person, studies[0])
    answer = person.post(f"/studies/{studies[1]}/urgent", data={"back": "worklist", "before": "7"})
    assert answer.headers["Location"] == "/?before=7"
    fields = {"back": "worklist", "q": "Li", "before": "3"}
    answer = person.post(f"/studies/{studies[1]}/urgent", data=fields)
    assert (answer.status_code, answer.headers["Location"]) == (307, "/")  # the browser asks again by POST, with the same fields
    assert "is already being analysed first" in words(person.post("/", data=fields).text)


def test_the_lines_do_not_change_by_being_fetched_again(box: Box) -> None:
    """The page replaces what differs: a token within a line would have it replaced under somebody's finger."""
    study = box.take(scan_bytes()).study_id
    person = box.person()
    assert line(person, study) == line(person, study)
    assert "csrf_token" not in line(person, study)
    fragment = person.get(f"/studies/{study}", headers={"X-Fragment": "1"}).text
    assert BUTTON.findall(fragment)
    assert "csrf_token" not in fragment


def test_what_is_read_has_no_button_and_says_that_nothing_waits(box: Box) -> None:
    study = box.take(scan_bytes(StudyInstanceUID="1.2.3")).study_id
    person = box.person()
    person.open(f"/studies/{study}")
    box.work(result())
    assert not BUTTON.findall(person.get(f"/studies/{study}").text)
    assert not BUTTON.findall(person.get("/").text)
    person.post(f"/studies/{study}/urgent")  # from a page that was open before
    assert "Already analysed: nothing of this study waits any more" in words(person.get(f"/studies/{study}").text)
    assert audited(box) == [("doctor", {"urgent": 0, "origin": "person"})]
    box.take(scan_bytes())
    later = box.take(scan_bytes(StudyInstanceUID="1.2.3"))
    job = box.store.queue.claim_job("test", 60)
    assert job
    assert (job.instance_id, job.priority) == (later.instance_id, 1)


@pytest.mark.parametrize(
    ("state", "reason", "scan"),
    [
        ("failed", "job.deadline", {}), ("not_analysed", "pixel.undecodable", {}), ("quality_rejected", "quality.blank", {}),
        ("out_of_scope", "scope.body_part", {"BodyPartExamined": "KNEE", "ViewPosition": None}),
    ],
)  # fmt: skip
def test_what_was_not_analysed_is_never_called_read(box: Box, state: str, reason: str, scan: dict[str, Any]) -> None:
    study = box.take(scan_bytes(**scan)).study_id
    if state == "failed":
        box.fail(reason)
    else:
        box.work(JobResult(ScanState(state), Note(reason)))
    for number, language in enumerate(("en", "zh")):
        person = box.person(f"doctor{number}", language=language)
        told = person.post(f"/api/v1/studies/{study}/urgent").json()
        assert (told["outcome"], told["jobs"]) == ("nothing_waits", 0)
        assert ("does not mean that it was analysed", "这不表示已完成分析")[number] in told["message"]
        person.post(f"/studies/{study}/urgent")
        said = words(person.open(f"/studies/{study}"))
        assert told["message"] in said
        assert "Already read" not in said
        assert "已分析完毕" not in said


def test_a_study_of_which_one_image_was_not_analysed_is_not_called_read(box: Box) -> None:
    study = box.take(scan_bytes(StudyInstanceUID="1.2.3")).study_id
    box.work(result())
    box.take(scan_bytes(StudyInstanceUID="1.2.3", BodyPartExamined="KNEE", ViewPosition=None))
    box.work(JobResult(ScanState.OUT_OF_SCOPE, Note("scope.body_part")))
    assert box.person().post(f"/api/v1/studies/{study}/urgent").json()["outcome"] == "nothing_waits"


@pytest.mark.parametrize(
    ("language", "press", "done", "not_done"),
    [
        ("en", "No longer first", "This study is no longer analysed first.", "was not to be analysed first"),
        ("zh", "取消优先", "该检查不再优先分析。", "该检查原本未设为优先。"),
    ],
)
def test_the_button_that_takes_it_back(box: Box, language: str, press: str, done: str, not_done: str) -> None:
    before, study = box.take(scan_bytes()), box.take(scan_bytes()).study_id
    person = box.person("wang", language=language)
    assert press not in words(person.open(f"/studies/{study}"))
    person.post(f"/studies/{study}/urgent")
    for page in (person.open(f"/studies/{study}"), line(person, study)):
        assert UNDO.findall(page) == [f"/studies/{study}/routine"]
        assert press in words(page)
    answer = person.post(f"/studies/{study}/routine", data={"back": "worklist", "before": "7"})
    assert (answer.status_code, answer.headers["Location"]) == (302, "/?before=7")
    page = person.open(f"/studies/{study}")
    assert done in words(page)
    assert BUTTON.findall(page) == [f"/studies/{study}/urgent"]
    assert not UNDO.findall(page)
    assert 'data-urgent="0"' in line(person, study)
    person.post(f"/studies/{study}/routine")
    assert not_done in words(person.open(f"/studies/{study}"))
    job = box.store.queue.claim_job("test", 60)
    assert job
    assert (job.instance_id, job.priority) == (before.instance_id, 0)


def test_the_command_line_marks_and_takes_back(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    study = box.take(scan_bytes()).study_id

    def said(*options: str) -> str:
        assert main(["urgent", str(study), *options, "--data-dir", str(box.settings.data_dir)]) == 0
        return capsys.readouterr().out

    assert "1 will be analysed first" in said()
    assert "it is first already" in said()
    assert "1 no longer first" in said("--undo")
    assert box.store.queue.urgency_of(study) is None
    box.work(JobResult(ScanState.NOT_ANALYSED, Note("pixel.undecodable")))
    assert "nothing waits; that does not mean that it was analysed" in said()


def test_scripts_can_take_it_back(box: Box) -> None:
    study = box.take(scan_bytes()).study_id
    person = box.person("robot")
    person.post(f"/api/v1/studies/{study}/urgent")
    told = person.post(f"/api/v1/studies/{study}/routine").json()
    assert (told["outcome"], told["jobs"], told["urgent"]) == ("no_longer_first", 1, None)
    assert person.post(f"/api/v1/studies/{study}/routine").json()["outcome"] == "was_not_first"
    assert person.post("/api/v1/studies/999/routine").status_code == 404
    assert person.get(f"/api/v1/studies/{study}/routine").status_code == 405


def test_scripts_have_the_same_door(box: Box) -> None:
    study = box.take(scan_bytes()).study_id
    person = box.person("robot")
    answer = person.post(f"/api/v1/studies/{study}/urgent")
    assert answer.status_code == 200
    told = answer.json()
    assert (told["study"], told["outcome"], told["jobs"]) == (study, "first", 1)
    assert (told["urgent"]["origin"], told["urgent"]["actor"]) == ("person", "robot")
    assert told["message"] == "This study will be analysed first."
    assert person.post(f"/api/v1/studies/{study}/urgent").json() == told | {
        "outcome": "already_first", "jobs": 0, "message": "This study is already being analysed first.",
    }  # fmt: skip
    box.work(result())
    assert person.post(f"/api/v1/studies/{study}/urgent").json()["outcome"] == "already_read"
    assert len(audited(box)) == 1
    missing = person.post("/api/v1/studies/999/urgent")
    assert (missing.status_code, missing.json()["code"]) == (404, "store.missing")
    assert person.get(f"/api/v1/studies/{study}/urgent").status_code == 405


def test_neither_strangers_nor_technicians_nor_other_sites(box: Box) -> None:
    study = box.take(scan_bytes()).study_id
    for path in (f"{start}/{study}/{end}" for start in ("/studies", "/api/v1/studies") for end in ("urgent", "routine")):
        assert Person(box.base).post(path).status_code in (400, 401)
        person = box.person()
        person.token = ""
        assert person.post(path).status_code == 400
        assert box.person("tech", "technician").post(path).status_code == 403
        assert box.person("auditor", "auditor").post(path).status_code == 403
    assert audited(box) == []
    assert box.store.queue.urgency_of(study) is None


def test_an_open_page_notices_it(box: Box) -> None:
    study = box.take(scan_bytes()).study_id
    person = box.person()
    before = person.get("/api/v1/revision").json()["revision"]
    person.post(f"/api/v1/studies/{study}/urgent")
    assert person.get("/api/v1/revision", headers={"If-None-Match": f'"{before}"'}).json()["revision"] > before


@pytest.mark.parametrize(("language", "words_of"), [("en", "Marked STAT by its sender"), ("zh", "发送方已标明 STAT")])
def test_the_study_page_says_that_its_sender_wanted_it(box: Box, language: str, words_of: str) -> None:
    accepted = Ingest(box.store).accept(scan_bytes(RequestedProcedurePriority="STAT"), Source("dimse", HOSTILE))
    box.store.planner.close_series([accepted.stored.series_id])
    person = box.person(language=language)
    page = person.get(f"/studies/{accepted.stored.study_id}").text
    assert words_of in words(page)
    assert HOSTILE in words(page)
    assert "<script>alert" not in page
    assert not BUTTON.findall(page)


def test_the_study_page_says_that_it_was_asked_for_at_the_box_itself(box: Box) -> None:
    study = box.take(scan_bytes()).study_id
    box.store.queue.make_urgent(study, "cli", "cli")
    assert "Asked for on the box's command line" in words(box.person().get(f"/studies/{study}").text)
    with box.store.database.transaction() as tx:  # from before it was written down
        tx.execute("UPDATE studies SET urgent = json_set(urgent, '$.at', '') WHERE id = ?", (study,))
    assert "command line, time not recorded" in words(box.person("zhou").get(f"/studies/{study}").text)
    assert "时间未记录" in words(box.person("wu", language="zh").get(f"/studies/{study}").text)
    assert "由本机命令行设为加急" in words(box.person("li", language="zh").get(f"/studies/{study}").text)
