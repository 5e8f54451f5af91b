"""The built viewer under the hands of a person: mouse, keys, fingers, and marks that must stay on the picture."""

from __future__ import annotations

import pytest
from playwright.sync_api import Browser

from tests.browser.viewer_page import Shot, opened
from tests.browser.viewer_site import PICTURES, ViewerSite

pytestmark = pytest.mark.browser


# ---------------------------------------------------------------------- mouse, keys, touch


def test_window_by_drag_preset_and_key(viewer_site: ViewerSite, viewer_browser: Browser) -> None:
    with opened(viewer_browser, viewer_site.page(2)) as shot:
        assert (shot.number("windowCenter"), shot.number("windowWidth")) == (400, 2000)
        before = shot.probe()["mean"]
        shot.drawn(lambda: shot.drag(0, 100))
        assert shot.number("windowCenter") > 500
        assert shot.number("windowWidth") == 2000
        assert shot.probe()["mean"] < before - 5
        shot.drawn(lambda: shot.drag(60, 0))
        assert shot.number("windowWidth") > 2050
        assert "2" in shot.page.inner_text(".vw-bottom-left")
        shot.press("1")
        assert (shot.number("windowCenter"), shot.number("windowWidth")) == (400, 2000)
        shot.press("]")
        assert shot.number("windowWidth") == pytest.approx(2200)
        shot.press("[")
        assert shot.number("windowWidth") == pytest.approx(1980)
        shot.press("'")
        shot.press("'")
        shot.press(";")
        assert shot.number("windowCenter") > 450
        shot.drawn(lambda: shot.page.click(".vw-text:has-text('Full range')"))
        assert shot.number("windowWidth") == PICTURES[2].description["max"] - PICTURES[2].description["min"] + 1
        assert shot.page.get_attribute(".vw-text:has-text('Full range')", "aria-pressed") == "true"


def test_zoom_pan_invert_and_reset(viewer_site: ViewerSite, viewer_browser: Browser) -> None:
    with opened(viewer_browser, viewer_site.page(1)) as shot:
        first = shot.number("zoom")
        mean = shot.probe()["mean"]
        box = shot.stage
        shot.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        shot.drawn(lambda: shot.page.mouse.wheel(0, -300))
        assert shot.number("zoom") == pytest.approx(first * 1.15**3, rel=1e-3)
        shot.drawn(lambda: shot.drag(0, 50, button="right"))
        assert shot.number("zoom") < first * 1.15**3
        shot.press("+")
        shot.press("-")
        outline = shot.page.locator(".vw-outline")
        for act in (
            lambda: shot.drag(40, 30, button="middle"),
            lambda: (shot.page.keyboard.down("Shift"), shot.drag(40, 30), shot.page.keyboard.up("Shift")),
        ):
            start = outline.bounding_box()
            shot.drawn(act)
            end = outline.bounding_box()
            assert start
            assert end
            assert (end["x"] - start["x"], end["y"] - start["y"]) == pytest.approx((40, 30), abs=0.2)
        shot.press("ArrowLeft")
        shot.click("invert")
        assert shot.data("inverted") == "true"
        shot.press("r")
        assert shot.data("inverted") == "false"
        assert shot.number("zoom") == pytest.approx(first)
        assert shot.probe()["mean"] == pytest.approx(mean, abs=0.5)
        shot.press("i")
        assert shot.probe()["mean"] == pytest.approx(255 - mean, abs=2)
        assert shot.page.get_attribute("[data-action=invert]", "aria-pressed") == "true"


def test_one_finger_windows_and_two_fingers_zoom(viewer_site: ViewerSite, viewer_browser: Browser) -> None:
    with opened(viewer_browser, viewer_site.page(2), has_touch=True) as shot:
        cdp = shot.page.context.new_cdp_session(shot.page)
        box = shot.stage
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

        def touch(kind: str, *points: tuple[float, float]) -> None:
            fingers = [{"x": px, "y": py, "id": index} for index, (px, py) in enumerate(points)]
            cdp.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})

        def one_finger() -> None:
            touch("touchStart", (x, y))
            touch("touchMove", (x, y + 80))
            touch("touchEnd")

        def pinch() -> None:
            touch("touchStart", (x - 50, y), (x + 50, y))
            touch("touchMove", (x - 100, y), (x + 100, y))
            touch("touchEnd")

        zoom = shot.number("zoom")
        shot.drawn(one_finger)
        assert shot.number("windowCenter") > 400
        assert shot.number("zoom") == zoom
        window = shot.data("windowCenter")
        shot.drawn(pinch)
        assert shot.number("zoom") == pytest.approx(zoom * 2, rel=0.02)
        assert shot.data("windowCenter") == window


