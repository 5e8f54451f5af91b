"""Who gets in: passwords, lockout, CSRF, sessions, roles, host names, and the headers on every answer."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from requests.adapters import HTTPAdapter

from appliance.core.settings import Settings
from appliance.store import passwords
from appliance.store.logins import Logins
from model_sync import login_throttle
from model_sync.login_throttle import MAX_FAILURES, SLOW_AFTER, SUSPECT_AFTER, machine_of
from tests.support.scans import scan_bytes
from tests.support.web_box import PASSWORD, Box, Person, in_process
from webui.server.access import OPEN_ENDPOINTS
from webui.server.security import CONTENT_SECURITY_POLICY


@pytest.fixture
def box(settings: Settings) -> Iterator[Box]:
    with in_process(settings) as running:
        yield running


def test_the_one_time_password_must_be_changed_before_anything_else(box: Box) -> None:
    one_time = box.accounts.add("doctor", "clinician", "test")
    person = Person(box.base).speak("en")
    assert person.log_in("doctor", one_time).headers["Location"] == "/"
    assert person.get("/").headers["Location"] == "/password"
    assert person.get("/api/v1/revision").json()["code"] == "web.password_change_required"
    assert "one-time password works only once" in person.open("/password")
    for new, again, said in (
        ("short", "short", "at least 8 characters, 4 of them different. Choose another one."),
        (one_time, one_time, "was used before"),
        ("clinicbox1", "clinicbox1", "guessed first"),
        (PASSWORD, "other", "differ"),
        ("xyz1" * 75,) * 2 + ("longer than 256",),
    ):
        answer = person.post("/password", data={"old": one_time, "new": new, "again": again})
        assert answer.status_code == 422
        assert said in answer.text
    wrong = person.post("/password", data={"old": "wrong", "new": PASSWORD, "again": PASSWORD})
    assert "current password is wrong" in wrong.text
    before = person.cookies["clinicbox"]
    assert person.post("/password", data={"old": one_time, "new": PASSWORD, "again": PASSWORD}).headers["Location"] == "/"
    assert "Your new password is set" in person.open("/")
    stale = Person(box.base)
    stale.cookies.set("clinicbox", before)
    assert stale.get("/").headers["Location"] == "/login"
    assert Person(box.base).log_in("doctor", one_time).status_code == 401


def test_r3_the_same_words_for_every_failed_login_and_a_lock_after_five(box: Box) -> None:
    box.person()
    texts = set()
    for name, password in (
        ("nobody", "x"),
        ("doctor", "wrong"),
        *[("doctor", "wrong")] * (MAX_FAILURES - 1),
        ("doctor", PASSWORD),
        ("doctor", "y" * 9999),
    ):
        person = Person(box.base).speak("en")
        answer = person.log_in(name, password)
        assert answer.status_code == 401
        texts.add(re.sub(r'(content|value)="[^"]*"| autofocus', "", answer.text))
    assert len(texts) == 1
    assert "password is wrong, or the account is locked" in texts.pop()


def test_a_session_is_fresh_after_login_and_dead_after_logout(box: Box) -> None:
    box.person("other")
    person = Person(box.base)
    person.open("/login")
    before = person.cookies["clinicbox"]
    assert person.log_in("other", PASSWORD).status_code == 302
    assert person.cookies["clinicbox"] != before
    held = person.cookies["clinicbox"]
    assert person.get("/login").headers["Location"] == "/"
    person.open("/")
    assert person.post("/logout").headers["Location"] == "/login"
    thief = Person(box.base)
    thief.cookies.set("clinicbox", held)
    assert thief.get("/").headers["Location"] == "/login"


@pytest.mark.parametrize(
    ("wanted", "reached"),
    [
        ("/studies/1", "/studies/1"), ("//evil.example/", "/"), ("https://evil.example/", "/"), ("/\\evil.example", "/"),
        ("javascript:alert(1)", "/"), ("/upload?a=1", "/upload?a=1"), ("/\nevil", "/"), ("", "/"),
    ],
)  # fmt: skip
def test_after_login_only_to_a_page_of_this_box(box: Box, wanted: str, reached: str) -> None:
    box.person()
    person = Person(box.base)
    person.open("/login")
    answer = person.post("/login", params={"next": wanted}, data={"username": "doctor", "password": PASSWORD})
    assert answer.headers["Location"] == reached


def test_pages_lead_to_the_login_and_programs_get_401(box: Box) -> None:
    person = Person(box.base)
    assert person.get("/studies/7").headers["Location"] == "/login?next=/studies/7"
    assert person.get("/no/such/page").headers["Location"] == "/login"
    answer = person.get("/api/instances/1/pixels")
    assert (answer.status_code, answer.headers["Content-Type"]) == (401, "application/problem+json")
    assert person.get("/", headers={"X-Background": "1"}).status_code == 401
    assert person.get("/healthz").json() == {"status": "ok"}


def test_r6_every_route_needs_a_login_but_the_listed(box: Box) -> None:
    from webui import create_app

    app = create_app(box.settings)
    stranger = Person(box.base)
    stranger.open("/login")
    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(int:)?\w+>", "1", rule.rule)
        for method in (rule.methods or set()) - {"OPTIONS", "HEAD"}:
            answer = stranger.request(method, path, headers={"Tus-Resumable": "1.0.0"})
            closed = (answer.status_code == 401 and rule.rule != "/login") or answer.headers.get("Location", "").startswith("/login")
            assert closed != (rule.endpoint in OPEN_ENDPOINTS), (method, rule.rule, answer.status_code)
    app.extensions["box"].stop()


def test_nothing_is_changed_without_the_csrf_token(box: Box) -> None:
    person = box.person()
    person.token = ""
    for path in ("/logout", "/language", "/password", "/", "/api/v1/tus", "/api/v1/uploads", "/api/v1/uploads/close", "/studies/1/retry",
                 "/studies/1/urgent", "/api/v1/studies/1/urgent", "/studies/1/routine", "/api/v1/studies/1/routine"):  # fmt: skip
        answer = person.post(path, headers={"Tus-Resumable": "1.0.0", "Upload-Length": "1"}, data=b"")
        assert answer.status_code == 400, path
    assert "reload it and try again" in person.post("/logout").text
    assert person.get("/").status_code == 200


def test_r5_a_page_that_refreshes_itself_keeps_nobody_logged_in(settings: Settings) -> None:
    with in_process(settings.model_copy(update={"session_idle_s": 1.5})) as box:
        person = box.person()
        limit = time.monotonic() + 60
        while (answer := person.get("/api/v1/revision", headers={"X-Background": "1"})).status_code == 200:
            assert time.monotonic() < limit
            time.sleep(0.1)
        assert answer.status_code == 401


def test_headers_of_every_answer(box: Box) -> None:
    person = box.person()
    for path in ("/", "/login", "/health", "/nothing", "/api/v1/revision", "/static/favicon.svg", "/healthz"):
        headers = person.get(path).headers
        assert headers["Content-Security-Policy"] == CONTENT_SECURITY_POLICY
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["X-Frame-Options"] == "DENY"
        if "static" not in path:
            assert headers["Cache-Control"] == "no-store"
    assert "unsafe-eval" not in CONTENT_SECURITY_POLICY.replace("wasm-unsafe-eval", "")
    assert "unsafe-inline" not in CONTENT_SECURITY_POLICY
    cookie = Person(box.base).get("/login").headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie


def test_pages_hold_no_inline_script_or_style_and_load_nothing_from_outside(box: Box) -> None:
    box.take(scan_bytes())
    person = box.person()
    for path in ("/login", "/password", "/", "/studies/1", "/upload", "/rejected", "/health", "/nothing"):
        page = (Person(box.base) if path == "/login" else person).get(path).text
        assert not re.search(r"<script(?![^>]*\bsrc=)", page), path
        assert not re.search(r"<style|\sstyle=|\son\w+=", page), path
        assert not re.search(r"(src|href|action)=\"(https?:)?//", page), path


@pytest.mark.parametrize(
    ("host", "status"), [("evil.example", 400), ("evil.example:80", 400), ("127.0.0.1", 200), ("localhost:1", 200), ("[::1]", 200)]
)
def test_only_names_of_this_box_are_answered(box: Box, host: str, status: int) -> None:
    answer = requests.get(box.base + "/login", headers={"Host": host}, timeout=10)
    assert answer.status_code == status


def test_a_crowd_at_the_door_is_told_to_wait(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    one_time = box.accounts.add("doctor", "clinician", "test")
    person = Person(box.base).speak("en")
    assert person.log_in("doctor", one_time).status_code == 302
    monkeypatch.setattr(login_throttle, "_PLACE_WAIT_S", 0.05)
    with box.queue._checks, box.queue._checks:
        crowd = Person(box.base).speak("en").log_in("doctor", "x")
        person.open("/password")
        change = person.post("/password", data={"old": one_time, "new": PASSWORD, "again": PASSWORD})
    for answer in (crowd, change):
        assert answer.status_code == 429
        assert "Wait a moment" in answer.text


def test_r3_machines_that_guess_take_neither_the_places_nor_the_threads_of_others(box: Box) -> None:
    box.person()
    for _ in range(SUSPECT_AFTER):
        box.throttle.add_failure("nobody", "", "127.0.6.1")
    guesser = from_address(box, "127.0.6.1")
    with box.queue._waiting_suspects, box.queue._waiting_suspects, box.queue._waiting_suspects:
        assert guesser.log_in("doctor", PASSWORD).status_code == 429  # at once: it does not hold a thread
        assert Person(box.base).log_in("doctor", PASSWORD).status_code == 302
    with box.queue._checks_of_suspects:
        assert Person(box.base).log_in("doctor", PASSWORD).status_code == 302
    assert guesser.log_in("doctor", PASSWORD).status_code == 302


def test_the_language_is_switched_and_remembered(box: Box) -> None:
    person = Person(box.base)
    assert 'lang="zh-CN"' in person.open("/login")
    assert person.post("/language", data={"language": "en", "next": "/login"}).headers["Location"] == "/login"
    assert 'lang="en"' in person.open("/login")
    assert person.post("/language", data={"language": "fr"}).status_code == 400


def test_the_signing_key_is_kept_and_private(box: Box) -> None:
    key = box.settings.data_dir / "keys" / "web.key"
    assert key.stat().st_mode & 0o777 == 0o600
    person, kept = box.person(), key.read_bytes()
    with in_process(box.settings) as again:
        person.base = again.base
        assert person.get("/").status_code == 200
    assert key.read_bytes() == kept


def from_address(box: Box, address: str) -> Person:
    """Somebody at another machine."""

    class Elsewhere(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **options: Any) -> None:
            super().init_poolmanager(*args, source_address=(address, 0), **options)

    person = Person(box.base).speak("en")
    person.mount("http://", Elsewhere())
    return person


def audited(box: Box, *words: str) -> int:
    return sum(all(word in row["entry"] for word in words) for row in box.store.database.query("SELECT entry FROM audit"))


def test_r3_failures_lock_a_name_for_their_own_address_and_keep_nobody_else_out(box: Box) -> None:
    owner = box.person()
    attacker = from_address(box, "127.0.0.2")
    for _ in range(MAX_FAILURES + 2):
        assert attacker.log_in("Doctor", "wrong").status_code == 401
    assert attacker.log_in("doctor", PASSWORD).status_code == 401
    assert owner.get("/").status_code == 200
    assert Person(box.base).log_in("doctor", PASSWORD).status_code == 302
    assert attacker.log_in("doctor", PASSWORD).status_code == 401
    assert audited(box, '"110114"', "127.0.0.2", '"locked": true') + audited(box, '"110114"', "127.0.0.2", '"locked":true') == 4


def test_r3_a_name_guessed_from_many_addresses_is_slowed_and_its_owner_gets_in(box: Box) -> None:
    owner = box.person()
    for number in range(5):
        guesser = from_address(box, f"127.0.1.{number + 1}")
        for _ in range(MAX_FAILURES - 1):
            assert guesser.log_in("doctor", "wrong").status_code == 401
    assert box.throttle.wait_s("doctor", "127.0.2.1") == 0
    assert box.throttle.wait_s("doctor", "127.0.2.2") > 0  # the turn after that one
    owner.post("/logout")
    assert owner.log_in("doctor", PASSWORD).status_code == 302  # at the usual PC nobody waits
    assert from_address(box, "127.0.3.1").log_in("doctor", PASSWORD).status_code == 302  # from another address, after a moment


def test_r3_more_guesses_than_turns_are_asked_to_wait_whatever_the_name(box: Box) -> None:
    box.person()
    for name in ("doctor", "nobody"):
        for number in range(SLOW_AFTER + 1):
            box.throttle.add_failure(name, "", f"10.0.1.{number}")
        while box.throttle.wait_s(name, "10.0.0.1") is not None:
            pass
        answer = from_address(box, "127.0.4.1").log_in(name, PASSWORD)
        assert answer.status_code == 429
        assert "Wait a moment" in answer.text


WRONG = {"/password": {"old": "wrong", "new": "Another-Pass-1", "again": "Another-Pass-1"}, "/confirm": {"password": "wrong"}}


@pytest.mark.parametrize("path", WRONG)
def test_r3_whoever_guesses_at_an_open_session_loses_it_and_does_not_lock_its_owner_out(box: Box, path: str) -> None:
    left_open = box.person()
    before = audited(box, '"110114"', "doctor")
    for _ in range(MAX_FAILURES - 1):
        answer = left_open.post(path, data=WRONG[path])
        assert answer.status_code == 422
        assert "wrong" in answer.text
    answer = left_open.post(path, data=WRONG[path])
    assert answer.headers["Location"] == "/login"
    assert "typed five times; you are logged out. Log in again." in left_open.open("/login")
    assert left_open.get("/").headers["Location"].startswith("/login")
    assert audited(box, '"110114"', "doctor") == before + MAX_FAILURES + 1  # the end of the session has an entry of its own
    assert audited(box, '"account.session_ended"', '"110123"') == 1
    assert Person(box.base).log_in("doctor", PASSWORD).status_code == 302  # at the same machine
    assert box.throttle.wait_s("doctor", "127.0.0.9") == 0


def test_r3_the_right_password_forgets_the_wrong_ones_of_a_session(box: Box) -> None:
    person = box.person()
    for _ in range(2):
        for _ in range(MAX_FAILURES - 1):
            assert person.post("/confirm", data=WRONG["/confirm"]).status_code == 422
        assert person.post("/confirm", data={"password": PASSWORD}).status_code == 302
    for _ in range(2):
        for _ in range(MAX_FAILURES - 1):
            assert person.post("/password", data=WRONG["/password"]).status_code == 422
        weak = person.post("/password", data={"old": PASSWORD, "new": "short", "again": "short"})
        assert "at least 8 characters" in weak.text


def test_r3_guesses_at_one_session_in_the_same_moment_are_all_counted(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.person()
    account = box.accounts.require("doctor")
    logins = Logins(box.store, box.accounts)
    (session,) = logins.sessions(account)
    verify, checked = passwords.verify_password, []

    def slowly(password_hash: str, password: str) -> bool:
        checked.append(password)
        if len(checked) < 20:
            logins.confirm(session, "", f"guess {len(checked)}", "")
        return verify(password_hash, password)

    monkeypatch.setattr(passwords, "verify_password", slowly)
    assert not logins.confirm(session, "", "guess 0", "")
    assert len(checked) == MAX_FAILURES
    assert logins.sessions(account) == []


@pytest.mark.parametrize("number", [2**63, 10**40, "٣" * 30])
def test_numbers_that_no_row_can_have_are_no_address(box: Box, number: object) -> None:
    person = box.person()
    for path in ("/studies/{}", "/api/instances/{}/pixels", "/api/instances/1/frames/{}", "/api/findings/{}/heatmap.png"):
        assert person.get(path.format(number)).status_code == 404, path
    assert person.get(f"/?before={number}").status_code == 200
    assert person.post(f"/studies/{number}/retry").status_code == 404
    assert person.post(f"/studies/{number}/urgent").status_code == 404
    assert person.get(f"/studies/{2**63 - 1}").status_code == 404


@pytest.mark.parametrize(
    ("host", "counted"),
    [
        ("10.0.0.7", "10.0.0.7"), ("::ffff:10.0.0.7", "10.0.0.7"), ("2001:db8::1:2:3:4", "2001:db8::/64"), ("fe80::1%eth0", "fe80::1"),
        ("::1", "::1"), ("", ""), ("unix", "unix"),
    ],
)  # fmt: skip
def test_which_machine_an_address_stands_for(host: str, counted: str) -> None:
    assert machine_of(host) == counted
