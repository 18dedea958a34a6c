"""The names that an open service answers to.

A page on the internet can point its own name at an address of the reader's machine or network (DNS
rebinding), and then read what a service without API keys answers there. The browser still sends the
page's name as ``Host``. An address cannot be pointed elsewhere, so any address is answered.
"""

import re
from collections.abc import Iterable
from ipaddress import ip_address

from dropserve.app.errors import Misdirected

ANY = "*"
LOCALHOST = "localhost"
# An address of IPv6 in brackets, or a name or address of IPv4; and the port.
HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]*))(?::[0-9]*)?")
# Values of the header that are remembered as allowed; clients send few different ones.
MOST_KNOWN = 1000
LONGEST_QUOTE = 100


class Hosts:
    """The names that a service is called by.

    Parameters
    ----------
    names
        Names beside loopback names and addresses; ``*``: any.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = {name.lower().rstrip(".") for name in names}
        # A client of HTTP/1.0 need not send the header.
        self.known = {b""}

    def check(self, host: bytes) -> None:
        """Raise Misdirected if the header ``Host`` holds another name."""
        if host in self.known:
            return
        if not self.allows(host.decode("latin-1")):
            raise Misdirected(
                f"without API keys the service answers to addresses, to {LOCALHOST} and to the "
                f"names in DROPSERVE_HOSTS, not to {host[:LONGEST_QUOTE].decode('latin-1')!r}"
            )
        if len(self.known) < MOST_KNOWN:
            self.known.add(host)

    def allows(self, host: str) -> bool:
        """Tell whether a value of the header ``Host`` is allowed."""
        if ANY in self.names:
            return True
        found = HOST.fullmatch(host)
        if found is None:
            return False
        name = (found[1] or found[2]).lower().rstrip(".")
        if name in self.names or name == LOCALHOST or name.endswith(f".{LOCALHOST}"):
            return True
        try:
            ip_address(name)
        except ValueError:
            return False
        return True
