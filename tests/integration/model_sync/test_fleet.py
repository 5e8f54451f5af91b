"""The fleet page by plain requests: logins, what it shows, the brake and the budget; the central team's commands; a real proxy."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import sqlite3
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import requests
from argon2 import PasswordHasher
from sqlalchemy import select

from model_sync import login_throttle
from model_sync.errors import SettingsError
from model_sync.fleet import accounts as accounts_module
from model_sync.fleet import cli
from model_sync.fleet.accounts import Accounts
from model_sync.fleet.database import Fleet
from model_sync.fleet.rollout_pause_policy import RolloutPausePolicy
from model_sync.fleet.rollouts import Rollouts
from model_sync.fleet.tables import actions
from model_sync.login_throttle import LOCKOUT_S, MAX_WAIT_S, SLOW_AFTER, SLOW_S, TooManyAttemptsError
from model_sync.messages_central import WORDS
from model_sync.trust.documents import RolloutStep
from tests.support.fleet_seed import seed
from tests.support.fleet_site import PASSPHRASE, ROOT, Box, Centre, Person, Postgres, box_report
from tests.support.library_site import tiny_bundle
from tests.support.processes import run_here

LINE = "cxr-pneumonia"


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    cluster = Postgres()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def centre(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Centre]:
    db = request.getfixturevalue("postgres").database() if request.param == "postgresql" else None
    base = tmp_path_factory.mktemp("centre")
    running = Centre(base, db, rollout_key=True)
    for number, version in enumerate(("0.1.0", "0.2.0")):
        running.site.publish(tiny_bundle(base / "bundles", version, number))
    running.site.rollout("stable", LINE, "0.2.0", 100.0, datetime.now(timezone.utc) - timedelta(hours=1), 0.0)
    yield running.start("--requests-per-minute", "6000")
    running.close()


@pytest.fixture
def person(centre: Centre) -> Person:
    somebody = Person(centre)
    assert somebody.log_in("wang", centre.operator()).status_code == 302
    return somebody


def done(centre: Centre) -> list[Any]:
    with centre.fleet.reading() as tx:
        return list(tx.execute(select(actions).order_by(actions.c.id)).mappings())


def until(true: Callable[[], bool]) -> None:
    """Wait for what happens behind a report; the suite's own time limit ends it."""
    while not true():
        time.sleep(0.05)


def step_of(centre: Centre, ring: str = "stable") -> RolloutStep:
    found = Rollouts(centre.site.library.files.directory, centre.fleet).published().step(ring, LINE)
    assert found
    return found


# -- logins


def test_nobody_sees_the_fleet_without_a_login(centre: Centre) -> None:
    for path in ("/fleet", "/fleet/box/box-1"):
        answer = centre.get(path, allow_redirects=False)
        assert (answer.status_code, answer.headers["Location"]) == (302, "/fleet/login")
    stranger = Person(centre)
    stranger.see("/fleet/login")
    for path in ("/fleet/pause", "/fleet/logout"):
        assert stranger.submit(path, ring="stable", line=LINE, action="pause").headers["Location"] == "/fleet/login"
    assert not step_of(centre).paused


def test_a_session_cookie_is_for_this_site_and_tls_only(centre: Centre) -> None:
    somebody = Person(centre)
    cookie = somebody.log_in("wang", centre.operator()).headers["Set-Cookie"]
    assert all(part in cookie for part in ("Secure", "HttpOnly", "SameSite=Strict"))


def test_five_failures_lock_and_every_refusal_reads_the_same(centre: Centre) -> None:
    password = centre.operator("li")
    somebody = Person(centre)
    pages = []
    for attempt in ("wrong", "", "x" * 5000, "wrong", "wrong", password):
        answer = somebody.log_in("li", attempt)
        assert answer.status_code == 401
        pages.append(re.sub(r'value="[^"]*"', "", answer.text))
    answer = somebody.log_in("nobody", "wrong")
    pages.append(re.sub(r'value="[^"]*"', "", answer.text))
    assert len(set(pages)) == 1
    assert somebody.log_in("li", Accounts(centre.fleet).reset("li")).status_code == 302


