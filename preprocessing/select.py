"""The select stage: from LAION's metadata to the rows that are worth downloading.

Of rows that repeat each other the first that every other rule keeps wins: a refused row takes no later one with it. So
one look at all rows comes before the shards are made; for each row that the rules keep it holds two hashes in memory.
"""

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from infra.errors import GateError
from infra.storage import ObjectStore
from preprocessing.contracts.config import SelectConfig, SourceConfig
from preprocessing.contracts.digests import digest_of, is_held_out, uid_of
from preprocessing.contracts.manifest import Manifest
from preprocessing.contracts.reasons import Reason
from preprocessing.contracts.schemas import SELECTED
from preprocessing.demo.metadata import metadata_key, put_metadata, write_metadata
from preprocessing.filters import judge
from preprocessing.laion import MetadataFile, count_rows, find_metadata, open_metadata, read_rows, source_digest
from preprocessing.stage import RowsFile, ShardOutput, rejects_table

STAGE_VERSION = 1

_BATCH_ROWS = 65_536
# What the look at all rows leaves for each of them.
_UNIQUE, _REPEATS_ROW, _REPEATS_URL = 0, 1, 2


class SelectStage:
    """Selects rows; see ``preprocessing.stage.Stage``.

    Making one costs nothing. The metadata files are looked for, read and hashed when the digest is asked for.

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

    @property
    def digest(self) -> str:
        """Over the files' contents, the limits and the size of shards.

        Raises:
            ValueError: The metadata cannot be used.
        """
        return digest_of(self.name, self.version, self.config, [source_digest(self._files)])

    @property
    def parents(self) -> dict[str, str]:
        """The digest of the metadata files."""
        return {"source": source_digest(self._files)}

    @property
    def config(self) -> dict[str, Any]:
        """The limits and the size of shards."""
        return self._config.digest_fields() | {"rows_per_shard": self._source.rows_per_shard}

    @property
    def num_shards(self) -> int:
        """Rows of all files by rows per shard, rounded up."""
        return -(-self._num_rows // self._source.rows_per_shard)

    def specs(self) -> dict[str, dict[str, Any]]:
        """No tensors here."""
        return {}

    def write_extra_files(self, folder: Path) -> Sequence[Path]:
        """No files beside the shards."""
        return ()

    def outputs(self, indices: Sequence[int], scratch: Path) -> Iterator[ShardOutput]:
        """Makes the given shards in one pass over the files, after one that finds the repeated rows."""
        if self._source.is_demo:
            put_metadata(self._store, self._source.demo)
        repeats = find_repeats(read_rows(self._files, _BATCH_ROWS), self._config)
        wanted = set(indices)
        num_rows = self._source.rows_per_shard
        for index, rows in enumerate(read_rows(self._files, num_rows)):
            if index in wanted:
                start = index * num_rows
                yield select_shard(index, rows, repeats[start : start + rows.height], self._config)

    @cached_property
    def _files(self) -> list[MetadataFile]:
        if not self._source.is_demo:
            return find_metadata(self._source.metadata, self._scratch)
        key = metadata_key(self._source.demo)
        path = self._store.local_path(key) if self._store.exists(key) else None
        if path is None:
            path = self._scratch / "metadata.parquet"
            if self._store.exists(key):
                self._store.download(key, path)
            else:  # asking for the digest writes nothing to the store
                write_metadata(self._source.demo, path)
        return [open_metadata(self._store.uri_of(key), path)]

    @cached_property
    def _num_rows(self) -> int:
        return sum(count_rows(file) for file in self._files)

    @cached_property
    def _scratch(self) -> Path:
        """A folder that lives as long as this stage."""
        folder = tempfile.mkdtemp(prefix="lacuna-metadata-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)


def find_repeats(batches: Iterator[pl.DataFrame], config: SelectConfig) -> np.ndarray:
    """Finds rows that repeat an earlier one, among those that the rules keep.

    Args:
        batches: All rows, in order, with the columns ``laion.ROWS``.
        config: The limits.

    Returns:
        uint8, one a row: 1 where url and caption stood before, 2 where only the url did, else 0.
    """
    positions, uids, urls = [np.empty(0, np.int64)], [], []
    num_rows = 0
    for rows in batches:
        kept = judge(rows, config)["reason"].is_null()
        positions.append(np.flatnonzero(kept.to_numpy()) + num_rows)
        num_rows += rows.height
        for url, caption in rows.filter(kept).select("url", "caption").iter_rows():
            uids.append(bytes.fromhex(uid_of(url, caption or "")))
            urls.append(hashlib.blake2b(url.encode(), digest_size=16).digest())
    seen = pl.DataFrame({"uid": uids, "url": urls}, schema={"uid": pl.Binary, "url": pl.Binary})
    is_new_row, is_new_url = (seen[name].is_first_distinct().to_numpy() for name in ("uid", "url"))
    repeats = np.full(num_rows, _UNIQUE, np.uint8)
    repeats[np.concatenate(positions)] = np.select([~is_new_row, ~is_new_url], [_REPEATS_ROW, _REPEATS_URL], _UNIQUE)
    return repeats


def select_shard(index: int, rows: pl.DataFrame, repeats: np.ndarray, config: SelectConfig) -> ShardOutput:
    """Splits the rows of one shard into kept and refused ones; both keep their order.

    Args:
        index: Of the shard.
        rows: The columns ``laion.ROWS``.
        repeats: What ``find_repeats`` says of them.
        config: The limits.
    """
    uids = [uid_of(url or "", caption or "") for url, caption in rows.select("url", "caption").iter_rows()]
    judged = rows.with_columns(
        *judge(rows, config).get_columns(), pl.col("caption").fill_null(""), pl.Series("uid", uids, pl.String)
    )
    repeated = pl.Series("repeated", repeats)
    judged = judged.with_columns(
        reason=pl.coalesce(
            "reason",
            pl.when(repeated == _REPEATS_ROW).then(pl.lit(Reason.DUPLICATE_ROW.value)),
            pl.when(repeated == _REPEATS_URL).then(pl.lit(Reason.DUPLICATE_URL.value)),
        )
    )
    refused = judged.filter(pl.col("reason").is_not_null())
    kept = judged.filter(pl.col("reason").is_null())
    splits = ["validation" if is_held_out(uid, config.validation_fraction) else "train" for uid in kept["uid"]]
    kept = kept.with_columns(pl.Series("split", splits, pl.String))
    return ShardOutput(
        index=index,
        num_in=rows.height,
        rows=(RowsFile(f"shard-{index:05d}.parquet", _as_selected(kept)),),
        rejects=rejects_table(*(refused[name].to_list() for name in ("uid", "url", "reason", "detail"))),
    )


def _as_selected(kept: pl.DataFrame) -> pa.Table:
    arrays = kept.select(SELECTED.names).to_arrow(compat_level=pl.CompatLevel.oldest())
    return arrays.cast(SELECTED)


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
