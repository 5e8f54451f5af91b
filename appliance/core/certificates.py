"""The TLS certificates of the box (page and DICOM, R14): what is wrong with a pair, when it ends, who trusts it.

Two kinds of problem: a pair that no server can use (half of it, damaged, the key of another certificate, a key that is too short) is
refused; one that a server can use but people should not go on with (expired, soon expired, made for another name) is reported, because a
box with a wrong clock or a forgotten renewal must still show its findings.
"""

from __future__ import annotations

import hashlib
import math
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtensionOID, NameOID

from appliance.core.errors import ApplianceError

WARN_BEFORE: Final = timedelta(days=30)
# Files that could not be loaded are tried again after this time even if they have not changed: a folder may have become readable.
RETRY_S: Final = 60.0
# BCP 195 (RFC 9325 4.2): forward secrecy and authenticated encryption alone.
_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
_ANSWER_S: Final = 2.0
# What reading a damaged file raises, key or certificate.
_DAMAGED: Final = (OSError, ValueError, TypeError, x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)
_ANY_ADDRESS: Final = frozenset({"", "0.0.0.0", "::"})  # noqa: S104 - compared, not bound


@dataclass(frozen=True)
class TlsProblem:
    """Something wrong with a certificate.

    Attributes:
        code: ``tls.…``, see :mod:`appliance.messages`.
        detail: a path, a name or a time; for the technician.
    """

    code: str
    detail: str


@dataclass(frozen=True)
class Certificate:
    """What people need to know of a certificate.

    Attributes:
        names: the host names and addresses it is valid for (subjectAltName, RFC 6125), lower case.
        issuer: the common name of the authority that signed it.
        not_before: start of its validity, UTC.
        not_after: end of its validity, UTC.
        is_self_signed: whether it names itself as its issuer, so that no authority has signed it.
        fingerprint: SHA-256 of its DER form.
    """

    names: tuple[str, ...]
    issuer: str
    not_before: datetime
    not_after: datetime
    is_self_signed: bool
    fingerprint: bytes = b""

    def days_left(self, now: datetime) -> int:
        """Whole days until it ends; negative after the end."""
        return (self.not_after - now) // timedelta(days=1)

    def covers(self, host: str) -> bool:
        """Whether it is valid for a host name or address; a ``*`` stands for one label (RFC 6125 6.4.3)."""
        wanted = host.lower().rstrip(".")
        _, _, parent = wanted.partition(".")
        return wanted in self.names or (bool(parent) and not _is_address(wanted) and f"*.{parent}" in self.names)


class Renewal:
    """Decides when the files of a certificate have to be loaded again: after a change, and some time after a failure.

    A file has changed when its size, its inode, or its time of modification or of status change differs; the last one because ``cp -p`` and
    package managers keep the time of modification.

    Args:
        files: certificate, key and authority; None for one that is not set.
    """

    def __init__(self, files: Sequence[Path | None]) -> None:
        self._files = files
        self._tried = self._read()
        self._tried_at = -math.inf
        self._is_loaded = True

    def is_due(self) -> bool:
        """Whether to load the files now; the caller does so, and calls :meth:`confirm` if it succeeds."""
        now = time.monotonic()
        versions = self._read()
        if versions == self._tried and (self._is_loaded or now - self._tried_at < RETRY_S):
            return False
        self._tried, self._tried_at, self._is_loaded = versions, now, False
        return True

    def confirm(self) -> None:
        """Note that the files are loaded; one that has changed meanwhile is due again."""
        self._is_loaded = True

    def _read(self) -> list[tuple[int, int, int, int] | None]:
        found: list[tuple[int, int, int, int] | None] = []
        for path in self._files:
            try:
                status = path.stat() if path else None
            except OSError:
                status = None
            found.append((status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino) if status else None)
        return found


