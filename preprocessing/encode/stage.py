"""The encode stage: download shards in, training shards out, with reading, encoding and writing at the same time.

| thread | does | holds |
| --- | --- | --- |
| reader | fetches a shard, cuts it into batches | a shard of JPEGs |
| preparers | decode, crop, draw masks, tokenize | a few batches |
| encoder | runs the models (on a CPU in lanes of their own) | a shard of training rows |
| the caller's | writes Parquet, hashes, uploads, commits | a shard of training rows |
"""

import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.errors import GateError
from infra.storage import ObjectStore
from model.specs import USER_FAMILY
from preprocessing.ahead import map_ahead, read_ahead
from preprocessing.contracts.config import EncodeConfig, ModelConfig
from preprocessing.contracts.digests import digest_of, weights_sha256
from preprocessing.contracts.manifest import Manifest, Split, dataset_prefix
from preprocessing.contracts.reasons import Reason
from preprocessing.contracts.schemas import TENSOR_WRITER
from preprocessing.encode.batches import BatchSize
from preprocessing.encode.crops import Refused
from preprocessing.encode.duplicates import Copies, delete_copies, find_copies, read_copies, write_copies
from preprocessing.encode.kernel import Encoders, Prepared, encode, prepare, rejects_of, with_split
from preprocessing.stage import RowsFile, ShardOutput, find_report, reported_shards
from preprocessing.stored_parquet import open_parquet

if TYPE_CHECKING:
    import torch

    from model.mask_bank import MaskBank

STAGE_VERSION: Final = 3
CONSTANTS_NAME: Final = "constants.safetensors"
SPLITS: Final[tuple[Split, ...]] = ("train", "validation")


@dataclass(frozen=True)
class _Batch:
    """Some consecutive rows of a shard, and those before and after them that are not to be encoded."""

    index: int
    num_in: int
    rows: pa.Table
    copies: Refused
    is_first: bool
    is_last: bool


