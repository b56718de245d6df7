"""The encode stage: download shards in, training shards out, with reading, encoding and writing at the same time.

| thread | does | holds |
| --- | --- | --- |
| reader | fetches a shard, cuts it into batches | a shard of JPEGs |
| preparers | decode, crop, draw masks, tokenize | a few batches |
| encoder | runs the models (on a CPU in lanes of their own) | a shard of training rows |
| the caller's | writes Parquet, hashes, uploads, commits | a shard of training rows |

Where an earlier dataset was named (`preprocessing.reuse.say_previous`), made by the same models and config, its shards
are named where they stand, and of shards that are others the rows that it has are copied: what is encoded depends on
the row alone, so both are what the models would have made.
"""

import contextlib
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

from infra.errors import ContractError, GateError, TransientError
from infra.reading import reading
from infra.storage import ObjectNotFoundError, ObjectStore
from model.specs import USER_FAMILY
from preprocessing.ahead import map_ahead, read_ahead
from preprocessing.contracts.config import EncodeConfig, ModelConfig
from preprocessing.contracts.digests import canonical_json, digest_of, weights_sha256
from preprocessing.contracts.manifest import DatasetFile, Manifest, Split, dataset_prefix, find_manifest
from preprocessing.contracts.reasons import Reason
from preprocessing.contracts.schemas import DOWNLOADED, TENSOR_WRITER
from preprocessing.contracts.tombstones import Tombstones
from preprocessing.download.stage import FORGOTTEN
from preprocessing.encode.batches import BatchSize
from preprocessing.encode.crops import Refused
from preprocessing.encode.duplicates import Copies, delete_copies, find_copies, read_copies, write_copies
from preprocessing.encode.kernel import Encoders, Prepared, encode, prepare, rejects_of, with_split
from preprocessing.reuse import Previous, PreviousRows, PreviousShards, find_previous, rows_digest, shard_digest
from preprocessing.stage import RowsFile, ShardOutput, ShardReference, find_report, reported_shards
from preprocessing.stored_parquet import open_parquet

if TYPE_CHECKING:
    import torch

    from model.mask_bank import MaskBank

STAGE_VERSION: Final = 3
CONSTANTS_NAME: Final = "constants.safetensors"
_SPECS: Final = {"vae": "latents", "open_clip": "text"}
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
    done: "_Done"


