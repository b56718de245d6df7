"""The training rows of encoded datasets, and the batches made of them.

```python
dataset = open_dataset(store, "datasets/encode/0123456789abcdef", cache_dir)
with dataset.batches(seed=7, start_step=0, global_batch_size=256, rank=0, world_size=8, pin_memory=True) as batches:
    for batch in batches:
        …
```

Tensors are mapped straight out of standard Parquet files and copied once, into the batch. Position p of a training is
one sample whatever the number of processes and threads, so resuming is one integer: batch ``step`` of all processes
holds the positions from ``step * global_batch_size`` on, without a gap. Position p of a single dataset is sample
``p % num_rows`` of epoch ``p // num_rows``: the last batch of an epoch is completed with the first samples of the next,
so none is left out and none is seen more often. Of several datasets, `training.mixture` says whose turn it is; each has
epochs of its own.

A forgotten row (`preprocessing.contracts.tombstones`) is in no batch: where its turn comes, another row of the window
is seen, which one is a pure function, too, and all other rows stay at their positions. Which tombstones are in force is
settled when the dataset is opened.

Nothing is handed out of a file before its sha256 was found to be the manifest's (`training.shard_files`).
"""

import functools
import hashlib
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors.torch import load as load_safetensors

from infra.errors import ContractError
from infra.storage import ObjectNotFoundError, ObjectStore
from model.crop import decode_crop
from preprocessing.contracts.manifest import DatasetFile, Manifest, load_manifest
from preprocessing.contracts.tombstones import Tombstones
from training.batch import Batch, BatchBuffers, Columns, Constants
from training.compatibility import DatasetSpecs, check_agree, parse_specs
from training.conditioning import check_fields
from training.fields import Fields
from training.gather import gather
from training.loader import Batches, Share
from training.mixture import Mixture, digest_of_shares, shares_of
from training.part import Part
from training.row_cache import WANTED_NOW, RowCache, shard_files_of
from training.rows import UID_NUM_BYTES, Shard
from training.shard_files import Notes

__all__ = ["CONSTANTS_NAME", "Batch", "Constants", "Fields", "TrainingDataset", "open_dataset"]

CONSTANTS_NAME: Final = "constants.safetensors"
_NUM_ATTEMPTS = 3
_SHARD_BITS = 40
_SHARD_MASK = (1 << _SHARD_BITS) - 1


