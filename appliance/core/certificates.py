"""The TLS certificates of the box (page and DICOM, R14): what is wrong with a pair, when it ends, who trusts it.

Two kinds of problem: a pair that no server can use (half of it, damaged, the key of another certificate) is refused; one that a server
can use but people should not go on with (expired, soon expired, made for another name) is reported, because a box with a wrong clock or a
forgotten renewal must still show its findings.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtensionOID, NameOID

from appliance.core.errors import ApplianceError

WARN_BEFORE: Final = timedelta(days=30)
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
        is_self_signed: whether it was signed with its own key.
    """

    names: tuple[str, ...]
    issuer: str
    not_before: datetime
    not_after: datetime
    is_self_signed: bool

    def days_left(self, now: datetime) -> int:
        """Whole days until it ends; negative after the end."""
        return (self.not_after - now) // timedelta(days=1)

    def covers(self, host: str) -> bool:
        """Whether it is valid for a host name or address; a ``*`` stands for one label (RFC 6125 6.4.3)."""
        wanted = host.lower().rstrip(".")
        _, _, parent = wanted.partition(".")
        return wanted in self.names or (bool(parent) and not _is_address(wanted) and f"*.{parent}" in self.names)


def load_pair(certificate: Path | None, key: Path | None) -> Certificate:
    """Read a certificate (with its chain behind it) and check that the key is its own.

    Raises:
        ApplianceError: ``tls.incomplete``: one of the two is not set; ``tls.unreadable``: a file is missing, damaged or not readable;
            ``tls.key_mismatch``: the key belongs to another certificate.
    """
    if certificate is None or key is None:
        raise ApplianceError("tls.incomplete", "tls_key" if key is None else "tls_certificate")
    try:
        chain = x509.load_pem_x509_certificates(certificate.read_bytes())
    except (OSError, ValueError) as error:
        raise ApplianceError("tls.unreadable", str(certificate)) from error
    try:
        private = load_pem_private_key(key.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ApplianceError("tls.unreadable", str(key)) from error
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    if chain[0].public_key().public_bytes(*form) != private.public_key().public_bytes(*form):
        raise ApplianceError("tls.key_mismatch", f"{certificate.name}, {key.name}")
    return _describe(chain[0])


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

    Args:
        certificate: PEM, with its chain.
        key: PEM.
        host: the name that the client asks for.
        authority: PEM of the authority; the authorities of this machine when None.
    """
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=authority)
    server.load_cert_chain(certificate, key)
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
    )


def _names(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        names = certificate.extensions.get_extension_for_oid(ExtensionOID.SUBJECT_ALTERNATIVE_NAME).value
    except (x509.ExtensionNotFound, ValueError):
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
