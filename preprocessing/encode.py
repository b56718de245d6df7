"""From pictures to training rows: crop, moments, text embeddings, and K masks with the masked pictures' moments.

The VAE is not local: ``encode(image × (1 − mask))`` cannot be had from ``encode(image)``, so the masked pictures are
encoded here, K a row, and training needs no VAE. Nothing random that belongs to training is frozen in: posterior
draws, caption dropout, noise and the full mask are drawn at train time.
"""

import hashlib
import io
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
from model.specs import USER_FAMILY, LatentSpec, MaskSpec, TextSpec
from preprocessing.contracts.config import EncodeConfig, ModelConfig
from preprocessing.contracts.digests import digest_of, weights_sha256
from preprocessing.contracts.manifest import Manifest, Split, dataset_prefix
from preprocessing.contracts.reasons import Reason
from preprocessing.contracts.schemas import SELECTED, TENSOR_WRITER, training_rows
from preprocessing.stage import RowsFile, ShardOutput, rejects_table

if TYPE_CHECKING:  # torch costs seconds, which a run that finds everything done does not have to pay
    from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]  # diffusers exports lazily

    from model.encoders import TextEncoder
    from model.mask_bank import MaskBank

STAGE_VERSION: Final = 2
CONSTANTS_NAME: Final = "constants.safetensors"
SPLITS: Final[tuple[Split, ...]] = ("train", "validation")


@dataclass(frozen=True)
class Encoders:
    """The frozen models of this stage, and what their outputs are; the bank of masks where the user gives them."""

    vae: "AutoencoderKL"
    text: "TextEncoder"
    latent_spec: LatentSpec
    text_spec: TextSpec
    mask_spec: MaskSpec
    mask_bank: "MaskBank | None" = None

    @property
    def schema(self) -> pa.Schema:
        """The schema of the rows that come out."""
        return training_rows(
            self.latent_spec.moments_num_bytes,
            self.text_spec.embeddings_num_bytes,
            self.latent_spec.mask_num_bytes,
            self.mask_spec.num_variants,
        )


def encode_rows(rows: pa.Table, encoders: Encoders, batch_size: int) -> tuple[pa.Table, pa.Table]:
    """The kernel: downloaded rows in, training rows and refused rows out; no I/O.

    Args:
        rows: In the ``DOWNLOADED`` schema.
        encoders: The models.
        batch_size: Pictures that go through the VAE at once.

    Returns:
        Training rows (plus their ``split``), and rejects. A row that the encoders turn into NaN or infinity is refused.
    """
    kept, rejects = [], []
    for start in range(0, rows.num_rows, batch_size):
        table, refused = _encode_batch(rows.slice(start, batch_size), encoders)
        kept.append(table)
        rejects += refused
    schema = _with_split(encoders.schema)
    table = pa.concat_tables(kept) if kept else schema.empty_table()
    return table, rejects_table(*(list(column) for column in zip(*rejects, strict=True))) if rejects else rejects_table(
        [], [], [], []
    )


def _with_split(schema: pa.Schema) -> pa.Schema:
    return schema.append(SELECTED.field("split"))


def _encode_batch(rows: pa.Table, encoders: Encoders) -> tuple[pa.Table, list[tuple[str, str, str, str]]]:
    rows, crops, boxes, refused = _cropped(rows, encoders.latent_spec.resolution_px)
    schema = _with_split(encoders.schema)
    if rows.num_rows == 0:
        return schema.empty_table(), refused
    tensors = _tensors(crops, rows.column("uid").to_pylist(), rows.column("caption").to_pylist(), encoders)
    finite = np.all(
        [
            np.isfinite(value).reshape(len(crops), -1).all(axis=1)
            for value in tensors.values()
            if value.dtype == np.float16
        ],
        axis=0,
    )
    for index in np.flatnonzero(~finite):
        row = rows.slice(int(index), 1).to_pylist()[0]
        refused.append((row["uid"], row["url"], Reason.NON_FINITE, "an encoder gave NaN or infinity"))
    columns = {name: rows.column(name) for name in schema.names if name in rows.column_names}
    columns["image"] = pa.array([_png(crop) for crop in crops], pa.binary())
    columns |= {
        "crop_top": pa.array([box.top for box in boxes], pa.int32()),
        "crop_left": pa.array([box.left for box in boxes], pa.int32()),
        "resized_width": pa.array([box.resized_width for box in boxes], pa.int32()),
        "resized_height": pa.array([box.resized_height for box in boxes], pa.int32()),
    }
    columns |= {name: _fixed_size_binary(value) for name, value in tensors.items()}
    table = pa.table([columns[name] for name in schema.names], schema=schema)
    return table.filter(pa.array(finite)), refused


