"""The status page: the life of a model as a picture, the line to the library in words, and nothing of any patient."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from appliance import model_queries
from appliance.core.domain import Note, utc_now
from appliance.core.roles import Role
from appliance.core.settings import Settings
from appliance.lifecycle.model_control import reference_bundle
from appliance.store import master_key
from appliance.store.score_alarms import ScoreAlarms, ScoreMonitor
from model_sync import messages
from tests.support import activated
from tests.support.model_journal import journal, rules, tell, told
from tests.support.scans import scan_bytes
from tests.support.web_box import Box, in_process, result, row, words
from webui.messages import ACTIVATIONS, LIBRARY
from webui.models import library_view as library

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=timezone.utc)


@pytest.fixture
def box(settings: Settings, tmp_path: Path) -> Iterator[Box]:
    exchange = tmp_path / "exchange"
    exchange.mkdir()
    with in_process(settings.model_copy(update={"exchange_dir": exchange})) as running:
        yield running


@pytest.mark.parametrize("sealed", [False, True])
def test_r46_the_status_page_says_what_protects_the_keys(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sealed: bool
) -> None:
    if sealed:
        if shutil.which("systemd-creds") is None or os.geteuid() != 0:
            pytest.skip("needs systemd-creds and root")
        monkeypatch.setattr(master_key, "_SYSTEMD_RUNS", tmp_path)
        monkeypatch.setenv("SYSTEMD_CREDENTIAL_SECRET", str(tmp_path / "host"))
    with in_process(settings) as box:
        english = words(box.person("tech", "technician").open("/health"))
        chinese = words(box.person("jishu", "technician", "zh").open("/health"))
    assert ("sealed by this machine" in english, "由本机封存" in chinese) == (sealed, sealed)
    assert ("takes the whole disk" in english, "拿走整块磁盘的人可以打开影像" in chinese) == (not sealed, not sealed)


def test_every_state_of_a_version_has_its_word_and_place(box: Box) -> None:
    box.activate()
    technician, chinese = box.person("tech", "technician"), box.person("jishu", "technician", "zh")
    entry = journal(box, "0.2.0", "staged")
    for place, state in enumerate(model_queries.OPEN):
        with box.store.database.transaction() as tx:
            tx.execute("UPDATE activations SET state = ? WHERE id = ?", (state, entry))
        page = technician.open("/health")
        assert len(re.findall(r'<li class="is-done">', page)) == place
        now = re.search(r'<li class="is-now" aria-current="step">.*?</li>', page, re.DOTALL)
        assert now
        assert str(ACTIVATIONS[state].word) in words(now[0])
        assert "0.2.0" in words(page)
        assert ("Version 0.1.0 analyses images meanwhile" in words(page)) == (state != "trial")
        assert "40.0%" in words(page)
        zh = words(chinese.open("/health"))
        assert "准备中的版本" in zh
        assert ("其间由版本 0.1.0 分析影像" in zh) == (state != "trial")


@pytest.mark.parametrize(
    ("language", "said"),
    [
        ("en", ["Pneumonia, from a score of 0.62", "Children of 1 to 5 years", "407 / 137", "96.3%", "95% CI 94.0% to 97.8%", "97.1%",
                "Adults of 18 to 120 years", "92 / 70", "90.2%", "80.0%", "All test images, of mixed ages", "499 / 207",
                "Patients of other ages – not measured not measured"]),
        ("zh", ["肺炎，评分 0.62 及以上", "1–5 岁儿童", "407 / 137", "96.3%", "18–120 岁成人", "90.2%", "全部测试影像（各年龄混合）",
                "其他年龄的患者 – 未测量 未测量"]),
    ],
)  # fmt: skip
def test_r42_the_accuracy_of_each_group_of_patients_is_on_the_page(box: Box, language: str, said: list[str]) -> None:
    activated.activate(box.store, reference_bundle())
    page = box.person("admin", "system_administrator", language).open("/health")
    (table,) = re.findall(r"<table class=\"plain measured\".*?</table>", page, re.DOTALL)
    shown = words(table)
    assert [text for text in said if text not in shown] == []
    assert [text for text in said if text in shown] == sorted(said, key=shown.index)  # the groups first
    assert ("Kermany 2018 paediatric CXR" in shown, "（未翻译）" in shown or "not translated" in shown) == (True, language == "zh")


def test_r42_a_class_that_was_not_measured_in_a_group_and_a_model_without_groups_say_so(box: Box) -> None:
    digest = activated.activate(box.store, reference_bundle())
    manifest = json.loads(box.store.model(digest)["manifest"])
    (point,) = manifest["operating_points"]
    point["groups"][1] |= {"n_negative": 0, "specificity": None}

    def shown() -> str:
        with box.store.database.transaction() as tx:
            tx.execute("UPDATE models SET manifest = ?", (json.dumps(manifest),))
        return words(box.person(f"p{len(point)}", "technician").open("/health"))

    assert "Adults of 18 to 120 years" in shown()
    assert re.search(r"92 / 0 90.2% 95% CI [\d.]+% to [\d.]+% not measured", shown())
    del point["groups"]
    page = shown()
    assert "Children and adults, each alone – not measured not measured" in page
    assert "All test images, of mixed ages" in page


def test_r43_a_model_whose_accuracy_is_not_verified_shows_no_figure(box: Box) -> None:
    box.activate()  # its files are not on this box
    page = box.person("tech", "technician").open("/health")
    assert "Accuracy: not verified" in words(page)
    assert "measured accuracy" not in words(page).lower()


def test_a_trial_is_told_against_its_bounds(box: Box) -> None:
    box.activate()
    trial = {"cases": 50, "failures": 2, "latency_ms": 82.0, "drift": 0.456}
    journal(box, "0.1.0", "trial", "ab" * 32, trial=json.dumps(trial), self_test=json.dumps({"median_ms": 41.0}))
    page = words(box.person("tech", "technician").open("/health"))
    for part in ("On trial", "50 of 200", "2 at most 10.0%", "82 ms self-test 41 ms, at most 205 ms", "0.46 at most 3.0", "25.0%"):
        assert part in page, part
    assert "Nothing new is on its way to patients" in page  # the one on trial analyses images already


@pytest.mark.parametrize(("language", "said"), [("en", "more than"), ("zh", "超过上限")])
def test_what_is_beyond_its_bounds_is_shown_as_such(box: Box, language: str, said: str) -> None:
    box.activate()
    trial = {"cases": 5, "failures": 2, "latency_ms": 206.0, "drift": 3.1}
    entry = journal(box, "0.1.0", "trial", "ab" * 32, trial=json.dumps(trial), self_test=json.dumps({"median_ms": 41.0}))
    person = box.person("tech", "technician", language)
    page = person.open("/health")
    assert page.count("data-beyond") == 3
    assert f"{said} 205 ms" in words(page)
    with box.store.database.transaction() as tx:  # a short time is judged as if it were longer, as the watch does
        tx.execute("UPDATE activations SET trial = ?, self_test = ? WHERE id = ?",
                   (json.dumps({"cases": 5, "latency_ms": 61.0}), json.dumps({"median_ms": 10.0}), entry))  # fmt: skip
    assert "data-beyond" not in person.open("/health")


def test_a_trial_of_another_version_of_this_software_is_shown_as_far_as_it_goes(box: Box) -> None:
    box.activate()
    person = box.person()
    for trial in ("[]", "{", '{"cases": "many", "drift": {"a": 0.1, "b": 0.9}}', '{"cases": 1e400, "failures": null, "latency_ms": true}'):
        with box.store.database.transaction() as tx:
            tx.execute("DELETE FROM activations")
        journal(box, "0.1.0", "trial", "ab" * 32, trial=trial, self_test="nonsense", reason="[1]")
        assert "On trial" in words(person.open("/health"))


@pytest.mark.parametrize(("state", "code"), [("failed", "model.self_test"), ("rolled-back", "code.of.a.newer.version"), ("withdrawn", "")])
def test_what_went_wrong_is_said_with_what_to_do_until_it_is_mended(box: Box, state: str, code: str) -> None:
    box.activate()
    journal(box, "0.2.0", state, reason=json.dumps(Note(code, "golden-1: off by 0.2").to_json()) if code else None)
    person = box.person()
    page = person.open("/health")
    trouble = re.search(
        rf'<div class="banner tone-(?:bad|warn) trouble" role="alert" data-trouble="{state}">.*?</div></div>', page, re.DOTALL
    )
    assert trouble
    said = words(trouble[0])
    assert f"Version 0.2.0: {ACTIVATIONS[state].word}" in said
    assert "Version 0.1.0 analyses images as before" in said
    if code:
        assert "What to do" in said
        assert "golden-1: off by 0.2" in said
        assert ("The model failed its self-test" if code == "model.self_test" else code) in said
    journal(box, "0.3.0", "good")
    after = person.open("/health")
    assert "data-trouble" not in after
    assert f'data-activation="{state}"' in after  # the history keeps it


def test_going_back_to_an_older_version_mends_nothing(box: Box) -> None:
    box.activate()
    journal(box, "0.2.0", "rolled-back")
    journal(box, "0.1.0", "good", purpose="rollback")
    page = box.person().open("/health")
    assert 'data-trouble="rolled-back"' in page
    assert "rolled back to" in words(page)


def test_a_version_cut_short_by_a_newer_one_is_no_trouble_and_one_out_of_its_bounds_is(box: Box) -> None:
    box.activate()
    journal(box, "0.0.9", "rolled-back", reason=json.dumps(Note("activation.superseded").to_json()))
    person = box.person()
    assert "data-trouble" not in person.open("/health")
    entry = journal(box, "0.1.0", "good", "ab" * 32, trial='{"cases": 7, "watching": true}')
    page = words(person.open("/health"))
    assert "Version 0.1.0 passed its self-test; its first images here are observed" in page
    assert "Cases analysed 7 of 200" in page
    with box.store.database.transaction() as tx:
        alarm = json.dumps(Note("activation.drift", "4.20, allowed 3").to_json())
        tx.execute("UPDATE activations SET trial = '{\"watching\": false}', reason = ? WHERE id = ?", (alarm, entry))
    page = words(person.open("/health"))
    assert "Version 0.1.0: Outside its limits" in page
    assert "4.20, allowed 3" in page


_HOLD_ROLES = """
import sys
from pathlib import Path
from appliance.core.process import Lock
held = [Lock(Path(sys.argv[1]), role) for role in sys.argv[2:]]
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def running(settings: Settings, *roles: str) -> Iterator[None]:
    """Another process that holds the locks of these roles, as the worker and the receiver do."""
    command = [sys.executable, "-c", _HOLD_ROLES, str(settings.data_dir), *roles]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield
        process.communicate()


