"""A small random model folder, and encoded datasets in the contracts' schema: synthetic rows, but real files."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from jaxtyping import install_import_hook
from safetensors.torch import save as save_safetensors
from safetensors.torch import save_file

from infra.storage import ObjectStore, open_store, sha256_of_file
from model.specs import LatentSpec, MaskSpec, TextSpec
from preprocessing.contracts.config import ModelConfig
from preprocessing.contracts.digests import uid_of, weights_sha256
from preprocessing.contracts.manifest import MANIFEST_NAME, DatasetFile, Manifest, ShardReport, Split, dataset_prefix
from preprocessing.contracts.schemas import TENSOR_WRITER, training_rows
from training.config import TrainConfig
from training.runspec import RunSpec, run_digest, run_id_of

# Before its first import: the shapes of every signature are checked on every call.
install_import_hook(["training.step", "training.loss_tally"], "beartype.beartype")

WIDTH = 16
RESOLUTION_PX = 32
NUM_MASK_VARIANTS = 3

TINY_CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": 3},
}
TINY_UNET: dict[str, Any] = {
    "attention_head_dim": [2, 2],
    "block_out_channels": [16, 32],
    "cross_attention_dim": WIDTH,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 4,
    "sample_size": RESOLUTION_PX // 8,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "use_linear_projection": True,
}
TINY_VAE: dict[str, Any] = {
    "block_out_channels": [8, 8, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": RESOLUTION_PX,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random UNet (4 channels), VAE and OpenCLIP model in the layout that `ModelConfig` wants."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from open_clip.model import CLIP

    from model.unet import build_unet

    folder = tmp_path_factory.mktemp("tiny-model")
    torch.manual_seed(11)
    build_unet(TINY_UNET).save_pretrained(folder / "unet")
    AutoencoderKL(**TINY_VAE).save_pretrained(folder / "vae")
    clip = CLIP(**TINY_CLIP)
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            if "embedding" in name:
                parameter.normal_(std=0.5)
    (folder / "open_clip").mkdir()
    (folder / "open_clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_CLIP}))
    save_file(clip.state_dict(), folder / "open_clip" / "open_clip_model.safetensors")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "v_prediction"}))
    (folder / "LICENSE").write_text("A licence.\n")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_model_dir: Path) -> ModelConfig:
    return ModelConfig(base=str(tiny_model_dir), base_prediction_type="v_prediction")


MakeDataset = Callable[..., str]


@pytest.fixture(scope="session")
def make_dataset(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeDataset:
    """A function (store, num_rows of each shard, overrides of specs) → prefix of an encoded dataset."""
    hashes = {name: weights_sha256(tiny_model_dir / name) for name in ("vae", "open_clip")}

    def make(
        store: ObjectStore,
        num_rows: Sequence[int] = (20, 17),
        *,
        seed: int = 0,
        latents: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        poison: float | None = None,
    ) -> str:
        specs = (
            LatentSpec(
                **{
                    "resolution_px": RESOLUTION_PX,
                    "scaling_factor": 0.18215,
                    "weights_sha256": hashes["vae"],
                    **(latents or {}),
                }
            ),
            TextSpec(**{"width": WIDTH, "weights_sha256": hashes["open_clip"], **(text or {})}),
            MaskSpec(family="lama_train_256", resolution_px=RESOLUTION_PX, num_variants=NUM_MASK_VARIANTS, seed=seed),
        )
        return _write_dataset(
            store, tmp_path_factory.mktemp("dataset"), num_rows, seed=seed, specs=specs, poison=poison
        )

    return make


def _write_dataset(
    store: ObjectStore,
    scratch: Path,
    num_rows: Sequence[int],
    *,
    seed: int,
    specs: tuple[LatentSpec, TextSpec, MaskSpec],
    poison: float | None,
) -> str:
    rng = np.random.default_rng(seed)
    latents, text, masks = specs
    named_specs = {"latents": latents.to_json(), "text": text.to_json(), "masks": masks.to_json()}
    digest = hashlib.sha256(json.dumps([seed, list(num_rows), named_specs, poison]).encode()).hexdigest()
    prefix = dataset_prefix("encode", digest)

    def upload(name: str, **entry: Any) -> DatasetFile:
        sha256 = sha256_of_file(scratch / name)
        uploaded = store.upload(f"{prefix}/{name}", scratch / name, sha256)
        return DatasetFile(name=name, num_bytes=uploaded.num_bytes, sha256=sha256, **entry)

    shards = []
    for index, rows in enumerate(num_rows):
        files = []
        parts: list[tuple[Split, int]] = [("train", rows), ("validation", 2)]
        for split, count in parts:
            table = _random_rows(rng, count, f"{split}-{seed}-{index}", specs, poison)
            name = f"{split}-{index:05d}.parquet"
            pq.write_table(table, scratch / name, **TENSOR_WRITER)
            files.append(upload(name, num_rows=count, split=split))
        shards.append(ShardReport(index=index, num_in=rows + 2, num_out=rows + 2, dropped={}, files=tuple(files)))
    constants = {
        "null_text_embedding": torch.from_numpy(rng.standard_normal(text.embeddings_shape).astype(np.float16)),
        "full_mask_moments": torch.from_numpy(rng.standard_normal(latents.moments_shape).astype(np.float16)),
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
        specs=named_specs,
        created_at="2026-01-01T00:00:00+00:00",
        code_version="0",
    )
    store.put_if_absent(f"{prefix}/{MANIFEST_NAME}", manifest.model_dump_json(indent=1).encode())
    return prefix


def _random_rows(
    rng: np.random.Generator,
    num_rows: int,
    name: str,
    specs: tuple[LatentSpec, TextSpec, MaskSpec],
    poison: float | None,
) -> pa.Table:
    latents, text, masks = specs
    schema = training_rows(
        latents.moments_num_bytes, text.embeddings_num_bytes, latents.mask_num_bytes, masks.num_variants
    )
    # Each picture is one pattern times a number, so that there is something to learn.
    pattern = np.random.default_rng(99).standard_normal(latents.moments_shape) * 8

    def moments() -> list[bytes]:
        values = rng.choice([-1.0, 1.0], size=(num_rows, 1, 1, 1)) * pattern
        values[:, latents.channels :] = -8 + rng.standard_normal(values[:, latents.channels :].shape)
        if poison is not None and num_rows:
            values[0, 0, 0, 0] = poison
        return [row.tobytes() for row in values.astype("<f2")]

    columns: dict[str, Any] = {
        "uid": [uid_of(f"http://127.0.0.1/{name}/{i}.jpg", name) for i in range(num_rows)],
        "url": [f"http://127.0.0.1/{name}/{i}.jpg" for i in range(num_rows)],
        "caption": [f"{name} number {i}" for i in range(num_rows)],
        "sha256": ["0" * 64] * num_rows,
        "image": [b"\x89PNG"] * num_rows,
        "moments": moments(),
        "text_embeddings": [
            row.tobytes() for row in rng.standard_normal((num_rows, *text.embeddings_shape)).astype("<f2")
        ],
    }
    for k in range(masks.num_variants):
        bits = rng.integers(0, 2, size=(num_rows, latents.latent_px**2), dtype=np.uint8)
        columns[f"mask_{k}"] = [row.tobytes() for row in np.packbits(bits, axis=1)]
        columns[f"masked_moments_{k}"] = moments()
    for field in schema:
        columns.setdefault(field.name, [1] * num_rows)
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in schema}, schema=schema)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "store"))


MakeRun = Callable[..., RunSpec]


@pytest.fixture
def make_run(store: ObjectStore, tiny_model: ModelConfig, make_dataset: MakeDataset) -> MakeRun:
    """A function (name, overrides of TrainConfig) → RunSpec on a small dataset in `store`."""

    def make(
        name: str = "test", *, prefix: str | None = None, model: ModelConfig | None = None, **train: Any
    ) -> RunSpec:
        prefix = prefix or make_dataset(store)
        fields: dict[str, Any] = {
            "prediction_type": "v_prediction",
            "mask_source": "cached",
            "seed": 3,
            "num_steps": 6,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "ema_decay": 0.9,
            "checkpoint_every_steps": 3,
        }
        config = TrainConfig(**(fields | train))
        model = model or tiny_model
        manifest = Manifest.model_validate_json(store.read(f"{prefix}/{MANIFEST_NAME}"))
        digest = run_digest(config, model, manifest.digest)
        return RunSpec(
            run_id=run_id_of(name, digest), store_uri=store.uri, dataset_prefix=prefix, model=model, train=config
        )

    return make
