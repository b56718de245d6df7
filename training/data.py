"""The training rows: where they lie, in which order they are seen, and the batches made of them.

The tensors are memory-mapped straight out of standard Parquet files. The order is a pure function of (seed, epoch,
dataset digest), so resuming is one integer, and the number of processes changes nothing.
"""

import functools
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import ValidationError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from infra.errors import ContractError
from infra.storage import ObjectNotFoundError, ObjectStore, sha256_of_file
from model.randomness import stream
from preprocessing.contracts.manifest import MANIFEST_NAME, DatasetFile, Manifest
from training.compatibility import DatasetSpecs, parse_specs

LOGGER = logging.getLogger(__name__)

CONSTANTS_NAME: Final = "constants.safetensors"
ROWS_PER_WINDOW: Final = 1 << 16
"""Rows are shuffled within windows of about so many: enough to mix, few enough that a window's pages stay in memory."""

_DTYPES: Final = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}


@dataclass(frozen=True)
class Constants:
    """Tensors that belong to the whole dataset.

    Attributes:
        null_text_embedding: (num_tokens, width) of the empty caption.
        full_mask_moments: (2c, h, w) of a picture that is all hole.
    """

    null_text_embedding: Tensor
    full_mask_moments: Tensor


@dataclass(frozen=True)
class Batch:
    """Some training rows; on the CPU, in the dataset's precision.

    Attributes:
        uids: One a sample.
        moments: (batch, 2c, h, w), mean | logvar, unscaled.
        masked_moments: (batch, 2c, h, w), of the picture with the hole.
        mask: (batch, 1, h, w) float32 in {0, 1}, 1 = repaint.
        text_embeddings: (batch, num_tokens, width).
    """

    uids: tuple[str, ...]
    moments: Tensor
    masked_moments: Tensor
    mask: Tensor
    text_embeddings: Tensor

    def __len__(self) -> int:
        return len(self.uids)

    def part(self, start: int, stop: int) -> "Batch":
        """Samples ``start … stop - 1``, as views."""
        return Batch(
            self.uids[start:stop],
            self.moments[start:stop],
            self.masked_moments[start:stop],
            self.mask[start:stop],
            self.text_embeddings[start:stop],
        )


# --------------------------------------------------------------------------------------------------------------- order


@functools.lru_cache(maxsize=4)
def sample_order(seed: int, epoch: int, dataset_digest: str, num_rows: tuple[int, ...]) -> np.ndarray:
    """The order of one epoch: shards permuted, rows permuted within windows of consecutive shards.

    Args:
        seed: The training's.
        epoch: From 0.
        dataset_digest: The dataset's.
        num_rows: Rows of each shard.

    Returns:
        Read-only int64 permutation of ``0 … sum(num_rows) - 1``; row i of shard s counts as ``sum(num_rows[:s]) + i``.
    """
    rng = stream("order", seed, epoch, dataset_digest)
    starts = np.concatenate([[0], np.cumsum(num_rows, dtype=np.int64)])
    order = np.empty(starts[-1], dtype=np.int64)
    filled = 0
    window: list[np.ndarray] = []
    shards = rng.permutation(len(num_rows))
    for place, shard in enumerate(shards):
        window.append(np.arange(int(starts[shard]), int(starts[shard + 1]), dtype=np.int64))
        size = sum(map(len, window))
        if size >= ROWS_PER_WINDOW or place == len(shards) - 1:
            order[filled : filled + size] = rng.permutation(np.concatenate(window))
            filled += size
            window = []
    order.flags.writeable = False
    return order


def mask_variant(uid: str, epoch: int, num_variants: int) -> int:
    """Which of its masks a sample wears in an epoch: the next one each time, from a start of its own."""
    start = int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest(), "big")
    return (epoch + start) % num_variants


# ---------------------------------------------------------------------------------------------------------------- rows


