"""Lists of what must not be used, from private files: hosts, URLs, hashes.

What is in them is never logged, never written to a manifest and never part of an error: only their counts and the
sha256 of the files, which is part of the digest.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from infra.storage import sha256_of_bytes
from preprocessing.contracts.config import SelectConfig

HOST = r"^[^/?#]*//(?:[^/?#@]*@)?(\[[^\]/?#]*\]|[^/?#:]*)"
"""Where the host stands in a URL, as its first group."""

_HASH = re.compile(r"[0-9a-f]{32}|[0-9a-f]{64}")


@dataclass(frozen=True)
class BlockLists:
    """What is blocked.

    Attributes:
        hosts: Lower-case; each stands for its subdomains, too.
        urls: Exactly as in the metadata, without white space at the ends.
        hashes: md5 and uids (32 digits), sha256 (64), lower-case.
        described: By field: the file's sha256 and how many entries it has.
    """

    hosts: frozenset[str] = frozenset()
    urls: frozenset[str] = frozenset()
    hashes: frozenset[str] = frozenset()
    described: Mapping[str, Mapping[str, str | int]] = field(default_factory=dict)

    def blocks_host(self, host: str) -> bool:
        """Whether a host or a domain above it is listed."""
        while host:
            if host in self.hosts:
                return True
            host = host.partition(".")[2]
        return False


def host_of(url: pl.Expr) -> pl.Expr:
    """The host of a URL in lower case, without user, port and the root's dot; empty where there is none."""
    return url.str.extract(HOST).fill_null("").str.to_lowercase().str.strip_chars_end(".")


def read_block_lists(config: SelectConfig) -> BlockLists:
    """Reads the files that the config names.

    Raises:
        ValueError: One cannot be read, or has a line that is nothing of its kind; names the line's number only.
    """
    lists: dict[str, frozenset[str]] = {}
    described: dict[str, dict[str, str | int]] = {}
    for name in ("hosts", "urls", "hashes"):
        path = getattr(config, f"block_{name}")
        if path is not None:
            lists[name], described[name] = _read(f"select.block_{name}", name, path)
    return BlockLists(**lists, described=described)


def _read(option: str, kind: str, path: str) -> tuple[frozenset[str], dict[str, str | int]]:
    file = Path(path).expanduser()
    try:
        return _parsed(option, kind, file)
    except OSError as error:
        raise ValueError(f"{option}: {path!r} cannot be read ({error.strerror}); give a text file") from error


def _parsed(option: str, kind: str, file: Path) -> tuple[frozenset[str], dict[str, str | int]]:
    data = file.read_bytes()
    entries = set()
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: {str(file)!r} is not UTF-8; give a text file") from error
    for number, line in enumerate(lines, 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        if kind != "urls":
            entry = entry.lower()
        if kind == "hosts":
            entry = entry.rstrip(".").removeprefix("*.")
            if not entry or any(sign in entry for sign in "/@?# "):
                raise ValueError(f"{option}: line {number} of {str(file)!r} is no host; write one such as example.com")
        if kind == "hashes" and not _HASH.fullmatch(entry):
            raise ValueError(f"{option}: line {number} of {str(file)!r} is no hash; write 32 or 64 hexadecimal digits")
        entries.add(entry)
    return frozenset(entries), {"sha256": sha256_of_bytes(data), "count": len(entries)}
