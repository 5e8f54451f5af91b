"""The escrow copy of a box's keys: one file, encrypted with a passphrase, from which a box with lost keys is restored.

A JSON document: the parameters of scrypt (RFC 7914), which makes the key of AES-256-GCM from the passphrase, and the encrypted keys.
"""

from __future__ import annotations

import base64
import json
import secrets
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from appliance.core.domain import utc_now
from appliance.core.errors import StoreError
from appliance.store.master_key import KEY_BYTES
from model_sync import atomic_files

MIN_PASSPHRASE_CHARS: Final = 12
_FORMAT: Final = "clinic-box-key-escrow-1"
_NONCE_BYTES: Final = 12
# RFC 7914 and OWASP: 128 MiB and half a second on a small box for each try.
_COST: Final = {"n": 2**17, "r": 8, "p": 1}
_LARGEST_COST: Final = 2**20
_MAX_BYTES: Final = 1 << 20


def write_escrow(path: Path, keys: dict[str, bytes], passphrase: str) -> None:
    """Write the keys (by file name) to a new file that only the passphrase opens.

    Raises:
        StoreError: ``key.weak_passphrase``: fewer than 12 characters.
        OSError: the file exists already or cannot be written.
    """
    if len(passphrase) < MIN_PASSPHRASE_CHARS:
        raise StoreError("key.weak_passphrase")
    salt, nonce = secrets.token_bytes(16), secrets.token_bytes(_NONCE_BYTES)
    head: dict[str, Any] = {"format": _FORMAT, "created_at": utc_now(), "kdf": _COST | {"salt": _encode(salt)}}
    plain = json.dumps({name: key.hex() for name, key in keys.items()}).encode()
    sealed = AESGCM(_derive(passphrase, salt, _COST)).encrypt(nonce, plain, _FORMAT.encode())
    document = head | {"sealed": _encode(nonce + sealed)}
    atomic_files.create(path, json.dumps(document, indent=1).encode(), 0o600)
    atomic_files.sync_directory(path.parent)


def read_escrow(path: Path, passphrase: str) -> dict[str, bytes]:
    """Return the keys of an escrow file by file name.

    Raises:
        StoreError: ``key.no_escrow``: it is no escrow file, or damaged; ``key.passphrase``: the passphrase does not open it.
        OSError: it cannot be read.
    """
    try:
        document = json.loads(atomic_files.read(path, _MAX_BYTES, follow=True))
        cost = {name: int(document["kdf"][name]) for name in _COST}
        salt, sealed = (base64.b64decode(text, validate=True) for text in (document["kdf"]["salt"], document["sealed"]))
        if document["format"] != _FORMAT or cost["n"] * cost["r"] * cost["p"] > _LARGEST_COST * _COST["r"]:
            raise ValueError("format")
        key = _derive(passphrase, salt, cost)
        plain = AESGCM(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], _FORMAT.encode())
        keys = {str(name): bytes.fromhex(text) for name, text in json.loads(plain).items()}
    except InvalidTag as error:
        raise StoreError("key.passphrase") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError("key.no_escrow", type(error).__name__) from error
    if any(len(key) != KEY_BYTES or Path(name).name != name for name, key in keys.items()):
        raise StoreError("key.no_escrow", "keys")
    return keys


def _derive(passphrase: str, salt: bytes, cost: dict[str, int]) -> bytes:
    return Scrypt(salt=salt, length=KEY_BYTES, n=cost["n"], r=cost["r"], p=cost["p"]).derive(passphrase.encode())


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()