class TrainingDataset:
    """The training rows of one encoded dataset, or of several mixed by weight. Threads may share it.

    Attributes:
        digest: The dataset's; of a mixture, of the datasets and their weights.
        specs: What the tensors mean.
        constants: The dataset's own tensors; of a mixture, those of its first dataset.
        fields: Which tensors batches hold.
        tombstones: Which rows are in no batch.

    Args:
        parts: The datasets, in order of their digests.
        shares: How many samples of each a block of the mixture holds.
        specs: Of all of them.
        constants: Of all of them.
        fields: Which tensors are wanted.
        columns: The columns that they are made of.
        tombstones: Which rows are in no batch; the parts know of them.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        shares: Sequence[int],
        specs: DatasetSpecs,
        constants: Constants,
        fields: Fields,
        columns: Columns,
        tombstones: Tombstones,
    ) -> None:
        self.specs, self.constants, self.fields = specs, constants, fields
        self.tombstones = tombstones
        self._parts, self._shares = list(parts), tuple(shares)
        self._columns = columns
        self.digest = digest_of_shares([part.digest for part in parts], self._shares)
        self._mixture = functools.lru_cache(2)(self._make_mixture)
        self._now: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Places in an epoch of each of the datasets, together: their rows, and those that were forgotten."""
        return sum(sum(part.num_rows) for part in self._parts)

    @property
    def num_rows(self) -> tuple[int, ...]:
        """Rows of each shard, forgotten ones included."""
        return tuple(rows for part in self._parts for rows in part.num_rows)

    def batches(
        self,
        *,
        seed: int,
        global_batch_size: int,
        start_step: int = 0,
        num_steps: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 1,
        num_fetchers: int = 2,
        pin_memory: bool = False,
    ) -> Batches:
        """The batches of one process, from a step on, ahead of need. To be closed, or used in a ``with``.

        Args:
            seed: The training's.
            global_batch_size: Samples a step, over all processes; a multiple of `world_size`.
            start_step: Step of the first batch.
            num_steps: How many batches; None: without end.
            rank: This process.
            world_size: Number of processes.
            num_workers: Threads that put batches together; 0: each batch is made when it is asked for.
            num_fetchers: Threads that verify shards, and fetch them, ahead of need.
            pin_memory: Into pinned memory, for copies to a GPU beside its work; needs CUDA.

        Returns:
            An iterator. A batch's tensors stay as they are until the next but one batch is asked for.

        Raises:
            ValueError: The sizes do not fit.
        """
        return Batches(
            self,
            Share(seed, global_batch_size, rank, world_size),
            start_step=start_step,
            num_steps=num_steps,
            num_workers=num_workers,
            num_fetchers=num_fetchers,
            pin_memory=pin_memory,
        )

    def batch_at(self, step: int, *, seed: int, global_batch_size: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The samples that one process takes at one step, in memory of their own; see `batches` for the arguments."""
        share = Share(seed, global_batch_size, rank, world_size)
        return self.batch_of(share.positions(step), seed)

    def batch_of(self, positions: Sequence[int], seed: int) -> Batch:
        """The samples at some positions, in memory of their own."""
        return self.fill(self.make_buffers(len(positions)), positions, seed)

    def make_buffers(self, num_samples: int, *, pin_memory: bool = False) -> BatchBuffers:
        """Memory for a batch of these rows."""
        return BatchBuffers(num_samples, self.fields, self.specs, pin_memory=pin_memory)

    def fill(self, buffers: BatchBuffers, positions: Sequence[int], seed: int) -> Batch:
        """Copies the samples at some positions into a batch's memory.

        Args:
            buffers: For as many samples.
            positions: From 0 to any number.
            seed: The training's.

        Returns:
            The batch, in that memory.

        Raises:
            ContractError: A shard is missing or damaged, or is being written to.
        """
        self._now = (seed, positions[0])
        parts, owns = self._mixture(seed).locate(positions)
        epochs, shards, rows = np.empty_like(owns), np.empty_like(owns), np.empty_like(owns)
        for part in np.unique(parts):
            own = parts == part
            epochs[own], shards[own], rows[own] = self._parts[part].locate(seed, owns[own])
        places, which = np.unique((parts << _SHARD_BITS) + shards, return_inverse=True)
        changed: list[Shard] = []
        for _ in range(_NUM_ATTEMPTS):
            opened = [self._parts[place >> _SHARD_BITS].shard(place & _SHARD_MASK) for place in places.tolist()]
            uids = self._gather(buffers, opened, which, rows, epochs)
            changed = [shard for shard in opened if not shard.is_unchanged()]
            if not changed:
                return buffers.to_batch(uids, tuple(epochs.tolist()))
        raise ContractError(f"{changed[0].path}: it is being written to; nothing may change a dataset's files")

    def _gather(
        self, buffers: BatchBuffers, shards: list[Shard], which: np.ndarray, rows: np.ndarray, epochs: np.ndarray
    ) -> tuple[str, ...]:
        """Copies rows of shards: sample i is row ``rows[i]`` of ``shards[which[i]]``."""
        uids = torch.empty(len(rows), UID_NUM_BYTES, dtype=torch.uint8)
        gather(uids, _addresses(shards, which, np.zeros((1, 1), np.int64))[0] + rows * UID_NUM_BYTES)
        places = np.array([self._columns.places[name] for name in buffers.raw])[:, None]
        if "mask" in buffers.raw:
            variants = mask_variants(uids.numpy(), epochs, self.specs.masks.num_variants)
            has_variants = np.array([name in ("mask", "masked_moments") for name in buffers.raw])[:, None]
            places = places + has_variants * variants
        addresses = _addresses(shards, which, places)
        for target, firsts in zip(buffers.raw.values(), addresses, strict=True):
            gather(target, firsts + rows * target.shape[1])
        if buffers.images is not None:
            for i, (shard, row) in enumerate(zip(which.tolist(), rows.tolist(), strict=True)):
                crop = decode_crop(shards[shard].images[row].tobytes())
                if crop.shape != buffers.images[i].shape:
                    raise ContractError(
                        f"{shards[shard].path}: row {row} keeps a crop of {crop.shape}, the dataset's specs say "
                        f"{buffers.images[i].shape}; encode it again"
                    )
                buffers.images[i] = crop
        text, digits = uids.numpy().tobytes().hex(), 2 * UID_NUM_BYTES
        return tuple(text[start : start + digits] for start in range(0, len(text), digits))

    def _make_mixture(self, seed: int) -> Mixture:
        return Mixture(self._shares, seed, [part.digest for part in self._parts])

    # ------------------------------------------------------------------------------------------------- what comes next

    def windows_at(self, seed: int, position: int) -> tuple[tuple[int, int], ...]:
        """For each dataset the epoch and window of its next sample, as seen from a position."""
        owns = self._mixture(seed).before(position)
        return tuple(part.order(seed).window_at(int(own)) for part, own in zip(self._parts, owns, strict=True))

    def due(self, seed: int, position: int) -> dict[str, tuple[Part, DatasetFile]]:
        """The files of these windows and of the next ones, in the order of need, by sha256; others are closed."""
        self._now = self._now or (seed, position)  # fetching ahead begins before the first batch does
        owns = self._mixture(seed).before(position)
        due = [(part, file) for part, own in zip(self._parts, owns, strict=True) for file in part.due(seed, int(own))]
        found = {file.sha256: (part, file) for part, file in due}
        self._close_all_but(found)
        return found

    def needs(self) -> dict[str, int]:
        """When each file is needed next, in windows, as seen from the last batch that was begun; by its sha256.

        Those of neither this window nor the next one are closed, so that a cache may evict them.
        """
        seed, position = self._now or (0, 0)
        owns = self._mixture(seed).before(position)
        needs: dict[str, int] = {}
        for part, own in zip(self._parts, owns, strict=True):
            needs |= part.needs(seed, int(own))
        self._close_all_but({sha256 for sha256, due in needs.items() if due <= WANTED_NOW})
        return needs

    def _close_all_but(self, sha256s: Container[str]) -> None:
        for part in self._parts:
            part.close_all_but(sha256s)


def _addresses(shards: list[Shard], which: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Where in memory the columns of some samples begin: (columns, batch).

    Args:
        shards: The shards.
        which: (batch,) the shard of each sample.
        places: (columns, batch) or (columns, 1): which of the wanted columns.
    """
    firsts = np.array([shard.addresses for shard in shards])[which, places]
    if not firsts.all():  # a shard's first samples
        places = np.broadcast_to(places, firsts.shape)
        for i in np.unique(which[(firsts == 0).any(axis=0)]).tolist():
            shards[i].find_columns(np.unique(places[(which == i) & (firsts == 0)]))
        firsts = np.array([shard.addresses for shard in shards])[which, places]
    return firsts


def mask_variants(uids: np.ndarray, epochs: np.ndarray, num_variants: np.ndarray | int) -> np.ndarray:
    """Which of its masks each sample wears at a visit: the next one each time, from a start of its own.

    Args:
        uids: (batch, 16) uint8; their lower halves are uniform, and are the start.
        epochs: (batch,) from 0.
        num_variants: K.
    """
    starts = np.ascontiguousarray(uids).view(">u8")[:, 1] % np.asarray(num_variants, dtype=np.uint64)
    return (epochs + starts.astype(np.int64)) % num_variants


# ------------------------------------------------------------------------------------------------------------- opening


def open_dataset(
    store: ObjectStore,
    datasets: str | Mapping[str, float],
    cache_dir: Path,
    *,
    fields: Fields | None = None,
    cache_bytes: int | None = None,
    session: str | None = None,
    tombstones: Tombstones | None = None,
) -> TrainingDataset:
    """Opens the training split of an encoded dataset, or of several to be mixed.

    Only manifests and constants are read here; files of rows are verified a little before they are needed.

    Args:
        store: Where it is.
        datasets: Its folder's key; or of several, key → weight.
        cache_dir: A local folder for what is known of files, and for the files of a store that is not a local folder.
            Processes that train together on a machine share it.
        fields: Which tensors are wanted; by default those that training without frozen encoders needs.
        cache_bytes: How much files in `cache_dir` may take; default: four fifths of what is free.
        session: A word that is new at every start and common to the processes that share `cache_dir`: then each file is
            verified by one of them. None: by each for itself.
        tombstones: Which rows must be in no batch; processes that train together must be given the same ones. None:
            those that the store has.

    Returns:
        The dataset.

    Raises:
        ContractError: No such dataset, not an encoded one, empty, or it has not what is asked for; or several do not
            agree.
        ValueError: `cache_bytes` cannot hold what is needed at once; a weight is too small.
    """
    fields = fields or Fields()
    weights = {datasets: 1.0} if isinstance(datasets, str) else dict(datasets)
    manifests = {prefix: _read_manifest(store, prefix) for prefix in weights}
    specs = {prefix: parse_specs(manifest, store.uri_of(prefix)) for prefix, manifest in manifests.items()}
    check_agree({store.uri_of(prefix): its for prefix, its in specs.items()})
    for prefix, its in specs.items():
        check_fields(fields, its.columns, store.uri_of(prefix))
        if not sum(file.num_rows for file in manifests[prefix].files("rows", split="train")):
            raise ContractError(
                f"{store.uri_of(prefix)}: the dataset has no training rows; select more, or hold out fewer"
            )
    tombstones = Tombstones.load(store) if tombstones is None else tombstones
    notes = Notes(cache_dir, session)
    prefixes = sorted(weights, key=lambda prefix: manifests[prefix].digest)
    first = prefixes[0]
    files = shard_files_of(store, cache_dir, cache_bytes, notes)
    columns = Columns(fields, specs[first])
    parts = [Part(manifests[prefix], prefix, files, columns.widths, len(prefixes), tombstones) for prefix in prefixes]
    constants = _read_constants(store, first, manifests[first], specs[first])
    shares = shares_of([weights[prefix] for prefix in prefixes])
    dataset = TrainingDataset(parts, shares, specs[first], constants, fields, columns, tombstones)
    if isinstance(files, RowCache):
        files.check_size(sum(part.bytes_at_once for part in parts))
        files.needs = dataset.needs
    return dataset


def _read_manifest(store: ObjectStore, prefix: str) -> Manifest:
    uri = store.uri_of(prefix)
    try:
        manifest = load_manifest(store, prefix)
    except ObjectNotFoundError as error:
        raise ContractError(
            f"dataset: {error.uri} is not there: no such dataset, or not complete; prepare it first"
        ) from error
    name = prefix.rpartition("/")[2]
    if not manifest.digest.startswith(name):
        raise ContractError(
            f"dataset: {uri} has the manifest of dataset {manifest.digest[: len(name)]}; put its own manifest there"
        )
    return manifest


def _read_constants(store: ObjectStore, prefix: str, manifest: Manifest, specs: DatasetSpecs) -> Constants:
    uri = store.uri_of(f"{prefix}/{CONSTANTS_NAME}")
    entry = next((file for file in manifest.extra_files if file.name == CONSTANTS_NAME), None)
    if entry is None:
        raise ContractError(f"dataset: its manifest does not name {uri}; encode it again")
    try:
        data = store.read(f"{prefix}/{CONSTANTS_NAME}")
    except ObjectNotFoundError as error:
        raise ContractError(f"{error}, and the manifest names it") from None
    found = hashlib.sha256(data).hexdigest()
    if found != entry.sha256:
        raise ContractError(f"{uri}: sha256 {found}, the manifest says {entry.sha256}; the file is damaged")
    tensors = load_safetensors(data)
    shapes = {"null_text_embedding": specs.text.embeddings_shape, "full_mask_moments": specs.latents.moments_shape}
    if "token_ids" in specs.columns:
        shapes["null_token_ids"] = (specs.text.num_tokens,)
    for name, shape in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            has = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise ContractError(f"{uri}: {name} is {has}, the dataset's specs say {shape}; encode it again")
    token_ids = tensors.get("null_token_ids")
    return Constants(
        tensors["null_text_embedding"],
        tensors["full_mask_moments"],
        None if token_ids is None else token_ids.long(),
    )
