"""The web process: gunicorn with one worker process of several threads, configured from the settings of the box.

Plain http is served on loopback only. With a certificate the pages are served over TLS by nginx (:mod:`webui.server.proxy`), and this
process listens on a Unix socket that no other account can open; only there it believes the address that nginx states.

The master process imports nothing of the application and stays small; it starts the worker process again when that ends unexpectedly.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gunicorn import util
from gunicorn.app.base import BaseApplication
from gunicorn.errors import AppImportError
from gunicorn.http.errors import ParseException
from gunicorn.workers.gthread import ThreadWorker

from appliance.core.errors import ApplianceError
from appliance.core.process import bracketed, die_with_parent, open_port, start_logging
from appliance.core.settings import Settings
from model_sync import messages
from model_sync.web_server import ErrorOnlyLogger, is_loopback
from webui.server.paced_body import WsgiApp, pace_bodies

if TYPE_CHECKING:
    from flask import Flask

    from webui.context import BoxContext

EXIT_USAGE: Final = 2
ADDRESS_FILE: Final = "web.json"
# A reader that does not take a chunk of an answer within this time loses its connection.
_SILENCE_S: Final = 30.0
# Linux: sun_path, with its last null byte.
_MAX_SOCKET_PATH: Final = 107
_STOP_S: Final = 10
_KEEP_ALIVE_S: Final = 75
_THREAD_STACK_BYTES: Final = 1 << 20


class QuietWorker(ThreadWorker):  # type: ignore[misc]
    """Gunicorn's threaded worker; an invalid request is quoted neither in the log nor in the answer (R18, R25)."""

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Refuse an invalid request, or answer one that crashed outside the application."""
        del req, addr
        is_invalid = isinstance(exc, ParseException)
        if is_invalid:
            self.log.warning("invalid request: %s", type(exc).__name__)
        else:
            self.log.error("request crashed", exc_info=exc)
        try:
            util.write_error(client, *((400, "Bad Request") if is_invalid else (500, "Internal Server Error")), "")
        except OSError:
            self.log.debug("client closed before its answer")


class Server(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    """Gunicorn, configured from the box's settings.

    Args:
        settings: the settings of the box.
        create_app: makes the application; called in the worker process only.
    """

    def __init__(self, settings: Settings, create_app: Callable[[Settings], Flask]) -> None:
        self._settings = settings
        self._create_app = create_app
        self.box: BoxContext | None = None
        super().__init__()

    def load_config(self) -> None:
        """Translate the settings into gunicorn's."""
        settings = self._settings
        values: dict[str, Any] = {
            "bind": f"unix:{socket_path(settings)}" if has_proxy(settings) else f"{bracketed(settings.web_host)}:{settings.web_port}",
            "umask": 0o077,
            "worker_class": "webui.server.process.QuietWorker",
            "workers": 1,
            "threads": settings.web_threads,
            "keepalive": _KEEP_ALIVE_S,
            "graceful_timeout": _STOP_S,
            "worker_tmp_dir": _heartbeat_directory(settings),
            "logger_class": ErrorOnlyLogger,
            "proc_name": "clinic-box-web",
            "forwarded_allow_ips": "",
            "forwarder_headers": "",
            "when_ready": None if has_proxy(settings) else _announce(settings),
            "post_fork": lambda _arbiter, _worker: die_with_parent(),
            "worker_exit": _stop_box,
            "control_socket_disable": True,
        }
        for name, value in values.items():
            if value is not None and name in self.cfg.settings:  # versions of gunicorn differ in the newest ones
                self.cfg.set(name, value)

    def load(self) -> WsgiApp:
        """Make the application, in the worker process."""
        threading.stack_size(_THREAD_STACK_BYTES)
        try:
            app = self._create_app(self._settings)
        except ApplianceError as error:  # a box that cannot be opened (a lost key): said once, and the server ends
            raise AppImportError(error_lines(error)) from error
        self.box = app.extensions["box"]
        from werkzeug.middleware.proxy_fix import ProxyFix  # here: the master process does without

        served = ProxyFix(app.wsgi_app, x_for=1, x_proto=1, x_host=0) if has_proxy(self._settings) else app.wsgi_app
        return pace_bodies(served, _SILENCE_S)


