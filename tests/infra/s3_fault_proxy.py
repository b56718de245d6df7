"""A bad network and a tired server, on loopback: requests pass through to a real S3 server, and some of them fail.

Which request fails, and how, is a function of a seed, of the request's method and path, and of how often the same was
asked before: not of the order in which threads happen to come.
"""

import contextlib
import functools
import hashlib
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from typing_extensions import override

from infra import storage_s3
from infra.s3_client import make_client

RATES: Final[Mapping[str, float]] = {
    "slow_down": 0.10,  # 503 SlowDown, nothing done
    "internal_error": 0.05,  # 500, nothing done
    "reset": 0.02,  # the connection is reset before anything is done
    "stall": 0.01,  # silence for longer than the client waits, nothing done
    "cut_request": 0.01,  # half of the body reaches the server, then the connection is gone
    "short_body": 0.02,  # half of the answer, of a declared length
    "short_body_unknown_length": 0.01,  # half of the answer, which does not say how long it is
    "lost_answer": 0.02,  # it is done, and nobody is told
    "error_in_200": 0.01,  # a multipart upload's completion says 200, and in the body that it failed
}
"""Share of requests."""

_ERRORS: Final = {"slow_down": (503, "SlowDown"), "internal_error": (500, "InternalError")}
_NOT_FORWARDED: Final = ("connection", "keep-alive", "transfer-encoding", "expect", "proxy-connection")
_NAMES_OF_THE_DAY: Final = re.compile(r"^/[^/?]*|uploadId=[^&]*|continuation-token=[^&]*|/READING-[^?]*")
_COPY_TIMEOUT_S: Final = 60


@dataclass
class FaultPlan:
    """What goes wrong.

    Attributes:
        seed: Of the draws; None for a proxy at which nothing goes wrong by itself.
        rates: Kind → share of the requests.
        stall_s: How long a stalled answer is silent: longer than the client waits.
    """

    seed: int | None
    rates: Mapping[str, float] = field(default_factory=lambda: dict(RATES))
    stall_s: float = 3.0

    def fault_of(self, method: str, path: str, number: int) -> str | None:
        """What happens to the `number`-th request of this kind."""
        if self.seed is None:
            return None
        digest = hashlib.sha256(f"{self.seed} {method} {path} {number}".encode()).digest()
        draw = int.from_bytes(digest[:8], "big") / 2**64
        for fault, rate in self.rates.items():
            if draw < rate:
                return fault
            draw -= rate
        return None


