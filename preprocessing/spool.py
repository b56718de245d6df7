"""Rows on their way through a scratch file, a part at a time, where there are too many for memory."""

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pyarrow as pa


class Spool:
    """Rows in a file: first all are added, then they are read; never more than a part of them is in memory.

    Args:
        path: Where the file is made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: pa.NativeFile | None = None
        self._writer: pa.ipc.RecordBatchFileWriter | None = None

    def add(self, rows: pl.DataFrame) -> None:
        """Appends rows; all have the same columns."""
        table = rows.to_arrow(compat_level=pl.CompatLevel.oldest())
        if self._writer is None:
            self._file = pa.OSFile(str(self._path), "wb")
            self._writer = pa.ipc.new_file(self._file, table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        """Ends the adding; thousands of closed ones may wait to be read."""
        if self._writer is not None and self._file is not None:
            self._writer.close()
            self._file.close()
            self._file = None

    def parts(self) -> Iterator[pl.DataFrame]:
        """The rows in parts, as they were added, none of them empty; the file is gone afterwards."""
        if self._writer is None:
            return
        with pa.OSFile(str(self._path)) as file:
            reader = pa.ipc.open_file(file)
            for index in range(reader.num_record_batches):
                part = pl.from_arrow(pa.Table.from_batches([reader.get_batch(index)]))
                assert isinstance(part, pl.DataFrame)
                if part.height:
                    yield part
        self.discard()

    def discard(self) -> None:
        """Deletes the file, if there is one."""
        self._path.unlink(missing_ok=True)
