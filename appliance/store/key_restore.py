"""The restoring of keys from an escrow copy: what is lost or wrong is replaced, and never a key that opens the data of the box (R46)."""

from __future__ import annotations

from contextlib import closing

from appliance.core.errors import StoreError
from appliance.core.process import Lock
from appliance.core.settings import Settings
from appliance.store.account_secrets import AccountSecrets
from appliance.store.database import Database
from appliance.store.keys import ACCOUNTS_KEY, AUDIT_KEY, DATABASE_KEY, Keys
from appliance.store.store import DATABASE_NAME, Store


def restore_keys(settings: Settings, escrowed: dict[str, bytes]) -> list[str]:
    """Restore the keys of a box that does not run; returns the names of the key files that were written.

    Args:
        settings: of the box.
        escrowed: the keys of the copy, by file name.

    Raises:
        ApplianceError: ``box.busy``: the box runs. Nothing was changed.
        StoreError: as :meth:`Keys.restore`.
        OSError: a file cannot be written; the same command goes on.
    """
    lock = Lock(settings.data_dir, "supervisor")
    try:
        is_whole = _opens_box(settings)
        keys = Keys(settings.data_dir)
        return keys.restore(escrowed, lambda name, key: _is_right(settings, keys, name, key, is_whole=is_whole))
    finally:
        lock.release()


def _opens_box(settings: Settings) -> bool:
    """Whether database, audit and images are opened by the keys that are here."""
    try:
        Store(settings, needs_accounts_key=False).close()
    except StoreError:
        return False
    return True


def _is_right(settings: Settings, keys: Keys, name: str, key: bytes, *, is_whole: bool) -> bool:
    """Whether the present key of this name opens what it is for; the key of the database is the right one by then."""
    if name not in (AUDIT_KEY, ACCOUNTS_KEY):
        return is_whole or keys.is_recorded(name, key)
    try:
        with closing(Database(settings.data_dir / DATABASE_NAME, keys.load(AUDIT_KEY), keys.load(DATABASE_KEY))) as database:
            if name == ACCOUNTS_KEY:
                AccountSecrets(database, keys).check()
    except StoreError:
        return False
    return True
