"""Answers of HTTP/1.1 from bytes: the little of it that a client of strangers needs, and no more than it can check.

The standard library's reader hands the headers to its parser of e-mails, which costs as much as all else that is done
for a small picture, and which takes a line that is no header for the end of them all: what follows, be it an opt-out,
is lost. Here such a line is passed over. Whatever may be read in two ways (two lengths that differ, a transfer coding
that is not known, a chunk size that is no number) is refused.

How much may come, and how fast, is the matter of whoever gives the bytes (`connections.Wire`).

Source: RFC 9112; which answers have no body, RFC 9110 § 6.4.1.
"""

import re
from collections.abc import Callable

Receive = Callable[[int], bytes]  # what has come, at most so many bytes; none at the connection's end

_AT_ONCE_BYTES = 1 << 16
_MAX_HEADERS = 100
_MAX_LINE_BYTES = 1 << 16
_MAX_LENGTH_DIGITS = 18
_STATUS_LINE = re.compile(rb"HTTP/1\.([01])[ \t]+([1-9][0-9][0-9])(?:[ \t]+([^\r\n]*))?[ \t\r]*", re.DOTALL)
_END_OF_HEAD = re.compile(rb"\n\r?\n")
_CHUNK = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\n]*)?\r?\n")
_INTERIM = frozenset({100, 102, 103})
_WITHOUT_BODY = frozenset({204, 304})


class BadResponseError(ValueError):
    """What came is no HTTP, or can be read in two ways."""


class CutShortError(Exception):
    """The other side closed inside an answer."""


class HungUpError(ConnectionError):
    """The other side closed before it had answered anything."""


class Headers:
    """An answer's headers, in their order; names in any case."""

    def __init__(self, fields: list[tuple[str, str]]) -> None:
        self._fields = fields

    def get(self, name: str, default: str = "") -> str:
        """The first value of a header."""
        name = name.lower()
        return next((value for found, value in self._fields if found == name), default)

    def get_all(self, name: str) -> list[str]:
        """All values of a header."""
        name = name.lower()
        return [value for found, value in self._fields if found == name]

    def listed(self, name: str) -> list[str]:
        """The members of all values of a header that is a list, in lower case."""
        values = self.get_all(name)
        return [member.strip().lower() for value in values for member in value.split(",")] if values else values

    @property
    def num_bytes(self) -> int:
        """Of names and values, as they were sent."""
        return sum(len(name) + len(value) + 4 for name, value in self._fields)


