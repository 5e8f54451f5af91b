"""Scripts and style sheets: compressed as built, kept by the browser while their address stays the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.core.settings import Settings
from tests.support.web_box import Box, Person, in_process

pytestmark = pytest.mark.usefixtures("built_viewer")


@pytest.fixture
def box(settings: Settings) -> Iterator[Box]:
    with in_process(settings) as running:
        yield running


def addresses(box: Box) -> list[str]:
    """The addresses of scripts and style sheets of the login page."""
    found = re.findall(r'(?:src|href)="(/static/[^"]+\.(?:js|css)[^"]*)"', Person(box.base).get("/login").text)
    assert found
    return found


def test_a_browser_that_accepts_gzip_gets_the_compressed_form(box: Box, built_viewer: Path) -> None:
    person = Person(box.base)
    plain = person.get("/static/viewer/viewer.js", headers={"Accept-Encoding": "identity"})
    packed = person.get("/static/viewer/viewer.js", headers={"Accept-Encoding": "gzip"})
    assert packed.headers["Content-Encoding"] == "gzip"
    assert "Content-Encoding" not in plain.headers
    assert plain.content == packed.content == (built_viewer / "viewer.js").read_bytes()
    assert plain.headers["Content-Type"] == packed.headers["Content-Type"]
    assert packed.headers["Content-Type"].startswith("text/javascript")
    assert packed.headers["Vary"] == "Accept-Encoding"
    assert 3 * int(packed.headers["Content-Length"]) < len(plain.content)


def test_a_versioned_address_is_kept_and_any_other_is_asked_again(box: Box) -> None:
    person = Person(box.base)
    for address in addresses(box):
        answer = person.get(address)
        assert answer.status_code == 200
        assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
        for other in (address.split("?")[0], address.split("?")[0] + "?v=000000000000"):
            again = person.get(other)
            assert again.headers["Cache-Control"] == "no-cache"
            assert person.get(other, headers={"If-None-Match": again.headers["ETag"]}).status_code == 304


@pytest.mark.parametrize("path", ["../app.py", "%2e%2e/app.py", "viewer/none.js", "viewer/viewer.js.gz.gz", ""])
def test_nothing_else_is_served(box: Box, path: str) -> None:
    assert Person(box.base).get(f"/static/{path}").status_code in (302, 404)  # not below /static: the login page
