"""What a clinician reads: every state in its own words, scores with their threshold, hostile text as text."""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from appliance.core.applicable_accuracy import MIXED_AGES, Accuracy, AccuracyBasis
from appliance.core.domain import JobResult, Note, ScanState, Source
from appliance.core.settings import Settings
from appliance.store.worklist import Worklist
from model_sync.bundle import Group, Interval
from tests.bench.page import fill
from tests.support.scans import scan_bytes
from tests.support.web_box import HOSTILE, Box, in_process, result, row, words
from webui import formatting, messages


@pytest.fixture
def box(settings: Settings) -> Iterator[Box]:
    with in_process(settings) as running:
        yield running


def in_state(box: Box, state: ScanState) -> int:
    """A study whose only image is in a state."""
    stored = box.take(scan_bytes())
    if state == ScanState.AI_READY:
        box.work(result())
    elif state == ScanState.FAILED:
        box.fail("job.deadline")
    elif state == ScanState.RUNNING:
        box.store.queue.claim_job("test", 60)
    elif state != ScanState.QUEUED:
        code = {"quality_rejected": "quality.blank", "out_of_scope": "scope.view", "not_analysed": "pixel.corrupt"}.get(state.value)
        with box.store.database.transaction() as tx:  # signed and the like come with a later issue; their words are here already
            tx.execute("UPDATE jobs SET state = 'done' WHERE state = 'queued'")
            reason = f'{{"code": "{code}", "detail": ""}}' if code else None
            tx.execute("UPDATE instances SET state = ?, reason = ? WHERE id = ?", (state.value, reason, stored.instance_id))
    return int(stored.study_id)


def test_r37_every_state_differs_in_word_and_icon(box: Box) -> None:
    box.activate()
    seen: dict[str, set[str]] = {"zh": set(), "en": set(), "icon": set()}
    # What stays in the queue comes last: the next job done would be theirs.
    for state in sorted(ScanState, key=lambda item: (item == ScanState.QUEUED, item == ScanState.RUNNING)):
        study = in_state(box, state)
        for language in ("zh", "en"):
            person = box.person(language=language)
            line = re.search(rf'<tr id="study-{study}".*?</tr>', person.get("/").text, re.DOTALL)
            assert line
            chip = re.search(rf'<span class="chip [^"]*" data-state="{state.value}">.*?</span></span>', line[0], re.DOTALL)
            assert chip
            seen[language].add(words(chip[0]).split("·")[0].strip())
            seen["icon"].update(re.findall(r'd="([^"]+)"', chip[0]))
    assert {name: len(found) for name, found in seen.items()} == dict.fromkeys(seen, len(ScanState))


@pytest.mark.parametrize("state", [ScanState.QUALITY_REJECTED, ScanState.OUT_OF_SCOPE, ScanState.NOT_ANALYSED, ScanState.FAILED])
def test_not_analysed_never_looks_like_negative(box: Box, state: ScanState) -> None:
    box.activate()
    study = in_state(box, state)
    for language, none, result_word, normal in (
        ("zh", "无 AI 结果", "未达阈值", "不代表影像正常"),
        ("en", "no AI result", "Below the threshold", "says nothing about whether it is normal"),
    ):
        person = box.person(language=language)
        assert none in row(person, study)
        page = words(person.get(f"/studies/{study}").text)
        assert normal in page
        assert result_word not in page
        for part in ("Why", "What to do") if language == "en" else ("原因", "处理办法"):
            assert part in page
        assert ("Retry" if language == "en" else "重试") in page or state != ScanState.FAILED


