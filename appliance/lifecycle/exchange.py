"""The directory shared with the sync agent: what it wants the box to run comes in, what the box runs goes out.

Nothing in it is believed but for what ``model-sync check``, in a process of its own, verifies from the library's first root to be
signed: the facts. The agent is another account and may be broken or broken into; whatever it writes, the box keeps its model.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import sqlite3
import stat
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from appliance import __version__
from appliance.core.child_process import Child
from appliance.core.domain import utc_now
from appliance.lifecycle.trust_facts import Digest, Facts, Line, Version
from appliance.store import database as db
from appliance.store.database import Database
from appliance.store.store import Store

logger = logging.getLogger(__name__)

DIRECTIVES: Final = "directives.json"
SYNC_STATUS: Final = "sync-status.json"
BOX_REPORT: Final = "box-report.json"
TRUST: Final = "trust"
CHECK_DEADLINE_S: Final = 60.0
_MAX_BYTES: Final = 1 << 20
# One line's index, at its longest, makes 0.7 MB of it.
_MAX_FACTS_BYTES: Final = 32 << 20
_MOST_NAMES: Final = 1000
_REPORTED_ACTIVATIONS: Final = 20
_REPORTED_MODELS: Final = 64
_MODEL_KEYS: Final = ("version", "digest", "state", "precision", "runtime")
_TROUBLE: Final = {"untrusted": 8, "error": 4, "unreachable": 4}

_Read = TypeVar("_Read", bound=BaseModel)


class Directive(BaseModel):
    """What the agent wants one line to run."""

    model_config = ConfigDict(frozen=True)

    version: Version
    digest: Digest
    source: Literal["library", "usb"]


class Directives(BaseModel):
    """``directives.json``."""

    model_config = ConfigDict(frozen=True)

    schema_: Literal[1] = Field(alias="schema")
    lines: dict[Line, Directive]


class SyncStatus(BaseModel):
    """What the box needs of ``sync-status.json``."""

    model_config = ConfigDict(frozen=True)

    state: Literal["ok", "unreachable", "untrusted", "waiting", "downloading", "error"]
    code: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_.-]{0,64}$")] = ""


class Check(Child):
    """``model-sync check`` as a child.

    Args:
        exchange_dir: the shared directory.
        root: the library's first root.json, as it was provisioned.
    """

    def __init__(self, exchange_dir: Path, root: Path) -> None:
        super().__init__(["model_sync", "check", "--exchange", str(exchange_dir), "--root", str(root)], CHECK_DEADLINE_S, _MAX_FACTS_BYTES)

    def facts(self) -> Facts | None:
        """The facts once it has ended; None while it runs. One that dies, hangs or babbles has verified nothing."""
        if not self.listen():
            if not self.late():
                return None
            self.end()
            return Facts(ok=False, code="trust.unchecked", message=f"the check took more than {CHECK_DEADLINE_S:.0f} s")
        if self.babbled:
            facts = Facts(ok=False, code="trust.unchecked", message=f"the check said more than {_MAX_FACTS_BYTES >> 20} MiB")
        else:
            try:
                facts = Facts.parse(self.text())
            except ValueError:
                facts = Facts(ok=False, code="trust.unchecked", message=f"the check ended with {self.exit_code} and no answer")
        self.end()
        return facts


class Exchange:
    """The box's end of the shared directory.

    Args:
        store: the box's store.
        directory: the shared directory.
    """

    def __init__(self, store: Store, directory: Path) -> None:
        self._store = store
        self._silent = False
        self.directory = directory
        _sweep(directory)

    def has_metadata(self) -> bool:
        """Whether the agent has laid anything that can be checked; a directory that cannot be read has nothing."""
        return os.path.isdir(self.directory / "metadata")

    def mark(self) -> tuple[object, ...]:
        """What changes when the agent has written something that a check may answer differently: each pull turns the link ``trust``.

        Always a handful of names, however many the agent has laid.
        """
        places = (self.directory / name for name in (DIRECTIVES, TRUST, "metadata", "documents", "bundles", "floor.json"))
        return (_target(self.directory / TRUST), *(_stamp(place) for place in places))

    def status_mark(self) -> tuple[int, int, int]:
        """What changes when the agent has told how it is."""
        return _stamp(self.directory / SYNC_STATUS)

    def directives(self) -> Directives | None:
        """What the agent wants; None when it wants nothing, or nothing that can be understood."""
        return _read(self.directory / DIRECTIVES, Directives)

    def bundle(self, digest: str) -> Path:
        """Where the agent puts the verified bundle of a digest."""
        return self.directory / "bundles" / digest

    def note_status(self) -> bool:
        """Write a change of the agent's state into the audit, once: untrusted is an alarm, unreachable never is. Returns whether it did."""
        status = _read(self.directory / SYNC_STATUS, SyncStatus)
        if status is None:
            return False
        now = status.state if status.state in _TROUBLE else "ok"
        mark = f"{now} {status.code if now != 'ok' else ''}"
        known = self._store.database.one("SELECT value FROM meta WHERE key = 'sync_state'")
        if (known["value"] if known else "ok ") == mark:
            return False
        event = db.SECURITY_ALERT if now == "untrusted" else db.APPLICATION_ACTIVITY
        with self._store.database.transaction() as tx:
            tx.execute("INSERT OR REPLACE INTO meta VALUES ('sync_state', ?)", (mark,))
            Database.audit(tx, event, "model-sync", "E", "library", _TROUBLE.get(now, 0), state=now, code=status.code)
        return True

    def write_report(self) -> None:
        """Write ``box-report.json``: versions, digests, states, codes and counts, and nothing of a patient (requirement R18)."""
        try:
            _put(self.directory, BOX_REPORT, json.dumps(box_report(self._store), sort_keys=True).encode())
        except OSError as error:
            if not self._silent:
                logger.error("the report to the sync agent cannot be written", extra={"code": "exchange.invalid", "status": error.errno})
            self._silent = True
        else:
            self._silent = False