def verdict(page: str) -> tuple[str, list[str], str]:
    """The first line of the status page: its kind, the codes of its items, and its words."""
    part = re.search(r'<section class="health-verdict.*?</section>', page, re.DOTALL)
    assert part
    kind = re.search(r'data-health="(\w+)"', part[0])
    assert kind
    return kind[1], re.findall(r'data-item="([^"]+)"', part[0]), words(part[0]).strip()


def test_one_line_says_that_the_box_works_and_names_a_trial(box: Box) -> None:
    box.accounts.add("security", Role.SECURITY_ADMINISTRATOR, "test")
    box.activate()
    person, chinese = box.person("tech", "technician"), box.person("jishu", "technician", "zh")
    with running(box.settings, "worker", "receiver"):
        assert verdict(person.open("/health")) == ("well", [], "This box works")
        assert verdict(chinese.open("/health")) == ("well", [], "本机工作正常")
        journal(box, "0.1.0", "trial", "ab" * 32, trial=json.dumps({"cases": 50}))
        kind, items, said = verdict(person.open("/health"))
        assert (kind, items) == ("trial", ["trial"])
        assert "This box works; a version is on trial" in said
        assert "50 of 200" in said
        assert "50 / 200" in verdict(chinese.open("/health"))[2]


@pytest.mark.parametrize(("roles", "items"), [(("receiver",), ["worker"]), (("worker",), ["receiver"]), ((), ["worker", "receiver"])])
def test_a_part_of_the_box_that_does_not_run_is_named_with_what_to_do(box: Box, roles: tuple[str, ...], items: list[str]) -> None:
    box.accounts.add("security", Role.SECURITY_ADMINISTRATOR, "test")
    box.activate()
    person = box.person("tech", "technician")
    with running(box.settings, *roles):
        kind, codes, said = verdict(person.open("/health"))
    assert (kind, codes) == ("broken", items)
    assert said.count("What to do: Restart the box") == len(items)


