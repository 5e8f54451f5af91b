"""The master key of a box, which encrypts its key files, and the sealing of the master key itself (requirement R46, ADR 0054).

One of these files below ``keys`` holds it:

    master.tpm2            sealed by the TPM 2.0 of this machine (tpm2-tools)
    master.systemd-creds   sealed by the host key of this machine (systemd-creds, which only root can use)
    master.key             not sealed: its owner can read it, and whoever has the disk

What can seal is found out at run time. A sealed file is opened again, for comparison, before the plain one is destroyed; a crash at any
point leaves one that opens.

A key file begins with ``CEK1``, the id of the master key (8 bytes) and a nonce (12 bytes); then come the key and the tag of AES-256-GCM.
The file's name is authenticated with it. Older appliances wrote the 32 bytes of the key.
"""

from __future__ import annotations

import base64
import fcntl
import hmac
import json
import logging
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from appliance.core.errors import StoreError
from appliance.store import plain_files
from model_sync import atomic_files

logger = logging.getLogger(__name__)

KEY_BYTES: Final = 32
MAGIC: Final = b"CEK1"
NOT_SEALED: Final = "file"
REPLACED: Final = ".replaced-"
_PLAIN: Final = "master.key"
_ID_BYTES: Final = 8
_NONCE_BYTES: Final = 12
_HEADER_BYTES: Final = len(MAGIC) + _ID_BYTES + _NONCE_BYTES
_TOOL_TIMEOUT_S: Final = 60.0
_CREDENTIAL: Final = "clinic-box-master"
_TPM_DEVICE: Final = Path("/dev/tpmrm0")
# sd_booted(3). In a container the host key is deleted with the container, and the data directory is not.
_SYSTEMD_RUNS: Final = Path("/run/systemd/system")
# Stated in full, so that another version of the tools derives the same key from the seed of the TPM.
_PRIMARY_ATTRIBUTES: Final = "restricted|decrypt|fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda"
_PRIMARY: Final = ("-g", "sha256", "-G", "ecc256:aes128cfb", "-a", _PRIMARY_ATTRIBUTES)
_OBJECT: Final = ("-g", "sha256", "-a", "fixedtpm|fixedparent|userwithauth|noda")


class SealingError(Exception):
    """A tool did not seal or unseal; the text is its last line."""


@dataclass(frozen=True)
class Sealing:
    """One way to seal the master key.

    Attributes:
        name: ``tpm2`` or ``systemd-creds``.
        is_usable: returns whether this process can seal that way on this machine.
        seal: encrypts the master key so that only this machine opens it; raises SealingError.
        unseal: the reverse; raises SealingError.
    """

    name: str
    is_usable: Callable[[], bool]
    seal: Callable[[bytes], bytes]
    unseal: Callable[[bytes], bytes]

    @property
    def file_name(self) -> str:
        """The file below ``keys``."""
        return f"master.{self.name}"


