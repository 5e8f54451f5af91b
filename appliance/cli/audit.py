"""``appliance audit``: verify the audit, print or export it, and acknowledge what was found."""

from __future__ import annotations

import argparse
import getpass
import sys
from contextlib import closing
from typing import TYPE_CHECKING

from appliance.cli.terminal import UsageError, say
from appliance.core.errors import ApplianceError, StoreError
from appliance.core.settings import Settings
from model_sync import atomic_files
from model_sync.messages import choose_language

if TYPE_CHECKING:
    from appliance.store.audit import Problem
    from appliance.store.store import Store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``appliance audit``."""
    parser.add_argument(
        "action", choices=("verify", "show", "export", "status", "acknowledge", "new-key"),
        help="verify: search for changes; show: print every entry; export: the same as messages of DICOM PS3.15; "
        "status: what the syslog server has got; acknowledge: record that a person has seen what verify found; "
        "new-key: replace a lost keys/audit.key",
    )  # fmt: skip
    parser.add_argument("--xml", action="store_true", help="the form of export, one message per line (the only one)")
    parser.add_argument("--reason", default="", help="why, for acknowledge and new-key; it is written into the audit")


def run(arguments: argparse.Namespace) -> int:
    """Do one of the actions; returns the exit code."""
    from appliance.store.store import open_box

    needs_reason = arguments.action in ("acknowledge", "new-key")
    if needs_reason and not arguments.reason.strip():
        raise UsageError(say("a reason is needed"), say("add --reason TEXT; it is written into the audit"))
    if arguments.reason and not needs_reason:
        raise UsageError(say("--reason belongs to acknowledge and new-key"), say("leave it out; nothing was done"))
    if arguments.xml and arguments.action != "export":
        raise UsageError(say("--xml belongs to export"), say("use `appliance audit export --xml`; nothing was done"))
    if arguments.action == "new-key":
        return _replace_key(arguments)
    with closing(open_box(arguments.data_dir)) as store:
        if arguments.action == "verify":
            found = store.database.anchors().verify()
            _require_none(found.problems)
            print(say("audit chain whole: {count} entries", count=found.entries))
        elif arguments.action == "status":
            return _print_status(store)
        elif arguments.action == "acknowledge":
            seen = store.database.anchors().acknowledge(_actor(), arguments.reason.strip())
            if not seen:
                print(say("nothing to acknowledge: the audit is whole"))
            for problem in seen:
                print(say("acknowledged: {problem}", problem=problem.describe(choose_language())))
        else:
            _print_entries(store, is_xml=arguments.action == "export")
    return 0


def _print_entries(store: Store, *, is_xml: bool) -> None:
    """Print every entry, this very access included, one per line; raises StoreError ``audit.broken`` at the end where some are damaged."""
    from appliance.store import audit
    from appliance.store.audit_entries import read_entries
    from appliance.store.audit_messages import AuditMessages

    store.record(audit.AUDIT_LOG_USED, _actor(), "R", audit.AUDIT_OBJECT, purpose="export" if is_xml else "show")
    messages = AuditMessages(store.database, store.settings.ae_title)
    with store.database.snapshot() as connection:
        entries = list(read_entries(connection))
    for entry in entries:
        print(messages.message(audit.fields_of(entry)) if is_xml else entry.text)
    _require_none([audit.problem(audit.UNREADABLE, entry.digest, seq=entry.seq) for entry in entries if entry.fields() is None])


def _require_none(problems: list[Problem]) -> None:
    """Print each problem; raises StoreError ``audit.broken`` where there are some."""
    from appliance.store import audit

    for problem in problems:
        print(problem.describe(choose_language()), file=sys.stderr)
    if problems:
        raise StoreError(audit.BROKEN, say("{count} problems", count=len(problems)))


def _print_status(store: Store) -> int:
    """Print what the syslog server has got, and why it gets nothing; returns the exit code."""
    from appliance.service.audit_sender import STATUS_NAME, AuditSender

    destination = store.settings.audit_syslog
    if not destination:
        print(say("no syslog server is configured (audit_syslog); the audit stays on the box"))
        return 0
    last, arrived = store.database.number("SELECT max(seq) FROM audit"), AuditSender(store).arrived()
    print(
        say(
            "{destination}: {arrived} entries have arrived, {waiting} wait",
            destination=destination,
            arrived=arrived,
            waiting=last - arrived,
        )
    )
    state = atomic_files.read_json(store.settings.data_dir / "run" / STATUS_NAME)
    if state.get("code"):
        raise ApplianceError(str(state["code"]), str(state.get("detail", "")))
    return 0


def _replace_key(arguments: argparse.Namespace) -> int:
    """Replace the key where it is lost; one that opens the audit is left alone."""
    from appliance.store.keys import AUDIT_KEY
    from appliance.store.store import open_box, replace_audit_key

    try:
        open_box(arguments.data_dir).close()
    except StoreError as error:
        if error.code not in ("key.missing", "key.wrong") or not error.detail.startswith(AUDIT_KEY):
            raise
    else:
        raise UsageError(say("the key of the audit is whole; nothing was changed"), say("new-key is only for a lost keys/audit.key"))
    replace_audit_key(Settings.load(arguments.data_dir), _actor(), arguments.reason.strip())
    print(say("there is a new key: make a new escrow copy now; `appliance audit acknowledge` records that this was seen"))
    return 0


def _actor() -> str:
    """The system account that runs the command."""
    return f"cli:{getpass.getuser()}"
