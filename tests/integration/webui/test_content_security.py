"""The content security policy over every page of the box: no inline script or style, nothing from outside, the policy on every answer."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
from werkzeug.routing import Rule

from appliance.core.roles import Role
from appliance.core.settings import Settings
from tests.support.scans import scan_bytes
from tests.support.web_box import ROOT, Box, in_process, result
from webui import create_app
from webui.server.security import CONTENT_SECURITY_POLICY, HEADERS


class Inline(HTMLParser):
    """Collects what the policy would block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocked: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if (tag == "script" and "src" not in values) or tag in ("style", "iframe", "object", "embed", "base"):
            self.blocked.append(tag)
        for name, value in attrs:
            address = (value or "").strip().lower()
            if name.startswith("on") or name == "style" or address.startswith(("javascript:", "http:", "https:", "//")):
                self.blocked.append(f"{tag} {name}={value}")


def blocked_in(page: str) -> list[str]:
    parser = Inline()
    parser.feed(page)
    return parser.blocked


@pytest.fixture
def box(settings: Settings) -> Iterator[Box]:
    with in_process(settings) as running:
        running.activate()
        running.take(scan_bytes())
        running.work(result())
        yield running


def addresses(settings: Settings) -> list[str]:
    """Every address that is opened with GET, with the number 1 or a word in place of its variables; not the static files."""
    app = create_app(settings)
    rules: list[Rule] = [rule for rule in app.url_map.iter_rules() if "GET" in (rule.methods or set()) and rule.endpoint != "static"]
    adapter = app.url_map.bind("localhost")
    found = [adapter.build(rule.endpoint, dict.fromkeys(rule.arguments, 1)) for rule in rules]
    app.extensions["box"].stop()
    app.extensions["box"].store.close()
    return sorted(set(found))


def test_no_page_of_any_role_holds_inline_script_or_style(box: Box) -> None:
    pages, every = 0, [*addresses(box.settings), "/nothing", "/studies/999"]
    people = [box.visitor(), *(box.person(f"p-{role}", role) for role in Role)]
    for person in people:
        for address in every:
            if address.endswith("/outcome") or "logout" in address:
                continue
            answer = person.get(address)
            assert answer.headers["Content-Security-Policy"] == CONTENT_SECURITY_POLICY, address
            assert {name: answer.headers[name] for name in HEADERS} == HEADERS, address
            if answer.headers["Content-Type"].startswith("text/html"):
                pages += 1
                assert blocked_in(answer.text) == [], address
    assert pages > 50


def test_the_page_that_nginx_shows_when_the_box_is_busy_has_none_either() -> None:
    assert blocked_in((ROOT / "webui" / "static" / "busy.html").read_text("utf-8")) == []


def test_the_policy_allows_no_inline_script() -> None:
    assert "unsafe-inline" not in CONTENT_SECURITY_POLICY
    assert "'unsafe-eval'" not in CONTENT_SECURITY_POLICY
    assert blocked_in('<script>1</script><p style="x" onclick="y"><a href="javascript:z"><img src="//evil.example/a">') == [
        "script", "p style=x", "p onclick=y", "a href=javascript:z", "img src=//evil.example/a",
    ]  # fmt: skip
