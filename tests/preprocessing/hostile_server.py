"""Servers that tests of the fetch run against: raw sockets on loopback, so that they can say anything."""

import contextlib
import datetime
import ipaddress
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

Handler = Callable[[socket.socket, str, bytes], None]
"""Answers one request: the connection, the path asked for, the whole request. It may say anything, or hang up."""

MAX_HOSTILE_S = 60.0


class RawServer:
    """Accepts connections and leaves each to a thread.

    Attributes:
        port: Where it listens.
        num_connections: So many were accepted.
        requests: Every request that was read.
    """

    def __init__(self, handler: Handler | None, address: str = "127.0.0.1", port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((address, port))
        self._socket.listen(2048)
        self.port: int = self._socket.getsockname()[1]
        self.num_connections = 0
        self.requests: list[bytes] = []
        self._handler = handler
        self.context: ssl.SSLContext | None = None
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._is_closing = False
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with self._lock:
                if self._is_closing:
                    connection.close()
                    return
                self.num_connections += 1
                self._open.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        connection = plain
        try:
            connection.settimeout(MAX_HOSTILE_S)
            if self.context is not None:
                connection = self.context.wrap_socket(connection, server_side=True)
            received = b""
            while self._handler is not None:
                while b"\r\n\r\n" not in received:
                    data = connection.recv(65536)
                    if not data:
                        return
                    received += data
                request, _, received = received.partition(b"\r\n\r\n")
                self.requests.append(request)
                self._handler(connection, request.split(b" ", 2)[1].decode(), request)
        except (OSError, IndexError):
            pass  # the client left, or the handler did
        finally:
            with self._lock:
                self._open.discard(plain)
            connection.close()

    def close(self) -> None:
        with self._lock:
            self._is_closing = True
            connections = list(self._open)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(5)

    def __enter__(self) -> "RawServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def reply(status: str, *fields: str, body: bytes = b"") -> bytes:
    """A well-formed answer."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def redirector(connection: socket.socket, path: str, request: bytes) -> None:
    """``/{status}?{URL, percent-encoded}`` redirects there; ``/chain{n}/…`` by way of itself, n times."""
    where, _, query = path.partition("?")
    word = where.strip("/").split("/")
    if word[0].startswith("chain"):
        left = int(word[0][5:])
        following = f"/chain{left - 1}/{word[1]}?{query}" if left > 1 else f"/{word[1]}?{query}"
        connection.sendall(reply("302 Found", f"Location: {following}"))
    elif word[0].isdigit():
        location = unquote(query).encode()
        connection.sendall(
            b"HTTP/1.1 " + word[0].encode() + b" Moved\r\nContent-Length: 0\r\nLocation: " + location + b"\r\n\r\n"
        )
    else:
        connection.sendall(reply("200 OK", "Set-Cookie: a=b; Path=/", body=b"picture"))


@contextlib.contextmanager
def certificate(folder: Path, *names: str) -> Iterator[tuple[Path, ssl.SSLContext]]:
    """A self-signed certificate for names and addresses: its file, and a server's context with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    alternatives: list[x509.GeneralName] = []
    for name in names:
        try:
            alternatives.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            alternatives.append(x509.DNSName(name))
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    path.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, folder / "key.pem")
    yield path, context


# --- the forty and more -------------------------------------------------------------------------------------------

_OK = b"HTTP/1.1 200 OK\r\n"
_CHUNKED = _OK + b"Transfer-Encoding: chunked\r\n\r\n"
_NOISE = bytes(range(256)) * 256


def _say(data: bytes, then: str = "close") -> Handler:
    def handler(connection: socket.socket, path: str, request: bytes) -> None:
        connection.sendall(data)
        if then == "close":
            raise ConnectionAbortedError
        if then == "silence":
            _wait(connection)

    return handler


def _wait(connection: socket.socket) -> None:
    connection.recv(1)
    raise ConnectionAbortedError


def _drip(head: bytes, drop: bytes, pause_s: float = 0.05) -> Handler:
    def handler(connection: socket.socket, path: str, request: bytes) -> None:
        connection.sendall(head)
        ends_at = time.monotonic() + MAX_HOSTILE_S
        while time.monotonic() < ends_at:
            for byte in drop:
                connection.sendall(bytes([byte]))
                time.sleep(pause_s)

    return handler


def _flood(head: bytes, wave: bytes) -> Handler:
    def handler(connection: socket.socket, path: str, request: bytes) -> None:
        connection.sendall(head)
        ends_at = time.monotonic() + MAX_HOSTILE_S
        while time.monotonic() < ends_at:
            connection.sendall(wave)

    return handler


def _reset(connection: socket.socket, path: str, request: bytes) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raise ConnectionAbortedError


def _reset_in_body(connection: socket.socket, path: str, request: bytes) -> None:
    connection.sendall(_OK + b"Content-Length: 1000\r\n\r\nabc")
    time.sleep(0.05)
    _reset(connection, path, request)


def _loop(connection: socket.socket, path: str, request: bytes) -> None:
    connection.sendall(reply("302 Found", f"Location: {path}"))


def _never_the_same(connection: socket.socket, path: str, request: bytes) -> None:
    connection.sendall(reply("307 Moved", f"Location: {path}x"))


