"""The pages of the accounts: the security administrator, the technician, the second factor, and confirming."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pyotp
import pytest

from appliance.core.roles import Role
from appliance.core.settings import Settings
from appliance.store.accounts import Accounts
from appliance.store.logins import Logins
from tests.support.scans import scan_bytes
from tests.support.web_box import PASSWORD, Box, Person, in_process, own_password, wait_for


@pytest.fixture
def box(settings: Settings, quick_passwords: None) -> Iterator[Box]:
    with in_process(settings) as running:
        yield running


def one_time_password(page: str) -> str:
    return re.findall(r'id="one-time-password">([^<]+)<', page)[0]


def test_the_security_administrator_manages_accounts(box: Box) -> None:
    chief = box.person("chief", Role.SECURITY_ADMINISTRATOR)
    assert chief.get("/").headers["Location"] == "/accounts"
    chief.open("/accounts")
    made = chief.post("/accounts", data={"username": "wang", "role": "clinician"})
    password = one_time_password(made.text)
    wang = box.accounts.require("wang")
    doctor = Person(box.base).speak("en")
    assert doctor.log_in("wang", password).headers["Location"] == "/"
    page = chief.open(f"/accounts/{wang.id}")
    assert "127.0.0.1" in page
    for path, data, after in (
        ("role", {"role": "technician"}, lambda: box.accounts.require("wang").role is Role.TECHNICIAN),
        ("disable", {}, lambda: not box.accounts.require("wang").is_active),
        ("enable", {}, lambda: box.accounts.require("wang").is_active),
        ("second-factor", {}, lambda: not box.accounts.require("wang").has_second_factor),
        ("sessions/end", {}, lambda: True),
    ):
        answer = chief.post(f"/accounts/{wang.id}/{path}", data=data)
        assert answer.headers["Location"] == f"/accounts/{wang.id}"
        assert after()
    assert "Changed. It is in the audit." in chief.open(f"/accounts/{wang.id}")
    assert doctor.get("/").headers["Location"] == "/login"
    for bad, said in (({"username": "wang", "role": "clinician"}, "already an account"),
                      ({"username": "a b", "role": "clinician"}, "cannot be"),
                      ({"username": "new", "role": "root"}, "no such role"), ({}, "no such role")):  # fmt: skip
        answer = chief.post("/accounts", data=bad)
        assert answer.status_code == 422
        assert said in answer.text
    me = box.accounts.require("chief")
    refused = chief.post(f"/accounts/{me.id}/disable")
    assert refused.status_code == 422
    assert "last security administrator" in refused.text
    assert chief.get("/accounts/999").status_code == 404


def test_one_session_is_ended_and_the_others_go_on(box: Box) -> None:
    chief = box.person("chief", Role.SECURITY_ADMINISTRATOR)
    first = box.person("wang")
    second = Person(box.base).speak("en")
    assert second.log_in("wang", PASSWORD).status_code == 302
    wang = box.accounts.require("wang")
    newest = re.findall(r'data-session="(\d+)"', chief.open(f"/accounts/{wang.id}"))[0]
    chief.post(f"/accounts/{wang.id}/sessions/end", data={"session": newest})
    assert second.get("/").headers["Location"] == "/login"
    assert first.get("/").status_code == 200


@pytest.mark.parametrize("role", [Role.TECHNICIAN, Role.SYSTEM_ADMINISTRATOR])
def test_the_technician_gives_clinicians_one_time_passwords_and_nobody_else(box: Box, role: Role) -> None:
    doctor = box.person("wang")
    chief_id = (box.accounts.add("chief", Role.SECURITY_ADMINISTRATOR, "test"), box.accounts.require("chief").id)[1]
    helper = box.person("zhao", role)
    page = helper.open("/accounts")
    assert 'data-account="wang"' in page
    assert 'data-account="chief"' not in page
    wang = box.accounts.require("wang")
    password = one_time_password(helper.post(f"/accounts/{wang.id}/password").text)
    assert doctor.get("/").headers["Location"] == "/login"
    assert Person(box.base).log_in("wang", password).headers["Location"] == "/"
    assert helper.post(f"/accounts/{chief_id}/password").status_code == 403
    assert helper.post("/accounts", data={"username": "x", "role": "clinician"}).status_code == 403


def test_r4_a_technician_sets_up_a_second_factor_before_anything_else(box: Box) -> None:
    own_password(box.accounts, "zhao", Role.TECHNICIAN)
    person = Person(box.base).speak("en")
    assert person.log_in("zhao", PASSWORD).status_code == 302
    for path in ("/health", "/accounts", "/password"):
        assert person.get(path).headers["Location"] == "/second-factor/set-up"
    assert person.get("/api/v1/revision").json()["code"] == "web.second_factor_set_up_required"
    page = person.open("/second-factor/set-up")
    assert 'src="data:image/svg+xml' in page
    secret = re.findall(r"<code>([A-Z2-7 ]+)</code>", page)[0].replace(" ", "")
    wrong = person.post("/second-factor/set-up", data={"code": "000000"})
    assert wrong.status_code == 422
    assert "The code does not fit" in wrong.text
    totp = pyotp.TOTP(secret)
    done = person.post("/second-factor/set-up", data={"code": totp.now()})
    codes = re.findall(r"<li><code>([a-z2-9-]+)</code>", done.text)
    assert len(codes) == 8
    assert person.get("/").headers["Location"] == "/health"
    again = Person(box.base).speak("en")
    assert again.log_in("zhao", PASSWORD).headers["Location"].startswith("/second-factor?next=")
    assert again.get("/health").headers["Location"] == "/second-factor"
    assert again.get("/api/v1/revision").json()["code"] == "web.second_factor_required"
    again.open("/second-factor")
    assert again.post("/second-factor", data={"code": totp.now()}).status_code == 401  # used when it was set up
    assert again.post("/second-factor", data={"code": codes[0]}).status_code == 302
    assert again.get("/health").status_code == 200
    assert again.get("/second-factor").headers["Location"] == "/"
    assert "7 recovery codes are left" in again.open("/second-factor/set-up")


def test_r4_a_session_that_waits_at_the_set_up_ends_when_the_owner_sets_it_up_elsewhere(box: Box) -> None:
    own_password(box.accounts, "zhao", Role.TECHNICIAN)
    guest, owner = Person(box.base).speak("en"), Person(box.base).speak("en")
    for person in (guest, owner):
        assert person.log_in("zhao", PASSWORD).status_code == 302
        assert person.get("/health").headers["Location"] == "/second-factor/set-up"
    secret = re.findall(r"<code>([A-Z2-7 ]+)</code>", owner.open("/second-factor/set-up"))[0].replace(" ", "")
    assert owner.post("/second-factor/set-up", data={"code": pyotp.TOTP(secret).now()}).status_code == 200
    assert owner.get("/health").status_code == 200
    assert guest.get("/health").headers["Location"].startswith("/login")


def test_r4_a_clinician_may_set_one_up_and_keeps_it_with_a_new_password(box: Box) -> None:
    person = box.person("wang")
    page = person.open("/second-factor/set-up")
    secret = re.findall(r"<code>([A-Z2-7 ]+)</code>", page)[0].replace(" ", "")
    assert person.post("/second-factor/set-up", data={"code": pyotp.TOTP(secret).now()}).status_code == 200
    person.open("/password")
    changed = person.post("/password", data={"old": PASSWORD, "new": "Another-Pass-1", "again": "Another-Pass-1"})
    assert changed.headers["Location"] == "/"
    assert person.get("/").status_code == 200
    assert Person(box.base).log_in("wang", "Another-Pass-1").headers["Location"].startswith("/second-factor")


def test_r8_dangerous_actions_ask_for_the_password_again(settings: Settings, quick_passwords: None) -> None:
    with in_process(settings.model_copy(update={"confirmation_s": 0.001})) as box:
        chief = box.person("chief", Role.SECURITY_ADMINISTRATOR)
        code = box.second_factor("chief")
        box.accounts.add("wang", Role.CLINICIAN, "test")
        wang = box.accounts.require("wang")
        for path in (f"/accounts/{wang.id}/disable", f"/accounts/{wang.id}/role", f"/accounts/{wang.id}/sessions/end"):
            assert chief.post(path).headers["Location"] == f"/confirm?next=/accounts/{wang.id}"
        for path in ("/accounts", f"/accounts/{wang.id}/password"):
            assert chief.post(path).headers["Location"] == "/confirm?next=/accounts"
        assert box.accounts.require("wang").is_active
        chief.open("/confirm?next=/accounts")
        for values in ({"password": "wrong", "code": code}, {"password": PASSWORD, "code": "000000"}, {"password": PASSWORD}, {}):
            assert chief.post("/confirm", data=values).status_code == 422
        right = chief.post("/confirm?next=/accounts", data={"password": PASSWORD, "code": code})
        assert right.headers["Location"] == "/accounts"
        assert "Press the button once more" in chief.open("/accounts")


def test_a_login_page_of_a_new_box_says_how_the_first_account_is_made(settings: Settings, quick_passwords: None) -> None:
    with in_process(settings) as box:
        assert "appliance user add NAME" in Person(box.base).speak("en").open("/login")
        box.accounts.add("chief", Role.SECURITY_ADMINISTRATOR, "test")
        page = Person(box.base).speak("en").open("/login")
        assert "appliance user add" not in page
        assert "The technician or the security administrator" in page


def test_the_login_page_names_whom_to_ask(settings: Settings, quick_passwords: None) -> None:
    with in_process(settings.model_copy(update={"help_contact": "Zhao <8123>"})) as box:
        box.person()
        assert "Ask Zhao &lt;8123&gt; for a one-time password" in Person(box.base).speak("en").open("/login")


def test_r2_a_password_that_is_due_is_changed_before_anything_else(settings: Settings, quick_passwords: None) -> None:
    with in_process(settings.model_copy(update={"password_profile": "mlps3"})) as box:
        person = box.person("wang")
        with box.store.database.transaction() as tx:
            tx.execute("UPDATE users SET password_set_at = printf('%.3f 0 -', ?)", (Accounts(box.store).clock.wall_s() - 91 * 86400,))
        assert person.get("/").headers["Location"] == "/password"
        page = person.open("/password")
        assert "older than 90 days" in page
        assert "of three kinds" in page
        answer = person.post("/password", data={"old": PASSWORD, "new": "another pass one", "again": "another pass one"})
        assert "three of these" in answer.text
        assert person.post("/password", data={"old": PASSWORD, "new": "Another-Pass-1", "again": "Another-Pass-1"}).status_code == 302
        assert person.get("/").status_code == 200


def test_r15_logging_out_and_resetting_leave_nothing_in_browser_and_database(box: Box) -> None:
    person = box.person("wang")
    out = person.post("/logout")
    assert out.headers["Clear-Site-Data"] == '"cache"'
    assert person.get("/api/v1/revision").status_code == 401
    box.person("wang")
    box.accounts.issue_one_time_password("wang", "test")
    assert Logins(box.store, box.accounts).sessions(box.accounts.require("wang")) == []
    assert box.store.database.number("SELECT count(*) FROM sessions") == 0


def test_r7_emergency_access_from_the_page_to_the_alarm_and_its_end(box: Box) -> None:
    study = box.take(scan_bytes()).study_id
    chief, zhao = box.person("chief", Role.SECURITY_ADMINISTRATOR), box.person("zhao", Role.TECHNICIAN)
    assert zhao.get(f"/studies/{study}").status_code == 403
    zhao.open("/emergency")
    refused = zhao.post("/emergency", data={"reason": "short"})
    assert refused.status_code == 422
    assert "reason is too short" in refused.text
    assert zhao.get(f"/studies/{study}").status_code == 403
    assert zhao.post("/emergency", data={"reason": "CANARY reason, no clinician here"}).headers["Location"] == "/"
    assert "Emergency access to patients: 30 minutes left." in zhao.open("/")
    assert zhao.get(f"/studies/{study}").status_code == 200
    assert zhao.get("/accounts").status_code == 200  # the work of the own role goes on
    assert zhao.post("/accounts").status_code == 403
    for person in (box.person("wang"), box.person("auditor", Role.AUDITOR)):
        page = person.open("/health")
        assert "Emergency access to patients by zhao, running since" in page
        assert "CANARY" not in page
    page = chief.open("/accounts")
    assert "CANARY reason" in page
    (number,) = re.findall(r'data-emergency="(\d+)"', page)
    assert chief.post(f"/emergency/{number}/acknowledge").status_code == 409
    zhao.open("/emergency")
    assert zhao.post("/emergency/end").headers["Location"] == "/health"
    assert zhao.get(f"/studies/{study}").status_code == 403
    assert "begun" in zhao.open("/health")
    assert chief.post(f"/emergency/{number}/acknowledge").headers["Location"] == "/accounts"
    assert "Emergency access to patients by" not in zhao.open("/health")
    assert chief.post("/emergency/999/acknowledge").status_code == 404


@pytest.mark.parametrize("role", [Role.CLINICIAN, Role.SECURITY_ADMINISTRATOR, Role.AUDITOR])
def test_r7_other_roles_have_no_emergency_access(box: Box, role: Role) -> None:
    person = box.person("somebody", role)
    assert person.get("/emergency").status_code == 403
    assert person.post("/emergency", data={"reason": "no clinician can be reached"}).status_code == 403


def test_r7_emergency_access_ends_by_itself_on_the_pages(settings: Settings, quick_passwords: None) -> None:
    with in_process(settings.model_copy(update={"emergency_access_s": 1.0})) as box:
        zhao = box.person("zhao", Role.TECHNICIAN)
        zhao.open("/emergency")
        assert zhao.post("/emergency", data={"reason": "no clinician can be reached"}).status_code == 302
        wait_for(lambda: zhao.get("/api/v1/revision").status_code == 403)
