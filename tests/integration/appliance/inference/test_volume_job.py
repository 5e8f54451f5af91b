"""One job per series: all of its images settle together, late ones are read too, and what is not analysed says why on every image."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from appliance.cli.analyze import analyse, print_table
from appliance.core.domain import Note, PictureForm, ScanState, Source
from appliance.core.errors import StoreError
from appliance.core.settings import Settings
from appliance.inference.worker import Worker
from appliance.ingest.ingest import Ingest
from appliance.lifecycle.trial_monitor import measure
from appliance.store.store import Store
from appliance.store.volume_results import VolumeResults
from appliance.store.worklist import Worklist
from model_sync.bundle import ModelBundle
from tests.support import series as made_up
from tests.support import volume_bundle, web_box
from tests.support.activated import activate
from tests.support.brightness_bundle import STEPS, brightness_model, write_bundle
from tests.support.scans import dataset, encode


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    onnx.checker.check_model(onnx.load_from_string(brightness_model()))
    return write_bundle(tmp_path_factory.mktemp("volume"))


@pytest.fixture
def store(tmp_path: Path, bundle: ModelBundle) -> Iterator[Store]:
    store = Store(Settings(data_dir=tmp_path / "box", tune_at_activation=False, disk_reserve_bytes=0))
    activate(store, bundle.directory, "test")
    yield store
    store.close()


def take(store: Store, made: list[Any]) -> list[int]:
    accepted = [Ingest(store).accept(encode(one), Source("cli", "test")).stored for one in made]
    store.planner.close_series(sorted({item.series_id for item in accepted}))
    return [item.instance_id for item in accepted]


def work(store: Store) -> None:
    worker = Worker(store, set_deadline=lambda _: None)
    while worker.run_once():
        pass


def states(store: Store) -> set[tuple[str, str | None]]:
    return {(row["state"], row["reason"]) for row in store.database.query("SELECT state, reason FROM instances")}


def test_series_is_one_job_whose_result_all_images_share(store: Store) -> None:
    take(store, made_up.slices(20, orientation=made_up.OBLIQUE))
    assert states(store) == {("queued", None)}
    assert [tuple(row) for row in store.database.query("SELECT kind, series_id FROM jobs")] == [("volume", 1)]
    job = store.queue.claim_job("somebody", 30)
    assert job is not None and states(store) == {("running", None)}
    store.queue.fail_job(job, Note("job.memory"))
    assert states(store) == {("queued", None)}
    work(store)
    assert states(store) == {("ai_ready", None)}
    (result,) = VolumeResults(store).of_study(1)
    assert {item.label for item in result.measurements} == {"white_matter", "grey_matter"}
    mask, geometry = VolumeResults(store).mask(result.job_id)
    centre = np.argwhere(mask == 1).mean(axis=0) @ np.array(geometry["affine"])[:3, :3].T + np.array(geometry["affine"])[:3, 3]
    assert np.allclose(centre, [18, -14, 10], atol=1.5)
    assert all(item.measured for item in Worklist(store).study(1).instances)


def test_failed_series_is_tried_again_from_any_of_its_images(store: Store) -> None:
    ids = take(store, made_up.slices())
    for _ in range(store.settings.job_max_attempts):
        job = store.queue.claim_job("somebody", 30)
        assert job is not None
        store.queue.fail_job(job, Note("job.error"))
    assert {state for state, _reason in states(store)} == {"failed"}
    assert store.queue.retry(ids[7], "doctor")
    assert {state for state, _reason in states(store)} == {"queued"}
    assert not store.queue.retry(ids[0], "doctor")
    work(store)
    assert states(store) == {("ai_ready", None)}


def test_worklist_tells_millilitres_and_never_nothing_above_threshold(store: Store) -> None:
    take(store, made_up.slices())
    work(store)
    (row,) = Worklist(store).page()
    assert row.state is ScanState.AI_READY and not row.positive and not row.scored
    assert [(zh, en) for zh, en, _ml in row.measured] == [("白质", "White matter"), ("灰质", "Grey matter")]


def test_missing_slice_is_said_on_every_image(store: Store) -> None:
    made = made_up.slices()
    take(store, made[:9] + made[10:])
    work(store)
    ((state, reason),) = states(store)
    assert state == "not_analysed" and json.loads(str(reason))["code"] == "volume.missing_slices"
    assert VolumeResults(store).of_study(1) == []
    (row,) = Worklist(store).page()
    assert row.state is ScanState.NOT_ANALYSED and not row.measured


def test_slice_that_comes_late_has_the_series_read_again(store: Store) -> None:
    made = made_up.slices()
    take(store, made[:9] + made[10:])
    work(store)
    take(store, [made[9]])
    assert states(store) == {("queued", None)} and len(store.database.query("SELECT 1 FROM jobs")) == 1
    work(store)
    assert states(store) == {("ai_ready", None)}
    assert VolumeResults(store).of_study(1)[0].slices == 20


def test_what_was_drawn_without_the_newest_slices_is_not_shown(store: Store) -> None:
    made = made_up.slices(24)
    take(store, made[:20])
    work(store)
    assert VolumeResults(store).of_study(1)[0].slices == 20
    late = take(store, made[20:])
    assert VolumeResults(store).of_study(1) == [] and Worklist(store).instance(late[0]).state is ScanState.QUEUED
    work(store)
    assert VolumeResults(store).of_study(1)[0].slices == 24


def test_series_of_a_slow_sender_is_waited_for_and_not_read_after_each_slice(store: Store) -> None:
    made, idle = made_up.slices(24), store.settings.series_idle_s

    def silent_for(seconds: float) -> int:
        with store.database.transaction() as tx:
            tx.execute("UPDATE series SET last_received_at = ?", (time.time() - seconds,))
        return store.planner.close_idle_series()

    for one in made[:12]:
        Ingest(store).accept(encode(one), Source("cli", "test"))
    assert silent_for(idle + 1) == 1
    work(store)
    for one in made[12:]:
        Ingest(store).accept(encode(one), Source("cli", "test"))
        assert silent_for(idle + 1) == 0
    assert silent_for(6 * idle + 1) == 1
    work(store)
    assert states(store) == {("ai_ready", None)} and VolumeResults(store).of_study(1)[0].slices == 24


def come(store: Store, made: list[Any], **changes: Any) -> None:
    """Images arrive, and nobody says that they are all."""
    for one in made:
        for name, value in changes.items():
            setattr(one, name, value)
        Ingest(store).accept(encode(one), Source("dimse", "MR1"))


def silent(store: Store, times: float = 1.1) -> None:
    """So many times ``series_idle_s`` have gone by since the last image."""
    with store.database.transaction() as tx:
        tx.execute("UPDATE series SET last_received_at = ?", (time.time() - times * store.settings.series_idle_s,))


def drawn(store: Store) -> list[int]:
    """The slices of every result that is shown."""
    return [item.slices for item in VolumeResults(store).of_study(1)]


def test_urgent_never_cuts_short_a_series_that_is_still_coming(store: Store) -> None:
    """Half a head has millilitres too, and they look like any other."""
    made = made_up.slices(20)
    for count in (8, 12, 16):
        come(store, made[count - 8 if count == 8 else count - 4 : count])
        store.queue.make_urgent(1, "doctor")
        work(store)
        assert store.database.query("SELECT 1 FROM jobs") == [] and states(store) == {("waiting", None)} and drawn(store) == []
    come(store, made[16:])
    take(store, made_up.slices(20))
    silent(store)
    assert store.planner.close_idle_series(urgent=True) == 1
    job = store.queue.claim_job("test", 60)
    assert job is not None and job.priority == 1
    assert [tuple(row) for row in store.database.query("SELECT series_id FROM jobs WHERE id = ?", job.id)] == [(1,)]
    store.queue.fail_job(job, Note("job.error"))
    work(store)
    assert drawn(store) == [20]


def test_series_of_a_sender_that_says_stat_is_read_whole_when_the_sender_is_done(store: Store) -> None:
    made = made_up.slices(20)
    come(store, made[:10], RequestedProcedurePriority="STAT")
    assert store.planner.close_idle_series(urgent=True) == 0
    work(store)
    assert drawn(store) == []
    come(store, made[10:], RequestedProcedurePriority="STAT")
    assert store.planner.close_series([1]) == 1
    work(store)
    assert drawn(store) == [20] and states(store) == {("ai_ready", None)}


def test_series_that_grows_shows_no_millilitres_of_its_part(store: Store) -> None:
    made = made_up.slices(20)
    take(store, made[:10])
    work(store)
    assert drawn(store) == [10]
    come(store, made[10:12])
    (row,) = Worklist(store).page()
    assert (row.state, row.measured, row.position, row.ran) == (ScanState.WAITING, (), None, ()) and drawn(store) == []
    assert states(store) == {("waiting", None)} and not Worklist(store).study(1).instances[0].measured
    store.queue.make_urgent(1, "doctor")  # it was planned once: what is in the queue of it is not taken either
    work(store)
    assert drawn(store) == []
    come(store, made[12:])
    silent(store, 6.1)
    assert store.planner.close_idle_series() == 1
    work(store)
    assert drawn(store) == [20] and states(store) == {("ai_ready", None)}


@pytest.mark.parametrize("at", [5, 30], ids=["between slices", "later"])
def test_images_that_come_while_their_series_is_read_are_not_taken_for_read(store: Store, at: int) -> None:
    made = made_up.slices(20)
    take(store, made[:19])
    assert work_until(store, at, lambda: come(store, made[19:])) == []
    assert states(store) == {("waiting", None)} and drawn(store) == []
    silent(store, 6.1)
    assert store.planner.close_idle_series() == 1
    work(store)
    assert drawn(store) == [20] and states(store) == {("ai_ready", None)}


def test_series_that_grows_into_one_that_no_model_may_read_is_not_read_as_it_was(store: Store) -> None:
    made = made_up.slices(20)
    made[19].BodyPartExamined = "KNEE"
    take(store, made[:19])
    work(store)
    take(store, made[19:])
    work(store)
    assert {(state, json.loads(str(reason))["code"]) for state, reason in states(store)} == {("out_of_scope", "volume.mixed_scope")}
    assert drawn(store) == []


def test_enhanced_image_is_a_series_of_its_own(store: Store) -> None:
    take(store, [made_up.enhanced(made_up.slices())])
    work(store)
    assert states(store) == {("ai_ready", None)} and VolumeResults(store).of_study(1)[0].slices == 20


def test_blank_series_is_rejected_for_its_quality(store: Store) -> None:
    made = made_up.slices()
    for one in made:
        one.PixelData = bytes(len(one.PixelData))
    take(store, made)
    work(store)
    ((state, reason),) = states(store)
    assert state == "quality_rejected" and json.loads(str(reason))["code"] == "quality.blank"


def test_series_out_of_scope_gets_checks_and_the_reason(store: Store) -> None:
    take(store, made_up.slices(BodyPartExamined="KNEE"))
    work(store)
    ((state, reason),) = states(store)
    assert state == "out_of_scope" and json.loads(str(reason))["code"] == "scope.body_part"
    assert {row["kind"] for row in store.database.query("SELECT kind FROM jobs")} == {"check"}


T1: dict[str, Any] = {"EchoTime": "3.1", "RepetitionTime": "7.25", "ScanningSequence": ["GR", "IR"]}


@pytest.fixture
def t1_store(tmp_path: Path) -> Iterator[Store]:
    """A box whose model says which sequences it was made for."""
    applies_to = volume_bundle.manifest_of({})["applies_to"] | {"sequence": volume_bundle.T1_SEQUENCE}
    store = Store(Settings(data_dir=tmp_path / "t1", tune_at_activation=False, disk_reserve_bytes=0))
    activate(store, write_bundle(tmp_path / "t1-bundle", applies_to=applies_to).directory, "test")
    yield store
    store.close()


def test_t1_is_read_and_flair_is_out_of_scope_with_the_reason(t1_store: Store) -> None:
    take(t1_store, made_up.slices(**T1))
    take(t1_store, made_up.slices(**T1 | {"EchoTime": "120", "RepetitionTime": "9000"}))
    take(t1_store, made_up.slices())
    work(t1_store)
    by_series = [
        {(row["state"], row["reason"] and json.loads(row["reason"])["code"]) for row in rows}
        for rows in (t1_store.database.query("SELECT state, reason FROM instances WHERE series_id = ?", number) for number in (1, 2, 3))
    ]
    assert by_series == [{("ai_ready", None)}, {("out_of_scope", "scope.sequence")}, {("out_of_scope", "scope.sequence_absent")}]
    assert "caution.sequence_unverified" not in t1_store.database.query("SELECT notes FROM jobs")[0]["notes"]


def test_model_that_names_no_sequence_says_that_it_was_not_checked(store: Store) -> None:
    take(store, made_up.slices())
    work(store)
    assert "caution.sequence_unverified" in store.database.query("SELECT notes FROM jobs")[0]["notes"]


def test_series_whose_images_disagree_is_not_read(store: Store) -> None:
    made = made_up.slices()
    made[4].BodyPartExamined = "KNEE"
    take(store, made)
    work(store)
    codes = {json.loads(str(reason))["code"] for _state, reason in states(store)}
    assert codes == {"volume.mixed_scope"} and VolumeResults(store).of_study(1) == []


def test_damaged_slice_leaves_the_series_unread(store: Store) -> None:
    ids = take(store, made_up.slices())
    name = store.database.query("SELECT content_sha256 FROM instances WHERE id = ?", ids[5])[0]["content_sha256"]
    path = store.settings.data_dir / "content" / name[:2] / name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    work(store)
    ((state, reason),) = states(store)
    assert state == "not_analysed" and json.loads(str(reason))["code"] == "store.tampered"


def test_new_version_reads_what_waited_for_the_one_before(store: Store, tmp_path: Path) -> None:
    take(store, made_up.slices())
    newer = write_bundle(tmp_path / "newer", "1.1.0")
    before = store.database.query("SELECT digest FROM models WHERE state = 'active'")[0]["digest"]
    activate(store, newer.directory, "test")
    with store.database.transaction() as tx:
        store.planner.hand_over(tx, before, newer.digest, Note("model.withdrawn"))
    assert [tuple(row) for row in store.database.query("SELECT model_digest, kind FROM jobs")] == [(newer.digest, "volume")]
    work(store)
    assert VolumeResults(store).of_study(1)[0].model_version == "1.1.0"


def test_model_taken_back_leaves_its_series_not_analysed_until_another_comes(store: Store, tmp_path: Path) -> None:
    take(store, made_up.slices())
    before = store.database.query("SELECT digest FROM models WHERE state = 'active'")[0]["digest"]
    with store.database.transaction() as tx:
        store.planner.hand_over(tx, before, None, Note("model.withdrawn"))
    ((state, reason),) = states(store)
    assert state == "not_analysed" and json.loads(str(reason))["code"] == "model.withdrawn"
    activate(store, write_bundle(tmp_path / "newer", "1.1.0").directory, "test")
    assert states(store) == {("waiting", None)}
    store.planner.close_series([1])
    work(store)
    assert states(store) == {("ai_ready", None)}


def test_trial_judges_a_window_not_the_whole_volume(store: Store, bundle: ModelBundle) -> None:
    """The self-test knows the time of one window; a volume of eight is no slower model."""
    take(store, made_up.slices(30, rows=36, columns=40))
    work(store)
    row = store.database.query("SELECT timing_ms FROM jobs")[0]
    timing = json.loads(row["timing_ms"])
    assert 0 < timing["window"] < timing["infer"] / 2
    assert measure(store.database, bundle.digest, bundle.manifest, 0).latency_ms == timing["window"]


def test_every_slice_and_every_window_begins_the_deadline_anew(store: Store) -> None:
    """A thousand compressed slices take longer than a deadline: it is one slice's."""
    take(store, made_up.slices(30, rows=36, columns=40))
    armed: list[float] = []
    assert Worker(store, set_deadline=armed.append).run_once()
    assert len(armed) > 2 * 30 + 8 + 2 and set(armed) == {store.settings.job_deadline_s, 0} and armed[-1] == 0 and armed.count(0) == 1