def test_r38_a_finding_comes_with_all_that_it_rests_on(box: Box) -> None:
    box.activate()
    stored = box.take(scan_bytes())
    box.work(result(0.987, (Note("caution.age_outside", "64; 1-5"), Note("assume.view", "PA"))))
    said = {
        "en": (
            "Not for sole diagnosis", "Suggests pneumonia: please review", "All test images, of mixed ages",
            "0.987", "0.366", "95.2%", "95% CI 92.9% to 96.8%", "93.2%",
            "a set of pictures", "cxr-pneumonia 0.1.0", "abababababab", "onnxruntime 1.0 CPU", "FP32", "AI model 41 ms", "Total 1.2 s",
            "64 years; the model is for 1 to 5", "No view is stated; treated as frontal (PA)", "Demonstration and engineering only",
            "83 % of the training pictures",
        ),
        "zh": (
            "不得单独作为诊断依据", "肺炎", "提示肺炎可能，请复核", "全部测试影像（各年龄混合）", "a set of pictures （未翻译）",
            "0.987", "0.366", "95% 置信区间 92.9%～96.8%", "胸片肺炎（演示模型）",
            "64 岁；模型主要适用于 1～5 岁", "影像未注明体位，按正位处理", "不是医疗器械", "模型推理 41 ms",
        ),
    }  # fmt: skip
    for language, parts in said.items():
        person = box.person(language=language)
        page = words(person.get(f"/studies/{stored.study_id}").text)
        for part in parts:
            assert part in page, (language, part)
        assert ("Pneumonia" if language == "en" else "肺炎") + " 0.987" in row(person, stored.study_id)
    assert '<svg class="scale"' in box.person().get(f"/studies/{stored.study_id}").text


@pytest.mark.parametrize("language", ["zh", "en"])
def test_r29_accuracy_that_was_not_measured_with_these_weights_and_threshold_is_not_shown(box: Box, language: str) -> None:
    box.activate()
    made = result(0.987)
    unverified = replace(made, findings=tuple(replace(finding, has_verified_accuracy=False) for finding in made.findings))
    shown = {}
    for name, outcome, uid in (("verified", made, "1.2.3"), ("unverified", unverified, "1.2.4")):
        stored = box.take(scan_bytes(StudyInstanceUID=uid))
        box.work(outcome)
        shown[name] = words(box.person(language=language).get(f"/studies/{stored.study_id}").text)
    word = "not verified" if language == "en" else "未经核实"
    assert word not in shown["verified"]
    assert shown["unverified"].count(word) == 1
    for figure in ("95.2%", "93.2%", "96.5%", "96.3%"):  # of the headline, and of the largest source in the table
        assert figure in shown["verified"]
        assert figure not in shown["unverified"]
    assert "0.987" in shown["unverified"]
    assert word in words(box.person(language=language).get("/health").text)  # the version of this test has no gate record on the disk


def rate(value: float) -> Interval:
    return Interval(value=value, low=value - 0.02, high=value + 0.02)


CHILDREN = Group(
    population="child", min_years=1, max_years=5, sources=["Kermany 2018"], n_positive=407, n_negative=137, sensitivity=rate(0.961),
    specificity=rate(0.971),
)  # fmt: skip
ADULTS = Group(
    population="adult", min_years=18, max_years=120, sources=["NIH", "Hannover"], n_positive=92, n_negative=70, sensitivity=rate(0.871),
    specificity=rate(0.811),
)  # fmt: skip


