"""The keys of one box: loaded, created, checked, and never silently replaced (requirement R46).

Every key is 256 bits in a file of its own below ``keys``, which only its owner can read::

    content.key          encrypts the images
    content.<id>.key     an earlier content key, while files are encrypted with it
    database.key         encrypts the database
    audit.key            seals the audit
    web.key              signs the cookies of the pages

A key is known by its id, a MAC by the key itself (key check value): the id of a wrong key differs. The ids that the data of the box
depend on are recorded beside the content and in the database, so that either alone shows that a key is lost, damaged or of another box.
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from appliance.core.errors import StoreError
from model_sync import atomic_files

logger = logging.getLogger(__name__)

KEY_BYTES: Final = 32
CONTENT_KEY: Final = "content.key"
DATABASE_KEY: Final = "database.key"
AUDIT_KEY: Final = "audit.key"
WEB_KEY: Final = "web.key"
# What an escrow copy holds: without these keys data are lost; a new web.key only ends the sessions.
ESCROWED: Final = (CONTENT_KEY, DATABASE_KEY, AUDIT_KEY)
RECORD_NAME: Final = "key-ids.json"


def never() -> bool:
    """The answer where a key must not be created."""
    return False


class Keys:
    """The key files of one data directory; nothing is created before it is asked for."""

    def __init__(self, data_dir: Path) -> None:
        self.directory = data_dir / "keys"
        self._record = data_dir / RECORD_NAME

    def load(self, name: str, can_create: Callable[[], bool] = never) -> bytes:
        """Load a key.

        Args:
            name: its file name.
            can_create: asked where the key is absent: whether nothing depends on it yet, so that it may be created. Never by default.

        Raises:
            StoreError: ``key.missing``: the file is absent, or empty or of another length.
            OSError: it cannot be read or written.
        """
        try:
            key = (self.directory / name).read_bytes()
        except FileNotFoundError:
            if not can_create():
                raise StoreError("key.missing", name) from None
            return self._create(name)
        if len(key) != KEY_BYTES:
            raise StoreError("key.missing", f"{name}: {len(key)} bytes")
        return key

    def load_web_key(self) -> bytes:
        """Load the key of the pages' cookies; a lost or damaged one is replaced, which only ends the sessions."""
        try:
            return self.load(WEB_KEY, lambda: True)
        except StoreError as error:
            logger.warning("web key replaced, sessions ended", extra={"code": error.code})
            self.install(WEB_KEY, secrets.token_bytes(KEY_BYTES))
            return self.load(WEB_KEY)

    def install(self, name: str, key: bytes) -> None:
        """Replace a key file, durably and at once; raises OSError and changes nothing where that fails."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic_files.write(self.directory / name, key, mode=0o600)

    def content_keys(self, recorded: Collection[str], has_content: Callable[[], bool]) -> dict[str, bytes]:
        """Load the keys of the images by their id, the one that new files are encrypted with first.

        Args:
            recorded: ids that the database records; those beside the content are added.
            has_content: returns whether there are images, so that a new key must not be created.

        Raises:
            StoreError: ``key.missing``; ``key.wrong``: another key than the recorded ones, or an earlier one is lost.
            OSError: a file cannot be read or written.
        """
        needed = {*recorded, *self.recorded(CONTENT_KEY)}
        current = self.load(CONTENT_KEY, lambda: not needed and not has_content())
        keys = {key_id(current): current}
        for path in sorted(self.directory.glob("content.*.key")):
            key = self.load(path.name)
            keys[key_id(key)] = key
        if needed and key_id(current) not in needed:
            raise StoreError("key.wrong", CONTENT_KEY)
        if lost := sorted(needed - keys.keys()):
            raise StoreError("key.missing", f"content.{lost[0]}.key")
        return keys

    def database_key(self, is_encrypted: Callable[[], bool]) -> bytes:
        """Load the key of the database, which is created with the first database.

        Args:
            is_encrypted: returns whether there is an encrypted database already.

        Raises:
            StoreError: ``key.missing`` or ``key.wrong``.
            OSError: a file cannot be read or written.
        """
        recorded = self.recorded(DATABASE_KEY)
        key = self.load(DATABASE_KEY, lambda: not recorded and not is_encrypted())
        if recorded and key_id(key) not in recorded:
            raise StoreError("key.wrong", DATABASE_KEY)
        return key

    def escrowed(self) -> dict[str, bytes]:
        """What an escrow copy holds, by file name; raises StoreError ``key.missing`` and OSError."""
        earlier = (path.name for path in sorted(self.directory.glob("content.*.key")))
        return {name: self.load(name) for name in (*ESCROWED, *earlier)}

    def restore(self, keys: dict[str, bytes]) -> None:
        """Install the keys of an escrow copy that belong to this box; a key file with another content is kept under another name.

        Args:
            keys: by file name.

        Raises:
            StoreError: ``key.other_box``; ``key.escrow_old``: the box has got more keys since. Nothing was changed in these cases.
            OSError: a file cannot be written; what is missing can be restored again.
        """
        needed, given = {*self.recorded(CONTENT_KEY), *self.recorded(DATABASE_KEY)}, {key_id(key) for key in keys.values()}
        if needed - given:
            raise StoreError("key.escrow_old" if needed & given else "key.other_box", f"key {sorted(needed - given)[0]}")
        for name, key in keys.items():
            path = self.directory / name
            if path.exists() and (present := path.read_bytes()) != key:
                self.install(f"{name}.replaced-{key_id(present)}", present)
            self.install(name, key)

    def recorded(self, name: str) -> list[str]:
        """The ids of a key that are recorded beside the content; none on a box that an older appliance made."""
        ids = atomic_files.read_json(self._record).get(name, [])
        return [item for item in ids if isinstance(item, str)] if isinstance(ids, list) else []

    def record(self, name: str, ids: Iterable[str]) -> None:
        """Record beside the content which ids of a key its data depend on; raises OSError."""
        values = atomic_files.read_json(self._record)
        if values.get(name) != list(ids):
            text = json.dumps(values | {name: list(ids)}, indent=1, sort_keys=True)
            atomic_files.write(self._record, text.encode(), mode=0o600)

    def _create(self, name: str) -> bytes:
        """Create a key; where another process is first, its key is used."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.directory / name
        fresh = self.directory / f"{name}.{secrets.token_hex(4)}"
        atomic_files.create(fresh, secrets.token_bytes(KEY_BYTES), 0o600)
        try:
            with suppress(FileExistsError):
                path.hardlink_to(fresh)
        finally:
            fresh.unlink()
        atomic_files.sync_directory(self.directory)
        return path.read_bytes()


def key_id(key: bytes) -> str:
    """The key check value: 16 hex digits that say which key it is and nothing about its bits."""
    return hmac.new(key, b"clinic box: key check value", "sha256").hexdigest()[:16]
