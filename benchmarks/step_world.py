"""What training steps are measured on: models of random weights, a committed dataset of random rows, and pictures.

The rows' numbers are random, their files are what the encode stage writes: the same schema, the same writer settings, a
manifest. Crops and pictures are drawn (`benchmarks.photographs`), so that what is encoded while training is decoded as
photographs are.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from safetensors.torch import save as save_safetensors
from safetensors.torch import save_file

from benchmarks.photographs import photograph
from infra.storage import ObjectStore, open_store, sha256_of_file
from model.specs import SD2_SCALING_FACTOR, LatentSpec, MaskSpec, TextSpec
from model.unet import build_unet
from preprocessing.contracts.config import ModelConfig
from preprocessing.contracts.digests import uid_of, weights_sha256
from preprocessing.contracts.manifest import MANIFEST_NAME, DatasetFile, Manifest, ShardReport, dataset_prefix
from preprocessing.contracts.schemas import TENSOR_WRITER, training_rows
from training.config import TrainConfig
from training.runspec import RunSpec

NUM_PICTURES = 16
_ROWS_PER_SHARD = 512


def make_model(
    folder: Path, *, unet: Mapping[str, Any], vae: Mapping[str, Any], text: Mapping[str, Any], device: str = "cpu"
) -> ModelConfig:
    """A model folder with random weights; ``text`` is a transformers text tower's config, which only a peer reads."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    with torch.device(device):
        parts = {
            "unet": build_unet(unet),
            "vae": AutoencoderKL(**vae),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
        }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    (folder / "open_clip").mkdir()  # is hashed, and not read: the rows hold text embeddings
    (folder / "open_clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))
    save_file({"random": torch.rand(8)}, folder / "open_clip" / "open_clip_model.safetensors")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "v_prediction"}))
    (folder / "LICENSE").write_text("Random numbers.\n")
    return ModelConfig(base=str(folder), base_prediction_type="v_prediction")


def make_pictures(folder: Path, side_px: int, num_pictures: int) -> list[bytes]:
    """Pictures as files, JPEG; returns the crops of the first ones, as the encode stage keeps them: PNG."""
    folder.mkdir(parents=True)
    crops = []
    drawn = [Image.fromarray(photograph(index, side_px)) for index in range(min(num_pictures, NUM_PICTURES))]
    for index in range(num_pictures):
        drawn[index % len(drawn)].save(folder / f"{index:05d}.jpg", quality=90)
    for picture in drawn:
        crop = io.BytesIO()
        picture.save(crop, "PNG")
        crops.append(crop.getvalue())
    return crops


def make_run(
    folder: Path,
    model: ModelConfig,
    *,
    side_px: int,
    text_width: int,
    num_rows: int,
    crops: Sequence[bytes],
    **train: Any,
) -> RunSpec:
    """A dataset in a store of its own below ``folder``, and a training on it."""
    store = open_store(str(folder / "store"))
    specs = (
        LatentSpec(
            resolution_px=side_px,
            scaling_factor=SD2_SCALING_FACTOR,
            weights_sha256=weights_sha256(model.directory / "vae"),
        ),
        TextSpec(width=text_width, weights_sha256=weights_sha256(model.directory / "open_clip")),
        MaskSpec(family="lama_train_256", resolution_px=side_px, num_variants=1, seed=0),
    )
    prefix = _write_dataset(store, folder, specs, num_rows, crops)
    fields: dict[str, Any] = {
        "prediction_type": "v_prediction",
        "mask_source": "cached",
        "seed": 0,
        "num_steps": 10**6,
        "checkpoint_every_steps": 10**6,
        "trackers": (),
    }
    config = TrainConfig(**(fields | train))
    return RunSpec(run_id="bench", store_uri=store.uri, dataset_prefix=prefix, model=model, train=config)


def _write_dataset(
    store: ObjectStore,
    scratch: Path,
    specs: tuple[LatentSpec, TextSpec, MaskSpec],
    num_rows: int,
    crops: Sequence[bytes],
) -> str:
    rng = np.random.default_rng(0)
    latents, text, masks = specs
    digest = hashlib.sha256(f"bench {latents} {text} {masks} {num_rows}".encode()).hexdigest()
    prefix = dataset_prefix("encode", digest)

    def upload(name: str, **entry: Any) -> DatasetFile:
        sha256 = sha256_of_file(scratch / name)
        uploaded = store.upload(f"{prefix}/{name}", scratch / name, sha256)
        (scratch / name).unlink()
        return DatasetFile(name=name, num_bytes=uploaded.num_bytes, sha256=sha256, **entry)

    shards = []
    for index, start in enumerate(range(0, num_rows, _ROWS_PER_SHARD)):
        rows = min(_ROWS_PER_SHARD, num_rows - start)
        name = f"train-{index:05d}.parquet"
        pq.write_table(_rows(rng, start, rows, specs, crops), scratch / name, **TENSOR_WRITER)
        file = upload(name, num_rows=rows, split="train")
        shards.append(ShardReport(index=index, num_in=rows, num_out=rows, dropped={}, files=(file,)))
    constants = {
        "null_text_embedding": torch.randn(text.embeddings_shape).half(),
        "full_mask_moments": torch.randn(latents.moments_shape).half(),
    }
    (scratch / "constants.safetensors").write_bytes(save_safetensors(constants))
    manifest = Manifest(
        stage="encode",
        stage_version=1,
        digest=digest,
        parents={},
        config={},
        shards=tuple(shards),
        extra_files=(upload("constants.safetensors", kind="extra"),),
        specs={"latents": latents.to_json(), "text": text.to_json(), "masks": masks.to_json()},
        created_at="2026-01-01T00:00:00+00:00",
        code_version="0",
    )
    store.put_if_absent(f"{prefix}/{MANIFEST_NAME}", manifest.model_dump_json(indent=1).encode())
    return prefix


def _rows(
    rng: np.random.Generator,
    start: int,
    num_rows: int,
    specs: tuple[LatentSpec, TextSpec, MaskSpec],
    crops: Sequence[bytes],
) -> pa.Table:
    latents, text, masks = specs
    schema = training_rows(
        latents.moments_num_bytes, text.embeddings_num_bytes, latents.mask_num_bytes, masks.num_variants
    )

    def moments() -> list[bytes]:
        values = rng.standard_normal((num_rows, *latents.moments_shape), dtype=np.float32)
        values[:, latents.channels :] -= 8  # logvar: a posterior of little noise, as the VAE's is
        return [row.tobytes() for row in values.astype("<f2")]

    texts = rng.standard_normal((num_rows, *text.embeddings_shape), dtype=np.float32).astype("<f2")
    bits = rng.integers(0, 256, (num_rows, latents.mask_num_bytes), dtype=np.uint8)
    names = [f"{start + i:08d}" for i in range(num_rows)]
    columns: dict[str, Any] = {
        "uid": [uid_of(f"http://127.0.0.1/{name}.jpg", name) for name in names],
        "url": [f"http://127.0.0.1/{name}.jpg" for name in names],
        "caption": names,
        "sha256": ["0" * 64] * num_rows,
        "image": [crops[(start + i) % len(crops)] for i in range(num_rows)],
        "moments": moments(),
        "text_embeddings": [row.tobytes() for row in texts],
        "mask_0": [row.tobytes() for row in bits],
        "masked_moments_0": moments(),
    }
    for field in schema:
        columns.setdefault(field.name, [1] * num_rows)
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in schema}, schema=schema)
