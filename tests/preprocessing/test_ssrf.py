"""No URL, redirect or name server makes the fetch connect to an address that it must not.

Two oracles: canary listeners on loopback accept nothing, and an audit hook sees every address that this process
connects to. The front server, which is allowed and does the redirecting, has an address of its own (127.0.0.2).
"""

import ipaddress
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

import pytest

from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.reasons import Reason
from preprocessing.download.addresses import Address
from preprocessing.download.http_client import Answer, HttpClient
from preprocessing.download.resolver import Resolver, lookup
from tests.preprocessing.hostile_server import RawServer, redirector, reply

FRONT = "127.0.0.2"
CODES = (301, 302, 303, 307, 308)

SPECIAL_V4 = (
    "127.0.0.1",
    "127.0.0.3",
    "127.255.255.254",
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
)
SPECIAL_V6 = (
    "::1",
    "::",
    "fe80::1",
    "fc00::1",
    "fd00:ec2::254",
    "ff02::1",
    "100::1",
    "5f00::1",
    "2001:db8::1",
    "3fff::1",
)


def spellings(address: str) -> dict[str, str]:
    """A host in every way that somebody may read as an address."""
    number = int(ipaddress.IPv4Address(address))
    a, b, c, d = address.split(".")
    high, low = number >> 16, number & 0xFFFF
    inverted = number ^ 0xFFFFFFFF
    return {
        "dotted": address,
        "trailing_dot": f"{address}.",
        "decimal": str(number),
        "hexadecimal": f"0x{number:x}",
        "hexadecimal_parts": f"0x{int(a):x}.0x{int(b):x}.0x{int(c):x}.0x{int(d):x}",
        "octal": f"0{int(a):o}.0{int(b):o}.0{int(c):o}.0{int(d):o}",
        "octal_number": f"0{number:o}",
        "two_parts": f"{a}.{number & 0xFFFFFF}",
        "three_parts": f"{a}.{b}.{number & 0xFFFF}",
        "full_width": address.translate({ord("0") + digit: 0xFF10 + digit for digit in range(10)}),
        "circled": address.replace("1", "①").replace("2", "②").replace("7", "⑦"),
        "ideographic_dots": address.replace(".", "。"),
        "percent": address.replace(".", "%2e"),
        "mapped": f"[::ffff:{address}]",
        "mapped_hexadecimal": f"[::ffff:{high:x}:{low:x}]",
        "compatible": f"[::{address}]",
        "translated": f"[::ffff:0:{address}]",
        "nat64": f"[64:ff9b::{address}]",
        "nat64_local": f"[64:ff9b:1::{high:x}:{low:x}]",
        "6to4": f"[2002:{high:x}:{low:x}::1]",
        "teredo": f"[2001:0:4136:e378:8000:63bf:{inverted >> 16:x}:{inverted & 0xFFFF:x}]",
        "zone": f"[fe80::{high:x}:{low:x}%25lo]",
    }


# These do arrive at the address, if one lets them: the test of the test.
REAL = (
    "dotted",
    "decimal",
    "hexadecimal",
    "hexadecimal_parts",
    "octal",
    "octal_number",
    "two_parts",
    "three_parts",
    "full_width",
    "circled",
    "mapped",
    "mapped_hexadecimal",
)

BAD_FORM = (
    "file:///etc/passwd",
    "ftp://127.0.0.1:{port}/a",
    "gopher://127.0.0.1:{port}/_GET",
    "dict://127.0.0.1:{port}/stats",
    "ldap://127.0.0.1:{port}/",
    "jar:http://127.0.0.1:{port}!/a",
    "unix:///var/run/docker.sock",
    "data:image/png;base64,iVBORw0KGgo=",
    "javascript:alert(1)",
    "ws://127.0.0.1:{port}/",
    "httpx://127.0.0.1:{port}/",
    "http:\\\\127.0.0.1:{port}\\",
    "http://front.example\\@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}\\@front.example/",
    "http://front.example@127.0.0.1:{port}/",
    "http://front.example:80@127.0.0.1:{port}/",
    "http://a:b@127.0.0.1:{port}/",
    "http://@127.0.0.1:{port}/",
    "http://front.example%2f@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}\t/",
    "http://127.0.\t0.1:{port}/",
    "http://[::1%25lo]:{port}/",
    "http://[::1%lo]:{port}/",
    "http://[127.0.0.1]:{port}/",
    "http://[::ffff:127.0.0.1:{port}/",
    "http:///127.0.0.1:{port}/",
    "http://:{port}/",
    "http://127.0.0.1:{port}:80/",
    "http://127.0.0.1 :{port}/",
    "http://127.0.0.1%00.front.example:{port}/",
    "http://127.0.0.1%23@front.example:{port}/",
)
BAD_PORTS = (0, 1, 7, 19, 21, 22, 23, 25, 110, 143, 445, 2049, 2375, 3306, 5432, 6379, 9200, 11211, 27017, 65535)


