"""``appliance tls``: the certificates of the box, when they end, who trusts them, and what to do."""

from __future__ import annotations

import argparse
from datetime import datetime, timezone

from appliance.cli.terminal import explain, hint_line, print_columns, say
from appliance.core.settings import Settings
from appliance.core.tls_status import REFUSED, TlsStatus, tls_statuses


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the action of ``appliance tls``."""
    parser.add_argument("action", choices=("status",))


def run(arguments: argparse.Namespace) -> int:
    """Print each certificate; returns 1 where one is refused or has expired."""
    settings, now = Settings.load(arguments.data_dir), datetime.now(timezone.utc)
    statuses = tls_statuses(settings, now)
    if not statuses:
        print(say("no certificate: the page is served to this machine alone, and DICOM is not encrypted"))
    for status in statuses:
        _print(status, now)
    return int(any(problem.code in REFUSED for status in statuses for problem in status.problems))


def _print(status: TlsStatus, now: datetime) -> None:
    uses = {"page": say("page"), "dicom": say("DICOM receiver")}
    print(", ".join(uses[use] for use in status.uses) + f": {status.path}")
    certificate = status.certificate
    if certificate is not None:
        trust = {
            "trusted": say("trusted by the authority of this box"),
            "self_signed": say("self-signed: every PC must be given it, or its browser warns"),
            "other": say("of an authority that this box does not know: the PCs must trust it (tls_authority)"),
        }
        print_columns(
            [
                ["  " + say("names"), ", ".join(certificate.names) or "-"],
                ["  " + say("issuer"), certificate.issuer],
                [
                    "  " + say("ends"),
                    say("{day}, days left: {count}", day=f"{certificate.not_after:%Y-%m-%d}", count=certificate.days_left(now)),
                ],
                ["  " + say("trust"), trust[status.trust]],
            ]
        )
    for problem in status.problems:
        print("  " + explain(problem.code, problem.detail))
        print("  " + hint_line(problem.code))
