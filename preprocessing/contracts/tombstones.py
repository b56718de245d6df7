"""Tombstones: which rows must not be used any more, whatever holds them.

They stand in the store, below ``ledger/tombstones/``, in small Parquet files that are never changed: each is named by a
hash of what it says, so any number of writers may add some at once, and adding what is there already adds nothing.
Where files are many, one with all of their entries takes their place. Nothing takes a tombstone away.

| kind | names | what it matches |
| --- | --- | --- |
| ``url`` | an address, as `normalized_url` writes it | rows of that address |
| ``host`` | a host | rows whose address is on it, or on a host below it |
| ``sha256`` | the sha256 of a picture as it was served | rows of that picture, wherever it came from |
| ``uid`` | a (url, caption) pair's `preprocessing.contracts.digests.uid_of` | that row |

Addresses and hosts are kept as their sha256 only: a list of who asked to be forgotten would itself be what they asked
to be rid of. That hides them from whoever reads the store, not from somebody who guesses an address and tries it.

Who reads rows asks `Tombstones` first: the stages (``Reason.FORGOTTEN``), training's order, held-out rows, the contact
sheet. What was written before is cleaned by ``lacuna forget --compact``, see `preprocessing.compact_rows`.
"""

import contextlib
import functools
import getpass
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Literal, get_args

import numpy as np

from infra.errors import ContractError, TransientError
from infra.storage import AlreadyExistsError, ObjectNotFoundError, ObjectStore

if TYPE_CHECKING:
    import pyarrow.parquet as pq

TOMBSTONES_PREFIX: Final = "ledger/tombstones"
MAX_PARTS: Final = 64
"""Of the store. Each is one object to list and to read whenever rows are read."""