class Guessing:
    """A fleet with the operator ``li`` and a clock for the limits of logins, which stands still."""

    def __init__(self, directory: Path) -> None:
        self.now, self.directory = 1000.0, directory
        self.fleet = Fleet(f"sqlite:///{directory}/fleet.db")
        self.accounts = Accounts(self.fleet, clock=lambda: self.now)
        self.password = self.accounts.add("li")

    def log_in(self, password: str, peer: str, name: str = "li") -> str | None:
        """One login."""
        return self.accounts.login(name, password, peer)

    def locks(self) -> int:
        """Recorded locks."""
        with self.fleet.reading() as tx:
            return len(tx.execute(select(actions).where(actions.c.action == "locked")).all())


@pytest.fixture
def guessing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guessing]:
    monkeypatch.setattr(accounts_module, "_HASHER", PasswordHasher(time_cost=1, memory_cost=1024, parallelism=1))
    found = Guessing(tmp_path)
    yield found
    found.fleet.close()


def test_five_failures_lock_a_name_for_one_address_only(guessing: Guessing) -> None:
    for _ in range(5):
        assert guessing.log_in("wrong", "192.0.2.1") is None
    assert guessing.log_in(guessing.password, "192.0.2.1") is None
    assert guessing.log_in(guessing.password, "192.0.2.2")
    guessing.now += LOCKOUT_S + 1
    assert guessing.log_in(guessing.password, "192.0.2.1")


def test_r3_a_hundred_failures_from_everywhere_lock_no_operator_out(guessing: Guessing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login_throttle, "SLOW_S", 0.001)
    assert guessing.log_in(guessing.password, "192.0.2.200")  # the machine of li is familiar
    for number in range(100):
        assert guessing.log_in("wrong", f"192.0.2.{number}") is None
        guessing.now += 1
    assert guessing.log_in(guessing.password, "192.0.2.200")
    assert guessing.log_in(guessing.password, "192.0.2.201")  # slowed, not locked


def test_r3_a_guessed_name_is_slowed_whether_it_exists_or_not(guessing: Guessing) -> None:
    for name in ("li", "nobody"):
        for number in range(SLOW_AFTER):
            assert guessing.log_in("wrong", f"192.0.2.{number}", name) is None
        assert guessing.accounts._throttle.wait_s(name, "192.0.2.99") == 0
        assert guessing.accounts._throttle.wait_s(name, "192.0.2.99") == SLOW_S
        for _ in range(int(MAX_WAIT_S / SLOW_S)):
            guessing.accounts._throttle.wait_s(name, "192.0.2.99")
        with pytest.raises(TooManyAttemptsError):
            guessing.log_in("wrong", "192.0.2.99", name)


def test_r3_a_flood_of_guesses_writes_a_bounded_number_of_records(guessing: Guessing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login_throttle, "SLOW_AFTER", 10**9)
    for number in range(80):
        for _ in range(5):
            assert guessing.log_in("wrong", f"192.0.2.{number}") is None
    assert guessing.locks() == 60  # in a minute that has not ended
    for _ in range(30):
        assert guessing.log_in("wrong", "192.0.2.99", "nobody") is None
    assert guessing.locks() == 60


def test_a_lock_of_an_older_centre_ends_with_the_update(tmp_path: Path) -> None:
    password = (old := Guessing(tmp_path)).password
    old.fleet.close()
    database = sqlite3.connect(tmp_path / "fleet.db")
    for column in ("failures INTEGER NOT NULL DEFAULT 0", "locked_until BIGINT NOT NULL DEFAULT 99999999999"):
        database.execute(f"ALTER TABLE operators ADD COLUMN {column}")
    database.execute("UPDATE meta SET value = '5' WHERE key = 'schema'")
    database.commit()
    database.close()
    fleet = Fleet(f"sqlite:///{tmp_path}/fleet.db")
    assert Accounts(fleet).login("li", password, "192.0.2.1")
    fleet.close()


def test_a_form_without_its_token_is_refused(centre: Centre, person: Person) -> None:
    for path, fields in (
        ("/fleet/pause", {"ring": "stable", "line": LINE, "action": "pause"}),
        ("/fleet/logout", {}),
        ("/fleet/login", {}),
    ):
        answer = person.post(person.base + path, data=fields, timeout=30, allow_redirects=False)
        assert answer.status_code == 400
    assert not step_of(centre).paused


