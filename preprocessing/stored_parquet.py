"""Parquet files of a store, of which only what is asked for is read."""

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import ObjectStore
from preprocessing.contracts.raw_pages import MAX_HEADER_BYTES, find_chunk

_BUFFER_BYTES = 1 << 20


class StoredFile(io.RawIOBase):
    """An object as a file that can be read anywhere, so that a Parquet file's footer or one column costs just that."""

    def __init__(self, store: ObjectStore, key: str) -> None:
        self._store, self._key, self._at = store, key, 0
        self._num_bytes = store.head(key).num_bytes

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to a place."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._num_bytes}[whence]
        return self._at

    def tell(self) -> int:
        """The place."""
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Reads from there on."""
        left = max(0, self._num_bytes - self._at)
        data = (
            self._store.read_range(self._key, self._at, left if size < 0 else min(size, left)) if left and size else b""
        )
        self._at += len(data)
        return data


def open_parquet(store: ObjectStore, key: str) -> pq.ParquetFile:
    """A Parquet file of the store: mapped where it is local, else fetched piece by piece."""
    path = store.local_path(key)
    if path is not None:
        return pq.ParquetFile(path, memory_map=True)
    return pq.ParquetFile(StoredFile(store, key), buffer_size=_BUFFER_BYTES)


def first_rows(store: ObjectStore, key: str, num_rows: int, columns: Sequence[str]) -> pa.Table:
    """The first rows of a file: fixed-width columns by their place in it, so that a gigabyte of tensors stays unread.

    Args:
        store: Where it is.
        key: The file's.
        num_rows: How many, at most.
        columns: Which; those that the file does not have are left out.
    """
    with open_parquet(store, key) as file:
        schema = file.schema_arrow
        there = [name for name in columns if name in schema.names]
        num_rows = min(num_rows, file.metadata.num_rows)
        if num_rows == 0:
            return schema.empty_table().select(there)
        raw = {name: _raw_rows(store, key, file, name, num_rows) for name in there}
        others = [name for name in there if raw[name] is None]
        batch = next(file.iter_batches(num_rows, columns=others)) if others else None
        arrays = []
        for name in there:
            values = raw[name]
            if values is not None:
                arrays.append(pa.array([row.tobytes() for row in values], schema.field(name).type))
            else:
                assert batch is not None
                arrays.append(batch.column(others.index(name)))
        return pa.table(arrays, names=there)


def _raw_rows(store: ObjectStore, key: str, file: pq.ParquetFile, name: str, num_rows: int) -> np.ndarray | None:
    """The first values of a column: (num_rows, width) uint8; None where they do not lie one after the other."""
    kind = file.schema_arrow.field(name).type
    chunk = find_chunk(file.metadata, name)
    if chunk is None or not pa.types.is_fixed_size_binary(kind):
        return None
    wanted = num_rows * kind.byte_width
    data = store.read_range(key, chunk.begin, min(chunk.end - chunk.begin, MAX_HEADER_BYTES + wanted))
    begin = chunk.values_begin(data)
    if begin is None or chunk.end - begin != chunk.num_values * kind.byte_width:
        return None
    values = data[begin - chunk.begin :][:wanted]
    return np.frombuffer(values, np.uint8).reshape(num_rows, kind.byte_width) if len(values) == wanted else None
