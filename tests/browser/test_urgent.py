"""STAT at a clinic's PC: the button with mouse, keyboard and without any script, the badge, and lists that follow by themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from appliance.core.settings import Settings
from tests.browser.app_box import READY, Clinician, Pages
from tests.support.scans import scan_bytes
from tests.support.web_box import Box, in_process, result

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("built_viewer")]
WORDS = {
    "zh": ("优先分析", "加急", "该检查将优先分析", "没有等待分析的影像"),
    "en": ("Analyse first", "Urgent", "will be analysed first", "nothing of this study waits any more"),
}


@pytest.fixture
def box(settings: Settings) -> Iterator[Box]:
    with in_process(settings) as running:
        running.activate()
        yield running


def three(box: Box) -> list[int]:
    """Three studies that wait."""
    return [int(box.take(scan_bytes(PatientName=f"Patient^{number}")).study_id) for number in range(3)]


@pytest.mark.parametrize("language", ["zh", "en"])
def test_a_study_is_put_first_from_the_worklist_and_another_from_its_page(box: Box, browser: Browser, language: str) -> None:
    press, badge, done, nothing = WORDS[language]
    studies = three(box)
    colleague = Clinician(browser, Pages(box))
    colleague.log_in("colleague", language)
    someone = Clinician(browser, Pages(box))
    someone.log_in("wang", language)
    page = someone.page
    line = page.locator(f"#study-{studies[2]}")
    button = line.get_by_role("button", name=press)
    target = button.bounding_box()
    assert target
    assert min(target["width"], target["height"]) >= 43.5
    button.click()
    expect(page.locator(".banner", has_text=done)).to_be_visible()
    expect(page).to_have_url(f"{box.base}/")  # the line as a whole is a link, and was not followed
    expect(line.locator(".tone-urgent")).to_have_text(badge)
    expect(button).to_have_count(0)
    expect(page.get_by_role("button", name=press)).to_have_count(2)
    other = colleague.page.locator(f"#study-{studies[2]} .tone-urgent")
    expect(other).to_have_text(badge, timeout=60_000)  # without a reload
    expect(colleague.page.locator("#announce")).to_contain_text(badge)
    page.goto(f"{box.base}/studies/{studies[1]}")
    expect(page.locator(READY)).to_be_visible(timeout=60_000)
    page.get_by_role("button", name=press).focus()
    place = "第 3 位" if language == "zh" else "no. 3"
    expect(page.locator(".state-word")).to_contain_text(place)
    box.store.queue.make_urgent(box.take(scan_bytes()).study_id, "another")
    expect(page.locator(".state-word")).to_contain_text(place.replace("3", "4"), timeout=60_000)  # the pane is another one
    expect(page.get_by_role("button", name=press)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".banner", has_text=done)).to_be_visible()
    expect(page.locator(".urgency")).to_contain_text("wang")
    expect(page.locator(".urgency .tone-urgent")).to_have_text(badge)
    stale = someone.open()
    stale.goto(f"{box.base}/studies/{studies[0]}")
    waiting = stale.get_by_role("button", name=press)
    expect(waiting).to_be_visible()
    with box.store.database.transaction() as tx:  # this one is read now
        tx.execute("UPDATE jobs SET priority = 2 WHERE instance_id = (SELECT min(id) FROM instances)")
    stale.evaluate("() => { document.querySelector('#report').dataset.url = '/nothing'; }")  # a page that hears of nothing any more
    box.work(result())
    waiting.click()
    expect(stale.locator(".banner", has_text=nothing)).to_be_visible()
    assert someone.outside == colleague.outside == []
    for person in (someone, colleague):
        person.context.close()


@pytest.mark.parametrize("language", ["zh", "en"])
def test_it_works_without_any_script_and_after_a_search(box: Box, browser: Browser, language: str) -> None:
    press, badge, done, _ = WORDS[language]
    studies = three(box)
    someone = Clinician(browser, Pages(box))
    someone.log_in("old-pc", language)
    context = browser.new_context(java_script_enabled=False, viewport={"width": 1024, "height": 768})
    context.add_cookies(someone.context.cookies())  # type: ignore[arg-type] # what one method gives the other takes
    page = context.new_page()
    page.goto(box.base)
    page.fill("#q", "patient")
    page.keyboard.press("Enter")
    expect(page.locator("tbody tr")).to_have_count(3)
    page.locator(f"#study-{studies[1]}").get_by_role("button", name=press).press("Space")
    expect(page.locator(".banner", has_text=done)).to_be_visible()
    expect(page.locator("#q")).to_have_value("patient")
    expect(page.locator(f"#study-{studies[1]} .tone-urgent")).to_have_text(badge)
    page.goto(f"{box.base}/studies/{studies[0]}")
    page.get_by_role("button", name=press).click()
    expect(page.locator(".banner", has_text=done)).to_be_visible()
    assert [bool(box.store.queue.urgency_of(study)) for study in studies] == [True, True, False]
    context.close()
    someone.clean()
    someone.context.close()


def test_the_focus_stays_on_the_button_when_the_list_changes(box: Box, browser: Browser) -> None:
    study = three(box)[0]
    someone = Clinician(browser, Pages(box), width=360, height=740)
    someone.log_in("keys")
    page = someone.page
    assert page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0
    page.locator(f"#study-{study} .first").focus()
    box.take(scan_bytes(PatientName="Later^One"))
    expect(page.locator("tbody tr")).to_have_count(4, timeout=60_000)
    expect(page.locator(f"#study-{study} .first")).to_be_focused()
    box.store.queue.make_urgent(study, "another")
    expect(page.locator(f"#study-{study} .tone-urgent")).to_be_visible(timeout=60_000)
    expect(page.locator(f"#study-{study} .row-link")).to_be_focused()
    someone.clean()
    someone.context.close()
