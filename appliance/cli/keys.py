"""``appliance keys``: check the keys of a box, copy them into escrow, restore them."""

from __future__ import annotations

import argparse
import getpass
import sys
from contextlib import closing
from pathlib import Path

from appliance.cli.terminal import Progress, UsageError, explain, hint_line, say
from appliance.core.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of ``appliance keys``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("check", help="check that the keys belong to the data of this box")
    escrow = actions.add_parser("escrow", help="copy the keys into a file that a passphrase opens; keep both apart from the box")
    escrow.add_argument("--out", type=Path, required=True, metavar="FILE", help="the new file")
    restore = actions.add_parser("restore", help="restore the keys from an escrow copy of this box")
    restore.add_argument("file", type=Path, metavar="FILE")
    actions.add_parser("rotate", help="exchange the key of the images, also while the box runs; again goes on with an interrupted exchange")
    forget = actions.add_parser(
        "forget-second-factors", help="remove every second factor, where accounts.key is lost and no escrow copy has it; the box is stopped"
    )
    forget.add_argument("--reason", required=True, metavar="TEXT", help="why; it is written into the audit")
    for action in actions.choices.values():
        action.add_argument("--data-dir", type=Path, required=True, help="the box's data directory")


def run(arguments: argparse.Namespace) -> int:
    """Run one action; returns the exit code."""
    if arguments.action == "escrow":
        _escrow(arguments.data_dir, arguments.out)
    elif arguments.action == "restore":
        _restore(arguments.data_dir, arguments.file)
    elif arguments.action == "rotate":
        return _rotate(arguments.data_dir)
    elif arguments.action == "forget-second-factors":
        _forget_second_factors(arguments.data_dir, arguments.reason.strip())
    else:
        _check(arguments.data_dir)
    return 0


def _check(data_dir: Path) -> None:
    from appliance.store.store import open_box

    with closing(open_box(data_dir)) as store:
        print(say("the keys belong to the data of this box"))
        sealed = {
            "tpm2": say("the keys are sealed by the TPM of this machine"),
            "systemd-creds": say("the keys are sealed by the host key of this machine (systemd-creds)"),
        }
        protection = store.keys.protection()
        print(sealed[protection] if protection in sealed else f"{explain('key.not_sealed')}\n{hint_line('key.not_sealed')}")


def _escrow(data_dir: Path, path: Path) -> None:
    from appliance.store import database as db
    from appliance.store.key_escrow import write_escrow
    from appliance.store.store import open_box

    with closing(open_box(data_dir)) as store:  # keys that do not belong to the data are not worth a copy
        store.account_secrets.ensure_key()  # so that the copy also restores the second factors that are set up later
        write_escrow(path, store.keys.escrowed(), _passphrase(is_new=True))
        store.record(db.SECURITY_ALERT, "cli", "R", "keys:escrow")
    print(say("escrow copy written to {path}: keep it and its passphrase in two places, neither of them this box", path=path))


def _restore(data_dir: Path, path: Path) -> None:
    from appliance.store import database as db
    from appliance.store.key_escrow import read_escrow
    from appliance.store.key_restore import restore_keys
    from appliance.store.store import DATABASE_NAME, open_box

    settings = Settings.load(data_dir)
    if not (settings.data_dir / DATABASE_NAME).is_file():
        raise UsageError(say("there is no box in {path}", path=settings.data_dir), say("check --data-dir; nothing was changed"))
    names = restore_keys(settings, read_escrow(path, _passphrase(is_new=False)))
    with closing(open_box(data_dir)) as store:
        store.record(db.SECURITY_ALERT, "cli", "U", "keys:restore", names=names)
    if names:
        print(say("restored: {names}; start the box again", names=", ".join(names)))
    else:
        print(say("nothing was changed: the keys that are here open the data of this box"))


def _rotate(data_dir: Path) -> int:
    from appliance.store import database as db
    from appliance.store.key_rotation import rotate_content_key
    from appliance.store.store import open_box

    progress = Progress()
    with closing(open_box(data_dir)) as store:
        store.record(db.SECURITY_ALERT, "cli", "U", "keys:rotate")
        try:
            done = rotate_content_key(store, lambda count, of: progress.show("content.key", say("encrypting the images again"), count / of))
        finally:
            progress.end()
        store.record(db.SECURITY_ALERT, "cli", "U", "keys:rotated", 4 if done.damaged else 0, files=done.files, damaged=done.damaged)
    if done.damaged:
        print(say("{count} damaged files cannot be opened; the earlier key is kept for them", count=done.damaged))
    else:
        print(say("{count} files are encrypted with the new key; the earlier key is destroyed", count=done.files))
    print(say("make a new escrow copy now: older copies do not restore this box any more"))
    print(say("database.key and audit.key are not exchanged by this command"))
    return int(bool(done.damaged))


def _forget_second_factors(data_dir: Path, reason: str) -> None:
    """Remove them where their key is lost; a key that opens them is left alone."""
    from appliance.core.errors import StoreError
    from appliance.store.second_factor import remove_all
    from appliance.store.store import open_box

    if not reason:
        raise UsageError(say("a reason is needed"), say("add --reason TEXT; it is written into the audit"))
    try:
        open_box(data_dir).close()
    except StoreError as error:
        if error.code != "key.accounts":
            raise
    else:
        raise UsageError(
            say("the key of the second factors is whole; nothing was changed"), say("one account: appliance user second-factor NAME")
        )
    count = remove_all(Settings.load(data_dir), f"cli:{getpass.getuser()}", reason)
    print(say("{count} second factors are removed; start the box: each account sets up a new one at its next login", count=count))


def _passphrase(*, is_new: bool) -> str:
    """Ask for the passphrase, twice for a new one; without a terminal it is the first line of the standard input."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    passphrase = getpass.getpass(say("passphrase: "))
    if is_new and getpass.getpass(say("the same again: ")) != passphrase:
        raise UsageError(say("the two passphrases differ"), say("type the command again; nothing was written"))
    return passphrase
