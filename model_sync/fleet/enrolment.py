"""Enrolment of boxes: a one-time token, a certificate request, a short-lived certificate.

The device authority of the centre signs only certificates of boxes. A box creates and keeps its own key; the certificate contains only
the name of the box, whatever the request contained.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Final, TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, EllipticCurvePublicKey, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from securesystemslib.signer import SSlibKey
from sqlalchemy import Connection, RowMapping, select, update

from model_sync.agent.device import create_private_file, is_issued_by
from model_sync.errors import CodedError, SettingsError
from model_sync.fleet.database import Fleet, assign_ring
from model_sync.fleet.tables import actions, boxes, certificates, tokens
from model_sync.library.keys import encrypt

CERTIFICATE: Final = "device-ca.pem"
KEY: Final = "device-ca.key"
MAX_CSR_BYTES: Final = 8 << 10
_AUTHORITY_YEARS: Final = 20
# A box's clock may be behind; a certificate must be valid there at once.
_BACKDATED: Final = timedelta(hours=1)

DeviceKey: TypeAlias = EllipticCurvePublicKey | Ed25519PublicKey


class EnrolmentError(CodedError):
    """A box was refused.

    Attributes:
        code: ``enrolment.token``, ``enrolment.csr``, ``enrolment.denied``, ``enrolment.certificate`` (missing, or of another authority),
            ``enrolment.expired``, ``enrolment.too_early``.
    """


class DeviceAuthority:
    """The authority that signs the certificates of boxes; opened by ``create`` or ``load``."""

    def __init__(self, certificate: x509.Certificate, key: EllipticCurvePrivateKey) -> None:
        self.certificate = certificate
        self._key = key

    @property
    def pem(self) -> str:
        """The authority's certificate."""
        return self.certificate.public_bytes(Encoding.PEM).decode()

    @classmethod
    def create(cls, directory: Path, passphrase: str, name: str = "device authority") -> DeviceAuthority:
        """Create an authority: ``device-ca.pem`` and, encrypted and readable by this account only, ``device-ca.key``.

        Raises:
            SettingsError: there is one already, or the passphrase is too short; nothing is overwritten.
        """
        key = generate_private_key(SECP256R1())
        encrypted = encrypt(key, passphrase)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(timezone.utc)
        certificate = (
            _builder(subject, subject, key.public_key(), now, now + timedelta(days=365 * _AUTHORITY_YEARS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(key, SHA256())
        )
        create_private_file(directory / KEY, encrypted)
        (directory / CERTIFICATE).write_bytes(certificate.public_bytes(Encoding.PEM))
        return cls(certificate, key)

    @classmethod
    def load(cls, directory: Path, passphrase: str) -> DeviceAuthority:
        """Load an authority; raise SettingsError when it is missing, cannot be decrypted, or its parts do not match."""
        try:
            certificate = x509.load_pem_x509_certificate((directory / CERTIFICATE).read_bytes())
            key = load_pem_private_key((directory / KEY).read_bytes(), passphrase.encode())
        except OSError as error:
            hint = "`model-library device-ca DIR` makes one"
            raise SettingsError(f"{error.filename}: {error.strerror}", hint=hint, code="fleet.authority") from error
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise SettingsError(f"the device authority in {directory} cannot be decrypted", code="fleet.authority") from error
        if not isinstance(key, EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
            raise SettingsError(f"the key in {directory} does not belong to the certificate", code="fleet.authority")
        return cls(certificate, key)

    def issue(self, key: DeviceKey, box_id: str, now: datetime, days: float) -> x509.Certificate:
        """Return a client certificate for a box."""
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, box_id)])
        return (
            _builder(subject, self.certificate.subject, key, now - _BACKDATED, now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, SHA256())
        )

    def has_issued(self, certificate: x509.Certificate) -> bool:
        """Return whether a certificate is signed by this authority; its validity is not checked."""
        return is_issued_by(certificate, self.certificate)


@dataclass(frozen=True)
class Box:
    """The box that sent a request: its name, ring and the key of its verified certificate."""

    box_id: str
    ring: str
    key: SSlibKey