def test_without_a_model_and_on_a_full_disk_the_box_does_not_say_that_it_works(settings: Settings) -> None:
    """The disk counts as full since more than all of it is kept in reserve."""
    with in_process(settings.model_copy(update={"disk_reserve_bytes": 1 << 60})) as box, running(settings, "worker", "receiver"):
        box.accounts.add("security", Role.SECURITY_ADMINISTRATOR, "test")
        person = box.person("tech", "technician")
        assert verdict(person.open("/health"))[:2] == ("broken", ["disk", "no_model"])
        box.activate()
        kind, codes, said = verdict(person.open("/health"))
    assert (kind, codes) == ("broken", ["disk"])
    assert "The disk is nearly full" in said


def test_a_new_version_that_failed_its_self_test_needs_somebody_while_the_box_works(box: Box) -> None:
    box.accounts.add("security", Role.SECURITY_ADMINISTRATOR, "test")
    box.activate()
    journal(box, "0.2.0", "failed", reason=json.dumps(Note("model.self_test", "golden-1").to_json()))
    with running(box.settings, "worker", "receiver"):
        kind, codes, said = verdict(box.person("tech", "technician").open("/health"))
    assert (kind, codes) == ("attention", ["failed"])
    assert "Version 0.2.0: Failed: The model failed its self-test" in said
    assert "What to do" in said


