"""The directory shared with the sync agent: the agent writes what the box should run, the box writes what it runs.

The box trusts nothing in it except the facts that ``model-sync check``, in a process of its own, verifies with the provisioned root. The
agent is another account, may be faulty, or may be controlled by an attacker; whatever it writes, the box keeps its model.
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

from pydantic import BaseModel, Field, StringConstraints, ValidationError

from appliance import __version__
from appliance.core import device_profile
from appliance.core.child_process import Child
from appliance.core.domain import JobState, ScanState, utc_now
from appliance.core.self_test_report import SelfTestReport
from appliance.core.states import IN_USE_STATES, ModelState
from appliance.lifecycle.trust_facts import Digest, LineName, TrustFacts, Version
from appliance.store import audit
from appliance.store import database as db
from appliance.store.database import Database
from appliance.store.score_alarms import ScoreAlarms
from appliance.store.store import Store

logger = logging.getLogger(__name__)

DIRECTIVES: Final = "directives.json"
SYNC_STATUS: Final = "sync-status.json"
BOX_REPORT: Final = "box-report.json"
TRUST: Final = "trust"
CHECK_DEADLINE_S: Final = 60.0
_MAX_BYTES: Final = 1 << 20
# The index of one model line takes up to 0.7 MB of it.
_MAX_FACTS_BYTES: Final = 32 << 20
_MAX_NAMES: Final = 1000
_REPORTED_ACTIVATIONS: Final = 20
_REPORTED_MODELS: Final = 64
_REPORTED_ANCHORS: Final = 8
_MODEL_KEYS: Final = ("version", "digest", "state", "precision", "runtime")
_SEVERITY: Final = {"untrusted": 8, "error": 4, "outdated": 4, "unreachable": 4}

_ModelT = TypeVar("_ModelT", bound=BaseModel)


class Directive(BaseModel, frozen=True):
    """The version of one model line that the sync agent requests."""

    version: Version
    digest: Digest
    source: Literal["library", "usb"]


class Directives(BaseModel, frozen=True):
    """The file ``directives.json``."""

    schema_: Literal[1] = Field(alias="schema")
    lines: dict[LineName, Directive]


class SyncStatus(BaseModel, frozen=True):
    """The fields of ``sync-status.json`` that the box uses."""

    state: Literal["ok", "unreachable", "outdated", "untrusted", "waiting", "downloading", "error"]
    code: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_.-]{0,64}$")] = ""


class TrustCheck(Child):
    """``model-sync check`` as a child process.

    Args:
        root: the provisioned ``root.json`` of the library.
    """

    def __init__(self, exchange_dir: Path, root: Path) -> None:
        super().__init__(["model_sync", "check", "--exchange", str(exchange_dir), "--root", str(root)], CHECK_DEADLINE_S, _MAX_FACTS_BYTES)

    def poll(self) -> TrustFacts | None:
        """Return the facts once the check has ended; None while it runs. A check that crashes, hangs or writes too much fails."""
        facts = None
        if not self.listen():
            if not self.late():
                return None
            problem = f"the check took more than {CHECK_DEADLINE_S:.0f} s"
        elif self.exceeded_output:
            problem = f"the check wrote more than {_MAX_FACTS_BYTES >> 20} MiB"
        else:
            problem = f"the check ended with {self.exit_code} and no answer"
            with suppress(ValueError):
                facts = TrustFacts.parse(self.text())
        self.end()
        return facts or TrustFacts(ok=False, code="trust.unchecked", message=problem)


class Exchange:
    """The access of the box to the shared directory."""

    def __init__(self, store: Store, directory: Path) -> None:
        self._store, self.directory = store, directory
        self._write_failed = False
        self._status_version: object = None
        _remove_old_temporaries(directory)

    def version(self) -> tuple[object, ...]:
        """Return a value that changes whenever a check may have another result: each pull replaces the link ``trust``.

        It checks a few names only, however many files the agent has written.
        """
        paths = (self.directory / name for name in (DIRECTIVES, TRUST, "metadata", "documents", "bundles", "floor.json"))
        return (_target(self.directory / TRUST), *(_stamp(path) for path in paths))

    def directives(self) -> Directives | None:
        """Read the requests of the sync agent; None when there are none or they are invalid."""
        return _read(self.directory / DIRECTIVES, Directives)

    def record_status(self) -> bool:
        """Audit a change of the agent's state once: ``untrusted`` is an alarm, ``unreachable`` never is. Returns whether it changed."""
        version, status = _stamp(self.directory / SYNC_STATUS), None
        if version != self._status_version:
            status = _read(self.directory / SYNC_STATUS, SyncStatus)
        changed = status is not None and self._record_state(status)
        self._status_version = version  # only now: after an error of the disk the same status is recorded again
        return changed

    def _record_state(self, status: SyncStatus) -> bool:
        now = status.state if status.state in _SEVERITY else "ok"
        value = f"{now} {status.code if now != 'ok' else ''}"
        known = self._store.database.one("SELECT value FROM meta WHERE key = 'sync_state'")
        if (known["value"] if known else "ok ") == value:
            return False
        event = db.SECURITY_ALERT if now == "untrusted" else db.APPLICATION_ACTIVITY
        with self._store.database.transaction() as tx:
            tx.execute("INSERT OR REPLACE INTO meta VALUES ('sync_state', ?)", (value,))
            Database.audit(tx, event, "model-sync", "E", "library", _SEVERITY.get(now, 0), state=now, code=status.code)
        return True

    def write_report(self) -> None:
        """Write ``box-report.json``: versions, digests, states, codes and counts, but no patient data (requirement R18)."""
        failed_before, self._write_failed = self._write_failed, False
        try:
            _write_file(self.directory, BOX_REPORT, json.dumps(box_report(self._store), sort_keys=True).encode())
        except OSError as error:
            self._write_failed = True
            if not failed_before:
                logger.error("the report to the sync agent cannot be written", extra={"code": "exchange.invalid", "status": error.errno})