class Enrolment:
    """Enrols boxes, renews their certificates, which are valid for ``certificate_days``, and identifies them."""

    def __init__(self, fleet: Fleet, authority: DeviceAuthority, *, certificate_days: float = 30.0) -> None:
        self._fleet = fleet
        self.authority = authority
        self._days = certificate_days

    def enrol(self, token: str, csr_pem: str) -> tuple[str, str]:
        """Issue a certificate for a token and a request; return its PEM and the box's name.

        A token is for the first device that sends it, which gets the same certificate again when the answer was lost; other devices are
        refused. Earlier certificates of the box's name are revoked.

        Raises:
            EnrolmentError: ``enrolment.csr``, ``enrolment.token`` (unknown, used or expired: one answer), ``enrolment.denied``.
        """
        key = check_request(csr_pem)
        token_digest, fingerprint, now = _digest(token.encode()), _fingerprint(key), self._fleet.now()
        unused = tokens.c.sha256 == token_digest, tokens.c.used_at.is_(None), tokens.c.expires_at > now
        with self._fleet.writing() as tx:
            # One statement decides between two requests with the same token.
            is_first = tx.execute(update(tokens).where(*unused).values(used_at=now, key_sha256=fingerprint)).rowcount
            token_row = tx.execute(select(tokens).where(tokens.c.sha256 == token_digest)).mappings().one_or_none()
            if token_row is None or (not is_first and (token_row["key_sha256"] != fingerprint or token_row["expires_at"] <= now)):
                raise EnrolmentError("enrolment.token", "the token is unknown, used or expired")
            box_id = token_row["box_id"]
            if not is_first:
                query = select(certificates.c.pem).where(certificates.c.serial == token_row["serial"], certificates.c.revoked_at.is_(None))
                if (pem := tx.execute(query).scalar_one_or_none()) is None:
                    raise _denied()
                return str(pem), box_id
            return self._admit(tx, token_row, key, now), box_id

    def renew(self, der: bytes, csr_pem: str) -> tuple[str, str]:
        """Issue a new certificate for one after half of its validity; return its PEM and the box's name.

        The old certificate stays valid until its end, because the answer may be lost.

        Raises:
            EnrolmentError: as ``identify``, ``enrolment.csr`` or ``enrolment.too_early``.
        """
        box = self.identify(der)
        current = x509.load_der_x509_certificate(der)
        now = self._fleet.now()
        half = current.not_valid_before_utc + (current.not_valid_after_utc - current.not_valid_before_utc) / 2
        if now < half.timestamp():
            hint = f"renew from {half:%Y-%m-%d} on; the certificate in use stays valid"
            raise EnrolmentError("enrolment.too_early", "the certificate is too new to be renewed", hint=hint)
        key = check_request(csr_pem)
        with self._fleet.writing() as tx:
            return self._issue(tx, box.box_id, key, now)[0], box.box_id

    def identify(self, der: bytes | None) -> Box:
        """Return the box of a client certificate; TLS has verified that the client has its key.

        Validity is checked here and not by TLS, so that the box gets an error that names the expiry; the deny-list is checked here
        too, and takes effect with the next request.

        Raises:
            EnrolmentError: ``enrolment.certificate``, ``enrolment.expired``, ``enrolment.denied``.
        """
        if der is None:
            raise EnrolmentError("enrolment.certificate", "no device certificate was shown")
        try:
            certificate = x509.load_der_x509_certificate(der)
            key = certificate.public_key()
        except (ValueError, UnsupportedAlgorithm) as error:
            raise EnrolmentError("enrolment.certificate", "the device certificate cannot be read") from error
        if not self.authority.has_issued(certificate) or not isinstance(key, (EllipticCurvePublicKey, Ed25519PublicKey)):
            raise EnrolmentError("enrolment.certificate", "the certificate is not of this fleet")
        now = self._fleet.now()
        if now >= certificate.not_valid_after_utc.timestamp():
            raise EnrolmentError("enrolment.expired", f"the certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d}")
        if now < certificate.not_valid_before_utc.timestamp():
            raise EnrolmentError("enrolment.certificate", "the certificate is not valid yet", hint="check the server's clock")
        row = self._row(certificate)
        if row is None or row["revoked_at"] is not None or row["denied_at"] is not None:
            raise _denied()
        return Box(row["box_id"], row["ring"], SSlibKey.from_crypto(key))

    def _row(self, certificate: x509.Certificate) -> RowMapping | None:
        serial = f"{certificate.serial_number:x}"
        query = (
            select(boxes.c.box_id, boxes.c.ring, boxes.c.denied_at, certificates.c.revoked_at)
            .join(certificates, certificates.c.box_id == boxes.c.box_id)
            .where(certificates.c.serial == serial)
        )
        with self._fleet.reading() as tx:
            return tx.execute(query).mappings().one_or_none()

    def _admit(self, tx: Connection, token: RowMapping, key: DeviceKey, now: int) -> str:
        box_id, ring = token["box_id"], token["ring"]
        new = self._fleet.insert(boxes).values(box_id=box_id, ring=ring, enrolled_at=now)
        tx.execute(new.on_conflict_do_update(index_elements=["box_id"], set_={"ring": ring, "enrolled_at": now}))
        if tx.execute(select(boxes.c.denied_at).where(boxes.c.box_id == box_id)).scalar_one() is not None:
            raise _denied()  # the transaction is rolled back: the token stays unused
        assign_ring(tx, box_id)
        live = certificates.c.box_id == box_id, certificates.c.revoked_at.is_(None)
        tx.execute(update(certificates).where(*live).values(revoked_at=now))
        pem, serial = self._issue(tx, box_id, key, now)
        tx.execute(update(tokens).where(tokens.c.sha256 == token["sha256"]).values(serial=serial))
        tx.execute(actions.insert().values(at=now, actor=box_id, action="enrolled", ring=ring, subject=box_id))
        return pem

    def _issue(self, tx: Connection, box_id: str, key: DeviceKey, now: int) -> tuple[str, str]:
        certificate = self.authority.issue(key, box_id, datetime.fromtimestamp(now, timezone.utc), self._days)
        pem, serial = certificate.public_bytes(Encoding.PEM).decode(), f"{certificate.serial_number:x}"
        ends = int(certificate.not_valid_after_utc.timestamp())
        tx.execute(certificates.insert().values(serial=serial, box_id=box_id, not_after=ends, pem=pem))
        return pem, serial


