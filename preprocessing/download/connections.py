"""Connections to checked addresses, which keep their limits whatever the other side does.

Every single read from a socket (`Wire`) is held against the picture's deadline, the longest silence, the least rate and
the most bytes; what is read is made into answers by `responses`. So no header, chunk or trailer that drips, and none
that never ends, outlives them; a time limit on the socket alone is one per read, and no limit at all.
"""

import contextlib
import ipaddress
import select
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from typing import Literal

from preprocessing.download.addresses import Address, Target
from preprocessing.download.responses import Response, read_response

RATE_GRACE_S = 5.0
_IDLE_S = 20.0  # servers close idle connections after 5 to 75 s
_MAX_IDLE_PER_ORIGIN = 16

Key = tuple[str, Address]
Method = Literal["GET", "HEAD"]


class OverLimitError(Exception):
    """The other side sent more than it may."""


class TooSlowError(TimeoutError):
    """The picture's deadline passed, or its bytes drip."""


class Deadline:
    """When a picture must be there, on the monotonic clock.

    Args:
        duration_s: From now.
    """

    def __init__(self, duration_s: float) -> None:
        self._duration_s = duration_s
        self._ends_at = time.monotonic() + duration_s

    def extend(self, duration_s: float) -> None:
        """Adds time that was spent waiting for something that is not the other side's fault."""
        self._ends_at += duration_s

    def is_over(self) -> bool:
        """Whether it has passed."""
        return time.monotonic() >= self._ends_at

    def left_s(self, at_most: float) -> float:
        """How long may be waited now.

        Raises:
            TooSlowError: No longer.
        """
        left_s = self._ends_at - time.monotonic()
        if left_s <= 0:
            raise TooSlowError(f"not there after {self._duration_s:g} s (download.deadline_s)")
        return min(left_s, at_most)


