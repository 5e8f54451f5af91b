"""What the technician sees of the box's certificates, on the status page and by ``appliance tls status``."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from appliance.core.certificates import Certificate, TlsProblem, find_problems, hosts_of, is_trusted, load_pair
from appliance.core.errors import ApplianceError
from appliance.core.settings import Settings

# No server, or no client that checks, goes on with these.
REFUSED: Final = frozenset({"tls.incomplete", "tls.unreadable", "tls.key_mismatch", "tls.expired"})


@dataclass(frozen=True)
class TlsStatus:
    """One certificate of the box.

    Attributes:
        uses: ``page``, ``dicom``, or both.
        path: the file; None where only its key is set.
        certificate: what is in it; None where it cannot be used.
        trust: ``trusted``: it stands a handshake under ``tls_authority``, or without that under the authorities of this machine;
            ``self_signed``; ``other``.
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
    try:
        certificate = load_pair(*pair)
    except ApplianceError as error:
        return TlsStatus(uses, pair[0], None, "other", (TlsProblem(error.code, error.detail),))
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
    return TlsStatus(uses, path, certificate, trust, tuple(find_problems(certificate, hosts, now)))
