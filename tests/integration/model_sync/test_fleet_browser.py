"""The fleet page in Chromium, without JavaScript: keyboard, languages, contrast, targets, phones; with it: the viewer's time zone."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone

import pytest
from playwright.sync_api import Browser, Page

from model_sync.fleet.rollouts import Rollouts
from tests.support.fleet_seed import LINE, seed
from tests.support.fleet_site import Centre
from tests.support.library_site import tiny_bundle

pytestmark = pytest.mark.browser
# The contrast of every text with what lies behind it (WCAG 2.2, 1.4.3); white where nothing is painted.
CONTRAST = """() => {
  const parse = c => { const v = c.match(/[\\d.]+/g).map(Number); return v.length > 3 ? v : [...v, 1]; };
  const light = c => { const [r, g, b] = c.map(v => { v /= 255; return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
    return .2126 * r + .7152 * g + .0722 * b; };
  const ground = e => { for (let n = e; n; n = n.parentElement) { const c = parse(getComputedStyle(n).backgroundColor);
    if (c[3] > .99) return c.slice(0, 3); } return [255, 255, 255]; };
  const bad = [];
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || !e.getClientRects().length) continue;
    if (e.tagName === 'title' || e.tagName === 'desc') continue;
    const style = getComputedStyle(e), svg = e.namespaceURI.endsWith('svg');
    const a = light(parse(svg ? style.fill : style.color)), b = light(ground(svg ? e.closest('svg').parentElement : e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) bad.push(`${e.tagName}.${e.className} ${ratio.toFixed(2)} ${e.textContent.trim().slice(0, 30)}`);
  }
  return bad; }"""
SMALL = """() => [...document.querySelectorAll('button, .button, select, summary, input:not([type=hidden], [type=checkbox])')]
  .filter(e => e.getClientRects().length && e.getBoundingClientRect().height < 43.5).map(e => e.outerHTML.slice(0, 90))"""


@pytest.fixture(scope="module")
def centre(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Centre]:
    base = tmp_path_factory.mktemp("centre")
    running = Centre(base, rollout_key=True)
    for number, version in enumerate(("0.1.0", "0.2.0")):
        running.site.publish(tiny_bundle(base / "bundles", version, number))
    running.site.rollout("stable", LINE, "0.2.0", 50.0, datetime.now(timezone.utc) - timedelta(hours=40), 72.0)
    step = Rollouts(running.site.library.files.directory, running.fleet).published().step("stable", LINE)
    assert step
    seed(running.fleet, 400, step, failures=0.04)
    yield running.start("--requests-per-minute", "6000")
    running.close()


@pytest.fixture(params=["zh", "en"])
def page(browser: Browser, centre: Centre, request: pytest.FixtureRequest) -> Iterator[Page]:
    """An operator on the fleet page; no script runs, and nothing may be asked of anybody else."""
    context = browser.new_context(
        ignore_https_errors=True, java_script_enabled=False, locale={"zh": "zh-CN", "en": "en-GB"}[request.param],
        viewport={"width": 1280, "height": 900},
    )  # fmt: skip
    elsewhere: list[str] = []
    context.on("request", lambda asked: None if asked.url.startswith((centre.url, "data:")) else elsewhere.append(asked.url))
    opened = context.new_page()
    opened.goto(f"{centre.url}/fleet")
    opened.fill("#name", "wang")
    opened.fill("#password", centre.operator())
    opened.keyboard.press("Enter")
    opened.wait_for_selector("table.boxes")
    yield opened
    assert elsewhere == []
    context.close()


def checked(page: Page) -> None:
    """Look at a page as somebody with weak eyes and a big thumb does."""
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate(SMALL) == []


def test_the_page_is_legible_reachable_and_in_one_language(page: Page) -> None:
    chinese = page.get_attribute("html", "lang") == "zh-CN"
    assert ("发布" in page.inner_text("body")) == chinese
    assert ("Rollouts" in page.inner_text("body")) != chinese
    checked(page)
    assert page.get_attribute("svg.chart", "role") == "img"
    assert page.locator("svg.chart desc").first.text_content()
    page.click("table.boxes tbody a >> nth=0")
    page.wait_for_selector("dl.facts")
    checked(page)


def test_it_fits_a_phone(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.reload()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    checked(page)


def test_the_rollout_is_paused_and_resumed_by_keyboard(page: Page, centre: Centre) -> None:
    def paused() -> bool:
        step = Rollouts(centre.site.library.files.directory, centre.fleet).published().step("stable", LINE)
        assert step
        return step.paused

    assert not paused()
    page.focus("button[value=pause]")
    page.keyboard.press("Enter")
    page.wait_for_selector(".banner.done")
    assert paused()
    assert page.locator("article .badge.warn").count() == 1
    assert page.locator("article .banner.warn").count() == 1, "it says who paused it"
    page.focus("button[value=resume]")
    page.keyboard.press("Enter")  # refused by the browser: the box is not ticked
    assert paused()
    page.focus("input[name=looked]")
    page.keyboard.press("Space")
    page.focus("button[value=resume]")
    page.keyboard.press("Enter")
    page.wait_for_selector("button[value=pause]")
    assert not paused()


def test_the_language_is_switched_and_stays(page: Page) -> None:
    before = page.get_attribute("html", "lang")
    page.click("button[name=language]")
    page.wait_for_selector(f"html:not([lang={before}])")
    page.reload()
    assert page.get_attribute("html", "lang") != before


def test_filters_and_pages_are_links_and_forms(page: Page) -> None:
    page.select_option("#f-state", "failed")
    page.click("form.filter button.primary")
    page.wait_for_url("**state=failed**")
    rows = page.locator("table.boxes tbody tr").count()
    assert 0 < rows < 50
    assert page.locator("table.boxes .badge.bad").count() == rows
    assert page.locator("table.boxes .badge.done").count() == 0
    page.goto(page.url.partition("?")[0])
    page.click("a[rel=next]")
    page.wait_for_selector("a[rel=prev]")


def test_the_log_is_legible_too(page: Page) -> None:
    page.goto(f"{page.url.partition('/fleet')[0]}/fleet/log")
    page.wait_for_selector("h1")
    checked(page)


def test_without_the_script_times_are_in_utc_and_say_so(page: Page) -> None:
    assert page.inner_text(".heading [data-zone]") == "UTC"
    assert page.inner_text(".heading time") == page.get_attribute(".heading time", "datetime")[:16].replace("T", " ")  # type: ignore[index]


@pytest.mark.parametrize(
    ("zone", "offset", "shift"),
    [
        ("Asia/Shanghai", "+08:00", timedelta(hours=8)),
        ("Asia/Kathmandu", "+05:45", timedelta(hours=5, minutes=45)),
        ("America/Phoenix", "-07:00", timedelta(hours=-7)),
    ],
)
def test_times_are_shown_in_the_zone_of_the_viewer(browser: Browser, centre: Centre, zone: str, offset: str, shift: timedelta) -> None:
    """No zone here has daylight saving time, so that every time is shifted by the same."""
    context = browser.new_context(ignore_https_errors=True, locale="en-GB", timezone_id=zone)
    errors: list[str] = []
    context.on("weberror", lambda error: errors.append(str(error.error)))
    context.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    try:
        opened = context.new_page()
        opened.goto(f"{centre.url}/fleet")
        opened.fill("#name", "wang")
        opened.fill("#password", centre.operator())
        opened.keyboard.press("Enter")
        opened.wait_for_selector("table.boxes")
        for path in ("/fleet", "/fleet/log", "/fleet/box/ankang-00020"):
            opened.goto(f"{centre.url}{path}")
            assert opened.inner_text(".heading [data-zone]").endswith(f"UTC{offset}")
            shown = opened.eval_on_selector_all("time:not([title])", "all => all.map(e => [e.dateTime, e.textContent])")
            assert shown
            for utc, text in shown:
                assert text == (datetime.strptime(utc, "%Y-%m-%dT%H:%M:%SZ") + shift).strftime("%Y-%m-%d %H:%M")
        opened.goto(f"{centre.url}/fleet")
        ticks = opened.eval_on_selector_all("svg [data-time]", "all => all.map(e => [e.dataset.time, e.textContent])")
        assert len(ticks) >= 5
        for utc, text in ticks:
            assert text == (datetime.strptime(utc, "%Y-%m-%dT%H:%M:%SZ") + shift).strftime("%m-%d %H:%M")
        assert errors == []
    finally:
        context.close()