def test_every_frame_of_an_enhanced_image_begins_the_deadline_anew(store: Store) -> None:
    take(store, [made_up.enhanced(made_up.slices(30, rows=36, columns=40))])
    armed: list[float] = []
    assert Worker(store, set_deadline=armed.append).run_once() and states(store) == {("ai_ready", None)}
    assert len(armed) > 30 + 8 + 2


def work_until(store: Store, at: int, come: Callable[[], None]) -> list[str]:
    """Read what is queued; at the ``at``-th step something comes. Returns the kinds of the jobs in the order they were done."""
    steps: list[float] = []

    def step(seconds: float) -> None:
        steps.append(seconds)
        if len(steps) == at:
            come()

    worker = Worker(store, set_deadline=step)
    while worker.run_once():
        pass
    entries = [json.loads(row["entry"]) for row in store.database.query("SELECT entry FROM audit ORDER BY seq")]
    done = [int(entry["object"].removeprefix("job:")) for entry in entries if "outcome_state" in entry["detail"]]
    kinds = {
        row["id"]: f"{row['kind']} {row['series_id'] or ''}".strip() for row in store.database.query("SELECT id, kind, series_id FROM jobs")
    }
    return [kinds[number] for number in done]


@pytest.mark.parametrize("at", [5, 67], ids=["between slices", "between windows"])
def test_urgent_image_does_not_wait_for_a_whole_series(store: Store, at: int) -> None:
    take(store, made_up.slices(30, rows=36, columns=40))

    def come() -> None:
        take(store, [dataset()])
        assert store.queue.make_urgent(2, "doctor") == 1

    assert work_until(store, at, come) == ["check", "volume 1"]
    assert {row["state"] for row in store.database.query("SELECT state FROM jobs")} == {"done"}


