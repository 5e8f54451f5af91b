"""The exchange of the content key while the box runs: a new key for new files at once, then for all others (ADR 0055).

Killed at any point, the next call goes on; meanwhile every file opens, because the keys of both kinds are kept and recorded. The old key is
destroyed when no file is encrypted with it; a writer looks at the key under a lock, so that none can use the old one any more.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from appliance.core.process import Lock
from appliance.store.database import store_error
from appliance.store.keys import CONTENT_KEY, NEXT_KEY, key_id
from appliance.store.master_key import KEY_BYTES
from appliance.store.store import Store


@dataclass(frozen=True)
class Rotation:
    """What an exchange did.

    Attributes:
        files: how many files there are.
        damaged: how many of them no key opens; while there are any, the old key is kept.
    """

    files: int
    damaged: int


def rotate_content_key(store: Store, on_progress: Callable[[int, int], None]) -> Rotation:
    """Exchange the content key, or go on with an exchange that was interrupted.

    Args:
        store: the box; it may run.
        on_progress: called with the number of files that are done, and of all.

    Raises:
        ApplianceError: ``box.busy``: another process does it.
        StoreError: a file cannot be read or written (the disk is full); nothing is lost, call it again.
    """
    lock = Lock(store.settings.data_dir, "key-rotation")
    try:
        directory = store.keys.directory
        if (directory / NEXT_KEY).exists() or not any(directory.glob("content.*.key")):
            _exchange(store)
        with store.content.locked():
            store.content.load_new_keys()
        names = list(store.content.names())
        for done, name in enumerate(names, start=1):
            store.content.encrypt_again(name)
            on_progress(done, len(names))
        return _finish(store)
    except OSError as error:
        raise store_error(error) from error
    finally:
        lock.release()


def _exchange(store: Store) -> None:
    """Make a new key the one of new files; each step leaves all keys in the directory under one name at least."""
    keys = store.keys
    with store.content.locked(is_exclusive=True):
        old = keys.load(CONTENT_KEY)
        if not (keys.directory / NEXT_KEY).exists():
            keys.install(NEXT_KEY, secrets.token_bytes(KEY_BYTES))
        new = keys.load(NEXT_KEY)
        if old != new:
            _record(store, [key_id(old), key_id(new)])
            keys.install(f"content.{key_id(old)}.key", old)
            keys.install(CONTENT_KEY, new)
        keys.destroy(NEXT_KEY)


def _finish(store: Store) -> Rotation:
    """Destroy the earlier keys, unless a file still needs one; whoever writes meanwhile uses the new one."""
    keys, content = store.keys, store.content
    current = key_id(keys.load(CONTENT_KEY))
    names = list(content.names())
    damaged = sum(content.key_of(name) != current for name in names)
    if not damaged:
        with content.locked(is_exclusive=True):
            _record(store, [current])
            for path in sorted(keys.directory.glob("content.*.key")):
                keys.destroy(path.name)
            content.forget_old_keys()
    return Rotation(len(names), damaged)


def _record(store: Store, ids: list[str]) -> None:
    store.keys.record(CONTENT_KEY, ids)
    store.database.record_key_ids(CONTENT_KEY, ids)