def test_a_logout_ends_the_session_on_the_server(centre: Centre, person: Person) -> None:
    person.see()
    kept = person.cookies.get("fleet")
    person.submit("/fleet/logout")
    thief = Person(centre)
    thief.cookies.set("fleet", kept)
    assert thief.get(f"{centre.url}/fleet", allow_redirects=False, timeout=30).status_code == 302


def test_a_session_ends_when_nobody_uses_it(tmp_path: Path) -> None:
    now = [1_800_000_000.0]
    fleet = Fleet(f"sqlite:///{tmp_path}/fleet.db", clock=lambda: now[0])
    accounts = Accounts(fleet, idle_s=600, absolute_s=3600)
    token = accounts.login("wang", accounts.add("wang"))
    assert token
    for _ in range(6):
        now[0] += 500
        assert accounts.resume(token) == "wang"
    now[0] += 601
    assert accounts.resume(token) is None  # idle
    token = accounts.login("wang", accounts.reset("wang")) or ""
    for _ in range(7):
        now[0] += 500
        accounts.resume(token)
    now[0] += 200
    assert accounts.resume(token) is None  # as old as a session may be
    fleet.close()


def test_an_operator_that_is_there_is_not_added_again(centre: Centre) -> None:
    accounts = Accounts(centre.fleet)
    password = accounts.add("zhao")
    with pytest.raises(SettingsError, match="zhao is an operator already"):
        accounts.add("zhao")
    assert accounts.login("zhao", password)
    assert accounts.login("zhao", accounts.reset("zhao"))
    assert accounts.login("zhao", password) is None
    accounts.remove("zhao")


def test_pages_say_what_a_browser_may_do_with_them(person: Person) -> None:
    headers = person.get(f"{person.base}/fleet", timeout=30).headers
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Strict-Transport-Security"]


# -- what it shows


def test_a_box_is_shown_with_its_models_its_failure_and_its_line(centre: Centre, person: Person) -> None:
    box = centre.box("clinic-7")
    failed = box_report("0.2.0", "failed", "model.self_test")
    report = failed | {"models": box_report("0.1.0")["models"]}
    assert box.send(box.report(1, box=report, sync={"state": "unreachable", "code": "sync.unreachable"})).status_code == 204
    page = person.see("/fleet?state=failed")
    assert "clinic-7" in page
    assert "the model failed its self-test" in page.lower()
    assert "The library cannot be reached" in page
    detail = person.see("/fleet/box/clinic-7")
    assert "0.1.0" in detail
    assert "model.self_test" in detail
    assert "onnxruntime 1.20.1" in detail
    assert person.see("/fleet/box/clinic-7").count("<h1>") == 1


def test_filters_find_boxes_by_ring_version_state_and_name(centre: Centre, person: Person) -> None:
    for name, ring, version in (("f-one", "stable", "0.1.0"), ("f-two", "canary", "0.2.0")):
        box = centre.box(name, ring)
        assert box.send(box.report(1, box=box_report(version))).status_code == 204
    centre.box("f-three", "canary")

    def found(query: str) -> set[str]:
        return set(re.findall(r'href="/fleet/box/(f-[a-z]+)"', person.see(f"/fleet?{query}")))

    assert found("name=f-") == {"f-one", "f-two", "f-three"}
    assert found("ring=canary") == {"f-two", "f-three"}
    assert found(f"version={LINE}@0.2.0") == {"f-two"}
    assert found("state=never") == {"f-three"}
    assert found("state=fine&name=f-o") == {"f-one"}
    centre.fleet.deny("f-one", "test")
    assert found("state=denied") == {"f-one"}
    centre.fleet.allow("f-one", "test")


@pytest.mark.parametrize(
    "query",
    [
        "page=0",
        "page=-1",
        "page=99999",
        "page=x",
        "state=zzz",
        "ring=%27--",
        "version=@@",
        "name=%25_%5C",
        "version=" + "a" * 2000,
        "name=%00",
    ],
)
def test_odd_questions_get_a_page(person: Person, query: str) -> None:
    answer = person.get(f"{person.base}/fleet?{query}", timeout=30)
    assert answer.status_code == 200
    assert "Traceback" not in answer.text