class MasterKey:
    """The master key below one directory of keys; nothing is created before it is asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key: bytes | None = None

    def protection(self) -> str:
        """What protects the master key: the name of a sealing, or ``file`` where it is readable on the disk or there is none yet."""
        sealed = [sealing.name for sealing in SEALINGS if (self._directory / sealing.file_name).exists()]
        return sealed[0] if sealed and not (self._directory / _PLAIN).exists() else NOT_SEALED

    def load(self) -> bytes:
        """Return the master key.

        Raises:
            StoreError: ``key.sealed_elsewhere``: this machine does not unseal it; ``key.missing``: it is absent or of another length.
            OSError: it cannot be read.
        """
        if self._key is None:
            self._key = self._load()
        return self._key

    def load_or_create(self) -> bytes:
        """Return the master key; create it where there is none and no key file needs one. Raises as :meth:`load`, and OSError."""
        if self._key is None and not self._exists():
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with lock(self._directory):
                if not self._exists() and not any(sealed_files(self._directory)):  # another process may have been first
                    self._write(secrets.token_bytes(KEY_BYTES))
        return self.load()

    def seal(self) -> None:
        """Seal a master key that lies plain on the disk, where this machine can; the caller holds the lock of the directory.

        Raises OSError; a tool that fails leaves the plain file.
        """
        plain = self._directory / _PLAIN
        if plain.exists() and (self._seal(self.load()) or self._unseal_any() == plain.read_bytes()):
            old = plain.with_name(plain.name + plain_files.SUFFIX)
            os.replace(plain, old)  # a half overwritten file must not be taken for a key
            plain_files.destroy(old)

    def set_aside(self) -> None:
        """Rename the files of a master key that cannot be used, and those that it encrypted: a new one can be created, nothing is deleted.

        Raises OSError.
        """
        self._key, suffix = None, f"{REPLACED}{time.time_ns()}"
        for path in [*self._files(), *sealed_files(self._directory)]:
            path.rename(path.with_name(path.name + suffix))
        atomic_files.sync_directory(self._directory)

    def _exists(self) -> bool:
        return any(self._files())

    def _files(self) -> list[Path]:
        names = (_PLAIN, *(sealing.file_name for sealing in SEALINGS))
        return [path for name in names if (path := self._directory / name).exists()]

    def _load(self) -> bytes:
        failures: list[str] = []
        if (key := self._unseal_any(failures)) is not None:
            return key
        try:
            key = (self._directory / _PLAIN).read_bytes()
        except FileNotFoundError:
            if failures:
                raise StoreError("key.sealed_elsewhere", failures[0]) from None
            raise StoreError("key.missing", _PLAIN) from None
        if len(key) != KEY_BYTES:
            raise StoreError("key.missing", f"{_PLAIN}: {len(key)} bytes")
        return key

    def _unseal_any(self, failures: list[str] | None = None) -> bytes | None:
        """The first sealed file that this machine opens; why the others do not open is appended to ``failures``."""
        for sealing in SEALINGS:
            try:
                key = sealing.unseal((self._directory / sealing.file_name).read_bytes())
                if len(key) == KEY_BYTES:
                    return key
                raise SealingError(f"{len(key)} bytes")
            except FileNotFoundError:
                continue
            except SealingError as error:
                if failures is not None:
                    failures.append(f"{sealing.file_name}: {error}")
        return None

    def _write(self, key: bytes) -> None:
        """Write a new master key, sealed where this machine can, so that it is never plain on that disk."""
        if not self._seal(key):
            atomic_files.write(self._directory / _PLAIN, key, mode=0o600)

    def _seal(self, key: bytes) -> bool:
        """Write the sealed file of the first sealing that works, verified; returns whether there is one."""
        if os.geteuid() != self._directory.stat().st_uid:
            return False  # what root seals, the account of the box could not open
        for sealing in SEALINGS:
            if not sealing.is_usable():
                continue
            try:
                blob = sealing.seal(key)
                if not hmac.compare_digest(sealing.unseal(blob), key):
                    raise SealingError("unsealed to another key")
            except SealingError as error:
                logger.warning("master key not sealed by %s: %s", sealing.name, error, extra={"code": "key.not_sealed"})
                continue
            atomic_files.write(self._directory / sealing.file_name, blob, mode=0o600)
            return True
        return False


def seal_key(master: bytes, name: str, key: bytes) -> bytes:
    """The content of the key file ``name``."""
    header = MAGIC + _master_id(master) + (nonce := secrets.token_bytes(_NONCE_BYTES))
    return header + AESGCM(master).encrypt(nonce, key, header + _original(name))


def open_key(master: bytes, name: str, blob: bytes) -> bytes:
    """Open the content of a key file that begins with MAGIC.

    Raises:
        StoreError: ``key.wrong``: another master key sealed it; ``key.missing``: the file is damaged or belongs to another name.
    """
    header = blob[:_HEADER_BYTES]
    if header[len(MAGIC) :][:_ID_BYTES] != _master_id(master):
        raise StoreError("key.wrong", f"{name}: of another master key")
    try:
        return AESGCM(master).decrypt(header[-_NONCE_BYTES:], blob[_HEADER_BYTES:], header + _original(name))
    except (InvalidTag, ValueError) as error:
        raise StoreError("key.missing", f"{name}: damaged") from error


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold the lock on the key files of a box: several of its programs may start at the same moment. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sealed_files(directory: Path) -> Iterator[Path]:
    """The key files that a master key encrypts."""
    return (path for path in sorted(directory.glob("*.key")) if is_sealed(path.read_bytes()))


def is_sealed(blob: bytes) -> bool:
    """Whether this is the content of a key file that a master key encrypts; a plain key may begin with the same bytes."""
    return blob.startswith(MAGIC) and len(blob) != KEY_BYTES


def _master_id(master: bytes) -> bytes:
    return hmac.digest(master, b"clinic box: master key check value", "sha256")[:_ID_BYTES]


def _original(name: str) -> bytes:
    """The name that a file had before it was set aside under another one."""
    return name.partition(REPLACED)[0].encode()


def _run(command: list[str], data: bytes = b"") -> bytes:
    """Run a tool with ``data`` on its standard input, where no other account can see it; returns its output, raises SealingError."""
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=_TOOL_TIMEOUT_S, check=True)
    except FileNotFoundError as error:
        raise SealingError(f"{command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").split("\n")
        raise SealingError(next((line.strip() for line in reversed(lines) if line.strip()), command[0])) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SealingError(f"{command[0]}: {type(error).__name__}") from error
    return done.stdout


def _can_use_systemd() -> bool:
    return _SYSTEMD_RUNS.is_dir() and os.geteuid() == 0 and shutil.which("systemd-creds") is not None


def _seal_by_systemd(key: bytes) -> bytes:
    return _run(["systemd-creds", "encrypt", "--with-key=host", f"--name={_CREDENTIAL}", "-", "-"], key)


def _unseal_by_systemd(blob: bytes) -> bytes:
    return _run(["systemd-creds", "decrypt", f"--name={_CREDENTIAL}", "-", "-"], blob)


def _can_use_tpm() -> bool:
    return os.access(_TPM_DEVICE, os.R_OK | os.W_OK) and shutil.which("tpm2_unseal") is not None


def _seal_by_tpm(key: bytes) -> bytes:
    """Seal by a key that never leaves the TPM; not bound to boot measurements (PCR), which every update of the firmware changes."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{name}" for name in ("primary", "public", "private")]
        _make_primary(paths[0])
        _run(["tpm2_create", "-Q", "-C", paths[0], *_OBJECT, "-i", "-", "-u", paths[1], "-r", paths[2]], key)
        _flush_tpm()
        public, private = (base64.b64encode(Path(path).read_bytes()).decode() for path in paths[1:])
        return json.dumps({"public": public, "private": private}).encode()


