"""The identity of the box: a key that never leaves it, and the certificate that the centre issued for that key.

Both are in one file, so that a renewal replaces both at once. The authority that signed the first certificate is stored: a later
certificate from another authority is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from model_sync import atomic_files
from model_sync.errors import CodedError, SettingsError

IDENTITY: Final = "device.pem"
PENDING_KEY: Final = "device-pending.key"
PINNED: Final = "device-ca.pem"


def make_certificate_request(box_id: str) -> tuple[bytes, str]:
    """Return a new P-256 key (PKCS#8 PEM, not encrypted: the box starts unattended) and a request for its certificate."""
    key = generate_private_key(SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), certificate_request(key, box_id)


def certificate_request(key: EllipticCurvePrivateKey, box_id: str) -> str:
    """Return a certificate request for a key."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, box_id)])
    return x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, SHA256()).public_bytes(Encoding.PEM).decode()


def is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Return whether a certificate is signed by the key of ``authority``."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def create_private_file(path: Path, data: bytes) -> None:
    """Write and flush a file that only this account can read; raise SettingsError when it exists or cannot be written."""
    try:
        atomic_files.create(path, data, 0o600)
    except FileExistsError as error:
        raise SettingsError(f"{path} exists already", hint="a key is never overwritten: choose another directory") from error
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}", hint="choose a directory that you may write") from error


class DeviceError(CodedError):
    """The centre refused this box, or this box has no valid identity.

    Attributes:
        code: ``device.none`` (not enrolled), ``device.expired``, ``device.answer`` (the centre's answer is not for this box), or the
            centre's own: ``enrolment.token``, ``enrolment.denied`` and so on.
    """


@dataclass(frozen=True)
class Identity:
    """The key and certificate of an enrolled box."""

    file: Path
    key: EllipticCurvePrivateKey
    certificate: x509.Certificate

    def is_renewal_due(self, now: datetime) -> bool:
        """Return whether half of the certificate's validity is over."""
        begin, end = self.certificate.not_valid_before_utc, self.certificate.not_valid_after_utc
        return now >= begin + (end - begin) / 2

    def is_expired(self, now: datetime) -> bool:
        """Return whether the certificate has expired."""
        return now >= self.certificate.not_valid_after_utc


class Device:
    """The identity files in the agent's state directory."""

    def __init__(self, state_dir: Path, box_id: str) -> None:
        self._file = state_dir / IDENTITY
        self._pending = state_dir / PENDING_KEY
        self._pinned = state_dir / PINNED
        self._box_id = box_id

    def identity(self) -> Identity | None:
        """Return the identity of this box, or None before its enrolment.

        Raises:
            DeviceError: ``device.none``: the file is damaged; a new token is needed.
        """
        try:
            pem = self._file.read_bytes()
        except FileNotFoundError:
            return None
        try:
            key, certificate = load_pem_private_key(pem, None), x509.load_pem_x509_certificate(pem)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise DeviceError("device.none", f"{self._file} is damaged") from error
        if not isinstance(key, EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise DeviceError("device.none", f"{self._file}: key and certificate do not belong together")
        return Identity(self._file, key, certificate)

    def pending_request(self) -> tuple[bytes, str]:
        """Return the key that waits for a certificate, and its request.

        They are made once, so that the same request can be sent again when an answer was lost.
        """
        try:
            pem = self._pending.read_bytes()
            key = load_pem_private_key(pem, None)
            assert isinstance(key, EllipticCurvePrivateKey)
        except FileNotFoundError:
            self._pending.parent.mkdir(parents=True, exist_ok=True)
            pem, csr = make_certificate_request(self._box_id)
            create_private_file(self._pending, pem)
            return pem, csr
        except ValueError:  # a power cut left an incomplete file
            self._pending.unlink()
            return self.pending_request()
        return pem, certificate_request(key, self._box_id)

    def accept_certificate(self, key_pem: bytes, certificate_pem: str, authority_pem: str, *, first: bool) -> None:
        """Replace key and certificate by new ones, at once and flushed to the disk.

        Args:
            key_pem: the key that the certificate must be for.
            certificate_pem: the certificate from the centre.
            authority_pem: the authority from the centre; stored at an enrolment, ignored at a renewal.
            first: whether this is an enrolment.

        Raises:
            DeviceError: ``device.answer``: another key, box or authority; nothing was changed.
        """
        try:
            certificate = x509.load_pem_x509_certificate(certificate_pem.encode("ascii"))
            authority = x509.load_pem_x509_certificate(authority_pem.encode("ascii") if first else self._pinned.read_bytes())
            names = [str(name.value) for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        except (ValueError, OSError) as error:
            raise DeviceError("device.answer", "the centre's answer contains no certificate") from error
        key = load_pem_private_key(key_pem, None)
        if certificate.public_key() != key.public_key() or names != [self._box_id]:
            raise DeviceError("device.answer", f"the certificate is not for {self._box_id}")
        if not is_issued_by(certificate, authority):
            raise DeviceError("device.answer", "the certificate is not signed by the device authority of this box")
        if first:
            _replace(self._pinned, authority_pem.encode("ascii"))
        _replace(self._file, key_pem + certificate_pem.encode("ascii"))
        self._pending.unlink(missing_ok=True)


def _replace(path: Path, data: bytes) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    create_private_file(fresh, data)
    fresh.replace(path)
    atomic_files.sync_directory(path.parent)
