"""The server of ``model-library serve``: the library's files, the API for boxes, and the fleet page, by Flask under gunicorn.

One process with threads. TLS is 1.2 or newer; a client certificate is optional, because the library's files are public and signed.
Plain http is allowed on loopback only, where a proxy may end TLS.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flask import Flask, Response, redirect, url_for
from flask_wtf.csrf import CSRFProtect
from gunicorn.app.base import BaseApplication
from sqlalchemy import text
from werkzeug.wrappers import Response as BaseResponse

from model_sync.errors import ModelSyncError, SettingsError
from model_sync.fleet import api as server_api
from model_sync.fleet import files as server_files
from model_sync.fleet import page as fleet_page
from model_sync.fleet import problems as server_problems
from model_sync.fleet.accounts import Accounts
from model_sync.fleet.commands import passphrase
from model_sync.fleet.database import Fleet
from model_sync.fleet.enrolment import CERTIFICATE, DeviceAuthority, Enrolment
from model_sync.fleet.event_log import EventLog
from model_sync.fleet.field_results import mark_database, sqlite_url
from model_sync.fleet.rollout_pause_policy import RolloutPausePolicy
from model_sync.fleet.rollouts import Rollouts
from model_sync.json_logging import JsonFormatter
from model_sync.library.console import ONLINE_ENV
from model_sync.library.files import LibraryFiles
from model_sync.library.keys import load_signer
from model_sync.web_server import ErrorOnlyLogger, is_loopback, tls_context_factory

DEFAULT_PORT: Final = 8443
logger = logging.getLogger(__name__)
_REQUEST_START_S: Final = 10
_SILENCE_S: Final = 60.0
_KEEP_ALIVE_S: Final = 15
_STOP_S: Final = 10
_CONNECTIONS: Final = 2000
# OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which Python does not name: see Enrolment.identify.
_NO_CHECK_TIME: Final = 0x200000


@dataclass(frozen=True)
class ServerConfig:
    """The configuration of a server.

    Attributes:
        library: the library's directory; its ``public`` is served.
        db: the SQLAlchemy URL of the fleet database.
        device_ca: directory of the device authority.
        passphrases: of the device authority, of the rollout key and of the library's online keys.
        rollout_key: encrypted PKCS#8 file or ``hsm:`` URI; without it the server cannot pause rollouts.
        tls_certificate: PEM of the server, with chain; None serves plain http on loopback.
        tls_key: its key.
        behind_proxy: use the proxy's ``X-Client-Certificate`` and ``X-Forwarded-For``.
        certificate_days: validity of a box's certificate.
        reports_per_hour: most reports of one box.
        requests_per_minute: most enrolments from one address; a tenth of it for logins, ten times it for reports.
        session_idle_s: an operator's session ends after this time without a request.
    """

    library: Path
    db: str
    device_ca: Path
    passphrases: tuple[str, str, str]
    rollout_key: str | None = None
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    behind_proxy: bool = False
    certificate_days: float = 30.0
    reports_per_hour: int = 60
    requests_per_minute: int = 120
    session_idle_s: int = 30 * 60
    threads: int = 16


def create_app(config: ServerConfig, *, clock: Callable[[], float] = time.time) -> Flask:
    """Create the application.

    Raises:
        SettingsError: a key, the library or the database cannot be opened.
    """
    app = Flask(__name__, static_folder=None, template_folder="templates")
    fleet = Fleet(config.db, clock=clock)
    authority = DeviceAuthority.load(config.device_ca, config.passphrases[0])
    rollouts = _rollouts(config, fleet)
    per_minute = config.requests_per_minute
    app.extensions.update(
        fleet=fleet,
        enrolment=Enrolment(fleet, authority, certificate_days=config.certificate_days),
        rollouts=rollouts,
        pause_policy=RolloutPausePolicy(fleet, rollouts),
        event_log=EventLog(fleet, config.library),
        accounts=Accounts(fleet, idle_s=config.session_idle_s),
        rate_limiters={
            "enrolments": server_api.RateLimiter(per_minute, per_minute),
            "reports": server_api.RateLimiter(per_minute * 10, per_minute * 10),
            "logins": server_api.RateLimiter(max(1, per_minute / 10), max(5, per_minute // 10)),
        },
    )
    assets = [Path(app.root_path) / "templates" / name for name in ("fleet.css", "fleet.js")]
    app.config.update(
        SECRET_KEY=fleet.secret(),
        SESSION_COOKIE_NAME="fleet",
        SESSION_COOKIE_HTTPONLY=True,
        SESSION_COOKIE_SAMESITE="Strict",
        SESSION_COOKIE_SECURE=config.tls_certificate is not None or config.behind_proxy,
        WTF_CSRF_TIME_LIMIT=None,  # as long as the session
        WTF_CSRF_SSL_STRICT=False,  # pages send no Referer
        MAX_CONTENT_LENGTH=16 << 10,
        PUBLIC=LibraryFiles(config.library).public.resolve(),
        BEHIND_PROXY=config.behind_proxy,
        REPORTS_PER_HOUR=config.reports_per_hour,
        STYLE_VERSION=hashlib.sha256(b"".join(path.read_bytes() for path in assets)).hexdigest()[:12],
    )
    app.url_map.merge_slashes = False  # a path with empty segments is not found
    app.json.sort_keys = False  # type: ignore[attr-defined]  # the default provider has it, the base class does not
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    server_problems.init_app(app)
    CSRFProtect(app).exempt(server_api.blueprint)
    for blueprint in (server_files.blueprint, server_api.blueprint, fleet_page.blueprint):
        app.register_blueprint(blueprint)
    app.add_url_rule("/healthz", "healthz", lambda: _healthz(fleet))
    app.add_url_rule("/", "home", lambda: _home())
    return app


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``model-library serve``."""
    parser.add_argument("library", type=Path, metavar="LIB", help="the library's directory")
    parser.add_argument("--db", metavar="URL", help="fleet database (default: sqlite in LIB; or postgresql+psycopg://…)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help=f"port (default {DEFAULT_PORT}; 0: any free one)")
    parser.add_argument("--tls-certificate", type=Path, metavar="PEM", help="the server's certificate with its chain")
    parser.add_argument("--tls-key", type=Path, metavar="PEM", help="its private key")
    parser.add_argument("--behind-proxy", action="store_true", help="a proxy on this machine ends TLS (see docs/fleet.md)")
    parser.add_argument("--device-ca", type=Path, metavar="DIR", required=True, help="made by `model-library device-ca`")
    parser.add_argument("--rollout-key", metavar="FILE", help="key that signs a pause; without it the page shows the command")
    kinds = {"": "all keys without an option of their own", "device-ca-": "the device authority", "rollout-": "--rollout-key"}
    for name, what in (kinds | {"online-": "the keys in LIB/online"}).items():
        parser.add_argument(f"--{name}passphrase-file", type=Path, metavar="FILE", help=f"passphrase of {what}")
    parser.add_argument("--certificate-days", type=float, default=30.0, help="validity of a box's certificate (default 30)")
    parser.add_argument("--reports-per-hour", type=int, default=60, help="most reports of one box (default 60)")
    parser.add_argument("--requests-per-minute", type=int, default=120, help="most enrolments from one address (default 120)")
    parser.add_argument("--threads", type=int, default=16, help="requests served at once (default 16)")


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM.

    Raises:
        SettingsError: the configuration is not valid; nothing was served.
    """
    os.umask(0o077)
    _start_logging()
    shared = arguments.passphrase_file
    secrets = (
        passphrase(arguments.device_ca_passphrase_file, shared),
        passphrase(arguments.rollout_passphrase_file, shared) if arguments.rollout_key else "",
        passphrase(arguments.online_passphrase_file, shared, variable=ONLINE_ENV) if arguments.rollout_key else "",
    )
    names = (
        "library", "device_ca", "rollout_key", "host", "port", "tls_certificate", "tls_key", "behind_proxy", "certificate_days",
        "reports_per_hour", "requests_per_minute", "threads",
    )  # fmt: skip
    values = {name: getattr(arguments, name) for name in names}
    config = ServerConfig(db=arguments.db or sqlite_url(arguments.library), passphrases=secrets, **values)
    check(config)
    _leave_note(config)
    Server(config).run()
    return 0


def _leave_note(config: ServerConfig) -> None:
    """Let the commands of the central team know where the fleet database is; a library that is only readable here is served too."""
    try:
        mark_database(config.library, config.db)
    except OSError as error:
        logger.warning("%s: the commands withdraw, minimum and status need --db: %s", config.library, error.strerror)


def check(config: ServerConfig) -> None:
    """Check the configuration before a port is opened.

    Raises:
        SettingsError: plain http beyond loopback, an incomplete TLS configuration, or a key, library or database that cannot be opened.
    """
    if (config.tls_certificate is None) != (config.tls_key is None):
        raise SettingsError("--tls-certificate and --tls-key belong together", code="fleet.settings")
    if config.tls_certificate is None and not is_loopback(config.host):
        hint = "give --tls-certificate and --tls-key, or listen on 127.0.0.1 behind a proxy with --behind-proxy"
        raise SettingsError(f"{config.host} needs TLS: plain http is for loopback only", hint=hint, code="fleet.settings")
    if config.behind_proxy and (config.tls_certificate is not None or not is_loopback(config.host)):
        raise SettingsError(
            "--behind-proxy is for plain http on 127.0.0.1", hint="clients could send the proxy's headers themselves", code="fleet.settings"
        )
    if config.tls_certificate is not None and config.tls_key is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_certificate, config.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise SettingsError(f"the TLS certificate does not load: {error}", code="fleet.settings") from error
    LibraryFiles(config.library).config()
    create_app(config).extensions["fleet"].close()


class Server(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    """Gunicorn with a configuration in Python."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        super().__init__()

    def load_config(self) -> None:
        """Translate the configuration into gunicorn's."""
        config = self._config
        values: dict[str, Any] = {
            "bind": f"[{config.host}]:{config.port}" if ":" in config.host else f"{config.host}:{config.port}",
            "worker_class": "gthread", "workers": 1, "threads": config.threads, "worker_connections": _CONNECTIONS,
            "keepalive": _KEEP_ALIVE_S, "graceful_timeout": _STOP_S, "proc_name": "model-library", "logger_class": ErrorOnlyLogger,
            "forwarded_allow_ips": "127.0.0.1,::1" if config.behind_proxy else "", "when_ready": _announce,
            "control_socket_disable": True, "worker_tmp_dir": "/dev/shm" if os.access("/dev/shm", os.W_OK) else None,  # noqa: S108 - an empty heartbeat file
        }  # fmt: skip
        if config.tls_certificate is not None:
            authority = str(config.device_ca / CERTIFICATE)
            values |= {"certfile": str(config.tls_certificate), "keyfile": str(config.tls_key), "ca_certs": authority}
            values |= {"cert_reqs": ssl.CERT_OPTIONAL, "ssl_context": tls_context_factory(_NO_CHECK_TIME)}
        for name, value in values.items():
            if name in self.cfg.settings:  # versions of gunicorn differ in the newest ones
                self.cfg.set(name, value)

    def load(self) -> Callable[..., Iterable[bytes]]:
        """Create the application in the worker process."""
        app = create_app(self._config)

        def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            """Limit the silence of a connection within a request."""
            environ["gunicorn.socket"].settimeout(_SILENCE_S)
            return app.wsgi_app(environ, start_response)

        return application


def _start_logging() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("securesystemslib").setLevel(logging.WARNING)


def _announce(arbiter: Any) -> None:
    """Print the address once the port is open."""
    for listener in arbiter.LISTENERS:
        # Inherited by every connection: a client that stops in the middle of a request must not use a thread for ever.
        listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", _REQUEST_START_S, 0))
        # The kernel holds a connection until it has data: a silent one uses no thread.
        listener.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, _REQUEST_START_S)
        print(f"Listening on {listener}", flush=True)


def _rollouts(config: ServerConfig, fleet: Fleet) -> Rollouts:
    """Return the rollouts; with a rollout key, the keys that sign and publish a pause are opened before anything is served."""
    if config.rollout_key is None:
        return Rollouts(config.library, fleet)
    try:
        signer = load_signer(config.rollout_key, lambda _what: config.passphrases[1])
        rollouts = Rollouts(config.library, fleet, signer, lambda _what: config.passphrases[2])
        library = rollouts.library()
        if missing := [role for role in ("snapshot", "timestamp") if not library.available_signers(library.keys(role))]:
            raise SettingsError(
                f"the library's online key of {' and '.join(missing)} is missing", hint="copy it to LIB/online", code="fleet.settings"
            )
    except ModelSyncError as error:
        hint = f"{error.hint}; the rollout key signs a pause, and the online keys publish it"
        raise SettingsError(error.message, hint=hint, code="fleet.settings") from error
    return rollouts


def _healthz(fleet: Fleet) -> Response:
    with fleet.reading() as tx:
        tx.execute(text("SELECT 1"))
    return Response("ok\n", content_type="text/plain; charset=utf-8")


def _home() -> BaseResponse:
    return redirect(url_for("page.fleet"))
