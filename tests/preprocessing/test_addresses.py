import ipaddress
import socket
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing.contracts.reasons import Reason
from preprocessing.download.addresses import (
    MAX_URL_CHARS,
    Address,
    Target,
    check_urls,
    is_public,
    parse_url,
)

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


def _never(host: str) -> list[Address]:
    raise AssertionError(f"{host!r} must not be resolved")


def test_the_tables_are_long_enough() -> None:
    assert len(set(BAD_FORM)) + len(set(BAD_ADDRESS)) >= 60


@pytest.mark.parametrize("url", BAD_FORM)
def test_refused_by_form(url: str) -> None:
    verdict = check_urls([url], ["0.0.0.0/0", "::/0"], resolver=_never)[url]
    assert isinstance(verdict, tuple)
    assert verdict[0] is Reason.URL_REFUSED
    assert verdict[1]


def test_refused_by_address() -> None:
    verdicts = check_urls(BAD_ADDRESS)
    for url in BAD_ADDRESS:
        verdict = verdicts[url]
        assert isinstance(verdict, tuple), url
        # A resolver that does not take a spelling has refused it as well; none may come through.
        assert verdict[0] in (Reason.URL_REFUSED, Reason.HOST_UNKNOWN), url
    assert sum(verdict[0] is Reason.URL_REFUSED for verdict in verdicts.values() if isinstance(verdict, tuple)) > 50


def test_public_addresses_pass() -> None:
    urls = [f"http://[{host}]/a.jpg" if ":" in host else f"http://{host}/a.jpg" for host in GOOD_ADDRESSES]
    assert check_urls(urls) == {url: Target(url, host) for url, host in zip(urls, GOOD_ADDRESSES, strict=True)}


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
    verdicts = check_urls(urls, ["127.0.0.0/8", "10.1.0.0/16"])
    assert [isinstance(verdicts[url], Target) for url in urls] == [True, True, False, True, False]
    refused = verdicts["http://10.2.0.1/"]
    assert isinstance(refused, tuple)
    assert "download.allow_networks" in refused[1]


def test_every_answer_must_be_public() -> None:
    answers: dict[str, list[Address]] = {
        "both.example": [ipaddress.ip_address("1.1.1.1"), ipaddress.ip_address("10.0.0.1")],
        "good.example": [ipaddress.ip_address("1.1.1.1"), ipaddress.ip_address("2606:4700::1111")],
        "none.example": [],
    }
    verdicts = check_urls([f"http://{host}/" for host in answers], resolver=answers.__getitem__)
    assert isinstance(verdicts["http://good.example/"], Target)
    both, none = verdicts["http://both.example/"], verdicts["http://none.example/"]
    assert isinstance(both, tuple)
    assert both[0] is Reason.URL_REFUSED
    assert isinstance(none, tuple)
    assert none[0] is Reason.HOST_UNKNOWN


def test_each_host_is_resolved_once() -> None:
    asked: list[str] = []

    def resolver(host: str) -> list[Address]:
        asked.append(host)
        return [ipaddress.ip_address("1.1.1.1")]

    urls = [
        f"http://{host}:{port}/{page}"
        for host in ("A.example", "a.example", "b.example")
        for port in (80, 81)
        for page in "xy"
    ]
    verdicts = check_urls(urls, resolver=resolver)
    assert sorted(asked) == ["a.example", "b.example"]
    assert all(isinstance(verdict, Target) for verdict in verdicts.values())


def test_a_name_that_does_not_resolve() -> None:
    def resolver(host: str) -> list[Address]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    verdict = check_urls(["http://nowhere.invalid/"], resolver=resolver)["http://nowhere.invalid/"]
    assert verdict == (Reason.HOST_UNKNOWN, "nowhere.invalid: Name or service not known")


def test_a_resolver_that_hangs_costs_bounded_time() -> None:
    release = threading.Event()

    def resolver(host: str) -> list[Address]:
        if host == "hangs.example":
            release.wait(60)
        return [ipaddress.ip_address("1.1.1.1")]

    started = time.monotonic()
    try:
        verdicts = check_urls(["http://hangs.example/", "http://good.example/"], resolver=resolver, timeout_s=0.5)
    finally:
        release.set()
    assert time.monotonic() - started < 30
    assert isinstance(verdicts["http://good.example/"], Target)
    hanging = verdicts["http://hangs.example/"]
    assert isinstance(hanging, tuple)
    assert hanging[0] is Reason.HOST_UNKNOWN


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