@pytest.mark.parametrize(("state", "trial"), [("trial", {"cases": 7}), ("good", {"cases": 7, "watching": True})])
def test_never_five_of_five_while_a_trial_runs(box: Box, state: str, trial: dict[str, Any]) -> None:
    """A version without one to roll back to is good for the journal while its first images are observed."""
    box.activate()
    journal(box, "0.1.0", state, "ab" * 32, trial=json.dumps(trial))
    page = box.person("tech", "technician").open("/health")
    assert page.count('<li class="is-done">') == 3
    now = re.search(r'<li class="is-now" aria-current="step">.*?</li>', page, re.DOTALL)
    assert now
    assert words(now[0]).strip() == "On trial"
    icons = [
        re.findall(r' d="([^"]+)"', item)
        for kind in ("done", "todo")
        for item in re.findall(rf'<li class="is-{kind}">.*?</li>', page, re.DOTALL)
    ]
    assert len(icons) == 4
    assert icons[3] not in icons[:3]
    assert words(page).count("Trial passed") == 1  # the step that is still to come
    assert 'data-activation="trial"' in page


def test_why_this_box_does_not_get_what_the_library_has(box: Box) -> None:
    box.activate()
    person = box.person()
    person.cookies.set("tz", "Asia/Shanghai")
    for decision, said in (
        ("not_yet 2026-03-01T20:05:00Z", "the turn of this box has not come yet (2 Mar 2026, 04:05)"),
        ("paused", "the rollout is paused"),
        ("novel", ""),
    ):
        tell(box, lines={"cxr-pneumonia": {"version": "0.3.0", "digest": "e" * 64, "decision": decision}, "x": 7})
        page = words(person.open("/health"))
        assert ("Library: version 0.3.0" in page) == bool(said)
        assert said in page


def test_what_the_box_runs_already_is_no_offer(box: Box) -> None:
    box.activate()
    tell(box, lines={"cxr-pneumonia": {"version": "0.1.0", "digest": "e" * 64, "decision": "ready"}})
    assert "Library: version" not in words(box.person().open("/health"))


def test_every_state_of_the_agent_has_words_and_its_old_codes_are_still_read(box: Box) -> None:
    assert {f"state.{state}" for state in library.STATES} == {code for code in messages.codes() if code.startswith("state.")}
    person = box.person()
    for code in ("trust.line_ended", "trust.revoked"):
        tell(box, state="error", code=code, message="")
        assert "The library has ended this model line" in person.open("/health")


def test_one_version_on_trial_and_the_next_one_coming(box: Box) -> None:
    box.activate()
    journal(box, "0.1.0", "trial", "ab" * 32, trial='{"cases": 3}')
    journal(box, "0.2.0", "self-test", purpose="rollback")
    page = words(box.person().open("/health"))
    assert "Version 0.1.0 on its way" in page
    assert "Rolling back to version 0.2.0" in page
    assert "not enough cases yet" in page


