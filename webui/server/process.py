"""The web process: gunicorn with one worker process of several threads, configured from the settings of the box.

Plain http is served on loopback only; every other address needs TLS. The master process imports nothing of the application and stays
small; it starts the worker process again when that ends unexpectedly.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gunicorn.app.base import BaseApplication
from gunicorn.errors import AppImportError

from appliance.core.errors import ApplianceError
from appliance.core.process import die_with_parent, start_logging
from appliance.core.settings import Settings
from model_sync.web_server import ErrorOnlyLogger, is_loopback, tls_context_factory
from webui.server import connection_guard

if TYPE_CHECKING:
    from flask import Flask

    from webui.context import BoxContext

EXIT_USAGE: Final = 2
ADDRESS_FILE: Final = "web.json"
# The longest time that a sender or reader may hold a thread without transferring a byte.
_SILENCE_S: Final = 30.0
_STOP_S: Final = 10
_KEEP_ALIVE_S: Final = 75
_THREAD_STACK_BYTES: Final = 1 << 20

WsgiApp = Callable[[dict[str, Any], Any], Iterable[bytes]]


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
            "bind": f"{_bracketed(settings.web_host)}:{settings.web_port}",
            "worker_class": "webui.server.connection_guard.GuardedWorker",
            "workers": 1,
            "threads": settings.web_threads,
            "worker_connections": connection_guard.MAX_CONNECTIONS,
            "keepalive": _KEEP_ALIVE_S,
            "graceful_timeout": _STOP_S,
            "worker_tmp_dir": _heartbeat_directory(settings),
            "logger_class": ErrorOnlyLogger,
            "proc_name": "clinic-box-web",
            "forwarded_allow_ips": "",
            "when_ready": _announce(settings),
            "post_fork": lambda _arbiter, _worker: die_with_parent(),
            "worker_exit": _stop_box,
            "control_socket_disable": True,
        }
        if settings.tls_certificate:
            values |= {"certfile": str(settings.tls_certificate), "keyfile": str(settings.tls_key), "ssl_context": tls_context_factory()}
        for name, value in values.items():
            if name in self.cfg.settings:  # versions of gunicorn differ in the newest ones
                self.cfg.set(name, value)

    def load(self) -> WsgiApp:
        """Make the application, in the worker process."""
        threading.stack_size(_THREAD_STACK_BYTES)
        try:
            app = self._create_app(self._settings)
        except ApplianceError as error:  # a box that cannot be opened (a lost key): said once, and the server ends
            raise AppImportError(_error_lines(error)) from error
        self.box = app.extensions["box"]
        return _with_socket_timeout(app.wsgi_app)


def check(settings: Settings) -> None:
    """Refuse settings that must not be served.

    Raises:
        ApplianceError: plain http beyond loopback, or half a TLS configuration.
    """
    if (settings.tls_certificate is None) != (settings.tls_key is None):
        raise ApplianceError("settings.invalid", "tls_certificate and tls_key belong together")
    for path in (settings.tls_certificate, settings.tls_key):
        if path is not None and not path.is_file():
            raise ApplianceError("settings.invalid", f"no such file: {path}")
    if settings.tls_certificate is None and not is_loopback(settings.web_host):
        hint = "Set tls_certificate and tls_key, or web_host = 127.0.0.1."
        raise ApplianceError("settings.invalid", f"web_host {settings.web_host} needs TLS: plain http is for loopback only", hint=hint)


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
    except ApplianceError as error:
        print(_error_lines(error), file=sys.stderr)
        return EXIT_USAGE
    Server(settings, create_app).run()
    return 0


def _error_lines(error: ApplianceError) -> str:
    return f"error: {error}\nhint: {error.hint}"


def _announce(settings: Settings) -> Callable[[Any], None]:
    """Publish the address once the port is open: one printed line for people, ``run/web.json`` for programs."""

    def when_ready(arbiter: Any) -> None:
        scheme = "https" if settings.tls_certificate else "http"
        port = arbiter.LISTENERS[0].sock.getsockname()[1]
        url = f"{scheme}://{_bracketed(settings.web_host)}:{port}/"
        path = _run_directory(settings) / ADDRESS_FILE
        new = path.with_suffix(".new")
        new.write_text(json.dumps({"scheme": scheme, "port": port, "url": url, "pid": os.getpid()}))
        new.replace(path)
        print(f"Listening on {url}", flush=True)

    return when_ready


def _stop_box(_arbiter: Any, worker: Any) -> None:
    """Stop the work beside the requests when the worker process ends."""
    box: BoxContext | None = getattr(worker.app, "box", None)
    if box is not None:
        box.stop()


def _with_socket_timeout(app: WsgiApp) -> WsgiApp:
    """Limit how long a connection may be silent within a request, so that a pulled cable does not hold a thread for ever."""

    def call(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        connection = environ.get("gunicorn.socket")
        if connection is not None:
            connection.settimeout(_SILENCE_S)
        return app(environ, start_response)

    return call


def _run_directory(settings: Settings) -> Path:
    directory = settings.data_dir / "run"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def _heartbeat_directory(settings: Settings) -> str:
    """The directory where gunicorn touches a file every second: in memory if possible, to spare flash storage."""
    memory = Path("/dev/shm")  # noqa: S108 - an empty, unlinked file without content
    return str(memory if os.access(memory, os.W_OK) else _run_directory(settings))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