def test_worker_that_is_to_stop_ends_the_series_without_what_is_urgent(store: Store) -> None:
    """As it ends any job at hand; a burst must not keep it from that."""
    take(store, made_up.slices(20))
    steps: list[float] = []

    def step(seconds: float) -> None:
        steps.append(seconds)
        if len(steps) == 5:
            take(store, [dataset(RequestedProcedurePriority="STAT"), dataset(RequestedProcedurePriority="STAT")])

    assert Worker(store, set_deadline=step, is_stopping=lambda: len(steps) > 5).run_once()
    rows = store.database.query("SELECT kind, state, attempts FROM jobs ORDER BY id")
    assert [tuple(row) for row in rows] == [("volume", "done", 1), ("check", "done", 1), ("check", "queued", 0)]


def test_series_whose_model_is_withdrawn_goes_back_at_once(store: Store) -> None:
    take(store, made_up.slices(20))
    model = store.models()[0]
    steps: list[float] = []
    worker: Worker

    def step(seconds: float) -> None:
        steps.append(seconds)
        if len(steps) == 5:
            worker.activator.journal.record_restrictions(model["name"], "9.0.0", {model["version"]: "x"})

    worker = Worker(store, set_deadline=step)
    assert worker.run_once()
    assert [tuple(row) for row in store.database.query("SELECT state, attempts, reason FROM jobs")] == [("queued", 0, None)]
    assert states(store) == {("queued", None)} and drawn(store) == [] and not worker.run_once()


