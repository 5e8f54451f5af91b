"""nginx in front of the web process, wherever the page is served over TLS: its configuration from the settings, its start, its renewal.

``python -m webui.server.proxy --data-dir DIR`` writes ``run/nginx/nginx.conf`` and becomes nginx; with ``--reload`` it makes the nginx that
runs take a new certificate, without losing a request, and fails where nginx refuses it. nginx runs as the account of the box: all its
files are below ``run/nginx``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pwd
import resource
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import jinja2

from appliance.core.certificates import is_trusted, load_pair, served_fingerprint
from appliance.core.errors import ApplianceError
from appliance.core.process import bracketed, find_nginx, open_port, own_address, start_logging
from appliance.core.settings import Settings
from webui.server.process import (
    ADDRESS_FILE,
    EXIT_USAGE,
    error_lines,
    run_directory,
    socket_path,
    write_address,
)
from webui.server.security import FORM_BYTES, HEADERS
from webui.server.static_files import versioned_addresses

logger = logging.getLogger(__name__)

HEAD_S: Final = 15
_SILENCE_S: Final = 20
# Connections at the same time; one takes 50 KiB while it shakes hands.
_MOST_CONNECTIONS: Final = 4096
_OTHER_FILES: Final = 64
_TAKEN_S: Final = 10.0
_STATIC: Final = Path(__file__).resolve().parents[1] / "static"
_PID_FILE: Final = "nginx.pid"


def render(settings: Settings, port: int) -> str:
    """The configuration of nginx for a box.

    Raises:
        ApplianceError: ``tls.…``: no usable pair; ``settings.invalid``: a path that nginx cannot name.
    """
    certificate, key = settings.tls_certificate, settings.tls_key
    load_pair(certificate, key)
    assert certificate is not None
    assert key is not None
    directory = _directory(settings)
    values: dict[str, Any] = {
        "account": quote(pwd.getpwuid(0).pw_name) if os.geteuid() == 0 else "",
        "run": directory, "socket": socket_path(settings), "static": _STATIC, "certificate": certificate, "key": key,
    }  # fmt: skip
    for name in ("run", "socket", "static", "certificate", "key"):
        _check_path(values[name])
    host = settings.web_hostname
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True)  # noqa: S701 - no HTML
    return environment.from_string(Path(__file__).with_name("nginx.conf.j2").read_text("utf-8")).render(
        values,
        listen=f"{bracketed(settings.web_host if settings.web_host != 'localhost' else '127.0.0.1')}:{port}",
        is_dual=settings.web_host == "::",
        connections=_connections(),
        requests_per_machine=max(2, settings.web_threads * 3 // 4),  # one machine never gets the last quarter of the threads
        head_s=HEAD_S,
        silence_s=_SILENCE_S,
        answer_s=120,
        form_bytes=FORM_BYTES,
        uploads=["^~ /api/v1/tus", "^~ /api/v1/uploads"],
        headers=HEADERS,
        versioned=[quote(address) for address in versioned_addresses(_STATIC)],
        has_hsts=bool(host) and is_trusted(certificate, key, host, settings.tls_authority),
    )


def quote(text: str) -> str:
    """A text as one quoted word of nginx's configuration."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def main(argv: list[str] | None = None) -> int:
    """Become nginx, or reload the one that runs; returns the exit code (2 when the settings forbid it)."""
    parser = argparse.ArgumentParser(prog="python -m webui.server.proxy", description="Serve the pages of the box to the network.")
    parser.add_argument("--data-dir", type=Path, required=True, help="the box's data directory")
    parser.add_argument("--reload", action="store_true", help="let the nginx that runs take new certificates")
    arguments = parser.parse_args(argv)
    os.umask(0o077)
    start_logging(logging.getLevelName(os.environ.get("APPLIANCE_LOG_LEVEL", "INFO").upper()))
    try:
        settings = Settings.load(arguments.data_dir)
        if arguments.reload:
            reload(settings)
        else:
            _start(settings)
    except ApplianceError as error:
        logger.error(
            "the pages are not served to the network" if not arguments.reload else "certificate not taken", extra={"code": error.code}
        )
        print(error_lines(error), file=sys.stderr)
        return EXIT_USAGE
    return 0


