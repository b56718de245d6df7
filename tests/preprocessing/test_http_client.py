"""The client against servers that behave badly: it always ends in time, with a named reason and little memory."""

import contextlib
import ipaddress
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.reasons import Reason
from preprocessing.download import connections
from preprocessing.download.addresses import Address
from preprocessing.download.http_client import Answer, HttpClient, user_agent
from preprocessing.download.ledger import MEMORY, Memory
from preprocessing.download.opt_out import OptOutMemory
from preprocessing.download.resolver import Resolver
from tests.preprocessing.hostile_server import BEHAVIOURS, RawServer, certificate, hostile, reply

DEADLINE_S = 2.0
BODY = 100_000

TIMED_OUT, BAD, TOO_LARGE = {Reason.TIMED_OUT}, {Reason.BAD_RESPONSE}, {Reason.BODY_TOO_LARGE}
CUT = {Reason.IMAGE_TRUNCATED}
EXPECTED: dict[str, set[Reason]] = {
    "silence": TIMED_OUT,
    "hangs_up": {Reason.CONNECTION_FAILED},
    "resets": {Reason.CONNECTION_FAILED},
    "resets_in_body": {Reason.CONNECTION_FAILED, Reason.IMAGE_TRUNCATED},
    **dict.fromkeys((name for name in BEHAVIOURS if name.startswith("drips_")), TIMED_OUT),
    "header_flood": BAD,
    "header_line_of_a_megabyte": BAD,
    "header_line_without_end": BAD,
    "headers_101": BAD,
    "headers_of_60_kb": BAD,
    "continue_flood": BAD,
    "status_line_without_end": BAD,
    "endless_body": TOO_LARGE,
    "endless_chunks": TOO_LARGE,
    "endless_one_byte_chunks": TOO_LARGE | BAD | TIMED_OUT,
    "endless_chunk_extension": BAD,
    "endless_trailers": BAD,
    "one_endless_chunk": TOO_LARGE,
    "chunk_of_minus_one": BAD,
    "chunk_size_no_number": BAD,
    "chunks_without_end": CUT,
    "length_of_10_gb": TOO_LARGE,
    "length_of_30_digits": TOO_LARGE,
    "length_of_5000_digits": TOO_LARGE,
    "length_negative": TOO_LARGE,
    "length_no_number": TOO_LARGE,
    "two_lengths": BAD,
    "length_and_then_less": CUT,
    "length_and_then_silence": TIMED_OUT,
    "gzip_bomb": BAD,
    "not_http": BAD,
    "http_0_9": BAD,
    "http_9_9": BAD,
    "status_no_number": BAD,
    "status_999": BAD,
    "switching_protocols": BAD,
    "redirect_loop": {Reason.TOO_MANY_REDIRECTS},
    "redirect_chain": {Reason.TOO_MANY_REDIRECTS},
    "redirect_to_nowhere": BAD,
    "redirect_to_a_megabyte": BAD,
    "redirect_of_60_kb": {Reason.URL_REFUSED},
    "redirect_with_an_endless_page": BAD,
    "error_with_an_endless_page": {Reason.HTTP_CLIENT_ERROR},
    "pause_of_a_year": {Reason.HTTP_SERVER_ERROR, Reason.RATE_LIMITED},
    "nul_in_headers": set(),  # an empty answer, which the decoder refuses
}


def config_of(**settings: object) -> DownloadConfig:
    defaults: dict[str, object] = {
        "allow_networks": ["127.0.0.0/8"],
        "timeout_s": 1,
        "deadline_s": DEADLINE_S,
        "max_body_bytes": BODY,
        "retries": 0,
    }
    return DownloadConfig.model_validate(defaults | settings)


def ask(client: HttpClient, url: str) -> Answer | tuple[Reason, str]:
    with client.get(url) as answer:
        return answer


def refused(said: Answer | tuple[Reason, str]) -> Reason:
    assert isinstance(said, tuple), said
    return said[0]


def body_of(said: Answer | tuple[Reason, str]) -> bytes:
    assert isinstance(said, Answer), said
    return said.data


Handle = Callable[[socket.socket, str, bytes], None]


@contextlib.contextmanager
def serving(handle: Handle) -> Iterator[tuple[RawServer, str]]:
    with RawServer(handle) as server:
        yield server, f"http://127.0.0.1:{server.port}"