@pytest.mark.parametrize(
    ("accuracy", "basis", "shown", "hidden"),
    [
        (
            Accuracy(basis=AccuracyBasis.GROUP, group=ADULTS, other_groups=[CHILDREN]), "group",
            {"en": ("Adults of 18 to 120 years", "87.1%", "81.1%", "92 / 70"), "zh": ("18–120 岁成人", "87.1%")}, ("95.2%", "93.2%"),
        ),
        (
            Accuracy(basis=AccuracyBasis.NOT_MEASURED, other_groups=[CHILDREN]), "not_measured",
            {"en": ("Not measured for patients like this one",), "zh": ("未在此类患者中测量",)}, ("95.2%", "93.2%"),
        ),
        (
            Accuracy(basis=AccuracyBasis.AGE_UNKNOWN, other_groups=[CHILDREN]), "age_unknown",
            {"en": ("age is not known, so no measured accuracy applies",), "zh": ("患者年龄未知，没有适用的准确度数据",)},
            ("95.2%", "93.2%"),
        ),
        (
            MIXED_AGES, "mixed",
            {"en": ("All test images, of mixed ages", "95.2%", "93.2%"), "zh": ("全部测试影像（各年龄混合）", "95.2%")}, (),
        ),
    ],
)  # fmt: skip
def test_the_accuracy_shown_is_that_of_patients_like_this_one(
    box: Box, accuracy: Accuracy, basis: str, shown: dict[str, tuple[str, ...]], hidden: tuple[str, ...]
) -> None:
    """Figures of other patients are folded; those of all images together are shown only where they apply."""
    box.activate()
    stored = box.take(scan_bytes())
    box.work(result(0.987, (), accuracy))
    for language, parts in shown.items():
        text = box.person(f"doctor-{language}", language=language).get(f"/studies/{stored.study_id}").text
        card = text.split('<article class="finding')[1].split("</article>")[0]
        assert f'data-accuracy="{basis}"' in card
        open_part = words(re.sub(r"<details.*?</details>", "", card, flags=re.DOTALL))
        for part in parts:
            assert part in open_part, (language, part)
        for part in (*hidden, "96.1%", "onnxruntime", "abababababab"):
            assert part not in open_part, (language, part)
        assert ("96.1%" in words(card)) == bool(accuracy.other_groups)
        assert "onnxruntime" in words(card)


def test_the_verdict_comes_first_in_the_words_of_the_manifest(box: Box) -> None:
    verdict = {"positive": {"zh": "考虑肺炎", "en": "Consider pneumonia"}, "below": {"zh": "未见提示", "en": "No hint"}}
    box.activate()
    with box.store.database.transaction() as tx:
        tx.execute("UPDATE models SET manifest = json_set(manifest, '$.labels[0].verdict', json(?))", (json.dumps(verdict),))
    for number, (score, which) in enumerate(((0.9, "positive"), (0.1, "below"))):
        stored = box.take(scan_bytes())
        box.work(result(score))
        for language in ("zh", "en"):
            page = words(box.person(f"doctor-{number}{language}", language=language).get(f"/studies/{stored.study_id}").text)
            assert page.index(verdict[which][language]) < page.index(f"{score:.3f}")


def test_below_the_threshold_is_no_clean_bill_of_health(box: Box) -> None:
    box.activate()
    stored = box.take(scan_bytes())
    box.work(result(0.1))
    for language, line, page in (
        ("en", "Nothing above threshold", "Below the threshold; does not exclude it"),
        ("zh", "无高于阈值的发现", "未达阈值，不能排除"),
    ):
        person = box.person(language=language)
        assert line in row(person, stored.study_id)
        assert page in words(person.get(f"/studies/{stored.study_id}").text)
        assert ("does not mean that the image is normal" if language == "en" else "不代表影像正常") in words(person.get("/").text)


@pytest.mark.parametrize("score", [0.1, 0.9])
def test_a_study_is_not_described_by_its_worst_image(box: Box, score: float) -> None:
    """Frontal analysed and lateral out of scope, the commonest chest examination: both are shown."""
    box.activate()
    frontal = box.take(scan_bytes(ViewPosition="PA", StudyInstanceUID="1.2.3"))
    box.work(result(score))
    lateral = box.take(scan_bytes(ViewPosition="LL", StudyInstanceUID="1.2.3"))
    assert frontal.study_id == lateral.study_id
    with box.store.database.transaction() as tx:
        tx.execute("UPDATE jobs SET state = 'done' WHERE state = 'queued'")
        tx.execute("UPDATE instances SET state = 'out_of_scope' WHERE id = ?", (lateral.instance_id,))
    shown = {
        "en": (
            "Frontal (PA) AI result ready",
            "Lateral (left) Out of AI scope – not analysed",
            "Nothing above threshold in the analysed images",
        ),
        "zh": ("正位（后前位） AI 结果已出", "侧位（左） 超出适用范围（未分析）", "已分析的影像中无高于阈值的发现"),
    }
    for language, (first, second, below) in shown.items():
        line = row(box.person(language=language), frontal.study_id)
        assert first in line
        assert second in line
        assert (below in line) == (score < 0.5)
        assert ("0.900" in line) == (score > 0.5)


