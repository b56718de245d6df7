"""Opt-outs: every form in which a server may say no, forms that only look like it, and img2dataset beside us."""

import io
from email.message import Message
from pathlib import Path

import pytest

from preprocessing.download.img2dataset_parts import is_disallowed
from preprocessing.download.opt_out import OptOutMemory, opt_out
from preprocessing.download.responses import Headers, read_response

ROBOT = "lacuna"
TAG = "X-Robots-Tag"

# Every one is a no.
REFUSALS: dict[str, list[tuple[str, str]]] = {
    "noai": [(TAG, "noai")],
    "noimageai": [(TAG, "noimageai")],
    "noindex": [(TAG, "noindex")],
    "noimageindex": [(TAG, "noimageindex")],
    "none": [(TAG, "none")],
    "noml": [(TAG, "noml")],
    "upper case": [(TAG, "NOAI")],
    "mixed case": [(TAG, "NoImageAI")],
    "header name in lower case": [("x-robots-tag", "noai")],
    "header name in upper case": [("X-ROBOTS-TAG", "noai")],
    "list": [(TAG, "noarchive, noai")],
    "list without blanks": [(TAG, "nofollow,noai,noarchive")],
    "blanks around": [(TAG, "   noai   ,  nosnippet ")],
    "empty members": [(TAG, ", ,noai,")],
    "repeated header, the last one": [(TAG, "nofollow"), (TAG, "noai")],
    "repeated header, the first one": [(TAG, "noimageindex"), (TAG, "all")],
    "after a directive with a value": [(TAG, "max-image-preview:large, noai")],
    "after a directive with a value and a blank": [(TAG, "max-image-preview: large, noai")],
    "after two values": [(TAG, "max-snippet: -1, max-video-preview: 5, noindex")],
    "before a directive with a value": [(TAG, "noai, max-snippet:20")],
    "after a date with a comma": [(TAG, "unavailable_after: Sat, 25 Jun 2033 15:00:00 GMT, noai")],
    "after an RFC 850 date": [(TAG, "unavailable_after: Saturday, 25-Jun-33 15:00:00 PST, noai")],
    "after an ISO date": [(TAG, "unavailable_after: 2033-06-25T15:00:00Z, noindex")],
    "before a date": [(TAG, "noindex, unavailable_after: 25 Jun 2033 15:00:00 PST")],
    "for us": [(TAG, "lacuna: noai")],
    "for us, in our case": [(TAG, "Lacuna: noindex")],
    "for us, a list": [(TAG, "lacuna: nofollow, noai")],
    "for everybody": [(TAG, "*: noai")],
    "for everybody without a blank": [(TAG, "*:noimageai")],
    "for another and then for us": [(TAG, "googlebot: nofollow, lacuna: noai")],
    "for another and then for everybody": [(TAG, "googlebot: noindex, *: none")],
    "for another in one header, for all in the next": [(TAG, "googlebot: noindex"), (TAG, "noai")],
    "for us with a value first": [(TAG, "lacuna: max-snippet: 10, noai")],
    "parted by blanks": [(TAG, "noai noimageai")],
    "parted by semicolons": [(TAG, "nofollow; noindex")],
    "tdm-reservation": [("tdm-reservation", "1")],
    "TDM-Reservation with a policy": [("TDM-Reservation", "1"), ("TDM-Policy", "https://a.example/policy.json")],
    "tdm-reservation with blanks": [("TDM-RESERVATION", " 1 ")],
    "tdm-reservation repeated": [("tdm-reservation", "0"), ("tdm-reservation", "1")],
    "content-usage": [("Content-Usage", "train-ai=n")],
    "content-usage in lower case": [("content-usage", "train-ai=n")],
    "content-usage in a dictionary": [("Content-Usage", "search=y, train-ai=n")],
    "content-usage with a parameter": [("Content-Usage", "train-ai=n;exp=1")],
    "content-usage for generative models": [("Content-Usage", "train-ai=y, train-genai=n")],
    "content-usage over two headers": [("Content-Usage", "search=y"), ("Content-Usage", "train-ai=n")],
    "content-usage for all machines": [("Content-Usage", "bots=n")],
    "robots say yes, usage says no": [(TAG, "all"), ("Content-Usage", "train-ai=n")],
    "folded line": [(TAG, "nofollow,\r\n noai")],
}

