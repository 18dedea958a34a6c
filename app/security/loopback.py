"""Recognize loopback addresses, which no other machine can reach."""

import socket
from ipaddress import ip_address


def is_loopback(host: str) -> bool:
    """Tell whether a name or address resolves to loopback addresses only."""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return all(ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)