def has_proxy(settings: Settings) -> bool:
    """Whether nginx stands in front of this process: wherever there is TLS."""
    return settings.tls_certificate is not None


def check(settings: Settings) -> None:
    """Refuse settings that must not be served.

    Raises:
        ApplianceError: plain http beyond loopback; half of a pair, or one that does not fit together (``tls.…``); a data directory whose
            path is too long for a socket.
    """
    if settings.tls_certificate is not None or settings.tls_key is not None:
        from appliance.core.certificates import load_pair  # here: a box on loopback does without

        load_pair(settings.tls_certificate, settings.tls_key)
        if len(os.fsencode(socket_path(settings))) > _MAX_SOCKET_PATH:
            raise ApplianceError("settings.invalid", f"data_dir: longer than a socket's path may be: {settings.data_dir}")
    elif not is_loopback(settings.web_host):
        hint = "Set tls_certificate and tls_key, or web_host = 127.0.0.1."
        raise ApplianceError("settings.invalid", f"web_host {settings.web_host} needs TLS: plain http is for loopback only", hint=hint)


def socket_path(settings: Settings) -> Path:
    """Where this process listens behind nginx."""
    return run_directory(settings) / "web.sock"


def main(create_app: Callable[[Settings], Flask], argv: list[str] | None = None) -> int:
    """Serve an application until SIGTERM; returns the exit code (2 when the settings forbid it)."""
    parser = argparse.ArgumentParser(prog="python -m webui", description="Serve the pages of the box.")
    parser.add_argument("--data-dir", type=Path, required=True, help="the box's data directory")
    arguments = parser.parse_args(argv)
    os.umask(0o077)  # only this account may read what people upload
    start_logging(logging.getLevelName(os.environ.get("APPLIANCE_LOG_LEVEL", "INFO").upper()))
    try:
        settings = Settings.load(arguments.data_dir)
        check(settings)
        if not has_proxy(settings):
            open_port("web_port", settings.web_host, settings.web_port).close()  # gunicorn would try five times and name no setting
    except ApplianceError as error:
        print(error_lines(error), file=sys.stderr)
        return EXIT_USAGE
    Server(settings, create_app).run()
    return 0


def error_lines(error: ApplianceError) -> str:
    """What the log says of an error that ends the process, for the technician."""
    is_own_hint = error.hint != messages.hint(error.code, "en")
    return f"error: {error}\nhint: {error.hint if is_own_hint else messages.hint(error.code, 'en', 'technician')}"


def write_address(settings: Settings, scheme: str, port: int) -> None:
    """Publish the address of the pages: one printed line for people, ``run/web.json`` for programs."""
    url = f"{scheme}://{bracketed(settings.web_host)}:{port}/"
    path = run_directory(settings) / ADDRESS_FILE
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"scheme": scheme, "port": port, "url": url, "pid": os.getpid()}))
    new.replace(path)
    print(f"Listening on {url}", flush=True)


def _announce(settings: Settings) -> Callable[[Any], None]:
    """Publish the address once the port is open."""
    return lambda arbiter: write_address(settings, "http", arbiter.LISTENERS[0].sock.getsockname()[1])


def _stop_box(_arbiter: Any, worker: Any) -> None:
    """Stop the work beside the requests when the worker process ends."""
    box: BoxContext | None = getattr(worker.app, "box", None)
    if box is not None:
        box.stop()


def run_directory(settings: Settings) -> Path:
    """``run``: sockets, addresses and locks of what runs now."""
    directory = settings.data_dir / "run"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def _heartbeat_directory(settings: Settings) -> str:
    """The directory where gunicorn touches a file every second: in memory if possible, to spare flash storage."""
    memory = Path("/dev/shm")  # noqa: S108 - an empty, unlinked file without content
    return str(memory if os.access(memory, os.W_OK) else run_directory(settings))
