"""The state of the box's certificates for the technician: the status page and ``appliance tls status`` show it."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from appliance.core.certificates import (
    Certificate,
    TlsProblem,
    find_problems,
    hosts_of,
    is_trusted,
    load_authority,
    load_pair,
    served_fingerprint,
)
from appliance.core.errors import ApplianceError
from appliance.core.process import own_address
from appliance.core.settings import Settings

# With these a server does not start, does not take a new certificate, or is refused by every client that checks certificates.
REFUSED: Final = frozenset(
    {
        "tls.incomplete", "tls.unreadable", "tls.key_mismatch", "tls.refused", "tls.expired", "tls.authority_unreadable", "tls.not_served",
    }
)  # fmt: skip


@dataclass(frozen=True)
class TlsStatus:
    """One certificate of the box.

    Attributes:
        uses: ``page``, ``dicom``, or both.
        path: the file; None where only its key is set.
        certificate: what is in it; None where it cannot be used.
        trust: ``trusted``: a client accepts it that trusts ``tls_authority``, or without that setting the authorities of this machine;
            ``self_signed``: it is its own issuer; ``other``: neither of the two.
        problems: what is wrong, worst first.
    """

    uses: tuple[str, ...]
    path: Path | None
    certificate: Certificate | None
    trust: str
    problems: tuple[TlsProblem, ...]


def dicom_pair(settings: Settings) -> tuple[Path | None, Path | None]:
    """Certificate and key of the DICOM receiver: its own, or without them those of the page."""
    if settings.dicom_tls_certificate is None and settings.dicom_tls_key is None:
        return settings.tls_certificate, settings.tls_key
    return settings.dicom_tls_certificate, settings.dicom_tls_key


def tls_statuses(settings: Settings, now: datetime) -> list[TlsStatus]:
    """Every certificate that the settings name, once; ``now`` is UTC."""
    page = settings.tls_certificate, settings.tls_key
    pairs: dict[tuple[Path | None, Path | None], list[str]] = {}
    if any(page):
        pairs.setdefault(page, []).append("page")
    if settings.dicom_tls_port is not None:
        pairs.setdefault(dicom_pair(settings), []).append("dicom")
    return [_examine(settings, pair, tuple(uses), now) for pair, uses in pairs.items()]


def _examine(settings: Settings, pair: tuple[Path | None, Path | None], uses: tuple[str, ...], now: datetime) -> TlsStatus:
    authorities = tuple(_authority_problems(settings, uses))
    try:
        certificate = load_pair(*pair)
    except ApplianceError as error:
        return TlsStatus(uses, pair[0], None, "other", (TlsProblem(error.code, error.detail), *authorities))
    path, key = pair
    assert path is not None
    assert key is not None
    hosts = hosts_of(settings.web_hostname, settings.web_host) if "page" in uses else ()
    asked = next((name for name in (*hosts, *certificate.names) if not name.startswith("*")), "localhost")
    trust = "other"
    if is_trusted(path, key, asked, settings.tls_authority):
        trust = "trusted"
    elif certificate.is_self_signed:
        trust = "self_signed"
    problems = (*_service_problems(settings, uses, certificate), *authorities, *find_problems(certificate, hosts, now))
    return TlsStatus(uses, path, certificate, trust, problems)


def _authority_problems(settings: Settings, uses: tuple[str, ...]) -> Iterator[TlsProblem]:
    for path in (settings.tls_authority, settings.dicom_client_authority if "dicom" in uses else None):
        if path is not None:
            try:
                load_authority(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), path)
            except ApplianceError as error:
                yield TlsProblem(error.code, error.detail)


def _service_problems(settings: Settings, uses: tuple[str, ...], certificate: Certificate) -> Iterator[TlsProblem]:
    """Ask the servers that run which certificate they show: a server may have refused a new one."""
    hosts = {"page": settings.web_host, "dicom": settings.dicom_host}
    for use in uses:
        port = _port_of(settings, use)
        served = served_fingerprint(own_address(hosts[use]), port) if port else None
        if served is not None and served != certificate.fingerprint:
            yield TlsProblem("tls.not_served", f"{hosts[use]}:{port}")


def _port_of(settings: Settings, use: str) -> int | None:
    """The port on which a server of the box speaks TLS now; None where it does not run."""
    run = settings.data_dir / "run"
    try:
        if use == "dicom":
            return int((run / "dicom-tls.port").read_text())
        address = json.loads((run / "web.json").read_text())
        return int(address["port"]) if address["scheme"] == "https" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
