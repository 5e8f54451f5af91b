"""Every scan that must be accepted is uploaded through the page, opened, and really drawn."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.app_box import Clinician, RunningBox

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("built_viewer")]


@pytest.fixture
def app(tmp_path: Path) -> Iterator[RunningBox]:
    running = RunningBox(tmp_path / "box")
    yield running
    running.stop()


def test_every_good_file_is_drawn(browser: Browser, app: RunningBox, shared: Path) -> None:
    with open(shared / "data" / "dicom_manifest.csv", newline="") as file:
        expected = {Path(row["file"]).name: row for row in csv.DictReader(file) if row["expectation"] == "ok"}
    assert len(expected) == 45
    someone = Clinician(browser, app)
    someone.log_in("reader")
    page = someone.page
    page.goto(f"{app.url}/upload")
    page.set_input_files("#files", [str(shared / "data" / "dicom" / name) for name in expected])
    someone.uploaded()
    expect(page.locator("#files-list > li")).to_have_count(45)
    expect(page.locator("#files-list > li a.open")).to_have_count(45)
    for study, images in _images(app).items():
        page.goto(f"{app.url}/studies/{study}")
        for place, image in enumerate(images):
            if place:
                page.locator(".vw-images button").nth(place).click()
            page.wait_for_selector(f'#viewer[data-state=ready][data-image-id="{image}"]', timeout=30_000)
            drawn = page.evaluate("() => document.getElementById('viewer').viewerProbe()")
            levels = _levels(page.request.get(f"{app.url}/api/instances/{image}/pixels").json())
            assert drawn["max"] - drawn["min"] >= min(levels, 10), (image, drawn, levels)
    assert sum(len(images) for images in _images(app).values()) == 45
    someone.clean()
    someone.context.close()


def _images(app: RunningBox) -> dict[int, list[int]]:
    """The images of each study, in the order that the page shows them in."""
    found: dict[int, list[int]] = {}
    rows = app.store.database.query("SELECT i.id, s.study_id FROM instances i JOIN series s ON s.id = i.series_id ORDER BY i.id")
    for row in rows:
        found.setdefault(row["study_id"], []).append(row["id"])
    return found


def _levels(meta: dict[str, Any]) -> int:
    """How many of the 256 grey levels the first frame spans in its own window (two files hold nearly one colour)."""
    if meta["samples"] == 3:
        return int(meta["max"] - meta["min"]) // 2  # colour is told by its channels, the probe by its luminance
    span = (meta["max"] - meta["min"]) * abs(meta["slope"])
    return int(min(1.0, span / meta["windows"][0][1]) * 255)
