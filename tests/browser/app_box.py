"""A whole box with its pages, and a clinician at a PC, for the browser tests."""

from __future__ import annotations

import threading
from pathlib import Path

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page

from appliance.core.settings import Settings
from appliance.lifecycle.model_control import reference_bundle
from appliance.service.supervisor import Supervisor, web_address
from appliance.store.accounts import Accounts
from appliance.store.store import Store
from tests.support.activated import activate
from tests.support.web_box import Box, own_password, wait_for

READY = "#viewer[data-state=ready]"


class RunningBox:
    """A whole box: worker, receiver and pages under their supervisor."""

    def __init__(self, data_dir: Path) -> None:
        data_dir.mkdir(parents=True)
        (data_dir / "box.toml").write_text("web_port = 0\ndicom_port = 0\ndisk_reserve_bytes = 0\ntune_at_activation = false\n")
        self.settings = Settings.load(data_dir)
        self.store = Store(self.settings)
        self.accounts = Accounts(self.store)
        activate(self.store, reference_bundle(), "test")
        self.supervisor = Supervisor(self.settings, data_dir / "box.log")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: self.supervisor.run(self._stop.is_set))
        self.supervisor.start()
        wait_for(self._up, 60)
        self._thread.start()
        self.url = f"http://127.0.0.1:{(web_address(self.settings) or {})['port']}"

    def _up(self) -> bool:
        self.supervisor.tick()
        return self.supervisor.ready()

    def stop(self) -> None:
        """Stop everything; may be called twice."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            self.supervisor.stop()

    def password(self, username: str) -> str:
        """An account with a password of its own."""
        return own_password(self.accounts, username)


class Pages:
    """The pages alone, without worker and receiver: what stands in the tables stays as the test wrote it."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.settings = box.settings
        self.store = box.store
        self.accounts = box.accounts
        self.url = box.base

    def password(self, username: str) -> str:
        """An account with a password of its own."""
        return own_password(self.accounts, username)


class Clinician:
    """Somebody at a PC, whose page reports every error and every request that leaves the box."""

    def __init__(self, browser: Browser, app: RunningBox | Pages, *, width: int = 1280, height: int = 900, locale: str = "zh-CN") -> None:
        self.app = app
        self.context: BrowserContext = browser.new_context(
            viewport={"width": width, "height": height}, locale=locale, timezone_id="Asia/Shanghai"
        )
        self.context.set_default_timeout(40_000)
        self.errors: list[str] = []
        self.outside: list[str] = []
        self.page = self.open()

    def open(self) -> Page:
        """Another tab."""
        page = self.context.new_page()
        page.on("console", self._note_console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on(
            "request",
            lambda request: None if request.url.startswith((self.app.url, "blob:", "data:")) else self.outside.append(request.url),
        )
        return page

    def speak(self, language: str) -> None:
        self.context.add_cookies([{"name": "lang", "value": language, "url": self.app.url}])

    def _note_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(f"{message.text} {message.location['url']}")

    def log_in(self, username: str, language: str = "en") -> None:
        """Log in with a password of one's own."""
        self.speak(language)
        password = self.app.password(username)
        self.page.goto(f"{self.app.url}/login")
        self.page.fill("#username", username)
        self.page.fill("#password", password)
        self.page.click("form.card button.primary")
        self.page.wait_for_selector("#list")

    def uploaded(self) -> None:
        """Wait until the upload page says that all is done."""
        self.page.wait_for_selector('#upload[data-done="1"]', timeout=90_000)

    def clean(self) -> None:
        """Nothing went wrong and nothing left the box."""
        assert self.errors == [], self.errors
        assert self.outside == []
