"""What the processes of the box set up: JSON logging, a lock, a memory limit, and that a process ends with its parent."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import resource
import shutil
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

from appliance.core.errors import ApplianceError
from model_sync.json_logging import JsonFormatter

_PR_SET_PDEATHSIG: Final = 1
_BACKLOG: Final = 511
LOG_FIELDS: Final = ("job", "code", "role", "exit_code", "state", "seconds", "peer", "port", "count", "status")


def start_logging(level: int | str = logging.INFO) -> None:
    """Log to standard error as JSON lines.

    Args:
        level: a level or its name; an unknown name is reported and INFO is used.
    """
    number = logging.getLevelName(level.upper()) if isinstance(level, str) else level
    if not isinstance(number, int):
        print(f"note: {level} is no log level (APPLIANCE_LOG_LEVEL: DEBUG, INFO, WARNING, ERROR); taking INFO", file=sys.stderr)
        number = logging.INFO
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(LOG_FIELDS))
    logging.basicConfig(level=number, handlers=[handler], force=True)
    for name in ("pynetdicom", "pydicom", "highdicom", "PIL"):  # their messages and warnings quote values of the data set
        warnings.filterwarnings("ignore", module=name)
        logging.getLogger(name).setLevel(logging.CRITICAL)


def make_data_dir(path: Path) -> None:
    """Create a data directory that only its owner can access; raises OSError where that fails or it is not writable."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def limit_memory(limit_bytes: int) -> None:
    """Limit the private memory of this process (RLIMIT_DATA), so that a hostile file causes a MemoryError and not a full machine."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def release_memory() -> None:
    """Return freed heap to the system (malloc_trim, glibc), which is tens of megabytes after loading a model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # musl has none
        trim(0)


def die_with_parent(signal_number: int = signal.SIGTERM) -> None:
    """Let the kernel signal this process when its parent dies, so that no process occupies a port after the supervisor was killed."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal_number)


def stop_on_signal() -> Callable[[], bool]:
    """Let SIGTERM and SIGINT ask this process to stop; returns whether one of them came."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: received.append(number))
    return lambda: bool(received)


def find_nginx() -> str:
    """The path of nginx, which Debian keeps outside the search path of ordinary accounts; raises ApplianceError ``tls.no_nginx``."""
    path = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if path is None:
        raise ApplianceError("tls.no_nginx")
    return path


def open_port(setting: str, host: str, port: int) -> socket.socket:
    """Listen on an address of this machine.

    Args:
        setting: the name of the setting that the port is from.
        host: a name or address; ``::`` is every address, IPv4 included.
        port: 0 lets the system choose.

    Raises:
        ApplianceError: ``box.port``: the port is in use or not allowed, or the address is none of this machine.
    """
    try:
        named = "127.0.0.1" if host == "localhost" else host  # not ::1, which a machine without IPv6 names but does not have
        family, kind, _, _, address = socket.getaddrinfo(named, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        opened = socket.socket(family, kind)
    except OSError as error:
        raise port_error(setting, host, port, error) from error
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
        opened.bind(address)
        opened.listen(_BACKLOG)
    except OSError as error:
        opened.close()
        raise port_error(setting, host, port, error) from error
    return opened


def port_error(setting: str, host: str, port: int, error: OSError) -> ApplianceError:
    """The error for a port that cannot be opened, ``box.port``."""
    return ApplianceError("box.port", f"{setting} = {port}, {host}: {error.strerror}")


def own_address(host: str) -> str:
    """Where this machine reaches a server that listens on a host."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "localhost": "127.0.0.1"}.get(host, host)  # noqa: S104 - looked up, not bound


def bracketed(host: str) -> str:
    """A host as an address of a page has it: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


class Lock:
    """An exclusive lock on one role of a data directory; the kernel releases it when the process ends, however it ends.

    Raises:
        ApplianceError: ``box.busy`` when another process holds it.
    """

    def __init__(self, data_dir: Path, role: str) -> None:
        path = data_dir / "run" / f"{role}.lock"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file: IO[str] = open(path, "a")  # noqa: SIM115 - held open for as long as the lock is held
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ApplianceError("box.busy", f"{role}, {data_dir}") from error
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        """Release the lock."""
        self._file.close()


def is_held_by_another(data_dir: Path, role: str) -> bool:
    """Whether another process holds the lock of a role.

    Reads ``/proc/locks`` and does not try the lock, which could make a process fail that takes it at this moment. False where that file
    cannot be read.
    """
    try:
        inode = (data_dir / "run" / f"{role}.lock").stat().st_ino
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return False
    locks = (line.split() for line in lines if " FLOCK " in line and "->" not in line)
    return any(fields[5].rsplit(":", 1)[-1] == str(inode) and fields[4] != str(os.getpid()) for fields in locks)