def new_token(fleet: Fleet, box_id: str, ring: str, *, hours: float = 72.0, actor: str = "command line") -> str:
    """Create a token for one box; only its hash is stored, so it can be shown only now.

    Raises:
        SettingsError: the box is denied.
    """
    token, now = secrets.token_urlsafe(32), fleet.now()
    with fleet.writing() as tx:
        if tx.execute(select(boxes.c.denied_at).where(boxes.c.box_id == box_id)).scalar_one_or_none() is not None:
            raise SettingsError(
                f"{box_id} is denied", hint=f"`model-library allow {box_id}` first, if it is the centre's again", code="enrolment.denied"
            )
        row = {"sha256": _digest(token.encode()), "box_id": box_id, "ring": ring, "created_at": now, "expires_at": now + int(hours * 3600)}
        tx.execute(tokens.insert().values(**row))
        tx.execute(actions.insert().values(at=now, actor=actor, action="token", ring=ring, subject=box_id))
    return token


def check_request(csr_pem: str) -> DeviceKey:
    """Return the key of a request after a check of its signature; nothing else of a request is used.

    Raises:
        EnrolmentError: ``enrolment.csr``.
    """
    try:
        if len(csr_pem) > MAX_CSR_BYTES:
            raise ValueError("too long")
        csr = x509.load_pem_x509_csr(csr_pem.encode("ascii"))
        key, genuine = csr.public_key(), csr.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise EnrolmentError("enrolment.csr", "the certificate request cannot be read") from error
    if not genuine:
        raise EnrolmentError("enrolment.csr", "the certificate request is not signed by its own key")
    if isinstance(key, Ed25519PublicKey) or (isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1)):
        return key
    raise EnrolmentError("enrolment.csr", "the key must be P-256 or Ed25519")


def _builder(subject: x509.Name, issuer: x509.Name, key: DeviceKey, not_before: datetime, not_after: datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _denied() -> EnrolmentError:
    return EnrolmentError("enrolment.denied", "this box is denied")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _fingerprint(key: DeviceKey) -> str:
    return _digest(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