class FaultProxy(ThreadingHTTPServer):
    """Passes requests on to an S3 server, or does not.

    Args:
        behind: The server's ``http://host:port``.
        plan: What goes wrong.
        host: Where to listen.

    Attributes:
        num_requests: How many came.
        done: How often each fault was injected.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, behind: str, plan: FaultPlan, host: str = "127.0.0.1") -> None:
        super().__init__((host, 0), _Handler)
        self.behind = behind.removeprefix("http://")
        self.plan = plan
        self.num_requests = 0
        self.done: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._asked: Counter[tuple[str, str]] = Counter()
        self._out_until = 0.0

    @property
    def endpoint_url(self) -> str:
        """Where clients go."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"

    def go_out(self, seconds: float) -> None:
        """From now on, for a while, every connection is reset."""
        self._out_until = time.monotonic() + seconds

    @property
    def is_out(self) -> bool:
        """Whether an outage is on."""
        return time.monotonic() < self._out_until

    def draw(self, method: str, path: str) -> str | None:
        """Counts a request; says what happens to it."""
        kind = (method, _NAMES_OF_THE_DAY.sub("", path))
        with self._lock:
            self.num_requests += 1
            self._asked[kind] += 1
            fault = "outage" if self.is_out else self.plan.fault_of(*kind, self._asked[kind])
            if fault is not None and not _applies(fault, method, path):
                fault = None
            if fault is not None:
                self.done[fault] += 1
            return fault

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what this is for."""


def _applies(fault: str, method: str, path: str) -> bool:
    if fault == "cut_request":
        return method == "PUT"
    if fault.startswith("short_body"):
        return method == "GET"
    if fault == "error_in_200":
        return method == "POST" and "uploadId=" in path
    return True


@contextlib.contextmanager
def running_proxy(behind: str, plan: FaultPlan, host: str = "127.0.0.1") -> Iterator[FaultProxy]:
    """A proxy for the length of a block."""
    with FaultProxy(behind, plan, host) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()


@contextlib.contextmanager
def waiting_less(read_timeout_s: float, part_bytes: int = 5 << 20) -> Iterator[None]:
    """Within, S3 stores wait less for an answer, and before they ask again; and more files go up in parts."""
    other = {
        "make_client": functools.partial(make_client, read_timeout_s=read_timeout_s),
        "FIRST_DELAY_S": 0.02,
        "MULTIPART_OVER_BYTES": part_bytes,
        "_PART_BYTES": part_bytes,
    }
    before = {name: getattr(storage_s3, name) for name in other}
    for name, value in other.items():
        setattr(storage_s3, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(storage_s3, name, value)


class _Gone(Exception):  # noqa: N818 - not an error: what was to happen
    """The connection was ended on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _COPY_TIMEOUT_S

    @property
    def _proxy(self) -> FaultProxy:
        assert isinstance(self.server, FaultProxy)
        return self.server

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self._proxy.draw(self.command, self.path)
        try:
            self._do(fault, body)
        except _Gone:
            pass
        except (OSError, HTTPException):  # the server behind, or the client
            self._reset()

    def _do(self, fault: str | None, body: bytes) -> None:
        if fault in ("outage", "reset"):
            self._reset()
        if fault == "stall":
            time.sleep(self._proxy.plan.stall_s)
            self._reset()
        if fault in _ERRORS:
            self._refuse(*_ERRORS[fault])
            return
        if fault == "cut_request":
            self._send_half(body)
            self._reset()
        if fault == "error_in_200":
            self._answer(200, {}, _error("InternalError"))
            return
        status, headers, data = self._ask(body)
        if fault == "lost_answer":
            self._reset()
        if fault is not None and fault.startswith("short_body") and status < 300:
            self._answer_half(status, headers, data, says_length=fault == "short_body")
        self._answer(status, headers, data)

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        with contextlib.closing(HTTPConnection(self._proxy.behind, timeout=_COPY_TIMEOUT_S)) as connection:
            self._put_headers(connection)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            data = answer.read()
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in _NOT_FORWARDED}
            return answer.status, headers, data

    def _put_headers(self, connection: HTTPConnection) -> None:
        """As they came: the host's name is part of what the client has signed."""
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _NOT_FORWARDED:
                connection.putheader(name, value)

    def _send_half(self, body: bytes) -> None:
        with contextlib.closing(HTTPConnection(self._proxy.behind, timeout=_COPY_TIMEOUT_S)) as connection:
            self._put_headers(connection)
            connection.endheaders()
            connection.send(body[: len(body) // 2])

    def _answer(self, status: int, headers: Mapping[str, str], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() != "content-length":
                self.send_header(name, value)
        # The answer to a HEAD says how long a body would be.
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        if status != 204:
            self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(data)

    def _answer_half(self, status: int, headers: Mapping[str, str], data: bytes, *, says_length: bool) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() != "content-length":
                self.send_header(name, value)
        self.send_header("Connection", "close")
        if says_length:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.close_connection = True
        raise _Gone

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, {"Content-Type": "application/xml"}, b"" if self.command == "HEAD" else _error(code))

    def _reset(self) -> None:
        """RST, not FIN."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        raise _Gone

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _handle  # noqa: N815 - the base class's names

    @override
    def log_message(self, format: str, *args: object) -> None:
        pass


def _error(code: str) -> bytes:
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>injected</Message></Error>'.encode()
