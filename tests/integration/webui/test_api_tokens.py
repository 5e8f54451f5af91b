"""Programs with API tokens on real routes: what their scopes open, no cookie, no CSRF token, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from werkzeug.routing import Rule

from appliance.core.roles import TOKEN_ROLES, Role, Scope
from appliance.core.settings import Settings
from appliance.store.api_tokens import ApiTokens
from tests.support.scans import scan_bytes
from tests.support.web_box import TUS, Box, in_process, own_password, result, words
from webui import create_app
from webui.server.access import ACCESS, OPEN_ENDPOINTS, SCOPES


@pytest.fixture
def box(settings: Settings, quick_passwords: None) -> Iterator[Box]:
    with in_process(settings) as running:
        yield running


@pytest.fixture
def tokens(box: Box) -> ApiTokens:
    own_password(box.accounts, "wang")
    return ApiTokens(box.store, box.accounts)


class Program:
    """A program with a token; it keeps no cookie."""

    def __init__(self, box: Box, token: str) -> None:
        self.base, self.headers = box.base, {"Authorization": f"Bearer {token}"}

    def request(self, method: str, path: str, **options: Any) -> requests.Response:
        """One request."""
        headers = self.headers | options.pop("headers", {})
        return requests.request(method, self.base + path, headers=headers, allow_redirects=False, timeout=30, **options)


def issue(tokens: ApiTokens, *scopes: str) -> str:
    return tokens.issue("wang", scopes, 30, "test")


def refusals(box: Box, code: str) -> int:
    pattern = f'%"code": "{code}"%'
    return box.store.database.number("SELECT count(*) FROM audit WHERE entry LIKE ?", pattern)


def test_a_program_uploads_and_fetches_the_results_without_cookie_and_csrf_token(box: Box, tokens: ApiTokens) -> None:
    box.activate()
    program = Program(box, issue(tokens, "upload", "results"))
    answer = program.request("POST", "/api/v1/uploads", files={"file": ("scan.dcm", scan_bytes())})
    assert answer.status_code == 200, answer.text
    assert "Set-Cookie" not in answer.headers
    (outcome,) = answer.json()["outcomes"]
    assert outcome["result"] == "stored"
    path = f"/api/v1/studies/{outcome['study_id']}/results"
    assert program.request("GET", path).json()["is_pending"]
    box.work(result())
    found = program.request("GET", path)
    assert "Set-Cookie" not in found.headers
    (image,) = found.json()["images"]
    assert image["state"] == "ai_ready"
    assert {name: image["findings"][0][name] for name in ("score", "threshold", "model_version", "recall")} == {
        "score": 0.9, "threshold": 0.3664, "model_version": "0.1.0", "recall": None,
    }  # fmt: skip
    assert found.json()["disclaimer"] == {"zh": "不得单独作为诊断依据", "en": "Not for sole diagnosis"}
    assert not found.json()["is_pending"]
    entries = [row["entry"] for row in box.store.database.query("SELECT entry FROM audit ORDER BY seq")]
    seen = [entry for entry in entries if '"110103"' in entry]
    assert [('"actor": "wang"' in entry, '"token": 1' in entry) for entry in seen] == [(True, True)]  # once, by the program


def test_a_program_continues_a_tus_upload(box: Box, tokens: ApiTokens) -> None:
    program, data = Program(box, issue(tokens, "upload")), scan_bytes()
    created = program.request("POST", "/api/v1/tus", headers={**TUS, "Upload-Length": str(len(data))})
    assert created.status_code == 201
    path, body = created.headers["Location"], {**TUS, "Content-Type": "application/offset+octet-stream"}
    assert program.request("PATCH", path, headers={**body, "Upload-Offset": "0"}, data=data[:1000]).status_code == 204
    assert program.request("HEAD", path, headers=TUS).headers["Upload-Offset"] == "1000"
    assert program.request("PATCH", path, headers={**body, "Upload-Offset": "1000"}, data=data[1000:]).status_code == 204
    assert program.request("GET", f"{path}/outcome?wait=10").json()["outcomes"][0]["result"] == "stored"


def test_r6_no_token_opens_anything_but_the_endpoints_of_its_scopes(box: Box, tokens: ApiTokens, settings: Settings) -> None:
    box.take(scan_bytes())
    app = create_app(settings)
    rules: list[Rule] = list(app.url_map.iter_rules())
    app.extensions["box"].stop()
    app.extensions["box"].store.close()
    for scope in Scope:
        program = Program(box, issue(tokens, scope))
        for rule in rules:
            path = re.sub(r"<(?:\w+:)?\w+>", "1", rule.rule)
            for method in (rule.methods or set()) - {"OPTIONS", "HEAD"}:
                answer = program.request(method, path, headers=TUS)
                is_refused = answer.status_code == 403 and answer.json()["code"] == "web.token_scope"
                assert is_refused != (rule.endpoint in SCOPES[scope]), (scope, method, path, answer.status_code)
                assert "Set-Cookie" not in answer.headers
    assert refusals(box, "web.token_scope") == 30  # and one entry that counts the others, when the period ends
    assert Program(box, issue(tokens, "upload")).request("GET", "/no/such/page").status_code == 404


def test_r6_the_scopes_name_endpoints_of_the_matrix_that_the_accounts_may_use() -> None:
    assert set(SCOPES) == set(Scope)
    for endpoints in SCOPES.values():
        assert endpoints
        assert not endpoints & OPEN_ENDPOINTS
        assert all(ACCESS[endpoint] >= TOKEN_ROLES for endpoint in endpoints)


@pytest.mark.parametrize(
    "header", ["Bearer", "Bearer ", "bearer wrong", "Bearer cbx_0", f"Bearer {'x' * 4000}", "BEARER a b", "Bearer \u00e4\u00e4"]
)
def test_a_wrong_token_is_refused_whatever_cookie_comes_with_it(box: Box, header: str) -> None:
    person = box.person("wang")
    before = refusals(box, "web.token")
    answer = person.get("/api/v1/revision", headers={"Authorization": header.encode("latin-1")})
    assert (answer.status_code, answer.json()["code"]) == (401, "web.token")
    assert answer.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
    assert refusals(box, "web.token") == before + 1
    assert person.get("/api/v1/revision").status_code == 200
    assert person.get("/api/v1/revision", headers={"Authorization": "Basic d2FuZzp4"}).status_code == 200


def test_revoked_expired_and_disabled_read_the_same(box: Box, tokens: ApiTokens) -> None:
    answers = []
    for change in ("revoke", "expire", "disable"):
        program = Program(box, issue(tokens, "results"))
        assert program.request("GET", "/api/v1/studies/1/results").status_code == 404
        if change == "revoke":
            tokens.revoke(tokens.all()[0].id, "test")
        elif change == "expire":
            with box.store.database.transaction() as tx:
                tx.execute("UPDATE api_tokens SET lifetime_s = 0.001")
        else:
            box.accounts.set_active("wang", False, "test")
        answers.append(program.request("GET", "/api/v1/studies/1/results").text)
    assert len(set(answers)) == 1


def test_a_token_of_an_emergency_does_not_exist(box: Box, tokens: ApiTokens) -> None:
    """A role that sees patients only in an emergency has no tokens, and the role counts at each request."""
    program = Program(box, issue(tokens, "results"))
    with box.store.database.transaction() as tx:  # not by `set_role`, which would revoke it
        tx.execute("UPDATE users SET role = ? WHERE username = 'wang'", (Role.TECHNICIAN,))
    assert program.request("GET", "/api/v1/studies/1/results").json()["code"] == "web.token_scope"


def test_guessing_tokens_is_slowed_and_does_not_stop_the_program_beside_it(
    box: Box, tokens: ApiTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model_sync.login_throttle.SLOW_S", 100.0)  # so that a second guess in turn is refused at once
    good = Program(box, issue(tokens, "results"))
    assert good.request("GET", "/api/v1/studies/1/results").status_code == 404
    seen = [Program(box, f"guess{number}").request("GET", "/api/v1/studies/1/results").status_code for number in range(24)]
    assert seen == [401] * 21 + [429] * 3
    assert good.request("GET", "/api/v1/studies/1/results").status_code == 404
    assert refusals(box, "web.token") <= 30


def test_the_security_administrator_makes_and_revokes_tokens_on_the_page(box: Box, tokens: ApiTokens) -> None:
    chief = box.person("chief", Role.SECURITY_ADMINISTRATOR)
    wang = box.accounts.require("wang")
    page = chief.open(f"/accounts/{wang.id}")
    assert "API tokens for programs" in words(page)
    for bad, said in (
        ({"days": "30"}, "No API token can be made"),
        ({"scope": "everything", "days": "30"}, "No API token can be made"),
        ({"scope": "upload", "days": "0"}, "1 to 365 days"),
        ({"scope": "upload", "days": "366"}, "1 to 365 days"),
        ({"scope": "upload", "days": "-1"}, "1 to 365 days"),
        ({"scope": "upload", "days": "1e3"}, "1 to 365 days"),
        ({"scope": "upload"}, "1 to 365 days"),
    ):
        answer = chief.post(f"/accounts/{wang.id}/tokens", data=bad)
        assert answer.status_code == 422
        assert said in answer.text
    shown = chief.post(f"/accounts/{wang.id}/tokens", data={"scope": ["upload", "results"], "days": "30"}).text
    (token,) = re.findall(r'id="api-token">([^<]+)<', shown)
    program = Program(box, token)
    assert program.request("GET", "/api/v1/studies/1/results").status_code == 404
    assert tokens.use(token, "192.0.2.9")  # a second machine
    page = chief.open(f"/accounts/{wang.id}")
    assert token not in page
    (row,) = re.findall(r'<tr data-token="1" data-shared>.*?</tr>', page, re.DOTALL)
    for text in ("Send images to this box; Fetch the results of a study", "30", "Several machines", "127.0.0.1", "192.0.2.9"):
        assert text in words(row)
    assert "多台机器" in words(chief.speak("zh").open(f"/accounts/{wang.id}"))
    assert chief.post(f"/accounts/{wang.id}/tokens/1/revoke").headers["Location"] == f"/accounts/{wang.id}"
    assert program.request("GET", "/api/v1/studies/1/results").status_code == 401
    assert chief.post(f"/accounts/{wang.id}/tokens/1/revoke").status_code == 422
    assert "API tokens" not in words(chief.speak("en").open(f"/accounts/{box.accounts.require('chief').id}"))


def test_r8_making_and_revoking_a_token_asks_for_the_password_again(box: Box, tokens: ApiTokens) -> None:
    chief, wang = box.person("chief", Role.SECURITY_ADMINISTRATOR), box.accounts.require("wang")
    issue(tokens, "upload")
    with box.store.database.transaction() as tx:
        tx.execute("UPDATE sessions SET confirmed_at = ''")
    for path in (f"/accounts/{wang.id}/tokens", f"/accounts/{wang.id}/tokens/1/revoke"):
        answer = chief.post(path, data={"scope": "upload", "days": "30"})
        assert answer.headers["Location"].startswith("/confirm?next=")
    assert len(tokens.all()) == 1