def test_the_place_in_the_queue_is_told(box: Box) -> None:
    box.activate()
    studies = [box.take(scan_bytes()).study_id for _ in range(3)]
    person = box.person()
    for place, study in enumerate(studies, start=1):
        assert f"In the queue · no. {place}" in row(person, study)
        assert f"no. {place}" in words(person.get(f"/studies/{study}", headers={"X-Fragment": "1"}).text)


def test_hostile_text_is_shown_as_text(box: Box) -> None:
    box.take(
        scan_bytes(PatientName=HOSTILE, PatientID="../../etc/passwd", StudyDescription=HOSTILE, AccessionNumber="<b>x", PatientSex="<i>"),
        HOSTILE,
    )
    box.store.add_rejection(Source("upload", "<u>actor", HOSTILE), 3, "ingest.not_dicom", HOSTILE)
    person = box.person()
    for path in ("/", "/studies/1", "/rejected"):
        page = person.get(path).text
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
        assert "<script>alert" not in page
        assert "<b>x" not in page
        assert "<u>actor" not in page
        assert "1337" not in words(page)


def test_chinese_names_as_chinese_write_them(box: Box) -> None:
    box.take(scan_bytes(PatientName="Wang^XiaoDong=王^小东", StudyInstanceUID="1.2.1"))
    box.take(scan_bytes(PatientName="Sepp^Anna Maria", PatientID="2"))
    box.take(scan_bytes(PatientName="", PatientID="3"))
    assert all(name in box.person(language="zh").get("/").text for name in ("王小东", "Sepp Anna Maria", "（无姓名）"))
    assert all(name in box.person(language="en").get("/").text for name in ("Wang XiaoDong", "(no name)"))


def test_two_patients_under_one_study_are_flagged(box: Box) -> None:
    for patient in ("A", "B"):
        box.take(scan_bytes(PatientID=patient, StudyInstanceUID="1.2.3"))
    person = box.person()
    assert person.get("/").text.count("Check the identity") == 2
    assert "came with other patient data; kept apart" in person.get("/studies/1").text


def test_r18_a_search_goes_by_post_and_finds(box: Box) -> None:
    for name in ("王^小东", "Li^Si", "100%"):
        box.take(scan_bytes(PatientName=name, PatientID=f"ID-{name}"))
    person = box.person()
    for text, found in (("小东", 1), ("li", 1), ("ID-", 3), ("%", 1), ("_", 0), ("nobody", 0)):
        page = person.post("/", data={"q": text}).text
        assert page.count('class="row-link"') == found, text
    assert "Nothing found" in page
    assert person.get("/?q=nobody").text.count('class="row-link"') == 3
    assert 'value="nobody"' in page


FOUND = {
    "张三": 1, "张 三": 1, "张^三": 1, "zhang san": 1, "SAN Zhang": 1, "ＺＨＡＮＧ": 1, "zhangsan张": 0, "anna maria": 1, "Sepp  Anna": 1,
    "sepp^anna": 1, "Ｐ－００７": 1, "p007": 1, "p 007": 1, "acc１２": 1, "张三 p-007": 1, "李四": 0, "山": 0, "straße": 1, "STRASSE": 1,
    "=": 1, "---": 0,
}  # fmt: skip


def test_a_search_finds_a_name_as_it_is_shown(box: Box) -> None:
    for name, number, accession in (("Zhang^San=张^三", "P-007", "ACC12"), ("Sepp^Anna Maria", "8", "9"), ("Straße^Hans", "x", "")):
        box.take(scan_bytes(PatientName=name, PatientID=number, AccessionNumber=accession))
    for search, found in FOUND.items():
        assert len(Worklist(box.store).page(search=search)) == found, search


def test_a_search_of_ten_thousand_names_shows_its_page_within_reason(box: Box) -> None:
    fill(box.store, 10_000)
    person = box.person()
    page = person.post("/", data={"q": "测试 9999"}).text
    assert page.count('class="row-link"') == 1
    assert "测试 9999" in words(page)
    times = []
    for _ in range(9):
        started = time.process_time()
        Worklist(box.store).page(search="nobody at all")
        times.append(time.process_time() - started)
    print(f"search of 10,000 names without a hit: {statistics.median(times) * 1000:.0f} ms")


