"""``appliance user``: the accounts of the box, on its own command line (root of the machine is trusted with them)."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from contextlib import closing
from typing import Final

from appliance.cli.terminal import UsageError, print_columns, say
from appliance.core.moments import moment_utc
from appliance.core.roles import Role, Scope
from appliance.core.settings import Settings
from appliance.store.accounts import COMMAND_WORDS, Account, Accounts
from appliance.store.api_tokens import MAX_DAYS, USUAL_DAYS, ApiToken, ApiTokens
from appliance.store.logins import Logins
from appliance.store.second_factor import SecondFactors
from appliance.store.store import Store, open_box

_ACTOR: Final = "cli"
_DAY_S: Final = 24 * 3600
_ID_DIGITS: Final = 19  # of the largest row number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; what to do comes first, then the name and, for ``role``, the new role."""
    parser.epilog = "`user NAME [--role ROLE]` is deprecated: it creates the account, or changes its role and its password."
    parser.add_argument(
        "words", nargs="+", metavar="ACTION [NAME [ROLE]]",
        help="list; add NAME; role NAME ROLE; disable NAME; enable NAME; password NAME (a new one-time password); sessions [NAME]; "
        "second-factor NAME (remove it); token add NAME, token list [NAME], token revoke NUMBER (API tokens for programs)",
    )  # fmt: skip
    parser.add_argument("--role", choices=[str(role) for role in Role], help="of a new account (default: clinician)")
    parser.add_argument(
        "--scope", action="append", default=[], choices=[str(scope) for scope in Scope], help="with `token add`: what the program may do; "
        "may be given twice",
    )  # fmt: skip
    parser.add_argument("--days", type=int, default=USUAL_DAYS, help=f"with `token add`: 1 to {MAX_DAYS} (default {USUAL_DAYS})")
    parser.add_argument("--end", action="store_true", help="with `sessions NAME`: log this account out everywhere")


def run(arguments: argparse.Namespace) -> int:
    """Do one action; returns 0. Raises UsageError or StoreError; then nothing was changed."""
    action, names = arguments.words[0], arguments.words[1:]
    if action not in COMMAND_WORDS:
        action, names = "deprecated", arguments.words
    may_create = action in ("add", "deprecated")
    with closing(Store(Settings.load(arguments.data_dir)) if may_create else open_box(arguments.data_dir)) as store:
        least, most = _NAMES[action]
        if not least <= len(names) <= most:
            raise _wrong_words()
        _ACTIONS[action](store, Accounts(store), names, arguments)
    return 0


def _wrong_words() -> UsageError:
    return UsageError(say("the number of names does not fit"), say("see `appliance user --help`; nothing was changed"))


def _list(_store: Store, accounts: Accounts, _names: list[str], _arguments: argparse.Namespace) -> None:
    rows = [(say("name"), say("role"), say("state"), say("last login"))]
    rows += [(item.username, str(item.role), _state(item), moment_utc(item.last_login_at) or "-") for item in accounts.all()]
    print_columns(rows)


def _state(account: Account) -> str:
    if not account.is_active:
        return say("disabled")
    return say("one-time password") if account.is_one_time else say("active")


def _add(_store: Store, accounts: Accounts, names: list[str], arguments: argparse.Namespace) -> None:
    _print_password(names[0], accounts.add(names[0], arguments.role or Role.CLINICIAN, _ACTOR))


def _set_role(_store: Store, accounts: Accounts, names: list[str], _arguments: argparse.Namespace) -> None:
    accounts.set_role(names[0], names[1], _ACTOR)
    print(say("{username} is {role} now and was logged out", username=names[0], role=names[1]))


def _disable(_store: Store, accounts: Accounts, names: list[str], _arguments: argparse.Namespace) -> None:
    accounts.set_active(names[0], False, _ACTOR)
    print(say("{username} is disabled and was logged out", username=names[0]))