class Response:
    """An answer whose headers have come.

    Attributes:
        status: 200 to 999.
        reason: What the server says of it.
        headers: All of them.
        length: Of the body, where it is declared; None otherwise.
        is_chunked: Whether the body comes in chunks, each with its length.
        can_be_kept: Whether this answer is read to its end, and another may follow on its connection.
    """

    def __init__(self, receive: Receive, received: bytes, minor: int, status: int, reason: str, head: Headers) -> None:
        self.status, self.reason, self.headers = status, reason, head
        self._receive = receive
        self._received = received  # and not yet read
        codings = head.listed("Transfer-Encoding")
        if codings not in ([], ["chunked"], ["identity"]):
            raise BadResponseError(f"Transfer-Encoding {', '.join(codings)[:60]}")
        length = _length(head)
        # A coding and a length may disagree about where the answer ends.
        is_clear = not codings or length is None
        options = head.listed("Connection")
        self._is_lasting = is_clear and "close" not in options and (minor == 1 or "keep-alive" in options)
        if status in _WITHOUT_BODY:
            codings, length = [], 0
        self.is_chunked = codings == ["chunked"]
        self.length = None if self.is_chunked else length
        self._left = self.length  # of the body; of the chunk, where there are chunks
        self._is_read = self.length == 0

    def has_no_body(self) -> None:
        """Says that none follows, whatever the headers say: the answer is one to HEAD."""
        self.is_chunked, self.length, self._left, self._is_read = False, 0, 0, True

    @property
    def can_be_kept(self) -> bool:
        """See above."""
        return self._is_lasting and self._is_read and not self._received

    def read(self, num_bytes: int) -> bytes:
        """Reads a piece of the body; shorter than asked for only at its end.

        Raises:
            CutShortError: The other side closed before the body's end, as far as that is known.
            BadResponseError: It is no sequence of chunks.
        """
        if self.is_chunked:
            return self._read_chunks(num_bytes)
        wanted = num_bytes if self._left is None else min(num_bytes, self._left)
        piece = self._take(wanted)
        if self._left is not None:
            if len(piece) < wanted:
                raise CutShortError(f"{self._left - len(piece):,} bytes are missing")
            self._left -= len(piece)
        self._is_read = self._left == 0
        return piece

    def _take(self, num_bytes: int) -> bytes:
        """So many bytes, fewer at the connection's end."""
        if len(self._received) >= num_bytes:
            piece, self._received = self._received[:num_bytes], self._received[num_bytes:]
            return piece
        pieces, self._received = [self._received], b""
        left = num_bytes - len(pieces[0])
        while left:
            piece = self._receive(left)
            if not piece:
                break
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def _read_chunks(self, num_bytes: int) -> bytes:
        pieces: list[bytes] = []
        wanted = num_bytes
        while wanted and not self._is_read:
            if not self._left:
                self._begin_chunk()
                continue
            piece = self._take(min(wanted, self._left))
            if not piece:
                raise CutShortError("a chunk is missing")
            pieces.append(piece)
            wanted -= len(piece)
            self._left -= len(piece)
            if not self._left and self._line().strip(b"\r\n"):
                raise BadResponseError("a chunk is longer than it says")
        return b"".join(pieces)

    def _begin_chunk(self) -> None:
        line = self._line()
        size = _CHUNK.fullmatch(line)
        if size is None:
            raise BadResponseError(f"a chunk of size {line[:20]!r}")
        self._left = int(size[1], 16)
        if self._left == 0:
            while self._line().strip(b"\r\n"):
                pass  # trailers; the wire's limit holds for them
            self._is_read = True

    def _line(self) -> bytes:
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > _MAX_LINE_BYTES:
                raise BadResponseError(f"a line of over {_MAX_LINE_BYTES:,} bytes")
            more = self._receive(1024)
            if not more:
                raise CutShortError("a chunk is missing")
            self._received += more
        line, self._received = self._received[: end + 1], self._received[end + 1 :]
        return line


def read_response(receive: Receive) -> Response:
    """Reads an answer up to its body; interim answers are passed over.

    Args:
        receive: Gives the connection's bytes, with limits.

    Raises:
        HungUpError: There was nothing.
        BadResponseError: It is no HTTP/1, has over 100 headers, or two lengths.
        CutShortError: It ends inside its headers.
    """
    received = b""
    while True:
        start = 0
        while (end := _END_OF_HEAD.search(received, start)) is None:
            start = max(0, len(received) - 2)
            more = receive(_AT_ONCE_BYTES)
            if not more and not received:
                raise HungUpError("it hung up without an answer")
            if not more:
                raise CutShortError("it ends inside its headers")
            received += more
            if len(received) >= 5 and not received.startswith(b"HTTP/"):
                raise BadResponseError(f"it begins with {received[:20]!r}")
        lines = received[: end.start()].split(b"\n")
        received = received[end.end() :]
        status_line = _STATUS_LINE.fullmatch(lines[0])
        if status_line is None:
            raise BadResponseError(f"status line {lines[0][:40]!r}")
        status = int(status_line[2])
        if status in _INTERIM:
            continue
        reason = (status_line[3] or b"").decode("latin-1").strip()
        return Response(receive, received, int(status_line[1]), status, reason, _headers(lines[1:]))


def _headers(lines: list[bytes]) -> Headers:
    fields: list[tuple[str, str]] = []
    if len(lines) > _MAX_HEADERS:
        raise BadResponseError(f"over {_MAX_HEADERS} headers")
    for line in lines:
        text = line.decode("latin-1")
        if text[:1] in (" ", "\t") and fields:  # the old way to go on with a value
            name, value = fields[-1]
            fields[-1] = name, f"{value} {text.strip()}"
            continue
        name, colon, value = text.partition(":")
        if colon:
            fields.append((name.strip().lower(), value.strip()))
    return Headers(fields)


def _length(headers: Headers) -> int | None:
    values = set(headers.listed("Content-Length"))
    if len(values) > 1:
        raise BadResponseError("more than one Content-Length")
    value = values.pop() if values else ""
    if not (value.isascii() and value.isdigit()):
        return None  # none was declared, or nothing that can be read: the end of the connection is the end
    return int(value) if len(value) <= _MAX_LENGTH_DIGITS else 10**_MAX_LENGTH_DIGITS
