"""Extensions that a certificate authority needs: Python 3.13 verifies strictly (``ssl.VERIFY_X509_STRICT``, RFC 5280 4.2.1)."""

from __future__ import annotations

from cryptography import x509


def authority_usage() -> x509.KeyUsage:
    """Key usage of a certificate that signs others, and may also be a server's own."""
    return x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
