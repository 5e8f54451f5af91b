"""The web process: gunicorn with one worker process of threads, started from Python, so that the settings are the box's own.

Plain http is served on loopback alone; every other address needs TLS. The master imports nothing of the application and stays
small; it starts the worker process again when that falls.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import logging
import os
import ssl
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gunicorn.app.base import BaseApplication

from appliance.core.errors import ApplianceError
from appliance.core.process import die_with_parent, start_logging
from appliance.core.settings import Settings
from webui import gate

if TYPE_CHECKING:
    from webui.box import Box

EXIT_USAGE: Final = 2
ADDRESS_FILE: Final = "web.json"
# The longest a sender or reader may hold a thread without a byte moving.
_SILENCE_S: Final = 30.0
_STOP_S: Final = 10
_KEEP_ALIVE_S: Final = 75
_THREAD_STACK_BYTES: Final = 1 << 20

WsgiApp = Callable[[dict[str, Any], Any], Iterable[bytes]]


class Worker(gate.Worker):
    """The threads behind the gate, with the live streams told when the process is asked to stop."""

    def handle_exit(self, sig: int, frame: object) -> None:
        """SIGTERM: streams end now, requests under way are finished."""
        box: Box | None = getattr(self.app, "box", None)
        if box is not None:
            box.feed.stop()
        super().handle_exit(sig, frame)


class Server(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    """Gunicorn, configured from the box's settings."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.box: Box | None = None
        super().__init__()

    def load_config(self) -> None:
        """Translate the settings into gunicorn's."""
        settings = self._settings
        values: dict[str, Any] = {
            "bind": f"{_bracketed(settings.web_host)}:{settings.web_port}",
            "worker_class": "webui.server.Worker",
            "workers": 1,
            "threads": settings.web_threads,
            "worker_connections": gate.CONNECTIONS,
            "keepalive": _KEEP_ALIVE_S,
            "graceful_timeout": _STOP_S,
            "worker_tmp_dir": _heartbeat_directory(settings),
            "logger_class": "webui.server.QuietLogger",
            "proc_name": "clinic-box-web",
            "forwarded_allow_ips": "",
            "when_ready": _announce(settings),
            "post_fork": lambda _arbiter, _worker: die_with_parent(),
            "worker_exit": _stop_box,
            "control_socket_disable": True,
        }
        if settings.tls_certificate:
            values |= {"certfile": str(settings.tls_certificate), "keyfile": str(settings.tls_key), "ssl_context": _tls_of()}
        for name, value in values.items():
            if name in self.cfg.settings:  # versions of gunicorn differ in the newest ones
                self.cfg.set(name, value)

    def load(self) -> WsgiApp:
        """Make the application, in the worker process."""
        from webui.app import create_app

        threading.stack_size(_THREAD_STACK_BYTES)
        app = create_app(self._settings)
        self.box = app.extensions["box"]
        return _with_patience(app.wsgi_app)


class QuietLogger:
    """Gunicorn's errors go to the box's JSON log; requests are not logged, so that no address or name can be."""

    def __init__(self, cfg: object) -> None:
        del cfg
        self.error_log = logging.getLogger("gunicorn.error")
        self.error_log.setLevel(logging.WARNING)
        self.access_log = logging.getLogger("gunicorn.access")

    def __getattr__(self, name: str) -> Any:
        """``debug`` to ``critical``, ``exception`` and ``log`` are the standard logger's."""
        return getattr(self.error_log, name)

    def access(self, *_: object) -> None:
        """Log no request."""

    def reopen_files(self) -> None:
        """Nothing to reopen: the log is standard error."""

    def close_on_exec(self) -> None:
        """Nothing to close."""


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check(settings: Settings) -> None:
    """Refuse what must not be served.

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


def main(argv: list[str] | None = None) -> int:
    """Serve the pages until SIGTERM; returns the exit code (2 when the settings forbid it)."""
    parser = argparse.ArgumentParser(prog="python -m webui", description="Serve the pages of the box.")
    parser.add_argument("--data-dir", type=Path, required=True, help="the box's data directory")
    arguments = parser.parse_args(argv)
    os.umask(0o077)  # what people upload is for this account's eyes only
    start_logging(logging.getLevelName(os.environ.get("APPLIANCE_LOG_LEVEL", "INFO").upper()))
    try:
        settings = Settings.load(arguments.data_dir)
        check(settings)
    except ApplianceError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return EXIT_USAGE
    Server(settings).run()
    return 0


def _announce(settings: Settings) -> Callable[[Any], None]:
    """Say where the page is once the port is open: one line for people, ``run/web.json`` for programs."""

    def when_ready(arbiter: Any) -> None:
        scheme = "https" if settings.tls_certificate else "http"
        port = arbiter.LISTENERS[0].sock.getsockname()[1]
        url = f"{scheme}://{_bracketed(settings.web_host)}:{port}/"
        path = _run_directory(settings) / ADDRESS_FILE
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps({"scheme": scheme, "port": port, "url": url, "pid": os.getpid()}))
        fresh.replace(path)
        print(f"Listening on {url}", flush=True)

    return when_ready


def _stop_box(_arbiter: Any, worker: Any) -> None:
    """The worker process ends: what is at the door goes through, the rest waits on the disk."""
    box: Box | None = getattr(worker.app, "box", None)
    if box is not None:
        box.stop()


def _tls_of() -> Callable[[Any, Callable[[], ssl.SSLContext]], ssl.SSLContext]:
    """TLS 1.2 or newer (R14); one context for all connections, so that sessions resume."""
    made: list[ssl.SSLContext] = []

    def context(_config: Any, default: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
        if not made:
            fresh = default()
            fresh.minimum_version = ssl.TLSVersion.TLSv1_2
            made.append(fresh)
        return made[0]

    return context


def _with_patience(app: WsgiApp) -> WsgiApp:
    """Bound how long a connection may stand still within a request: a pulled cable must not hold a thread for ever."""

    def patient(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        connection = environ.get("gunicorn.socket")
        if connection is not None:
            connection.settimeout(_SILENCE_S)
        return app(environ, start_response)

    return patient


def _run_directory(settings: Settings) -> Path:
    directory = settings.data_dir / "run"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def _heartbeat_directory(settings: Settings) -> str:
    """Where gunicorn touches a file every second: in memory where there is some, for the sake of flash storage."""
    memory = Path("/dev/shm")  # noqa: S108 - an empty, unlinked file without content
    return str(memory if os.access(memory, os.W_OK) else _run_directory(settings))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