def test_a_name_that_is_no_box_is_not_found_in_words(person: Person) -> None:
    answer = person.get(f"{person.base}/fleet/box/nobody", headers={"Accept": "text/html"}, timeout=30)
    assert (answer.status_code, "no such page or box" in answer.text) == (404, True)


def test_a_silent_box_is_marked(centre: Centre, person: Person) -> None:
    from model_sync.fleet.tables import boxes

    box = centre.box("quiet-1")
    box.send(box.report(1))
    with centre.fleet.writing() as tx:
        tx.execute(boxes.update().where(boxes.c.box_id == "quiet-1").values(last_seen=centre.fleet.now() - 90_000))
    assert "quiet-1" in person.see("/fleet?state=silent")
    assert "Silent for over 24 h" in person.see("/fleet?name=quiet-1")


def test_a_box_that_follows_another_ring_is_marked_and_not_counted(centre: Centre, person: Person) -> None:
    box = centre.box("stray-1", "canary")
    box.send(box.report(1, ring="stable", box=box_report("0.2.0", "failed", "model.self_test")))
    assert "the box follows ring stable" in person.see("/fleet?name=stray-1")
    assert centre.fleet.tally("canary", LINE, "0.2.0").failed == 0
    centre.fleet.move("stray-1", "stable", "test")
    before = centre.fleet.tally("stable", LINE, "0.2.0").failed
    centre.fleet.move("stray-1", "canary", "test")
    assert centre.fleet.tally("stable", LINE, "0.2.0").failed == before - 1


def test_a_version_that_is_replaced_or_was_there_before_counts_as_what_runs(centre: Centre) -> None:
    box = centre.box("turn-1", "turn")
    first = box_report("0.1.0") | {"activations": []}
    box.send(box.report(1, ring="turn", box=first))
    assert centre.fleet.tally("turn", LINE, "0.1.0").running == 1
    box.send(box.report(2, ring="turn", box=box_report("0.2.0")))
    from model_sync.fleet.views import progress

    now = centre.fleet.now()
    assert progress(centre.fleet, "turn", LINE, "0.1.0", now - 3600, now + 1).now == 0
    assert progress(centre.fleet, "turn", LINE, "0.2.0", now - 3600, now + 1).now == 1


# -- the brake


def test_pause_and_resume_are_newly_signed_rollouts(centre: Centre, person: Person) -> None:
    page, before = person.see(), centre.site.library.published("rollout").signed.version  # type: ignore[union-attr]
    assert "Pause the rollout" in page
    assert person.submit("/fleet/pause", ring="stable", line=LINE, action="pause").status_code == 302
    assert "signed and published" in person.see()
    paused = step_of(centre)
    assert (paused.paused, paused.version, paused.percent) == (True, "0.2.0", 100.0)
    assert centre.site.library.published("rollout").signed.version == before + 1  # type: ignore[union-attr]
    assert centre.site.library.verify()
    assert "checked the failures" in person.see()
    person.submit("/fleet/pause", ring="stable", line=LINE, action="resume")
    assert step_of(centre).paused  # nobody said that they looked
    person.see()
    person.submit("/fleet/pause", ring="stable", line=LINE, action="resume", looked="yes", serial=str(before))
    assert "changed in the meantime" in person.see()
    assert step_of(centre).paused  # the page that was looked at is older than the pause
    person.submit("/fleet/pause", ring="stable", line=LINE, action="resume", looked="yes")
    resumed = step_of(centre)
    assert (resumed.paused, resumed.start) == (False, paused.start)
    assert [row["action"] for row in done(centre) if row["actor"] == "wang"][-2:] == ["paused", "resumed"]
    person.see()
    person.submit("/fleet/pause", ring="stable", line="nothing", action="pause")
    assert "Nothing was signed" in person.see()