def test_frames_by_wheel_key_and_slider(viewer_site: ViewerSite, viewer_browser: Browser) -> None:
    with opened(viewer_browser, viewer_site.page(7)) as shot:
        bright = shot.probe()["mean"]
        shot.press("PageDown")
        assert shot.data("frame") == "1"
        assert shot.probe()["mean"] < bright
        box = shot.stage
        shot.page.mouse.move(box["x"] + 300, box["y"] + 300)
        zoom = shot.number("zoom")
        shot.drawn(lambda: shot.page.mouse.wheel(0, 200))
        assert shot.data("frame") == "3"
        assert shot.number("zoom") == zoom
        shot.page.keyboard.down("Control")
        shot.drawn(lambda: shot.page.mouse.wheel(0, -100))
        shot.page.keyboard.up("Control")
        assert shot.number("zoom") > zoom
        shot.drawn(lambda: shot.page.fill(".vw-frames input", "5"))
        assert shot.data("frame") == "4"
        assert "5" in shot.page.inner_text(".vw-frame-label")
        shot.drawn(lambda: shot.page.click(".vw-frames button >> nth=0"))
        assert shot.data("frame") == "3"
        assert shot.errors == []


def test_lengths_in_millimetres_or_pixels(viewer_site: ViewerSite, viewer_browser: Browser) -> None:
    with opened(viewer_browser, viewer_site.page(1, 4, 5)) as shot:
        shot.click("modeMeasure")
        for index, (unit, per_pixel) in enumerate((("mm", 0.2), ("px", 1), ("px", 1))):
            shot.choose(index)
            shot.drawn(lambda: shot.drag(200, 0))
            text = shot.page.text_content(".vw-length-label") or ""
            assert text.endswith(unit)
            assert float(text.split()[0]) == pytest.approx(200 / shot.number("zoom") * per_pixel, rel=0.01)
            shot.click("lengthClear")
            assert shot.page.locator(".vw-length-label").count() == 0


def test_a_length_can_be_measured_with_the_keyboard(viewer_site: ViewerSite, viewer_browsers: dict[str, Browser]) -> None:
    with opened(viewer_browsers["webgl"], viewer_site.page(9)) as shot:
        shot.press("m")
        shot.press("Enter")
        for _ in range(3):
            shot.press("ArrowRight")
        shot.press("Enter")
        millimetres = float((shot.page.text_content(".vw-length-label") or "").split()[0])
        assert millimetres == pytest.approx(120 / shot.number("zoom") * 0.1, abs=0.11)
        shot.press("Delete")
        assert shot.page.locator(".vw-length-label").count() == 0


# ---------------------------------------------------------------------- marks


def _bright_box(shot: Shot) -> list[float]:
    """Left, top, right, bottom of the bright rectangle in the drawn picture, in CSS pixels with sub-pixel edges."""
    edges: list[float] = shot.page.evaluate(
        """() => {
          const c = document.querySelector('.cornerstone-canvas'), k = c.width / c.clientWidth;
          const g = new OffscreenCanvas(c.width, c.height).getContext('2d'); g.drawImage(c, 0, 0);
          const { data } = g.getImageData(0, 0, c.width, c.height);
          const columns = new Float64Array(c.width), rows = new Float64Array(c.height);
          for (let y = 0; y < c.height; y++) for (let x = 0; x < c.width; x++) {
            const v = data[(y * c.width + x) * 4]; columns[x] += v; rows[y] += v;
          }
          // The edge lies where a profile crosses half its height.
          const cross = (p, from, step) => {
            const half = Math.max(...p) / 2;
            let i = from;
            while (p[i] < half) i += step;
            return i + 0.5 - step * (p[i] - half) / (p[i] - p[i - step]);
          };
          return [cross(columns, 1, 1), cross(rows, 1, 1), cross(columns, c.width - 2, -1), cross(rows, c.height - 2, -1)]
            .map((value) => value / k);
        }"""
    )
    return edges


def _outline_box(shot: Shot) -> list[float]:
    box: list[float] = shot.page.evaluate(
        "() => { const b = document.querySelector('.vw-outline').getBBox(); return [b.x, b.y, b.x + b.width, b.y + b.height]; }"
    )
    return box


