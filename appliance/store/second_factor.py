"""The second factor: codes of an authenticator app (TOTP, RFC 6238), which need no network, and recovery codes (R4, ADR 0050)."""

from __future__ import annotations

import hashlib
import hmac
import sqlite3
from contextlib import closing
from typing import Final

import pyotp

from appliance.core.errors import StoreError
from appliance.core.process import Lock
from appliance.core.roles import SECOND_FACTOR_ROLES, Role
from appliance.core.settings import Settings
from appliance.store.accounts import Account, Accounts, Actor, audit_change, check_right, require_row
from appliance.store.passwords import readable_secret
from appliance.store.store import Store

RECOVERY_CODES: Final = 8
ISSUER: Final = "ClinicBox"
_STEP_S: Final = 30
# Steps that the clocks of phone and box may differ by.
_DRIFT: Final = 1
# Used codes that are remembered: more than can be valid at the same time, and not by time, so that setting the clock forgets none.
_REMEMBERED: Final = 20
_PENDING: Final = "SELECT totp_pending FROM sessions WHERE id = ? AND user_id = ?"


class SecondFactors:
    """The second factors of the accounts in one store."""

    def __init__(self, store: Store, accounts: Accounts) -> None:
        self._db = store.database
        self._secrets = store.account_secrets
        self._settings = store.settings
        self._clock = accounts.clock

    def is_required(self, account: Account) -> bool:
        """Whether this account must set up a second factor before anything else."""
        roles = SECOND_FACTOR_ROLES | ({Role.CLINICIAN} if self._settings.second_factor_for_clinicians else set())
        return account.role in roles and not account.has_second_factor

    def begin(self, account: Account, session_id: int) -> str:
        """The secret that is being set up in a session (base32): the same until it is confirmed, unknown to other sessions, gone with it.

        Raises:
            StoreError: ``store.missing``: the session has ended; ``key.missing``: ``accounts.key`` is lost.
        """
        row = self._db.require("session", _PENDING, session_id, account.id)
        pending = self._secrets.open(account.id, row["totp_pending"])
        if pending:
            return pending
        secret = pyotp.random_base32()
        sealed = self._secrets.seal(account.id, secret)
        with self._db.transaction() as tx:
            tx.execute("UPDATE sessions SET totp_pending = ? WHERE id = ?", (sealed, session_id))
        return secret

    def address(self, account: Account, secret: str) -> str:
        """The ``otpauth:`` address of a secret, which a QR code shows to the app."""
        return pyotp.TOTP(secret).provisioning_uri(name=account.username, issuer_name=ISSUER)

    def confirm(self, account: Account, session_id: int, code: str) -> list[str]:
        """Put the secret that is being set up into force; returns new recovery codes, which are shown once.

        All sessions of the account end but this one: none that was opened without this factor goes on.

        Raises:
            StoreError: ``account.wrong_code``; ``store.missing``: the session has ended. Nothing was changed.
        """
        secret = self.begin(account, session_id)
        step = self._step(secret, code)
        if step is None:
            raise StoreError("account.wrong_code")
        codes, sealed = [readable_secret() for _ in range(RECOVERY_CODES)], self._secrets.seal(account.id, secret)
        with self._db.transaction() as tx:
            row = tx.execute(_PENDING, (session_id, account.id)).fetchone()
            if row is None or self._secrets.open(account.id, row["totp_pending"]) != secret:  # it ended meanwhile, or was faster elsewhere
                raise StoreError("store.missing", "session")
            tx.execute("UPDATE users SET totp_secret = ? WHERE id = ?", (sealed, account.id))
            tx.execute("UPDATE sessions SET totp_pending = NULL WHERE id = ?", (session_id,))
            tx.execute("DELETE FROM used_codes WHERE user_id = ?", (account.id,))
            tx.execute("INSERT INTO used_codes (user_id, step) VALUES (?, ?)", (account.id, step))
            tx.execute("DELETE FROM recovery_codes WHERE user_id = ?", (account.id,))
            tx.executemany("INSERT INTO recovery_codes VALUES (?, ?)", [(account.id, _digest(item)) for item in codes])
            tx.execute("DELETE FROM sessions WHERE user_id = ? AND id IS NOT ?", (account.id, session_id))
            audit_change(tx, account, "U", account.username, changed="second factor set up")
        return codes

    def take(self, account: Account, code: str) -> str:
        """Use a code, which then works never again, in no process; returns ``totp`` or ``recovery``, or an empty text for a wrong one."""
        row = self._db.require("account", "SELECT totp_secret FROM users WHERE id = ?", account.id)
        secret = self._secrets.open(account.id, row["totp_secret"])
        step = self._step(secret, code) if secret else None
        with self._db.transaction() as tx:
            if step is not None:
                return "totp" if self._use_step(tx, account.id, step) else ""
            used = tx.execute("DELETE FROM recovery_codes WHERE user_id = ? AND code_sha256 = ?", (account.id, _digest(code)))
            if not used.rowcount:
                return ""
            audit_change(tx, account, "U", account.username, changed="recovery code used", left=_count(tx, account.id))
            return "recovery"

    def recovery_codes_left(self, account: Account) -> int:
        """How many recovery codes of an account are unused."""
        with self._db.snapshot() as connection:
            return _count(connection, account.id)

    def remove(self, username: str, actor: Actor) -> None:
        """Remove the second factor of an account whose device is lost; its sessions end, and it sets up a new one at the next login.

        Raises:
            StoreError: ``account.unknown`` or ``account.not_allowed``. Nothing was changed.
        """
        with self._db.transaction() as tx:
            check_right(tx, actor)
            row = require_row(tx, username)
            _remove_within(tx, row["id"])
            audit_change(tx, actor, "U", row["username"], changed="second factor removed")

    def _step(self, secret: str, code: str) -> int | None:
        """The time step whose code this is, within the drift that is allowed."""
        totp, now = pyotp.TOTP(secret), int(self._clock.wall_s() // _STEP_S)
        typed = "".join(code.split()).encode()
        steps = range(now - _DRIFT, now + _DRIFT + 1)
        return next((step for step in steps if hmac.compare_digest(totp.generate_otp(step).encode(), typed)), None)

    def _use_step(self, tx: sqlite3.Connection, user_id: int, step: int) -> bool:
        """Mark the code of a step as used; False where it was used before."""
        if not tx.execute("INSERT OR IGNORE INTO used_codes (user_id, step) VALUES (?, ?)", (user_id, step)).rowcount:
            return False
        tx.execute(
            "DELETE FROM used_codes WHERE user_id = ? AND id NOT IN (SELECT id FROM used_codes WHERE user_id = ? ORDER BY id DESC LIMIT ?)",
            (user_id, user_id, _REMEMBERED),
        )
        return True


def remove_all(settings: Settings, actor: str, reason: str) -> int:
    """Remove every second factor of a box whose ``accounts.key`` is lost and has no escrow copy; returns how many there were.

    Each account is logged out, and sets up a new one at its next login.

    Raises:
        ApplianceError: ``box.busy``: the box runs.
        StoreError: the box cannot be opened, for another reason than that key.
    """
    lock = Lock(settings.data_dir, "supervisor")
    try:
        store = Store(settings, needs_accounts_key=False)
        with closing(store), store.database.transaction() as tx:
            rows = tx.execute("SELECT id, username FROM users WHERE totp_secret IS NOT NULL ORDER BY id").fetchall()
            for row in rows:
                _remove_within(tx, row["id"])
                audit_change(tx, actor, "U", row["username"], changed="second factor removed", code="key.accounts", reason=reason)
    finally:
        lock.release()
    return len(rows)


def _remove_within(tx: sqlite3.Connection, user_id: int) -> None:
    """Remove a second factor with all that belongs to it, and end the sessions, in the caller's transaction."""
    tx.execute("UPDATE users SET totp_secret = NULL WHERE id = ?", (user_id,))
    for table in ("used_codes", "recovery_codes", "sessions"):
        tx.execute(f"DELETE FROM {table} WHERE user_id = ?", (user_id,))  # noqa: S608 - constant names


def _count(tx: sqlite3.Connection, user_id: int) -> int:
    return int(tx.execute("SELECT count(*) FROM recovery_codes WHERE user_id = ?", (user_id,)).fetchone()[0])


def _digest(code: str) -> str:
    """The digest of a recovery code, however it was typed; 60 random bits need no slow hash."""
    return hashlib.sha256("".join(character for character in code.casefold() if character.isalnum()).encode()).hexdigest()