def always(answer: bytes) -> Handle:
    return lambda connection, path, request: connection.sendall(answer)


def test_there_are_forty() -> None:
    assert len(BEHAVIOURS) >= 40
    assert set(EXPECTED) == set(BEHAVIOURS)


def test_hostile_behaviours(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, as in life; each by itself within the deadline."""
    monkeypatch.setattr(connections, "RATE_GRACE_S", 0.5)
    found: dict[str, tuple[Answer | tuple[Reason, str], float]] = {}
    with serving(hostile) as (_, site), HttpClient(config_of(max_connections_per_host=100)) as client:

        def run(name: str) -> None:
            started = time.monotonic()
            said = ask(client, f"{site}/{name}")
            found[name] = said, time.monotonic() - started

        # A host that asks for a year's pause is not asked again: it comes last.
        names = [name for name in BEHAVIOURS if name != "pause_of_a_year"]
        threads = [threading.Thread(target=run, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        run("pause_of_a_year")
    assert set(found) == set(BEHAVIOURS)
    for name, (said, took_s) in found.items():
        assert took_s < DEADLINE_S + 1, (name, took_s)
        if EXPECTED[name]:
            assert refused(said) in EXPECTED[name], (name, said)
            assert isinstance(said, tuple)
            assert 0 < len(said[1]) <= 200, name
        else:
            assert body_of(said) == b"", name


def test_slow_is_given_up_before_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "RATE_GRACE_S", 0.3)
    with serving(hostile) as (_, site), HttpClient(config_of(deadline_s=60, timeout_s=60)) as client:
        started = time.monotonic()
        said = ask(client, f"{site}/drips_body")
    assert refused(said) is Reason.TIMED_OUT
    assert "download.min_rate_bytes_per_s" in said[1]  # pyright: ignore[reportIndexIssue]  # it is a verdict
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("kind", ["silent", "garbage", "plain_http", "hangs_up"])
def test_hostile_handshakes(kind: str) -> None:
    def handle(connection: socket.socket, path: str, request: bytes) -> None:
        raise AssertionError("no request can arrive")

    # The first bytes of a handshake never hold the blank line that ends a request, so this server just listens.
    with RawServer(handle) as server:
        if kind != "silent":
            server.close()
            raw = socket.create_server(("127.0.0.1", 0))
            port = raw.getsockname()[1]

            def serve() -> None:
                connection, _ = raw.accept()
                with connection:
                    if kind != "hangs_up":
                        connection.sendall(b"\x16\x03\x01\xff\xff" * 100 if kind == "garbage" else reply("200 OK"))
                        time.sleep(0.2)

            thread = threading.Thread(target=serve)
            thread.start()
        else:
            raw, port, thread = None, server.port, None
        with HttpClient(config_of()) as client:
            started = time.monotonic()
            said = ask(client, f"https://127.0.0.1:{port}/")
        assert time.monotonic() - started < DEADLINE_S + 1
        expected = {Reason.TIMED_OUT} if kind == "silent" else {Reason.TLS_FAILED, Reason.CONNECTION_FAILED}
        assert refused(said) in expected, said
        if raw is not None and thread is not None:
            thread.join()
            raw.close()


def test_certificates_are_held_against_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str | None] = []

    def look_up(host: str) -> list[Address]:
        return [ipaddress.ip_address("127.0.0.1")]

    with certificate(tmp_path, "good.example") as (path, context):
        context.sni_callback = lambda connection, name, _: names.append(name)
        with RawServer(always(reply("200 OK", body=b"picture"))) as server:
            server.context = context
            with HttpClient(config_of(), resolver=Resolver(60, look_up)) as client:
                untrusted = ask(client, f"https://good.example:{server.port}/")
            monkeypatch.setenv("SSL_CERT_FILE", str(path))
            with HttpClient(config_of(), resolver=Resolver(60, look_up)) as client:
                good = [ask(client, f"https://good.example:{server.port}/") for _ in range(3)]
                other = ask(client, f"https://other.example:{server.port}/")
                address = ask(client, f"https://127.0.0.1:{server.port}/")
            requests, num_connections = server.requests, server.num_connections
    assert [body_of(said) for said in good] == [b"picture"] * 3
    for said in (untrusted, other, address):
        assert refused(said) is Reason.TLS_FAILED
    assert names[:2] == ["good.example", "good.example"]
    assert "other.example" in names
    assert {request.split(b"\r\n")[1] for request in requests} == {f"Host: good.example:{server.port}".encode()}
    assert num_connections == 4  # one for the three


def test_no_way_down_from_https(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        certificate(tmp_path, "127.0.0.1") as (path, context),
        serving(always(reply("200 OK", body=b"x"))) as (_, site),
    ):
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
        with RawServer(always(reply("301 Moved", f"Location: {site}/"))) as server:
            server.context = context
            url = f"https://127.0.0.1:{server.port}/"
            with HttpClient(config_of()) as client:
                assert refused(ask(client, url)) is Reason.URL_REFUSED
            with HttpClient(config_of(allow_downgrade=True)) as client:
                assert body_of(ask(client, url)) == b"x"


def test_connections_are_kept_and_replaced() -> None:
    """A server may close a connection while it waits, or say too much; neither costs a picture."""
    behaviour = {"close": False}

    def handle(connection: socket.socket, path: str, request: bytes) -> None:
        extra = reply("200 OK", body=b"poison") if path == "/extra" else b""
        connection.sendall(reply("200 OK", body=path.encode()) + extra)
        if behaviour["close"]:
            raise ConnectionAbortedError

    with serving(handle) as (server, site), HttpClient(config_of()) as client:
        assert [body_of(ask(client, f"{site}/{n}")) for n in range(5)] == [b"/0", b"/1", b"/2", b"/3", b"/4"]
        assert server.num_connections == 1
        behaviour["close"] = True
        assert [body_of(ask(client, f"{site}/{n}")) for n in range(5)] == [b"/0", b"/1", b"/2", b"/3", b"/4"]
        assert server.num_connections in (5, 6)  # the flag may be seen while the fifth answer of the first is sent
        behaviour["close"] = False
        assert [body_of(ask(client, f"{site}{path}")) for path in ("/extra", "/a", "/b")] == [b"/extra", b"/a", b"/b"]


def test_retries() -> None:
    asked: dict[str, int] = {}

    def handle(connection: socket.socket, path: str, request: bytes) -> None:
        asked[path] = asked.get(path, 0) + 1
        if path == "/flaky" and asked[path] < 3:
            connection.sendall(reply("502 Bad Gateway"))
        elif path == "/cut" and asked[path] < 2:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc")
            raise ConnectionAbortedError
        else:
            status = {"/gone": "410 Gone", "/no": "200 OK\r\nX-Robots-Tag: noai"}.get(path, "200 OK")
            connection.sendall(reply(status, body=b"picture"))

    with serving(handle) as (_, site), HttpClient(config_of(retries=2, deadline_s=10)) as client:
        assert body_of(ask(client, f"{site}/flaky")) == b"picture"
        assert body_of(ask(client, f"{site}/cut")) == b"picture"
        assert refused(ask(client, f"{site}/gone")) is Reason.HTTP_CLIENT_ERROR
        assert refused(ask(client, f"{site}/no")) is Reason.OPTED_OUT
        assert refused(ask(client, f"{site}/no")) is Reason.OPTED_OUT
    assert asked == {"/flaky": 3, "/cut": 2, "/gone": 1, "/no": 1}


@pytest.mark.parametrize(
    ("status", "reason"),
    [(status, Reason.HTTP_CLIENT_ERROR) for status in (400, 401, 402, 403, 404, 410, 418, 451)]
    + [(status, Reason.HTTP_NOT_NOW) for status in (408, 421, 423, 425)]
    + [(429, Reason.RATE_LIMITED)],
)
def test_refusals_of_the_moment_are_told_from_those_of_the_picture(status: int, reason: Reason) -> None:
    with serving(always(reply(f"{status} No"))) as (server, site):
        with HttpClient(config_of(retries=1, deadline_s=10)) as client:
            assert refused(ask(client, f"{site}/a")) is reason
        is_lasting = reason is Reason.HTTP_CLIENT_ERROR
        assert len(server.requests) == (1 if is_lasting else 2)
        if status == 421:
            assert server.num_connections == 2  # it is the connection that was wrong
    assert (MEMORY[reason] is Memory.LONG) == is_lasting
    assert (MEMORY[reason] is Memory.PASSING) != is_lasting


@pytest.mark.parametrize("status", ["200 OK", "404 Not Found", "503 Busy", "302 Found"])
def test_an_opt_out_counts_wherever_it_stands(status: str, tmp_path: Path) -> None:
    def handle(connection: socket.socket, path: str, request: bytes) -> None:
        fields = ["Location: /b", "X-Robots-Tag: noai"] if path == "/a" else []
        connection.sendall(reply(status if path == "/a" else "200 OK", *fields, body=b"page"))

    with serving(handle) as (server, site):
        for _ in range(2):  # the second client is another process: the file remembers
            with HttpClient(config_of(retries=3), opted_out=OptOutMemory(tmp_path / "no.txt")) as client:
                assert refused(ask(client, f"{site}/a")) is Reason.OPTED_OUT
                assert body_of(ask(client, f"{site}/b")) == b"page"
        assert [request.split()[1] for request in server.requests] == [b"/a", b"/b", b"/b"]


def test_pauses_that_are_asked_for() -> None:
    said: list[float] = []

    def handle(connection: socket.socket, path: str, request: bytes) -> None:
        said.append(time.monotonic())
        is_first = len(said) == 1
        connection.sendall(reply("429 Slow down", "Retry-After: 1") if is_first else reply("200 OK", body=b"picture"))

    with serving(handle) as (_, site), HttpClient(config_of(retries=1)) as client:
        assert body_of(ask(client, f"{site}/")) == b"picture"
    assert said[1] - said[0] >= 0.99

    in_an_hour = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    busy = always(reply("503 Busy", f"Retry-After: {in_an_hour}"))
    with serving(busy) as (server, site), HttpClient(config_of(retries=1)) as client:
        reasons = [refused(ask(client, f"{site}/{n}")) for n in range(10)]
    assert set(reasons) == {Reason.RATE_LIMITED}
    assert len(server.requests) == 1  # the host is left alone


def test_a_host_that_always_fails_is_left_alone() -> None:
    with serving(always(b"")) as (server, _):
        server.close()
        with HttpClient(config_of(max_host_failures=5)) as client:
            verdicts = [ask(client, f"http://127.0.0.1:{server.port}/{n}") for n in range(20)]
    assert {refused(verdict) for verdict in verdicts} == {Reason.CONNECTION_FAILED}
    assert "5 times in a row" in str(verdicts[-1])
    assert "5 times in a row" not in str(verdicts[3])


def test_manners_towards_a_host() -> None:
    now = {"open": 0, "most": 0}
    times: list[float] = []
    lock = threading.Lock()

    def handle(connection: socket.socket, path: str, request: bytes) -> None:
        with lock:
            times.append(time.monotonic())
            now["open"] += 1
            now["most"] = max(now["most"], now["open"])
        time.sleep(0.02)
        with lock:
            now["open"] -= 1
        connection.sendall(reply("200 OK", body=b"x"))

    def ask_many(client: HttpClient, site: str, count: int) -> None:
        threads = [threading.Thread(target=ask, args=(client, f"{site}/{n}")) for n in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with serving(handle) as (_, site):
        with HttpClient(config_of(max_connections_per_host=3)) as client:
            ask_many(client, site, 20)
        assert len(times) == 20
        assert 1 < now["most"] <= 3
        times.clear()
        with HttpClient(config_of(host_delay_s=0.1)) as client:
            ask_many(client, site, 6)
    assert times[-1] - times[0] > 0.35  # 0.5, but for how long the first one took to arrive


@pytest.mark.parametrize(
    ("status", "rules", "reasons"),
    [
        ("200 OK", "User-agent: *\nDisallow: /no", {"/yes": None, "/no": Reason.ROBOTS_DISALLOWED}),
        ("200 OK", "User-agent: lacuna\nDisallow: /\n\nUser-agent: *\nAllow: /", {"/yes": Reason.ROBOTS_DISALLOWED}),
        ("200 OK", "User-agent: other\nDisallow: /", {"/yes": None}),
        ("404 Not Found", "", {"/yes": None, "/no": None}),
        ("503 Busy", "", {"/yes": Reason.ROBOTS_DISALLOWED}),
    ],
)
def test_robots_txt(status: str, rules: str, reasons: dict[str, Reason | None]) -> None:
    def handle(connection: socket.socket, path: str, request: bytes) -> None:
        is_rules = path == "/robots.txt"
        connection.sendall(reply(status if is_rules else "200 OK", body=rules.encode() if is_rules else b"x"))

    with serving(handle) as (server, site):
        with HttpClient(config_of()) as client:
            assert body_of(ask(client, f"{site}/no")) == b"x"  # an option, and off
        server.requests.clear()
        with HttpClient(config_of(robots_txt=True)) as client:
            for path, reason in reasons.items():
                for _ in range(3):
                    said = ask(client, f"{site}{path}")
                    assert (refused(said) if reason else body_of(said)) == (reason or b"x")
        asked = [request.split()[1] for request in server.requests]
    assert asked.count(b"/robots.txt") == 1
    assert asked.count(b"/no") == (3 if "/no" in reasons and reasons["/no"] is None else 0)


def test_who_asks() -> None:
    said = user_agent(DownloadConfig())
    assert said.startswith("Lacuna/")
    assert "Mozilla" not in said
    assert "mailto:a@b.example" in user_agent(DownloadConfig(user_agent_contact="mailto:a@b.example"))


_IN_FLIGHT = """
import json, sys, threading, time
from preprocessing.contracts.config import DownloadConfig
from preprocessing.download.http_client import HttpClient

def high_water():
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) * 1024

