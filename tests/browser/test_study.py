"""The report beside the image: it follows the image shown, an unread image says so on itself, and a new one is announced."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from appliance.core.domain import JobResult, Note, ScanState
from appliance.core.settings import Settings
from tests.browser.app_box import READY, Clinician, Pages
from tests.support.scans import scan_bytes
from tests.support.web_box import Box, in_process, result
from tests.support.worker_box import chest

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("built_viewer")]


@pytest.fixture
def box(settings: Settings) -> Iterator[Box]:
    with in_process(settings) as running:
        running.activate()
        yield running


def study_of_three(box: Box) -> int:
    """A positive PA, a lateral that no model reads, and a PA that is still in the queue."""
    stored = [box.take(scan_bytes(StudyInstanceUID="1.2.3", ViewPosition=view, SOPInstanceUID=f"1.2.3.{number}"))
              for number, view in enumerate(("PA", "LL", "PA"))]  # fmt: skip
    box.work(result(0.9))
    box.work(JobResult(ScanState.OUT_OF_SCOPE, Note("scope.view", "LL")))
    return int(stored[0].study_id)


def shown(page: Page, image: int) -> None:
    page.locator(".vw-images button").nth(image).click()
    expect(page.locator(READY)).to_be_visible(timeout=30_000)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_report_follows_the_image_and_an_unread_one_says_so_on_itself(box: Box, browser: Browser, language: str) -> None:
    study = study_of_three(box)
    someone = Clinician(browser, Pages(box))
    someone.log_in("follower", language)
    page = someone.page
    page.goto(f"{box.base}/studies/{study}")
    expect(page.locator(READY)).to_be_visible(timeout=30_000)
    unread, current = page.locator(".vw-unread"), page.locator(".image-report.is-current")
    out, queued = ("超出适用范围", "排队") if language == "zh" else ("Out of AI scope", "In the queue")
    expect(unread).to_be_hidden()
    expect(current).to_contain_text("0.900")
    expect(page.locator(".vw-no-verdict:visible")).to_have_count(2)
    shown(page, 1)
    expect(unread).to_contain_text(out)
    expect(unread).to_be_in_viewport()
    expect(current).to_have_count(1)
    expect(current.locator(".state-box")).to_be_in_viewport()
    assert page.locator(".image-report").first.get_attribute("class") == "image-report is-current"
    shown(page, 2)
    expect(unread).to_contain_text(queued)
    page.locator(".image-report:has(.finding) .to-image").click()
    expect(page.locator(READY)).to_be_visible(timeout=30_000)
    expect(unread).to_be_hidden()
    expect(current).to_contain_text("0.900")
    someone.clean()
    someone.context.close()


def test_a_result_that_comes_takes_the_words_off_the_image(box: Box, browser: Browser) -> None:
    study = study_of_three(box)
    someone = Clinician(browser, Pages(box))
    someone.log_in("waiter")
    page = someone.page
    page.goto(f"{box.base}/studies/{study}")
    shown(page, 2)
    expect(page.locator(".vw-unread")).to_contain_text("In the queue")
    box.work(result(0.2))
    expect(page.locator(".vw-unread")).to_be_hidden(timeout=15_000)
    expect(page.locator(".image-report.is-current")).to_contain_text("0.200")
    expect(page.locator("#arrived")).to_be_visible()
    expect(page.locator("#viewer [data-action=outline]")).to_be_visible()
    expect(page.locator("#viewer .vw-outline").first).to_be_attached()
    assert page.evaluate("() => performance.getEntriesByType('navigation').length") == 1
    someone.clean()
    someone.context.close()


def test_an_image_that_arrives_later_is_announced_even_without_a_finding(box: Box, browser: Browser) -> None:
    study = box.take(scan_bytes(StudyInstanceUID="1.2.3", SOPInstanceUID="1.2.3.1")).study_id
    box.work(result(0.9))
    someone = Clinician(browser, Pages(box))
    someone.log_in("later")
    page = someone.page
    page.goto(f"{box.base}/studies/{study}")
    expect(page.locator(READY)).to_be_visible(timeout=30_000)
    expect(page.locator("#new-images")).to_be_hidden()
    box.take(scan_bytes(StudyInstanceUID="1.2.3", SOPInstanceUID="1.2.3.2", ViewPosition="LL"))
    expect(page.locator("#new-images")).to_be_visible(timeout=15_000)
    expect(page.locator("#new-images")).to_be_in_viewport()
    page.locator("#new-images button").click()
    expect(page.locator(".vw-images button")).to_have_count(2)
    expect(page.locator("#new-images")).to_be_hidden()
    someone.clean()
    someone.context.close()


def test_the_words_on_an_unread_image_stay_in_full_screen_and_on_a_phone(box: Box, browser: Browser) -> None:
    stored = box.take(chest(seed=1))
    box.fail("job.deadline")
    someone = Clinician(browser, Pages(box), width=360, height=740)
    someone.log_in("phone")
    page = someone.page
    page.goto(f"{box.base}/studies/{stored.study_id}")
    expect(page.locator(READY)).to_be_visible(timeout=30_000)
    words, stage = page.locator(".vw-unread"), page.locator(".vw-stage")
    expect(words).to_have_text("Analysis failed")
    assert stage.evaluate("(stage, words) => stage.contains(words)", words.element_handle())
    within, around = words.bounding_box(), stage.bounding_box()
    assert within
    assert around
    assert around["x"] <= within["x"]
    assert within["x"] + within["width"] <= around["x"] + around["width"]
    someone.clean()
    someone.context.close()