@dataclass
class World:
    """The front server, the canaries, and what was connected to."""

    front: RawServer
    canaries: Sequence[RawServer]
    names: dict[str, list[list[Address]]] = field(default_factory=dict)  # the answers to one question after another
    num_asked: dict[str, int] = field(default_factory=dict)
    connected: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        return self.canaries[0].port

    @property
    def num_calls(self) -> int:
        return sum(canary.num_connections for canary in self.canaries)

    def look_up(self, host: str) -> list[Address]:
        answers = self.names.get(host)
        if answers is None:
            return lookup(host)
        count = self.num_asked[host] = self.num_asked.get(host, 0) + 1
        return answers[min(count, len(answers)) - 1]

    def client(self, *networks: str, ttl_s: float = 60.0, **settings: object) -> HttpClient:
        config = {
            "allow_networks": [f"{FRONT}/32", *networks],
            "allow_ports": [80, 443, self.port, self.front.port],
            "timeout_s": 2,
            "deadline_s": 5,
            "retries": 0,
            "max_host_failures": 0,
        }
        return HttpClient(
            DownloadConfig.model_validate(config | settings), resolver=Resolver(ttl_s, self.look_up, num_threads=4)
        )

    def redirects(self, url: str, codes: Sequence[int] = CODES) -> dict[str, str]:
        target = quote(url, safe="")
        ways = {f"{code}": f"http://{FRONT}:{self.front.port}/{code}?{target}" for code in codes}
        return ways | {"chain": f"http://{FRONT}:{self.front.port}/chain3/302?{target}"}


_watched: list[World] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _watched and event == "socket.connect":
        address = arguments[1]
        if isinstance(address, tuple):
            _watched[0].connected.append(str(address[0]))


sys.addaudithook(_hook)


def addresses(*texts: str) -> list[Address]:
    return [ipaddress.ip_address(text) for text in texts]


@pytest.fixture
def world() -> Iterator[World]:
    def canary(connection: socket.socket, path: str, request: bytes) -> None:
        connection.sendall(reply("200 OK", body=b"secret"))

    front = RawServer(redirector, FRONT)
    canaries = [RawServer(canary, "127.0.0.1")]
    for address in ("127.0.0.3", "127.255.255.254", "::1"):
        try:
            canaries.append(RawServer(canary, address, canaries[0].port))
        except OSError:
            continue  # no IPv6 here
    found = World(front, canaries)
    found.names = {
        "front.example": [addresses(FRONT)],
        "two-answers.example": [addresses(FRONT, "127.0.0.1")],
        "two-answers-6.example": [addresses(FRONT, "::1")],
        "private.example": [addresses("127.0.0.1")],
        "metadata.example": [addresses("169.254.169.254")],
        "rebinding.example": [addresses(FRONT), addresses("127.0.0.1")],
        "public.example": [addresses("1.1.1.1")],
    }
    _watched.append(found)
    yield found
    _watched.clear()
    for server in (front, *canaries):
        server.close()


def ask(client: HttpClient, url: str) -> Answer | tuple[Reason, str]:
    with client.get(url) as answer:
        return answer


def vectors(world: World) -> Mapping[str, str]:
    """Name → URL. Every one must come to nothing."""
    found: dict[str, str] = {}
    hosts = {f"{address} {name}": host for address in SPECIAL_V4 for name, host in spellings(address).items()}
    hosts |= {address: f"[{address}]" for address in SPECIAL_V6}
    hosts |= {
        name: name for name in world.names if name not in ("front.example", "rebinding.example", "public.example")
    }
    for name, host in hosts.items():
        url = f"http://{host}:{world.port}/latest/meta-data/"
        found[name] = url
        codes = CODES if name.startswith(("127.0.0.1 ", "169.254")) or " " not in name else CODES[1:2]
        found |= {f"{name} by {way}": start for way, start in world.redirects(url, codes).items()}
        found[f"{name} by //"] = world.redirects(url.removeprefix("http:"), (302,))["302"]
        found[f"https {name}"] = url.replace("http:", "https:")
    for form in BAD_FORM:
        url = form.format(port=world.port)
        found[form] = url
        found |= {f"{form} by {way}": start for way, start in world.redirects(url).items()}
    for port in BAD_PORTS:
        found[f"port {port}"] = f"http://public.example:{port}/"
        found |= {
            f"port {port} by {way}": at for way, at in world.redirects(f"http://public.example:{port}/", (302,)).items()
        }
    return found


