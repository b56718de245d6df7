"""The select stage: from LAION's metadata to the rows that are worth downloading.

Rows are judged one by one (``scan``), then against each other (``winners``). The latter needs to have seen all of them:
until then candidates wait on disk, in the scratch folder (``TMPDIR``), about 300 bytes each. Memory does not grow with
the number of rows: it holds a few shards and a few row groups.
"""

import shutil
import tempfile
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from infra import pulse
from infra.errors import GateError
from infra.storage import ObjectStore
from preprocessing.ahead import read_ahead
from preprocessing.block_lists import BlockLists, read_block_lists
from preprocessing.contracts.config import SelectConfig, SourceConfig
from preprocessing.contracts.digests import digest_of
from preprocessing.contracts.manifest import Manifest
from preprocessing.contracts.reasons import Reason
from preprocessing.contracts.schemas import REJECTS, SELECTED
from preprocessing.contracts.tombstones import Tombstones
from preprocessing.demo.metadata import metadata_key, put_metadata, write_metadata
from preprocessing.filters import CODES, reason_of
from preprocessing.laion import find_metadata, open_metadata
from preprocessing.releases import check_withdrawn
from preprocessing.scan import REJECTS as REJECTED
from preprocessing.scan import ShardRows, SourceFile, scan
from preprocessing.select_report import Tally, limits_of, write_report
from preprocessing.spool import Spool
from preprocessing.stage import PARQUET_WRITER, ShardOutput, WrittenFile
from preprocessing.uids import threshold, uid_text
from preprocessing.winners import Winners, are_needed

STAGE_VERSION = 3

_SHARDS_AHEAD = 1
_WRITES_AHEAD = 1
_NO_REJECTS = pa.Table.from_batches([], REJECTS)  # REJECTS.empty_table() would import pandas, which takes a second
# Texts hardly ever repeat: dictionaries and least values of them cost time and save nothing.
_WRITER = {
    "compression": "zstd",
    "compression_level": 1,
    "use_dictionary": False,
    "write_statistics": ["width", "height", "similarity", "punsafe", "pwatermark", "aesthetic"],
}


