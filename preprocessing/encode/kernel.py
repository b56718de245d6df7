"""Downloaded rows in, training rows out: crop, moments, text, and K masks with the masked pictures' moments.

The VAE is not local: ``encode(image × (1 − mask))`` cannot be had from ``encode(image)``, so the masked pictures are
encoded here, K a row, and training needs no VAE. Nothing random that belongs to training is frozen in: posterior
draws, caption dropout, noise and the full mask are drawn at train time.

In two halves, for one can run ahead of the other: `prepare` decodes, cuts and draws; `encode` runs the models.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from model.specs import LatentSpec, MaskSpec, TextSpec
from preprocessing.contracts.config import EncodeConfig
from preprocessing.contracts.reasons import Reason
from preprocessing.contracts.schemas import SELECTED, training_rows
from preprocessing.encode.crops import Crops, Refused, crop_rows
from preprocessing.stage import rejects_table

if TYPE_CHECKING:  # torch costs seconds, which a run that finds everything done does not have to pay
    from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]  # diffusers exports lazily

    from model.encoders import TextEncoder
    from model.mask_bank import MaskBank


@dataclass(frozen=True)
class Encoders:
    """The frozen models of this stage, what they are to make, and what their outputs are.

    Attributes:
        vae: On its device, in its precision.
        text: Likewise.
        latent_spec: Of the moments.
        text_spec: Of the text.
        mask_spec: Of the masks.
        config: Which columns are made.
        mask_bank: The masks, where the user gives them.
    """

    vae: "AutoencoderKL"
    text: "TextEncoder"
    latent_spec: LatentSpec
    text_spec: TextSpec
    mask_spec: MaskSpec
    config: EncodeConfig
    mask_bank: "MaskBank | None" = None

    @property
    def schema(self) -> pa.Schema:
        """The schema of the rows that come out."""
        return training_rows(
            self.latent_spec.moments_num_bytes,
            self.text_spec.embeddings_num_bytes,
            self.latent_spec.mask_num_bytes,
            self.mask_spec.num_variants,
            has_image=self.config.image != "none",
            has_moments=self.config.moments,
            text_columns=self.config.text_columns,
            token_ids_num_bytes=self.text_spec.token_ids_num_bytes,
        )

    @property
    def num_lanes(self) -> int | None:
        """Micro-batches side by side on a CPU; None for torch's own number of threads."""
        return self.config.num_threads


@dataclass(frozen=True)
class Prepared:
    """Rows that the models have yet to see.

    Attributes:
        crops: Their pictures.
        masks: (variants · n, side, side) uint8, 1 = hole: all rows' first mask, then all rows' second one. Before
            these n of zeros, where the pictures themselves are encoded as well.
        columns: Values of the columns that need no model.
        token_ids: (n, 77) int64.
    """

    crops: Crops
    masks: np.ndarray
    columns: dict[str, np.ndarray]
    token_ids: np.ndarray


def encode_rows(rows: pa.Table, encoders: Encoders, batch_size: int) -> tuple[pa.Table, pa.Table]:
    """The kernel: downloaded rows in, training rows and refused rows out; no I/O.

    The stage calls its two halves instead, `prepare` and `encode`, to prepare a batch while the one before it is
    encoded. Here they take turns: the same rows come out, and every test of them can be one call.

    Args:
        rows: In the ``DOWNLOADED`` schema.
        encoders: The models.
        batch_size: Pictures in flight; it changes no byte of the result where the shape is fixed: see
            `model.fixed_shape`.

    Returns:
        Training rows (plus their ``split``), and rejects. A row that the encoders turn into NaN or infinity is refused.
    """
    kept = [with_split(encoders.schema).empty_table()]
    refused: Refused = []
    for start in range(0, rows.num_rows, batch_size):
        prepared = prepare(rows.slice(start, batch_size), encoders)
        table, more = encode(prepared, encoders, batch_size)
        kept.append(table)
        refused += more
    return pa.concat_tables(kept), rejects_of(refused)


def with_split(schema: pa.Schema) -> pa.Schema:
    """Training rows, before they are written into a file a split."""
    return schema.append(SELECTED.field("split"))


def rejects_of(refused: Refused) -> pa.Table:
    """Refused rows in the ``REJECTS`` schema."""
    uids, urls, reasons, details = map(list, zip(*refused, strict=True)) if refused else ([], [], [], [])
    return rejects_table(uids, urls, reasons, details)


def prepare(rows: pa.Table, encoders: Encoders) -> Prepared:
    """All that needs no model: decodes, cuts, draws masks, tokenizes. May run in several threads at once."""
    config = encoders.config
    return prepare_crops(
        crop_rows(rows, encoders.latent_spec.resolution_px, config.image, config.image_quality), encoders
    )


