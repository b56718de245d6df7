"""Metadata files read once, each row judged by itself, the result cut into shards.

A shard is ``rows_per_shard`` consecutive rows of all files. Of plain Parquet files, the numbers of some row groups are
read and judged first. Where rejects are only counted, the texts are read only if the numbers let a row pass, and only
such rows are looked at. Of row groups that by their statistics have no null and no row below the limit, nothing is
read: all their rows count as ``punsafe_high``, those too that are NaN or infinite. Where rejects are written,
everything is read, since they have URL, uid and value, and NaN is ``punsafe_missing`` wherever it stands.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from infra import pulse
from preprocessing.ahead import read_ahead
from preprocessing.block_lists import BlockLists
from preprocessing.contracts.config import SelectConfig
from preprocessing.contracts.reasons import Reason
from preprocessing.filters import (
    CODES,
    KEPT,
    Rule,
    code_of,
    detail_of,
    sample_rules,
    score_rules,
    text_rules,
    with_hosts,
)
from preprocessing.laion import ROWS, SCORES, MetadataFile, PlainReader, Window, read_rows, windows
from preprocessing.select_report import Tally
from preprocessing.spool import Spool
from preprocessing.uids import with_uids

_REASONS = tuple(Reason)
_READS_AHEAD = 1
_COUNTED_ROWS = 262_144  # read at once, where rejects are only counted: only some rows' texts are kept
_WRITTEN_ROWS = 49_152  # read at once, where rejects are written

_Read = tuple[pl.DataFrame, np.ndarray]
"""Consecutive rows, or where refused ones are only counted those of them that pass by their numbers; and the code of
each row of all by its numbers."""

_TEXTS = (("url",), ("caption",), ("language", "expected_md5", "expected_sha256", "is_text"))

CANDIDATES = (
    "position", "uid_high", "uid_low", "url", "caption", *SCORES, "expected_md5", "expected_sha256", "source",
)  # fmt: skip
REJECTS = ("position", "uid_high", "uid_low", "url", "code", "detail")


@dataclass(frozen=True)
class SourceFile:
    """A file, the name of its subset if it has one, and which share of its rows is wanted."""

    file: MetadataFile
    subset: str | None
    share: float


@dataclass(frozen=True)
class ShardRows:
    """One shard after the rules that look at one row at a time.

    Attributes:
        index: Of the shard.
        start: Position of its first row among all.
        num_in: Rows read.
        dropped: Refused rows by reason.
        candidates: The others, with the columns ``CANDIDATES``, in order.
        rejects: The refused ones, with the columns ``REJECTS``, in order; None where they are only counted.
        lost: Candidates that other rows beat, as rejects, in order.
    """

    index: int
    start: int
    num_in: int
    dropped: Counter[str]
    candidates: pl.DataFrame
    rejects: Spool | None
    lost: pl.DataFrame | None = None


@dataclass(frozen=True)
class _Piece:
    """Consecutive rows: the code of each, and those that are kept or written as rejects, with their positions."""

    start: int
    codes: np.ndarray
    candidates: pl.DataFrame
    rejects: pl.DataFrame | None = None

    def cut(self, start: int, stop: int) -> "_Piece":
        return _Piece(
            start,
            self.codes[start - self.start : stop - self.start],
            _between(self.candidates, start, stop),
            None if self.rejects is None else _between(self.rejects, start, stop),
        )


def scan(
    files: Sequence[SourceFile],
    config: SelectConfig,
    blocked: BlockLists,
    rows_per_shard: int,
    tally: Tally,
    scratch: Path,
) -> Iterator[ShardRows]:
    """Reads all files and judges each row by itself.

    Args:
        files: What to read, in order.
        config: The limits.
        blocked: What the block-lists hold.
        rows_per_shard: Rows in each shard; the last may have fewer.
        tally: Is told all scores.
        scratch: Where copies of what is not here are made, one file at a time, and rejects wait.

    Yields:
        All shards, in order.

    Raises:
        ValueError: A file cannot be read; names it.
    """
    pieces = _pieces(files, config, blocked, tally, scratch)
    for index, parts in itertools.groupby(_cut(pieces, rows_per_shard), lambda piece: piece.start // rows_per_shard):
        rejects = None if config.rejects == "counts" else Spool(scratch / f"rejects-{index}.arrow")
        start, counts = index * rows_per_shard, np.zeros(KEPT + 1, np.int64)
        candidates = []
        for piece in parts:
            counts += np.bincount(piece.codes, minlength=KEPT + 1)
            candidates.append(piece.candidates)
            if rejects is not None and piece.rejects is not None:
                rejects.add(piece.rejects)
        if rejects is not None:
            rejects.close()
        yield ShardRows(
            index=index,
            start=start,
            num_in=int(counts.sum()),
            dropped=Counter({_REASONS[code].value: int(counts[code]) for code in np.flatnonzero(counts[:KEPT])}),
            candidates=pl.concat(candidates),
            rejects=rejects,
        )


def _cut(pieces: Iterator[_Piece], rows_per_shard: int) -> Iterator[_Piece]:
    for piece in pieces:
        start, stop = piece.start, piece.start + len(piece.codes)
        while start < stop:
            end = min(stop, (start // rows_per_shard + 1) * rows_per_shard)
            yield piece.cut(start, end)
            start = end


def _between(rows: pl.DataFrame, start: int, stop: int) -> pl.DataFrame:
    first, last = np.searchsorted(rows["position"].to_numpy(), [start, stop])
    return rows.slice(int(first), int(last - first))


def _pieces(
    files: Sequence[SourceFile], config: SelectConfig, blocked: BlockLists, tally: Tally, scratch: Path
) -> Iterator[_Piece]:
    position = 0
    for source in files:
        judge = _Judge(config, blocked, source)
        with source.file.local(scratch) as path:
            done = 0
            for piece in judge.judged(path, position, tally):
                done += len(piece.codes)
                pulse.beat()  # all metadata may be read before the first shard is there
                yield piece
            source.file.check_unchanged()
        position += done


class _Judge:
    """The rules, for the rows of one file."""

    def __init__(self, config: SelectConfig, blocked: BlockLists, source: SourceFile) -> None:
        self._is_counting = config.rejects == "counts"
        # Where rejects are written, everything is read, whatever statistics say.
        self._hopeless_from = config.max_punsafe if self._is_counting else math.inf
        self._blocked = blocked
        self._source = source
        self._scores = list(score_rules(config))
        self._texts = list(text_rules(config, blocked))
        self._sample = list(sample_rules(config.subsample * source.share, blocked))
        self._detail = detail_of([*self._scores, *self._texts, *self._sample])

    def judged(self, path: Path, base: int, tally: Tally) -> Iterator[_Piece]:
        """Judges a file, of which the first row has the position ``base``."""
        with read_ahead(lambda: self._read(path, tally), _READS_AHEAD) as reads:
            for rows, codes in reads:
                yield self._piece(rows, codes, base)
                base += len(codes)

    def _read(self, path: Path, tally: Tally) -> Iterator[_Read]:
        file = self._source.file
        if not file.is_plain:
            yield from self._read_slowly(path, tally)
            return
        reader = PlainReader(file, path)
        for window in windows(file, self._hopeless_from, _COUNTED_ROWS if self._is_counting else _WRITTEN_ROWS):
            read = self._read_window(reader, window, tally)
            if read is None:
                yield from self._read_slowly(path, tally, window.start, window.start + window.num_rows)
            else:
                yield read

    def _read_slowly(self, path: Path, tally: Tally, start: int = 0, stop: int | None = None) -> Iterator[_Read]:
        for rows in read_rows(self._source.file, path, start, stop):
            tally.add_scores(rows)
            codes = _codes(rows, self._scores)
            yield (_compact(rows.filter(codes == KEPT)) if self._is_counting else rows), codes

    def _read_window(self, reader: PlainReader, window: Window, tally: Tally) -> _Read | None:
        """None where it must be read slowly."""
        if window.is_hopeless:
            return _NO_ROWS, np.full(window.num_rows, CODES[Reason.PUNSAFE_HIGH], np.uint8)
        scores = reader.read(window, SCORES)
        if scores is None:
            return None
        codes = _codes(scores, self._scores)
        passes = codes == KEPT
        if self._is_counting and not passes.any():
            tally.add_scores(scores)
            return _NO_ROWS, codes
        rows = _texts_of(reader, window, passes if self._is_counting else None)
        if rows is None:
            return None
        tally.add_scores(scores)
        return rows.hstack(scores.filter(passes) if self._is_counting else scores), codes

    def _piece(self, rows: pl.DataFrame, codes: np.ndarray, start: int) -> _Piece:
        """The rows after all rules, from those that were read and what the numbers say of all."""
        if self._is_counting and not rows.height:
            return _Piece(start, codes, _NO_CANDIDATES)
        codes = codes.copy()
        places = np.flatnonzero(codes == KEPT) if self._is_counting else np.arange(len(codes))
        rows = rows.with_columns(
            position=pl.Series(places + start, dtype=pl.Int64), source=pl.lit(self._source.subset, pl.String)
        )
        if not self._is_counting:
            rows = with_uids(rows)
        kept = rows if self._is_counting else rows.filter(codes == KEPT)
        kept = _refused(with_hosts(kept, self._blocked), self._texts, codes, start)
        if self._is_counting:
            kept = with_uids(kept)
        kept = _refused(kept, self._sample, codes, start)
        kept = kept.select(_CANDIDATE_COLUMNS)
        if self._is_counting:
            return _Piece(start, codes, kept)
        rejects = rows.with_columns(code=codes).filter(codes != KEPT).with_columns(self._detail).select(REJECTS)
        return _Piece(start, codes, _compact(kept), rejects)


def _texts_of(reader: PlainReader, window: Window, is_wanted: np.ndarray | None) -> pl.DataFrame | None:
    """The texts of some rows: two columns at once, each by a thread, and no more, since all of a window are much."""

    def read(names: Sequence[str]) -> pl.DataFrame | None:
        rows = reader.read(window, names)
        return rows if rows is None or is_wanted is None else _compact(rows.filter(is_wanted))

    with ThreadPoolExecutor(2, "texts") as pool:
        columns = [rows for rows in pool.map(read, _TEXTS) if rows is not None]
    return pl.concat(columns, how="horizontal") if len(columns) == len(_TEXTS) else None


def _codes(rows: pl.DataFrame, rules: Sequence[Rule]) -> np.ndarray:
    return rows.select(code_of(rules))["code"].to_numpy()


def _refused(rows: pl.DataFrame, rules: Sequence[Rule], codes: np.ndarray, start: int) -> pl.DataFrame:
    """The rows that pass some rules; the codes of the others are written among those of all rows."""
    if not rules:
        return rows
    found = _codes(rows, rules)
    codes[rows["position"].to_numpy() - start] = found
    return rows if (found == KEPT).all() else rows.filter(found == KEPT)


def _compact(rows: pl.DataFrame) -> pl.DataFrame:
    """The same rows in memory of their own: a few of many would keep the texts of all."""
    texts = [name for name, dtype in rows.schema.items() if dtype == pl.String]
    copied = pl.from_arrow(rows.select(texts).to_arrow(compat_level=pl.CompatLevel.oldest()))
    assert isinstance(copied, pl.DataFrame)
    return rows.with_columns(copied)


_NO_ROWS = pl.DataFrame(schema=dict(ROWS))
_CANDIDATE_COLUMNS = [pl.col(name).fill_null("") if name == "caption" else pl.col(name) for name in CANDIDATES]
_NO_CANDIDATES = _NO_ROWS.with_columns(
    position=pl.lit(0, pl.Int64),
    source=pl.lit(None, pl.String),
    uid_high=pl.lit(0, pl.UInt64),
    uid_low=pl.lit(0, pl.UInt64),
).select(_CANDIDATE_COLUMNS)