def test_minimum_and_withdrawn_versions_are_listed(box: Box) -> None:
    box.activate()
    rules(box, "0.1.0", {"0.0.9": {"reason": "misses effusions", "at": utc_now()}, "0.0.8": "worse in children"})
    page = words(box.person().open("/health"))
    for part in ("Oldest version allowed 0.1.0", "0.0.9 : misses effusions", "0.0.8 : worse in children"):
        assert part in page


def test_a_line_without_any_model_is_shown_and_hostile_text_is_text(box: Box) -> None:
    journal(box, "1.0.0", "failed", name="<b>line", reason=json.dumps({"code": "<i>x", "detail": "<script>1</script>"}))
    tell(
        box, state="error", code="<u>", message="<script>2</script>", hint="<script>3</script>", progress={"file": "<a>", "total_bytes": 9}
    )
    page = box.person().open("/health")
    assert "&lt;b&gt;line" in page
    for hostile in ("<b>line", "<i>x", "<script>1", "<script>2", "<u>", "<a>"):
        assert hostile not in page


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_line_to_the_library_in_words_and_icon(box: Box, language: str) -> None:
    person = box.person(language=language)
    for state in library.STATES:
        progress = {"file": "model_int8.onnx", "done_bytes": 3 << 20, "total_bytes": 12 << 20} if state == "downloading" else None
        tell(box, state=state, code="sync.test" if state == "error" else "", message="no room", progress=progress)
        page = person.open("/health")
        assert f'data-library="{state}"' in page
        assert ("no room" in page) == (state == "error")
        assert ("3.0 MB / 12.0 MB" in page) == (state == "downloading")
        assert ('role="alert" aria-labelledby="library-title"' in page) == (state == "untrusted")


def test_unreachable_never_looks_like_untrusted(box: Box) -> None:
    looks = {}
    people = {language: box.person(f"p-{language}", language=language) for language in ("zh", "en")}
    for state in ("unreachable", "untrusted"):
        tell(box, state=state)
        for language, person in people.items():
            page = person.open("/health")
            section = re.search(r'<section class="card library.*?</section>', page, re.DOTALL)
            assert section
            looks[state, language] = words(section[0]), re.findall(r' d="([^"]+)"', section[0])[0], "is-alarm" in section[0]
    assert [look[2] for look in looks.values()] == [False, False, True, True]
    assert looks["unreachable", "en"][1] != looks["untrusted", "en"][1]
    assert "keeps working with the model it has and tries again by itself" in looks["unreachable", "en"][0]
    assert "Alarm" not in looks["unreachable", "en"][0]
    assert "警报" in looks["untrusted", "zh"][0]
    assert "警报" not in looks["unreachable", "zh"][0]


def test_a_code_of_the_agent_is_told_in_the_language_of_the_page(box: Box) -> None:
    person = box.person(language="zh")
    tell(box, state="error", code="sync.disk_full", message="No space left.")
    assert "磁盘空间不足" in person.open("/health")
    tell(box, state="error", code="sync.of_a_newer_version", message="Something new happened.", hint="Do this.")
    assert "Something new happened. Do this." in person.open("/health")


def test_words_and_icons_of_the_line_all_differ() -> None:
    assert set(LIBRARY) == set(library.STATES) | set(library.OWN_STATES)
    assert len({str(look.word) for look, _ in LIBRARY.values()}) == len(LIBRARY)
    told_apart = [LIBRARY[state][0].icon for state in library.STATES if state not in ("ok",)]
    assert len(set(told_apart)) == len(told_apart)


GARBLED: list[bytes] = [
    b"", b"{", b"[]", b"null", b'{"state": "ok"}', b'{"state": "splendid", "at": "2026-03-01T12:00:00Z"}', b'{"state": ["ok"], "at": 7}',
    b"\xff\xfe\x00", b"[" * 100_000, b'{"state": "ok", "at": "9999-99-99"}', b"x" * (300 << 10),
    b'{"state": 1e999, "at": "0001-01-01T00:00:00+23:59"}',
]  # fmt: skip


