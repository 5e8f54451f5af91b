"""C-STORE and C-ECHO receiver (PS3.4 Annex B and A): success is returned only for images that are stored durably.

The handler gives the encoded data set as received to :mod:`appliance.ingest.ingest`; it never decodes pixels. The web server and the
worker are other processes, so that parallel senders have this interpreter for themselves.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, Final

from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from appliance.core.domain import Source
from appliance.core.errors import ApplianceError, IngestError, StoreError
from appliance.core.process import Lock, port_error, stop_on_signal
from appliance.core.settings import Settings
from appliance.core.wakeup import wake
from appliance.dicom.connections import MAX_PDU_BYTES, ConnectionLimits, LimitedServer
from appliance.dicom.secure_server import PlainSenders, SecureServer, ServerCredentials
from appliance.ingest.ingest import Ingest
from appliance.store.store import Store
from model_sync import atomic_files

logger = logging.getLogger(__name__)

# PS3.4 B.2.3: C-STORE response status codes.
SUCCESS: Final = 0x0000
OUT_OF_RESOURCES: Final = 0xA700
CANNOT_UNDERSTAND: Final = 0xC000
NOT_STORED: Final = 0xC001
_TICK_S: Final = 0.2
STATUS: Final = dict.fromkeys(("ingest.disk_full", "ingest.too_large", "ingest.memory", "store.failed"), OUT_OF_RESOURCES)

# The syntaxes that appliance.imaging.pixels decodes; a sender that offers only others sees that in the negotiation and can transcode.
TRANSFER_SYNTAXES: Final = [
    "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81",
    "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91", "1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203",
    "1.2.840.10008.1.2.5",
]  # fmt: skip


class Receiver:
    """The DICOM receiver of a box.

    Args:
        settings: AE title, address, port and maximum number of associations.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._store = Store(settings)
        self._ingest = Ingest(self._store)
        self._plain_senders = PlainSenders(settings)
        self._limits = ConnectionLimits(settings)
        self._servers: list[LimitedServer] = []
        self._open_series: dict[int, set[int]] = {}
        self._open_series_lock = threading.Lock()
        self._ae = AE(ae_title=settings.ae_title)
        self._ae.maximum_associations = settings.dicom_max_associations
        self._ae.acse_timeout = self._limits.acse_timeout_s
        self._ae.maximum_pdu_size = MAX_PDU_BYTES
        self._ae.add_supported_context(Verification)
        for context in AllStoragePresentationContexts:
            self._ae.add_supported_context(str(context.abstract_syntax), TRANSFER_SYNTAXES)

    def start(self) -> tuple[int, int | None]:
        """Listen in the background.

        Returns:
            The port, and the one for TLS if there is one; the system chooses where the setting is 0.

        Raises:
            ApplianceError: ``tls.…``: a port for TLS is set without a usable certificate; ``box.port``: a port is in use.
        """
        settings = self._settings
        credentials = ServerCredentials(settings) if settings.dicom_tls_port is not None else None
        handlers: list[Any] = [
            (evt.EVT_C_STORE, self._on_store), (evt.EVT_C_ECHO, lambda _event: SUCCESS), (evt.EVT_RELEASED, self._on_end),
            (evt.EVT_ABORTED, self._on_end), (evt.EVT_CONN_CLOSE, self._on_end),
        ]  # fmt: skip
        plain = [*handlers, (evt.EVT_REQUESTED, self._on_plain_request)]
        try:
            self._servers.append(self._listen("dicom_port", settings.dicom_port, LimitedServer, evt_handlers=plain))
            if credentials is not None:
                more = {"evt_handlers": handlers, "credentials": credentials}
                self._servers.append(self._listen("dicom_tls_port", settings.dicom_tls_port or 0, SecureServer, **more))
        except ApplianceError:
            for server in self._servers:
                server.server_close()
            self._servers = []
            raise
        for server in self._servers:
            threading.Thread(target=server.serve_forever, name="dicom-server", daemon=True).start()
        ports = [int(server.server_address[1]) for server in self._servers]
        return ports[0], ports[1] if credentials is not None else None

    def stop(self) -> None:
        """Stop listening and close open associations, whose senders send again."""
        for server in self._servers:
            server.shutdown()
        self._limits.end_all()

    def _listen(self, setting: str, port: int, kind: type[LimitedServer], **more: Any) -> LimitedServer:
        host = self._settings.dicom_host
        try:
            server = self._ae.make_server((host, port), server_class=kind, limits=self._limits, **more)
        except OSError as error:
            raise port_error(setting, host, port, error) from error
        assert isinstance(server, LimitedServer)
        return server

    def _on_plain_request(self, event: Any) -> None:
        """Reject an association without TLS of a sender that is not listed (PS3.8 9.3.4: calling AE title not recognised)."""
        sender = event.assoc.requestor
        title, address = str(sender.primitive.calling_ae_title).strip(), str(sender.address)
        if not self._plain_senders.admits(title, address):
            logger.warning("sender without TLS refused", extra={"peer": f"{title}@{address}", "code": "dicom.not_listed"})
            event.assoc.acse.send_reject(0x01, 0x01, 0x03)
            event.assoc.kill()

    def _on_store(self, event: Any) -> int:
        """Store one composite instance (PS3.7 9.1.1); after any other status than success the sender keeps it."""
        peer = str(event.assoc.requestor.ae_title)
        try:
            accepted = self._ingest.accept(event.encoded_dataset(), Source("dimse", peer))
        except IngestError as error:
            return STATUS.get(error.code, CANNOT_UNDERSTAND)
        except StoreError as error:
            logger.error("scan not stored", extra={"code": error.code})
            return STATUS.get(error.code, NOT_STORED)
        except Exception as error:  # pynetdicom would answer 0xC211 without an entry in our log
            logger.exception("scan not stored")
            raise StoreError("store.failed", type(error).__name__) from error
        with self._open_series_lock:
            self._open_series.setdefault(id(event.assoc), set()).add(accepted.stored.series_id)
        return SUCCESS

    def _on_end(self, event: Any) -> None:
        """Close the series of an association that ended."""
        with self._open_series_lock:
            series = self._open_series.pop(id(event.assoc), set())
        if series:
            self._store.planner.close_series(sorted(series))
            wake(self._settings)


def run(settings: Settings) -> None:
    """Run the receiver until SIGTERM."""
    lock = Lock(settings.data_dir, "receiver")
    receiver = Receiver(settings)
    is_stopping = stop_on_signal()
    run_dir = settings.data_dir / "run"
    files = run_dir / "dicom.port", run_dir / "dicom-tls.port"
    for file in files:  # of a run that was killed
        file.unlink(missing_ok=True)
    try:
        ports = receiver.start()
        for file, port in reversed(list(zip(files, ports, strict=True))):  # the first one last: who waits for it finds both
            if port is not None:
                atomic_files.write(file, str(port).encode(), mode=0o600)
        logger.info("receiver ready", extra={"port": ports[0]})
        while not is_stopping():
            # No wait without an end: a signal that another thread receives does not interrupt it, and Python would not handle the signal.
            time.sleep(_TICK_S)
    finally:
        for file in files:
            file.unlink(missing_ok=True)
        receiver.stop()
        lock.release()
