"""Are the stored tensors what the models give? Some rows of an encoded dataset, encoded again and compared."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa

from infra.errors import ContractError
from infra.storage import ObjectStore
from model.specs import FULL_FAMILY, USER_FAMILY, MaskSpec
from preprocessing.contracts.config import EncodeConfig, ModelConfig
from preprocessing.contracts.digests import weights_sha256
from preprocessing.contracts.manifest import DatasetFile, Manifest, dataset_prefix
from preprocessing.stored_parquet import open_parquet

if TYPE_CHECKING:
    from model.mask_bank import MaskBank
    from preprocessing.encode.kernel import Encoders

_ROWS_AT_ONCE: Final = 256

TOLERANCES: Final[dict[str, float]] = {"fp32": 2e-3, "fp16": 2e-2, "bf16": 1e-1}
"""What other machines may differ by, relative to 1 + the largest value of a row's column; wrong rows differ by 1."""


@dataclass(frozen=True)
class Difference:
    """One value that is not what was stored.

    Attributes:
        uid: Of the row.
        file: Where it stands.
        column: Which.
        distance: How far it is off, relative to 1 + the largest value; infinite where it is a mask or tokens.
        is_within_tolerance: Whether another machine may differ so.
    """

    uid: str
    file: str
    column: str
    distance: float
    is_within_tolerance: bool