def box_report(store: Store) -> dict[str, Any]:
    """Build the report to the central team from an allow-list; ``model_sync`` validates it against the same schema."""
    database = store.database
    day_ago = (datetime.now(timezone.utc) - timedelta(days=1)).isoformat(timespec="milliseconds")
    # By model, so that the index on model and time is used and not every job is read.
    ended = database.one(
        "SELECT coalesce(sum(outcome = ?), 0) AS failed, coalesce(sum(outcome = ?), 0) AS analysed FROM jobs"
        " WHERE model_digest IN (SELECT digest FROM models) AND finished_at > ?",
        ScanState.FAILED.value,
        ScanState.AI_READY.value,
        day_ago,
    )
    waiting = database.one("SELECT count(*) AS n FROM jobs WHERE state IN (?, ?)", JobState.QUEUED.value, JobState.RUNNING.value)
    models = database.query("SELECT * FROM models ORDER BY activated_at DESC LIMIT ?", _REPORTED_MODELS)
    activations = database.query("SELECT * FROM activations ORDER BY id DESC LIMIT ?", _REPORTED_ACTIVATIONS)
    alarms = {alarm.digest: alarm.note.code for alarm in ScoreAlarms(database).active()}
    return {
        "schema": 1,
        "at": utc_now(),
        "appliance_version": __version__,
        "device_class": device_profile.device_class(),
        "models": [{"line": row["name"]} | {key: row[key] for key in _MODEL_KEYS} | _running_as(row) for row in models],
        "activations": [
            {"line": row["name"]} | {key: row[key] for key in ("version", "digest", "state")}
            | {"code": _code(row, alarms), "at": row["updated_at"]}
            for row in activations
        ],
        "health": {
            "waiting_jobs": waiting["n"] if waiting else 0,
            "failed_jobs_24h": ended["failed"] if ended else 0,
            "analysed_24h": ended["analysed"] if ended else 0,
            "disk_free_bytes": shutil.disk_usage(store.settings.data_dir).free,
        },
        "audit": _audit_heads(store),
    }  # fmt: skip


