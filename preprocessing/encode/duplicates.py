"""Rows whose pictures have the same bytes, over a whole dataset: the first one counts.

A copy could otherwise stand in both splits. Memory is bounded: hashes go to files in scratch, so many that each can be
sorted in memory, and only the places of the copies are kept.
"""

import contextlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import AlreadyExistsError, ObjectNotFoundError, ObjectStore

DUPLICATES_NAME: Final = "duplicates.parquet"
ROWS_PER_PART: Final = 1 << 22

_ENTRY: Final = np.dtype([("hash", ">u8", 4), ("shard", "<i4"), ("row", "<i4")])
_DIGEST_KEY: Final = b"lacuna.digest"

Copies = dict[int, np.ndarray]
"""Shard → numbers of those of its rows that are copies of an earlier row, ascending."""


def find_copies(shards: Iterable[tuple[int, pa.ChunkedArray]], num_rows: int, scratch: Path) -> Copies:
    """Finds the rows whose hash was seen before.

    Args:
        shards: Each one's number and its column of sha256, as hexadecimal digits.
        num_rows: Of all shards together, about: it decides how many parts there are.
        scratch: A folder for files of 40 bytes a row.

    Returns:
        The copies; a shard without any is absent.
    """
    num_parts = -(-num_rows // ROWS_PER_PART) or 1
    found = []
    with contextlib.ExitStack() as stack:
        parts = [stack.enter_context((scratch / f"hashes-{part}").open("w+b")) for part in range(num_parts)]
        for index, column in shards:
            entries = _entries(index, column)
            part_of = entries["hash"][:, 3] % num_parts
            for part, file in enumerate(parts):
                file.write(entries[part_of == part].tobytes())
        for file in parts:
            file.seek(0)
            found.append(_copies_in(np.frombuffer(file.read(), _ENTRY)))
            Path(file.name).unlink()
    return _by_shard(np.concatenate(found))


def _entries(index: int, column: pa.ChunkedArray) -> np.ndarray:
    """Each hash, and where it stands."""
    entries = np.empty(len(column), _ENTRY)
    entries["hash"] = np.frombuffer(bytes.fromhex("".join(column.to_pylist())), ">u8").reshape(-1, 4)
    entries["shard"], entries["row"] = index, np.arange(len(column))
    return entries


def _copies_in(entries: np.ndarray) -> np.ndarray:
    entries = entries[np.lexsort((entries["row"], entries["shard"], *entries["hash"].T))]
    is_copy = np.zeros(len(entries), dtype=bool)
    is_copy[1:] = (entries["hash"][1:] == entries["hash"][:-1]).all(axis=1)
    return entries[["shard", "row"]][is_copy]


def _by_shard(copies: np.ndarray) -> Copies:
    return {int(shard): np.sort(copies["row"][copies["shard"] == shard]) for shard in np.unique(copies["shard"])}


def read_copies(store: ObjectStore, prefix: str, digest: str) -> Copies | None:
    """What another worker on the same dataset found; None where none did, or it cannot be read."""
    try:
        data = store.read(f"{prefix}/{DUPLICATES_NAME}")
        table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
    except (ObjectNotFoundError, pa.ArrowInvalid, OSError):
        return None
    if (table.schema.metadata or {}).get(_DIGEST_KEY) != digest.encode():
        return None
    copies = np.empty(table.num_rows, [("shard", "<i4"), ("row", "<i4")])
    copies["shard"], copies["row"] = table.column("shard").to_numpy(), table.column("row").to_numpy()
    return _by_shard(copies)


def write_copies(store: ObjectStore, prefix: str, digest: str, copies: Copies) -> None:
    """Tells the other workers; the file is swept when the dataset is complete."""
    shards = np.concatenate(
        [np.full(len(rows), shard, "<i4") for shard, rows in copies.items()] or [np.empty(0, "<i4")]
    )
    rows = np.concatenate([*copies.values(), np.empty(0, "<i4")])
    table = pa.table({"shard": pa.array(shards, pa.int32()), "row": pa.array(rows, pa.int32())})
    buffer = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata({_DIGEST_KEY: digest}), buffer, compression="zstd", write_page_checksum=True
    )
    with contextlib.suppress(AlreadyExistsError):
        store.put_if_absent(f"{prefix}/{DUPLICATES_NAME}", buffer.getvalue())


def delete_copies(store: ObjectStore, prefix: str) -> None:
    """Takes it back: nobody needs it any more, and the sweep may be over."""
    store.delete(f"{prefix}/{DUPLICATES_NAME}")