@dataclass(frozen=True)
class RowCheck:
    """What came of it.

    Attributes:
        num_rows: Rows that were looked at.
        columns: What was compared in each.
        not_compared: Columns that could not be, and why.
        differences: All that is not bit for bit what was stored.
    """

    num_rows: int
    columns: tuple[str, ...]
    not_compared: dict[str, str] = field(default_factory=dict)
    differences: tuple[Difference, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether every bit is the same."""
        return not self.differences

    @property
    def is_good(self) -> bool:
        """Whether no value is off by more than another machine would be."""
        return all(difference.is_within_tolerance for difference in self.differences)


def check_rows(
    store: ObjectStore,
    manifest: Manifest,
    model: ModelConfig,
    num_rows: int,
    seed: int = 0,
    mask_files: Sequence[str] = (),
) -> RowCheck:
    """Encodes some rows again, of their stored pictures and captions, and compares what comes out.

    Args:
        store: Where the dataset is.
        manifest: Of the encoded dataset.
        model: The base that it was encoded with.
        num_rows: How many rows, at most; drawn without regard to shards and splits.
        seed: Of the draw.
        mask_files: The user's masks, where the dataset has some; without them what depends on them is left out.

    Raises:
        ContractError: The model's weights are not those that the dataset was encoded with.
        ValueError: It is no encoded dataset.
    """
    encoders, not_compared = _load(manifest, model, mask_files)
    prefix = dataset_prefix(manifest.stage, manifest.digest)
    columns = tuple(encoders.config.tensor_columns(encoders.latent_spec, encoders.text_spec))
    tolerance = TOLERANCES[encoders.config.precision]
    differences: list[Difference] = []
    num_checked = 0
    for file, rows in _draw(manifest, num_rows, seed):
        table = _read(store, file.key(prefix), rows)
        num_checked += table.num_rows
        made = _encode_again(table, encoders)
        for name in columns:
            pairs = zip(table.column("uid").to_pylist(), table.column(name).to_pylist(), made[name], strict=True)
            for uid, stored, value in pairs:
                distance = _distance(np.frombuffer(stored, value.dtype), value.reshape(-1))
                if distance:
                    differences.append(Difference(uid, file.name, name, distance, distance <= tolerance))
    return RowCheck(num_checked, columns, not_compared, tuple(differences))


def _load(manifest: Manifest, model: ModelConfig, mask_files: Sequence[str]) -> tuple["Encoders", dict[str, str]]:
    """The models, told to make only what can be compared; and what cannot."""
    from preprocessing.encode.models import load_encoders

    if manifest.stage != "encode":
        raise ValueError(f"dataset: its stage is {manifest.stage!r}; only the rows of an encoded one can be made again")
    weights = {name: weights_sha256(model.directory / name) for name in ("vae", "open_clip")}
    for spec, part in (("latents", "vae"), ("text", "open_clip")):
        stored = manifest.specs[spec]["weights_sha256"]
        if stored != weights[part]:
            raise ContractError(
                f"{part} weights sha256: the dataset was encoded with {stored}, model.base {model.base!r} has "
                f"{weights[part]}; give the base that it was encoded with"
            )
    is_user = manifest.config["mask_family"] == USER_FAMILY
    # Not validated: the files, where there are any, are looked at below, and less is made than a dataset must have.
    config = EncodeConfig.model_construct(**{**EncodeConfig().model_dump(), **manifest.config})
    why = "the dataset keeps no pictures" if config.image == "none" else ""
    if is_user and not mask_files and config.num_mask_variants and not why:
        why = "the user's masks are needed: give encode.mask_files"
    not_compared = {}
    if why:
        masks = [name for k in range(config.num_mask_variants) for name in (f"mask_{k}", f"masked_moments_{k}")]
        without_pictures = ["moments"] if config.image == "none" and config.moments else []
        not_compared = dict.fromkeys([*without_pictures, *masks], why)
        config = config.model_copy(
            update={"num_mask_variants": 0, "mask_family": FULL_FAMILY, "moments": "moments" not in not_compared}
        )
    bank = _mask_bank(config, mask_files) if config.mask_family == USER_FAMILY else None
    encoders = load_encoders(model.directory, config, weights, bank)
    if not why and encoders.mask_spec != (masks := MaskSpec.from_json(manifest.specs["masks"])):
        raise ContractError(
            f"masks: the dataset's are {masks}, these would be {encoders.mask_spec}; give the same files"
        )
    for name, ours in (("latents", encoders.latent_spec), ("text", encoders.text_spec)):
        if type(ours).from_json(manifest.specs[name]) != ours:
            raise ContractError(f"{name}: the dataset says {manifest.specs[name]}, this version makes {ours.to_json()}")
    return encoders, not_compared


def _mask_bank(config: EncodeConfig, files: Sequence[str]) -> "MaskBank":
    from model.mask_bank import MaskBank
    from preprocessing.mask_files import read_mask_files

    read = read_mask_files(files)
    sha256 = [file.sha256 for file in read]
    return MaskBank([file.pixels for file in read], config.resolution_px, sha256, [file.name for file in read])


def _draw(manifest: Manifest, num_rows: int, seed: int) -> list[tuple[DatasetFile, np.ndarray]]:
    """Rows of the whole dataset, each as likely as any other: files, and ascending row numbers in them."""
    files = manifest.files("rows")
    starts = np.concatenate([[0], np.cumsum([file.num_rows for file in files], dtype=np.int64)])
    drawn = np.random.default_rng(seed).choice(starts[-1], min(num_rows, int(starts[-1])), replace=False)
    parts = [np.sort(drawn[(drawn >= start) & (drawn < stop)] - start) for start, stop in pairwise(starts)]
    return [(file, rows) for file, rows in zip(files, parts, strict=True) if len(rows)]


def _read(store: ObjectStore, key: str, rows: np.ndarray) -> pa.Table:
    """Some rows of a file, batch by batch: a shard of tensors need not fit into memory."""
    found, start = [], 0
    with open_parquet(store, key) as file:
        for batch in file.iter_batches(_ROWS_AT_ONCE):
            wanted = rows[(rows >= start) & (rows < start + batch.num_rows)] - start
            found.append(pa.Table.from_batches([batch]).take(pa.array(wanted)))
            start += batch.num_rows
    return pa.concat_tables(found)


def _encode_again(rows: pa.Table, encoders: "Encoders") -> dict[str, np.ndarray]:
    from model.crop import decode_crop
    from preprocessing.encode.crops import Crops
    from preprocessing.encode.kernel import prepare_crops, run_models

    side = encoders.latent_spec.resolution_px
    if encoders.config.image != "none":
        pictures = np.stack([decode_crop(data) for data in rows.column("image").to_pylist()])
    else:
        pictures = np.zeros((rows.num_rows, side, side, 3), np.uint8)  # nothing is made of them
    prepared = prepare_crops(Crops(rows, pictures, [], [], []), encoders)
    return prepared.columns | run_models(prepared, encoders, encoders.config.batch_size)


def _distance(stored: np.ndarray, made: np.ndarray) -> float:
    """0 where every bit is the same."""
    if stored.tobytes() == made.tobytes():
        return 0.0
    if stored.dtype != np.float16:
        return float("inf")
    difference = np.abs(stored.astype(np.float64) - made.astype(np.float64)).max()
    return max(float(difference / (1 + np.abs(made.astype(np.float64)).max())), np.finfo(np.float64).tiny)
