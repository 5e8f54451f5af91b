"""The directory shared with the sync agent: what it wants the box to run comes in, what the box runs goes out.

Nothing in it is believed but for what ``model-sync check``, in a process of its own, verifies from the library's first root to be
signed: the facts. The agent is another account and may be broken or broken into; whatever it writes, the box keeps its model.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from appliance import __version__, reasons
from appliance import database as db
from appliance.database import Database
from appliance.domain import Note, utc_now
from appliance.proof import Child
from appliance.store import Store

logger = logging.getLogger(__name__)

DIRECTIVES: Final = "directives.json"
SYNC_STATUS: Final = "sync-status.json"
BOX_REPORT: Final = "box-report.json"
CHECK_DEADLINE_S: Final = 60.0
_MAX_BYTES: Final = 1 << 20
_REPORTED_ACTIVATIONS: Final = 20
_REPORTED_MODELS: Final = 64
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MODEL_KEYS: Final = ("version", "digest", "state", "precision", "runtime")
_TROUBLE: Final = {"untrusted": 8, "error": 4, "unreachable": 4}

# Semantic versioning 2.0, clauses 2, 9 and 10, as strict as the library that compares them.
_NUMBER, _PRE, _BUILD = "(0|[1-9][0-9]*)", "(0|[1-9][0-9]*|[0-9]*[A-Za-z-][0-9A-Za-z-]*)", "[0-9A-Za-z-]+"
_SEMVER: Final = rf"^{_NUMBER}\.{_NUMBER}\.{_NUMBER}(-{_PRE}(\.{_PRE})*)?(\+{_BUILD}(\.{_BUILD})*)?$"
_Version = Annotated[str, StringConstraints(pattern=_SEMVER, max_length=64)]
_Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Line = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
_Read = TypeVar("_Read", bound=BaseModel)


class Directive(BaseModel):
    """What the agent wants one line to run."""

    model_config = ConfigDict(frozen=True)

    version: _Version
    digest: _Digest
    source: Literal["library", "usb"]


class Directives(BaseModel):
    """``directives.json``."""

    model_config = ConfigDict(frozen=True)

    schema_: Literal[1] = Field(alias="schema")
    lines: dict[_Line, Directive]


class SyncStatus(BaseModel):
    """What the box needs of ``sync-status.json``."""

    model_config = ConfigDict(frozen=True)

    state: Literal["ok", "unreachable", "untrusted", "waiting", "downloading", "error"]
    code: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_.-]{0,64}$")] = ""


class Withdrawn(BaseModel):
    """Why a version must not read another patient."""

    reason: str


class Trouble(BaseModel):
    """Why metadata cannot be believed."""

    code: str
    message: str = ""

    def note(self) -> Note:
        """As a coded reason; one that this version does not know is said as not checked."""
        return Note(self.code if self.code in reasons.REASONS else "trust.unchecked", self.message[:300])


class LineFacts(BaseModel):
    """What the signed index of one line says, and until when that may put anything new to work."""

    minimum_version: _Version
    withdrawn: dict[_Version, Withdrawn] = {}
    versions: dict[_Version, _Digest]
    valid_until: AwareDatetime | None = None


class Facts(BaseModel):
    """What ``model-sync check`` verified; without ``ok`` nothing of it holds but the code that says why.

    ``now`` is the time it judged by, which is never behind what the library has signed, whatever the box's clock says.
    """

    ok: bool
    now: AwareDatetime | None = None
    expired: bool = False
    valid_until: AwareDatetime | None = None
    code: str = ""
    message: str = ""
    lines: dict[_Line, LineFacts] = {}
    troubles: dict[str, Trouble] = {}

    def refusal(self, name: str, version: str, digest: str) -> Note | None:
        """Why a model may not newly be put to work by what is signed; None when it may."""
        if not self.ok:
            return Trouble(code=self.code, message=self.message).note()
        line = self.lines.get(name)
        if line is None and name in self.troubles:
            return self.troubles[name].note()
        until = (line.valid_until if line else None) or self.valid_until
        now = max(self.now or _EPOCH, datetime.now(timezone.utc))
        if until is None or until <= now:
            return Note("trust.expired", until.isoformat() if until else "")
        signed = line.versions.get(version) if line else None
        if signed is None:
            return Note("model.not_signed", f"{name} {version}")
        return None if signed == digest else Note("model.mismatch", f"{name} {version} is {signed[:12]}, not {digest[:12]}")


class Check(Child):
    """``model-sync check`` as a child.

    Args:
        exchange_dir: the shared directory.
        root: the library's first root.json, as it was provisioned.
    """

    def __init__(self, exchange_dir: Path, root: Path) -> None:
        super().__init__(["model_sync", "check", "--exchange", str(exchange_dir), "--root", str(root)], CHECK_DEADLINE_S)

    def facts(self) -> Facts | None:
        """The facts once it has ended; None while it runs. One that dies, hangs or babbles has verified nothing."""
        if not self.listen():
            if not self.late():
                return None
            self.end()
            return Facts(ok=False, code="trust.unchecked", message=f"the check took more than {CHECK_DEADLINE_S:.0f} s")
        try:
            facts = Facts.model_validate_json(self.output)
        except ValidationError:
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
        self.directory = directory

    def has_metadata(self) -> bool:
        """Whether the agent has laid anything that can be checked; a directory that cannot be read has nothing."""
        return os.path.isdir(self.directory / "metadata")

    def mark(self) -> tuple[tuple[int, int, int], ...]:
        """What changes when the agent has written something that a check may answer differently."""
        places = (self.directory / name for name in (DIRECTIVES, "trust", "metadata", "documents", "bundles", "floor.json"))
        return tuple(_stamp(place) for place in (*places, *self._documents()))

    def status_mark(self) -> tuple[int, int, int]:
        """What changes when the agent has told how it is."""
        return _stamp(self.directory / SYNC_STATUS)

    def directives(self) -> Directives | None:
        """What the agent wants; None when it wants nothing, or nothing that can be understood."""
        return _read(self.directory / DIRECTIVES, Directives)

    def bundle(self, digest: str) -> Path:
        """Where the agent puts the verified bundle of a digest."""
        return self.directory / "bundles" / digest

    def note_status(self) -> None:
        """Write a change of the agent's state into the audit, once: untrusted is an alarm, unreachable never is."""
        status = _read(self.directory / SYNC_STATUS, SyncStatus)
        if status is None:
            return
        now = status.state if status.state in _TROUBLE else "ok"
        mark = f"{now} {status.code if now != 'ok' else ''}"
        known = self._store.database.one("SELECT value FROM meta WHERE key = 'sync_state'")
        if (known["value"] if known else "ok ") == mark:
            return
        event = db.SECURITY_ALERT if now == "untrusted" else db.APPLICATION_ACTIVITY
        with self._store.database.transaction() as tx:
            tx.execute("INSERT OR REPLACE INTO meta VALUES ('sync_state', ?)", (mark,))
            Database.audit(tx, event, "model-sync", "E", "library", _TROUBLE.get(now, 0), state=now, code=status.code)

    def write_report(self) -> None:
        """Write ``box-report.json``: versions, digests, states, codes and counts, and nothing of a patient (requirement R18)."""
        report = json.dumps(box_report(self._store), sort_keys=True).encode()
        target = self.directory / BOX_REPORT
        fresh = self.directory / f".{BOX_REPORT}.{os.getpid()}"
        try:
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o640), "wb") as file:
                os.fchmod(file.fileno(), 0o640)  # whatever the umask: the agent reads it by its group
                file.write(report)
            os.replace(fresh, target)
        except OSError as error:
            logger.error("the report to the sync agent cannot be written", extra={"code": "store.failed", "status": error.errno})

    def _documents(self) -> list[Path]:
        """The folders that hold one line's documents each: a file renamed into one changes it, and not its parent."""
        try:
            return sorted(path for path in (self.directory / "documents").glob("models/*"))[:100]
        except OSError:
            return []


def box_report(store: Store) -> dict[str, Any]:
    """What the box tells the centre, by an allow-list (``model_sync.report`` holds it against the same schema)."""
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
        "models": [{"line": row["name"]} | {key: row[key] for key in _MODEL_KEYS} for row in models],
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
