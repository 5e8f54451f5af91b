"""Certificates for tests: self-signed, or signed by an authority made here."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from ipaddress import ip_address
from pathlib import Path
from typing import TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

Authority: TypeAlias = "tuple[x509.Certificate, ec.EllipticCurvePrivateKey]"


def authority_usage() -> x509.KeyUsage:
    """Key usage of a certificate that signs others; Python 3.13 verifies strictly (``ssl.VERIFY_X509_STRICT``, RFC 5280 4.2.1)."""
    return x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def make_authority(path: Path, name: str = "Clinic CA") -> Authority:
    """An authority; its certificate is written to a file."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(name, name, key, 3650).add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    certificate = builder.add_extension(authority_usage(), critical=True).sign(key, hashes.SHA256())
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return certificate, key


def make_pair(
    certificate: Path, key: Path, names: list[str], *, authority: Authority | None = None, days: float = 365, is_weak: bool = False
) -> None:
    """A server's or client's certificate and its key, in two files.

    Args:
        certificate: where to write it.
        key: where to write it.
        names: the names and addresses that it is made for.
        authority: who signs it; itself when None.
        days: from now it ends; negative: it has ended.
        is_weak: with a key of 1024 bits, which OpenSSL refuses.
    """
    own = rsa.generate_private_key(65537, 1024) if is_weak else ec.generate_private_key(ec.SECP256R1())  # noqa: S505
    issuer, signer = (authority[0].subject.rfc4514_string().partition("=")[2], authority[1]) if authority else (names[0], own)
    alternative = x509.SubjectAlternativeName([_general(name) for name in names])
    builder = _builder(names[0], issuer, own, days).add_extension(alternative, critical=False)
    if authority:
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                authority[0].extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            ),
            critical=False,
        )
    signed = builder.sign(signer, hashes.SHA256())
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    key.write_bytes(own.private_bytes(*form))


def _builder(subject: str, issuer: str, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, days: float) -> x509.CertificateBuilder:
    now = datetime.now(timezone.utc)
    end = now + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - timedelta(days=1))
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)
