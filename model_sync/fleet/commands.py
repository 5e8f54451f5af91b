"""The commands of ``model-library`` about the fleet: device authority, tokens, deny-list, operators."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from model_sync.errors import SettingsError
from model_sync.fleet.accounts import Accounts
from model_sync.fleet.database import Fleet
from model_sync.fleet.enrolment import DeviceAuthority, new_token
from model_sync.fleet.field_results import sqlite_url
from model_sync.library import console

_BOX: Final = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
_RING: Final = re.compile(r"^[a-z0-9][a-z0-9_-]{0,63}$")
_ACTOR: Final = "command line"


def passphrase(*files: Path | None, variable: str = console.PASSPHRASE_ENV) -> str:
    """Return the content of the first given file; the file of the environment variable is the last choice.

    Raises:
        SettingsError: no file is given, it cannot be read, or every account can read it.
    """
    for file in (*files, console.file_from_environment(variable)):
        if file is not None:
            return console.read_secret(file)
    raise SettingsError("no passphrase was given", hint=f"give --passphrase-file FILE, or {variable}=FILE", code="library.passphrase")


def add_commands(commands: Any, texts: Mapping[str, str]) -> None:
    """Add the commands of the fleet; ``texts`` has their descriptions."""

    def add(name: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(name, help=texts[name], description=texts[name])
        parser.set_defaults(run=run)
        return parser

    authority = add("device-ca", _make_authority)
    authority.add_argument("directory", type=Path, metavar="DIR", help="a directory of its own, which is secret")
    authority.add_argument("--passphrase-file", type=Path, metavar="FILE", help="passphrase of its key; else it is asked for")
    authority.add_argument("--name", default="device authority", help="name in the certificate")
    token, deny, allow, move = add("token", _make_token), add("deny", _deny), add("allow", _allow), add("move", _move)
    token.add_argument("new", choices=["new"], help="make a new one; it is shown once")
    token.add_argument("box", metavar="BOX", help="the box's name")
    token.add_argument("--ring", default="stable", help="its rollout ring (default stable)")
    token.add_argument("--hours", type=float, default=72.0, help="how long it may be used (default 72)")
    deny.add_argument("box", nargs="?", metavar="BOX", help="the box's name")
    deny.add_argument("--serial", help="one certificate, by its serial in hexadecimal")
    allow.add_argument("box", metavar="BOX", help="the box's name")
    move.add_argument("box", metavar="BOX", help="the box's name")
    move.add_argument("--ring", required=True, help="the ring")
    acknowledge = add("acknowledge-audit", _acknowledge_audit)
    acknowledge.add_argument("box", metavar="BOX", help="the box's name")
    acknowledge.add_argument("--note", required=True, help="the reason; it is kept with the action")
    operator = add("operator", _operator)
    operator.add_argument("what", choices=["add", "reset", "remove"], help="add and reset print a new password, once")
    operator.add_argument("name", metavar="NAME", help="letters, digits, dot, dash, underscore")
    for parser in (token, deny, allow, move, acknowledge, operator):
        parser.add_argument("--library", type=Path, default=Path(), metavar="LIB", help="the library's directory (default: here)")
        parser.add_argument("--db", metavar="URL", help="fleet database (default: sqlite in LIB)")


def _make_authority(arguments: argparse.Namespace) -> int:
    secret = console.new_secret(arguments.passphrase_file, "passphrase of the device authority")
    DeviceAuthority.create(arguments.directory, secret, arguments.name)
    print(f"{arguments.directory}: created; store a copy of it and of the passphrase in two different places")
    return 0


def _make_token(arguments: argparse.Namespace) -> int:
    _match(_BOX, arguments.box, "box")
    _match(_RING, arguments.ring, "ring")
    with _fleet(arguments) as fleet:
        token = new_token(fleet, arguments.box, arguments.ring, hours=arguments.hours, actor=_ACTOR)
    print(token)
    return 0


def _deny(arguments: argparse.Namespace) -> int:
    if (arguments.box is None) == (arguments.serial is None):
        raise SettingsError("name a box, or a certificate with --serial", code="library.usage")
    with _fleet(arguments) as fleet:
        if arguments.box is not None:
            fleet.deny(arguments.box, _ACTOR)
        else:
            fleet.deny_serial(arguments.serial, _ACTOR)
    print(f"{arguments.box or arguments.serial}: denied from now on")
    return 0


def _allow(arguments: argparse.Namespace) -> int:
    with _fleet(arguments) as fleet:
        fleet.allow(arguments.box, _ACTOR)
    print(f"{arguments.box}: allowed again")
    return 0


def _move(arguments: argparse.Namespace) -> int:
    _match(_RING, arguments.ring, "ring")
    with _fleet(arguments) as fleet:
        fleet.move(arguments.box, arguments.ring, _ACTOR)
    print(f"{arguments.box}: assigned to ring {arguments.ring}; set `ring` in its sync.toml as well")
    return 0


def _acknowledge_audit(arguments: argparse.Namespace) -> int:
    with _fleet(arguments) as fleet:
        fleet.acknowledge_audit(arguments.box, _ACTOR, arguments.note)
    print(f"{arguments.box}: acknowledged; its next report begins anew")
    return 0


def _operator(arguments: argparse.Namespace) -> int:
    with _fleet(arguments) as fleet:
        accounts = Accounts(fleet)
        if arguments.what == "remove":
            accounts.remove(arguments.name)
            print(f"{arguments.name}: removed")
        else:
            print(accounts.add(arguments.name) if arguments.what == "add" else accounts.reset(arguments.name))
    return 0


@contextmanager
def _fleet(arguments: argparse.Namespace) -> Iterator[Fleet]:
    if arguments.db is None and not (arguments.library / "library.json").is_file():
        raise SettingsError(f"{arguments.library.resolve()} is no library", hint="give --library LIB or --db URL", code="library.absent")
    fleet = Fleet(arguments.db or sqlite_url(arguments.library))
    try:
        yield fleet
    finally:
        fleet.close()


def _match(pattern: re.Pattern[str], value: str, what: str) -> None:
    if not pattern.match(value):
        raise SettingsError(f"{value!r} is no name of a {what}", hint=f"it must fit {pattern.pattern}", code="library.name")
