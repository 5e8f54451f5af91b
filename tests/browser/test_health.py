"""The status page in a real Chromium: a new version's way is followed without a reload, and an alarm is seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from appliance.core.settings import Settings
from appliance.model_queries import OPEN
from tests.browser.app_box import Clinician, Pages
from tests.support.model_journal import journal, tell
from tests.support.web_box import Box, in_process

pytestmark = [pytest.mark.browser]


@pytest.fixture
def box(settings: Settings, tmp_path: Path) -> Iterator[Box]:
    (tmp_path / "exchange").mkdir()
    with in_process(settings.model_copy(update={"exchange_dir": tmp_path / "exchange"})) as running:
        running.activate()
        yield running


def test_a_version_is_followed_from_its_arrival_to_the_trial_without_a_reload(box: Box, browser: Browser) -> None:
    tell(box)
    entry = journal(box, "0.2.0", "staged")
    someone = Clinician(browser, Pages(box))
    someone.log_in("watcher")
    page = someone.page
    page.goto(f"{box.base}/health")
    page.evaluate("() => { window.sameVisit = true; }")
    for state in OPEN:
        with box.store.database.transaction() as tx:
            tx.execute("UPDATE activations SET state = ?, progress = 0.5, trial = '{\"cases\": 20}' WHERE id = ?", (state, entry))
        expect(page.locator(f".coming[data-state={state}]")).to_be_visible(timeout=15_000)
        expect(page.locator(".steps [aria-current=step]")).to_have_count(1)
    expect(page.locator(".trial")).to_contain_text("Cases analysed20")
    tell(box, state="untrusted", code="trust.signature")
    expect(page.locator("[data-library=untrusted]")).to_be_visible(timeout=15_000)
    expect(page.locator("[data-library=untrusted]")).to_contain_text("A signature of the library is not valid")
    with box.store.database.transaction() as tx:
        tx.execute("UPDATE activations SET state = 'rolled-back', ended_at = updated_at WHERE id = ?", (entry,))
    expect(page.locator("[data-trouble=rolled-back]")).to_be_visible(timeout=15_000)
    expect(page.locator("#history [data-activation=rolled-back]")).to_be_visible()
    assert page.evaluate("() => window.sameVisit")
    someone.clean()
    someone.context.close()


def test_a_box_that_is_gone_is_said_on_the_status_page(box: Box, browser: Browser) -> None:
    journal(box, "0.2.0", "building")
    someone = Clinician(browser, Pages(box))
    someone.log_in("gone")
    someone.page.goto(f"{box.base}/health")
    someone.context.route("**/health*", lambda route: route.abort())
    expect(someone.page.locator("#live.is-lost")).to_contain_text("No connection to the box", timeout=15_000)
    someone.context.unroute("**/health*")
    expect(someone.page.locator("#live")).to_be_empty(timeout=15_000)
    someone.context.close()


@pytest.mark.parametrize("language", ["zh", "en"])
def test_r39_the_status_page_fits_a_phone(box: Box, browser: Browser, language: str) -> None:
    journal(box, "0.2.0", "self-test", name="a-line-with-a-very-long-name-that-nobody-expected")
    for version in range(12):
        journal(box, f"0.1.{version}", "failed", reason='{"code": "model.self_test", "detail": "golden-1: off by 0.21, allowed 0.02"}')
    tell(box, state="downloading", progress={"file": "models/" + "x" * 90, "done_bytes": 1, "total_bytes": 2})
    someone = Clinician(browser, Pages(box), width=360, height=740)
    someone.log_in("phone", language)
    someone.page.goto(f"{box.base}/health")
    assert someone.page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0
    for target in someone.page.locator("main a:visible, main button:visible").all():
        box_of = target.bounding_box()
        assert box_of
        assert min(box_of["width"], box_of["height"]) >= 43.5
    someone.clean()
    someone.context.close()