class Shard:
    """One file of training rows.

    Args:
        path: A local Parquet file that no one writes to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = pq.ParquetFile(path)
        self._memory = np.memmap(path, dtype=np.uint8, mode="r")
        self.num_rows: int = self._file.metadata.num_rows
        self._columns: dict[str, np.ndarray] = {}

    @functools.cached_property
    def uids(self) -> list[str]:
        """The uid of each row."""
        return self._file.read(["uid"]).column("uid").to_pylist()

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
        if name not in self._columns:
            self._check_column(name, width)
            mapped = self._map(name, width)
            if mapped is None:
                LOGGER.warning("%s: column %s cannot be mapped and is read into memory", self.path, name)
                mapped = decode_column(self._file, name, width)
            self._columns[name] = mapped
        return self._columns[name]

    def _check_column(self, name: str, width: int) -> None:
        schema = self._file.schema_arrow
        if name not in schema.names:
            raise ContractError(f"{self.path}: no column {name!r}, which the dataset's specs ask for; encode it again")
        kind = schema.field(name).type
        found = kind.byte_width if pa.types.is_fixed_size_binary(kind) else f"{kind}, not a fixed number of"
        if found != width:
            raise ContractError(
                f"{self.path}: column {name!r} holds {found} bytes a row, the dataset's specs say {width}; "
                "encode it again"
            )

    def _map(self, name: str, width: int) -> np.ndarray | None:
        """The values where they lie in the file; None where the arithmetic does not hold.

        In a chunk of one uncompressed PLAIN page of a required column nothing follows the values, so they begin so many
        bytes before its end. Footers do not say all that (nothing forbids padding), hence the look at both ends.
        """
        metadata = self._file.metadata
        if metadata.num_row_groups != 1 or self.num_rows == 0:
            return None
        chunk = metadata.row_group(0).column(self._file.schema_arrow.get_field_index(name))
        if chunk.compression != "UNCOMPRESSED" or chunk.path_in_schema != name or chunk.has_dictionary_page:
            return None
        start = chunk.data_page_offset + chunk.total_compressed_size - self.num_rows * width
        if start < chunk.data_page_offset or start + self.num_rows * width > len(self._memory):
            return None
        mapped = self._memory[start : start + self.num_rows * width].reshape(self.num_rows, width)
        decoded = self._file.read_row_group(0, columns=[name]).column(0)
        if any(mapped[row].tobytes() != decoded[row].as_py() for row in (0, self.num_rows - 1)):
            return None
        return mapped


def decode_column(file: pq.ParquetFile, name: str, width: int) -> np.ndarray:
    """The values of a ``fixed_size_binary`` column as pyarrow decodes them: (num_rows, width) uint8."""
    values = file.read([name]).column(name).combine_chunks()
    raw = np.frombuffer(values.buffers()[1], dtype=np.uint8)
    return raw[values.offset * width : (values.offset + len(values)) * width].reshape(len(values), width)


class TrainingDataset:
    """The rows of one split of an encoded dataset.

    Attributes:
        manifest: Of the dataset.
        specs: What the tensors mean.
        constants: The dataset's own tensors.
        num_rows: Rows of each shard.

    Args:
        manifest: Of the dataset.
        specs: Its specs.
        constants: Its constants.
        shards: Its files, in the manifest's order.
    """

    def __init__(self, manifest: Manifest, specs: DatasetSpecs, constants: Constants, shards: Sequence[Shard]) -> None:
        self.manifest = manifest
        self.specs = specs
        self.constants = constants
        self.num_rows = tuple(shard.num_rows for shard in shards)
        self._shards = list(shards)
        self._starts = np.concatenate([[0], np.cumsum(self.num_rows, dtype=np.int64)])

    def __len__(self) -> int:
        return sum(self.num_rows)

    def batch_at(self, step: int, *, seed: int, global_batch_size: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The samples that one process takes at one step.

        Global batches follow each other without a gap: batch ``step`` holds the positions from
        ``step * global_batch_size`` on. Position p is sample ``p % num_rows`` of epoch ``p // num_rows``, so the last
        batch of an epoch is completed with the first samples of the next: none is left out, none is seen more often.

        Args:
            step: From 0.
            seed: The training's.
            global_batch_size: Samples a step, over all processes; a multiple of `world_size`.
            rank: This process.
            world_size: Number of processes.

        Returns:
            ``global_batch_size / world_size`` samples. The batches of all ranks, in order, are the global batch.
        """
        share = global_batch_size // world_size
        start = step * global_batch_size + rank * share
        return self.batch_of(range(start, start + share), seed)

    def batch_of(self, positions: Sequence[int], seed: int) -> Batch:
        """The samples at some positions of the endless sequence of epochs."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), len(self))
        rows = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            order = sample_order(seed, int(epoch), self.manifest.digest, self.num_rows)
            rows[epochs == epoch] = order[places[epochs == epoch]]
        return self._gather(rows, epochs)

    def _gather(self, rows: np.ndarray, epochs: np.ndarray) -> Batch:
        latents, text, masks = self.specs.latents, self.specs.text, self.specs.masks
        moments = np.empty((len(rows), latents.moments_num_bytes), np.uint8)
        masked_moments = np.empty_like(moments)
        embeddings = np.empty((len(rows), text.embeddings_num_bytes), np.uint8)
        mask = np.empty((len(rows), latents.mask_num_bytes), np.uint8)
        uids = []
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        for i, (shard_index, epoch) in enumerate(zip(shards, epochs, strict=True)):
            shard = self._shards[shard_index]
            row = rows[i] - self._starts[shard_index]
            uid = shard.uids[row]
            k = mask_variant(uid, int(epoch), masks.num_variants)
            uids.append(uid)
            moments[i] = shard.column("moments", moments.shape[1])[row]
            masked_moments[i] = shard.column(f"masked_moments_{k}", moments.shape[1])[row]
            embeddings[i] = shard.column("text_embeddings", embeddings.shape[1])[row]
            mask[i] = shard.column(f"mask_{k}", mask.shape[1])[row]
        side = latents.latent_px
        bits = np.unpackbits(mask, axis=1, count=side * side).reshape(-1, 1, side, side)
        return Batch(
            uids=tuple(uids),
            moments=_tensor(moments, latents.dtype, latents.moments_shape),
            masked_moments=_tensor(masked_moments, latents.dtype, latents.moments_shape),
            mask=torch.from_numpy(bits.astype(np.float32)),
            text_embeddings=_tensor(embeddings, text.dtype, text.embeddings_shape),
        )


def _tensor(raw: np.ndarray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(raw.view(_DTYPES[dtype]).reshape(-1, *shape))


# ------------------------------------------------------------------------------------------------------------- opening


def open_dataset(store: ObjectStore, prefix: str, cache_dir: Path, *, verify_hashes: bool = True) -> TrainingDataset:
    """Opens the training split of an encoded dataset.

    Args:
        store: Where it is.
        prefix: Its folder's key.
        cache_dir: Files of a store that is not a local folder are kept here.
        verify_hashes: Whether to read each file once and compare its sha256. Processes that share the files let one of
            them do it.

    Returns:
        The dataset; its files are mapped, not read.

    Raises:
        ContractError: No such dataset, not an encoded one, empty, or a file is not what the manifest says.
    """
    manifest = _read_manifest(store, prefix)
    specs = parse_specs(manifest, store.uri_of(prefix))
    files = manifest.files("rows", split="train")
    if not sum(file.num_rows for file in files):
        raise ContractError(f"{store.uri_of(prefix)}: the dataset has no training rows; select more, or hold out fewer")
    shards = []
    for file in files:
        if file.num_rows == 0:
            continue
        shard = Shard(_local_file(store, prefix, file, cache_dir, verify_hashes=verify_hashes))
        if shard.num_rows != file.num_rows:
            raise ContractError(f"{shard.path}: {shard.num_rows} rows, the manifest says {file.num_rows}")
        shards.append(shard)
    return TrainingDataset(manifest, specs, _read_constants(store, prefix, manifest, specs), shards)


def _read_manifest(store: ObjectStore, prefix: str) -> Manifest:
    uri = store.uri_of(f"{prefix}/{MANIFEST_NAME}")
    try:
        return Manifest.model_validate_json(store.read(f"{prefix}/{MANIFEST_NAME}"))
    except ObjectNotFoundError as error:
        raise ContractError(
            f"dataset: {uri} is not there: no such dataset, or not complete; prepare it first"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ContractError(
            f"dataset: {uri} is no manifest that this version reads "
            f"({'.'.join(map(str, first['loc']))}: {first['msg']}); prepare it again"
        ) from error


def _local_file(store: ObjectStore, prefix: str, file: DatasetFile, cache_dir: Path, *, verify_hashes: bool) -> Path:
    """A local copy of a file, which is what the manifest says."""
    key = f"{prefix}/{file.name}"
    path = store.local_path(key)
    if path is not None:
        _check_file(path, file, verify_hashes=verify_hashes)
        return path
    path = cache_dir / file.sha256[:2] / f"{file.sha256}.parquet"
    try:
        _check_file(path, file, verify_hashes=verify_hashes)
    except ContractError:
        path.unlink(missing_ok=True)  # a cache may be broken, and is made again
        store.download(key, path, file.sha256)
        _check_file(path, file, verify_hashes=False)
    return path


def _check_file(path: Path, file: DatasetFile, *, verify_hashes: bool) -> None:
    if not path.is_file():
        raise ContractError(f"{path}: missing, and the manifest names it")
    num_bytes = path.stat().st_size
    if num_bytes != file.num_bytes:
        raise ContractError(f"{path}: {num_bytes} bytes, the manifest says {file.num_bytes}; the file is damaged")
    if verify_hashes and (found := sha256_of_file(path)) != file.sha256:
        raise ContractError(f"{path}: sha256 {found}, the manifest says {file.sha256}; the file is damaged")


def _read_constants(store: ObjectStore, prefix: str, manifest: Manifest, specs: DatasetSpecs) -> Constants:
    uri = store.uri_of(f"{prefix}/{CONSTANTS_NAME}")
    entry = next((file for file in manifest.extra_files if file.name == CONSTANTS_NAME), None)
    if entry is None:
        raise ContractError(f"dataset: its manifest does not name {uri}; encode it again")
    data = store.read(f"{prefix}/{CONSTANTS_NAME}")
    found = hashlib.sha256(data).hexdigest()
    if found != entry.sha256:
        raise ContractError(f"{uri}: sha256 {found}, the manifest says {entry.sha256}; the file is damaged")
    tensors = load_safetensors(data)
    shapes = {"null_text_embedding": specs.text.embeddings_shape, "full_mask_moments": specs.latents.moments_shape}
    for name, shape in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            has = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise ContractError(f"{uri}: {name} is {has}, the dataset's specs say {shape}; encode it again")
    return Constants(tensors["null_text_embedding"], tensors["full_mask_moments"])
