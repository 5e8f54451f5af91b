"""From an image that the input check stops to a person's decision and the result: real worker, real store, real pages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from appliance.core.correction import Correction
from appliance.core.domain import Note, ScanState
from appliance.core.errors import ActivationError
from appliance.core.settings import Settings
from appliance.inference.worker import Worker
from appliance.lifecycle import model_control
from appliance.store.store import Store
from appliance.store.worklist import InstanceView, Worklist
from tests.support import web_box
from tests.support.activated import activate
from tests.support.input_check_bundle import checked_bundle, film
from tests.support.scans import encode
from tests.support.worker_box import prepared_worker, take


def working(store: Store, directory: Path) -> Worker:
    """A worker whose model has an input check."""
    activate(store, checked_bundle(directory))
    return prepared_worker(store)


def analyse(store: Store, worker: Worker, instance_id: int) -> InstanceView:
    """Run what is queued; the image as the pages show it."""
    while worker.run_once():
        pass
    return Worklist(store).instance(instance_id)


def decisions(store: Store) -> list[tuple[str, str]]:
    """Who decided what, from the audit."""
    entries = [json.loads(row["entry"]) for row in store.database.query("SELECT entry FROM audit ORDER BY seq")]
    return [(entry["actor"], entry["detail"]["correction"]) for entry in entries if "correction" in entry["detail"]]


@pytest.mark.parametrize(
    ("turns", "negative", "reason", "correction"),
    [
        (1, False, Note("quality.turned", "90"), Correction(270, False, True)),
        (2, False, Note("quality.turned", "180"), Correction(180, False, True)),
        (3, False, Note("quality.turned", "270"), Correction(90, False, True)),
        (0, True, Note("quality.negative"), Correction(0, True, True)),
    ],
)
def test_what_is_doubted_is_stopped_until_a_person_decides(
    store: Store, tmp_path: Path, turns: int, negative: bool, reason: Note, correction: Correction
) -> None:
    worker = working(store, tmp_path)
    upright = analyse(store, worker, take(store, encode(film(seed=2))))
    assert upright.state is ScanState.AI_READY
    stopped = analyse(store, worker, take(store, encode(film(turns=turns, negative=negative, seed=2))))
    assert (stopped.state, stopped.reason, stopped.findings) == (ScanState.QUALITY_REJECTED, reason, ())
    assert store.queue.analyse_corrected(stopped.id, correction, "doctor")
    corrected = analyse(store, worker, stopped.id)
    assert corrected.state is ScanState.AI_READY
    assert corrected.findings[0].score == pytest.approx(upright.findings[0].score, abs=1e-5)
    codes = {note.code for note in corrected.jobs[0].notes}
    assert {"caution.turned_by_person" if turns else "caution.inverted_by_person"} == {code for code in codes if "person" in code}
    assert "caution.input_doubted" not in codes
    assert decisions(store) == [("doctor", correction.to_text())]


def test_the_outline_lies_on_the_pixels_of_the_file(store: Store, tmp_path: Path) -> None:
    worker = working(store, tmp_path)
    upright = analyse(store, worker, take(store, encode(film(seed=3))))
    stopped = analyse(store, worker, take(store, encode(film(turns=1, seed=3))))
    store.queue.analyse_corrected(stopped.id, Correction(270, False, True), "doctor")
    corrected = analyse(store, worker, stopped.id)
    assert upright.findings[0].peak and corrected.findings[0].peak
    x, y = upright.findings[0].peak
    assert corrected.findings[0].peak == pytest.approx((256 - y, x), abs=1)  # the file is turned clockwise by a quarter


def test_a_header_that_turns_wrongly_is_stopped_and_the_correction_comes_on_top(store: Store, tmp_path: Path) -> None:
    """Patient Orientation says that the film lies on its side, and it does not."""
    worker = working(store, tmp_path)
    upright = analyse(store, worker, take(store, encode(film(seed=4))))
    stopped = analyse(store, worker, take(store, encode(film(seed=5, PatientOrientation=["F", "R"]))))
    assert stopped.reason is not None
    assert stopped.reason.code == "quality.turned"
    back = (-int(stopped.reason.detail)) % 360
    store.queue.analyse_corrected(stopped.id, Correction(back, False, True), "doctor")
    corrected = analyse(store, worker, stopped.id)
    assert corrected.state is ScanState.AI_READY
    assert upright.state is ScanState.AI_READY


@pytest.mark.parametrize(("turns", "directions"), [(1, ["F", "R"]), (3, ["H", "L"])])
def test_a_header_that_names_the_other_side_is_turned_by_the_picture(
    store: Store, tmp_path: Path, turns: int, directions: list[str]
) -> None:
    """The film lies on its side as the header says, but on the other one: the correct values are H\\L and F\\R."""
    worker = working(store, tmp_path)
    upright = analyse(store, worker, take(store, encode(film(seed=6))))
    reversed_header = film(turns=turns, seed=6, PatientOrientation=directions)
    analysed = analyse(store, worker, take(store, encode(reversed_header)))
    assert analysed.state is ScanState.AI_READY
    assert analysed.findings[0].score == pytest.approx(upright.findings[0].score, abs=1e-5)
    assert Note("caution.orientation_reversed") in analysed.jobs[0].notes
    assert analysed.correction.to_text() == "header_reversed"
    x, y = upright.findings[0].peak or (0.0, 0.0)
    assert analysed.findings[0].peak == pytest.approx((256 - y, x) if turns == 1 else (y, 256 - x), abs=1)


def test_an_image_can_be_analysed_as_it_is_with_a_caution(store: Store, tmp_path: Path) -> None:
    worker = working(store, tmp_path)
    stopped = analyse(store, worker, take(store, encode(film(turns=2))))
    store.queue.analyse_corrected(stopped.id, Correction.parse("as_is"), "doctor")
    analysed = analyse(store, worker, stopped.id)
    assert analysed.state is ScanState.AI_READY
    assert Note("caution.input_doubted") in analysed.jobs[0].notes


def test_nobody_can_have_a_blank_image_analysed(store: Store, tmp_path: Path) -> None:
    worker = working(store, tmp_path)
    blank = film()
    blank.PixelData = np.zeros((256, 256), np.uint16).tobytes()
    stopped = analyse(store, worker, take(store, encode(blank)))
    assert stopped.reason == Note("quality.blank")
    assert not store.queue.analyse_corrected(stopped.id, Correction.parse("as_is"), "doctor")
    assert decisions(store) == []


def test_a_model_whose_check_stops_its_golden_cases_is_not_activated(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ActivationError, match="the input check stops the golden case") as caught:
        model_control.activate(store, checked_bundle(tmp_path, upright=-1e6), "test")
    assert caught.value.code == "model.self_test"


def test_a_doctor_decides_on_the_page(settings: Settings, tmp_path: Path) -> None:
    with web_box.in_process(settings) as box:
        worker = working(box.store, tmp_path)
        stopped = analyse(box.store, worker, take(box.store, encode(film(turns=1))))
        study = Worklist(box.store).study_of(stopped.id)
        doctor = box.person()
        page = doctor.open(f"/studies/{study}")
        assert "clockwise by 90°" in page
        assert 'value="turn_270"' in page and 'value="as_is"' in page
        shown = doctor.get(f"{box.base}/api/instances/{stopped.id}/frames/0").content
        for bad in ("", "turn_45", "mirror"):
            answer = doctor.post(f"/studies/{study}/images/{stopped.id}/analyse", data={"correction": bad})
            assert answer.status_code == 400
        assert doctor.post(f"/studies/{study + 1}/images/{stopped.id}/analyse", data={"correction": "as_is"}).status_code == 404
        assert doctor.post(f"/studies/{study}/images/{stopped.id}/analyse", data={"correction": "turn_270"}).status_code == 302
        assert analyse(box.store, worker, stopped.id).state is ScanState.AI_READY
        page = doctor.open(f"/studies/{study}")
        assert "A person had the image turned before the analysis" in page
        assert "turn_270" not in page
        turned = doctor.get(f"{box.base}/api/instances/{stopped.id}/frames/0").content
        side = int(len(shown) ** 0.5 / 2**0.5)
        before, after = (np.frombuffer(raw, "<u2").reshape(side, side) for raw in (shown, turned))
        assert (np.rot90(before) == after).all()
        assert "turned before the analysis" not in doctor.speak("zh").open(f"/studies/{study}")
        assert (
            box.person("tech", "technician").post(f"/studies/{study}/images/{stopped.id}/analyse", data={"correction": "as_is"}).status_code
            == 403
        )


def test_a_decision_is_taken_back_after_the_result(settings: Settings, tmp_path: Path) -> None:
    """The image is analysed again as it came; the earlier result is shown and counted nowhere."""
    with web_box.in_process(settings) as box:
        worker = working(box.store, tmp_path)
        image = analyse(box.store, worker, take(box.store, encode(film(turns=1))))
        study = Worklist(box.store).study_of(image.id)
        assert box.store.queue.analyse_corrected(image.id, Correction(270, False, True), "li")
        first = analyse(box.store, worker, image.id)
        assert first.state is ScanState.AI_READY
        doctor, path = box.person(), f"/studies/{study}/images/{image.id}/take-back"
        assert path in doctor.open(f"/studies/{study}")
        assert doctor.post(f"/studies/{study + 1}/images/{image.id}/take-back").status_code == 404
        assert doctor.post(path).status_code == 302
        waiting = Worklist(box.store).instance(image.id)
        assert (waiting.findings, waiting.correction.is_confirmed, len(waiting.superseded)) == ((), False, 1)

        again = analyse(box.store, worker, image.id)
        assert (again.state, again.reason, again.findings) == (ScanState.QUALITY_REJECTED, Note("quality.turned", "90"), ())
        assert not [note for job in again.jobs for note in job.notes if "person" in note.code]
        page = doctor.open(f"/studies/{study}")
        for words in ("Earlier results: they do not count any more", "Taken back", 'value="turn_270"', "clockwise by 270°"):
            assert words in page
        assert path not in page
        (row,) = Worklist(box.store).page()
        assert row.state is ScanState.QUALITY_REJECTED
        assert doctor.get(f"{box.base}/api/findings/{first.findings[0].id}/heatmap.png").status_code == 404
        chinese = doctor.speak("zh").open(f"/studies/{study}")
        assert "以前的结果（已作废）" in chinese

        assert box.store.queue.analyse_corrected(image.id, Correction(270, False, True), "li")
        second = analyse(box.store, worker, image.id)
        assert [finding.score for finding in second.findings] == [finding.score for finding in first.findings]
        assert not {finding.id for finding in second.findings} & {finding.id for finding in first.findings}  # an id is never used again
        assert [entry[1] for entry in decisions(box.store)] == ["turn_270", "", "turn_270"]
        assert box.person("tech", "technician").post(path).status_code == 403
        box.store.database.verify_audit()


def test_where_nobody_decided_or_it_is_being_analysed_nothing_is_taken_back(store: Store, tmp_path: Path) -> None:
    worker = working(store, tmp_path)
    upright = analyse(store, worker, take(store, encode(film(seed=2))))
    assert not store.queue.take_back_decision(upright.id, "doctor")
    assert not store.queue.take_back_decision(upright.id + 99, "doctor")
    assert Worklist(store).instance(upright.id).findings == upright.findings
    stopped = analyse(store, worker, take(store, encode(film(turns=1, seed=2))))
    assert not store.queue.take_back_decision(stopped.id, "doctor")
    assert store.queue.analyse_corrected(stopped.id, Correction(270, False, True), "doctor")
    assert store.queue.claim_job("test", 60) is not None
    assert not store.queue.take_back_decision(stopped.id, "doctor")
    assert Worklist(store).instance(stopped.id).correction == Correction(270, False, True)


def test_a_decision_is_taken_back_while_the_image_still_waits(store: Store, tmp_path: Path) -> None:
    worker = working(store, tmp_path)
    stopped = analyse(store, worker, take(store, encode(film(turns=1))))
    assert store.queue.analyse_corrected(stopped.id, Correction(270, False, True), "doctor")
    assert store.queue.take_back_decision(stopped.id, "doctor")
    again = analyse(store, worker, stopped.id)
    assert (again.state, again.superseded) == (ScanState.QUALITY_REJECTED, ())