@dataclass(frozen=True)
class _Done:
    """Of a shard: what the earlier dataset has of it, and the order of all of its rows.

    Attributes:
        rows: Training rows with their ``split``.
        order: uid → place in the shard.
        digest: The shard's.
    """

    rows: pa.Table
    order: dict[str, int]
    digest: str


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
        return digest_of(self.name, self.version, self.config, [self._downloaded.digest], self._inputs)

    @property
    def _inputs(self) -> dict[str, str]:
        inputs = dict(self._weights)
        if self._mask_bank is not None:
            inputs["masks"] = hashlib.sha256("\n".join(self._mask_bank.files_sha256).encode()).hexdigest()
        return inputs

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

    def outputs(self, indices: Sequence[int], scratch: Path) -> Iterator[ShardOutput | ShardReference]:
        """Encodes the given shards, but for those that somebody else commits in the meantime.

        Raises:
            TransientError: A file of the download is gone.
        """
        num_bytes = sum(file.num_bytes for index in indices for _, file in self._parent_files(index))
        # Whoever deletes encoded pictures leaves them while they are read here (`preprocessing.retention`).
        with reading(self._store, dataset_prefix("download", self._downloaded.digest), num_bytes):
            yield from self._outputs(indices, scratch)

    def _outputs(self, indices: Sequence[int], scratch: Path) -> Iterator[ShardOutput | ShardReference]:
        if self._previous is not None:
            copies, left = self.decide_copies(scratch), []
            for index in indices:
                reference = self._standing(index, copies.get(index))
                if reference is None:
                    left.append(index)
                else:
                    yield reference
            indices = left
        if not indices:
            return  # the models are not needed
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
                    rows = _in_order(pa.concat_tables([batch.done.rows, *tables]), batch.done.order)
                    files = _split_files(batch.index, rows)
                    # Another kind of machine rounds otherwise: names carry the hash, so that none replaces the other's.
                    yield ShardOutput(
                        batch.index,
                        batch.num_in,
                        files,
                        rejects_of(refused),
                        is_repeatable=False,
                        digest=batch.done.digest,
                    )
                    tables, refused = [], []

    def _batches(self, indices: Sequence[int], scratch: Path) -> Iterator[_Batch]:
        """The rows of each shard, in batches; at least one of them a shard."""
        copies = self.decide_copies(scratch)
        for index in indices:
            if find_report(self._store, self, index) is not None:
                continue
            rows = self._read_shard(index, scratch)
            refused = self._refused(rows, copies.get(index))
            order = {uid: place for place, uid in enumerate(rows.column("uid").to_pylist())}
            digest = self._shard_digest(rows.drop_columns(["image"]), refused)
            num_in, size = rows.num_rows, self._config.batch_size
            rows = rows.filter(_are_not_in(rows, {row[0] for row in refused}))
            done = _Done(self._take_over(rows), order, digest)
            rows = rows.filter(_are_not_in(rows, set(done.rows.column("uid").to_pylist())))
            _check_pictures(rows)
            starts = range(0, max(1, rows.num_rows), size)
            for start in starts:
                part = rows.slice(start, size)
                copies_here = refused if start == 0 else []
                yield _Batch(index, num_in, part, copies_here, start == 0, start == starts[-1], done)

    def _refused(self, rows: pa.Table, copies: np.ndarray | None) -> Refused:
        """The rows that are not to be encoded: copies of pictures, and what was forgotten."""
        numbers = set() if copies is None else set(copies.tolist())
        refused: Refused = []
        for number, row in enumerate(rows.select(["uid", "url", "sha256"]).to_pylist()):
            if self._tombstones.match(row["uid"], row["url"], None, row["sha256"]):
                refused.append((row["uid"], row["url"], *FORGOTTEN))
            elif number in numbers:
                detail = f"sha256 {row['sha256']}"
                refused.append((row["uid"], row["url"], Reason.DUPLICATE_IMAGE, detail))
        return refused

    @cached_property
    def _tombstones(self) -> Tombstones:
        return Tombstones.load(self._store)

    # ----------------------------------------------------------------------------------- what an earlier dataset has

    @cached_property
    def _previous(self) -> Previous | None:
        """The dataset of which rows may be taken over: made by this code, config and weights, of such pictures."""
        found = find_previous(self._store, self.name, self.digest)
        if found is None:
            return None
        its, ours = found.manifest, self._downloaded
        parent = find_manifest(self._store, dataset_prefix("download", its.parents.get("download", "")))
        if parent is None or (parent.stage_version, parent.config) != (ours.stage_version, ours.config):
            return None  # other pictures come of the same bytes
        weights = {name: its.specs.get(spec, {}).get("weights_sha256") for name, spec in _SPECS.items()}
        is_alike = (its.stage_version, its.config, weights) == (self.version, self.config, self._weights)
        return found if is_alike else None

    @cached_property
    def _previous_shards(self) -> PreviousShards:
        assert self._previous is not None
        return PreviousShards(self._store, self._previous.prefix, self._previous.manifest)

    def _standing(self, index: int, copies: np.ndarray | None) -> ShardReference | None:
        """The shard as it stands in the earlier dataset, if it is the same."""
        if not len(self._previous_shards):
            return None
        rows = self._read_columns(index, [name for name in DOWNLOADED.names if name != "image"])
        return self._previous_shards.find(self._shard_digest(rows, self._refused(rows, copies)), index)

    def _shard_digest(self, rows: pa.Table, refused: Refused) -> str:
        """Of what determines a shard: its rows, of which the pictures are known by their sha256, and who made them."""
        return shard_digest(
            self.name,
            self.version,
            self.config,
            [rows_digest(rows)],
            others=self._inputs,
            download=[self._downloaded.stage_version, self._downloaded.config],
            refused=[[uid, str(reason)] for uid, _, reason, _ in refused],
        )

    def _take_over(self, rows: pa.Table) -> pa.Table:
        """The training rows that the earlier dataset has of downloaded ones: of the same uid, of the same picture."""
        schema = with_split(self.encoders.schema)
        if self._previous is None or canonical_json(self._previous.manifest.specs) != canonical_json(self.specs()):
            return schema.empty_table()
        numbers, stored = self._previous_rows.read(self._previous_rows.find(rows.column("uid")), schema.names[:-1])
        if stored is None:
            return schema.empty_table()
        rows = rows.take(pa.array(numbers))
        # What the metadata says may be new; what was made of picture, caption and uid is not.
        made = {"image", *schema.names} - ({*DOWNLOADED.names} - {"image"})
        columns = [(stored if name in made else rows).column(name) for name in schema.names]
        hashes = zip(stored.column("sha256").to_pylist(), rows.column("sha256").to_pylist(), strict=True)
        return pa.table(columns, schema=schema).filter(pa.array([before == now for before, now in hashes], pa.bool_()))

    @cached_property
    def _previous_rows(self) -> PreviousRows:
        assert self._previous is not None
        return PreviousRows(self._store, self._previous.prefix, self._previous.manifest, "uid")

    def decide_copies(self, scratch: Path) -> Copies:
        """The rows whose picture has the same bytes as an earlier one's, over the whole dataset; found once a run.

        Args:
            scratch: A folder for files of 40 bytes a row.
        """
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

    def _parent_files(self, index: int) -> Iterator[tuple[str, DatasetFile]]:
        """Key of each file of a shard's rows, and what the manifest says of it."""
        prefix = dataset_prefix("download", self._downloaded.digest)
        for file in self._downloaded.shards[index].files:
            if file.kind == "rows":
                yield file.key(prefix), file

    @contextlib.contextmanager
    def _parent_is_there(self) -> Iterator[None]:
        """Within, a file of the download that is gone is the world's fault.

        Raises:
            TransientError: It is gone.
        """
        try:
            yield
        except (ObjectNotFoundError, FileNotFoundError) as error:
            prefix = self._store.uri_of(dataset_prefix("download", self._downloaded.digest))
            raise TransientError(
                f"encode: a file of {prefix} is gone: the dataset was replaced while it was read ({error}); "
                "the next run reads what stands there then"
            ) from error

    def _read_columns(self, index: int, columns: list[str]) -> pa.Table:
        tables = []
        for key, _ in self._parent_files(index):
            with self._parent_is_there(), open_parquet(self._store, key) as file:
                tables.append(file.read(columns))
        return pa.concat_tables(tables)

    def _read_hashes(self, index: int) -> pa.ChunkedArray:
        return self._read_columns(index, ["sha256"]).column("sha256")

    def _read_shard(self, index: int, scratch: Path) -> pa.Table:
        """A shard of the download; pictures that were deleted are empty."""
        tables = []
        for key, file in self._parent_files(index):
            with self._parent_is_there():
                path = self._store.local_path(key)
                if path is not None:
                    table = pq.read_table(path)
                else:
                    path = scratch / f"parent-{file.sha256}.parquet"
                    self._store.download(key, path, file.sha256)
                    table = pq.read_table(path, memory_map=False)
                    path.unlink()  # scratch holds one shard of the parent's, not all
            if "image" in file.without and "image" not in table.column_names:
                table = table.append_column(DOWNLOADED.field("image"), pa.array([b""] * table.num_rows, pa.binary()))
            tables.append(table.select(DOWNLOADED.names))
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


