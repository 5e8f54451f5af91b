"""``appliance wipe``: destroy the keys and all data of a box, which a system and a security administrator approve together (R8)."""

from __future__ import annotations

import argparse
import getpass
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.cli.terminal import Progress, UsageError, say
from appliance.core.roles import Role
from appliance.core.settings import Settings
from model_sync import atomic_files

if TYPE_CHECKING:
    from appliance.store.store import Store
    from appliance.store.wipe import Secrets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``appliance wipe``."""
    parser.add_argument(
        "--audit", type=Path, metavar="FILE", help="new file outside the data directory that keeps the audit (not for a wipe that goes on)"
    )
    parser.epilog = "Without a terminal, user name, password and code of each person are lines of the standard input."


def run(arguments: argparse.Namespace) -> int:
    """Wipe the box, or go on with a wipe that was interrupted; returns 0. Raises UsageError or ApplianceError."""
    from appliance.store.wipe import finish_wipe, is_begun, stop_programs

    settings, progress = Settings.load(arguments.data_dir), Progress()
    with stop_programs(settings):
        if is_begun(settings):
            _tell_who(settings)
        else:
            _begin(settings, arguments.audit)
        try:
            count = finish_wipe(settings, lambda done, of: progress.show(str(settings.data_dir), say("wiping"), done / of))
        finally:
            progress.end()
    print(say("the box is wiped: its keys are destroyed, {count} files are deleted", count=count))
    print(say("destroy every escrow copy of its keys: with one, old bytes on the disk could still be read"))
    return 0


def _begin(settings: Settings, audit_file: Path | None) -> None:
    from appliance.store.store import open_box
    from appliance.store.wipe import ROLES, approve, begin_wipe

    if audit_file is None or audit_file.exists() or settings.data_dir in audit_file.resolve().parents:
        raise UsageError(
            say("a new file for the audit is needed"), say("add --audit FILE, outside the box's data directory; nothing was deleted")
        )
    with closing(open_box(settings.data_dir)) as store:
        print(_counts(store), file=sys.stderr)
        first, second = (approve(store, role, _ask(role)) for role in ROLES)
        begin_wipe(store, (first, second), audit_file)
    print(say("the audit is in {path}: keep it for at least 180 days", path=audit_file))


def _counts(store: Store) -> str:
    studies, images, accounts = (store.database.number(f"SELECT count(*) FROM {table}") for table in ("studies", "instances", "users"))  # noqa: S608
    return say(
        "{count} studies, {images} images and {accounts} accounts will be destroyed; nobody can bring them back",
        count=studies, images=images, accounts=accounts,
    )  # fmt: skip


def _tell_who(settings: Settings) -> None:
    from appliance.store.store import WIPE_MARK

    names = atomic_files.read_json(settings.data_dir / WIPE_MARK).get("approved_by", [])
    print(say("the wipe that was approved by {names} goes on", names=", ".join(map(str, names))))


def _ask(role: Role) -> Secrets:
    """What one person types, hidden but for the user name; without a terminal, three lines of the standard input."""
    from appliance.store.wipe import Secrets

    who = {Role.SYSTEM_ADMINISTRATOR: say("system administrator"), Role.SECURITY_ADMINISTRATOR: say("security administrator")}[role]
    if not sys.stdin.isatty():
        return Secrets(*(sys.stdin.readline().rstrip("\r\n") for _ in range(3)))
    name = input(say("{role}, user name: ", role=who))
    password = getpass.getpass(say("{role}, password: ", role=who))
    return Secrets(name, password, input(say("{role}, code of the second factor: ", role=who)))
