"""The rows of a selection that did not come and are due, as a selection of their own: what a later run asks again."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from infra.storage import ObjectStore, sha256_of_bytes
from preprocessing.contracts.digests import canonical_json, digest_of
from preprocessing.contracts.manifest import Manifest
from preprocessing.download.stage import read_selected
from preprocessing.stage import RowsFile, ShardOutput, rejects_table

STAGE_VERSION = 1


class DueStage:
    """Some rows of a selected dataset, shard by shard; `DownloadStage` takes it as it takes the selection itself.

    Args:
        store: Where datasets stand.
        selected: The manifest of the selection.
        uids: Of the rows, as `preprocessing.download.ledger.due` lists them; those of other selections are ignored.
    """

    name = "due"
    version = STAGE_VERSION

    def __init__(self, store: ObjectStore, selected: Manifest, uids: Collection[str]) -> None:
        self._store = store
        self._selected = selected
        self._uids = frozenset(uids)

    @property
    def digest(self) -> str:
        """sha256 of what determines the result."""
        return digest_of(self.name, self.version, self.config, [self._selected.digest])

    @property
    def parents(self) -> dict[str, str]:
        """Stage → digest of what it reads."""
        return {self._selected.stage: self._selected.digest}

    @property
    def config(self) -> dict[str, Any]:
        """Which rows."""
        return {"uids_sha256": sha256_of_bytes(canonical_json(sorted(self._uids)).encode())}

    @property
    def num_shards(self) -> int:
        """As many as were selected."""
        return len(self._selected.shards)

    def specs(self) -> dict[str, dict[str, Any]]:
        """No tensors are stored."""
        return {}

    def write_extra_files(self, folder: Path) -> Sequence[Path]:
        """There are none."""
        return ()

    def outputs(self, indices: Sequence[int], scratch: Path) -> Iterator[ShardOutput]:
        """Makes the given shards; rows that are not due are not counted as read."""
        for index in indices:
            table = read_selected(self._store, self._selected, index)
            rows = table.filter(pa.array([uid in self._uids for uid in table.column("uid").to_pylist()], pa.bool_()))
            file = RowsFile(f"shard-{index:05d}.parquet", rows)
            yield ShardOutput(index, rows.num_rows, (file,), rejects_table([], [], [], []))