def test_a_spent_failure_budget_pauses_the_rollout_at_the_report_that_spends_it(tmp_path: Path) -> None:
    centre = Centre(tmp_path / "centre", rollout_key=True)
    centre.site.publish(tiny_bundle(tmp_path, "0.1.0"))
    centre.site.rollout("stable", LINE, "0.1.0", 100.0, datetime.now(timezone.utc) - timedelta(hours=1), 0.0)
    centre.start()
    try:
        for number in range(4):
            box = centre.box(f"box-{number}")
            bad = number in (1, 3)
            told = box_report("0.1.0", "rolled-back" if bad else "good", "activation.failures" if bad else None)
            assert not step_of(centre).paused
            assert box.send(box.report(1, box=told)).status_code == 204
        until(lambda: any(row["action"] == "paused" for row in done(centre)))
        assert step_of(centre).paused  # two of four failed: above 5 %, and the two that the budget asks for
        row = next(row for row in done(centre) if row["action"] == "paused")
        assert (row["actor"], row["figures"]) == ("failure budget", "2/4")
        assert "paused" in centre.log.read_text()
        somebody = Person(centre, "zh")
        somebody.log_in("wang", centre.operator())
        assert "已暂停" in somebody.see()
    finally:
        centre.close()


def test_without_a_key_the_page_shows_commands_that_work(tmp_path: Path) -> None:
    centre = Centre(tmp_path / "centre", rollout_key=True)
    key, centre.rollout_key = centre.rollout_key, None
    centre.site.publish(tiny_bundle(tmp_path, "0.1.0"))
    centre.site.rollout("stable", LINE, "0.1.0", 50.0, datetime.now(timezone.utc) - timedelta(hours=1), 24.0)
    centre.start()
    try:
        for number in range(2):
            box = centre.box(f"box-{number}")
            for sequence in (1, 2):
                box.send(box.report(sequence, box=box_report("0.1.0", "failed", "model.self_test")))
        until(lambda: "nothing was paused" in centre.log.read_text())
        until(lambda: any(row["action"] == "budget-spent" for row in done(centre)))
        assert not step_of(centre).paused
        pause_policy = RolloutPausePolicy(centre.fleet, Rollouts(centre.site.library.files.directory, centre.fleet))
        assert pause_policy.check("stable")  # nothing to try again, and said once
        assert [row["action"] for row in done(centre)].count("budget-spent") == 1
        somebody = Person(centre)
        somebody.log_in("wang", centre.operator())
        page = somebody.see()
        assert "has no rollout key" in page
        assert "Pause the rollout</button>" not in page
        somebody.submit("/fleet/pause", ring="stable", line=LINE, action="pause")
        assert "Nothing was signed" in somebody.see()
        shown = re.findall(r"<pre[^>]*>([^<]+)</pre>", page)[0].splitlines()
        secrets = ["--online-passphrase-file", str(centre.directory / "passphrase")]
        model_library(*shlex.split(shown[0])[1:], *secrets)
        sign = [part.replace("ROLLOUT.pem", str(key)) for part in shlex.split(shown[1])[1:]]
        model_library(*sign, *secrets, "--passphrase-file", str(centre.directory / "passphrase"), "--yes")
        after = step_of(centre)
        assert (after.paused, after.percent, after.duration_h, after.version) == (True, 50.0, 24.0, "0.1.0")
    finally:
        centre.close()


def test_a_broken_library_stops_no_report_and_is_said(tmp_path: Path) -> None:
    centre = Centre(tmp_path / "centre", rollout_key=True)
    centre.site.publish(tiny_bundle(tmp_path, "0.1.0"))
    centre.site.rollout("stable", LINE, "0.1.0")
    centre.start()
    try:
        box = centre.box("box-1")
        (centre.site.public / "metadata" / "timestamp.json").write_text("garbage")
        assert box.send(box.report(1)).status_code == 204
        somebody = Person(centre)
        somebody.log_in("wang", centre.operator())
        assert "model-library verify" in somebody.see()
    finally:
        centre.close()


# -- ten thousand boxes