def _enable(_store: Store, accounts: Accounts, names: list[str], _arguments: argparse.Namespace) -> None:
    accounts.set_active(names[0], True, _ACTOR)
    print(say("{username} may log in again", username=names[0]))


def _issue_password(_store: Store, accounts: Accounts, names: list[str], _arguments: argparse.Namespace) -> None:
    _print_password(names[0], accounts.issue_one_time_password(names[0], _ACTOR))


def _sessions(store: Store, accounts: Accounts, names: list[str], arguments: argparse.Namespace) -> None:
    if arguments.end:
        if not names:
            raise _wrong_words()
        print(say("{count} sessions ended", count=accounts.end_sessions(names[0], _ACTOR)))
        return
    logins = Logins(store, accounts)
    account = accounts.require(names[0]) if names else None
    rows = [(say("name"), say("address"), say("since"), say("last request"))]
    rows += [(item.account.username, item.peer, moment_utc(item.created_at), moment_utc(item.seen_at)) for item in logins.sessions(account)]
    print_columns(rows)


def _remove_second_factor(store: Store, accounts: Accounts, names: list[str], _arguments: argparse.Namespace) -> None:
    SecondFactors(store, accounts).remove(names[0], _ACTOR)
    print(say("{username} has no second factor any more and was logged out", username=names[0]))


def _token(store: Store, accounts: Accounts, names: list[str], arguments: argparse.Namespace) -> None:
    tokens, (what, *given) = ApiTokens(store, accounts), names
    if what == "list":
        _print_tokens(tokens.all(accounts.require(given[0]) if given else None))
    elif what == "add" and given:
        token = tokens.issue(given[0], arguments.scope, arguments.days, _ACTOR)
        print(say("API token of {username}, shown only this once: {token}", username=given[0], token=token))
    elif what == "revoke" and given:
        number = int(given[0]) if given[0].isascii() and given[0].isdigit() and len(given[0]) < _ID_DIGITS else 0
        print(say("API token {number} of {username} is revoked", number=number, username=tokens.revoke(number, _ACTOR)))
    else:
        raise _wrong_words()


def _print_tokens(tokens: list[ApiToken]) -> None:
    rows = [(say("number"), say("name"), say("scopes"), say("days left"), say("last use"), say("addresses"))]
    for item in tokens:
        left = str(math.ceil(item.remaining_s / _DAY_S)) if item.remaining_s else say("expired")
        addresses = ", ".join(item.addresses) or "-"
        if len(item.addresses) > 1:
            addresses = say("SEVERAL: {addresses}", addresses=addresses)
        scopes = ", ".join(sorted(item.scopes))
        rows.append((str(item.id), item.account.username, scopes, left, moment_utc(item.last_used_at) or "-", addresses))
    print_columns(rows)


def _create_or_reset(store: Store, accounts: Accounts, names: list[str], arguments: argparse.Namespace) -> None:
    print(say("deprecated: use `appliance user add`, `role` or `password`"), file=sys.stderr)
    if accounts.find(names[0]) is None:
        _add(store, accounts, names, arguments)
        return
    if arguments.role:
        accounts.set_role(names[0], arguments.role, _ACTOR)
    _issue_password(store, accounts, names, arguments)


def _print_password(username: str, password: str) -> None:
    print(say("one-time password of {username}: {password}", username=username, password=password))


_ACTIONS: Final[dict[str, Callable[[Store, Accounts, list[str], argparse.Namespace], None]]] = {
    "list": _list, "add": _add, "role": _set_role, "disable": _disable, "enable": _enable, "password": _issue_password,
    "sessions": _sessions, "second-factor": _remove_second_factor, "token": _token, "deprecated": _create_or_reset,
}  # fmt: skip
# The least and the greatest number of words after the action.
_NAMES: Final = {
    "list": (0, 0), "add": (1, 1), "role": (2, 2), "disable": (1, 1), "enable": (1, 1), "password": (1, 1), "sessions": (0, 1),
    "second-factor": (1, 1), "token": (1, 2),
    "deprecated": (1, 1),
}  # fmt: skip
