"""The box's own identity: a key that never leaves it, and the certificate that the centre gave it for that key.

Both stand in one file, so that a renewal replaces both at once. The authority that signed the first certificate is remembered: a
later one from somebody else is refused.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from model_sync.errors import SettingsError


def make_request(box_id: str) -> tuple[bytes, str]:
    """Return a new P-256 key (PKCS#8 PEM, not encrypted: the box starts unattended) and a request for its certificate."""
    key = generate_private_key(SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), request_for(key, box_id)


def request_for(key: EllipticCurvePrivateKey, box_id: str) -> str:
    """Return a certificate request for a key."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, box_id)])
    return x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, SHA256()).public_bytes(Encoding.PEM).decode()


def issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Say whether one certificate is signed by another's key."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def create_private(path: Path, data: bytes) -> None:
    """Write a file that only this account can read, durably; raises SettingsError when it exists or cannot be written."""
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except FileExistsError as error:
        raise SettingsError(f"{path} exists already", hint="a key is never overwritten: choose another directory") from error
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}", hint="choose a directory that you may write") from error