class EncodeStage:
    """Download shards in, training shards out: for each ``train-00000-….parquet`` and ``validation-00000-….parquet``.

    Of rows whose pictures have the same bytes, the first one is kept: a copy could otherwise stand in both splits.

    Args:
        store: Where datasets stand.
        downloaded: Manifest of the ``download`` dataset.
        config: What to make.
        model: Whose ``vae/`` and ``open_clip/`` to use.
        device: Where the models compute; by default a GPU if there is one.
    """

    name = "encode"
    version = STAGE_VERSION

    def __init__(
        self,
        store: ObjectStore,
        downloaded: Manifest,
        config: EncodeConfig,
        model: ModelConfig,
        device: "torch.device | str | None" = None,
    ):
        self._store, self._downloaded, self._config, self._directory = store, downloaded, config, model.directory
        self._device = device
        self._batch_size = BatchSize(
            config.batch_size,
            f"of {config.resolution_px} px in {config.precision}; lower encode.num_threads, encode.num_processes or "
            "encode.resolution_px, set encode.precision to 'bf16', or take a machine with more memory",
        )

    @cached_property
    def _weights(self) -> dict[str, str]:
        return {name: weights_sha256(self._directory / name) for name in ("vae", "open_clip")}

    @cached_property
    def _mask_bank(self) -> "MaskBank | None":
        """The user's masks."""
        if self._config.mask_family != USER_FAMILY:
            return None
        from model.mask_bank import MaskBank
        from preprocessing.mask_files import read_mask_files

        files = read_mask_files(self._config.mask_files)
        try:
            return MaskBank(
                [file.pixels for file in files],
                self._config.resolution_px,
                files_sha256=[file.sha256 for file in files],
                names=[file.name for file in files],
            )
        except ValueError as error:
            raise ValueError(f"encode.mask_files: {error}") from error

    @property
    def digest(self) -> str:
        """sha256 of what determines the result: of the user's masks, what the files hold, not what they are called."""
        inputs = dict(self._weights)
        if self._mask_bank is not None:
            inputs["masks"] = hashlib.sha256("\n".join(self._mask_bank.files_sha256).encode()).hexdigest()
        return digest_of(self.name, self.version, self.config, [self._downloaded.digest], inputs)

    @property
    def prefix(self) -> str:
        """Key of the dataset's folder."""
        return dataset_prefix(self.name, self.digest)

    @property
    def parents(self) -> dict[str, str]:
        """The ``download`` dataset."""
        return {"download": self._downloaded.digest}

    @property
    def config(self) -> dict[str, Any]:
        """The config fields that change the result."""
        return self._config.digest_fields()

    @property
    def num_shards(self) -> int:
        """As many as were downloaded."""
        return len(self._downloaded.shards)

    @cached_property
    def encoders(self) -> Encoders:
        """The models, loaded when they are first asked for."""
        from preprocessing.encode.models import load_encoders

        return load_encoders(self._directory, self._config, self._weights, self._mask_bank, self._device)

    def specs(self) -> dict[str, dict[str, Any]]:
        """What the tensors mean; training refuses a dataset whose specs are not its model's."""
        encoders = self.encoders
        return {
            "latents": encoders.latent_spec.to_json(),
            "text": encoders.text_spec.to_json(),
            "masks": encoders.mask_spec.to_json(),
        }

    def write_extra_files(self, folder: Path) -> Sequence[Path]:
        """The constants: the empty caption's tokens and embedding, and the moments of a picture that is all hole."""
        from preprocessing.encode.models import write_constants

        return [write_constants(self.encoders, folder / CONSTANTS_NAME)]

    def outputs(self, indices: Sequence[int], scratch: Path) -> Iterator[ShardOutput]:
        """Encodes the given shards, but for those that somebody else commits in the meantime."""
        is_over = threading.Event()
        with read_ahead(lambda: self._encoded(indices, scratch, is_over)) as made:
            try:
                yield from made
            finally:  # the encoder asks between batches: a shard may take an hour
                is_over.set()

    def _encoded(self, indices: Sequence[int], scratch: Path, is_over: threading.Event) -> Iterator[ShardOutput]:
        encoders, batch_size = self.encoders, self._batch_size
        num_threads = num_preparers(encoders)
        tables, refused, left_out = [], [], -1
        with (
            read_ahead(lambda: self._batches(indices, scratch)) as batches,
            map_ahead(lambda batch: (batch, prepare(batch.rows, encoders)), batches, num_threads) as prepared,
        ):
            batch: _Batch
            ready: Prepared
            for batch, ready in prepared:
                if is_over.is_set():
                    return
                # It was read ahead of its turn: another worker may have made it since.
                if batch.is_first and find_report(self._store, self, batch.index) is not None:
                    left_out = batch.index
                if batch.index == left_out:
                    continue
                table, more = batch_size.run(lambda size, ready=ready: encode(ready, encoders, size))
                tables.append(table)
                refused += [*batch.copies, *more]
                if batch.is_last:
                    rows = pa.concat_tables(tables) if tables else with_split(encoders.schema).empty_table()
                    files = _split_files(batch.index, rows)
                    # Another kind of machine rounds otherwise: names carry the hash, so that none replaces the other's.
                    yield ShardOutput(batch.index, batch.num_in, files, rejects_of(refused), is_repeatable=False)
                    tables, refused = [], []

    def _batches(self, indices: Sequence[int], scratch: Path) -> Iterator[_Batch]:
        """The rows of each shard, in batches; at least one of them a shard."""
        copies = self._copies(scratch)
        for index in indices:
            if find_report(self._store, self, index) is not None:
                continue
            rows = self._read_shard(index, scratch)
            is_copy = np.zeros(rows.num_rows, dtype=bool)
            is_copy[copies.get(index, [])] = True
            refused: Refused = [
                (row["uid"], row["url"], Reason.DUPLICATE_IMAGE, f"sha256 {row['sha256']}")
                for row in rows.select(["uid", "url", "sha256"]).filter(pa.array(is_copy)).to_pylist()
            ]
            num_in, rows, size = rows.num_rows, rows.filter(pa.array(~is_copy)), self._config.batch_size
            starts = range(0, max(1, rows.num_rows), size)
            for start in starts:
                part = rows.slice(start, size)
                copies_here = refused if start == 0 else []
                yield _Batch(index, num_in, part, copies_here, is_first=start == 0, is_last=start == starts[-1])

    def _copies(self, scratch: Path) -> Copies:
        """The rows whose picture has the same bytes as an earlier one's, over the whole dataset; found once a run."""
        prefix, digest = self.prefix, self.digest
        copies = read_copies(self._store, prefix, digest)
        if copies is None:
            hashes = ((index, self._read_hashes(index)) for index in range(self.num_shards))
            copies = find_copies(hashes, self._downloaded.num_out, scratch)
            # The sweep comes when all shards are reported. Who writes, and then looks, leaves nothing behind it: either
            # the sweep finds the file, or we see the reports.
            if not self._is_all_reported():
                write_copies(self._store, prefix, digest, copies)
                if self._is_all_reported():
                    delete_copies(self._store, prefix)
        return copies

    def _is_all_reported(self) -> bool:
        return len(reported_shards(self._store, self)) >= self.num_shards

    def _parent_keys(self, index: int) -> Iterator[tuple[str, str]]:
        """Key and sha256 of each file of a shard."""
        prefix = dataset_prefix("download", self._downloaded.digest)
        for file in self._downloaded.shards[index].files:
            if file.kind == "rows":
                yield f"{prefix}/{file.name}", file.sha256

    def _read_hashes(self, index: int) -> pa.ChunkedArray:
        columns = []
        for key, _ in self._parent_keys(index):
            with open_parquet(self._store, key) as file:
                columns += file.read(["sha256"]).column("sha256").chunks
        return pa.chunked_array(columns, pa.string())

    def _read_shard(self, index: int, scratch: Path) -> pa.Table:
        tables = []
        for key, sha256 in self._parent_keys(index):
            path = self._store.local_path(key)
            if path is not None:
                tables.append(pq.read_table(path))
                continue
            path = scratch / f"parent-{sha256}.parquet"
            self._store.download(key, path, sha256)
            tables.append(pq.read_table(path, memory_map=False))
            path.unlink()  # scratch holds one shard of the parent's, not all
        return pa.concat_tables(tables)