def test_urgent_series_is_not_begun_within_another(store: Store) -> None:
    """Two volumes do not fit into one process: the urgent one is next, before what waited longer."""
    for _ in range(2):
        take(store, made_up.slices(30, rows=36, columns=40))

    def come() -> None:
        take(store, made_up.slices(30, rows=36, columns=40))
        assert store.queue.make_urgent(3, "doctor") == 1

    assert work_until(store, 67, come) == ["volume 1", "volume 3", "volume 2"]


def test_volume_that_memory_cannot_hold_with_its_classes_is_refused_at_once(store: Store, bundle: ModelBundle) -> None:
    take(store, made_up.slices(120, rows=300, columns=300, spacing=(2.0, 2.0), apart=2.0))
    small = store.settings.model_copy(update={"process_memory_max_bytes": 2**28})
    store.settings = small
    work(store)
    ((state, reason),) = states(store)
    assert state == "not_analysed" and json.loads(str(reason))["code"] == "volume.too_large"
    ((attempts, timing),) = (tuple(row) for row in store.database.query("SELECT attempts, timing_ms FROM jobs"))
    assert (attempts, set(json.loads(timing))) == (1, {"decode", "store", "total"})  # nothing was prepared


def test_tissue_outside_the_models_field_is_said_on_the_result(tmp_path: Path) -> None:
    cut = volume_bundle.volume_input(24, **STEPS)
    cut["pipeline"][-1] = {"step": "crop_pad", "depth": 24, "height": 24, "width": 24, "fill": 0.0, "align": "center"}
    store = Store(Settings(data_dir=tmp_path / "box", tune_at_activation=False, disk_reserve_bytes=0))
    activate(store, write_bundle(tmp_path / "bundle", input=cut).directory, "test")
    made = made_up.slices()
    take(store, made)
    work(store)
    notes = {item["code"]: item["detail"] for item in json.loads(store.database.query("SELECT notes FROM jobs")[0]["notes"])}
    (result,) = VolumeResults(store).of_study(1)
    whole = sum(int((one.pixel_array > 100).sum()) for one in made) * 3.0 * 3.0 * 2.5 / 1000
    measured = sum(item.value for item in result.measurements)
    assert 0 < measured < whole and float(notes["caution.cropped"].removesuffix(" ml")) == pytest.approx(whole - measured, rel=0.01)
    with web_box.in_process(store.settings) as box:
        assert "Tissue lies outside the field" in box.person(language="en").open("/studies/1")
        assert "部分组织在模型的视野之外" in box.person(language="zh", username="zh").open("/studies/1")
    store.close()


