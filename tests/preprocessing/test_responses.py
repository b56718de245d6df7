"""Answers from bytes: the same however they are cut, and nothing that can be read in two ways."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing.download.responses import (
    BadResponseError,
    CutShortError,
    HungUpError,
    Receive,
    Response,
    read_response,
)

BODY = bytes(range(256)) * 3
HEAD = b"HTTP/1.1 200 OK\r\n"
NEXT = b"HTTP/1.1 500 the next answer\r\n\r\n"
CHUNKED = b"".join(b"%x;what=ever\r\n%b\r\n" % (len(piece), piece) for piece in (BODY[:5], BODY[5:300], BODY[300:]))

# Each with the body above.
WHOLE = {
    "length": HEAD + b"Content-Length: 768\r\n\r\n" + BODY,
    "length, said twice": HEAD + b"Content-Length: 768\r\ncontent-length:768\r\n\r\n" + BODY,
    "length, said twice in one": HEAD + b"Content-Length: 768, 768\r\n\r\n" + BODY,
    "to the end": HEAD + b"\r\n" + BODY,
    "to the end, lines of line feeds": b"HTTP/1.0 200\nServer: x\n\n" + BODY,
    "chunks": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED + b"0\r\nTrailer: x\r\n\r\n",
    "interim answers first": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
    + HEAD
    + b"Content-Length: 768\r\n\r\n"
    + BODY,
}


def cut(data: bytes, at: list[int]) -> Receive:
    """Gives a connection's bytes in pieces of these lengths, and then as they are asked for."""
    file, lengths = io.BytesIO(data), iter(at)
    return lambda num_bytes: file.read(min(num_bytes, next(lengths, num_bytes)))


def read_all(response: Response, piece_bytes: int) -> bytes:
    pieces: list[bytes] = []
    while not pieces or len(pieces[-1]) == piece_bytes:
        pieces.append(response.read(piece_bytes))
    return b"".join(pieces)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(WHOLE)), st.lists(st.integers(1, 60), max_size=60), st.integers(1, 900))
def test_however_it_is_cut(form: str, at: list[int], piece_bytes: int) -> None:
    response = read_response(cut(WHOLE[form], at))
    assert response.status == 200
    assert read_all(response, piece_bytes) == BODY
    assert response.can_be_kept == ("to the end" not in form)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(form for form in WHOLE if "to the end" not in form)), st.integers(0, 5000))
def test_one_that_is_cut_short_is_never_taken_for_whole(form: str, length: int) -> None:
    data = WHOLE[form][: length % len(WHOLE[form])]
    with pytest.raises((CutShortError, HungUpError)):
        read_all(read_response(cut(data, [])), 100)


def test_what_comes_after_it_is_seen() -> None:
    for form in ("length", "chunks"):
        response = read_response(cut(WHOLE[form] + NEXT, []))
        assert read_all(response, 1000) == BODY
        assert not response.can_be_kept


@pytest.mark.parametrize(
    ("head", "is_kept"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
        (b"HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: foo, Close\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\nConnection: keep-alive\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nTransfer-Encoding: identity\r\n\r\n", False),
    ],
)
def test_which_connections_are_kept(head: bytes, is_kept: bool) -> None:
    response = read_response(cut(head, []))
    assert read_all(response, 10) == b""
    assert response.can_be_kept == is_kept


def test_headers() -> None:
    lines = (
        b"X-Robots-Tag: noarchive\r\n",
        b"this is no header\r\n",
        b": nor this\r\n",
        b"x-robots-TAG:\tnoindex,\r\n  noai\r\n",
        b"Location: \xfcber\r\n",
    )
    headers = read_response(cut(HEAD + b"".join(lines) + b"\r\n", [])).headers
    assert headers.get_all("X-Robots-Tag") == ["noarchive", "noindex, noai"]
    assert headers.get("X-ROBOTS-TAG") == "noarchive"
    assert headers.get("Location") == "über"
    assert headers.get("Nothing") == ""
    assert headers.num_bytes > 60


@pytest.mark.parametrize(
    "data",
    [
        b"<html>",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 99 no\r\n\r\n",
        b"HTTP/1.1 2000 no\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        HEAD + b"Content-Length: 5, 6\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
        HEAD + b"Name: value\r\n" * 101 + b"\r\n",
        *(
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + size + b"\r\n" + BODY
            for size in (b"-1", b"0x5", b"1_0", b"+5", b"", b"zz", b"f" * 16)
        ),
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nfour\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b" " * 70_000 + b"1\r\n",
    ],
    ids=lambda data: repr(data[:50]),
)
def test_refused(data: bytes) -> None:
    with pytest.raises(BadResponseError):
        read_response(cut(data, [])).read(100)


def test_lengths_that_are_none() -> None:
    for value, expected in ((b"-5", None), (b"5x", None), (b"", None), (b"7" * 5000, 10**18)):
        assert read_response(cut(HEAD + b"Content-Length: " + value + b"\r\n\r\n", [])).length == expected