def test_pages_of_the_list(box: Box) -> None:
    for number in range(60):
        box.take(scan_bytes(PatientID=str(number)))
    person = box.person()
    first = person.get("/").text
    assert first.count('class="row-link"') == 50
    assert "Studies on this box: 60" in first
    before = re.findall(r'name="before" value="(\d+)"', first)[0]
    second = person.post("/", data={"before": before}).text
    assert second.count('class="row-link"') == 10
    assert "Newest" in second
    assert person.get(f"/?before={before}").text.count('class="row-link"') == 10
    fragment = person.post("/", data={"q": ""}, headers={"X-Fragment": "1", "X-Background": "1"}).text
    assert "<html" not in fragment
    assert fragment.count('class="row-link"') == 50


def test_an_empty_list_says_what_to_do(box: Box) -> None:
    page = words(box.person().get("/").text)
    assert "No studies yet" in page
    assert "Upload images here, or send them from the X-ray machine by DICOM" in page


def test_a_failed_image_can_be_tried_again(box: Box) -> None:
    box.activate()
    study = in_state(box, ScanState.FAILED)
    person = box.person()
    assert f'action="/studies/{study}/retry"' in person.open(f"/studies/{study}")
    assert person.post("/studies/99/retry").status_code == 404
    assert person.post(f"/studies/{study}/retry").headers["Location"] == f"/studies/{study}"
    page = words(person.get(f"/studies/{study}").text)
    assert "in the queue again" in page
    assert "in the queue again" not in words(person.get(f"/studies/{study}").text)
    assert person.post(f"/studies/{study}/retry").status_code == 302


def test_one_model_failing_leaves_the_others_findings(box: Box) -> None:
    box.activate()
    stored = box.take(scan_bytes())
    box.work(result())
    with box.store.database.transaction() as tx:
        tx.execute(
            'UPDATE instances SET state = \'failed\', reason = \'{"code": "job.memory", "detail": ""}\' WHERE id = ?', (stored.instance_id,)
        )
    page = words(box.person().get(f"/studies/{stored.study_id}").text)
    assert "Another model failed on this image" in page
    assert "Not enough memory" in page
    assert "Suggests pneumonia: please review" in page


def test_several_images_each_have_their_part(box: Box) -> None:
    box.activate()
    for view in ("PA", "LL"):
        box.take(scan_bytes(StudyInstanceUID="1.2.3", ViewPosition=view))
    box.work(result())
    box.work(JobResult(ScanState.OUT_OF_SCOPE, Note("scope.view", "LL")))
    text = box.person().get("/studies/1").text
    page = words(text)
    assert "Image 1 CR CHEST PA" in page
    assert "Image 2 CR CHEST LL" in page
    assert "This view is outside the model's scope (for example lateral) (LL)" in page
    assert text.count("CR CHEST LL") >= 2


def test_a_long_series_is_told_in_one_place(box: Box) -> None:
    for number in range(40):
        box.take(scan_bytes(StudyInstanceUID="1.2.3", Modality="CT", SOPInstanceUID=f"1.2.3.{number}"))
        box.work(JobResult(ScanState.OUT_OF_SCOPE, Note("scope.modality", "CT")))
    box.take(scan_bytes(StudyInstanceUID="1.2.3", Modality="CT"))
    page = words(box.person().get("/studies/1").text)
    assert "Images 1–40" in page
    assert "Image 41" in page
    assert page.count("This modality is outside the model's scope") == 1


def test_refused_files_with_their_reasons(box: Box) -> None:
    person = box.person()
    assert "No file was refused" in person.get("/rejected").text
    box.store.add_rejection(Source("upload", "doctor", "片.dcm"), 4096, "ingest.truncated", "")
    box.store.add_rejection(Source("dimse", "CT1"), 0, "code.of.a.newer.version", "")
    page = words(person.get("/rejected").text)
    for part in ("片.dcm", "4.0 KB", "The file is cut short", "Export the image again", "(sent by DICOM)", "code.of.a.newer.version"):
        assert part in page


