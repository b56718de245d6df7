"""Rules over several rows: duplicates, rows per host, rows in all. Exact, in bounded memory, at any number of rows.

Wherever some rows must go, those with the smallest uids stay, and of rows with one uid (the same URL and caption) the
first in the order of reading. So the result does not depend on shards or, but for such equal rows, on the order of
files; and what a smaller ``select.subsample``, ``max_rows_per_host`` or ``max_rows`` keeps is a part of what a larger
one keeps.

Each candidate becomes a record of a few numbers, appended to one of many files by the hash of its URL; rows with one
URL meet in one file, and one file at a time is sorted in memory. URLs and hosts are compared by 128 and 64 bits of
XXH3: some two of 10^10 URLs are taken for one with a chance of 10^-18, some two of 10^8 hosts with one of 10^-3.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from infra import pulse
from preprocessing.block_lists import host_of
from preprocessing.contracts.config import SelectConfig
from preprocessing.contracts.reasons import Reason
from preprocessing.filters import CODES
from preprocessing.uids import url_halves

_ROWS_PER_FILE = 500_000
_MAX_FILES = 512
_POSITIONS_PER_BUCKET = 1 << 22
_CHUNK_RECORDS = 500_000

_RECORD = np.dtype(
    [
        ("url_high", "<u8"),
        ("url_low", "<u8"),
        ("host", "<u8"),
        ("uid_high", "<u8"),
        ("uid_low", "<u8"),
        ("position", "<i8"),
    ]
)
_LOSER = np.dtype([("position", "<i8"), ("reason", "u1")])
_RULES = (Reason.DUPLICATE_ROW, Reason.DUPLICATE_URL, Reason.HOST_FULL, Reason.OVER_LIMIT)


def are_needed(config: SelectConfig) -> bool:
    """Whether the config has any rule over several rows."""
    return config.drop_duplicates or config.max_rows_per_host is not None or config.max_rows is not None


class Winners:
    """Takes candidates, then says which of them lose.

    Args:
        config: The rules.
        max_rows: As many candidates as there can be.
        scratch: An empty folder: about 50 bytes a candidate.
    """

    def __init__(self, config: SelectConfig, max_rows: int, scratch: Path) -> None:
        self._config = config
        num_files = int(np.clip(-(-max_rows // _ROWS_PER_FILE), 1, _MAX_FILES))
        self._by_url = _Partitions(scratch, "url", num_files, _RECORD)
        self._by_host = _Partitions(scratch, "host", num_files, _RECORD)
        self._last = _Partitions(scratch, "rest", 1, _RECORD)
        self._losers = _Partitions(scratch, "losers", max_rows // _POSITIONS_PER_BUCKET + 1, _LOSER)
        self._bucket: tuple[int, np.ndarray] | None = None

    def add(self, candidates: pl.DataFrame) -> None:
        """Takes rows with the columns ``url``, ``uid_high``, ``uid_low`` and ``position``."""
        columns = [pl.col("uid_high"), pl.col("uid_low"), pl.col("position"), *url_halves(pl.col("url"))]
        if self._config.max_rows_per_host is not None:
            host = host_of(pl.col("url"))
            columns.append(host.nchash.xxh3_64().alias("host"))  # pyright: ignore[reportAttributeAccessIssue]
        read = candidates.select(columns)
        records = np.zeros(read.height, _RECORD)
        for name in read.columns:
            records[name] = read[name].to_numpy()
        self._by_url.add(records, records["url_high"])

    def resolve(self) -> None:
        """Applies the rules; to be called once, when all candidates were added."""
        for records in self._by_url.each():
            pulse.beat()
            if self._config.drop_duplicates:
                records = self._without_duplicates(records)
            if self._config.max_rows_per_host is not None:
                self._by_host.add(records, records["host"])
            elif self._config.max_rows is not None:
                self._last.add(records, records["host"])
        if self._config.max_rows_per_host is not None:
            for index in range(self._by_host.num_files):
                pulse.beat()
                self._limit_hosts(index, self._config.max_rows_per_host)
        if self._config.max_rows is not None:
            self._limit_all(self._config.max_rows)
        self._losers.flush()

    def losers(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Who loses among the positions [start, stop).

        Returns:
            Positions, ascending, and for each a place in ``Winners.reasons``.
        """
        parts = []
        for index in range(start // _POSITIONS_PER_BUCKET, max(stop - 1, start) // _POSITIONS_PER_BUCKET + 1):
            if self._bucket is None or self._bucket[0] != index:
                found = self._losers.read(index)
                self._bucket = (index, found[np.argsort(found["position"])])
            found = self._bucket[1]
            first, last = np.searchsorted(found["position"], [start, stop])
            parts.append(found[first:last].copy())
        found = np.concatenate(parts)
        return found["position"], found["reason"]

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """The rules, by place."""
        return _RULES

    @property
    def codes(self) -> np.ndarray:
        """The rules' codes, as ``filters`` has them, by place."""
        return np.array([CODES[reason] for reason in _RULES], np.uint8)

    def _lose(self, positions: np.ndarray, reason: Reason | np.ndarray) -> None:
        losers = np.empty(len(positions), _LOSER)
        losers["position"] = positions
        losers["reason"] = reason if isinstance(reason, np.ndarray) else _RULES.index(reason)
        self._losers.add(losers, positions // _POSITIONS_PER_BUCKET)

    def _without_duplicates(self, records: np.ndarray) -> np.ndarray:
        """Of the rows of each URL only the first by uid and position."""
        order = np.argsort(records["url_high"])  # only rows that share it need to be looked at
        high = records["url_high"][order]
        is_equal = high[1:] == high[:-1]
        shares = np.zeros(len(records), bool)
        shares[order[1:]] = is_equal
        shares[order[:-1]] |= is_equal
        among = _sorted(records[shares], "url_high", "url_low", "uid_high", "uid_low", "position")
        same_url = _repeats(among, "url_high", "url_low")
        same_row = same_url & _repeats(among, "uid_high", "uid_low")
        codes = np.where(same_row, _RULES.index(Reason.DUPLICATE_ROW), _RULES.index(Reason.DUPLICATE_URL))
        self._lose(among["position"][same_url], codes[same_url].astype(np.uint8))
        return np.concatenate([records[~shares], among[~same_url]])

    def _limit_hosts(self, index: int, max_rows: int) -> None:
        """Keeps the first rows of each host; never more in memory than a chunk and what is kept so far."""
        kept = np.empty(0, _RECORD)
        for chunk in self._by_host.chunks(index):
            among = _sorted(np.concatenate([kept, chunk]), "host", "uid_high", "uid_low", "position")
            starts = np.flatnonzero(~_repeats(among, "host"))
            lengths = np.diff(np.append(starts, len(among)))
            rank = np.arange(len(among)) - np.repeat(starts, lengths)
            self._lose(among["position"][rank >= max_rows], Reason.HOST_FULL)
            kept = among[rank < max_rows]
        if self._config.max_rows is not None:
            self._last.add(kept, kept["host"])

    def _limit_all(self, max_rows: int) -> None:
        """Keeps the first rows of all: first how far up the uids it goes, then the rows around there."""
        counts = np.zeros(1 << 16, np.int64)
        for chunk in self._last.chunks(0):
            counts += np.bincount((chunk["uid_high"] >> np.uint64(48)).astype(np.int64), minlength=1 << 16)
        total = np.cumsum(counts)
        if total[-1] <= max_rows:
            return
        edge = int(np.searchsorted(total, max_rows, side="right"))  # the first bin that is not kept whole
        room = max_rows - (int(total[edge - 1]) if edge else 0)
        around = []
        for chunk in self._last.chunks(0):
            place = (chunk["uid_high"] >> np.uint64(48)).astype(np.int64)
            self._lose(chunk["position"][place > edge], Reason.OVER_LIMIT)
            around.append(chunk[place == edge])
        last = _sorted(np.concatenate(around), "uid_high", "uid_low", "position")
        self._lose(last["position"][room:], Reason.OVER_LIMIT)


def _sorted(records: np.ndarray, *names: str) -> np.ndarray:
    return records[np.lexsort([records[name] for name in reversed(names)])]


def _repeats(records: np.ndarray, *names: str) -> np.ndarray:
    """Which rows have the same values as the row before them."""
    repeats = np.zeros(len(records), bool)
    if len(records):
        repeats[1:] = np.logical_and.reduce([records[name][1:] == records[name][:-1] for name in names])
    return repeats


class _Partitions:
    """Records in files, by a number modulo the number of files; buffered, so that writes are few."""

    _BUFFERED_RECORDS = 1 << 17

    def __init__(self, folder: Path, name: str, num_files: int, dtype: np.dtype) -> None:
        self.num_files = num_files
        self._paths = [folder / f"{name}-{index:05d}" for index in range(num_files)]
        self._dtype = dtype
        self._buffer: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_buffered = 0

    def add(self, records: np.ndarray, by: np.ndarray) -> None:
        """Adds records, each to the file that its number names."""
        self._buffer.append((records, (by % by.dtype.type(self.num_files)).astype(np.uint16)))
        self._num_buffered += len(records)
        if self._num_buffered >= self._BUFFERED_RECORDS:
            self.flush()

    def flush(self) -> None:
        """Writes what is still in memory."""
        if not self._num_buffered:
            return
        records, place = (np.concatenate(parts) for parts in zip(*self._buffer, strict=True))
        self._buffer, self._num_buffered = [], 0
        order = np.argsort(place, kind="stable")
        ends = np.cumsum(np.bincount(place, minlength=self.num_files))
        for index in np.flatnonzero(np.diff(ends, prepend=0)):
            start = ends[index - 1] if index else 0
            with self._paths[index].open("ab") as file:
                records[order[start : ends[index]]].tofile(file)

    def read(self, index: int) -> np.ndarray:
        """All records of one file."""
        self.flush()
        with contextlib.suppress(FileNotFoundError):
            return np.fromfile(self._paths[index], self._dtype)
        return np.empty(0, self._dtype)

    def each(self) -> Iterator[np.ndarray]:
        """The files, one after the other; each is gone once it was read."""
        for index, path in enumerate(self._paths):
            yield self.read(index)
            path.unlink(missing_ok=True)

    def chunks(self, index: int) -> Iterator[np.ndarray]:
        """One file in pieces."""
        self.flush()
        with contextlib.suppress(FileNotFoundError), self._paths[index].open("rb") as file:
            while len(found := np.fromfile(file, self._dtype, _CHUNK_RECORDS)):
                yield found
