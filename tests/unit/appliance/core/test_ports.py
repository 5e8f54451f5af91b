"""Ports that the box opens, and the error that names the setting of one that it cannot open."""

from __future__ import annotations

import socket

import pytest

from appliance.core.errors import ApplianceError
from appliance.core.process import open_port


def test_localhost_is_the_address_that_nginx_is_given() -> None:
    with open_port("web_port", "localhost", 0) as opened:
        assert opened.getsockname()[0] == "127.0.0.1"


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_every_address_is_ipv4_too() -> None:
    with open_port("web_port", "::", 0) as opened, socket.create_connection(("127.0.0.1", opened.getsockname()[1]), timeout=10):
        opened.accept()[0].close()


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1"])
def test_a_port_in_use_and_an_address_of_another_machine_are_named(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ApplianceError, match=rf"web_port = {port}, {host}: ") as error:
            open_port("web_port", host, port)
    assert error.value.code == "box.port"
    assert "ss -ltnp" in error.value.hint
