"""Which URLs and addresses may be asked at all.

How an address is spelled says nothing: ``127.1``, ``0x7f.1``, ``2130706433`` and ``①②⑦.0.0.1`` are all loopback to the
resolver. So a URL is judged twice: by its form here (`parse_url`), and, once its host is resolved, by every address
that came back (`refuse_addresses`). The client connects to one of the judged addresses and to nothing else, and judges
each redirect from scratch, so neither a redirect nor a name server that changes its mind (DNS rebinding) gets past
this.

What cannot be seen from here: a NAT64 prefix of one's own network (RFC 6052 allows any), where IPv4 addresses hide in
public IPv6 ones. Whoever runs one should run the download where private networks are out of its reach.
"""

import functools
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from preprocessing.contracts.reasons import Reason

MAX_URL_CHARS = 2048
DEFAULT_PORTS = {"http": 80, "https": 443}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Verdict = tuple[Reason, str]

# `ipaddress.is_global` is not enough: it has changed within Python 3.11 and 3.12, and says True for multicast, NAT64,
# 6to4, and a cloud's own metadata addresses.
_DENIED_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this host
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier-grade NAT; Alibaba's metadata service
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's host
        "169.254.0.0/16",  # link-local; the metadata service of most clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # IETF protocol assignments; Oracle's metadata service
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
# Only 2000::/3 is global unicast. Outside of it lie loopback, v4-mapped and v4-compatible addresses, NAT64
# (64:ff9b::/96, 64:ff9b:1::/48), discard-only (100::/64), segment routing (5f00::/16), unique-local and
# link-local addresses, and multicast.
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_DENIED_V6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # IETF protocol assignments: Teredo, benchmarks, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: any IPv4 address, private ones included
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+", re.ASCII)
_SAFE = "/:@!$&'()*+,;=?%~[]|"  # what `quote` leaves alone: everything that is not forbidden in a request line


@dataclass(frozen=True, slots=True)
class Target:
    """A URL whose form is right.

    Attributes:
        url: What is to be requested: in ASCII, with exactly the host below, without a fragment.
        scheme: ``http`` or ``https``.
        host: A name or a literal address, lower case, without brackets.
        port: The scheme's own where the URL names none.
        path: What stands in the request line: path and query.
    """

    url: str
    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """Host and port as the Host header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        return f"{self.scheme}://{self.authority}"


@functools.lru_cache(maxsize=65_536)
def is_public(address: Address) -> bool:
    """Whether an address is on the public internet; a v4-mapped IPv6 address counts as its IPv4 address."""
    address = unmapped(address)
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _DENIED_V4) and address.is_global
    return address in _GLOBAL_V6 and not any(address in network for network in _DENIED_V6) and address.is_global


def parse_url(url: str) -> Target | Verdict:
    """Judges a URL's form, and spells it so that no two readers can see different hosts in it.

    Args:
        url: As it stands in the metadata.

    Returns:
        What to request; or, where it is refused, the reason and what is wrong.
    """
    if len(url) > MAX_URL_CHARS:
        return Reason.URL_REFUSED, f"{len(url)} characters are over {MAX_URL_CHARS}"
    if _FORBIDDEN.search(url) or url != url.strip():
        return Reason.URL_REFUSED, "it has a control character, a backslash, or a blank at an end"
    try:
        parts = urlsplit(url)
        port = parts.port
        host = parts.hostname or ""
    except ValueError as error:
        return Reason.URL_REFUSED, str(error)
    if parts.scheme not in ("http", "https"):
        return Reason.URL_REFUSED, f"scheme {parts.scheme[:20]!r} is neither http nor https"
    if "@" in parts.netloc:
        return Reason.URL_REFUSED, "it carries a user name"
    if port == 0 or parts.netloc.endswith(":"):
        return Reason.URL_REFUSED, "its port is empty or 0"
    return _spell(parts.scheme, host, port, parts.path, parts.query)


def _spell(scheme: str, host: str, port: int | None, path: str, query: str) -> Target | Verdict:
    try:
        host = host if host.isascii() else host.encode("idna").decode("ascii").lower()
    except UnicodeError:
        return Reason.URL_REFUSED, f"{host[:60]!r} is no host name"
    # A percent sign would be decoded by some readers (and is an IPv6 zone to others): it never gets further than this.
    if not _HOST.fullmatch(host):
        return Reason.URL_REFUSED, f"{host[:60]!r} is no host name"
    try:
        target = quote(path or "/", safe=_SAFE) + (f"?{quote(query, safe=_SAFE)}" if query else "")
    except UnicodeError:
        return Reason.URL_REFUSED, "it has a character that no encoding has"
    named = DEFAULT_PORTS[scheme] if port is None else port
    authority = f"[{host}]" if ":" in host else host
    suffix = "" if port is None else f":{port}"
    return Target(f"{scheme}://{authority}{suffix}{target}", scheme, host, named, target)


def unmapped(address: Address) -> Address:
    """An address; a v4-mapped IPv6 address as the IPv4 address that it is."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return address if mapped is None else mapped


def refuse_addresses(
    target: Target, addresses: Sequence[Address], allow_networks: Sequence[Network], allow_ports: Sequence[int]
) -> Verdict | None:
    """Judges a URL by all addresses of its host; one bad answer is enough.

    Args:
        target: The URL.
        addresses: What its host resolves to.
        allow_networks: Address ranges allowed although they are not public, and on any port.
        allow_ports: Ports that public addresses may be asked on.

    Returns:
        Reason and what is wrong; None where the URL may be asked for.
    """
    if not addresses:
        return Reason.HOST_UNKNOWN, f"{target.host}: no address"
    for address in addresses:
        plain = unmapped(address)
        if any(plain in network for network in allow_networks):
            continue
        if not is_public(plain):
            return (
                Reason.URL_REFUSED,
                f"{target.host} is {address}, which is neither public nor in download.allow_networks",
            )
        if target.port not in allow_ports:
            return Reason.URL_REFUSED, f"port {target.port} is not in download.allow_ports"
    return None