def _audit_heads(store: Store) -> dict[str, Any]:
    """Return the head of the audit, and what entries that earlier heads named are now; zeros for an entry that is missing."""
    anchors = store.database.anchors()
    confirmed = anchors.confirmed()
    named = {anchor.head.seq for anchor in anchors.read()[-_REPORTED_ANCHORS:]} | ({confirmed.seq} if confirmed else set())
    with store.database.snapshot() as connection:
        head = audit.head(connection)
        digests = {seq: audit.digest_at(connection, seq) or audit.GENESIS for seq in sorted(named) if seq}
    return {
        "head": {"entries": head.seq, "digest": head.digest},
        "anchors": [{"entries": seq, "digest": digest} for seq, digest in digests.items()],
    }


def _code(row: sqlite3.Row, alarms: dict[str, str]) -> str | None:
    """Return the code of an activation: why it ended, or the alarm of the version that it put to work, which its last activation gets."""
    if row["reason"]:
        return str(json.loads(row["reason"])["code"])
    return alarms.pop(row["digest"], None) if row["state"] in IN_USE_STATES else None


def _running_as(row: sqlite3.Row) -> dict[str, str]:
    """Return precision and runtime as the worker last reported them, which may be the fallback; a remote runtime has no version.

    The runtime is ``none`` when the worker reported that nothing can run the model.
    """
    runs = (SelfTestReport.from_json(row["self_test"]).runs or {}) if row["state"] == ModelState.ACTIVE else {}
    precision, runtime = row["precision"], row["runtime"]
    if runs.get("runtime"):
        precision, runtime = runs["precision"], f"{runs['runtime']} {runs['version']}"
    elif (runs.get("reason") or {}).get("code"):
        runtime = "none"
    name, _, version = runtime.partition(" ")
    return {"precision": precision, "runtime": runtime if re.fullmatch(r"[\d.]+", version) else name}


def _write_file(directory: Path, name: str, data: bytes) -> None:
    """Replace a file that the agent's group may read, in a directory where another account may create anything.

    The temporary name cannot be guessed and must not exist, so that no link is followed and no other file or pipe is opened.

    Raises:
        OSError: the file was not written; an earlier one is untouched.
    """
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    temporary = f".{name}.{secrets.token_hex(8)}"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(temporary, flags, 0o640, dir_fd=folder), "wb") as file:
            _give_to_group(file.fileno(), os.fstat(folder).st_gid)
            file.write(data)
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise
    finally:
        os.close(folder)


def _give_to_group(descriptor: int, group: int) -> None:
    """Give a file the group of the shared directory, whatever the umask and the group of the box, so that the agent can read it."""
    if os.fstat(descriptor).st_gid != group:
        # The box is not in that group, or the group does not exist in this user namespace. The report is written all the same; the
        # status of the agent says that it cannot read it.
        with suppress(OSError):
            os.fchown(descriptor, -1, group)
    os.fchmod(descriptor, 0o640)


def _remove_old_temporaries(directory: Path) -> None:
    """Remove the temporary files of killed processes among the first names of the directory."""
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in islice(entries, _MAX_NAMES):
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


def _read(path: Path, kind: type[_ModelT]) -> _ModelT | None:
    """Read a small regular file of another account: follows no link, waits for no pipe, reads at most 1 MiB."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            raw = file.read(_MAX_BYTES + 1) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""
        if len(raw) > _MAX_BYTES:
            return None
        return kind.model_validate_json(raw)
    except FileNotFoundError:
        return None
    except (OSError, ValidationError, RecursionError) as error:
        logger.warning("invalid file of the sync agent", extra={"code": "exchange.invalid", "status": type(error).__name__})
        return None