def _check_pictures(rows: pa.Table) -> None:
    """Refuses to encode what was deleted.

    Raises:
        ContractError: Pictures are missing.
    """
    sizes = pc.call_function("binary_length", [rows.column("image")]).to_pylist()
    num_missing = sizes.count(0)
    if num_missing:
        raise ContractError(
            f"encode: {num_missing} pictures of the download were deleted once they had been encoded, and these "
            "settings need them again: `lacuna prepare` downloads them again, and retention.keep_pictures=true keeps "
            "them"
        )


def _are_not_in(rows: pa.Table, uids: set[str]) -> pa.Array:
    return pa.array([uid not in uids for uid in rows.column("uid").to_pylist()], pa.bool_())


def _in_order(rows: pa.Table, order: dict[str, int]) -> pa.Table:
    places = np.array([order[uid] for uid in rows.column("uid").to_pylist()], np.int64)
    return rows if (np.diff(places) > 0).all() else rows.take(pa.array(np.argsort(places)))


def _split_files(index: int, table: pa.Table) -> tuple[RowsFile, ...]:
    """One file a split, so that training cannot even open a held-out row; a split without rows has no file."""
    files = []
    for split in SPLITS:
        rows = table.filter(pc.field("split") == split).drop_columns(["split"])
        if rows.num_rows:
            files.append(RowsFile(f"{split}-{index:05d}.parquet", rows.combine_chunks(), split, TENSOR_WRITER))
    return tuple(files)