class Wire:
    """A socket within limits; before they are set it gives nothing.

    It is asked first and waited for after: what has arrived already costs one system call.

    Args:
        sock: Connected; it is ours from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._readable, self._writable = select.poll(), select.poll()  # not select: descriptors go over 1,024
        self._readable.register(sock, select.POLLIN)
        self._writable.register(sock, select.POLLOUT)
        self._deadline: Deadline | None = None
        self._silence_s = 0.0
        self._min_rate = 0
        self._num_allowed = 0
        self.num_bytes = 0
        self._waited_s = 0.0

    def begin(self, deadline: Deadline, silence_s: float, min_rate_bytes_per_s: int, num_bytes: int) -> None:
        """Sets the limits for what is read from now on."""
        self._deadline, self._silence_s, self._min_rate = deadline, silence_s, min_rate_bytes_per_s
        self.num_bytes, self._num_allowed, self._waited_s = 0, num_bytes, 0.0

    def allow(self, num_bytes: int) -> None:
        """Lets so many more bytes come."""
        self._num_allowed += num_bytes

    def receive(self, num_bytes: int) -> bytes:
        """Reads what is there, at most so many bytes; waits while there is nothing.

        Returns:
            The bytes; none where the other side has closed.

        Raises:
            OverLimitError: More came than is allowed.
            TimeoutError: It was silent, too slow, or the deadline passed.
        """
        assert self._deadline is not None
        if self.num_bytes >= self._num_allowed:
            raise OverLimitError(f"over {self._num_allowed:,} bytes")
        left_s = self._deadline.left_s(self._silence_s)
        while True:
            try:
                data = self._sock.recv(num_bytes)
                break
            except (BlockingIOError, ssl.SSLWantReadError):
                left_s = self._wait(self._readable, left_s)
            except ssl.SSLWantWriteError:
                left_s = self._wait(self._writable, left_s)
        self.num_bytes += len(data)
        if self._waited_s > RATE_GRACE_S and self.num_bytes < self._min_rate * self._waited_s:
            rate = self.num_bytes / self._waited_s
            raise TooSlowError(f"{rate:.0f} bytes/s are under download.min_rate_bytes_per_s = {self._min_rate}")
        return data

    def send(self, data: bytes) -> None:
        """Writes all of it.

        Raises:
            TimeoutError: The other side does not take it.
        """
        assert self._deadline is not None
        left_s = self._deadline.left_s(self._silence_s)
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._sock.send(rest) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                left_s = self._wait(self._writable, left_s)
            except ssl.SSLWantReadError:
                left_s = self._wait(self._readable, left_s)

    def _wait(self, poll: select.poll, left_s: float) -> float:
        """Waits until the socket is ready; how long may still be waited."""
        started = time.monotonic()
        is_ready = left_s > 0 and poll.poll(1000 * left_s)
        waited_s = time.monotonic() - started
        self._waited_s += waited_s
        if not is_ready:
            raise TimeoutError("timed out")
        return left_s - waited_s

    def hang_up(self) -> None:
        """Closes the socket, without a farewell that the other side could hold up."""
        self._sock.close()

    def is_quiet(self) -> bool:
        """Whether the other side has said nothing, not even that it is gone, since the last answer."""
        if isinstance(self._sock, ssl.SSLSocket) and self._sock.pending():
            return False  # decrypted already, so that the socket itself is silent
        return not self._readable.poll(0)


class Connection:
    """An HTTP/1.1 connection to one checked address.

    Attributes:
        address: Whom it is connected to.
        wire: Its limits must have begun before anything is asked.

    Args:
        address: Whom it is connected to.
        sock: Connected, and through the handshake where the scheme is https.
    """

    def __init__(self, address: Address, sock: socket.socket) -> None:
        self.address = address
        self.wire = Wire(sock)

    def ask(self, target: Target, headers: bytes, method: Method = "GET") -> Response:
        """Sends a request and reads the answer's headers.

        Args:
            target: A URL of the origin.
            headers: All but ``Host``, as they are sent, each line with its end.
            method: ``HEAD`` asks for no more than these.

        Raises:
            OSError: As from the socket; `responses.HungUpError` where it is closed before the answer.
            responses.BadResponseError: The answer is not HTTP, or has over 100 headers.
            OverLimitError: The headers go over the wire's limit.
        """
        # Neither has a character that would end the line: `parse_url` has seen to it.
        request = f"{method} {target.path} HTTP/1.1\r\nHost: {target.authority}\r\n".encode("ascii")
        self.wire.send(request + headers + b"\r\n")
        response = read_response(self.wire.receive)
        if method == "HEAD":
            response.has_no_body()
        return response

    def hang_up(self) -> None:
        """Closes it."""
        self.wire.hang_up()


def connect(
    target: Target, address: Address, context: ssl.SSLContext | None, deadline: Deadline, timeout_s: float
) -> Connection:
    """Connects to an address, and to nothing else; the certificate is held against the name.

    Args:
        target: The URL; its host stands in the handshake (SNI) and must stand in the certificate.
        address: The checked address.
        context: For https; None for http.
        deadline: Of the picture.
        timeout_s: To connect, and again for the handshake.

    Returns:
        The connection.

    Raises:
        OSError: It failed; `ssl.SSLError` where the handshake did.
    """
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(deadline.left_s(timeout_s))
        sock.connect((str(address), target.port))
        peer = sock.getpeername()[0]
        if ipaddress.ip_address(peer) != address:
            raise ConnectionError(f"connected to {peer} instead of {address}")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context is not None:
            sock.settimeout(deadline.left_s(timeout_s))
            # The time limit holds for the handshake as a whole. A trailing dot is no part of a certificate's name.
            sock = context.wrap_socket(sock, server_hostname=target.host.rstrip("."))
        return Connection(address, sock)
    except BaseException:
        sock.close()
        raise


class ConnectionPool:
    """Connections that wait for the next picture of their origin.

    Args:
        max_idle: How many in all; the one that has waited the longest is closed.
    """

    def __init__(self, max_idle: int) -> None:
        self._max_idle = max_idle
        self._idle: dict[Key, list[tuple[float, Connection]]] = {}  # insertion order: the oldest origin first
        self._num_idle = 0
        self._lock = threading.Lock()

    def take(self, target: Target, addresses: Sequence[Address]) -> Connection | None:
        """A connection to one of the addresses that were just checked, if one is waiting and still good."""
        for address in addresses:
            key = (target.origin, address)
            while (found := self._pop(key)) is not None:
                waiting_since, connection = found
                if time.monotonic() - waiting_since < _IDLE_S and connection.wire.is_quiet():
                    return connection
                connection.hang_up()
        return None

    def put(self, target: Target, connection: Connection) -> None:
        """Keeps a connection for later."""
        key = (target.origin, connection.address)
        spare: list[Connection] = []
        with self._lock:
            waiting = self._idle.setdefault(key, [])
            waiting.append((time.monotonic(), connection))
            self._num_idle += 1
            if len(waiting) > _MAX_IDLE_PER_ORIGIN:
                spare.append(self._drop_oldest(key))
            elif self._num_idle > self._max_idle:
                spare.append(self._drop_oldest(next(iter(self._idle))))
        for other in spare:
            other.hang_up()

    def close(self) -> None:
        """Closes all that wait."""
        with self._lock:
            waiting = [connection for found in self._idle.values() for _, connection in found]
            self._idle.clear()
            self._num_idle = 0
        for connection in waiting:
            connection.hang_up()

    def _pop(self, key: Key) -> tuple[float, Connection] | None:
        with self._lock:
            waiting = self._idle.get(key)
            if not waiting:
                return None
            self._num_idle -= 1
            found = waiting.pop()
            if not waiting:
                del self._idle[key]
            return found

    def _drop_oldest(self, key: Key) -> Connection:
        waiting = self._idle[key]
        _, connection = waiting.pop(0)
        self._num_idle -= 1
        if not waiting:
            del self._idle[key]
        return connection


def tls_context() -> ssl.SSLContext:
    """The one context of a process: building it costs as much as dozens of pictures.

    The system's certificate authorities, or those that ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` name.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with contextlib.suppress(NotImplementedError):
        context.set_alpn_protocols(["http/1.1"])
    return context
