"""What several rooms' tests need: real scans where they stand beside the clone, a fresh box, the built viewer, Chromium."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from argon2 import PasswordHasher
from playwright.sync_api import Browser, Playwright, sync_playwright

from appliance.core.settings import Settings
from appliance.store import passwords
from appliance.store.store import Store

CHROMIUM_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
]  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

# A busy machine says nothing about the code: what must be quick measures its own time.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")


@pytest.fixture(autouse=True)
def no_log_handler_is_left() -> Iterator[None]:
    """A command that runs in this process logs to the standard error of its test, which is closed when the next one logs."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler and handler not in before]:
        root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The real scans and models that stand beside the project's own clone; no user's clone has them."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the real scans of ../shared, which this clone does not have beside it")
    return SHARED


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of a fresh box in a folder of its own, on ports the kernel chooses; nothing is measured when a model is put to work."""
    given = {"data_dir": tmp_path / "box", "web_port": 0, "dicom_port": 0, "disk_reserve_bytes": 0}
    return Settings.parse(given | {"tune_at_activation": False, "tune_idle_wait_s": 0})


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    """A fresh store."""
    fresh = Store(settings)
    yield fresh
    fresh.close()


@pytest.fixture
def quick_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real hashes that cost less, for tests that check many passwords."""
    quick = PasswordHasher(time_cost=1, memory_cost=1024, parallelism=1)
    monkeypatch.setattr(passwords, "_HASHER", quick)
    monkeypatch.setattr(passwords, "UNKNOWN_HASH", quick.hash("nobody's"))


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of Debian's Chromium (`make setup-test` installs it); its headless shell takes half the processor time."""
    path = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "chromium-browser"))), None)
    assert path, "Chromium is missing: run `make setup-test`"
    return path


@pytest.fixture(scope="session")
def built_viewer() -> Path:
    """The viewer as make built it."""
    directory = ROOT / "webui" / "static" / "viewer"
    assert (directory / "viewer.js").is_file(), "the viewer is not built: run `make viewer`"
    return directory


@pytest.fixture(scope="session")
def playwright_driver() -> Iterator[Playwright]:
    """Playwright's one driver of this process: a second one beside it is refused, in whatever file it is started."""
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="session")
def browser(playwright_driver: Playwright, chromium: str) -> Iterator[Browser]:
    """One Chromium of this process; each test opens a context of its own."""
    launched = playwright_driver.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
    yield launched
    launched.close()
