"""The keys of one box: loaded, created, checked, and never silently replaced (requirement R46).

Every key is 256 bits in a file of its own below ``keys``, which only its owner can read and the master key encrypts
(:mod:`appliance.store.master_key`); plain files, which an older appliance wrote, are read and then encrypted::

    content.key          encrypts the images
    content.<id>.key     an earlier content key, while files are encrypted with it
    content.next.key     a new content key, for the moment of an exchange
    database.key         encrypts the database
    audit.key            seals the audit
    web.key              signs the cookies of the pages
    accounts.key         encrypts the secrets of second factors

A key is known by its id, a MAC by the key itself (key check value): the id of a wrong key differs. The ids that the data of the box
depend on are recorded beside the content and in the database, so that either alone shows that a key is lost, damaged or of another box.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from appliance.core.errors import StoreError
from appliance.store import plain_files
from appliance.store.master_key import KEY_BYTES, NOT_SEALED, REPLACED, MasterKey, is_sealed, lock, open_key, seal_key
from model_sync import atomic_files

logger = logging.getLogger(__name__)

CONTENT_KEY: Final = "content.key"
DATABASE_KEY: Final = "database.key"
AUDIT_KEY: Final = "audit.key"
WEB_KEY: Final = "web.key"
ACCOUNTS_KEY: Final = "accounts.key"
# What an escrow copy holds at least; a new web.key only ends the sessions.
ESCROWED: Final = (CONTENT_KEY, DATABASE_KEY, AUDIT_KEY, ACCOUNTS_KEY)
RECORD_NAME: Final = "key-ids.json"
# The new content key, until it is the one of new files.
NEXT_KEY: Final = "content.next.key"
_SEALING: Final = ".sealing"


def never() -> bool:
    """The answer where a key must not be created."""
    return False


class Keys:
    """The key files of one data directory; nothing is created before it is asked for."""

    def __init__(self, data_dir: Path) -> None:
        self.directory = data_dir / "keys"
        self._record = data_dir / RECORD_NAME
        self._master = MasterKey(self.directory)

    def load(self, name: str, can_create: Callable[[], bool] = never) -> bytes:
        """Load a key.

        Args:
            name: its file name.
            can_create: asked where the key is absent: whether nothing depends on it yet, so that it may be created. Never by default.

        Raises:
            StoreError: ``key.missing``: the file is absent, damaged or of another length; ``key.wrong``: another master key encrypted it;
                ``key.sealed_elsewhere``: this machine does not unseal the master key.
            OSError: it cannot be read or written.
        """
        try:
            blob = (self.directory / name).read_bytes()
        except FileNotFoundError:
            if not can_create():
                raise StoreError("key.missing", name) from None
            return self._create(name)
        return self._open(name, blob)

    def exists(self, name: str) -> bool:
        """Whether there is a key file of this name, whatever it holds."""
        return (self.directory / name).exists()

    def protection(self) -> str:
        """What protects the key files: ``tpm2``, ``systemd-creds``, or ``file``: whoever has the disk has them."""
        return NOT_SEALED if any(self._plain()) else self._master.protection()

    def seal(self) -> None:
        """Encrypt the plain key files of an older appliance, and seal the master key where this machine can; kill-safe.

        Only the account of the box does it, and only after the keys have opened their data.

        Raises:
            StoreError: the master key cannot be used.
            OSError: a file cannot be written; what is plain still opens.
        """
        if os.geteuid() != self.directory.stat().st_uid:
            return
        master = self._master.load_or_create()
        with lock(self.directory):
            for path in self.directory.glob(f"*{plain_files.SUFFIX}"):
                plain_files.finish(path.with_name(path.name.removesuffix(plain_files.SUFFIX)))
            for path in [*self.directory.glob(f"*{_SEALING}"), *self.directory.glob(".master.*.tmp")]:
                path.unlink()  # of a killed process: they are written under this lock
            for path in list(self._plain()):
                fresh = path.with_name(path.name + _SEALING)
                atomic_files.create(fresh, seal_key(master, path.name, path.read_bytes()), 0o600)
                plain_files.replace(path, fresh)
            self._master.seal()

    def load_web_key(self) -> bytes:
        """Load the key of the pages' cookies; a lost or damaged one is replaced, which only ends the sessions.

        Raises:
            StoreError: ``key.sealed_elsewhere``; the master key is missing or another one.
            OSError: it cannot be read or written.
        """
        try:
            return self.load(WEB_KEY, lambda: True)
        except StoreError as error:
            if error.code == "key.sealed_elsewhere":
                raise  # no program of this box starts
            logger.warning("web key replaced, sessions ended", extra={"code": error.code})
            self.install(WEB_KEY, secrets.token_bytes(KEY_BYTES))
            return self.load(WEB_KEY)

    def install(self, name: str, key: bytes) -> None:
        """Replace a key file, durably and at once; raises OSError or StoreError (master key) and changes nothing where that fails."""
        master = self._master.load_or_create()
        atomic_files.write(self.directory / name, seal_key(master, name, key), mode=0o600)

    def renew(self, name: str) -> bytes:
        """Replace a damaged key that nothing depends on, and return it; what the file held is kept. Raises OSError or StoreError."""
        key = secrets.token_bytes(KEY_BYTES)
        self._set_aside(name)
        self.install(name, key)
        return key

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

    def destroy(self, name: str) -> None:
        """Overwrite and delete a key file; one that is absent is no error. What a crash leaves, :meth:`seal` finishes. Raises OSError."""
        with lock(self.directory), suppress(FileNotFoundError):
            old = self.directory / f"{name}{plain_files.SUFFIX}"
            os.replace(self.directory / name, old)  # a half overwritten file must not be taken for a key
            plain_files.destroy(old)

    def escrowed(self) -> dict[str, bytes]:
        """What an escrow copy holds, by file name; raises StoreError ``key.missing`` and OSError."""
        more = (path.name for path in sorted(self.directory.glob("content.*.key")))
        return {name: self.load(name) for name in (*ESCROWED, *more)}

    def is_recorded(self, name: str, key: bytes) -> bool:
        """Whether a key is the one that is recorded beside the content: for new files (``content.key``), the database, or by its name."""
        known = self.recorded(DATABASE_KEY) if name == DATABASE_KEY else self.recorded(CONTENT_KEY)[:1]
        return key_id(key) in (known if name in (DATABASE_KEY, CONTENT_KEY) else name.split("."))

    def restore(self, keys: dict[str, bytes], is_right: Callable[[str, bytes], bool]) -> list[str]:
        """Install the keys of an escrow copy that belong to this box; a key file with another content is kept under another name.

        On another machine than the one that the keys were sealed to, they are sealed to this one.

        Args:
            keys: by file name.
            is_right: returns whether the present key of a name opens what it is for; then it stays.

        Returns:
            The names of the files that were written.

        Raises:
            StoreError: ``key.other_box``; ``key.escrow_old``: the box has got more keys since. Nothing was changed in these cases.
            OSError: a file cannot be written; what is missing can be restored again.
        """
        needed, given = {*self.recorded(CONTENT_KEY), *self.recorded(DATABASE_KEY)}, {key_id(key) for key in keys.values()}
        if needed - given:
            raise StoreError("key.escrow_old" if needed & given else "key.other_box", f"key {sorted(needed - given)[0]}")
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self._master.load()
        except StoreError:
            self._master.set_aside()
        installed = []
        for name in sorted(keys, key=(DATABASE_KEY, AUDIT_KEY).__contains__, reverse=True):  # first what the others are compared with
            present = self._present(name)
            if present is None or (present != keys[name] and not is_right(name, present)):
                self._set_aside(name)
                self.install(name, keys[name])
                installed.append(name)
        return installed

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

    def _plain(self) -> Iterator[Path]:
        """The key files that are not encrypted, with those that were replaced."""
        for path in [*self.directory.glob("*.key"), *self.directory.glob(f"*.key{REPLACED}*")]:
            if not path.name.startswith("master.") and path.stat().st_size == KEY_BYTES:
                yield path

    def _open(self, name: str, blob: bytes) -> bytes:
        """The key in the content of its file; raises StoreError."""
        if is_sealed(blob):
            return open_key(self._master.load(), name, blob)
        if len(blob) != KEY_BYTES:
            raise StoreError("key.missing", f"{name}: {len(blob)} bytes")
        return blob

    def _present(self, name: str) -> bytes | None:
        """The key in a file; None where there is none, or none that can be used."""
        try:
            return self.load(name)
        except StoreError as error:
            logger.info("key file cannot be used", extra={"code": error.code})
            return None

    def _set_aside(self, name: str) -> None:
        """Keep what a key file holds under another name."""
        path = self.directory / name
        with suppress(FileNotFoundError):
            atomic_files.write(path.with_name(f"{name}{REPLACED}{time.time_ns()}"), path.read_bytes(), mode=0o600)

    def _create(self, name: str) -> bytes:
        """Create a key; where another process is first, its key is used."""
        master = self._master.load_or_create()
        path = self.directory / name
        fresh = self.directory / f"{name}.{secrets.token_hex(4)}"
        atomic_files.create(fresh, seal_key(master, name, secrets.token_bytes(KEY_BYTES)), 0o600)
        try:
            with suppress(FileExistsError):
                path.hardlink_to(fresh)
        finally:
            fresh.unlink()
        atomic_files.sync_directory(self.directory)
        return self.load(name)


def key_id(key: bytes) -> str:
    """The key check value: 16 hex digits that say which key it is and nothing about its bits."""
    return hmac.new(key, b"clinic box: key check value", "sha256").hexdigest()[:16]