def box_report(store: Store) -> dict[str, Any]:
    """What the box tells the centre, by an allow-list (``model_sync.agent.report`` holds it against the same schema)."""
    database = store.database
    day_ago = (datetime.now(timezone.utc) - timedelta(days=1)).isoformat(timespec="milliseconds")
    # By model, so that the index on model and time serves and not every job is looked at.
    ended = database.one(
        "SELECT coalesce(sum(outcome = 'failed'), 0) AS failed, coalesce(sum(outcome = 'ai_ready'), 0) AS analysed FROM jobs"
        " WHERE model_digest IN (SELECT digest FROM models) AND finished_at > ?",
        day_ago,
    )
    waiting = database.one("SELECT count(*) AS n FROM jobs WHERE state IN ('queued', 'running')")
    models = database.query("SELECT * FROM models ORDER BY activated_at DESC LIMIT ?", _REPORTED_MODELS)
    activations = database.query("SELECT * FROM activations ORDER BY id DESC LIMIT ?", _REPORTED_ACTIVATIONS)
    return {
        "schema": 1,
        "at": utc_now(),
        "appliance_version": __version__,
        "models": [{"line": row["name"]} | {key: row[key] for key in _MODEL_KEYS} | _as_it_runs(row) for row in models],
        "activations": [
            {"line": row["name"]} | {key: row[key] for key in ("version", "digest", "state")}
            | {"code": json.loads(row["reason"])["code"] if row["reason"] else None, "at": row["updated_at"]}
            for row in activations
        ],
        "health": {
            "waiting_jobs": waiting["n"] if waiting else 0,
            "failed_jobs_24h": ended["failed"] if ended else 0,
            "analysed_24h": ended["analysed"] if ended else 0,
            "disk_free_bytes": shutil.disk_usage(store.settings.data_dir).free,
        },
    }  # fmt: skip


def _as_it_runs(row: sqlite3.Row) -> dict[str, str]:
    """Precision and runtime of a model at work as the worker last said, which need not be what was chosen; a server has no version.

    The runtime is ``none`` where the worker said that nothing can run it.
    """
    runs = (json.loads(row["self_test"]).get("runs") or {}) if row["state"] == "active" else {}
    precision, runtime = row["precision"], row["runtime"]
    if runs.get("runtime"):
        precision, runtime = runs["precision"], f"{runs['runtime']} {runs['version']}"
    elif (runs.get("reason") or {}).get("code"):
        runtime = "none"
    name, _, version = runtime.partition(" ")
    return {"precision": precision, "runtime": runtime if re.fullmatch(r"[\d.]+", version) else name}


def _put(directory: Path, name: str, data: bytes) -> None:
    """Lay a file that the agent's group may read, in place of the last. In a directory where another account may lay anything.

    A name that nobody can guess, which must not exist: nothing is followed, waited for, or written into but a file of our own.

    Raises:
        OSError: it was not laid.
    """
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fresh = f".{name}.{secrets.token_hex(8)}"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(fresh, flags, 0o640, dir_fd=folder), "wb") as file:
            _give_to_group(file.fileno(), os.fstat(folder).st_gid)
            file.write(data)
        os.replace(fresh, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        with suppress(OSError):
            os.unlink(fresh, dir_fd=folder)
        raise
    finally:
        os.close(folder)


def _give_to_group(descriptor: int, group: int) -> None:
    """Let the agent read a file by the group that the shared directory has, whatever the umask and the box's own group."""
    if os.fstat(descriptor).st_gid != group:
        # The box is not in that group, or the group has no number in this user namespace: the agent's status says that it cannot read
        # the report, which is there all the same.
        with suppress(OSError):
            os.fchown(descriptor, -1, group)
    os.fchmod(descriptor, 0o640)


def _sweep(directory: Path) -> None:
    """Remove reports of processes that were killed over them, as far as the first names of the directory go."""
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in islice(entries, _MOST_NAMES):
            if entry.name.startswith(f".{BOX_REPORT}."):
                with suppress(OSError):
                    os.unlink(entry.path)


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = path.lstat()
    except OSError:
        return (0, 0, 0)
    return (status.st_mtime_ns, status.st_size, status.st_ino)


def _read(path: Path, kind: type[_Read]) -> _Read | None:
    """One small plain file of another account's: no link is followed, no pipe waited for, nothing larger than 1 MiB read."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            raw = file.read(_MAX_BYTES + 1) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""
        if len(raw) > _MAX_BYTES:
            return None
        return kind.model_validate_json(raw)
    except FileNotFoundError:
        return None
    except (OSError, ValidationError, RecursionError) as error:
        logger.warning("a file of the sync agent cannot be understood", extra={"code": "exchange.invalid", "status": type(error).__name__})
        return None
