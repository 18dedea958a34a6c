"""Tell whether an address is this machine's own, which nobody else can reach."""

import socket
from ipaddress import ip_address


def is_loopback(host: str) -> bool:
    """Tell whether all that a name or address stands for are loopback addresses."""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return all(ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)