def test_ten_thousand_boxes_are_shown_by_few_queries(tmp_path: Path, postgres: Postgres) -> None:
    """Not a time, which depends on the machine: each query reads by an index or the fleet's tables once."""
    from sqlalchemy import event

    from model_sync.fleet import views as fleet_views

    for db in (f"sqlite:///{tmp_path}/fleet.db", postgres.database()):
        fleet = Fleet(db)
        step = RolloutStep(version="0.2.0", percent=50, start=datetime.now(timezone.utc) - timedelta(hours=10), duration_h=24)
        seed(fleet, 10_000, step, failures=0.02)
        statements: list[str] = []
        event.listen(fleet.engine, "before_cursor_execute", lambda *a, kept=statements: kept.append(a[2]))
        now, took = fleet.now(), []
        for _ in range(3):
            begin = time.perf_counter()
            counts = fleet_views.counts(fleet)
            rows = fleet_views.list_boxes(fleet, fleet_views.Filters(), 150)
            fleet_views.versions(fleet)
            shown = fleet_views.progress(fleet, "stable", LINE, "0.2.0", now - 36_000, now)
            took.append(time.perf_counter() - begin)
        assert counts["total"] == 10_000
        assert (rows.pages, len(rows.boxes), rows.page) == (200, 50, 150)
        assert shown.total > 9_000
        assert shown.running[-1] > 1_000
        assert shown.running == sorted(shown.running)
        assert len(statements) <= 3 * 9 + 6
        print(f"{db.partition(':')[0]}: {statistics.median(took) * 1000:.0f} ms")
        fleet.close()


# -- commands


def model_library(*arguments: str, code: int = 0) -> str:
    """Run the command in this process; returns what it said."""
    ended = run_here(cli.main, *arguments)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    return (ended.stderr if code else ended.stdout).strip()