def _unseal_by_tpm(blob: bytes) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{name}" for name in ("primary", "public", "private", "object")]
        try:
            document = json.loads(blob)
            for path in paths[1:3]:
                Path(path).write_bytes(base64.b64decode(document[Path(path).name], validate=True))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SealingError("damaged") from error
        _make_primary(paths[0])
        _run(["tpm2_load", "-Q", "-C", paths[0], "-u", paths[1], "-r", paths[2], "-c", paths[3]])
        _flush_tpm()
        key = _run(["tpm2_unseal", "-Q", "-c", paths[3]])
        _flush_tpm()
        return key


def _make_primary(path: str) -> None:
    """Derive the storage key from the seed of the TPM: the same on each call, another one on another machine."""
    _run(["tpm2_createprimary", "-Q", "-C", "o", *_PRIMARY, "-c", path])
    _flush_tpm()


def _flush_tpm() -> None:
    """Free the few places of the TPM for objects; the kernel's resource manager does so by itself."""
    _run(["tpm2_flushcontext", "-t"])


SEALINGS: Final = (
    Sealing("tpm2", _can_use_tpm, _seal_by_tpm, _unseal_by_tpm),
    Sealing("systemd-creds", _can_use_systemd, _seal_by_systemd, _unseal_by_systemd),
)