@pytest.mark.parametrize("ratio", [1, 1.5])
def test_the_outline_lies_on_what_was_drawn(viewer_site: ViewerSite, viewer_browser: Browser, ratio: float) -> None:
    with opened(viewer_browser, viewer_site.page(9), device_scale_factor=ratio) as shot:
        for act in (
            lambda: shot.page.keyboard.press("o"),
            lambda: shot.page.keyboard.press("o"),
            lambda: shot.page.keyboard.press("-"),
            lambda: shot.drag(60, -45, button="middle"),
            lambda: shot.page.keyboard.press("+"),
            lambda: shot.page.set_viewport_size({"width": 900, "height": 700}),
            lambda: shot.page.keyboard.press("0"),
        ):
            shot.drawn(act)
            if shot.page.locator(".vw-outline").count():
                assert _outline_box(shot) == pytest.approx(_bright_box(shot), abs=0.75)


def _heat_peak(shot: Shot) -> tuple[float, float]:
    """The middle of the strongest part of the drawn heat map, in CSS pixels of the stage."""
    x, y = shot.page.evaluate(
        """() => {
          const c = document.querySelector('.vw-heat'), k = c.width / c.clientWidth;
          const { data } = c.getContext('2d').getImageData(0, 0, c.width, c.height);
          let best = 0, sx = 0, sy = 0, n = 0;
          for (let i = 0; i < data.length; i += 4) best = Math.max(best, data[i + 1] * (data[i + 3] > 0));
          for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 0 && data[i + 1] >= best - 6) {
            const p = i / 4; sx += p % c.width + 0.5; sy += Math.floor(p / c.width) + 0.5; n++;
          }
          return [sx / n / k, sy / n / k];
        }"""
    )
    return float(x), float(y)


@pytest.mark.parametrize("number", [1, 8])
def test_the_heat_map_peaks_where_the_finding_does(viewer_site: ViewerSite, viewer_browser: Browser, number: int) -> None:
    about = PICTURES[number].description
    peak = (0.7 * about["columns"], 0.55 * about["rows"])
    with opened(viewer_browser, viewer_site.page(number)) as shot:
        assert shot.data("heatmap") == "off"
        shot.press("h")
        shot.wait("document.querySelector('.vw-scale').offsetParent !== null")
        shot.settle()
        assert shot.data("heatmap") == "on"
        assert _heat_peak(shot) == pytest.approx(shot.fitted(number, *peak), abs=2)
        shot.drawn(lambda: shot.page.set_viewport_size({"width": 1000, "height": 640}))
        assert _heat_peak(shot) == pytest.approx(shot.fitted(number, *peak), abs=2)
        x, y = _heat_peak(shot)
        shot.drawn(lambda: shot.drag(-30, 25, button="middle"))
        assert _heat_peak(shot) == pytest.approx((x - 30, y + 25), abs=2)
        box = shot.stage
        shot.page.mouse.move(box["x"] + x - 30, box["y"] + y + 25)
        shot.drawn(lambda: shot.page.mouse.wheel(0, -400))
        assert _heat_peak(shot) == pytest.approx((x - 30, y + 25), abs=3)


def test_opacity_and_switching_off(viewer_site: ViewerSite, viewer_browser: Browser) -> None:
    with opened(viewer_browser, viewer_site.page(1)) as shot:
        shot.press("h")
        shot.wait("document.querySelector('.vw-scale').offsetParent !== null")
        at = shot.fitted(1, 0.7 * 880, 0.55 * 1024)
        assert 110 <= shot.grey(".vw-heat", *at)[3] <= 145
        shot.drawn(lambda: shot.page.fill(".vw-opacity input", "100"))
        assert shot.grey(".vw-heat", *at)[3] > 245
        assert shot.grey(".vw-heat", *shot.fitted(1, 100, 100))[3] == 0
        shot.drawn(lambda: shot.page.fill(".vw-opacity input", "0"))
        assert shot.grey(".vw-heat", *at)[3] == 0
        shot.click("heatmap")
        assert shot.data("heatmap") == "off"
        assert shot.page.locator(".vw-outline").count() == 1
        shot.press("o")
        assert shot.page.locator(".vw-outline").count() == 0


def test_each_of_several_findings_can_be_shown(viewer_site: ViewerSite, viewer_browser: Browser) -> None:
    with opened(viewer_browser, viewer_site.page(14)) as shot:
        assert shot.page.locator(".vw-outline").count() == 1
        below = shot.page.locator(".vw-chip").nth(1)
        assert "0.22" in (below.get_attribute("aria-label") or "")
        assert "below the threshold" in (below.get_attribute("aria-label") or "")
        shot.drawn(below.click)
        assert shot.page.locator(".vw-outline.vw-below").count() == 1
        shot.drawn(shot.page.locator(".vw-chip").nth(0).click)
        assert shot.page.locator(".vw-outline").count() == 1
