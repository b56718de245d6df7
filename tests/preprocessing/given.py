"""Stages whose rows are given: what comes after them can be tried without making these."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from preprocessing.contracts.digests import uid_of
from preprocessing.contracts.schemas import SELECTED
from preprocessing.stage import RowsFile, ShardOutput, rejects_table


class GivenTables:
    """A stage whose shards are tables that are given, and that refuses nothing.

    Args:
        tables: One a shard.
    """

    name: str
    version = 1
    digest: str
    parents: dict[str, str]

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        self.config: dict[str, Any] = {}
        self.num_shards = len(tables)
        self.tables = tables

    def specs(self) -> dict[str, dict[str, Any]]:
        return {}

    def write_extra_files(self, folder: Path) -> Sequence[Path]:
        return ()

    def outputs(self, indices: Sequence[int], scratch: Path) -> Iterator[ShardOutput]:
        return map(self.output, indices)

    def output(self, index: int) -> ShardOutput:
        table = self.tables[index]
        rows = RowsFile(f"shard-{index:05d}.parquet", table)
        return ShardOutput(index, table.num_rows, (rows,), rejects_table([], [], [], []))


class Given(GivenTables):
    """What `select` would have made of some URLs, shard by shard; further columns have one value for all."""

    name, parents = "select", {}

    def __init__(self, shards: Sequence[Sequence[str]], **columns: object) -> None:
        super().__init__([rows_of(urls, **columns) for urls in shards])
        self.digest = uid_of(repr((shards, columns)), "") * 2


def rows_of(urls: Sequence[str], **columns: object) -> pa.Table:
    """Rows in the ``SELECTED`` schema; further columns have one value for all."""
    rows = [
        {"uid": uid_of(url, ""), "url": url, "caption": f"caption {number}", "punsafe": 0.01, "split": "train"}
        | columns
        for number, url in enumerate(urls)
    ]
    return pa.Table.from_pylist(rows, schema=SELECTED)
