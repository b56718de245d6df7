"""Forgotten rows removed from the files that hold them: from rows and rejects of all complete datasets."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import ObjectStore
from preprocessing.contracts.manifest import DatasetFile, ShardReport
from preprocessing.contracts.reasons import Reason
from preprocessing.contracts.schemas import REJECTS, TENSOR_WRITER
from preprocessing.contracts.tombstones import Tombstones
from preprocessing.forgotten import is_held
from preprocessing.rewriting import Rewritten, rewrite_shards, upload_smaller
from preprocessing.stage import PARQUET_WRITER
from preprocessing.stored_parquet import open_parquet


def compact_rows(store: ObjectStore, tombstones: Tombstones) -> Rewritten:
    """Removes forgotten rows from all complete datasets: select, download (their pictures, too) and encode.

    A removed row is a row refused: it counts as ``forgotten``, and where rejects are written its uid stands there. Of
    rows that had been refused for another reason address and detail go, uid and reason stay.

    Args:
        store: Where the datasets stand.
        tombstones: What is forgotten.

    Raises:
        ContractError: A manifest or a file cannot be read, or is damaged; what is done is kept.
        TransientError: The store failed; what is done is kept, and the next call goes on.
    """
    if not len(tombstones):
        return Rewritten((), 0, 0)

    def rewrite(prefix: str, shard: ShardReport, scratch: Path) -> ShardReport | None:
        return _without(store, prefix, shard, tombstones, scratch)

    with tempfile.TemporaryDirectory(prefix="lacuna-compact-") as folder:
        return rewrite_shards(store, rewrite, Path(folder))


def _without(
    store: ObjectStore, prefix: str, shard: ShardReport, tombstones: Tombstones, scratch: Path
) -> ShardReport | None:
    """A shard without its forgotten rows; None where it has none."""
    named = {file.name: _named(store, file.key(prefix), file, tombstones) for file in shard.files}
    if not any(found.any() for found in named.values()):
        return None
    removed: list[str] = []  # uids
    made: dict[str, DatasetFile] = {}
    for file in shard.files:
        if file.kind == "rows" and named[file.name].any():
            made[file.name], uids = _write_rows(store, prefix, file, named[file.name], scratch)
            removed += uids
    for file in shard.files:
        if file.kind == "rejects":
            made[file.name] = _write_rejects(store, prefix, file, named[file.name], removed, scratch)
    files = [made.get(file.name, file) for file in shard.files]
    dropped, num_removed = dict(shard.dropped), len(removed)
    if num_removed:
        dropped[Reason.FORGOTTEN.value] = dropped.get(Reason.FORGOTTEN.value, 0) + num_removed
    return ShardReport(
        index=shard.index,
        num_in=shard.num_in,
        num_out=shard.num_out - num_removed,
        dropped=dict(sorted(dropped.items())),
        files=tuple(files),
        digest=shard.digest,
    )


def _named(store: ObjectStore, key: str, file: DatasetFile, tombstones: Tombstones) -> np.ndarray:
    if file.kind not in ("rows", "rejects") or not file.num_rows:
        return np.zeros(file.num_rows, dtype=bool)
    with open_parquet(store, key) as parquet:
        return is_held(tombstones, parquet, store.uri_of(key))


def _read(store: ObjectStore, prefix: str, file: DatasetFile, scratch: Path) -> pa.Table:
    """The whole file, verified: what is written again must be what the manifest spoke of."""
    path = scratch / "old.parquet"
    store.download(file.key(prefix), path, file.sha256)
    table = pq.read_table(path, memory_map=False)
    path.unlink()
    return table


def _write_rows(
    store: ObjectStore, prefix: str, file: DatasetFile, named: np.ndarray, scratch: Path
) -> tuple[DatasetFile, list[str]]:
    """The rows that are left, and the uids of the others."""
    whole = _read(store, prefix, file, scratch)
    uids = whole.column("uid").filter(pa.array(named)).to_pylist()
    table = whole.filter(pa.array(~named)).combine_chunks()
    writer: Any = PARQUET_WRITER if file.split is None else TENSOR_WRITER  # as `encode` writes, which splits by file
    path = scratch / "new.parquet"
    pq.write_table(table, path, **writer)
    left = np.setdiff1d(np.arange(file.num_places), file.removed)
    removed = sorted([*file.removed, *left[named].tolist()])
    return upload_smaller(store, prefix, file, path, {"num_rows": table.num_rows, "removed": tuple(removed)}), uids


def _write_rejects(
    store: ObjectStore, prefix: str, file: DatasetFile, named: np.ndarray, removed: list[str], scratch: Path
) -> DatasetFile:
    """Refused rows, of forgotten ones without address and detail; rows that are removed come last."""
    table = _read(store, prefix, file, scratch)
    columns = table.to_pydict()
    for name in ("url", "detail"):
        columns[name] = [None if hide else value for value, hide in zip(columns[name], named.tolist(), strict=True)]
        columns[name] += [None] * len(removed)
    columns["uid"] += removed
    columns["reason"] += [Reason.FORGOTTEN.value] * len(removed)
    path = scratch / "new.parquet"
    pq.write_table(pa.table(columns, schema=REJECTS), path, **PARQUET_WRITER)
    return upload_smaller(store, prefix, file, path, {"num_rows": len(named) + len(removed)})
