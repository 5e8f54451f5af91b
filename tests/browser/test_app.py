"""The whole way as a clinician goes it: log in, drop films, see the result appear, look at it, in both languages, by any hand."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from appliance.core.domain import Source
from appliance.ingest.ingest import Ingest
from quantize.reference.phantom import write_samples
from tests.browser.app_box import READY, Clinician, RunningBox
from tests.conftest import SHARED
from tests.support.scans import scan_bytes
from tests.support.web_box import PASSWORD, wait_for
from tests.support.worker_box import chest

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("built_viewer")]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBox]:
    running = RunningBox(tmp_path_factory.mktemp("app") / "box")
    yield running
    running.stop()


@pytest.fixture
def clinician(browser: Browser, app: RunningBox) -> Iterator[Clinician]:
    person = Clinician(browser, app)
    yield person
    person.context.close()


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A DICOM film and a picture: real ones where they are at hand, drawn ones elsewhere."""
    if (SHARED / "data").is_dir():
        return SHARED / "data" / "dicom" / "CR_RG1_J2KI.dcm", sorted((SHARED / "data" / "cxr").glob("*.png"))[0]
    directory = tmp_path_factory.mktemp("films")
    write_samples(directory)
    picture = directory / "picture.png"
    Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1))).save(picture)
    return sorted(directory.glob("*.dcm"))[0], picture


def test_the_first_day_of_a_clinician(browser: Browser, app: RunningBox, films: tuple[Path, Path]) -> None:
    someone = Clinician(browser, app)
    page, one_time = someone.page, app.accounts.add("first", "clinician", "test")
    page.goto(app.url)
    page.fill("#username", "first")
    page.fill("#password", one_time)
    page.click("form.card button.primary")
    expect(page.locator("h1")).to_have_text("设置自己的密码")
    for field, value in (("#old", one_time), ("#new", PASSWORD), ("#again", PASSWORD)):
        page.fill(field, value)
    page.click("form.card button.primary")
    expect(page.locator(".empty h2")).to_have_text("还没有检查")
    someone.page = someone.open()
    _upload_both(someone, films)
    page.bring_to_front()  # the list was open all the time and is not reloaded
    rows = page.locator("#list tbody tr")
    expect(rows).to_have_count(2)
    expect(page.locator('#list tr[data-state="ai_ready"]')).to_have_count(2, timeout=30_000)
    expect(page.locator("#live")).to_have_text("列表自动更新。")
    expect(rows.first).to_contain_text("王小东")
    rows.last.locator(".row-link").click()
    _look_at_the_study(page)
    someone.clean()
    someone.context.close()


def _upload_both(someone: Clinician, films: tuple[Path, Path]) -> None:
    page = someone.page
    page.goto(f"{someone.app.url}/upload")
    page.set_input_files("#files", [str(film) for film in films])
    form = page.locator("#picture-form")
    expect(form.locator(".thumbs img")).to_have_count(1)
    form.locator("button.primary").click()
    expect(form.locator("#form-error")).to_be_visible()
    expect(form.locator("#patient_name")).to_have_attribute("aria-invalid", "true")
    form.locator("#patient_name").fill("王小东")
    form.locator("#age").fill("4")
    form.locator("input[name=patient_sex][value=M]").check()
    form.locator("input[name=view][value=PA]").check()
    form.locator("input[name=photographed]").check()
    form.locator("button.primary").click()
    someone.uploaded()
    expect(form).to_be_hidden()
    expect(page.locator("#files-list > li")).to_have_count(2)
    expect(page.locator("#files-list a.open")).to_have_count(2)
    expect(page.locator("#summary")).to_have_text("全部完成：保存 2，拒收 0，跳过 0。")