# None of these is one.
HARMLESS: dict[str, list[tuple[str, str]]] = {
    "nothing": [],
    "all": [(TAG, "all")],
    "index, follow": [(TAG, "index, follow")],
    "nofollow": [(TAG, "nofollow, noarchive, nosnippet, notranslate")],
    "a value called none": [(TAG, "max-image-preview:none")],
    "a value called none, with a blank": [(TAG, "max-image-preview: none, max-snippet: 0")],
    "for another": [(TAG, "googlebot: noindex")],
    "for another, a list": [(TAG, "googlebot: noindex, noai")],
    "for two others": [(TAG, "googlebot: noindex, bingbot: none")],
    "for another whose name contains ours": [(TAG, "lacuna-images: noai")],
    "a date": [(TAG, "unavailable_after: Sat, 25 Jun 2033 15:00:00 GMT")],
    "a longer word": [(TAG, "noaiplease, nonetheless")],
    "an empty value": [(TAG, "")],
    "only commas": [(TAG, ",,,")],
    "tdm-reservation 0": [("tdm-reservation", "0")],
    "tdm-reservation empty": [("tdm-reservation", "")],
    "tdm-reservation 10": [("tdm-reservation", "10")],
    "content-usage yes": [("Content-Usage", "train-ai=y")],
    "content-usage for searching": [("Content-Usage", "search=n, train-ai=y")],
    "content-usage, training excepted": [("Content-Usage", "bots=n, train-ai=y, train-genai=y")],
    "content-usage in a string": [("Content-Usage", 'note="x, train-ai=n", train-ai=y')],
    "another header": [("X-Robots", "noai"), ("Robots", "noindex")],
}


def headers_of(fields: list[tuple[str, str]]) -> Message:
    message = Message()
    for name, value in fields:
        message[name] = value.replace("\r\n", "")
    return message


def answered(fields: list[tuple[str, str]]) -> Headers:
    """As they are read from a server's bytes, between two lines of which one is no header."""
    lines = [
        "HTTP/1.1 200 OK",
        "no header at all",
        *(f"{name}:{value}" for name, value in fields),
        "Date: today",
        "",
        "",
    ]
    received = io.BytesIO("\r\n".join(lines).encode("latin-1"))
    return read_response(received.read).headers


@pytest.mark.parametrize("form", REFUSALS)
def test_honoured(form: str) -> None:
    found = opt_out(answered(REFUSALS[form]), ROBOT)
    assert found is not None


@pytest.mark.parametrize("form", HARMLESS)
def test_not_mistaken(form: str) -> None:
    assert opt_out(answered(HARMLESS[form]), ROBOT) is None


def test_beside_img2dataset() -> None:
    """Ours honours all; how many img2dataset's own check does is stated in docs/benchmarks.md."""
    directives = {"noai", "noimageai", "noindex", "noimageindex"}  # its default
    theirs = [form for form in REFUSALS if is_disallowed(headers_of(REFUSALS[form]), ROBOT, directives)]
    mistaken = [form for form in HARMLESS if is_disallowed(headers_of(HARMLESS[form]), ROBOT, directives)]
    assert len(REFUSALS) >= 40
    assert len(HARMLESS) >= 15
    # docs/benchmarks.md says so.
    assert (len(REFUSALS), len(theirs)) == (48, 20)
    assert (len(HARMLESS), len(mistaken)) == (22, 0)


def test_memory_is_shared_by_processes(tmp_path: Path) -> None:
    ours, theirs = OptOutMemory(tmp_path / "no.txt"), OptOutMemory(tmp_path / "no.txt")
    ours.add("http://a.example/1", "http://a.example/ü")
    assert "http://a.example/1" in ours
    assert "http://a.example/1" not in theirs
    theirs.add("http://a.example/2")
    theirs.reload()
    ours.reload()
    for url in ("http://a.example/1", "http://a.example/2", "http://a.example/ü"):
        assert url in ours
        assert url in theirs
        assert url in OptOutMemory(tmp_path / "no.txt")
    assert "http://a.example/3" not in ours


def test_a_torn_line_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "no.txt"
    OptOutMemory(path).add("http://a.example/1")
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:7])
    memory = OptOutMemory(path)
    assert "http://a.example/1" in memory
    path.write_bytes(whole + whole)
    memory.reload()
    assert "http://a.example/1" in memory
