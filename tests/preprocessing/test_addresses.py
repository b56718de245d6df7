import ipaddress
import socket
import threading
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing.contracts.reasons import Reason
from preprocessing.download.addresses import (
    MAX_URL_CHARS,
    Address,
    Target,
    Verdict,
    is_public,
    parse_url,
    refuse_addresses,
)
from preprocessing.download.resolver import Resolver, lookup

# Refused by form: no resolver is asked.
BAD_FORM = [
    "",
    "cat.jpg",
    "//example.com/cat.jpg",
    "http:/127.0.0.1/cat.jpg",
    "http:///cat.jpg",
    "http://",
    "http://:80/",
    "file:///etc/passwd",
    "file://localhost/etc/passwd",
    "ftp://example.com/cat.jpg",
    "gopher://127.0.0.1:6379/_FLUSHALL",
    "dict://127.0.0.1:11211/stats",
    "ldap://127.0.0.1/",
    "jar:http://example.com!/cat.jpg",
    "javascript:alert(1)",
    "unix:///var/run/docker.sock",
    "data:image/png;base64,iVBORw0KGgo=",
    "httpx://example.com/",
    "http\n://example.com/",
    " http://example.com/cat.jpg",
    "http://example.com/cat.jpg ",
    "http://exam\nple.com/",
    "http://exam\tple.com/",
    "http://example.com/\r\nHost: 127.0.0.1",
    "http://example.com/\x00",
    "http:\\\\127.0.0.1\\",
    "http://example.com\\@127.0.0.1/",
    "http://good@127.0.0.1/",
    "http://user:password@example.com/",
    "http://example.com:80@127.0.0.1/",
    "http://@example.com/",
    "http://127%2e0%2e0%2e1/",
    "http://example.com%2f@127.0.0.1/",
    "http://example.com%00/",
    "http://[fe80::1%25eth0]/",
    "http://[fe80::1%eth0]/",
    "http://[::1/",
    "http://::1]/",
    "http://exam ple.com/",
    "http://example.com:0/",
    "http://example.com:/",
    "http://example.com:99999/",
    "http://example.com:80a/",
    "http://<script>/",
    "http://example.com/" + "a" * MAX_URL_CHARS,
    "http://" + "é" * 300 + "/",
]

# Refused by address. All are literals to the resolver: no name service is needed.
BAD_ADDRESS = [
    "http://127.0.0.1/",
    "https://127.0.0.1:8443/",
    "http://127.1/",
    "http://127.0.1/",
    "http://0x7f.1/",
    "http://0x7f000001/",
    "http://0x7F.0x0.0x0.0x1/",
    "http://2130706433/",
    "http://0177.0.0.1/",
    "http://017700000001/",
    "http://0/",
    "http://0.0.0.0/",
    "http://①②⑦.0.0.1/",
    "http://１２７.０.０.１/",
    "http://[::1]/",
    "http://[::]/",
    "http://[0:0:0:0:0:0:0:1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[::ffff:a9fe:a9fe]/",
    "http://[::127.0.0.1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[64:ff9b::169.254.169.254]/",
    "http://[64:ff9b:1::a9fe:a9fe]/",
    "http://[2002:7f00:1::]/",
    "http://[2002:a9fe:a9fe::1]/",
    "http://[2001::5601:5601]/",
    "http://[2001:db8::1]/",
    "http://[3fff::1]/",
    "http://[5f00::1]/",
    "http://[100::1]/",
    "http://[fc00::1]/",
    "http://[fd00:ec2::254]/latest/meta-data/",
    "http://[fe80::1]/",
    "http://[fec0::1]/",
    "http://[ff02::1]/",
    "http://169.254.169.254/latest/meta-data/",
    "http://2852039166/",
    "http://0xA9FEA9FE/",
    "http://0251.0376.0251.0376/",
    "http://169.254.43518/",
    "http://168.63.129.16/",
    "http://192.0.0.192/",
    "http://192.0.0.8/",
    "http://192.0.2.1/",
    "http://192.88.99.1/",
    "http://100.100.100.200/",
    "http://100.64.0.1/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://172.31.255.254/",
    "http://192.168.1.1/",
    "http://198.18.0.1/",
    "http://198.51.100.1/",
    "http://203.0.113.1/",
    "http://224.0.0.1/",
    "http://239.255.255.250/",
    "http://240.0.0.1/",
    "http://255.255.255.255/",
]

