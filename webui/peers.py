"""Which machine an address stands for, where tries or connections are counted."""

from __future__ import annotations

import ipaddress


def machine(host: str) -> str:
    """The machine behind an address: of IPv6 the network (/64), in which one machine has as many addresses as it likes.

    On the link itself (``fe80::``) every neighbour shares one network, so there the address counts.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address) or address.is_link_local or address.is_loopback:
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