def test_missing_results_are_store_errors(store: Store) -> None:
    for look in (
        lambda: VolumeResults(store).mask(7),
        lambda: VolumeResults(store).picture(7, "axial"),
        lambda: VolumeResults(store).study_of(7),
    ):
        with pytest.raises(StoreError) as caught:
            look()
        assert caught.value.code == "store.missing"


def test_analyze_prints_the_millilitres_once(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "series"
    directory.mkdir()
    for number, one in enumerate(made_up.slices()):
        (directory / f"{number}.dcm").write_bytes(encode(one))
    results = analyse(store, [directory], PictureForm(), lambda _line: None)
    assert {item.status for item in results} == {"analysed"}
    value = results[0].to_json()["volumes"][0]
    assert [item["unit"] for item in value["measurements"]] == ["ml", "ml"] and value["slices"] == 20
    monkeypatch.setenv("LC_ALL", "C")
    print_table(results)
    said = capsys.readouterr().out
    assert said.count("White matter 2 ml, Grey matter") == 1 and "Not for sole diagnosis" in said
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    print_table(results)
    assert "白质 2 ml" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("language", "words"), [("en", ("White matter", "Not for sole diagnosis", "FP32")), ("zh", ("白质", "不得单独作为诊断依据", "FP32"))]
)
def test_study_page_shows_table_planes_and_warning(store: Store, language: str, words: tuple[str, ...]) -> None:
    take(store, made_up.slices())
    work(store)
    with web_box.in_process(store.settings) as box:
        doctor = box.person(language=language)
        page = doctor.open("/studies/1")
        assert all(word in page for word in words) and "brain-t1 1.0.0" in page
        assert page.count('<article class="finding volume"') == 1
        assert 'class="no-result"' not in page
        for plane in ("axial", "coronal", "sagittal"):
            answer = doctor.get(f"/api/volumes/1/{plane}.png")
            assert answer.status_code == 200 and answer.content.startswith(b"\x89PNG")
        assert doctor.get("/api/volumes/1/other.png").status_code == 404 and doctor.get("/api/volumes/9/axial.png").status_code == 404
        listed = doctor.open("/")
        assert words[0] in listed and "Nothing above threshold</span>" not in listed and "没有高于阈值" not in listed.split("legend")[0]


def test_study_page_says_not_analysed_and_why(store: Store) -> None:
    made = made_up.slices()
    take(store, made[:9] + made[10:])
    work(store)
    with web_box.in_process(store.settings) as box:
        page = box.person(language="en").open("/studies/1")
        assert "Slices are missing from the series" in page and 'class="no-result"' in page and "finding volume" not in page