def num_preparers(encoders: Encoders) -> int:
    """Threads that decode ahead: half as many as the models use where they share the cores."""
    import torch

    num_threads = encoders.num_lanes or torch.get_num_threads()
    return max(1, num_threads // 2) if encoders.vae.device.type == "cpu" else num_threads


def check_gate(manifest: Manifest, validation_fraction: float) -> None:
    """Refuses to go on without rows to train on, or without the held-out rows that were asked for.

    Raises:
        GateError: A split is empty; better known before the training than after it.
    """
    num_rows = {split: sum(file.num_rows for file in manifest.files("rows", split)) for split in SPLITS}
    if num_rows["train"] == 0:
        why = ", ".join(f"{reason} {count}" for reason, count in manifest.dropped.items()) or "all are held out"
        raise GateError(f"encode: no row of {manifest.num_in} is left to train on ({why})")
    if validation_fraction > 0 and num_rows["validation"] == 0:
        raise GateError(
            f"select.validation_fraction: {validation_fraction} of {manifest.num_out} rows held out none; raise it"
        )


def _split_files(index: int, table: pa.Table) -> tuple[RowsFile, ...]:
    """One file a split, so that training cannot even open a held-out row; a split without rows has no file."""
    files = []
    for split in SPLITS:
        rows = table.filter(pc.field("split") == split).drop_columns(["split"])
        if rows.num_rows:
            files.append(RowsFile(f"{split}-{index:05d}.parquet", rows.combine_chunks(), split, TENSOR_WRITER))
    return tuple(files)