def test_no_vector_connects(world: World) -> None:
    asked = vectors(world)
    assert len(asked) >= 300
    with world.client() as client:
        wrong = {name: said for name, url in asked.items() if isinstance(said := ask(client, url), Answer)}
    # A redirect to what is no URL at all may be read as a path of the front server's, which is harmless.
    assert all(said.url.startswith(f"http://{FRONT}:{world.front.port}/") for said in wrong.values())
    assert all(said.data == b"picture" for said in wrong.values())
    assert {name for name in wrong if "by" not in name} == set()
    assert world.num_calls == 0
    assert set(world.connected) == {FRONT}
    assert len(world.front.requests) > 300  # the redirects were followed as far as they may be


def test_the_canaries_sing_where_they_may(world: World) -> None:
    """With allow_networks the same URLs do connect: nothing else than the judgement of addresses keeps them out."""
    with world.client("127.0.0.0/8", "::1/128") as client:
        for name in REAL:
            url = f"http://{spellings('127.0.0.1')[name]}:{world.port}/latest/meta-data/"
            for way, start in {"direct": url, **world.redirects(url)}.items():
                said = ask(client, start)
                assert isinstance(said, Answer), (name, way, said)
                assert said.data == b"secret"
        for name in ("two-answers.example", "private.example"):
            said = ask(client, f"http://{name}:{world.port if name[0] == 'p' else world.front.port}/")
            assert isinstance(said, Answer), (name, said)
        if len(world.canaries) == 4:
            assert isinstance(ask(client, f"http://[::1]:{world.port}/"), Answer)
    assert world.num_calls > 0


def test_a_name_server_that_changes_its_mind(world: World) -> None:
    """The first answer is good, every later one is the canary's; the cache is useless, so each request asks again."""
    with world.client(ttl_s=1e-9) as client:
        first = ask(client, f"http://rebinding.example:{world.front.port}/")
        assert isinstance(first, Answer)
        later = [ask(client, f"http://rebinding.example:{port}/") for port in (world.front.port, world.port) * 10]
        by_redirect = ask(client, world.redirects(f"http://rebinding.example:{world.port}/")["302"])
    assert world.num_asked["rebinding.example"] > 20
    for said in (*later, by_redirect):
        assert isinstance(said, tuple)
        assert said[0] is Reason.URL_REFUSED
    assert world.num_calls == 0
    assert set(world.connected) == {FRONT}


def test_a_name_is_asked_for_once(world: World) -> None:
    with world.client() as client:
        for number in range(20):
            assert isinstance(ask(client, f"http://rebinding.example:{world.front.port}/{'x' * number}"), Answer)
    assert world.num_asked == {"rebinding.example": 1}
    assert world.front.num_connections == 1  # and the connection was kept


def test_the_environments_proxies_are_ignored(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{world.port}")
    with world.client() as client:
        assert isinstance(ask(client, f"http://front.example:{world.front.port}/"), Answer)
    assert world.num_calls == 0


def test_nothing_is_told_that_was_not_asked(world: World) -> None:
    """No cookie comes back, no referrer, no credentials; who asks is said truthfully."""
    with world.client(user_agent_token="MyBot", user_agent_contact="https://my.example/bot") as client:
        for _ in range(2):
            ask(client, world.redirects(f"http://front.example:{world.front.port}/a?b=c")["302"])
    assert len(world.front.requests) == 4
    for request in world.front.requests:
        names = {line.split(b":")[0].lower() for line in request.split(b"\r\n")[1:]}
        assert names == {b"host", b"user-agent", b"accept", b"accept-encoding"}
        assert b"Accept-Encoding: identity" in request
        assert b"MyBot/" in request
        assert b"+https://my.example/bot" in request
        assert b"Mozilla" not in request
    assert b"GET /a?b=c HTTP/1.1\r\nHost: front.example:" in world.front.requests[-1]