def _cropped(rows: pa.Table, side_px: int) -> tuple[pa.Table, np.ndarray, list[Any], list[tuple[str, str, str, str]]]:
    """Decodes and crops; a picture that cannot be read is refused."""
    from PIL import Image

    from model.crop import central_square

    crops, boxes, refused = [], [], []
    readable = np.ones(rows.num_rows, dtype=bool)
    for index, row in enumerate(rows.select(["uid", "url", "image"]).to_pylist()):
        try:
            with Image.open(io.BytesIO(row["image"])) as picture:
                crop, box = central_square(picture, side_px)
        except (OSError, ValueError, SyntaxError) as error:
            readable[index] = False
            refused.append((row["uid"], row["url"], Reason.IMAGE_UNREADABLE, str(error)[:200]))
            continue
        crops.append(crop)
        boxes.append(box)
    return rows.filter(pa.array(readable)), np.stack(crops) if crops else np.empty(0), boxes, refused


def _tensors(
    crops: np.ndarray, uids: Sequence[str], captions: Sequence[str], encoders: Encoders
) -> dict[str, np.ndarray]:
    """Every fixed-width column: fp16 moments and embeddings, and packed mask bits."""
    import torch

    from model.encoders import encode_moments, images_to_pixels
    from model.masks import draw_masks_of, to_latent_mask

    latent, spec = encoders.latent_spec, encoders.mask_spec
    pixels = images_to_pixels(crops)

    def moments_of(batch: "torch.Tensor") -> np.ndarray:
        batch = batch.contiguous(memory_format=torch.channels_last)
        return encode_moments(encoders.vae, batch).cpu().numpy().astype(np.float16)

    tensors = {
        "moments": moments_of(pixels),
        "text_embeddings": encoders.text.embed_captions(captions).cpu().numpy().astype(np.float16),
    }
    for k in range(spec.num_variants):
        masks = draw_masks_of(spec, uids, k, encoders.mask_bank)
        known = torch.from_numpy(1 - masks).unsqueeze(1)
        tensors[f"mask_{k}"] = np.packbits(to_latent_mask(masks, latent.factor).reshape(len(masks), -1), axis=1)
        tensors[f"masked_moments_{k}"] = moments_of(pixels * known)
    return tensors


def _fixed_size_binary(values: np.ndarray) -> pa.Array:
    """One value a row, as its little-endian bytes in C order."""
    rows = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("<"), copy=False)).reshape(len(values), -1)
    return pa.Array.from_buffers(
        pa.binary(rows.dtype.itemsize * rows.shape[1]), len(rows), [None, pa.py_buffer(rows.tobytes())]
    )