def prepare_crops(crops: Crops, encoders: Encoders) -> Prepared:
    """`prepare`, of pictures that are cut already."""
    from model.masks import draw_masks_of, pack_masks, to_latent_mask

    latent, config = encoders.latent_spec, encoders.config
    uids = crops.rows.column("uid").to_pylist()
    side = latent.resolution_px
    masks = [np.zeros((len(uids), side, side), np.uint8)] if config.moments else []
    columns: dict[str, np.ndarray] = {}
    token_ids = np.empty((0, encoders.text_spec.num_tokens), np.int64)
    if uids:
        for k in range(encoders.mask_spec.num_variants):
            drawn = draw_masks_of(encoders.mask_spec, uids, k, encoders.mask_bank)
            columns[f"mask_{k}"] = pack_masks(to_latent_mask(drawn, latent.factor))
            masks.append(drawn)
        token_ids = encoders.text.tokenize(crops.rows.column("caption").to_pylist()).numpy()
    if "token_ids" in config.text_columns:
        columns["token_ids"] = token_ids.astype("<u2")
    all_masks = np.concatenate(masks) if masks else np.empty((0, side, side), np.uint8)
    return Prepared(crops, all_masks, columns, token_ids)


def encode(prepared: Prepared, encoders: Encoders, batch_size: int) -> tuple[pa.Table, Refused]:
    """What the models make of prepared rows.

    Args:
        prepared: From `prepare`.
        encoders: The same as there.
        batch_size: Pictures at once.

    Returns:
        As `encode_rows`; the rows that could not be read are among the refused ones.
    """
    crops, schema = prepared.crops, with_split(encoders.schema)
    refused = list(crops.refused)
    if not len(crops.pictures):
        return schema.empty_table(), refused
    tensors = prepared.columns | run_models(prepared, encoders, batch_size)
    is_finite = np.ones(len(crops.pictures), dtype=bool)
    for values in tensors.values():
        if values.dtype == np.float16:
            is_finite &= np.isfinite(values).reshape(len(values), -1).all(axis=1)
    for index in np.flatnonzero(~is_finite):
        row = crops.rows.slice(int(index), 1).select(["uid", "url"]).to_pylist()[0]
        detail = "an encoder gave NaN, infinity, or more than float16 holds"
        refused.append((row["uid"], row["url"], Reason.NON_FINITE, detail))
    columns = {name: crops.rows.column(name) for name in schema.names if name in crops.rows.column_names}
    columns |= {"image": pa.array(crops.images, pa.binary())} if crops.images else {}
    columns |= {
        "crop_top": pa.array([box.top for box in crops.boxes], pa.int32()),
        "crop_left": pa.array([box.left for box in crops.boxes], pa.int32()),
        "resized_width": pa.array([box.resized_width for box in crops.boxes], pa.int32()),
        "resized_height": pa.array([box.resized_height for box in crops.boxes], pa.int32()),
    }
    columns |= {name: _fixed_size_binary(values) for name, values in tensors.items()}
    table = pa.table([columns[name] for name in schema.names], schema=schema)
    return table if is_finite.all() else table.filter(pa.array(is_finite)), refused


def run_models(prepared: Prepared, encoders: Encoders, batch_size: int) -> dict[str, np.ndarray]:
    """The columns that models make, as (n, …) fp16."""
    import torch

    from model.encoders import encode_stored_moments, encode_stored_text, images_to_pixels
    from model.fixed_shape import vae_micro_batch

    config, num_lanes = encoders.config, encoders.num_lanes
    if encoders.vae.device.type == "cpu":  # so many lanes that no more pictures are in memory at once
        per_lane = vae_micro_batch(encoders.latent_spec.resolution_px, encoders.vae.device)
        num_lanes = max(1, min(num_lanes or torch.get_num_threads(), batch_size // per_lane))
    made: dict[str, np.ndarray] = {}
    if "text_embeddings" in config.text_columns:
        ids = torch.from_numpy(prepared.token_ids)
        embedded = encode_stored_text(encoders.text, ids, batch_size=batch_size, num_lanes=num_lanes)
        made["text_embeddings"] = embedded.cpu().numpy()
    names = ["moments"] if config.moments else []
    names += [f"masked_moments_{k}" for k in range(encoders.mask_spec.num_variants)]
    if names:
        moments = encode_stored_moments(
            encoders.vae,
            images_to_pixels(prepared.crops.pictures),
            torch.from_numpy(prepared.masks),
            batch_size=batch_size,
            num_lanes=num_lanes,
        )
        made |= dict(zip(names, np.split(moments.cpu().numpy(), len(names)), strict=True))
    return made


def _fixed_size_binary(values: np.ndarray) -> pa.Array:
    """One value a row, as its little-endian bytes in C order."""
    rows = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("<"), copy=False)).reshape(len(values), -1)
    width = rows.dtype.itemsize * rows.shape[1]
    return pa.Array.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(rows)])
