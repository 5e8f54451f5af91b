"""Keys of the library: encrypted PKCS#8 files and PKCS#11 tokens, both as python-tuf signers.

``CryptoSigner`` cannot load an encrypted file, so ``cryptography`` decrypts it. Tokens are used through securesystemslib's
``HSMSigner``; the environment variable ``PYKCS11LIB`` names the PKCS#11 module.

``KEY.pem`` is secret; ``KEY.pem.pub.json`` beside it is the public part, ``{"name", "keyid", "key"}``, which the library needs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.exceptions import UnsupportedLibraryError
from securesystemslib.formats import encode_canonical
from securesystemslib.signer import CryptoSigner, HSMSigner, Key, Signer, SSlibKey

from model_sync import atomic_files
from model_sync.errors import SettingsError

MIN_PASSPHRASE = 12
_HSM_SCHEME = "hsm:"
Passphrase = Callable[[str], str]


class Holder(NamedTuple):
    """A public key and the name of the person or machine that holds it."""

    name: str
    key: Key


def generate(path: Path, passphrase: str, name: str | None = None) -> Key:
    """Create an Ed25519 key: ``path`` (encrypted PKCS#8, mode 0600) and ``<path>.pub.json``; nothing is overwritten.

    Raises:
        SettingsError: a file is there already, the passphrase is too short, or the directory cannot be written.
    """
    signer = CryptoSigner.generate_ed25519()
    # CryptoSigner exports its private key only unencrypted; it stays in memory.
    pem = encrypt(load_pem_private_key(signer.private_bytes, None), passphrase)
    for file in (path, public_path(path)):
        if os.path.lexists(file):
            raise SettingsError(f"{file} exists already", code="library.exists")
    _create(path, pem, 0o600)
    write_public(public_path(path), signer.public_key, name or path.stem)
    return signer.public_key


def encrypt(key: PrivateKeyTypes, passphrase: str) -> bytes:
    """Return a private key as encrypted PKCS#8 in PEM; raise SettingsError when the passphrase is too short."""
    if len(passphrase) < MIN_PASSPHRASE:
        hint = "use six random words; nothing was written"
        raise SettingsError(f"a passphrase needs at least {MIN_PASSPHRASE} characters", hint=hint, code="library.passphrase")
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(passphrase.encode()))


def public_path(path: Path) -> Path:
    """Return the path of the public part of a key file."""
    return path.with_name(path.name + ".pub.json")


def write_public(path: Path, key: Key, name: str) -> None:
    """Write a public key file; raise SettingsError when it exists or cannot be written."""
    document = {"name": name, "keyid": key.keyid, "key": key.to_dict()}
    _create(path, (json.dumps(document, indent=2, sort_keys=True) + "\n").encode(), 0o644)


def load_holder(path: Path) -> Holder:
    """Read ``KEY.pem.pub.json`` (or that beside ``KEY.pem``).

    Raises:
        SettingsError: the file is missing, or contains no public key.
    """
    file = path if path.name.endswith(".pub.json") else public_path(path)
    try:
        document = json.loads(file.read_text("utf-8"))
        key = Key.from_dict(str(document["keyid"]), dict(document["key"]))
        name = str(document["name"])
    except OSError as error:
        raise SettingsError(
            f"{file}: {error.strerror}",
            hint="`model-library key new` writes it beside the private key; collect it from its holder",
            code="library.key",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"{file} is no public key", hint="give the .pub.json file that `model-library key new` wrote", code="library.key"
        ) from error
    if isinstance(key, SSlibKey) and key.keyid != _own_keyid(key):
        raise SettingsError(f"{file}: the key id does not belong to the key", code="library.key")
    return Holder(name, key)


def load_signer(where: Path | str, passphrase: Passphrase, public_key: Key | None = None) -> Signer:
    """Open a signer.

    Args:
        where: a PEM file, or a PKCS#11 URI ``hsm:<id>?label=<token>``.
        passphrase: called once with a description; returns the file's passphrase or the token's PIN.
        public_key: the expected key; for a token it is read from the token when None.

    Raises:
        SettingsError: no such file or token, a wrong passphrase, an unencrypted file, or another key than ``public_key``.
    """
    if str(where).startswith(_HSM_SCHEME):
        return _load_token(str(where), passphrase, public_key)
    path = Path(where)
    signer = CryptoSigner(_load_private(path, passphrase))
    if public_key is not None and signer.public_key.keyid != public_key.keyid:
        raise SettingsError(f"{path} is another key: {signer.public_key.keyid[:8]}, not {public_key.keyid[:8]}", code="library.key")
    return signer


