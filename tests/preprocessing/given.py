"""A selection that is given: what `select` would have made of some URLs."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from preprocessing.contracts.digests import uid_of
from preprocessing.contracts.schemas import SELECTED
from preprocessing.stage import RowsFile, ShardOutput, rejects_table


class Given:
    """A stage whose shards are given: what `select` would have made of the URLs."""

    name = "select"
    version = 1
    parents: dict[str, str] = {}  # noqa: RUF012 - read only
    config: dict[str, Any] = {}  # noqa: RUF012 - read only

    def __init__(self, shards: Sequence[Sequence[str]], **columns: object) -> None:
        self.digest = uid_of(repr((shards, columns)), "") * 2
        self.num_shards = len(shards)
        self._shards = shards
        self._columns = columns

    def specs(self) -> dict[str, dict[str, Any]]:
        return {}

    def write_extra_files(self, folder: Path) -> Sequence[Path]:
        return ()

    def outputs(self, indices: Sequence[int], scratch: Path) -> Iterator[ShardOutput]:
        for index in indices:
            table = rows_of(self._shards[index], **self._columns)
            yield ShardOutput(
                index, table.num_rows, (RowsFile(f"shard-{index:05d}.parquet", table),), rejects_table([], [], [], [])
            )


def rows_of(urls: Sequence[str], **columns: object) -> pa.Table:
    """Rows in the ``SELECTED`` schema; further columns have one value for all."""
    rows = [
        {"uid": uid_of(url, ""), "url": url, "caption": f"caption {number}", "punsafe": 0.01, "split": "train"}
        | columns
        for number, url in enumerate(urls)
    ]
    return pa.Table.from_pylist(rows, schema=SELECTED)