BEHAVIOURS: Mapping[str, Handler] = {
    "silence": _say(b"", "silence"),
    "hangs_up": _say(b""),
    "resets": _reset,
    "resets_in_body": _reset_in_body,
    "drips_status": _drip(b"", b"HTTP/1.1 200 OKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKK"),
    "drips_headers": _drip(_OK, b"X-A: b\r\n"),
    "drips_one_header": _drip(_OK + b"X-A: ", b"aaaa"),
    "drips_body": _drip(_OK + b"Content-Length: 100000\r\n\r\n", b"a"),
    "drips_body_without_length": _drip(_OK + b"\r\n", b"a"),
    "drips_chunks": _drip(_CHUNKED, b"1\r\na\r\n"),
    "drips_chunk_size": _drip(_CHUNKED, b"0000"),
    "drips_trailers": _drip(_CHUNKED + b"1\r\na\r\n0\r\n", b"X-A: b\r\n"),
    "drips_continue": _drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "header_flood": _flood(_OK, b"X-A: b\r\n" * 1000),
    "header_line_of_a_megabyte": _say(_OK + b"X-A: " + b"a" * 1_000_000 + b"\r\n\r\n"),
    "header_line_without_end": _flood(_OK + b"X-A: ", b"a" * 65536),
    "headers_101": _say(_OK + b"X-A: b\r\n" * 101 + b"\r\n"),
    "headers_of_60_kb": _say(_OK + (b"X-A: " + b"b" * 60_000 + b"\r\n") * 90 + b"\r\n"),
    "continue_flood": _flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "status_line_without_end": _flood(b"HTTP/1.1 200 ", b"O" * 65536),
    "endless_body": _flood(_OK + b"\r\n", _NOISE),
    "endless_chunks": _flood(_CHUNKED, b"10000\r\n" + _NOISE + b"\r\n"),
    "endless_one_byte_chunks": _flood(_CHUNKED, b"1\r\na\r\n" * 5000),
    "endless_chunk_extension": _flood(_CHUNKED + b"5;x=", b"a" * 65536),
    "endless_trailers": _flood(_CHUNKED + b"1\r\na\r\n0\r\n", b"X-A: b\r\n" * 1000),
    "one_endless_chunk": _flood(_CHUNKED + b"FFFFFFFFFFFF\r\n", _NOISE),
    "chunk_of_minus_one": _flood(_CHUNKED + b"-1\r\n", _NOISE),
    "chunk_size_no_number": _say(_CHUNKED + b"zz\r\nabc\r\n"),
    "chunks_without_end": _say(_CHUNKED + b"3\r\nabc\r\n"),
    "length_of_10_gb": _flood(_OK + b"Content-Length: 10000000000\r\n\r\n", _NOISE),
    "length_of_30_digits": _flood(_OK + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n", _NOISE),
    "length_of_5000_digits": _flood(_OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", _NOISE),
    "length_negative": _flood(_OK + b"Content-Length: -1\r\n\r\n", _NOISE),
    "length_no_number": _flood(_OK + b"Content-Length: many\r\n\r\n", _NOISE),
    "two_lengths": _say(_OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"),
    "length_and_then_less": _say(_OK + b"Content-Length: 100\r\n\r\n" + b"a" * 40),
    "length_and_then_silence": _say(_OK + b"Content-Length: 100\r\n\r\n" + b"a" * 40, "silence"),
    "gzip_bomb": _flood(_OK + b"Content-Encoding: gzip\r\n\r\n", b"\x1f\x8b" + _NOISE),
    "not_http": _say(b"SSH-2.0-OpenSSH_9.6\r\n", "silence"),
    "http_0_9": _flood(b"<html>", _NOISE),
    "http_9_9": _say(b"HTTP/9.9 200 OK\r\nContent-Length: 3\r\n\r\nabc"),
    "status_no_number": _say(b"HTTP/1.1 abc OK\r\n\r\n"),
    "status_999": _say(reply("999 Whatever")),
    "switching_protocols": _say(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n", "silence"),
    "redirect_loop": _loop,
    "redirect_chain": _never_the_same,
    "redirect_to_nowhere": _say(reply("302 Found"), "keep"),
    "redirect_to_a_megabyte": _say(_OK.replace(b"200", b"302") + b"Location: /" + b"a" * 1_000_000 + b"\r\n\r\n"),
    "redirect_of_60_kb": _say(reply("302 Found", "Location: /" + "a" * 60_000), "keep"),
    "redirect_with_an_endless_page": _flood(b"HTTP/1.1 302 Found\r\n\r\n", _NOISE),
    "error_with_an_endless_page": _flood(
        b"HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"
    ),
    "pause_of_a_year": _say(reply("503 Busy", "Retry-After: 31536000"), "keep"),
    "nul_in_headers": _say(_OK + b"X-A: \0\0\r\nContent-Length: 0\r\n\r\n", "keep"),
}


def hostile(connection: socket.socket, path: str, request: bytes) -> None:
    """``/{name}`` behaves as ``BEHAVIOURS`` says."""
    BEHAVIOURS[path.strip("/x")](connection, path, request)
