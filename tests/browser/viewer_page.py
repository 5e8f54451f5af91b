"""A Chromium page with the built viewer on it: what the browser tests do to it and read from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Page

from tests.browser.viewer_site import PICTURES

COMMON = [
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
FLAGS = {
    "webgl": ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"],
    "cpu": ["--disable-gpu", "--disable-3d-apis"],
}


class Shot:
    """A page with the viewer, and what went wrong on it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def wait(self, condition: str) -> None:
        """Waits until an expression over `v`, the viewer's element, is true."""
        self.page.wait_for_function(f"() => {{ const v = document.getElementById('viewer'); return {condition}; }}")

    def data(self, name: str) -> str:
        return str(self.page.evaluate(f"document.getElementById('viewer').dataset.{name}"))

    def number(self, name: str) -> float:
        return float(self.data(name))

    def probe(self) -> dict[str, float]:
        probe: dict[str, float] = self.page.evaluate("document.getElementById('viewer').viewerProbe()")
        return probe

    def drawn(self, act: Callable[[], object]) -> None:
        """Acts, and waits until the picture was drawn again."""
        self.page.evaluate(
            "() => { const v = document.getElementById('viewer'); v.drawings = 0;"
            " v.addEventListener('viewer:rendered', () => v.drawings++); }"
        )
        act()
        self.wait("v.drawings > 0 && v.dataset.state === 'ready'")
        self.settle()

    def choose(self, image: int) -> None:
        """Changes to an image of the study, counted from 0."""
        if self.page.locator(".vw-images button").nth(image).get_attribute("aria-current") != "true":
            self.drawn(self.page.locator(".vw-images button").nth(image).click)

    def settle(self) -> None:
        """Two animation frames: every drawing that was asked for has happened."""
        self.page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    @property
    def stage(self) -> dict[str, float]:
        box = self.page.locator(".vw-stage").bounding_box()
        assert box
        return dict(box)

    def drag(self, dx: float, dy: float, *, button: Any = "left", at: tuple[float, float] = (0.5, 0.5)) -> None:
        box, mouse = self.stage, self.page.mouse
        x, y = box["x"] + box["width"] * at[0], box["y"] + box["height"] * at[1]
        mouse.move(x, y)
        mouse.down(button=button)
        mouse.move(x + dx / 2, y + dy / 2)
        mouse.move(x + dx, y + dy)
        mouse.up(button=button)

    def press(self, key: str) -> None:
        self.drawn(lambda: self.page.keyboard.press(key))

    def click(self, action: str) -> None:
        self.drawn(lambda: self.page.click(f"[data-action={action}]"))

    def grey(self, selector: str, x: float, y: float) -> list[int]:
        """RGBA of a canvas at a point of the stage in CSS pixels."""
        rgba: list[int] = self.page.evaluate(
            "([selector, x, y]) => { const c = document.querySelector(selector), k = c.width / c.clientWidth;"
            " const copy = new OffscreenCanvas(c.width, c.height).getContext('2d'); copy.drawImage(c, 0, 0);"
            " return [...copy.getImageData(Math.floor(x * k), Math.floor(y * k), 1, 1).data]; }",
            [selector, x, y],
        )
        return rgba

    def fitted(self, number: int, x: float, y: float) -> tuple[float, float]:
        """Where an image point lies on the stage while the image is fitted."""
        about = PICTURES[number].description
        row, column = about["spacing"] or (1, 1)
        aspect = row / column if row and column else 1
        box = self.stage
        scale = min(box["width"] / about["columns"], box["height"] / (about["rows"] * aspect))
        return (
            box["width"] / 2 + (x - about["columns"] / 2) * scale,
            box["height"] / 2 + (y - about["rows"] / 2) * scale * aspect,
        )


@contextmanager
def opened(browser: Browser, url: str, *, state: str = "ready", init: str = "", **options: Any) -> Iterator[Shot]:
    context = browser.new_context(viewport={"width": 1000, "height": 760}, **options)
    context.set_default_timeout(20_000)
    page = context.new_page()
    shot = Shot(page)
    page.add_init_script("window.violations = []; addEventListener('securitypolicyviolation', e => violations.push(e.violatedDirective));")
    if init:
        page.add_init_script(init)
    page.goto(url)
    shot.wait(f"v.dataset.state === '{state}'")
    yield shot
    assert page.evaluate("violations") == []
    context.close()