def reload(settings: Settings) -> None:
    """Write the configuration again and let nginx load it, with the certificate; requests under way are answered by the former workers.

    Raises:
        ApplianceError: the pair cannot be used, or ``tls.not_served``: nginx does not run or refuses it, and goes on with the former one.
    """
    certificate = load_pair(settings.tls_certificate, settings.tls_key)
    try:
        port = int(json.loads((run_directory(settings) / ADDRESS_FILE).read_text())["port"])
    except (OSError, ValueError) as error:
        raise ApplianceError("tls.not_served", "nginx does not run") from error
    _write(settings, render(settings, port))
    _signal(settings)
    host, limit = own_address(settings.web_host), time.monotonic() + _TAKEN_S
    while served_fingerprint(host, port) != certificate.fingerprint:
        if time.monotonic() > limit:
            raise ApplianceError("tls.not_served", f"{settings.web_host}:{port}")
        time.sleep(0.1)


def _signal(settings: Settings) -> None:
    """Send SIGHUP to the nginx of this box; the PID in its file may be that of another process, after a power cut for example."""
    directory = _directory(settings)
    try:
        pid = int((directory / _PID_FILE).read_text())
        process = os.pidfd_open(pid)  # from here on the PID cannot become another process
    except (OSError, ValueError) as error:
        raise ApplianceError("tls.not_served", "nginx does not run") from error
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if not command.startswith(b"nginx: master process") or os.fsencode(directory / "nginx.conf") not in command:
            raise ApplianceError("tls.not_served", f"nginx does not run: process {pid} is another program")
        signal.pidfd_send_signal(process, signal.SIGHUP)
    except OSError as error:
        raise ApplianceError("tls.not_served", "nginx does not run") from error
    finally:
        os.close(process)


def _start(settings: Settings) -> None:
    """Open the port, write the configuration, publish the address, become nginx, which takes over the open port.

    Raises:
        ApplianceError: ``box.port``: the port is in use; the pair or a path cannot be used; nginx is not installed.
    """
    program = find_nginx()
    load_pair(settings.tls_certificate, settings.tls_key)
    listener = open_port("web_port", settings.web_host, settings.web_port)
    port = int(listener.getsockname()[1])
    _write(settings, render(settings, port))
    os.set_inheritable(listener.fileno(), True)
    write_address(settings, "https", port)
    # In this variable nginx finds the open ports that it takes over, as in an upgrade of nginx; it logs one line about that.
    os.execve(program, [program, *_arguments(settings)], {**os.environ, "NGINX": f"{listener.fileno()};"})  # noqa: S606


def _arguments(settings: Settings) -> Sequence[str]:
    directory = _directory(settings)
    return ("-e", "stderr", "-p", str(directory), "-c", str(directory / "nginx.conf"))


def _write(settings: Settings, text: str) -> None:
    path = _directory(settings) / "nginx.conf"
    new = path.with_suffix(".new")
    new.write_text(text, "utf-8")
    new.replace(path)


def _directory(settings: Settings) -> Path:
    directory = run_directory(settings) / "nginx"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


def _check_path(path: Path) -> None:
    if any(character in '"\\$;{}' or character.isspace() or not character.isprintable() for character in str(path)):
        raise ApplianceError("settings.invalid", f'a path with a blank or one of "\\$;{{}}: {path}')


def _connections() -> int:
    """How many connections nginx serves: each takes two open files at most, and this account has a limit of them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_CONNECTIONS if hard == resource.RLIM_INFINITY else max(64, min(_MOST_CONNECTIONS, (hard - _OTHER_FILES) // 2))


if __name__ == "__main__":
    sys.exit(main())