def test_the_commands_of_the_central_team(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    centre = Centre(tmp_path / "centre").start()
    fleet = ("--db", centre.db)

    def run(*arguments: str) -> str:
        assert cli.main([*arguments, *fleet]) == 0
        return capsys.readouterr().out.strip()

    try:
        token = model_library("token", "new", "box-1", "--ring", "canary", *fleet)
        box = Box(centre, "box-1", "canary").enrol(token)
        run("deny", "box-1")
        assert box.send(box.report(1)).status_code == 403
        assert cli.main(["token", "new", "box-1", *fleet]) == 2
        assert "is denied" in capsys.readouterr().err
        run("allow", "box-1")
        assert box.send(box.report(1)).status_code == 204
        run("move", "box-1", "--ring", "stable")
        run("deny", "--serial", f"{box.certificate.serial_number:x}")
        assert box.send(box.report(2)).status_code == 403
        password = run("operator", "add", "zhao")
        somebody = Person(centre)
        assert somebody.log_in("zhao", password).status_code == 302
        assert "moved to the ring" in somebody.see()
        assert cli.main(["operator", "add", "zhao", *fleet]) == 2
        refused = capsys.readouterr()
        assert refused.out == ""
        assert "zhao is an operator already" in refused.err
        assert "model-library operator reset zhao" in refused.err
        assert "moved to the ring" in somebody.see(), "nothing was changed"
        again = run("operator", "reset", "zhao")
        assert again != password
        assert somebody.get(f"{centre.url}/fleet", allow_redirects=False, timeout=30).status_code == 302
        assert somebody.log_in("zhao", again).status_code == 302
        run("operator", "remove", "zhao")
        assert somebody.get(f"{centre.url}/fleet", allow_redirects=False, timeout=30).status_code == 302
        capsys.readouterr()
        for wrong in (("deny", "nobody"), ("allow", "nobody"), ("move", "nobody", "--ring", "x"), ("operator", "remove", "nobody"),
                      ("operator", "reset", "nobody"),
                      ("token", "new", "no name"), ("token", "new", "box-2", "--ring", "UP"), ("deny",),
                      ("operator", "add", "../x")):  # fmt: skip
            assert cli.main([*wrong, *fleet]) == 2
            assert capsys.readouterr().err.startswith("error:")
        for place, what in ((("--db", "mysql://x"), "cannot be opened"), (("--library", str(tmp_path)), "is no library")):
            assert cli.main(["allow", "x", *place]) == 2
            assert what in capsys.readouterr().err
    finally:
        centre.close()


def test_a_device_authority_is_made_once_and_kept_encrypted(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(PASSPHRASE)
    secret.chmod(0o600)
    arguments = ("device-ca", str(tmp_path / "ca"), "--passphrase-file", str(secret))
    model_library(*arguments)
    key = tmp_path / "ca" / "device-ca.key"
    assert "ENCRYPTED" in key.read_text()
    assert key.stat().st_mode & 0o077 == 0
    before = key.read_bytes()
    assert "exists already" in model_library(*arguments, code=2)
    assert key.read_bytes() == before
    secret.write_text("short")
    assert "at least 12" in model_library("device-ca", str(tmp_path / "other"), "--passphrase-file", str(secret), code=2)


# -- behind a proxy


def test_behind_nginx_the_certificate_that_it_saw_is_believed_and_no_other(tmp_path: Path) -> None:
    """TLS ends at nginx as docs/fleet.md has it; a header that a client writes itself is dropped."""
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    assert nginx, "nginx is missing: run `make setup-test`"
    centre = Centre(tmp_path / "centre").start("--behind-proxy", tls=False)
    inner = centre.url
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    wanted = re.findall(r"```nginx\n(.*?)```", (ROOT / "docs" / "fleet.md").read_text("utf-8"), re.DOTALL)[0]
    for old, new in (
        ("listen 443", f"listen 127.0.0.1:{port}"), ("/etc/model-library/tls.pem", f"{centre.directory}/tls.pem"),
        ("library.example", "localhost"),
        ("/etc/model-library/tls.key", f"{centre.directory}/tls.key"), ("/etc/model-library/device-ca", f"{centre.directory}/device-ca"),
        ("/srv/models/public", str(centre.site.public)), ("http://127.0.0.1:8443", inner),
    ):  # fmt: skip
        assert old in wanted
        wanted = wanted.replace(old, new)
    (tmp_path / "spool").mkdir()
    spool = "".join(f"{kind}_temp_path {tmp_path}/spool/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    user = "user root;\n" if os.geteuid() == 0 else ""
    head = f"{user}daemon off;\npid {tmp_path}/pid;\nerror_log {tmp_path}/error.log;\nevents {{}}\nhttp {{\naccess_log off;\n{spool}"
    (tmp_path / "nginx.conf").write_text(head + wanted + "}\n")
    process = subprocess.Popen([nginx, "-c", str(tmp_path / "nginx.conf"), "-e", str(tmp_path / "error.log")])
    try:
        centre.url = f"https://127.0.0.1:{port}"
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        box = centre.box("box-1")
        body = box.report(1)
        assert box.send(body).status_code == 204
        forged = {
            "Content-Type": "application/json",
            "X-Client-Certificate": requests.utils.quote(box.file.read_text().partition("KEY-----\n")[2]),
        }
        assert centre.post("/api/v1/reports", data=body, headers=forged).status_code == 401
        assert centre.get("/metadata/timestamp.json").headers["Server"].startswith("nginx")
        somebody = Person(centre)
        assert "Secure" in somebody.log_in("wang", centre.operator()).headers["Set-Cookie"]
        assert "Fleet" in somebody.see()
        centre.fleet.deny("box-1", "test")
        assert box.send(box.report(2)).status_code == 403
    finally:
        process.terminate()
        process.wait(20)
        centre.close()


# -- words


TEXTS = {code.removeprefix("fleet.") for code in WORDS}


def test_every_text_of_the_templates_exists_and_none_is_idle() -> None:
    used = set()
    sources = [*(ROOT / "model_sync" / "fleet" / "templates").glob("*.html"), ROOT / "model_sync" / "fleet" / "page.py"]
    whole = "\n".join(path.read_text("utf-8") for path in sources)
    for key in re.findall(r"\b_?t\([\"']([a-z0-9._-]+)[\"']", whole) + re.findall(r'"((?:done|rollout)\.[a-z_]+)"', whole):
        used.add(key)
    made = tuple(re.findall(r'\bt\("([a-z]+\.)" ~', whole))
    assert {key for key in used if not key.endswith(".")} - TEXTS == set()
    assert [key for key in TEXTS if key not in used and not key.startswith(made)] == []


def test_every_action_and_state_that_can_be_shown_has_words(centre: Centre) -> None:

    from model_sync.agent.report import ModelState
    from model_sync.agent.sync_status import SyncState
    from model_sync.fleet.views import STATES

    states = {state.value for state in ModelState}
    assert {f"model.{state}" for state in states} <= TEXTS
    assert {f"sync.{state}" for state in SyncState} <= TEXTS
    assert {f"state.{state}" for state in STATES} <= TEXTS
    assert {f"action.{row['action']}" for row in done(centre)} <= TEXTS