def test_a_garbled_report_is_said_and_never_an_error(box: Box) -> None:
    assert box.settings.exchange_dir
    person = box.person()
    for raw in GARBLED:
        (box.settings.exchange_dir / library.FILE_NAME).write_bytes(raw)
        page = person.open("/health")
        assert 'data-library="garbled"' in page, raw[:40]
        assert "cannot be read" in words(page)


def test_odd_values_in_the_report_are_left_out(box: Box) -> None:
    person = box.person()
    for values in ODD:
        tell(box, **values)
        assert 'data-library="ok"' in person.open("/health")


ODD: list[dict[str, Any]] = [
    {"since": 7, "last_success_at": [], "last_attempt_at": "yesterday", "received_bytes": -1, "progress": "half"},
    {
        "progress": {"done_bytes": 10**30, "total_bytes": 10**30},
        "clock": {"system": "x"},
        "code": {},
        "message": 1,
        "received_bytes": 10**30,
    },
    {"progress": {"file": "f", "done_bytes": 9, "total_bytes": 0}, "clock": [], "since": "0001-01-01T00:00:00+23:59"},
    {"since": "0001-01-01T00:00:00", "last_success_at": "9999-12-31T23:59:59-11:00"},
]


def test_a_missing_report_a_pipe_a_link_and_a_forbidden_file(box: Box, settings: Settings) -> None:
    assert box.settings.exchange_dir
    path = box.settings.exchange_dir / library.FILE_NAME
    assert library.read_library_link(None).state == "none"
    assert library.read_library_link(box.settings.exchange_dir).state == "missing"
    assert library.read_library_link(path / "nowhere").state == "missing"
    os.mkfifo(path)
    assert library.read_library_link(box.settings.exchange_dir).state == "garbled"
    path.unlink()
    secret = settings.data_dir / "secret.json"
    secret.write_text(json.dumps(told()))
    path.symlink_to(secret)
    assert library.read_library_link(box.settings.exchange_dir).state == "garbled"
    path.unlink()
    path.mkdir()
    assert library.read_library_link(box.settings.exchange_dir).state == "garbled"
    assert 'data-library="garbled"' in box.person().open("/health")


def test_an_old_report_is_said_to_be_old(box: Box) -> None:
    tell(box, at=(datetime.now(timezone.utc) - timedelta(days=2)).isoformat())
    person = box.person()
    assert "This report is old" in person.open("/health")
    tell(box)
    assert "This report is old" not in person.open("/health")


@pytest.mark.parametrize(
    ("system", "floor", "server", "said"),
    [(0, 0, 0, ("", 0)), (0, 0, 4, ("", 0)), (0, 0, 90, ("behind", 90)), (0, -60, -90, ("ahead", 90)), (0, 600, None, ("behind", 600))],
)
def test_a_wrong_clock_is_said(tmp_path: Path, system: int, floor: int, server: int | None, said: tuple[str, int]) -> None:
    moments = [None if shift is None else (NOW + timedelta(minutes=shift)).isoformat() for shift in (system, floor, server)]
    report = told(at=NOW.isoformat(), clock=dict(zip(("system", "floor", "server"), moments, strict=True)))
    (tmp_path / library.FILE_NAME).write_text(json.dumps(report))
    seen = library.read_library_link(tmp_path, NOW)
    assert (seen.clock, seen.clock_minutes) == said
    assert not seen.is_stale


def test_the_wrong_clock_stands_on_the_page(box: Box) -> None:
    now, person = datetime.now(timezone.utc), box.person()
    for shift, word in ((90, "behind"), (-90, "ahead")):
        tell(box, clock={"system": now.isoformat(), "server": (now + timedelta(minutes=shift)).isoformat()})
        assert f"clock of the box is {word} by 90 minutes" in person.open("/health")


def test_the_history_has_pages(box: Box) -> None:
    for number in range(25):
        journal(box, f"0.{number}.0", "good")
    person = box.person()
    first = person.open("/health")
    assert first.count("data-activation=") == 10
    assert "0.24.0" in first
    older = re.findall(r'href="(/health\?before=\d+)#history"', first)[0]
    second = person.open(older)
    assert second.count("data-activation=") == 10
    assert "Newest" in second
    last = person.open(re.findall(r'href="(/health\?before=\d+)#history"', second)[0])
    assert last.count("data-activation=") == 5
    for odd in ("²", "-1", "9" * 40, str(2**63), "x"):
        assert person.get(f"/health?before={odd}").status_code == 200


