"""DICOM over TLS as in the BCP 195 profile (PS3.15 B.12: TLS 1.2 or newer, forward secrecy, authenticated encryption), R14.

pynetdicom shakes hands in its accept loop, where one client that says nothing would stop the receiver. Here each connection does it in its
own thread, within a time; a connection counts from its acceptance (:mod:`appliance.dicom.connections`).
"""

from __future__ import annotations

import logging
import socket
import ssl
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Final

from pynetdicom.transport import RequestHandler

from appliance.core.certificates import Renewal, load_authority, load_pair, server_context
from appliance.core.errors import ApplianceError
from appliance.core.settings import Settings
from appliance.core.tls_status import dicom_pair
from appliance.dicom.connections import LimitedServer

logger = logging.getLogger(__name__)

HANDSHAKE_S: Final = 10.0


class ServerCredentials:
    """The receiver's certificate and key as an SSL context, which takes a renewed pair by itself.

    Args:
        settings: ``dicom_tls_certificate`` and ``dicom_tls_key``, or without them those of the page; ``dicom_client_authority``.

    Raises:
        ApplianceError: ``tls.…``: the pair or the authority cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self._pair, self._authority = dicom_pair(settings), settings.dicom_client_authority
        self._renewal = Renewal((*self._pair, self._authority))
        self._context = self._load()
        self._reported = ""

    def context(self) -> ssl.SSLContext:
        """The context for the next connection; while a new pair cannot be used, the former one stays, and the reason is logged once."""
        if self._renewal.is_due():
            try:
                self._context = self._load()
            except ApplianceError as error:
                if error.code != self._reported:
                    logger.error("certificate not taken", extra={"code": error.code, "role": "receiver"})
                self._reported = error.code
            else:
                self._renewal.confirm()
                self._reported = ""
        return self._context

    def _load(self) -> ssl.SSLContext:
        certificate, key = self._pair
        load_pair(certificate, key)
        assert certificate is not None
        assert key is not None
        context = server_context(certificate, key)
        if self._authority is not None:
            load_authority(context, self._authority)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


class SecureServer(LimitedServer):
    """The server for the port with TLS, with handshakes outside the accept loop.

    Args:
        credentials: certificate and key.
    """

    def __init__(self, *args: Any, credentials: ServerCredentials, **more: Any) -> None:
        self._credentials = credentials
        super().__init__(*args, request_handler=_Handler, **more)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; the handshake follows in its own thread."""
        assert self.socket is not None
        line, address = self.socket.accept()
        try:
            wrapped = self._credentials.context().wrap_socket(line, server_side=True, do_handshake_on_connect=False)
        except (OSError, ValueError):
            line.close()
            raise OSError("closed before its handshake") from None  # the loop goes on after an OSError
        return wrapped, address


class _Handler(RequestHandler):
    """Shakes hands, then starts the association; a client that cannot is closed, without a traceback in the log."""

    def handle(self) -> None:
        """Shake hands within ``HANDSHAKE_S``."""
        try:
            self.request.settimeout(HANDSHAKE_S)
            self.request.do_handshake()
            self.request.settimeout(None)
        except OSError as error:
            logger.info("no TLS handshake", extra={"code": type(error).__name__, "peer": str(self.client_address[0])})
            self.server.shutdown_request(self.request)
            return
        super().handle()


class PlainSenders:
    """Who may send without TLS: AE title and address together.

    Args:
        settings: ``dicom_plain_senders``; unset it means everybody, or nobody where there is a port for TLS.
    """

    def __init__(self, settings: Settings) -> None:
        listed = settings.dicom_plain_senders
        self._is_open = listed is None and settings.dicom_tls_port is None
        self._listed = {(title.strip(), _canonical(address)) for title, _, address in (item.rpartition("@") for item in listed or ())}

    def admits(self, title: str, address: str) -> bool:
        """Whether this AE title may send from this address."""
        return self._is_open or (title.strip(), _canonical(address)) in self._listed


def _canonical(address: str) -> IPv4Address | IPv6Address | str:
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    return parsed.ipv4_mapped or parsed if isinstance(parsed, IPv6Address) else parsed
