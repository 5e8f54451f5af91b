"""The built viewer in a real Chromium, with WebGL and without, under the box's own CSP: pictures, errors, the bundle itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.browser.viewer_page import opened
from tests.browser.viewer_site import PICTURES, ViewerSite

pytestmark = pytest.mark.browser

DRAWABLE = [number for number, p in PICTURES.items() if not (p.meta_problem or p.frame_problem or p.cut_bytes)]
VIEWER_SOURCE = Path(__file__).parents[2] / "webui" / "viewer"


# ---------------------------------------------------------------------- pictures


@pytest.mark.parametrize("number", DRAWABLE, ids=lambda n: PICTURES[n].title.replace(" ", "-"))
def test_every_kind_of_picture_is_drawn(viewer_site: ViewerSite, viewer_browser: Browser, renderer: str, number: int) -> None:
    with opened(viewer_browser, viewer_site.page(number)) as shot:
        assert shot.data("renderer") == renderer
        assert shot.data("imageId") == str(number)
        probe = shot.probe()
        if PICTURES[number].title == "constant":
            assert 120 <= probe["min"] <= probe["max"] <= 135
        else:
            assert probe["max"] - probe["min"] > 100
        assert shot.errors == []


def test_monochrome1_is_inverted_once_and_a_negative_slope_counts(viewer_site: ViewerSite, viewer_browser: Browser) -> None:
    middle_is_bright = {1: True, 2: True, 3: True, 5: True, 6: True, 10: False, 11: True, 18: True}
    with opened(viewer_browser, viewer_site.page(*middle_is_bright)) as shot:
        for index, (number, bright) in enumerate(middle_is_bright.items()):
            shot.choose(index)
            bone = shot.grey(".cornerstone-canvas", *shot.fitted(number, 440, 900))[0]
            lung = shot.grey(".cornerstone-canvas", *shot.fitted(number, 264, 420))[0]
            assert (bone - lung > 60) is bright, (number, bone, lung)
            assert (lung - bone > 60) is not bright, (number, bone, lung)


def test_both_renderers_show_the_same_picture(viewer_site: ViewerSite, viewer_browsers: dict[str, Browser]) -> None:
    numbers = (1, 2, 3, 5, 6, 10)
    means: list[list[float]] = []
    for browser in viewer_browsers.values():
        with opened(browser, viewer_site.page(*numbers)) as shot:
            means.append([])
            for index in range(len(numbers)):
                shot.choose(index)
                shot.page.locator(".vw-stage").focus()
                shot.press("2")
                means[-1].append(shot.probe()["mean"])
    assert means[0] == pytest.approx(means[1], abs=2)


def test_a_picture_larger_than_any_screen_is_reduced_and_says_so(viewer_site: ViewerSite, viewer_browser: Browser) -> None:
    with opened(viewer_browser, viewer_site.page(15)) as shot:
        assert "1/2" in shot.page.inner_text(".vw-bottom-right")
        assert shot.probe()["max"] > 200


# ---------------------------------------------------------------------- errors and fallbacks


def test_an_error_is_a_box_with_the_words_of_the_box(viewer_site: ViewerSite, viewer_browser: Browser) -> None:
    for number, words in ((12, ["像素数据已损坏", "码流被截断"]), (16, ["No such frame", "has 1 frame"]), (13, ["1000", "901"])):
        with opened(viewer_browser, viewer_site.page(number), state="error") as shot:
            alert = shot.page.inner_text("[role=alert]")
            if number == 13:
                assert f"{1024 * 880 - 1000} of {1024 * 880} bytes" in alert
            else:
                assert all(word in alert for word in words)
            asked = sum(viewer_site.tries.values())
            shot.page.click(".vw-retry")
            shot.wait("v.dataset.state === 'error'")
            assert sum(viewer_site.tries.values()) > asked


def test_a_study_without_images_says_so(viewer_site: ViewerSite, viewer_browser: Browser) -> None:
    with opened(viewer_browser, viewer_site.page(), state="error") as shot:
        assert "no image" in shot.page.inner_text("[role=alert]")
        shot.page.keyboard.press("i")
        assert shot.errors == []


def test_several_images_are_reached_by_keyboard_and_one_error_does_not_spread(viewer_site: ViewerSite, viewer_browser: Browser) -> None:
    with opened(viewer_browser, viewer_site.page(1, 12, 7)) as shot:
        buttons = shot.page.locator(".vw-images button")
        assert buttons.count() == 3
        assert buttons.nth(0).get_attribute("aria-current") == "true"
        buttons.nth(1).focus()
        shot.page.keyboard.press("Enter")
        shot.wait("v.dataset.state === 'error' && v.dataset.imageId === '12'")
        buttons.nth(2).focus()
        shot.drawn(lambda: shot.page.keyboard.press("Enter"))
        assert shot.data("imageId") == "7"
        assert shot.page.is_visible(".vw-frames")
        assert not shot.page.is_visible(".vw-message")
        shot.drawn(buttons.nth(0).click)
        assert not shot.page.is_visible(".vw-frames")
        assert shot.probe()["max"] > 200


LOSABLE = """
window.contexts = [];
const original = HTMLCanvasElement.prototype.getContext;
HTMLCanvasElement.prototype.getContext = function (...args) {
  const context = original.apply(this, args);
  if (String(args[0]).startsWith('webgl') && context) window.contexts.push(context);
  return context;
};
"""


def test_a_lost_graphics_context_ends_in_cpu_drawing(viewer_site: ViewerSite, viewer_browsers: dict[str, Browser]) -> None:
    with opened(viewer_browsers["webgl"], viewer_site.page(2), init=LOSABLE) as shot:
        assert shot.data("renderer") == "webgl"
        shot.page.evaluate("contexts.forEach(c => c.getExtension('WEBGL_lose_context')?.loseContext())")
        shot.wait("v.dataset.renderer === 'cpu' && v.dataset.state === 'ready'")
        assert shot.probe()["max"] > 200
        shot.drawn(lambda: shot.drag(0, 80))
        assert shot.number("windowCenter") > 400


def test_a_driver_that_draws_nothing_ends_in_cpu_drawing(viewer_site: ViewerSite, viewer_browsers: dict[str, Browser]) -> None:
    blind = (
        "for (const kind of [WebGLRenderingContext, WebGL2RenderingContext]) {"
        " kind.prototype.drawArrays = () => {}; kind.prototype.drawElements = () => {}; }"
    )
    with opened(viewer_browsers["webgl"], viewer_site.page(1), init=blind) as shot:
        assert shot.data("renderer") == "cpu"
        assert shot.probe()["max"] > 200


def test_the_page_can_ask_for_cpu_drawing(viewer_site: ViewerSite, viewer_browsers: dict[str, Browser]) -> None:
    with opened(viewer_browsers["webgl"], viewer_site.page(1, renderer="cpu")) as shot:
        assert shot.data("renderer") == "cpu"
        assert "CPU" in shot.page.inner_text(".vw-bottom-right")


def test_an_emulated_graphics_chip_is_left_alone(viewer_site: ViewerSite, viewer_browsers: dict[str, Browser]) -> None:
    with opened(viewer_browsers["webgl"], viewer_site.page(1, renderer="auto")) as shot:
        assert shot.data("renderer") == "cpu"
        assert shot.probe()["max"] > 200


# ---------------------------------------------------------------------- people


def test_r39_targets_names_and_focus(viewer_site: ViewerSite, viewer_browsers: dict[str, Browser]) -> None:
    with opened(viewer_browsers["webgl"], viewer_site.page(14, 7)) as shot:
        for button in shot.page.locator(".vw button:visible").all():
            box = button.bounding_box()
            assert box
            assert min(box["width"], box["height"]) >= 44
            assert button.get_attribute("aria-label") or button.inner_text().strip()
        assert shot.page.evaluate("document.activeElement.className") == "vw-stage"
        shot.page.keyboard.press("Shift+Tab")
        style = shot.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert style == "solid"


def test_the_key_help_opens_and_closes(viewer_site: ViewerSite, viewer_browsers: dict[str, Browser]) -> None:
    with opened(viewer_browsers["webgl"], viewer_site.page(1, lang="zh")) as shot:
        shot.page.keyboard.press("?")
        assert shot.page.is_visible("dialog.vw-help")
        assert "反相" in shot.page.inner_text("dialog.vw-help")
        shot.page.keyboard.press("i")
        assert shot.data("inverted") == "false"
        shot.page.keyboard.press("Escape")
        assert not shot.page.is_visible("dialog.vw-help")


def test_keys_are_left_to_the_page_outside_the_viewer(viewer_site: ViewerSite, viewer_browsers: dict[str, Browser]) -> None:
    with opened(viewer_browsers["webgl"], viewer_site.page(1)) as shot:
        shot.page.evaluate("document.activeElement.blur()")
        shot.page.keyboard.press("i")
        shot.settle()
        assert shot.data("inverted") == "false"


def test_both_languages_have_every_word(viewer_site: ViewerSite, viewer_browsers: dict[str, Browser]) -> None:
    keys = json.loads((VIEWER_SOURCE / "TEXT_KEYS.json").read_text("utf-8"))
    for key, words in keys.items():
        assert set(words) == {"zh", "en"}, key
        assert set(re.findall(r"\{\w+\}", words["zh"])) == set(re.findall(r"\{\w+\}", words["en"])), key
    with opened(viewer_browsers["webgl"], viewer_site.page(14, lang="zh")) as shot:
        text = shot.page.inner_text("#viewer")
        assert "窗宽" in text
        assert not re.search(r"[a-z]+_[a-z]+", text)


# ---------------------------------------------------------------------- the bundle


def test_nothing_is_asked_of_any_other_host(viewer_site: ViewerSite, viewer_browsers: dict[str, Browser]) -> None:
    context = viewer_browsers["webgl"].new_context()
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(viewer_site.page(1, 5))
    page.wait_for_selector("#viewer[data-state=ready]")
    assert [url for url in asked if not url.startswith((viewer_site.url, "blob:"))] == []
    context.close()


def test_the_bundle_is_small_and_complete(built_viewer: Path) -> None:
    assert {path.name for path in built_viewer.iterdir()} >= {"viewer.js", "viewer.css", "LICENSES.md"}
    assert not list(built_viewer.glob("*.map"))
    script = "".join(path.read_text("utf-8") for path in built_viewer.glob("*.js"))
    assert len(script) < 1_500_000
    assert "sourceMappingURL" not in script
    assert not re.search(r"\bnew Function\(|[^.\w]eval\(", script)
    assert "@cornerstonejs/core" in (built_viewer / "LICENSES.md").read_text("utf-8")


def test_the_lock_file_names_no_registry() -> None:
    lock = json.loads((VIEWER_SOURCE / "package-lock.json").read_text("utf-8"))
    packages = {name: package for name, package in lock["packages"].items() if name}
    assert packages
    assert not [name for name, package in packages.items() if "resolved" in package]
    assert not [name for name, package in packages.items() if "integrity" not in package]
