"""Metadata files read once, each row judged by itself, the result cut into shards.

A shard is ``rows_per_shard`` consecutive rows of all files. There are two ways to read a file, with one result:

* whole: every column, and every row becomes a candidate or a reject. For any file, and wherever rejects are written;
* quick: for plain Parquet files, where rejects are only counted. The numbers of a row group are read and judged first
  (where it cannot have a row below the limit, ``punsafe`` alone), and its texts only if the numbers let a row pass;
  of these, only the rows that pass are looked at.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from preprocessing.ahead import read_ahead
from preprocessing.block_lists import BlockLists
from preprocessing.contracts.config import SelectConfig
from preprocessing.contracts.reasons import Reason
from preprocessing.filters import (
    KEPT,
    code_of,
    sample_rules,
    score_rules,
    text_rules,
    verdict,
    with_hosts,
)
from preprocessing.laion import ROWS, SCORES, MetadataFile, read_rows, read_scores, read_texts
from preprocessing.select_report import Tally
from preprocessing.uids import uid_halves

_REASONS = tuple(Reason)
_BATCHES_AHEAD = 1
_JUDGED_ROWS = 32_768  # at once; each step waits for other threads

CANDIDATES = (
    "position", "uid_high", "uid_low", "url", "caption", *SCORES, "expected_md5", "expected_sha256", "source",
)  # fmt: skip
REJECTS = ("position", "uid_high", "uid_low", "url", "reason", "detail")


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
        rejects: The refused ones, with the columns ``REJECTS``, in order; empty where they are only counted.
    """

    index: int
    start: int
    num_in: int
    dropped: Counter[str]
    candidates: pl.DataFrame
    rejects: pl.DataFrame


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
        scratch: Where copies of what is not here are made, one file at a time.

    Yields:
        All shards, in order.

    Raises:
        ValueError: A file cannot be read; names it.
    """
    pieces = _pieces(files, config, blocked, tally, scratch)
    for index, parts in itertools.groupby(_cut(pieces, rows_per_shard), lambda piece: piece.start // rows_per_shard):
        found = list(parts)
        counts = sum(np.bincount(piece.codes, minlength=KEPT + 1) for piece in found)
        assert isinstance(counts, np.ndarray)
        rejects = [piece.rejects for piece in found if piece.rejects is not None]
        yield ShardRows(
            index=index,
            start=found[0].start,
            num_in=int(counts.sum()),
            dropped=Counter({_REASONS[code].value: int(counts[code]) for code in np.flatnonzero(counts[:KEPT])}),
            candidates=pl.concat([piece.candidates for piece in found]),
            rejects=pl.concat(rejects) if rejects else pl.DataFrame(schema=list(REJECTS)),
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
            is_quick = config.rejects == "counts" and source.file.is_plain
            for piece in judge.quick(path, position, tally) if is_quick else judge.slow(path, position, tally):
                done += len(piece.codes)
                yield piece
            source.file.check_unchanged()
        position += done


class _Judge:
    """The rules, for the rows of one file."""

    def __init__(self, config: SelectConfig, blocked: BlockLists, source: SourceFile) -> None:
        self._config = config
        self._blocked = blocked
        self._source = source
        self._scores = list(score_rules(config))
        self._texts = list(text_rules(config, blocked))
        self._sample = list(sample_rules(config.subsample * source.share, blocked))
        self._score_code = code_of(self._scores)
        self._punsafe_code = code_of(self._scores[:2])
        schema = {**ROWS, "position": pl.Int64, "source": pl.String, "uid_high": pl.UInt64, "uid_low": pl.UInt64}
        self._nothing = pl.DataFrame(schema=schema).select(_CANDIDATE_COLUMNS)

    def slow(self, path: Path, base: int, tally: Tally) -> Iterator[_Piece]:
        """Judges a file, of which the first row has the position ``base``."""
        for rows in read_rows(self._source.file, path):
            tally.add_scores(rows.select(*SCORES))
            yield self._whole(rows, base)
            base += rows.height

    def _whole(self, rows: pl.DataFrame, start: int) -> _Piece:
        rows = with_hosts(rows, self._blocked).with_row_index("position", start)
        rows = rows.with_columns(
            pl.col("position").cast(pl.Int64), pl.lit(self._source.subset, pl.String).alias("source")
        )
        rules = [*self._scores, *self._texts]
        if self._config.rejects == "counts":
            codes = rows.select(code_of(rules))["code"].to_numpy().copy()
            kept = self._sampled(rows.filter(codes == KEPT), codes, start)
            return _Piece(start, codes, kept)
        rows = rows.with_columns(*uid_halves(pl.col("url").fill_null(""), pl.col("caption").fill_null("")))
        rules += self._sample
        rows = rows.with_columns(code_of(rules), *verdict(rules))
        is_kept = pl.col("code") == KEPT
        return _Piece(
            start,
            rows["code"].to_numpy(),
            rows.filter(is_kept).select(_CANDIDATE_COLUMNS),
            rows.filter(~is_kept).select(REJECTS),
        )

    def quick(self, path: Path, base: int, tally: Tally) -> Iterator[_Piece]:
        """Judges a plain file, of which the first row has the position ``base``."""
        with read_ahead(lambda: self._groups(path, base, tally), _BATCHES_AHEAD) as batches:
            for rows, codes, start in batches:
                yield self._texts_judged(rows, codes, start) if rows.height else _Piece(start, codes, self._nothing)

    def _groups(self, path: Path, base: int, tally: Tally) -> Iterator[tuple[pl.DataFrame, np.ndarray, int]]:
        metadata = self._source.file.parquet_metadata
        for index in range(metadata.num_row_groups):
            yield from self._group(path, index, base, tally)
            base += metadata.row_group(index).num_rows

    def _group(self, path: Path, index: int, base: int, tally: Tally) -> Iterator[tuple[pl.DataFrame, np.ndarray, int]]:
        """Reads one row group: rows that pass by their numbers, codes of all rows by these, position of the first."""
        file = self._source.file
        codes, kept = [], []
        for scores in read_scores(file, path, index, self._config.max_punsafe):
            code = self._score_code if scores.width == len(SCORES) else self._punsafe_code
            found = scores.select(code)["code"].to_numpy()
            codes.append(found)
            if scores.width == len(SCORES):
                kept.append(scores.filter(found == KEPT))
            tally.add_scores(scores)
        all_codes = np.concatenate(codes) if codes else np.empty(0, np.uint8)
        passing = np.flatnonzero(all_codes == KEPT)
        if not len(passing):
            yield self._nothing, all_codes, base
            return
        numbers, done, start = pl.concat(kept), 0, 0
        waiting: list[pl.DataFrame] = []
        for texts in read_texts(file, path, index, passing):
            waiting.append(texts)
            num_rows = sum(part.height for part in waiting)
            if num_rows < _JUDGED_ROWS and done + num_rows < len(passing):
                continue
            rows = pl.concat([pl.concat(waiting), numbers.slice(done, num_rows)], how="horizontal")
            rows = rows.with_columns(position=pl.Series(passing[done : done + num_rows] + base))
            waiting, done = [], done + num_rows
            stop = int(passing[done]) if done < len(passing) else len(all_codes)
            yield rows, all_codes[start:stop].copy(), base + start
            start = stop
            if done == len(passing):
                return

    def _texts_judged(self, rows: pl.DataFrame, codes: np.ndarray, start: int) -> _Piece:
        rows = with_hosts(rows, self._blocked)
        rows = rows.with_columns(pl.lit(self._source.subset, pl.String).alias("source"))
        found = rows.select(code_of(self._texts))["code"].to_numpy()
        codes[rows["position"].to_numpy() - start] = found
        if (found != KEPT).any():
            rows = rows.filter(found == KEPT)
        return _Piece(start, codes, self._sampled(rows, codes, start))

    def _sampled(self, rows: pl.DataFrame, codes: np.ndarray, start: int) -> pl.DataFrame:
        """Candidates with their uids, after the rules that need these; writes the codes of those that go."""
        rows = rows.with_columns(*uid_halves(pl.col("url"), pl.col("caption").fill_null("")))
        if self._sample:
            found = rows.select(code_of(self._sample))["code"].to_numpy()
            codes[rows["position"].to_numpy() - start] = found
            rows = rows.filter(found == KEPT)
        return rows.select(_CANDIDATE_COLUMNS)


_CANDIDATE_COLUMNS = [pl.col(name).fill_null("") if name == "caption" else pl.col(name) for name in CANDIDATES]