def _look_at_the_study(page: Page) -> None:
    viewer = page.locator(READY)
    expect(viewer).to_be_visible(timeout=30_000)
    expect(page.locator(".not-sole")).to_have_text("不得单独作为诊断依据")
    expect(page.locator(".finding")).to_contain_text("灵敏度")
    assert page.evaluate("() => document.getElementById('viewer').viewerProbe().max") > 100
    page.get_by_role("button", name="热图", exact=True).click()
    expect(viewer).to_have_attribute("data-heatmap", "on")
    before = viewer.get_attribute("data-window-width")
    box = page.locator(".vw-stage").bounding_box()
    assert box
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 120, y + 40, steps=5)
    page.mouse.up()
    assert viewer.get_attribute("data-window-width") != before
    page.get_by_role("button", name="English").click()
    expect(page.locator(".not-sole")).to_have_text("Not for sole diagnosis")
    expect(page.locator(READY)).to_be_visible(timeout=30_000)
    expect(page.get_by_role("button", name="Heat map", exact=True)).to_be_visible()
    expect(page.locator("html")).to_have_attribute("lang", "en")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A scan of several chunks."""
    path = tmp_path / "large.dcm"
    pixels = np.random.default_rng(5).integers(0, 4096, (3000, 3000), dtype=np.uint16)
    path.write_bytes(scan_bytes(Rows=3000, Columns=3000, PixelData=pixels.tobytes(), PatientName="Large^Scan"))
    return path


def test_an_upload_goes_on_after_a_broken_line(clinician: Clinician, large: Path) -> None:
    clinician.log_in("broken")
    page, cut = clinician.page, [True]
    page.goto(f"{clinician.app.url}/upload")
    page.route(
        "**/api/v1/tus/*", lambda route: route.abort() if route.request.method == "PATCH" and cut and cut.pop() else route.continue_()
    )
    page.set_input_files("#files", str(large))
    clinician.uploaded()
    assert not cut
    expect(page.locator("#files-list a.open")).to_have_count(1)
    assert all("ERR_FAILED" in error for error in clinician.errors)


def test_an_upload_goes_on_after_a_reload(clinician: Clinician, large: Path) -> None:
    clinician.log_in("reload")
    page = clinician.page
    page.goto(f"{clinician.app.url}/upload")
    page.route("**/api/v1/tus/*", lambda route: route.abort() if route.request.method == "PATCH" else route.continue_())
    page.set_input_files("#files", str(large))
    expect(page.locator("#files-list .file-state")).to_have_text("connection broken, trying again")
    page.on("dialog", lambda dialog: dialog.accept())
    page.reload()
    expect(page.locator("#unfinished")).to_contain_text("large.dcm")
    assert page.evaluate("() => JSON.stringify(localStorage)").count("large") == 0
    page.unroute("**/api/v1/tus/*")
    created: list[str] = []
    page.on("request", lambda request: created.append(request.url) if request.method == "POST" and request.url.endswith("/tus") else None)
    page.set_input_files("#files", str(large))
    clinician.uploaded()
    assert created == []
    expect(page.locator("#files-list a.open")).to_have_count(1)
    assert page.evaluate("() => localStorage.length") == 0


def test_a_line_that_stays_broken_is_said_and_continue_works(clinician: Clinician, large: Path) -> None:
    clinician.log_in("lost")
    page = clinician.page
    page.goto(f"{clinician.app.url}/upload")
    page.route("**/api/v1/tus/*", lambda route: route.fulfill(status=401) if route.request.method == "PATCH" else route.continue_())
    page.set_input_files("#files", str(large))
    expect(page.locator("#trouble")).to_contain_text("You have been logged out", timeout=30_000)
    page.reload()
    page.unroute("**/api/v1/tus/*")
    page.route("**/outcome*", lambda route: route.fulfill(status=404, body="{}"))
    page.set_input_files("#files", str(large))
    expect(page.locator("#trouble")).to_contain_text("The connection to the box is lost")
    page.unroute("**/outcome*")
    page.get_by_role("button", name="Continue").click()
    clinician.uploaded()
    expect(page.locator("#trouble")).to_be_hidden()


def test_many_files_a_folder_and_a_zip_each_get_their_line(clinician: Clinician, tmp_path: Path) -> None:
    folder = tmp_path / "disc"
    (folder / "inner").mkdir(parents=True)
    for number in range(30):
        (folder / "inner" / f"{number}.dcm").write_bytes(scan_bytes())
    (folder / "readme.txt").write_text("a text")
    (folder / "broken.dcm").write_bytes(scan_bytes()[:900])
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for number in range(20):
            archive.writestr(f"{number}.dcm", scan_bytes())
        archive.writestr("bad.dcm", b"nothing")
    clinician.log_in("many")
    page = clinician.page
    page.goto(f"{clinician.app.url}/upload")
    page.set_input_files("#folder", str(folder))
    page.set_input_files("#files", str(tmp_path / "all.zip"))
    clinician.uploaded()
    expect(page.locator("#summary")).to_have_text("All files are done: 50 stored, 2 refused, 1 skipped.")
    expect(page.locator("#files-list > li")).to_have_count(33)
    first = page.locator("#files-list > li").first  # what needs a person stands first
    expect(first).to_contain_text("Refused")
    expect(page.locator("#files-list")).to_contain_text("disc/inner/7.dcm")
    expect(page.locator("#files-list")).to_contain_text("Not a DICOM file")
    clinician.clean()


def test_a_drop_anywhere_on_the_page_is_taken(clinician: Clinician) -> None:
    clinician.log_in("drop")
    page = clinician.page
    page.goto(f"{clinician.app.url}/upload")
    page.evaluate(
        "() => { const data = new DataTransfer(); data.items.add(new File(['text'], 'dropped.txt'));"
        " document.body.dispatchEvent(new DragEvent('dragover', { dataTransfer: data, bubbles: true }));"
        " document.body.dispatchEvent(new DragEvent('drop', { dataTransfer: data, bubbles: true })); }"
    )
    clinician.uploaded()
    expect(page.locator("#files-list")).to_contain_text("dropped.txt")
    expect(page.locator("#files-list")).to_contain_text("Skipped")


def test_by_keyboard_alone(clinician: Clinician, tmp_path: Path) -> None:
    scan = tmp_path / "a.dcm"
    scan.write_bytes(scan_bytes(PatientName="Key^Board"))
    clinician.log_in("keyboard")
    page = clinician.page
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.textContent.trim()") == "Upload":
            break
    page.keyboard.press("Enter")
    page.wait_for_selector("#upload")
    page.wait_for_load_state("load")  # its script takes over the form: not in the middle of the keys
    for _ in range(15):
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.id") == "files":
            break
    assert page.evaluate("() => getComputedStyle(document.querySelector('label[for=files]')).outlineStyle") == "solid"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space")
    chooser.value.set_files(str(scan))
    clinician.uploaded()
    page.locator("#files-list a.open").focus()
    page.keyboard.press("Enter")
    expect(page.locator(READY)).to_be_visible(timeout=30_000)


def test_a_result_that_comes_while_one_looks_does_not_move_the_image(clinician: Clinician) -> None:
    clinician.log_in("looking")
    accepted = Ingest(clinician.app.store).accept(chest(seed=3), Source("upload", "test", "x"))
    page = clinician.page
    page.goto(f"{clinician.app.url}/studies/{accepted.stored.study_id}")
    expect(page.locator(".state-word")).to_contain_text("Waiting for more images")
    expect(page.locator("#report .finding")).to_be_visible(timeout=30_000)
    expect(page.locator(READY)).to_be_visible(timeout=30_000)
    expect(page.locator("#arrived")).to_be_visible()
    expect(page.locator("#viewer [data-action=outline]")).to_be_visible()
    assert page.evaluate("() => performance.getEntriesByType('navigation')[0].type") == "navigate"  # no reload
    clinician.clean()


@pytest.mark.parametrize(("width", "height"), [(360, 740), (1024, 768)])
@pytest.mark.parametrize("language", ["zh", "en"])
def test_r39_small_screens_scroll_one_way_and_targets_are_large(
    browser: Browser, app: RunningBox, width: int, height: int, language: str
) -> None:
    someone = Clinician(browser, app, width=width, height=height)
    someone.log_in("small", language)
    page = someone.page
    study = Ingest(app.store).accept(chest(seed=5), Source("upload", "test", "x")).stored.study_id
    wait_for(lambda: app.store.queue.pending_jobs() == 0, 60)  # the page of a study changes while it is analysed
    for path in ("/", "/upload", "/rejected", "/health", f"/studies/{study}", "/password"):
        page.goto(app.url + path)
        assert page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0, path
        for target in page.locator("a:visible, button:visible, summary:visible, select:visible, label.button:visible").all():
            if target.evaluate("node => node.closest('#viewer, .banner, .list') !== null || node.classList.contains('skip')"):
                continue  # the viewer has tests of its own; a line of the list is one target as a whole
            box = target.bounding_box()
            assert box
            assert min(box["width"], box["height"]) >= 43.5, (path, target.inner_text())
    someone.clean()
    someone.context.close()


def test_a_session_that_ended_elsewhere_is_said(clinician: Clinician) -> None:
    clinician.log_in("ended")
    expect(clinician.page.locator("#live")).to_have_text("This list updates by itself.")
    clinician.app.accounts.issue_one_time_password("ended", "test")  # a new one-time password ends every session
    expect(clinician.page.locator("#logged-out")).to_be_visible(timeout=30_000)


def test_the_list_polls_the_revision_and_gets_an_answer_only_when_something_changed(clinician: Clinician) -> None:
    statuses: list[int] = []
    clinician.page.on("response", lambda answer: statuses.append(answer.status) if answer.url.endswith("/api/v1/revision") else None)
    clinician.log_in("interval")
    expect(clinician.page.locator("#live")).to_have_text("This list updates by itself.")
    assert set(statuses) == {304}
    Ingest(clinician.app.store).accept(scan_bytes(PatientName="Polled^Patient"), Source("upload", "test", "x"))
    expect(clinician.page.locator("#list tbody tr").first).to_contain_text("Polled Patient", timeout=15_000)
    assert 200 in statuses
    clinician.clean()


def test_a_box_that_is_gone_is_said(browser: Browser, tmp_path: Path) -> None:
    app = RunningBox(tmp_path / "box")
    try:
        someone = Clinician(browser, app)
        someone.log_in("gone")
        app.stop()
        expect(someone.page.locator("#live.is-lost")).to_contain_text("No connection to the box", timeout=40_000)
        someone.context.close()
    finally:
        app.stop()


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours (WCAG 2.2, 1.4.3)."""

    def luminance(colour: str) -> float:
        colour = colour.lstrip("#")
        colour = "".join(char * 2 for char in colour) if len(colour) == 3 else colour
        parts = [int(colour[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_r39_contrast_of_every_pair_of_colours() -> None:
    css = (Path(__file__).parents[2] / "webui" / "viewer" / "src" / "styles" / "tokens.css").read_text()
    colours = dict(re.findall(r"--([\w-]+): (#\w+);", css))
    pairs = [("text", "ground"), ("text", "card"), ("quiet", "ground"), ("quiet", "card"), ("accent", "card"), ("accent", "ground")]
    pairs += [(name.removesuffix("-ground"), name) for name in colours if name.startswith("tone-") and name.endswith("-ground")]
    pairs += [("quiet", "tone-warn-ground"), ("text", "tone-warn-ground"), ("text", "tone-quiet-ground")]
    for ink, paper in pairs:
        assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
    for paper in ("brand", "accent", "tone-bad"):
        assert contrast("#fff", colours[paper]) >= 4.5, paper
