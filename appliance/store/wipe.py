"""The wipe of a box that leaves the clinic, which two persons decide together (requirement R8).

The keys are destroyed first: from then on nothing that they encrypt can be read, wherever the disk keeps old copies of it. Then the files
are deleted. Killed at any point, the box stays closed and the next call goes on; nobody needs to agree again.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from appliance.core.domain import utc_now
from appliance.core.errors import StoreError
from appliance.core.process import Lock
from appliance.core.roles import Role
from appliance.core.settings import FILE_NAME, Settings
from appliance.store import audit, plain_files
from appliance.store.accounts import Account, Accounts
from appliance.store.audit_entries import read_entries
from appliance.store.audit_messages import AuditMessages
from appliance.store.database import store_error
from appliance.store.logins import Logins
from appliance.store.store import WIPE_MARK, Store
from model_sync import atomic_files

ROLES: Final = (Role.SYSTEM_ADMINISTRATOR, Role.SECURITY_ADMINISTRATOR)
"""Who must agree, one person of each; no person holds both (:mod:`appliance.core.roles`)."""
_PROGRAMS: Final = ("supervisor", "worker", "receiver", "audit-sender", "key-rotation")
_RUN: Final = "run"  # holds the locks of the programs, no data


@dataclass(frozen=True)
class Secrets:
    """What a person types: user name, password and the code of the second factor."""

    username: str
    password: str
    code: str


def approve(store: Store, role: Role, secrets: Secrets) -> Account:
    """Check that somebody is who they say and has the role; the attempt is audited like a login.

    Raises:
        StoreError: ``wipe.not_approved``, with the role.
    """
    logins = Logins(store, Accounts(store))
    token = logins.login(secrets.username, secrets.password, "127.0.0.1")
    session = logins.resume(token) if token else None
    if token is None or session is None:
        raise StoreError("wipe.not_approved", role)
    try:
        account = session.account
        is_proved = session.needs_code and logins.complete(session, token, secrets.code)
        if not is_proved or account.role != role or account.must_change:
            raise StoreError("wipe.not_approved", role)
        return account
    finally:
        logins.logout(token)


def begin_wipe(store: Store, persons: tuple[Account, Account], audit_file: Path) -> None:
    """Close the box for ever: record who agreed, write the audit to a new file, and mark the box; :func:`finish_wipe` does the rest.

    Args:
        store: the box, whose programs do not run.
        persons: who agreed, in the order of ROLES.
        audit_file: a new file outside the data directory, one message of DICOM PS3.15 A.5 per line: the law asks for the audit longer.

    Raises:
        StoreError: ``wipe.not_approved``: the persons do not have the roles. The box is as before.
        OSError: the file exists, or cannot be written. The box is as before.
    """
    if tuple(person.role for person in persons) != ROLES:
        raise StoreError("wipe.not_approved")
    names = [person.username for person in persons]
    store.record(audit.SECURITY_ALERT, names[0], "D", "box", purpose="wipe", approved_by=names)
    messages = AuditMessages(store.database, store.settings.ae_title)
    with store.database.snapshot() as connection:
        lines = [messages.message(audit.fields_of(entry)) for entry in read_entries(connection)]
    if audit_file.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(audit_file))
    atomic_files.write(audit_file, "".join(f"{line}\n" for line in lines).encode(), mode=0o600)
    mark = {"at": utc_now(), "approved_by": names}
    atomic_files.write(store.settings.data_dir / WIPE_MARK, json.dumps(mark).encode(), mode=0o600)


def is_begun(settings: Settings) -> bool:
    """Whether a wipe has begun and not ended."""
    return (settings.data_dir / WIPE_MARK).exists()


def stop_programs(settings: Settings) -> ExitStack:
    """Hold the locks of all programs of the box until the stack is closed.

    Raises:
        ApplianceError: ``box.busy``: one of them runs.
    """
    with ExitStack() as stack:
        for name in _PROGRAMS:
            stack.callback(Lock(settings.data_dir, name).release)
        return stack.pop_all()


def finish_wipe(settings: Settings, on_progress: Callable[[int, int], None]) -> int:
    """Destroy the keys, then delete everything but ``box.toml``; returns how many files there were.

    Args:
        settings: of a box whose wipe has begun, and whose programs are stopped (:func:`stop_programs`).
        on_progress: called with the number of files that are done, and of all.

    Raises:
        StoreError: a file cannot be deleted; call it again.
    """
    data_dir = settings.data_dir
    try:
        keys = [path for path in sorted((data_dir / "keys").rglob("*"), key=_masters_first) if path.is_file()]
        rest = [path for path in data_dir.rglob("*") if not path.is_dir() or path.is_symlink()]
        rest = [path for path in rest if path not in keys and path.relative_to(data_dir).parts[0] not in (_RUN, WIPE_MARK, FILE_NAME)]
        for done, path in enumerate(keys + rest, start=1):
            plain_files.destroy(path) if done <= len(keys) and not path.is_symlink() else path.unlink()
            on_progress(done, len(keys) + len(rest))
        for path in data_dir.iterdir():
            if path.is_dir() and not path.is_symlink() and path.name != _RUN:
                shutil.rmtree(path)
        for path in (data_dir / _RUN).iterdir():
            path.unlink()
        atomic_files.sync_directory(data_dir)
        (data_dir / WIPE_MARK).unlink()
        atomic_files.sync_directory(data_dir)
    except OSError as error:
        raise store_error(error) from error
    return len(keys) + len(rest)


def _masters_first(path: Path) -> tuple[bool, str]:
    """The order of destruction: without the master key no other key file opens."""
    return not path.name.startswith("master."), path.name