count, deadline_s, urls = json.loads(sys.argv[1])
config = DownloadConfig(
    allow_networks=("127.0.0.0/8",), num_threads=1000, max_connections_per_host=1024, max_host_failures=0,
    timeout_s=5, deadline_s=deadline_s, retries=0,
)
client = HttpClient(config)
with client.get(urls[0]):
    pass
before, late, reasons, lock = high_water(), [], {}, threading.Lock()

def run(url):
    started = time.monotonic()
    with client.get(url) as said:
        took_s = time.monotonic() - started
    with lock:
        late.append(took_s - deadline_s)
        name = said[0].value if isinstance(said, tuple) else "answer"
        reasons[name] = reasons.get(name, 0) + 1

threads = [threading.Thread(target=run, args=(urls[n % len(urls)],)) for n in range(count)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps({"growth": high_water() - before, "latest_s": max(late), "reasons": reasons, "count": len(late)}))
"""
_HOSTILE_IN_FLIGHT = (
    "endless_body",
    "endless_chunks",
    "one_endless_chunk",
    "chunk_of_minus_one",
    "length_negative",
    "drips_body",
    "drips_headers",
    "header_flood",
    "continue_flood",
    "silence",
)


def in_flight(count: int, deadline_s: float) -> dict[str, object]:
    """Many hostile answers at once, in a process of their own; its figures."""
    root = str(Path(__file__).resolve().parents[2])
    serve = (
        "import time; from tests.preprocessing.hostile_server import *; "
        "server = RawServer(hostile); print(server.port, flush=True); time.sleep(600)"
    )
    environment = dict(os.environ) | {"PYTHONPATH": root}
    server = subprocess.Popen(
        [sys.executable, "-c", serve], cwd=root, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        site = f"http://127.0.0.1:{int(server.stdout.readline())}"
        words = json.dumps([count, deadline_s, [f"{site}/{name}" for name in _HOSTILE_IN_FLIGHT]])
        done = subprocess.run(
            [sys.executable, "-c", _IN_FLIGHT, words],
            cwd=root,
            env=environment,
            stdout=subprocess.PIPE,
            check=True,
            timeout=300,
        )
    finally:
        server.kill()
        server.communicate()
    return json.loads(done.stdout)


def check_in_flight(count: int, deadline_s: float, slack_s: float) -> None:
    found = in_flight(count, deadline_s)
    sys.stdout.write(f"{count} hostile answers in flight: {found}\n")
    growth, latest_s = found["growth"], found["latest_s"]
    assert isinstance(growth, int)
    assert isinstance(latest_s, float)
    assert found["count"] == count
    assert growth <= 512 * 2**20
    assert latest_s <= slack_s


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_with_hostile_answers_in_flight() -> None:
    check_in_flight(100, 5.0, 2.0)


@pytest.mark.soak
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_with_1000_hostile_answers_in_flight() -> None:
    check_in_flight(1000, 20.0, 5.0)