def test_a_script_gets_the_moving_part_alone(box: Box) -> None:
    journal(box, "0.2.0", "building")
    fragment = box.person().get("/health", headers={"X-Fragment": "1", "X-Background": "1"}).text
    assert "<html" not in fragment
    assert 'data-busy="1"' in fragment
    assert "Free disk space" not in fragment


def test_r6_no_patient_data_on_the_status_page(box: Box) -> None:
    box.activate()
    box.take(
        scan_bytes(PatientName="CANARY^NAME", PatientID="CANARY-ID", StudyDescription="CANARY", AccessionNumber="CANARY"), "CANARY.dcm"
    )
    box.work(result())
    journal(box, "0.2.0", "trial", trial='{"cases": 1, "canary": "CANARY"}')
    tell(box, extra="CANARY")
    for language in ("zh", "en"):
        for headers in ({}, {"X-Fragment": "1"}):
            page = box.person(f"tech-{language}", "technician", language).get("/health", headers=headers).text
            assert "CANARY" not in page
            assert "1.2." not in re.sub(r' d="[^"]*"', "", page)


@pytest.mark.parametrize("code", ["model.withdrawn", "activation.rolled_back"])
def test_a_finding_of_a_version_that_was_taken_back_says_so(box: Box, code: str) -> None:
    box.activate()
    recalled, standing = box.take(scan_bytes()), None
    box.work(result(0.9, (Note(code), Note("assume.view", "PA"))))
    standing = box.take(scan_bytes())
    box.work(result(0.9))
    for language, mark, said in (
        ("en", "By a model since rolled back or withdrawn", "was rolled back or withdrawn. Do not rely on it"),
        ("zh", "模型版本已被回退或撤回", "请勿依据此结果"),
    ):
        person = box.person(language=language)
        assert mark in row(person, recalled.study_id)
        assert mark not in row(person, standing.study_id)
        page = person.open(f"/studies/{recalled.study_id}")
        card = re.search(r'<article class="finding.*?</article>', page, re.DOTALL)
        assert card
        assert said in words(card[0])
        assert card[0].index('role="alert"') < card[0].index("<h3>")
        assert card[0].count(f'data-code="{code}"') == 1
        assert said not in words(person.open(f"/studies/{standing.study_id}"))


@pytest.mark.parametrize(
    ("language", "said", "press", "done"),
    [
        ("en", "The scores of the model shifted", "Acknowledge: these scores are usual from now on", "Acknowledged."),
        ("zh", "模型的评分发生偏移", "确认：今后以此评分为常态", "已确认。"),
    ],
)
def test_r44_an_administrator_acknowledges_shifted_scores(box: Box, language: str, said: str, press: str, done: str) -> None:
    box.activate()
    (model,) = box.store.models()
    detail = "pneumonia: median 0.61 of the last 20, 0.34 of 180 before"
    alarms = ScoreAlarms(box.store.database)
    alarms.record(ScoreMonitor(model["digest"], "pneumonia"), Note("scores.shifted", detail), "cxr-pneumonia")
    technician, administrator = box.person("tech", "technician", language), box.person("chief", "system_administrator", language)
    address = "/health/score-alarms/cxr-pneumonia"
    for person, may in ((technician, False), (administrator, True)):
        page = person.open("/health")
        assert said in words(page)
        assert detail in words(page)
        assert (press in words(page)) == may
        assert (address in page) == may
    assert technician.post(address).status_code == 403
    assert box.person("doctor2", "clinician").post(address).status_code == 403
    assert alarms.active()
    assert administrator.post(address).headers["Location"] == "/health"
    page = administrator.open("/health")
    assert done in words(page)
    assert "data-score-alarm" not in page
    assert alarms.active() == []
    entries = [json.loads(item["entry"]) for item in box.store.database.query("SELECT entry FROM audit")]
    assert [entry["actor"] for entry in entries if entry["detail"].get("acknowledged") == "scores.shifted"] == ["chief"]
    assert administrator.post("/health/score-alarms/none").status_code == 302  # nothing to acknowledge
