"""Browsers with WebGL and without, and the site of synthetic pictures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Playwright

from tests.browser.viewer_page import COMMON, FLAGS
from tests.browser.viewer_site import ViewerSite, serve


@pytest.fixture(scope="session")
def viewer_site(built_viewer: object) -> Iterator[ViewerSite]:
    """Study pages with the built viewer and synthetic pictures, without the rest of the box."""
    assert built_viewer
    with serve() as running:
        yield running


@pytest.fixture(scope="session")
def viewer_browsers(playwright_driver: Playwright, chromium: str) -> Iterator[dict[str, Browser]]:
    """Chromium with (emulated) WebGL and without any, by the renderer that the viewer must take."""
    launch = playwright_driver.chromium.launch
    started = {name: launch(executable_path=chromium, args=COMMON + flags) for name, flags in FLAGS.items()}
    yield started
    for browser in started.values():
        browser.close()


@pytest.fixture(params=["webgl", "cpu"])
def renderer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def viewer_browser(viewer_browsers: dict[str, Browser], renderer: str) -> Browser:
    return viewer_browsers[renderer]