def _load_private(path: Path, passphrase: Passphrase) -> Any:
    try:
        pem = path.read_bytes()
    except OSError as error:
        raise SettingsError(
            f"{path}: {error.strerror}", hint="give the private key's .pem file, or hsm:<id>?label=<token>", code="library.key"
        ) from error
    if b"ENCRYPTED PRIVATE KEY" not in pem:
        raise SettingsError(
            f"{path} is not an encrypted PKCS#8 key",
            hint=f"an unprotected key is not used: `openssl pkcs8 -topk8 -scrypt -in {path.name} -out NEW.pem` encrypts it",
            code="library.key",
        )
    secret = passphrase(f"passphrase of {path.name}").encode()
    try:
        key: PrivateKeyTypes = load_pem_private_key(pem, secret)
    except (ValueError, TypeError) as error:
        raise SettingsError(f"{path} does not open: wrong passphrase, or the file is damaged", code="library.passphrase") from error
    except UnsupportedAlgorithm as error:
        raise SettingsError(f"{path}: {error}", code="library.key") from error
    return key


def _load_token(uri: str, passphrase: Passphrase, public_key: Key | None) -> Signer:
    body, _, query = uri.removeprefix(_HSM_SCHEME).partition("?")
    label = query.removeprefix("label=") if query.startswith("label=") else None
    if not (body == "" or body.isdigit()) or (query and not label):
        raise SettingsError(
            f"{uri!r} names no token key", hint="write hsm:<id>?label=<token>, for example hsm:2?label=library", code="library.key"
        )
    pin: list[str] = []

    def ask(_secret: str) -> str:
        # HSMSigner asks for every signature; a person is asked once.
        if not pin:
            pin.append(passphrase(f"PIN of the token {label or ''}".strip()))
        return pin[0]

    try:
        uri_of_key, key = HSMSigner.import_(int(body) if body else None, label, ask)
        signer = HSMSigner.from_priv_key_uri(uri_of_key, public_key or key, ask)
    except UnsupportedLibraryError as error:
        raise SettingsError(
            str(error), hint="pip install 'clinic-edge-appliance[library]' brings python-pkcs11", code="library.key"
        ) from error
    except (ValueError, AssertionError, RuntimeError) as error:
        raise token_error(uri, error) from error
    if public_key is not None and key.keyid != public_key.keyid:
        raise SettingsError(f"{uri} holds another key: {key.keyid[:8]}, not {public_key.keyid[:8]}", code="library.key")
    return signer


def token_error(what: str, error: BaseException) -> SettingsError:
    """Return the error for a key that does not sign."""
    kind = type(error).__name__  # python-pkcs11's errors carry no text of their own
    if kind.startswith("Pin"):
        return SettingsError(
            f"{what}: the token refuses the PIN ({kind})",
            hint="a token locks itself after a few wrong PINs",
            code="library.passphrase",
        )
    hint = "is the token inserted? PYKCS11LIB names its PKCS#11 module; `pkcs11-tool -L` lists tokens"
    return SettingsError(f"{what}: {str(error) or kind}", hint=hint, code="library.key")


def _own_keyid(key: SSlibKey) -> str:
    """Return the key id as securesystemslib computes it: a key with two ids would count twice for a threshold."""
    values = {"keytype": key.keytype, "scheme": key.scheme, "keyval": key.keyval}
    return hashlib.sha256(str(encode_canonical(values)).encode()).hexdigest()


def _create(path: Path, data: bytes, mode: int) -> None:
    try:
        atomic_files.create(path, data, mode)
    except FileExistsError as error:
        raise SettingsError(f"{path} exists already", code="library.exists") from error
    except OSError as error:
        raise SettingsError(
            f"{path}: {error.strerror}", hint="choose a directory that exists and that you may write", code="library.key"
        ) from error
