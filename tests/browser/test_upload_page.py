"""The upload page where it must not say more than is so: pictures that wait for their form, views, a full disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, expect

from appliance.core.settings import Settings
from tests.browser.app_box import Clinician, Pages
from tests.support.scans import scan_bytes
from tests.support.web_box import Box, in_process

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("built_viewer")]


@pytest.fixture
def box(settings: Settings) -> Iterator[Box]:
    with in_process(settings) as running:
        yield running


@pytest.fixture
def clinician(box: Box, browser: Browser) -> Iterator[Clinician]:
    person = Clinician(browser, Pages(box))
    yield person
    person.context.close()


def pictures(folder: Path, count: int) -> list[str]:
    made = []
    for number in range(count):
        path = folder / f"film-{number}.png"
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (64, 64), np.uint8)).save(path)
        made.append(str(path))
    return made


def test_nothing_is_called_done_while_pictures_wait_for_their_form(clinician: Clinician, tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(scan_bytes())
    clinician.log_in("form")
    page = clinician.page
    page.goto(f"{clinician.app.url}/upload")
    page.set_input_files("#files", [str(tmp_path / "a.dcm"), *pictures(tmp_path, 2)])
    expect(page.locator("#files-list a.open")).to_have_count(1)
    expect(page.locator("#summary")).to_contain_text("2 pictures are not sent yet: fill in the form above.")
    expect(page.locator("#summary")).not_to_contain_text("All files are done")
    expect(page.locator("#upload")).to_have_attribute("data-done", "0")
    expect(page.locator("#to-list")).to_be_hidden()
    page.locator("#picture-form .thumbs button").first.click()
    expect(page.locator("#summary")).to_contain_text("1 pictures are not sent yet")
    page.locator("#drop-pictures").click()
    clinician.uploaded()
    expect(page.locator("#summary")).to_have_text("All files are done: 1 stored, 0 refused, 0 skipped.")
    clinician.clean()


def test_each_picture_has_a_view_of_its_own(clinician: Clinician, box: Box, tmp_path: Path) -> None:
    clinician.log_in("views")
    page = clinician.page
    page.goto(f"{clinician.app.url}/upload")
    page.set_input_files("#files", pictures(tmp_path, 3))
    form = page.locator("#picture-form")
    form.locator("#patient_name").fill("王小东")
    choices = form.locator("select.view-choice")
    expect(choices).to_have_count(3)
    choices.nth(0).select_option("AP")
    choices.nth(1).select_option("LL")
    form.locator("button.primary").click()
    expect(form.locator("#view-field")).to_have_attribute("aria-invalid", "true")  # the third has none yet
    form.locator("input[name=view][value=PA]").check()
    form.locator("button.primary").click()
    clinician.uploaded()
    views = [row["view_position"] for row in box.store.database.query("SELECT view_position FROM instances")]
    assert sorted(views) == ["AP", "LL", "PA"]
    page.set_input_files("#files", pictures(tmp_path, 1))
    expect(form.locator(".thumbs img")).to_have_count(1)
    expect(choices).to_have_count(0)
    clinician.clean()


def test_views_of_all_pictures_need_no_common_one(clinician: Clinician, box: Box, tmp_path: Path) -> None:
    clinician.log_in("own")
    page = clinician.page
    page.goto(f"{clinician.app.url}/upload")
    page.set_input_files("#files", pictures(tmp_path, 2))
    page.locator("#patient_id").fill("P-7")
    for place, view in enumerate(("PA", "LL")):
        page.locator("select.view-choice").nth(place).select_option(view)
    page.locator("#picture-form button.primary").click()
    clinician.uploaded()
    assert len(box.store.database.query("SELECT 1 FROM instances")) == 2


def test_a_full_disk_is_said_and_continue_goes_on_when_there_is_room(clinician: Clinician, tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(scan_bytes())
    clinician.log_in("full")
    page = clinician.page
    page.goto(f"{clinician.app.url}/upload")
    full = '{"type": "about:blank", "status": 507, "title": "full", "detail": "free some", "code": "ingest.disk_full"}'
    page.route("**/api/v1/tus", lambda route: route.fulfill(status=507, content_type="application/problem+json", body=full))
    page.set_input_files("#files", str(tmp_path / "a.dcm"))
    expect(page.locator("#trouble")).to_contain_text("The disk of the box is full. What arrived is kept.")
    expect(page.locator("#upload")).to_have_attribute("data-done", "0")
    page.unroute("**/api/v1/tus")
    page.get_by_role("button", name="Continue").click()
    clinician.uploaded()
    expect(page.locator("#trouble")).to_be_hidden()
    expect(page.locator("#files-list a.open")).to_have_count(1)
