"""The held-out rows: which pictures a validation looks at."""

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import ValidationError

from infra.errors import ContractError
from infra.storage import ObjectNotFoundError, ObjectStore, sha256_of_file
from preprocessing.contracts.manifest import MANIFEST_NAME, DatasetFile, Manifest

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
    uri = store.uri_of(f"{prefix}/{MANIFEST_NAME}")
    try:
        return Manifest.model_validate_json(store.read(f"{prefix}/{MANIFEST_NAME}"))
    except ObjectNotFoundError:
        raise ContractError(f"dataset: {uri} is not there; prepare the dataset first") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ContractError(f"dataset: {uri}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


class HeldOutRows:
    """The validation split of an encoded dataset.

    Args:
        store: Where it is.
        prefix: Key of its folder.
        scratch: Files of a store that is not a local folder are copied here.

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
        self._paths = [_local_copy(store, f"{prefix}/{file.name}", file, scratch) for file in files]

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
            row["uid"]: HeldOutPicture(row["uid"], row["url"], row["caption"], _decoded(row["image"]))
            for row in self._rows(["uid", "url", "caption", "image"], rank)
        }
        return [found[uid] for uid in rank]

    def _rows(self, columns: list[str], wanted: dict[str, int] | None = None) -> Iterator[dict[str, Any]]:
        for path in self._paths:
            for batch in pq.ParquetFile(path).iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
                if wanted is None:
                    yield from batch.to_pylist()
                    continue
                places = [i for i, uid in enumerate(batch.column("uid").to_pylist()) if uid in wanted]
                yield from batch.take(pa.array(places, pa.int64())).to_pylist()


def _local_copy(store: ObjectStore, key: str, file: DatasetFile, scratch: Path) -> Path:
    path = store.local_path(key)
    if path is None:
        path = scratch / "heldout" / key.replace("/", "_")
        store.download(key, path, file.sha256)
    elif not path.is_file() or sha256_of_file(path) != file.sha256:
        raise ContractError(f"dataset: {path} is missing or damaged: its sha256 is not the manifest's {file.sha256}")
    return path


def _decoded(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.array(image.convert("RGB"))
