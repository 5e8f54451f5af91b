"""The secrets of second factors, encrypted by ``accounts.key``: a key that is lost is never made anew while secrets need it (R4, R46)."""

from __future__ import annotations

import logging
import secrets
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from appliance.core.errors import StoreError
from appliance.store.database import Database
from appliance.store.keys import ACCOUNTS_KEY, Keys

logger = logging.getLogger(__name__)

_NONCE_BYTES: Final = 12
_LOST: Final = ("key.missing", "key.wrong")


class AccountSecrets:
    """Encrypts and decrypts the secrets of the accounts of one box (AES-256-GCM, bound to the account)."""

    def __init__(self, database: Database, keys: Keys) -> None:
        self._db, self._keys = database, keys

    def check(self) -> None:
        """Check that the key opens what the accounts have; one damaged row does not condemn it.

        Raises:
            StoreError: ``key.accounts``: the key is lost, damaged or of another box. Nothing was changed.
            OSError: it cannot be read.
        """
        rows = self._db.query("SELECT id, totp_secret FROM users WHERE totp_secret IS NOT NULL")
        if not rows:
            return
        try:
            key = self._keys.load(ACCOUNTS_KEY)
        except StoreError as error:
            if error.code not in _LOST:
                raise  # the master key, which every key of the box needs
            raise StoreError("key.accounts", error.detail) from error
        if not any(_decrypt(key, row["id"], row["totp_secret"]) for row in rows):
            raise StoreError("key.accounts", ACCOUNTS_KEY)

    def seal(self, user_id: int, secret: str) -> bytes:
        """Encrypt a secret of an account; raises StoreError ``key.missing`` where the key is lost and others need it, and OSError."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + AESGCM(self.ensure_key()).encrypt(nonce, secret.encode(), str(user_id).encode())

    def open(self, user_id: int, sealed: bytes | None) -> str:
        """The secret of a row; empty where there is none, or where its key was lost since the start: then only recovery codes work."""
        if not sealed:
            return ""
        try:
            secret = _decrypt(self._keys.load(ACCOUNTS_KEY), user_id, sealed)
        except StoreError as error:
            logger.error("the key of the second factors cannot be used", extra={"code": error.code})
            return ""
        if not secret:
            logger.error("a second factor cannot be decrypted", extra={"code": "key.wrong"})
        return secret

    def ensure_key(self) -> bytes:
        """The key; a new one where none is there, or it is damaged, and no account needs it.

        Raises:
            StoreError: ``key.missing`` where accounts need the one that is lost.
            OSError: it cannot be read or written.
        """
        try:
            return self._keys.load(ACCOUNTS_KEY, self._is_unneeded)
        except StoreError as error:
            if error.code not in _LOST or not self._is_unneeded():
                raise
            logger.warning("key of the second factors replaced, no account needs it", extra={"code": error.code})
            return self._keys.renew(ACCOUNTS_KEY)

    def _is_unneeded(self) -> bool:
        return self._db.one("SELECT 1 FROM users WHERE totp_secret IS NOT NULL LIMIT 1") is None


def _decrypt(key: bytes, user_id: int, sealed: bytes) -> str:
    """The secret; empty where this key does not open it."""
    try:
        return AESGCM(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], str(user_id).encode()).decode()
    except (InvalidTag, ValueError):
        return ""
