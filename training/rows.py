"""One file of training rows: its columns where they lie in the file, without a copy.

Tensors are ``fixed_size_binary``, uncompressed, one page a column chunk, not nullable: so the raw values stand one
after the other at the chunk's end, and the file need only be mapped into memory. Pictures have no fixed width; each
stands behind its length. Where a file of the right content has another layout, pyarrow decodes the column into memory.
"""

import functools
import logging
import math
import mmap
import threading
import time
import weakref
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import ContractError
from preprocessing.contracts.raw_pages import MAX_HEADER_BYTES, find_chunk
from preprocessing.contracts.tombstones import Tombstones, named_rows
from training.shard_files import OpenFile

LOGGER = logging.getLogger(__name__)

UID_COLUMN = "uid"
UID_NUM_BYTES = 16
"""A uid is 128 bits, in files as 32 lower-case hexadecimal digits."""


class Shard:
    """A file of rows.

    Args:
        opened: The file, of which the content is known to be right.
        wanted: Columns of fixed width, and their widths, for `addresses`.

    Attributes:
        num_rows: Rows of the file.
        addresses: Where in memory the values of each of `wanted` begin, as long as this object lives; 0 for those that
            `find_columns` was not asked for.
    """

    def __init__(self, opened: OpenFile, wanted: Sequence[tuple[str, int]] = ()) -> None:
        self.path = opened.path
        self._opened = opened
        weakref.finalize(self, opened.file.close)
        self._memory = np.frombuffer(mmap.mmap(opened.file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
        self._parquet = pq.ParquetFile(pa.BufferReader(pa.py_buffer(self._memory)))
        self.num_rows: int = self._parquet.metadata.num_rows
        self._columns: dict[str, np.ndarray] = {}
        self._wanted = wanted
        self.addresses = np.zeros(len(wanted), dtype=np.int64)
        self._seen_s = time.monotonic()
        self._finding = threading.Lock()

    def is_unchanged(self, within_s: float = 0.0) -> bool:
        """Whether the file is still the one that was verified; it is not looked at again within so many seconds."""
        now = time.monotonic()
        if now - self._seen_s > within_s or not within_s:
            self._seen_s = now if self._opened.is_unchanged() else -math.inf
        return self._seen_s > -math.inf

    def find_columns(self, which: np.ndarray) -> None:
        """Fills in `addresses` for some of the columns, by their places. Threads may share a shard.

        Raises:
            ContractError: As `column`; or, for the place of the uids, as `uids`.
        """
        # pyarrow's readers are not for two threads at once; and of what both made of a column, one would stay alive.
        with self._finding:
            for place in which.tolist():
                if self.addresses[place]:
                    continue
                name, width = self._wanted[place]
                found = self.uids if name == UID_COLUMN else self.column(name, width)
                self.addresses[place] = found.ctypes.data

    @functools.cached_property
    def uids(self) -> np.ndarray:
        """(num_rows, 16) uint8: the uid of each row, as its 128 bits.

        Raises:
            ContractError: Some uid is none.
        """
        self._check_present("uid")
        text = "".join(self._parquet.read(["uid"]).column("uid").to_pylist())
        try:
            bits = bytes.fromhex(text)
        except ValueError:
            bits = b""
        if len(bits) != UID_NUM_BYTES * self.num_rows or bits.hex() != text:
            raise ContractError(f"{self.path}: column 'uid' holds other things than 32 hexadecimal digits a row")
        return np.frombuffer(bits, dtype=np.uint8).reshape(self.num_rows, UID_NUM_BYTES)

    def named_by(self, tombstones: Tombstones) -> np.ndarray:
        """(num_rows,) bool: which rows must not be seen.

        Raises:
            ContractError: The rows lack a column that tells.
        """
        with self._finding:
            return named_rows(tombstones, self._parquet, str(self.path))

    def column(self, name: str, width: int) -> np.ndarray:
        """The raw values of a column.

        Args:
            name: Its name.
            width: Bytes of each value.

        Returns:
            (num_rows, width) uint8: mapped from the file where its layout allows, else a copy in memory.

        Raises:
            ContractError: There is no such column, or its values have another width.
        """
        found = self._columns.get(name)
        if found is None:
            self._check_width(name, width)
            found = self._map(name, width)
            if found is None:
                LOGGER.warning("%s: column %s cannot be mapped and is read into memory", self.path, name)
                found = decode_column(self._parquet, name, width)
            self._columns[name] = found
        return found

    @functools.cached_property
    def images(self) -> Sequence[np.ndarray]:
        """The encoded crop of each row: uint8, mapped from the file where its layout allows.

        Raises:
            ContractError: The rows have none.
        """
        self._check_present("image")
        mapped = self._map_images()
        if mapped is not None:
            return mapped
        LOGGER.warning("%s: column image cannot be mapped and is read into memory", self.path)
        with self._finding:
            values = self._parquet.read(["image"]).column("image").to_pylist()
        return [np.frombuffer(value, np.uint8) for value in values]

    def is_mapped(self, values: np.ndarray) -> bool:
        """Whether values are the file's own bytes, and no copy."""
        return np.may_share_memory(values, self._memory)

    def _check_present(self, name: str) -> None:
        if name not in self._parquet.schema_arrow.names:
            raise ContractError(f"{self.path}: no column {name!r}, which is asked for; encode the dataset with it")

    def _check_width(self, name: str, width: int) -> None:
        self._check_present(name)
        kind = self._parquet.schema_arrow.field(name).type
        found = kind.byte_width if pa.types.is_fixed_size_binary(kind) else f"{kind}, not a fixed number of"
        if found != width:
            raise ContractError(
                f"{self.path}: column {name!r} holds {found} bytes a row, the dataset's specs say {width}; "
                "encode it again"
            )

    def _map(self, name: str, width: int) -> np.ndarray | None:
        """The values where they lie in the file; None where the arithmetic does not hold."""
        values = self._raw_values(name)
        if values is None or len(values) != self.num_rows * width:
            return None
        mapped = values.reshape(self.num_rows, width)
        first = next(self._parquet.iter_batches(1, columns=[name])).column(0)[0]
        return mapped if mapped[0].tobytes() == first.as_py() else None

    def _map_images(self) -> list[np.ndarray] | None:
        values = self._raw_values("image")
        if values is None:
            return None
        images, at = [], 0
        while at + 4 <= len(values) and len(images) < self.num_rows:
            end = at + 4 + int.from_bytes(values[at : at + 4].tobytes(), "little")
            images.append(values[at + 4 : end])
            at = end
        return images if at == len(values) and len(images) == self.num_rows else None

    def _raw_values(self, name: str) -> np.ndarray | None:
        """The bytes of all values of a column where they lie in the file; None where its layout is another."""
        chunk = find_chunk(self._parquet.metadata, name)
        if chunk is None:
            return None
        begin = chunk.values_begin(self._memory[chunk.begin : chunk.begin + MAX_HEADER_BYTES].tobytes())
        return None if begin is None or chunk.end > len(self._memory) else self._memory[begin : chunk.end]


def decode_column(file: pq.ParquetFile, name: str, width: int) -> np.ndarray:
    """The values of a ``fixed_size_binary`` column as pyarrow decodes them: (num_rows, width) uint8."""
    values = file.read([name]).column(name).combine_chunks()
    raw = np.frombuffer(values.buffers()[1], dtype=np.uint8)
    return raw[values.offset * width : (values.offset + len(values)) * width].reshape(len(values), width)