Kind = Literal["url", "host", "sha256", "uid"]
Why = Literal["request", "opt_out", "withdrawn"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
REASONS: Final[tuple[Why, ...]] = get_args(Why)

_MERGED: Final = "/merged-"
_NUM_READS: Final = 5
_COLUMNS: Final = ("kind", "value", "reason", "at", "by")
_HEX: Final = {"sha256": re.compile(r"[0-9a-f]{64}"), "uid": re.compile(r"[0-9a-f]{32}")}
_URL: Final = re.compile(
    r"^(?P<scheme>[^/?#:]*:)?//(?P<user>[^/?#\\]*@)?(?P<host>\[[^\]/?#\\@]*\]|[^/?#\\@:]*)"
    r"(?P<port>:[0-9]*(?=[/?#\\]|$))?(?P<rest>.*)$",
    re.S,
)
_HOST: Final = re.compile(r"[^\s/@?#:\\]+|\[[0-9a-f:.]+\]")
_ASCII_HOST: Final = re.compile(r"[a-z0-9._-]*")
_HOST_END: Final = re.compile(r"[.\s]+$")
_PORTS: Final = {"http:": "80", "https:": "443"}


@dataclass(frozen=True)
class Tombstone:
    """One entry.

    Attributes:
        kind: What is named.
        value: Its hash: sha256 of the normalized address or host; the picture's sha256; the uid's own 16 bytes.
        reason: Why: somebody asked, the server says so now, or the source withdrew it.
        at: When; UTC.
        by: Who wrote it: a person's or a program's name.
    """

    kind: Kind
    value: bytes
    reason: Why
    at: datetime
    by: str

    @classmethod
    def of(
        cls, kind: Kind, value: str, *, reason: Why = "request", by: str | None = None, at: datetime | None = None
    ) -> "Tombstone":
        """The tombstone of something in clear.

        Args:
            kind: What is named.
            value: The address, the host, or hexadecimal digits.
            reason: Why.
            by: Who says so; None: the account that this runs under.
            at: When; None: now.

        Raises:
            ValueError: It is nothing of that kind.
        """
        at = (at or datetime.now(UTC)).replace(microsecond=0)
        return cls(kind, hashed(kind, value), reason, at, _account() if by is None else by)


def hashed(kind: Kind, value: str) -> bytes:
    """What is kept of something in clear.

    Raises:
        ValueError: It is nothing of that kind.
    """
    if kind == "url":
        url = normalized_url(value)
        found = _URL.match(url)
        if found is None or not found["scheme"] or not host_of(url):
            raise ValueError(
                f"url: {value!r} is no address with scheme and host; write it as in the metadata: "
                "https://example.com/a.jpg"
            )
        return _sha256(url)
    if kind == "host":
        return _sha256(_checked_host(value))
    digits = value.strip().lower()
    if not _HEX[kind].fullmatch(digits):
        num_digits = 64 if kind == "sha256" else 32
        raise ValueError(f"{kind}: {value!r} is none; write {num_digits} hexadecimal digits")
    return bytes.fromhex(digits)


def normalized_url(url: str) -> str:
    """An address as it is compared.

    As in the metadata, but without white space at the ends, without a fragment and a port that goes without saying,
    with scheme and host in lower case, and the host in the ASCII form in which it is asked for.
    """
    url = url.partition("#")[0].strip()
    found = _URL.match(url)
    if found is None:
        return url
    scheme, user, host, rest = (found[name] or "" for name in ("scheme", "user", "host", "rest"))
    scheme, port = scheme.lower(), (found["port"] or "").removeprefix(":").lstrip("0")
    port = f":{port}" if port and port != _PORTS.get(scheme) else ""
    return f"{scheme}//{user}{_normalized_host(host)}{port}{rest}".strip()


def host_of(url: str) -> str:
    """The host of an address as it is compared, without user, port and the root's dot; empty where there is none."""
    found = _URL.match(url.strip())
    return "" if found is None else _normalized_host(found["host"])


def _normalized_host(host: str) -> str:
    """In lower case, in its ASCII form, without the root's dot; what has no such form stays."""
    host = _HOST_END.sub("", host.lower())
    if not host.isascii():
        try:
            found = host.encode("idna").decode("ascii").lower().rstrip(".")
        except UnicodeError:
            found = ""
        host = found if found and _ASCII_HOST.fullmatch(found) else host
    return host


def _checked_host(value: str) -> str:
    host = _normalized_host(value.strip().removeprefix("*."))
    if not _HOST.fullmatch(host):
        raise ValueError(f"host: {value!r} is no host; write one such as example.com, without scheme, port and path")
    return host


class Tombstones:
    """All tombstones of a store, as of one moment. It can be pickled, so that processes may share one.

    Args:
        entries: What they are; the same thing named twice counts once.
    """

    def __init__(self, entries: Iterable[Tombstone] = ()) -> None:
        values: dict[str, set[bytes]] = {kind: set() for kind in KINDS}
        for entry in entries:
            values[entry.kind].add(entry.value)
        self._values = {kind: frozenset(found) for kind, found in values.items()}

    def __len__(self) -> int:
        """How many things are named."""
        return sum(map(len, self._values.values()))

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of what is named, whoever named it and when; empty where nothing is."""
        if not len(self):
            return ""
        total = hashlib.sha256()
        for kind in KINDS:
            for value in sorted(self._values[kind]):
                total.update(kind.encode() + b"\0" + value)
        return total.hexdigest()

    def names(self, kind: Kind) -> bool:
        """Whether anything of a kind is named; else its column need not be read."""
        return bool(self._values[kind])

    def match(
        self, uid: str | None = None, url: str | None = None, host: str | None = None, sha256: str | None = None
    ) -> Kind | None:
        """By what a row is named, if it is.

        Args:
            uid: Its uid.
            url: Its address, whose host is looked at, too.
            host: Its host.
            sha256: Of its picture.

        Returns:
            The first kind that names it; None if none does. What is None or empty is not looked at.
        """
        if uid and self._values["uid"] and _bytes_of(uid) in self._values["uid"]:
            return "uid"
        if url and self._values["url"] and _sha256(normalized_url(url)) in self._values["url"]:
            return "url"
        if self._values["host"] and ((url and self._names_host(host_of(url))) or (host and self._names_host(host))):
            return "host"
        if sha256 and self._values["sha256"] and _bytes_of(sha256) in self._values["sha256"]:
            return "sha256"
        return None

    def matches(
        self,
        uids: Sequence[str | None] | None = None,
        urls: Sequence[str | None] | None = None,
        sha256s: Sequence[str | None] | None = None,
    ) -> np.ndarray:
        """Which of many rows are named; columns that are None are not looked at.

        Returns:
            One bool a row.

        Raises:
            ValueError: There is no column.
        """
        columns = [column for column in (uids, urls, sha256s) if column is not None]
        if not columns:
            raise ValueError("tombstones: no column of the rows is given")
        found = np.zeros(len(columns[0]), dtype=bool)
        if not len(self):
            return found
        match = self.match
        nothing = (None,) * len(found)
        rows = zip(uids or nothing, urls or nothing, sha256s or nothing, strict=True)
        for place, (uid, url, sha256) in enumerate(rows):
            found[place] = match(uid, url, None, sha256) is not None
        return found

    def _names_host(self, host: str) -> bool:
        host = _normalized_host(host.strip())
        while host:
            if _sha256(host) in self._values["host"]:
                return True
            host = host.partition(".")[2]
        return False

    # ------------------------------------------------------------------------------------------------------- the store

    @classmethod
    def load(cls, store: ObjectStore) -> "Tombstones":
        """Reads all.

        Raises:
            ContractError: A file below the prefix is none of ours.
            TransientError: The store failed, or others were always quicker.
        """
        return cls(read_tombstones(store))

    @staticmethod
    def add(store: ObjectStore, entries: Iterable[Tombstone]) -> int:
        """Adds those that are not there yet, whoever else adds some at the same time.

        Returns:
            How many were not there.

        Raises:
            ContractError: A file below the prefix is none of ours.
            TransientError: The store failed.
        """
        there = read_tombstones(store)
        known = {(entry.kind, entry.value) for entry in there}
        new = {(entry.kind, entry.value): entry for entry in entries if (entry.kind, entry.value) not in known}
        if new:
            _put(store, list(new.values()), "")
            _merge_if_many(store)
        return len(new)


def named_rows(tombstones: Tombstones, file: "pq.ParquetFile", name: str) -> np.ndarray:
    """Which rows of a Parquet file are named; of its columns only those are read that can tell.

    Args:
        tombstones: What is named.
        file: With the columns ``uid``, ``url`` and, where there are pictures, ``sha256`` (or ``expected_sha256``).
        name: Of the file, for messages.

    Returns:
        One bool a row.

    Raises:
        ContractError: There is no column ``uid`` or ``url``, and one is needed.
    """
    there = file.schema_arrow.names
    wanted = [("uids", "uid")] if tombstones.names("uid") else []
    wanted += [("urls", "url")] if tombstones.names("url") or tombstones.names("host") else []
    hashes = [column for column in ("sha256", "expected_sha256") if column in there]
    wanted += [("sha256s", hashes[0])] if tombstones.names("sha256") and hashes else []
    if missing := [column for _, column in wanted if column not in there]:
        raise ContractError(f"{name}: no column {missing[0]!r}, which tells what was forgotten; make the dataset again")
    if not wanted:
        return np.zeros(file.metadata.num_rows, dtype=bool)
    table = file.read([column for _, column in wanted])
    return tombstones.matches(**{parameter: table.column(column).to_pylist() for parameter, column in wanted})


def read_tombstones(store: ObjectStore) -> list[Tombstone]:
    """All entries, in no order; one that stands in two files comes twice.

    Raises:
        ContractError: A file below the prefix is none of ours.
        TransientError: The store failed, or others were always quicker.
    """
    for _ in range(_NUM_READS):
        keys = _keys(store)
        found: list[Tombstone] = []
        for key in sorted(keys):
            with contextlib.suppress(ObjectNotFoundError):  # merged with others since it was listed
                found += _read_part(store, key)
        # A listing is no moment: what was deleted since stands in a merged file, which is there by now.
        if not any(_MERGED in key for key in _keys(store) - keys):
            return found
    raise TransientError(f"{store.uri_of(TOMBSTONES_PREFIX)}: files are merged faster than they can be read")


def _merge_if_many(store: ObjectStore) -> None:
    keys = _keys(store)
    if len(keys) <= MAX_PARTS:
        return
    try:
        entries = list(dict.fromkeys(entry for key in sorted(keys) for entry in _read_part(store, key)))
        merged = _put(store, entries, _MERGED)
        is_there = set(_read_part(store, merged)) == set(entries)
    except ObjectNotFoundError:
        return  # somebody else is at it
    for key in keys - {merged} if is_there else ():
        store.delete(key)


def _put(store: ObjectStore, entries: Sequence[Tombstone], prefix: str) -> str:
    """Writes a file of entries; its name says what is in it, so that equal ones are one."""
    ordered = sorted(entries, key=lambda entry: (entry.kind, entry.value, entry.at, entry.reason, entry.by))
    told = hashlib.sha256()
    for entry in ordered:
        told.update(f"{entry.kind}\0{entry.value.hex()}\0{entry.reason}\0{entry.at.isoformat()}\0{entry.by}\n".encode())
    key = f"{TOMBSTONES_PREFIX}{prefix or '/'}{told.hexdigest()[:32]}.parquet"
    with contextlib.suppress(AlreadyExistsError):  # the same entries in other bytes
        store.put_if_absent(key, _to_parquet(ordered))
    return key


def _keys(store: ObjectStore) -> set[str]:
    return {info.key for info in store.list(f"{TOMBSTONES_PREFIX}/")}


def _to_parquet(entries: Sequence[Tombstone]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            pa.field("kind", pa.string(), nullable=False),
            pa.field("value", pa.binary(), nullable=False),
            pa.field("reason", pa.string(), nullable=False),
            pa.field("at", pa.timestamp("s", "UTC"), nullable=False),
            pa.field("by", pa.string(), nullable=False),
        ]
    )
    columns = [pa.array([getattr(entry, name) for entry in entries], schema.field(name).type) for name in _COLUMNS]
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def _read_part(store: ObjectStore, key: str) -> Iterator[Tombstone]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = store.read(key)
    try:
        table = pq.read_table(io.BytesIO(data), columns=list(_COLUMNS))
        rows = [Tombstone(**row) for row in table.to_pylist()]
        if any(row.kind not in KINDS for row in rows):
            raise ValueError("a kind that this version does not know")
    except (pa.ArrowException, ValueError, TypeError, KeyError) as error:
        raise ContractError(
            f"{store.uri_of(key)}: no list of tombstones of this version ({str(error).splitlines()[0]}); look what it "
            "is: nothing is read while it is not known what must not be"
        ) from error
    return iter(rows)


def _bytes_of(digits: str) -> bytes:
    try:
        return bytes.fromhex(digits)
    except ValueError:
        return b""


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _account() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # an account without a name, as containers have
        return "unknown"
