"""Which URLs may be asked for at all: judged beforehand, by the addresses that their hosts resolve to.

How an address is spelled says nothing: ``127.1``, ``0x7f.1``, ``2130706433`` and ``①②⑦.0.0.1`` are all loopback to the
resolver. So every host is resolved, once, and every answer must be public or inside ``download.allow_networks``.

What this does not do: the downloader resolves the name again and follows redirects by itself, so a server that
redirects to a private address, or a name server that answers differently the second time (DNS rebinding), gets past
this check. Both need a client that connects to the checked address, which is a separate piece of work.
"""

import concurrent.futures
import ipaddress
import logging
import math
import re
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from preprocessing.contracts.reasons import Reason

LOGGER = logging.getLogger(__name__)

MAX_URL_CHARS = 2048
RESOLVE_TIMEOUT_S = 10.0
_NUM_THREADS = 64

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Verdict = tuple[Reason, str]
Resolver = Callable[[str], list[Address]]

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


@dataclass(frozen=True)
class Target:
    """A URL whose form is right.

    Attributes:
        url: What is to be requested: in ASCII, with exactly the host below, without a fragment.
        host: A name or a literal address, lower case, without brackets.
    """

    url: str
    host: str


def is_public(address: Address) -> bool:
    """Whether an address is on the public internet; a v4-mapped IPv6 address counts as its IPv4 address."""
    address = _unmapped(address)
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
    authority = f"[{host}]" if ":" in host else host
    if port is not None:
        authority = f"{authority}:{port}"
    return Target(f"{scheme}://{authority}{target}", host)


def resolve(host: str) -> list[Address]:
    """Every address of a host, as the system's resolver has it.

    Raises:
        OSError: The name does not resolve (`socket.gaierror`).
    """
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return sorted(
        {ipaddress.ip_address(str(entry[4][0])) for entry in found}, key=lambda address: (address.version, int(address))
    )


def check_urls(
    urls: Iterable[str],
    allow_networks: Sequence[str] = (),
    resolver: Resolver = resolve,
    timeout_s: float = RESOLVE_TIMEOUT_S,
) -> dict[str, Target | Verdict]:
    """Judges URLs by form and address; each distinct host is resolved once.

    Args:
        urls: As they stand in the metadata; repeated ones are judged once.
        allow_networks: Address ranges allowed although they are not public.
        resolver: Gives a host's addresses, or raises OSError.
        timeout_s: How long a host may take to resolve, on average over the threads that do it.

    Returns:
        For each URL what to request; or, where it is refused, ``URL_REFUSED`` or ``HOST_UNKNOWN`` and what is wrong.
    """
    parsed = {url: parse_url(url) for url in urls}
    hosts = sorted({target.host for target in parsed.values() if isinstance(target, Target)})
    refused = check_hosts(hosts, allow_networks, resolver, timeout_s)
    return {
        url: refused.get(target.host, target) if isinstance(target, Target) else target
        for url, target in parsed.items()
    }


def check_hosts(
    hosts: Sequence[str],
    allow_networks: Sequence[str],
    resolver: Resolver = resolve,
    timeout_s: float = RESOLVE_TIMEOUT_S,
) -> Mapping[str, Verdict]:
    """Judges hosts by every address that they resolve to.

    Returns:
        The refused ones, with reason and what is wrong.
    """
    if not hosts:
        return {}
    allowed = tuple(ipaddress.ip_network(network) for network in allow_networks)
    pool = concurrent.futures.ThreadPoolExecutor(min(_NUM_THREADS, len(hosts)), thread_name_prefix="resolve")
    try:
        pending = {pool.submit(_check_host, host, allowed, resolver): host for host in hosts}
        # The resolver cannot be interrupted: threads that hang are left to its own time limit.
        concurrent.futures.wait(pending, timeout=timeout_s * math.ceil(len(hosts) / _NUM_THREADS))
        no_answer = (Reason.HOST_UNKNOWN, f"no answer from the resolver within {timeout_s:g} s")
        verdicts = {host: future.result() if future.done() else no_answer for future, host in pending.items()}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    refused = {host: verdict for host, verdict in verdicts.items() if verdict is not None}
    LOGGER.info("download: %d of %d hosts may be asked", len(hosts) - len(refused), len(hosts))
    return refused


def _check_host(host: str, allowed: Sequence[Network], resolver: Resolver) -> Verdict | None:
    try:
        addresses = resolver(host)
    except (OSError, UnicodeError) as error:
        return Reason.HOST_UNKNOWN, f"{host}: {getattr(error, 'strerror', None) or error}"
    if not addresses:
        return Reason.HOST_UNKNOWN, f"{host}: no address"
    for address in addresses:
        unmapped = _unmapped(address)
        if not is_public(address) and not any(unmapped in network for network in allowed):
            return Reason.URL_REFUSED, f"{host} is {address}, which is neither public nor in download.allow_networks"
    return None


def _unmapped(address: Address) -> Address:
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return address if mapped is None else mapped
