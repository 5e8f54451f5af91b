"""The second factor: codes of an authenticator app (TOTP, RFC 6238), which need no network, and recovery codes (R4, ADR 0050)."""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import sqlite3
from typing import Final

import pyotp
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from appliance.core.errors import StoreError
from appliance.core.roles import SECOND_FACTOR_ROLES, Role
from appliance.store.accounts import Account, Accounts, Actor, audit_change, check_right, require_row
from appliance.store.keys import ACCOUNTS_KEY
from appliance.store.passwords import readable_secret
from appliance.store.store import Store

logger = logging.getLogger(__name__)

RECOVERY_CODES: Final = 8
ISSUER: Final = "ClinicBox"
_STEP_S: Final = 30
# Steps that the clocks of phone and box may differ by.
_DRIFT: Final = 1
# Used codes that are remembered: more than can be valid at the same time, and not by time, so that setting the clock forgets none.
_REMEMBERED: Final = 20
_NONCE_BYTES: Final = 12


class SecondFactors:
    """The second factors of the accounts in one store."""

    def __init__(self, store: Store, accounts: Accounts) -> None:
        self._db = store.database
        self._keys = store.keys
        self._settings = store.settings
        self._clock = accounts.clock

    def is_required(self, account: Account) -> bool:
        """Whether this account must set up a second factor before anything else."""
        roles = SECOND_FACTOR_ROLES | ({Role.CLINICIAN} if self._settings.second_factor_for_clinicians else set())
        return account.role in roles and not account.has_second_factor

    def begin(self, account: Account) -> str:
        """The secret that is being set up (base32), the same until it is confirmed."""
        row = self._db.require("account", "SELECT totp_pending FROM users WHERE id = ?", account.id)
        pending = self._open(account.id, row["totp_pending"])
        if pending:
            return pending
        secret = pyotp.random_base32()
        sealed = self._seal(account.id, secret)
        with self._db.transaction() as tx:
            tx.execute("UPDATE users SET totp_pending = ? WHERE id = ?", (sealed, account.id))
        return secret

    def address(self, account: Account, secret: str) -> str:
        """The ``otpauth:`` address of a secret, which a QR code shows to the app."""
        return pyotp.TOTP(secret).provisioning_uri(name=account.username, issuer_name=ISSUER)

    def confirm(self, account: Account, code: str, own_session: int | None = None) -> list[str]:
        """Put the secret that is being set up into force; returns new recovery codes, which are shown once.

        All sessions of the account end but the person's own: none that was opened without this factor goes on.

        Raises:
            StoreError: ``account.wrong_code``. Nothing was changed.
        """
        secret = self.begin(account)
        step = self._step(secret, code)
        if step is None:
            raise StoreError("account.wrong_code")
        codes = [readable_secret() for _ in range(RECOVERY_CODES)]
        with self._db.transaction() as tx:
            row = require_row(tx, account.username)
            tx.execute("UPDATE users SET totp_secret = ?, totp_pending = NULL WHERE id = ?", (self._seal(row["id"], secret), row["id"]))
            tx.execute("DELETE FROM used_codes WHERE user_id = ?", (row["id"],))
            tx.execute("INSERT INTO used_codes (user_id, step) VALUES (?, ?)", (row["id"], step))
            tx.execute("DELETE FROM recovery_codes WHERE user_id = ?", (row["id"],))
            tx.executemany("INSERT INTO recovery_codes VALUES (?, ?)", [(row["id"], _digest(item)) for item in codes])
            tx.execute("DELETE FROM sessions WHERE user_id = ? AND id IS NOT ?", (row["id"], own_session))
            audit_change(tx, account, "U", account.username, changed="second factor set up")
        return codes

    def take(self, account: Account, code: str) -> str:
        """Use a code, which then works never again, in no process; returns ``totp`` or ``recovery``, or an empty text for a wrong one."""
        row = self._db.require("account", "SELECT totp_secret FROM users WHERE id = ?", account.id)
        secret = self._open(account.id, row["totp_secret"])
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
        return _count(self._db.connection(), account.id)

    def remove(self, username: str, actor: Actor) -> None:
        """Remove the second factor of an account whose device is lost; its sessions end, and it sets up a new one at the next login.

        Raises:
            StoreError: ``account.unknown`` or ``account.not_allowed``. Nothing was changed.
        """
        with self._db.transaction() as tx:
            check_right(tx, actor)
            row = require_row(tx, username)
            tx.execute("UPDATE users SET totp_secret = NULL, totp_pending = NULL WHERE id = ?", (row["id"],))
            for table in ("used_codes", "recovery_codes", "sessions"):
                tx.execute(f"DELETE FROM {table} WHERE user_id = ?", (row["id"],))  # noqa: S608 - constant names
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

    def _key(self) -> bytes:
        sealed = "SELECT 1 FROM users WHERE totp_secret IS NOT NULL OR totp_pending IS NOT NULL LIMIT 1"
        return self._keys.load(ACCOUNTS_KEY, lambda: self._db.one(sealed) is None)

    def _seal(self, user_id: int, secret: str) -> bytes:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + AESGCM(self._key()).encrypt(nonce, secret.encode(), str(user_id).encode())

    def _open(self, user_id: int, sealed: bytes | None) -> str:
        """The secret of a row; empty where there is none, or where its key is lost: then only recovery codes work."""
        if not sealed:
            return ""
        try:
            return AESGCM(self._key()).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], str(user_id).encode()).decode()
        except (StoreError, InvalidTag):
            logger.error("a second factor cannot be decrypted", extra={"code": "key.wrong"})
            return ""


def _count(tx: sqlite3.Connection, user_id: int) -> int:
    return int(tx.execute("SELECT count(*) FROM recovery_codes WHERE user_id = ?", (user_id,)).fetchone()[0])


def _digest(code: str) -> str:
    """The digest of a recovery code, however it was typed; 60 random bits need no slow hash."""
    return hashlib.sha256("".join(character for character in code.casefold() if character.isalnum()).encode()).hexdigest()