def _png(crop: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(crop).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


class EncodeStage:
    """Download shards in, training shards out: ``train-00000.parquet`` and ``validation-00000.parquet`` a shard.

    Of rows whose pictures have the same bytes, the first one is kept: a copy could otherwise stand in both splits.

    Args:
        store: Where datasets stand.
        downloaded: Manifest of the ``download`` dataset.
        config: What to make.
        model: Whose ``vae/`` and ``open_clip/`` to use.
    """

    name = "encode"
    version = STAGE_VERSION

    def __init__(self, store: ObjectStore, downloaded: Manifest, config: EncodeConfig, model: ModelConfig):
        self._store, self._downloaded, self._config, self._directory = store, downloaded, config, model.directory

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
    def parents(self) -> dict[str, str]:
        """The download dataset."""
        return {"download": self._downloaded.digest}

    @property
    def config(self) -> dict[str, Any]:
        """The fields that change the result."""
        return self._config.digest_fields()

    @property
    def num_shards(self) -> int:
        """One for each download shard."""
        return len(self._downloaded.shards)

    @cached_property
    def encoders(self) -> Encoders:
        """The models, loaded when they are first asked for."""
        import torch

        from model.encoders import load_text_encoder, load_vae

        if self._config.num_threads:
            torch.set_num_threads(self._config.num_threads)
        # Half as fast again on a CPU, and what a GPU's convolutions want.
        vae = load_vae(self._directory / "vae").to(memory_format=torch.channels_last)  # pyright: ignore[reportArgumentType, reportCallIssue]  # typed without it
        text = load_text_encoder(self._directory / "open_clip", load_image_tower=False)
        factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        resolution_px = self._config.resolution_px
        return Encoders(
            vae,
            text,
            LatentSpec(
                channels=vae.config["latent_channels"],
                resolution_px=resolution_px,
                factor=factor,
                scaling_factor=float(vae.config["scaling_factor"]),
                weights_sha256=self._weights["vae"],
            ),
            TextSpec(width=text.width, weights_sha256=self._weights["open_clip"]),
            MaskSpec(
                family=self._config.mask_family,
                resolution_px=resolution_px,
                num_variants=self._config.num_mask_variants,
                seed=self._config.mask_seed,
                files_sha256=() if self._mask_bank is None else self._mask_bank.files_sha256,
            ),
            self._mask_bank,
        )

    def specs(self) -> dict[str, dict[str, Any]]:
        """What the tensors mean; training refuses a dataset whose specs are not its model's."""
        encoders = self.encoders
        return {
            "latents": encoders.latent_spec.to_json(),
            "text": encoders.text_spec.to_json(),
            "masks": encoders.mask_spec.to_json(),
        }

    def write_extra_files(self, folder: Path) -> Sequence[Path]:
        """The constants: the empty caption's embedding and the moments of a picture that is all hole."""
        import torch
        from safetensors.torch import save_file

        from model.encoders import encode_moments

        encoders = self.encoders
        side = encoders.latent_spec.resolution_px
        constants = {
            "null_text_embedding": encoders.text.embed_captions([""])[0].half(),
            "full_mask_moments": encode_moments(encoders.vae, torch.zeros(1, 3, side, side))[0].half(),
        }
        save_file({name: value.contiguous().cpu() for name, value in constants.items()}, folder / CONSTANTS_NAME)
        return [folder / CONSTANTS_NAME]

    def outputs(self, indices: Sequence[int], scratch: Path) -> Iterator[ShardOutput]:
        """Encodes the given shards."""
        duplicates = self._duplicate_images(scratch)
        for index in indices:
            rows = self._read_shard(index, scratch)
            is_first = np.array([uid not in duplicates for uid in rows.column("uid").to_pylist()], dtype=bool)
            copies = rows.filter(pa.array(~is_first)).select(["uid", "url", "sha256"]).to_pylist()
            table, rejects = encode_rows(rows.filter(pa.array(is_first)), self.encoders, self._config.batch_size)
            refused = rejects_table(
                [row["uid"] for row in copies],
                [row["url"] for row in copies],
                [Reason.DUPLICATE_IMAGE] * len(copies),
                [f"sha256 {row['sha256']}" for row in copies],
            )
            yield ShardOutput(index, rows.num_rows, _split_files(index, table), pa.concat_tables([refused, rejects]))

    def _duplicate_images(self, scratch: Path) -> set[str]:
        """The uids whose picture has the same bytes as an earlier row's, over the whole dataset."""
        seen: set[str] = set()
        duplicates: set[str] = set()
        for index in range(self.num_shards):
            for row in self._read_shard(index, scratch, columns=["uid", "sha256"]).to_pylist():
                if row["sha256"] in seen:
                    duplicates.add(row["uid"])
                seen.add(row["sha256"])
        return duplicates

    def _read_shard(self, index: int, scratch: Path, columns: list[str] | None = None) -> pa.Table:
        prefix = dataset_prefix("download", self._downloaded.digest)
        tables = []
        for file in self._downloaded.shards[index].files:
            if file.kind != "rows":
                continue
            key = f"{prefix}/{file.name}"
            path = self._store.local_path(key)
            if path is None:
                path = scratch / "parents" / file.name
                if not path.exists():
                    self._store.download(key, path, file.sha256)
            tables.append(pq.read_table(path, columns=columns))
        return pa.concat_tables(tables)


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