GOOD_ADDRESSES = ["1.1.1.1", "8.8.8.8", "100.63.255.255", "172.32.0.1", "193.0.0.1", "2606:4700::1111", "2a00:1450::1"]


def judge(url: str, allow_networks: Sequence[str] = (), ports: Sequence[int] = (80, 443)) -> Target | Verdict:
    """As the client does it, with the system's resolver."""
    target = parse_url(url)
    if not isinstance(target, Target):
        return target
    try:
        found = lookup(target.host)
    except (OSError, UnicodeError):
        return Reason.HOST_UNKNOWN, "a spelling that the resolver does not take"
    return refuse_addresses(target, found, [ipaddress.ip_network(net) for net in allow_networks], ports) or target


def target_of(url: str) -> Target:
    target = parse_url(url)
    assert isinstance(target, Target)
    return target


def test_the_tables_are_long_enough() -> None:
    assert len(set(BAD_FORM)) + len(set(BAD_ADDRESS)) >= 60


@pytest.mark.parametrize("url", BAD_FORM)
def test_refused_by_form(url: str) -> None:
    verdict = parse_url(url)
    assert isinstance(verdict, tuple)
    assert verdict[0] is Reason.URL_REFUSED
    assert verdict[1]


def test_refused_by_address() -> None:
    verdicts = {url: judge(url) for url in BAD_ADDRESS}
    for url, verdict in verdicts.items():
        assert isinstance(verdict, tuple), url
        # A resolver that does not take a spelling has refused it as well; none may come through.
        assert verdict[0] in (Reason.URL_REFUSED, Reason.HOST_UNKNOWN), url
    assert sum(verdict[0] is Reason.URL_REFUSED for verdict in verdicts.values() if isinstance(verdict, tuple)) > 50


def test_public_addresses_pass() -> None:
    for host in GOOD_ADDRESSES:
        url = f"http://[{host}]/a.jpg" if ":" in host else f"http://{host}/a.jpg"
        found = refuse_addresses(target_of(url), [ipaddress.ip_address(host)], (), (80, 443))
        assert found is None


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_no_ipv4_address_is_public_that_the_standard_library_calls_private(number: int) -> None:
    address = ipaddress.IPv4Address(number)
    mapped = ipaddress.IPv6Address(f"::ffff:{address}")
    assert is_public(address) == is_public(mapped)
    if not address.is_global or address.is_multicast:
        assert not is_public(address)


@settings(deadline=None)
@given(st.integers(0, 2**128 - 1))
def test_only_global_unicast_is_public(number: int) -> None:
    address = ipaddress.IPv6Address(number)
    if is_public(address) and address.ipv4_mapped is None:
        assert address.is_global
        assert not address.is_multicast
        assert address in ipaddress.IPv6Network("2000::/3")


def test_allowed_networks() -> None:
    urls = [
        "http://127.1:8000/a",
        "http://[::ffff:127.0.0.1]/",
        "http://[::1]/",
        "http://10.1.2.3/",
        "http://10.2.0.1/",
    ]
    verdicts = [judge(url, ["127.0.0.0/8", "10.1.0.0/16"]) for url in urls]
    assert [isinstance(verdict, Target) for verdict in verdicts] == [True, True, False, True, False]
    refused = verdicts[-1]
    assert isinstance(refused, tuple)
    assert "download.allow_networks" in refused[1]


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (["1.1.1.1", "2606:4700::1111"], None),
        (["1.1.1.1", "10.0.0.1"], Reason.URL_REFUSED),
        (["10.0.0.1", "1.1.1.1"], Reason.URL_REFUSED),
        (["2606:4700::1111", "::1"], Reason.URL_REFUSED),
        ([], Reason.HOST_UNKNOWN),
    ],
)
def test_every_answer_must_be_public(texts: list[str], reason: Reason | None) -> None:
    found = refuse_addresses(
        target_of("http://a.example/"), [ipaddress.ip_address(text) for text in texts], (), (80, 443)
    )
    assert (found and found[0]) == reason