class SelectStage:
    """Selects rows; see ``preprocessing.stage.Stage``.

    Making one costs nothing. The metadata files are looked for, opened and hashed when the digest is asked for.

    Args:
        store: Where the dataset goes. The demo world's metadata is put there too, and read from there.
        source: Where the metadata comes from.
        config: Which rows are kept.
    """

    name = "select"
    version = STAGE_VERSION

    def __init__(self, store: ObjectStore, source: SourceConfig, config: SelectConfig) -> None:
        self._store = store
        self._source = source
        self._config = config
        self._tally: Tally | None = None

    @property
    def digest(self) -> str:
        """Over the files' contents, the limits, the block-lists and the size of shards.

        Raises:
            ValueError: The metadata or a block-list cannot be used.
        """
        return digest_of(self.name, self.version, self.config, list(self.parents.values()))

    @property
    def parents(self) -> dict[str, str]:
        """The digest of the metadata files: of their contents in their order, whatever they are called."""
        contents = []
        for item in self._files:
            contents.append([item.file.sha256, item.subset, item.share])
            pulse.beat()
        return {"source": digest_of("source", 1, {"files": contents}, [])}

    @property
    def config(self) -> dict[str, Any]:
        """The limits and the size of shards; of block-lists the sha256 and count; withdrawn releases."""
        fields = self._config.digest_fields()
        for name in ("block_hosts", "block_urls", "block_hashes"):
            del fields[name]  # paths say nothing
        return fields | {
            "rows_per_shard": self._source.rows_per_shard,
            "block_lists": {name: dict(entry) for name, entry in self._blocked.described.items()},
            "withdrawn": check_withdrawn(self._source),
        }

    @property
    def num_shards(self) -> int:
        """One for each ``rows_per_shard`` rows of metadata."""
        return -(-self._num_rows // self._source.rows_per_shard)

    def specs(self) -> dict[str, dict[str, Any]]:
        """None: there are no tensors."""
        return {}

    def write_extra_files(self, folder: Path) -> Sequence[Path]:
        """The report, as JSON and as a page."""
        if self._tally is None:  # all shards were there already
            for _ in self.outputs((), folder):
                pass
        assert self._tally is not None
        described = {
            "digest": self.digest,
            "withdrawn": self.config["withdrawn"],
            "block_lists": self.config["block_lists"],
            "limits": limits_of(self._config),
        }
        return write_report(self._tally.as_json(described), folder)

    def outputs(self, indices: Sequence[int], scratch: Path) -> Iterator[ShardOutput]:
        """Selects the rows of the given shards. All rows are looked at, for the rules over several and the report."""
        if self._source.is_demo:
            put_metadata(self._store, self._source.demo)
        tally, wanted = Tally(self._num_rows), frozenset(indices)
        tombstones = Tombstones.load(self._store)
        with tempfile.TemporaryDirectory(prefix="select-", dir=scratch) as name:
            folder = Path(name)

            def decided() -> Iterator[ShardRows]:
                shards = scan(self._files, self._config, self._blocked, self._source.rows_per_shard, tally, folder)
                if len(tombstones):
                    shards = (_without_forgotten(shard, tombstones) for shard in shards)
                if are_needed(self._config):
                    shards = _against_each_other(shards, self._config, self._num_rows, folder)
                for shard in shards:
                    pulse.beat()
                    tally.add_shard(shard.num_in, shard.dropped, shard.candidates)
                    if shard.index in wanted:
                        yield shard
                    elif shard.rejects is not None:
                        shard.rejects.discard()

            with read_ahead(decided, _SHARDS_AHEAD) as shards:
                yield from _in_order(lambda shard: _output(shard, self._config, scratch), shards)
        self._tally = tally

    @cached_property
    def _blocked(self) -> BlockLists:
        return read_block_lists(self._config)

    @cached_property
    def _files(self) -> list[SourceFile]:
        check_withdrawn(self._source)
        if self._source.subsets:
            heaviest = max(subset.weight for subset in self._source.subsets.values())
            return [
                SourceFile(file, name, subset.weight / heaviest)
                for name, subset in sorted(self._source.subsets.items())
                for file in find_metadata(subset.metadata)
            ]
        if not self._source.is_demo:
            return [SourceFile(file, None, 1.0) for file in find_metadata(self._source.metadata)]
        key = metadata_key(self._source.demo)
        path = self._store.local_path(key) if self._store.exists(key) else None
        if path is None:
            path = self._scratch / "metadata.parquet"
            if self._store.exists(key):
                self._store.download(key, path)
            else:  # asking for the digest writes nothing to the store
                write_metadata(self._source.demo, path)
        return [SourceFile(open_metadata(self._store.uri_of(key), path), None, 1.0)]

    @cached_property
    def _num_rows(self) -> int:
        return sum(item.file.num_rows for item in self._files)

    @cached_property
    def _scratch(self) -> Path:
        """A folder that lives as long as this stage."""
        folder = tempfile.mkdtemp(prefix="lacuna-metadata-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)


def _without_forgotten(shard: ShardRows, tombstones: Tombstones) -> ShardRows:
    """Refuses candidates that a tombstone names, before they are held against others; of rejects the uid stays."""
    rows = shard.candidates
    uids = uid_text(rows["uid_high"].to_numpy(), rows["uid_low"].to_numpy()).to_pylist()
    named = tombstones.matches(uids, rows["url"].to_list(), rows["expected_sha256"].to_list())
    if not named.any():
        return shard
    dropped = shard.dropped + Counter({Reason.FORGOTTEN.value: int(named.sum())})
    lost = None
    if shard.rejects is not None:
        hidden = {"url": pl.lit(None, pl.String), "detail": pl.lit(None, pl.String)}
        code = pl.lit(CODES[Reason.FORGOTTEN], pl.UInt8)
        lost = rows.filter(named).with_columns(code=code, **hidden).select(REJECTED)
    return replace(shard, dropped=dropped, candidates=rows.filter(~named), lost=lost)


def _against_each_other(
    shards: Iterator[ShardRows], config: SelectConfig, num_rows: int, folder: Path
) -> Iterator[ShardRows]:
    """Applies the rules over several rows: all shards go to disk first, and come back without the rows that lose."""
    winners = Winners(config, num_rows, folder)
    waiting = []
    for shard in shards:
        winners.add(shard.candidates)
        candidates = Spool(folder / f"candidates-{shard.index}.arrow")
        candidates.add(shard.candidates)
        candidates.close()
        waiting.append((candidates, replace(shard, candidates=shard.candidates.clear())))
    winners.resolve()
    for candidates, shard in waiting:
        found = pl.concat([shard.candidates, *candidates.parts()])
        yield _without_losers(replace(shard, candidates=found), winners)


def _without_losers(shard: ShardRows, winners: Winners) -> ShardRows:
    positions, reasons = winners.losers(shard.start, shard.start + shard.num_in)
    if not len(positions):
        return shard
    is_lost = np.zeros(shard.candidates.height, bool)
    is_lost[np.searchsorted(shard.candidates["position"].to_numpy(), positions)] = True
    names = [reason.value for reason in winners.reasons]
    counts = np.bincount(reasons, minlength=len(names))
    dropped = shard.dropped + Counter(dict(zip(names, counts.tolist(), strict=True)))
    lost = None
    if shard.rejects is not None:
        code = pl.Series(winners.codes[reasons], dtype=pl.UInt8)
        lost = shard.candidates.filter(is_lost).with_columns(code=code, detail=pl.lit(None, pl.String)).select(REJECTED)
        if shard.lost is not None:
            lost = pl.concat([shard.lost, lost]).sort("position")
    return replace(shard, dropped=dropped, candidates=shard.candidates.filter(~is_lost), lost=lost)


def _output(shard: ShardRows, config: SelectConfig, folder: Path) -> ShardOutput:
    """Writes a shard's files; where no row is kept, there is no file of rows."""
    rows = ()
    if shard.candidates.height:
        name = f"shard-{shard.index:05d}.parquet"
        pq.write_table(_as_selected(shard.candidates, config), folder / name, **_WRITER)
        rows = (WrittenFile(name, folder / name, shard.candidates.height),)
    rejects = _NO_REJECTS if shard.rejects is None else _write_rejects(shard, shard.rejects, folder)
    pa.default_memory_pool().release_unused()  # else what writing took would stay beside what polars takes
    return ShardOutput(shard.index, shard.num_in, rows, rejects, dict(shard.dropped))


def _write_rejects(shard: ShardRows, rejects: Spool, folder: Path) -> WrittenFile:
    """Writes refused rows and those that lost against others, in order, some at a time, since they are many."""
    name, num_rows = f"rejects-{shard.index:05d}.parquet", 0
    lost = pl.DataFrame() if shard.lost is None else shard.lost
    with pq.ParquetWriter(folder / name, REJECTS, **PARQUET_WRITER) as writer:
        for part in rejects.parts():
            if lost.height:
                num_before = int(np.searchsorted(lost["position"].to_numpy(), part["position"][-1]))
                part = pl.concat([part, lost.head(num_before)]).sort("position")
                lost = lost.slice(num_before)
            writer.write_table(_as_rejects(part))
            pa.default_memory_pool().release_unused()
            num_rows += part.height
        if lost.height:
            writer.write_table(_as_rejects(lost))
    return WrittenFile(name, folder / name, num_rows + lost.height)


def _in_order(make: Callable[[ShardRows], ShardOutput], shards: Iterator[ShardRows]) -> Iterator[ShardOutput]:
    """Makes files of shards in a thread of their own, beside the scan and the upload; in the order of the shards."""
    waiting: deque[Future[ShardOutput]] = deque()
    with ThreadPoolExecutor(1, "select-write") as pool:
        for shard in shards:
            waiting.append(pool.submit(make, shard))
            del shard
            if len(waiting) > _WRITES_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _as_selected(kept: pl.DataFrame, config: SelectConfig) -> pa.Table:
    limit = pl.lit(threshold(config.validation_fraction), pl.UInt64)
    split = pl.when(pl.col("uid_low") < limit).then(pl.lit("validation")).otherwise(pl.lit("train"))
    names = [name for name in SELECTED.names if name != "uid"]
    table = kept.with_columns(split=split).select(names).to_arrow(compat_level=pl.CompatLevel.oldest())
    uids = uid_text(kept["uid_high"].to_numpy(), kept["uid_low"].to_numpy())
    return table.add_column(0, "uid", uids).cast(SELECTED)


def _as_rejects(refused: pl.DataFrame) -> pa.Table:
    columns = refused.select("url", reason_of(pl.col("code")), "detail")
    uids = uid_text(refused["uid_high"].to_numpy(), refused["uid_low"].to_numpy())
    return columns.to_arrow(compat_level=pl.CompatLevel.oldest()).add_column(0, "uid", uids).cast(REJECTS)


def check_gate(manifest: Manifest, config: SelectConfig) -> None:
    """Refuses to go on with too few rows; to be called once the stage is complete.

    Raises:
        GateError: Fewer than ``select.min_rows`` rows were kept; says why the others were refused.
    """
    if manifest.num_out < config.min_rows:
        why = ", ".join(f"{reason} {count}" for reason, count in manifest.dropped.items()) or "there were none"
        raise GateError(
            f"select.min_rows: {manifest.num_out} of {manifest.num_in} rows were kept, fewer than {config.min_rows} "
            f"({why}); loosen the limits under select, or lower select.min_rows"
        )
