"""The held-out rows: which pictures a validation looks at."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import ContractError
from infra.storage import ObjectNotFoundError, ObjectStore
from model.crop import decode_crop
from preprocessing.contracts.manifest import DatasetFile, Manifest, load_manifest
from preprocessing.contracts.tombstones import Tombstones, named_rows
from training.row_cache import shard_files_of
from training.shard_files import Notes

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class HeldOutPicture:
    """One row of the validation split.

    Attributes:
        uid: The row's.
        url: Where the picture came from.
        caption: As published; not fit for display as it is.
        image: (side, side, 3) uint8, the crop that was encoded.
    """

    uid: str
    url: str
    caption: str
    image: np.ndarray


RowFilter = Callable[[str, str], bool]


def read_manifest(store: ObjectStore, prefix: str) -> Manifest:
    """Reads a dataset's manifest.

    Raises:
        ContractError: The dataset is not there, not complete, or of another format.
    """
    try:
        return load_manifest(store, prefix)
    except ObjectNotFoundError as error:
        raise ContractError(f"dataset: {error.uri} is not there; prepare the dataset first") from None


class HeldOutRows:
    """The validation split of an encoded dataset, without the rows that are forgotten.

    Args:
        store: Where it is.
        prefix: Key of its folder.
        scratch: What is known of the files, and those of a store that is not a local folder, are kept here.

    Raises:
        ContractError: There is no such dataset, it has no validation rows, or a file is not what its manifest says.
    """

    def __init__(self, store: ObjectStore, prefix: str, scratch: Path) -> None:
        self.manifest = read_manifest(store, prefix)
        files = [file for file in self.manifest.files("rows", split="validation") if file.num_rows]
        if not files:
            raise ContractError(
                f"dataset: {store.uri_of(prefix)} has no held-out rows; raise select.validation_fraction"
            )
        self._entries, self._prefix = files, prefix
        self._tombstones = Tombstones.load(store)
        folder = scratch / "heldout"
        self._files = shard_files_of(store, folder, None, Notes(folder))
        for file in files:
            self._check_columns(file)

    def __len__(self) -> int:
        return sum(1 for _ in self._rows(["uid"]))

    def choose(self, num_samples: int, purpose: str, accept: RowFilter | None = None) -> list[HeldOutPicture]:
        """Takes the first rows in the order of a hash of their uid: the same ones whenever and wherever it is asked.

        Args:
            num_samples: How many; fewer come back where there are fewer.
            purpose: Part of the hash: each purpose has its own order.
            accept: Whether a row, by its url and caption, is fit; None for all.

        Returns:
            The pictures, in that order.
        """
        fit = {
            row["uid"]
            for row in self._rows(["uid", "url", "caption"])
            if accept is None or accept(row["url"], row["caption"])
        }
        order = sorted(fit, key=lambda uid: hashlib.blake2b(f"{purpose}:{uid}".encode(), digest_size=16).digest())
        rank = {uid: place for place, uid in enumerate(order[:num_samples])}
        found = {
            row["uid"]: HeldOutPicture(row["uid"], row["url"], row["caption"], decode_crop(row["image"]))
            for row in self._rows(["uid", "url", "caption", "image"], rank)
        }
        return [found[uid] for uid in rank]

    def _rows(self, columns: list[str], wanted: dict[str, int] | None = None) -> Iterator[dict[str, Any]]:
        for entry in self._entries:
            with (opened := self._files.open(self._prefix, entry)).file as file:
                parquet = pq.ParquetFile(file)
                is_seen, first = ~named_rows(self._tombstones, parquet, str(opened.path)), 0
                for batch in parquet.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
                    seen = is_seen[first : first + batch.num_rows]
                    first += batch.num_rows
                    if wanted is not None:
                        seen = seen & [uid in wanted for uid in batch.column("uid").to_pylist()]
                    yield from batch.filter(pa.array(seen)).to_pylist()

    def _check_columns(self, entry: DatasetFile) -> None:
        with (opened := self._files.open(self._prefix, entry)).file:
            if "image" not in pq.read_schema(opened.file).names:
                raise ContractError(
                    f"{opened.path}: the held-out rows keep no pictures, and validation inpaints them; "
                    "encode the dataset with encode.image png or jpeg"
                )