def test_ports() -> None:
    public, own = [ipaddress.ip_address("1.1.1.1")], [ipaddress.ip_address("10.0.0.1")]
    networks = [ipaddress.ip_network("10.0.0.0/8")]
    for url, is_allowed in (("http://a.example", True), ("https://a.example", True), ("http://a.example:443", True)):
        assert (refuse_addresses(target_of(url), public, networks, (80, 443)) is None) == is_allowed
    for port in (22, 25, 6379, 8080):
        target = target_of(f"http://a.example:{port}/")
        refused = refuse_addresses(target, public, networks, (80, 443))
        assert refused is not None
        assert "download.allow_ports" in refused[1]
        assert refuse_addresses(target, own, networks, (80, 443)) is None  # one's own, on any port
        assert refuse_addresses(target, public, networks, (80, 443, port)) is None


def _public(host: str) -> list[Address]:
    return [ipaddress.ip_address("1.1.1.1")]


def test_each_host_is_resolved_once_however_many_ask() -> None:
    asked: list[str] = []
    release = threading.Event()

    def look_up(host: str) -> list[Address]:
        asked.append(host)
        release.wait(30)
        return _public(host)

    resolver = Resolver(60, look_up)
    found: list[tuple[Address, ...]] = []
    threads = [
        threading.Thread(
            target=lambda host: found.append(resolver.addresses(host, 30)), args=(f"{number % 2}.example",)
        )
        for number in range(40)
    ]
    for thread in threads:
        thread.start()
    release.set()
    for thread in threads:
        thread.join()
    assert resolver.addresses("0.example", 30) == found[0]
    assert sorted(asked) == ["0.example", "1.example"]
    assert len(found) == 40
    resolver.close()


def test_answers_are_forgotten_after_a_while_and_when_there_are_too_many() -> None:
    asked: list[str] = []

    def look_up(host: str) -> list[Address]:
        asked.append(host)
        return _public(host)

    brief = Resolver(1e-9, look_up)
    for _ in range(3):
        brief.addresses("a.example", 30)
    assert asked == ["a.example"] * 3
    small = Resolver(60, look_up, max_hosts=2)
    asked.clear()
    for host in "abcabc":
        small.addresses(host, 30)
    assert asked == list("abcabc")
    brief.close()
    small.close()


def test_a_name_that_does_not_resolve() -> None:
    asked: list[str] = []

    def look_up(host: str) -> list[Address]:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    resolver = Resolver(60, look_up)
    for _ in range(3):
        with pytest.raises(OSError, match="Name or service not known"):
            resolver.addresses("nowhere.invalid", 30)
    assert asked == ["nowhere.invalid"]
    resolver.close()


def test_a_resolver_that_hangs_costs_bounded_time() -> None:
    release = threading.Event()

    def look_up(host: str) -> list[Address]:
        if host == "hangs.example":
            release.wait(60)
        return _public(host)

    resolver = Resolver(60, look_up, num_threads=2)
    started = time.monotonic()
    try:
        with pytest.raises(TimeoutError):
            resolver.addresses("hangs.example", 0.5)
        assert resolver.addresses("good.example", 30) == tuple(_public(""))
    finally:
        release.set()
    assert time.monotonic() - started < 20
    assert resolver.addresses("hangs.example", 30) == tuple(_public(""))  # it came at last
    resolver.close()


@pytest.mark.parametrize(
    ("url", "requested"),
    [
        ("http://example.com", "http://example.com/"),
        ("HTTPS://EXAMPLE.com:444/Cat.JPG", "https://example.com:444/Cat.JPG"),
        ("http://example.com/a b/ü.jpg?q=ü#part", "http://example.com/a%20b/%C3%BC.jpg?q=%C3%BC"),
        ("http://example.com/a%20b%2Fc?x=1&y=%26", "http://example.com/a%20b%2Fc?x=1&y=%26"),
        ("http://example.com//evil.example/", "http://example.com//evil.example/"),
        ("http://example.com?x=http://127.0.0.1/@", "http://example.com/?x=http://127.0.0.1/@"),
        ("http://bücher.example/", "http://xn--bcher-kva.example/"),
        ("http://[2606:4700::1111]:81/", "http://[2606:4700::1111]:81/"),
    ],
)
def test_what_is_requested(url: str, requested: str) -> None:
    target = parse_url(url)
    assert isinstance(target, Target)
    assert target.url == requested


@settings(deadline=None)
@given(st.one_of(st.text(max_size=60), st.text(max_size=40).map(lambda text: f"http://{text}")))
def test_whatever_is_requested_has_the_host_that_was_judged(url: str) -> None:
    target = parse_url(url)
    if isinstance(target, Target):
        assert target.url.isascii()
        again = parse_url(target.url)
        assert again == target  # a second reader sees the same host, and nothing changes any more
