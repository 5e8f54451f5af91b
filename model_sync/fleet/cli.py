"""The command ``model-library`` of the central team; the commands are in ``library.commands`` and ``fleet.commands``.

Errors are caught once, in ``main``: exit code 1 means refused, 2 means wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from model_sync import messages
from model_sync.errors import ModelSyncError, SettingsError
from model_sync.fleet.field_results import read_field_results
from model_sync.library import commands, console, signing

_Add = Callable[..., argparse.ArgumentParser]
# Commands of the server and its fleet. Their dependencies are large and installed only on the server, so others do not import them.
_FLEET = {
    "serve": "Serve the library, enrol boxes, and show the fleet.",
    "device-ca": "Create the authority that signs the certificates of boxes.",
    "token": "Make a token with which one box enrols, once.",
    "acknowledge-audit": "Record why the audit of a box went backwards or was changed; its next report begins anew.",
    "deny": "Deny a box at once, or one certificate with --serial.",
    "allow": "Allow a denied box again.",
    "move": "Assign a box to another ring; the box's own settings decide which ring it follows.",
    "operator": "Add, reset or remove a person who may see the fleet and pause a rollout.",
}
_EXTRA = ("sqlalchemy", "psycopg", "pkcs11")


class _Parser(argparse.ArgumentParser):
    """Prints a usage error in one line, and a hint."""

    def error(self, message: str) -> NoReturn:
        """Print error and hint; exit 2."""
        hint = f"`{self.prog} --help` shows how it is used"
        self.exit(2, f"{messages.describe('library.usage', message, hint, messages.choose_language())}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code (0 done, 1 refused, 2 wrong usage)."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    fleet = bool(arguments) and arguments[0] in _FLEET
    try:
        parsed = _parser(fleet=fleet).parse_args(arguments)
        return int(parsed.run(parsed) or 0)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if not fleet or missing not in _EXTRA:
            raise
        return _fail("library.module", f"`model-library {arguments[0]}` needs {missing}, which is not installed here", code=2)
    except SettingsError as error:
        return _fail(error.code, error.message, error.hint, code=2)
    except ModelSyncError as error:
        return _fail(error.code, error.message, error.hint)
    except OSError as error:
        return _fail("library.disk", str(error))
    except KeyboardInterrupt:
        return _fail("library.interrupted", "interrupted", code=130)


def _fail(reason: str, message: str, hint: str = "", *, code: int = 1) -> int:
    """Print what happened and what to do; returns the exit code."""
    print(messages.describe(reason, message, hint or messages.hint(reason, "en"), messages.choose_language()), file=sys.stderr)
    return code


def _parser(fleet: bool = False) -> argparse.ArgumentParser:
    parser = _Parser(prog="model-library", description="The central library: sign a model once, for every box.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    def add(
        name: str, run: Callable[[Any], int | None], text: str, *, library: bool = True, online: bool = True
    ) -> argparse.ArgumentParser:
        """Add a command: ``library`` gives it the library's directory, ``online`` the passphrase of the online keys."""
        command = subparsers.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        if library:
            command.add_argument("library", type=Path, metavar="LIB", help="the library's directory")
        if online:
            secret = f"file with the passphrase of the keys in LIB/online; or ${console.ONLINE_ENV}; else it is asked for"
            command.add_argument("--online-passphrase-file", type=Path, metavar="FILE", help=secret)
        return command

    _add_keys(subparsers)
    _add_library(add)
    _add_models(add)
    _add_signing(add)
    _add_checks(add)
    if fleet:
        from model_sync.fleet import commands as fleet_commands
        from model_sync.fleet import server

        serve = subparsers.add_parser("serve", help=_FLEET["serve"])
        server.add_arguments(serve)
        serve.set_defaults(run=server.run)
        fleet_commands.add_commands(subparsers, _FLEET)
    else:
        for name, text in _FLEET.items():
            subparsers.add_parser(name, help=text, add_help=False)
    return parser


def _add_keys(subparsers: Any) -> None:
    keys = subparsers.add_parser("key", help="Make a key, or write the public part of a key on a token.")
    kinds = keys.add_subparsers(required=True, metavar="WHAT", parser_class=_Parser)
    new = kinds.add_parser("new", help="Make an Ed25519 key in an encrypted file; FILE.pub.json beside it is its public part.")
    new.add_argument("file", type=Path, metavar="FILE.pem")
    new.add_argument("--name", help="who holds it (default: the file's name)")
    _passphrase(new)
    new.set_defaults(run=commands.key_new)
    token = kinds.add_parser("token", help="Write the public part of a key on a PKCS#11 token (PYKCS11LIB names the token's module).")
    token.add_argument("uri", metavar="hsm:ID?label=TOKEN")
    token.add_argument("file", type=Path, metavar="FILE.pub.json")
    token.add_argument("--name", required=True, help="who holds it")
    _passphrase(token)
    token.set_defaults(run=commands.key_token)