def load_pair(certificate: Path | None, key: Path | None) -> Certificate:
    """Read a certificate (with its chain behind it) and check that the key is its own and that OpenSSL accepts both.

    Raises:
        ApplianceError: ``tls.incomplete``: one of the two is not set; ``tls.unreadable``: a file is missing, damaged or not readable;
            ``tls.key_mismatch``: the key belongs to another certificate; ``tls.refused``: OpenSSL refuses the pair.
    """
    if certificate is None or key is None:
        raise ApplianceError("tls.incomplete", "tls_key" if key is None else "tls_certificate")
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    path = certificate
    try:
        own = x509.load_pem_x509_certificates(certificate.read_bytes())[0]
        described, public = _describe(own), own.public_key().public_bytes(*form)
        path = key
        private = load_pem_private_key(key.read_bytes(), None).public_key().public_bytes(*form)
    except UnsupportedAlgorithm as error:
        raise ApplianceError("tls.refused", str(path)) from error
    except _DAMAGED as error:
        raise ApplianceError("tls.unreadable", str(path)) from error
    if public != private:
        raise ApplianceError("tls.key_mismatch", f"{certificate.name}, {key.name}")
    server_context(certificate, key)
    return described


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """The context of a server that shows this pair: TLS 1.2 or newer, forward secrecy, authenticated encryption.

    Raises:
        ApplianceError: ``tls.refused``: OpenSSL refuses the pair, for example because its key is too short or because SHA-1 signs it;
            ``tls.unreadable``: a file cannot be read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    try:
        context.load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        raise ApplianceError("tls.refused", f"{certificate}: {error.reason or type(error).__name__}") from error
    except OSError as error:
        raise ApplianceError("tls.unreadable", str(certificate)) from error
    return context


def load_authority(context: ssl.SSLContext, authority: Path) -> None:
    """Let a context trust an authority.

    Raises:
        ApplianceError: ``tls.authority_unreadable``: the file is missing, damaged or not readable.
    """
    try:
        context.load_verify_locations(authority)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ApplianceError("tls.authority_unreadable", str(authority)) from error


def served_fingerprint(host: str, port: int) -> bytes | None:
    """SHA-256 of the certificate that a server of this machine shows now; None where none answers in time."""
    try:
        pem = ssl.get_server_certificate((host, port), timeout=_ANSWER_S)
    except (OSError, ValueError):
        return None
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).digest()


def find_problems(certificate: Certificate, hosts: tuple[str, ...], now: datetime) -> Iterator[TlsProblem]:
    """What people should do something about in a certificate that works.

    Args:
        certificate: the certificate.
        hosts: the names and addresses that the box is called by; any one of them is enough. Empty: not checked.
        now: UTC.
    """
    end = f"{certificate.not_after:%Y-%m-%d}"
    if certificate.not_after <= now:
        yield TlsProblem("tls.expired", end)
    elif certificate.not_before > now:
        yield TlsProblem("tls.not_yet_valid", f"{certificate.not_before:%Y-%m-%d}")
    elif certificate.not_after - now <= WARN_BEFORE:
        yield TlsProblem("tls.expires_soon", end)
    if hosts and not any(certificate.covers(host) for host in hosts):
        yield TlsProblem("tls.other_name", ", ".join(certificate.names) or "-")


def is_trusted(certificate: Path, key: Path, host: str, authority: Path | None) -> bool:
    """Whether a client that trusts ``authority`` accepts the pair for a host name: a TLS handshake in memory decides.

    False also where the authority or the pair cannot be loaded: :func:`load_authority` and :func:`load_pair` name the reason.

    Args:
        certificate: PEM, with its chain.
        key: PEM.
        host: the name that the client asks for.
        authority: PEM of the authority; the authorities of this machine when None.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        server = server_context(certificate, key)
        if authority is None:
            client.load_default_certs()
        else:
            load_authority(client, authority)
    except ApplianceError:
        return False
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_hostname=host),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    try:
        waiting = list(ends)
        while waiting:
            for end in list(waiting):
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue
                waiting.remove(end)
    except ssl.SSLError:
        return False
    return True


def hosts_of(hostname: str, address: str) -> tuple[str, ...]:
    """The names that a certificate must cover one of: the name that people type, else the address if the box listens on one alone."""
    return (hostname,) if hostname else (() if address in _ANY_ADDRESS else (address,))


def _describe(certificate: x509.Certificate) -> Certificate:
    issuer = certificate.issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
    return Certificate(
        names=_names(certificate),
        issuer=str(issuer[0].value) if issuer else certificate.issuer.rfc4514_string(),
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        is_self_signed=certificate.issuer == certificate.subject,
        fingerprint=certificate.fingerprint(SHA256()),
    )


def _names(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        names = certificate.extensions.get_extension_for_oid(ExtensionOID.SUBJECT_ALTERNATIVE_NAME).value
    except (x509.ExtensionNotFound, *_DAMAGED):
        return ()
    assert isinstance(names, x509.SubjectAlternativeName)
    own = [name.lower() for name in names.get_values_for_type(x509.DNSName)]
    return (*own, *(str(address) for address in names.get_values_for_type(x509.IPAddress)))


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
