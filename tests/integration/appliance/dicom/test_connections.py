"""Peers that hold connections, threads or memory of the receiver without sending an image: over real sockets (R45)."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.sop_class import ComputedRadiographyImageStorage, Verification  # type: ignore[attr-defined]

from appliance.core.settings import Settings
from appliance.dicom import connections
from appliance.dicom.receiver import Receiver
from tests.support.dicom_sender import send
from tests.support.processes import wait_for
from tests.support.receiver_process import receiver
from tests.support.scans import dataset

# PS3.8 9.3.1: an A-ASSOCIATE-RQ that announces 4096 bytes.
_HALF_REQUEST = b"\x01\x00\x00\x00\x10\x00" + bytes(100)


@contextmanager
def running(settings: Settings, **values: object) -> Iterator[int]:
    """A receiver in this process; its port."""
    box = Receiver(settings.model_copy(update={"dicom_port": 0, **values}))
    port, _ = box.start()
    try:
        yield port
    finally:
        box.stop()


def line_to(port: int, source: str = "127.0.0.1") -> socket.socket:
    """A connection from one of the addresses of this machine."""
    return socket.create_connection(("127.0.0.1", port), timeout=30, source_address=(source, 0))


def is_closed(line: socket.socket) -> bool:
    """Wait until the receiver closes a connection."""
    try:
        return line.recv(1000) == b""
    except ConnectionResetError:
        return True


def associate(port: int) -> Association:
    entity = AE()
    entity.add_requested_context(Verification)
    entity.add_requested_context(ComputedRadiographyImageStorage)
    association = entity.associate("127.0.0.1", port)
    assert association.is_established
    return association


def fragment(length: int) -> bytes:
    """A P-DATA-TF PDU (PS3.8 9.3.5) with a part of a data set that is not its last."""
    value = b"\x01\x00" + bytes(length)
    item = len(value).to_bytes(4, "big") + value
    return b"\x04\x00" + len(item).to_bytes(4, "big") + item


def begin(association: Association) -> socket.socket:
    """Send a C-STORE command that announces a data set; returns the connection."""
    from pynetdicom.dimse_messages import C_STORE_RQ
    from pynetdicom.dimse_primitives import C_STORE

    primitive = C_STORE()
    primitive.MessageID, primitive.AffectedSOPClassUID, primitive.AffectedSOPInstanceUID = 1, ComputedRadiographyImageStorage, "1.2.3"
    primitive.Priority = 2
    message = C_STORE_RQ()
    message.primitive_to_message(primitive)
    message.command_set.CommandDataSetType = 1
    context = next(each.context_id for each in association.accepted_contexts if each.abstract_syntax == ComputedRadiographyImageStorage)
    for data in message.encode_msg(context, 16382):
        association.dul.send_pdu(data)
    assert association.dul.socket
    assert association.dul.socket.socket
    wait_for(lambda: association.dul.to_provider_queue.empty(), 10)
    return association.dul.socket.socket


def test_r45_one_machine_with_silent_connections_keeps_no_other_sender_out(settings: Settings) -> None:
    with receiver(settings) as (port, _), ExitStack() as stack:
        for number in range(80):
            line = stack.enter_context(line_to(port, "127.0.0.2"))
            if number % 2:
                line.sendall(_HALF_REQUEST)
        assert send(port, dataset()) == [0]


def test_r45_stopping_does_not_wait_for_silent_connections(settings: Settings) -> None:
    with receiver(settings) as (port, process), ExitStack() as stack:
        for content in (b"", _HALF_REQUEST):
            stack.enter_context(line_to(port)).sendall(content)
        association = associate(port)
        process.send_signal(signal.SIGTERM)
        assert process.wait(14) == 0  # after 15 seconds the supervisor kills
        association.abort()


@pytest.mark.parametrize("content", [b"", b"\x01", _HALF_REQUEST])
def test_r45_a_request_that_never_ends_loses_its_connection_and_threads(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(connections, "REQUEST_S", 1.5)
    before = set(threading.enumerate())
    with running(settings) as port, line_to(port) as line:
        line.sendall(content)
        assert is_closed(line)
        wait_for(lambda: not any("Acceptor" in thread.name for thread in set(threading.enumerate()) - before), 60)
        assert send(port, dataset()) == [0]


def test_r45_a_pdu_of_which_a_byte_comes_now_and_then_loses_its_connection(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_SILENCE_S", 1.0)
    with running(settings) as port:
        association = associate(port)
        line = begin(association)
        with pytest.raises(OSError, match=r"(?i)reset|broken pipe|bad file"):
            for byte in fragment(1 << 16):
                line.sendall(bytes([byte]))
                threading.Event().wait(0.05)
        association.abort()
        assert send(port, dataset()) == [0]


def test_r45_a_pdu_of_four_gigabytes_is_not_read(settings: Settings) -> None:
    with running(settings) as port, line_to(port) as line:
        line.sendall(b"\x01\x00\xff\xff\xff\xff")
        assert is_closed(line)
        assert send(port, dataset()) == [0]


def test_r45_a_data_set_without_an_end_is_not_kept_in_memory(settings: Settings) -> None:
    with running(settings, max_upload_bytes=1 << 20) as port:
        association = associate(port)
        line, sent = begin(association), 0
        with pytest.raises(OSError, match=r"(?i)reset|broken pipe|bad file"):
            while sent < 1 << 28:
                line.sendall(fragment(1 << 16))
                sent += 1 << 16
        assert sent < 1 << 25  # the limit, and what the sockets hold
        association.abort()
        assert send(port, dataset()) == [0]


def test_r45_data_sets_that_are_too_large_together_end_the_largest(settings: Settings) -> None:
    """Each of the two is allowed by itself."""
    with running(settings, max_upload_bytes=4 << 20, process_memory_max_bytes=1 << 20) as port:
        small, large = associate(port), associate(port)
        begin(small).sendall(fragment(1 << 20) * 2)
        line = begin(large)
        with pytest.raises(OSError, match=r"(?i)reset|broken pipe|bad file"):
            for _ in range(1 << 12):
                line.sendall(fragment(1 << 16))
        large.abort()
        assert small.is_established
        small.abort()
        assert send(port, dataset()) == [0]