def _add_library(add: _Add) -> None:
    init = add("init", commands.init, "Create a library: offline keys of root and targets, online keys of snapshot and timestamp.")
    targets = "other holders for targets (default: those of root)"
    init.add_argument("--targets-key", type=Path, action="append", metavar="PUB.json", help=targets)
    init.add_argument("--expiry", action="append", default=[], metavar="ROLE=DAYS", help="days that a role's metadata is valid")
    line = add("add-line", commands.add_line, "Add a model line with keys of its own.")
    line.add_argument("name", help="as in the bundle's manifest")
    end = add("end-line", commands.end_line, "End a model line: boxes keep the model they have, and get no new version of it.")
    end.add_argument("name")
    rollout_keys = add("rollout-keys", commands.rollout_keys, "Give the rollout role its keys, or replace them.")
    for parser, threshold in ((init, 2), (line, 2), (rollout_keys, 1)):
        keys = "a holder's public key; once for each holder"
        parser.add_argument("--key", type=Path, action="append", required=True, metavar="PUB.json", help=keys)
        parser.add_argument("--threshold", type=int, default=threshold, help=f"signatures that are needed (default {threshold})")
    rotate = add("rotate-key", commands.rotate_key, "Replace a key of a role: planned, lost or stolen.")
    rotate.add_argument("role")
    rotate.add_argument("--old", metavar="NAME|KEYID", help="the key to remove; without it the new one is added")
    rotate.add_argument("--new", type=Path, metavar="PUB.json", help="the new key; without it the old one is removed")
    rotate.add_argument("--threshold", type=int, help="signatures that the role needs from now on")


def _add_models(add: _Add) -> None:
    publish = add("publish", commands.publish, "Make a bundle the newest version of its model line.")
    publish.add_argument("bundle", type=Path, help="bundle directory")
    publish.add_argument("--no-deltas", action="store_true", help="make no deltas from earlier versions")
    publish.add_argument("--minimum-version", metavar="VERSION", help="raise the minimum: the oldest version that boxes may take")
    rollout = add("rollout", commands.rollout, "Roll a version out to the boxes of a ring.")
    for name in ("ring", "line", "version"):
        rollout.add_argument(f"--{name}", required=True)
    rollout.add_argument("--percent", type=float, default=100.0, help="share of the ring's boxes (default 100)")
    rollout.add_argument("--start", type=_when, help="UTC, such as 2026-03-01T20:00Z (default: now)")
    rollout.add_argument("--duration-h", type=float, default=0.0, help="hours over which the boxes are spread (default 0)")
    rollout.add_argument("--max-failures", type=float, default=0.05, help="share of failed activations that pauses it (default 0.05)")
    rollout.add_argument("--min-failures", type=int, default=2, help="failed boxes below which nothing is paused (default 2)")
    rollout.add_argument("--paused", action="store_true", help="sign it as paused")
    withdraw = add("withdraw", commands.withdraw, "Withdraw a version: every box that runs it stops using it.")
    withdraw.add_argument("line")
    withdraw.add_argument("version")
    withdraw.add_argument("--reason", required=True, help="one sentence; clinicians read it")
    what = "Raise the oldest version of a model line that boxes may take; it cannot be lowered, and switches off nothing that runs."
    minimum = add("minimum", commands.minimum, what)
    minimum.add_argument("line")
    minimum.add_argument("version")
    for parser in (withdraw, minimum):
        _fleet_database(parser)


def _add_signing(add: _Add) -> None:
    sign = add("sign", signing.sign, "Show what waits for a signature, and sign it.", library=False)
    sign.add_argument("what", type=Path, metavar="LIB|FILE", help="the library: all that this key may sign; or one file of its staged/")
    sign.add_argument("--key", required=True, metavar="KEY.pem|hsm:ID?label=TOKEN")
    sign.add_argument("--public-key", type=Path, metavar="PUB.json", help="the public key that the key must belong to")
    sign.add_argument("--against", type=Path, metavar="DIR", help="your copy of the library's public folder, to compare a single file with")
    sign.add_argument("--yes", action="store_true", help="do not ask")
    _passphrase(sign)
    merge = add("merge", commands.merge, "Merge the signatures of a file that was signed on another machine.")
    merge.add_argument("file", type=Path, nargs="+")
    add("renew", commands.renew, "Stage a role again, unchanged, to be valid for longer.").add_argument("role")
    discard = add("discard", commands.discard, "Delete everything that waits for signatures.", online=False)
    discard.add_argument("--yes", action="store_true", help="do not ask")
    add("refresh-timestamp", commands.refresh_timestamp, "Sign a new timestamp; let cron run it every day.")


def _add_checks(add: _Add) -> None:
    status = add("status", commands.status, "Show every role, its signatures and expiry, and what to do next.", online=False)
    status.add_argument("--json", action="store_true", help="for programs")
    _fleet_database(status)
    verify = add("verify", commands.verify, "Check a library, its public folder, or a bundle.", library=False, online=False)
    verify.add_argument("directory", type=Path)
    usb = add("export-usb", commands.export_usb, "Write a USB stick for boxes without a link, or update one.", online=False)
    usb.add_argument("directory", type=Path, help="mount point of the stick")
    usb.add_argument("--line", action="append", help="only this model line; may be repeated")
    usb.add_argument("--version", action="append", help="only this version; may be repeated")


def _passphrase(parser: argparse.ArgumentParser) -> None:
    text = f"file with the key's passphrase or PIN; or ${console.PASSPHRASE_ENV}; else it is asked for"
    parser.add_argument("--passphrase-file", type=Path, metavar="FILE", help=text)


def _fleet_database(parser: argparse.ArgumentParser) -> None:
    """Let a command read what boxes have reported, so that it proposes no version that is known to be bad."""
    parser.add_argument("--db", metavar="URL", help="fleet database, as for serve (default: the one in LIB, if there is one)")
    parser.set_defaults(field_results=lambda arguments: read_field_results(arguments.library, arguments.db))


def _when(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 2026-03-01T20:00Z") from error
    return moment.astimezone(timezone.utc) if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


if __name__ == "__main__":
    sys.exit(main())