def test_the_status_of_the_box(box: Box) -> None:
    person = box.person()
    assert "No model is active" in person.get("/health").text
    box.activate()
    box.take(scan_bytes())
    page = words(person.get("/health").text)
    for part in (
        "Chest X-ray pneumonia",
        "cxr-pneumonia",
        "Analyses images now",
        "ONNX Runtime 1.0",
        "FP32",
        "abababababab",
        "Audit entries",
        "CLINICBOX",
    ):
        assert part in page
    assert "测试" not in page


def test_errors_are_explained(box: Box) -> None:
    person = box.person()
    for path, status, said in (
        ("/studies/99", 404, "There is no such record"),
        ("/nothing", 404, "There is no such page"),
        ("/logout", 405, "not valid"),
    ):
        answer = person.get(path)
        assert answer.status_code == status
        assert said in answer.text
        assert "To my first page" in answer.text
    assert "没有这个页面" in box.person(language="zh").get("/nothing").text


def test_r25_a_bug_is_told_without_particulars_and_logged_without_values(
    box: Box, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from webui.study import pages

    def fall(*_: object) -> None:
        raise ValueError("CANARY^NAME")

    monkeypatch.setattr(pages, "viewer_config", fall)
    study = box.take(scan_bytes()).study_id
    answer = box.person().get(f"/studies/{study}")
    assert answer.status_code == 500
    assert "What was stored is safe" in answer.text
    assert "CANARY" not in answer.text
    assert "CANARY" not in "".join(record.getMessage() for record in caplog.records)
    assert box.person().get(f"/studies/{study}", headers={"Accept": "application/json"}).json()["code"] == "web.internal_server_error"


def test_a_broken_database_is_told_on_a_page_that_needs_none(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    from appliance.core.errors import StoreError
    from appliance.store.logins import Logins

    def fail(*_: object, **__: object) -> None:
        raise StoreError("store.failed", "disk I/O error")

    person = box.person()
    monkeypatch.setattr(Logins, "resume", fail)
    answer = person.get("/")
    assert answer.status_code == 500
    assert "Storing failed" in answer.text


def test_times_are_those_of_the_clock_on_the_wall(box: Box) -> None:
    box.take(scan_bytes())
    with box.store.database.transaction() as tx:
        tx.execute("UPDATE studies SET received_at = '2026-03-01T20:05:00.000+00:00'")
    for zone, language, shown in (
        ("Asia/Shanghai", "zh", "2026-03-02 04:05"), ("Europe/Berlin", "en", "1 Mar 2026, 21:05"), ("Moon/Base", "en", "Mar 2026"),
        ("../x", "en", "Mar 2026"),
    ):  # fmt: skip
        person = box.person(language=language)
        person.cookies.set("tz", zone)
        assert shown in person.get("/").text


def test_ages_sizes_and_odd_dates(box: Box) -> None:
    from webui import create_app

    app = create_app(box.settings)
    with app.test_request_context(headers={"Cookie": "lang=en"}):
        assert [formatting.format_age(years) for years in (None, 0.0, 3 / 365.25, 0.5, 1.5, 2.0, 64.9)] == [
            "",
            "0 y",
            "3 d",
            "6 mo",
            "18 mo",
            "2 y",
            "64 y",
        ]
        assert [formatting.format_size(value) for value in (0, 999, 2048, 150 * 2**20, 5 * 2**40, 5 * 2**50)] == [
            "0 B",
            "999 B",
            "2.0 KB",
            "150 MB",
            "5.0 TB",
            "5120 TB",
        ]
        dates = [("20240102", "0304"), ("20240102", "2561"), ("1994.11.05", ""), ("00000000", ""), ("", "")]
        shown = [formatting.format_study_date(day, at) for day, at in dates]
        assert shown == ["2 Jan 2024 03:04", "2 Jan 2024", "1994.11.05", "", ""]
        assert formatting.format_person_name("==かな") == "かな"
        assert messages.reason_hint("code.of.a.newer.version") == ""
    app.extensions["box"].stop()
