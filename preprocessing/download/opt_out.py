"""Whether an answer's headers say that its content must not be used for training.

| header | means no |
| --- | --- |
| ``X-Robots-Tag`` | noai, noimageai, noindex, noimageindex, none, noml; for everybody, for ``*`` or for our name |
| ``TDM-Reservation`` | 1 (TDMRep) |
| ``Content-Usage`` | train-ai=n, train-genai=n; bots=n where neither is named (IETF AIPREF, a draft) |

In doubt it is a no: of two answers that contradict each other the refusal counts, and so it does on a redirect, an
error page, or where directives are parted by blanks. What is addressed to another robot, and the value of another
directive (``max-image-preview:none``), is none.

Source: Google's and Bing's pages on X-Robots-Tag; W3C TDMRep community report; draft-ietf-aipref-attach and -vocab;
RFC 9651 (structured fields).
"""

import hashlib
import os
import re
import threading
from pathlib import Path

from preprocessing.download.responses import Headers

REFUSALS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none", "noml"})
# Directives that take a value after a colon: what is before it is not a robot's name.
_WITH_VALUE = frozenset({"max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"})
_ROBOT = re.compile(r"[a-z0-9_.*/+-]+", re.ASCII)
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_YES = re.compile(r'"?\s*1\s*"?(\s*;.*)?', re.DOTALL)


def opt_out(headers: Headers, robot: str) -> str | None:
    """What forbids the use of an answer.

    Args:
        headers: The answer's; names in any case, repeated ones allowed.
        robot: Our name, in lower case.

    Returns:
        The header and its value, for people; None where nothing forbids it.
    """
    for value in headers.get_all("X-Robots-Tag"):
        if _robots_tag_refuses(value, robot):
            return f"X-Robots-Tag: {value}"
    for value in headers.get_all("TDM-Reservation"):
        if any(_YES.fullmatch(item.strip()) for item in value.split(",")):
            return f"TDM-Reservation: {value}"
    usage = headers.get_all("Content-Usage")
    if _usage_refuses(usage):
        return f"Content-Usage: {', '.join(usage)}"
    return None


def _robots_tag_refuses(value: str, robot: str) -> bool:
    is_for_us = True  # until a robot is named; then until another is, or to the end of this header
    for item in value.lower().split(","):
        rest = item
        while ":" in rest:
            name, _, rest = rest.partition(":")
            name = name.strip()
            if name in _WITH_VALUE or not _ROBOT.fullmatch(name):
                rest = ""  # a value, or the time of a date whose comma parted it from its directive
                break
            is_for_us = name in ("*", robot)
        if is_for_us and not REFUSALS.isdisjoint(re.split(r"[\s;]+", rest)):
            return True
    return False


def _usage_refuses(values: list[str]) -> bool:
    said: dict[str, set[str]] = {}
    for value in values:
        for member in _QUOTED.sub('""', value.lower()).split(","):
            key, _, rest = member.partition("=")
            said.setdefault(key.strip(), set()).add(rest.partition(";")[0].strip())
    named = said.get("train-ai", set()) | said.get("train-genai", set())
    return "n" in (named or said.get("bots", set()))


class OptOutMemory:
    """Which URLs said no in this run; they are not asked again, by whatever process or row.

    Args:
        path: A file that all processes of the run share, appended to; None to remember in this process only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: set[bytes] = set()
        self._num_read = 0
        self._lock = threading.Lock()
        self.reload()

    def reload(self) -> None:
        """Takes in what others have added."""
        if self._path is None:
            return
        with self._lock:
            try:
                with self._path.open("rb") as file:
                    file.seek(self._num_read)
                    data = file.read()
            except FileNotFoundError:
                return
            whole = data[: data.rfind(b"\n") + 1]
            self._num_read += len(whole)
            self._known.update(bytes.fromhex(line.decode()) for line in whole.split())

    def __contains__(self, url: str) -> bool:
        return bool(self._known) and _key(url) in self._known

    def add(self, *urls: str) -> None:
        """Remembers URLs."""
        with self._lock:
            new = {_key(url) for url in urls} - self._known
            self._known |= new
            if self._path is not None and new:
                # One write of a few bytes to the end of a file: other processes' lines are not torn.
                descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                try:
                    os.write(descriptor, b"".join(key.hex().encode() + b"\n" for key in new))
                finally:
                    os.close(descriptor)


def _key(url: str) -> bytes:
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).digest()[:16]
