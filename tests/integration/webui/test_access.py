"""The route x role matrix: every route, every method, every role, over HTTP (R6)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from werkzeug.routing import Rule

from appliance.core.roles import Role
from appliance.core.settings import Settings
from tests.support.access_table import access_table
from tests.support.scans import scan_bytes
from tests.support.web_box import ROOT, TUS, Box, in_process
from webui import create_app
from webui.server.access import ACCESS, HOME, OPEN_ENDPOINTS, may_use


@pytest.fixture
def box(settings: Settings) -> Iterator[Box]:
    with in_process(settings) as running:
        yield running


@pytest.fixture
def rules(settings: Settings) -> Iterator[list[Rule]]:
    app = create_app(settings)
    yield list(app.url_map.iter_rules())
    app.extensions["box"].stop()
    app.extensions["box"].store.close()


def test_r6_the_matrix_names_every_endpoint_and_no_other(rules: list[Rule]) -> None:
    assert {rule.endpoint for rule in rules} == OPEN_ENDPOINTS | set(ACCESS)
    assert not OPEN_ENDPOINTS & set(ACCESS)
    assert all(ACCESS.values())
    assert set(HOME) == set(Role)
    assert all(may_use(role, endpoint) for role, endpoint in HOME.items())


def test_r6_the_table_in_the_docs_is_the_matrix(settings: Settings) -> None:
    app = create_app(settings)
    assert (ROOT / "docs" / "access.md").read_text("utf-8") == access_table(app), "make it again as its first line says"
    app.extensions["box"].stop()
    app.extensions["box"].store.close()


def test_r6_only_a_clinician_sees_patients() -> None:
    groups = ("worklist.", "study.", "image_api.", "tus.", "upload.", "urgency.", "results_api.")
    about_patients = {endpoint for endpoint in ACCESS if endpoint.startswith(groups)}
    assert len(about_patients) > 20
    assert {endpoint for endpoint in ACCESS if ACCESS[endpoint] == {Role.CLINICIAN}} == about_patients | {"admin.rejected"}


@pytest.mark.parametrize("role", Role)
def test_r6_every_route_answers_each_role_as_the_matrix_says(box: Box, rules: list[Rule], role: Role) -> None:
    box.take(scan_bytes())
    person = box.person(f"p-{role}", role)
    asked = 0
    for rule in rules:
        if rule.endpoint in OPEN_ENDPOINTS | {"auth.logout"}:
            continue
        path = re.sub(r"<(?:\w+:)?\w+>", "1", rule.rule.replace("<int:account_id>", "999"))  # no account: nobody ends this session
        for method in (rule.methods or set()) - {"OPTIONS", "HEAD"}:
            answer = person.request(method, path, headers={"Tus-Resumable": "1.0.0"})
            home = urlsplit(answer.headers.get("Location", "")).path
            is_led_home = rule.endpoint == "worklist.show" and answer.status_code == 302 and home != "/login"
            assert (answer.status_code != 403 and not is_led_home) == may_use(role, rule.endpoint), (role, method, path, answer.status_code)
            assert answer.status_code != 401
            asked += 1
    assert asked > 25
    assert person.get("/no/such/page").status_code == 404


@pytest.mark.parametrize("role", sorted(set(Role) - {Role.CLINICIAN}))
def test_r6_a_role_without_patients_sees_none_of_them_on_its_pages(box: Box, role: Role) -> None:
    box.take(scan_bytes())
    person = box.person(f"p-{role}", role)
    start = person.get("/").headers["Location"]
    page = person.open(start)
    for word in ("Refused files", "Upload", "Worklist"):
        assert f">{word}</a>" not in page
    assert person.post("/", headers=TUS).status_code == 403


CONFIRMED = {
    "second_factor.set_up", "emergency.begin", "emergency.acknowledge", "accounts.add", "accounts.issue_password", "accounts.set_role",
    "accounts.disable", "accounts.enable", "accounts.remove_second_factor", "accounts.end_sessions", "accounts.issue_token",
    "accounts.revoke_token",
}  # fmt: skip
# None of these exports, rolls a model back or touches a key; a page that does belongs above.
UNCONFIRMED = {
    "auth.login", "auth.logout", "auth.language", "auth.password", "auth.confirm", "second_factor.enter", "emergency.end", "audit.verify",
    "admin.acknowledge_score_alarm", "worklist.show", "study.retry", "study.analyse", "study.take_back", "urgency.set_urgent",
    "urgency.set_routine", "urgency.set_urgent_by_api", "urgency.set_routine_by_api", "upload.close", "upload.multipart", "tus.create",
    "tus.resume", "tus.terminate",
}  # fmt: skip


def test_r8_every_page_action_is_known_to_ask_for_the_password_again_or_not(settings: Settings) -> None:
    app = create_app(settings)
    changing = {rule.endpoint for rule in app.url_map.iter_rules() if (rule.methods or set()) & {"POST", "PATCH", "PUT", "DELETE"}}
    confirmed = {endpoint for endpoint in changing if hasattr(app.view_functions[endpoint], "__wrapped__")}
    app.extensions["box"].stop()
    app.extensions["box"].store.close()
    assert confirmed == CONFIRMED
    assert changing - confirmed == UNCONFIRMED


def test_a_change_of_role_holds_from_the_next_request(box: Box) -> None:
    person = box.person("wang")
    assert person.get("/").status_code == 200
    box.accounts.set_role("wang", Role.AUDITOR, "test")
    assert person.get("/").headers["Location"] == "/login"
