"""Where forgotten rows still are: the files of complete datasets that hold some, by a look at three columns of each."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from infra.storage import ObjectStore
from preprocessing.contracts.manifest import DatasetFile, Manifest, find_manifest
from preprocessing.contracts.tombstones import Tombstones, named_rows
from preprocessing.stored_parquet import open_parquet

LOGGER = logging.getLogger(__name__)

_LOOKED_AT = ("rows", "rejects")


@dataclass(frozen=True)
class Held:
    """Forgotten rows in a file.

    Attributes:
        prefix: Key of the folder of a dataset whose manifest names the file.
        manifest: That manifest.
        shard: Place of the shard among the manifest's.
        file: The file, of kind ``rows`` or ``rejects``.
        rows: Which of its rows, ascending.
        uids: Theirs.
    """

    prefix: str
    manifest: Manifest
    shard: int
    file: DatasetFile
    rows: tuple[int, ...]
    uids: tuple[str, ...]

    @property
    def places(self) -> tuple[int, ...]:
        """Which rows, as counted when the file was made."""
        left = np.setdiff1d(np.arange(self.file.num_places), self.file.removed)
        return tuple(left[list(self.rows)].tolist())


def complete_datasets(store: ObjectStore) -> Iterator[tuple[str, Manifest]]:
    """Key and manifest of each complete dataset.

    Raises:
        ContractError: A manifest cannot be read.
    """
    for stage in store.list_folders("datasets/"):
        for name in store.list_folders(f"datasets/{stage}/"):
            prefix = f"datasets/{stage}/{name}"
            if (manifest := find_manifest(store, prefix)) is not None:
                yield prefix, manifest


def find_held(store: ObjectStore, tombstones: Tombstones) -> list[Held]:
    """All files of complete datasets that hold forgotten rows; one that two datasets name comes twice.

    Raises:
        ContractError: A manifest or a file cannot be read.
        TransientError: The store failed.
    """
    found: list[Held] = []
    looked_at: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for prefix, manifest in complete_datasets(store) if len(tombstones) else ():
        for place, shard in enumerate(manifest.shards):
            for file in shard.files:
                if file.kind not in _LOOKED_AT or not file.num_rows:
                    continue
                key = file.key(prefix)
                if key not in looked_at:
                    looked_at[key] = _look_at(store, key, tombstones)
                if looked_at[key][0]:
                    found.append(Held(prefix, manifest, place, file, *looked_at[key]))
    return found


def _look_at(store: ObjectStore, key: str, tombstones: Tombstones) -> tuple[tuple[int, ...], tuple[str, ...]]:
    with open_parquet(store, key) as file:
        rows = np.flatnonzero(is_held(tombstones, file, store.uri_of(key)))
        if not len(rows):
            return (), ()
        return tuple(rows.tolist()), tuple(file.read(["uid"]).column("uid").take(rows).to_pylist())


def is_held(tombstones: Tombstones, file: pq.ParquetFile, name: str) -> np.ndarray:
    """Which rows of a file of rows, or of rejects, are forgotten and still tell more than their uid.

    Args:
        tombstones: What is forgotten.
        file: The file.
        name: Of it, for messages.

    Returns:
        One bool a row.
    """
    found = named_rows(tombstones, file, name)
    if "reason" in file.schema_arrow.names and found.any():  # rejects: without its address a row tells nothing more
        found &= file.read(["url"]).column("url").combine_chunks().is_valid().to_numpy(zero_copy_only=False)
    return found
