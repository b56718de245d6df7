"""A small encoded dataset of real demo pictures, a checkpoint of random weights, and the spec that validates it."""

import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

from infra.bundles import commit_bundle
from infra.storage import ObjectStore, sha256_of_file
from model.crop import central_square
from model.specs import ScheduleSpec
from model.tiny.world import draw, scene_at
from preprocessing.contracts.config import ModelConfig
from preprocessing.contracts.digests import uid_of
from preprocessing.contracts.manifest import MANIFEST_NAME, DatasetFile, Manifest, ShardReport, Split, dataset_prefix
from training.config import ValidationConfig
from training.runspec import checkpoint_prefix
from training.runspec_validation import ValidationSpec

SIDE = 32
RUN_ID = "test-0123456789ab"


def demo_rows(num_rows: int) -> list[dict[str, Any]]:
    """Pictures of the demo world under their own URLs and captions."""
    rows = []
    for index in range(num_rows):
        scene = scene_at(5, index)
        buffer = io.BytesIO()
        Image.fromarray(central_square(draw(scene), SIDE)[0]).save(buffer, "PNG")
        url = f"http://127.0.0.1:1/5/{index:06d}.jpg"
        rows.append(
            {"uid": uid_of(url, scene.caption), "url": url, "caption": scene.caption, "image": buffer.getvalue()}
        )
    return rows


def write_dataset(store: ObjectStore, scratch: Path, rows: Sequence[dict[str, Any]], *, num_train: int = 3) -> str:
    """Commits rows as an encoded dataset: the first few as training rows, which nothing may look at."""
    scratch.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(repr([(row["uid"], row["caption"]) for row in rows]).encode()).hexdigest()
    prefix = dataset_prefix("encode", digest)
    files = []
    parts: list[tuple[Split, Sequence[dict[str, Any]]]] = [
        ("train", rows[:num_train]),
        ("validation", rows[num_train:]),
    ]
    for split, part in parts:
        path = scratch / f"{split}-00000.parquet"
        pq.write_table(pa.Table.from_pylist(list(part)), path)
        entry = store.upload(f"{prefix}/{path.name}", path)
        files.append(
            DatasetFile(
                name=path.name, num_bytes=entry.num_bytes, sha256=sha256_of_file(path), num_rows=len(part), split=split
            )
        )
    shard = ShardReport(index=0, num_in=len(rows), num_out=len(rows), dropped={}, files=tuple(files))
    manifest = Manifest(
        stage="encode",
        stage_version=1,
        digest=digest,
        parents={},
        config={"resolution_px": SIDE},
        shards=(shard,),
        specs={"latents": {"resolution_px": SIDE}},
        created_at="2026-01-01T00:00:00+00:00",
        code_version="0",
    )
    store.put_if_absent(f"{prefix}/{MANIFEST_NAME}", manifest.model_dump_json(indent=1).encode())
    return prefix


def write_checkpoint(store: ObjectStore, scratch: Path, model_dir: Path, step: int, seed: int = 4) -> str:
    """Commits random weights, of the model's UNet with nine channels, as a checkpoint's EMA."""
    from model.unet import build_unet

    torch.manual_seed(seed)
    shutil.rmtree(scratch, ignore_errors=True)
    config = json.loads((model_dir / "unet" / "config.json").read_text())
    build_unet(config | {"in_channels": 9}).save_pretrained(scratch / "ema")
    prefix = checkpoint_prefix(RUN_ID, step)
    commit_bundle(store, prefix, scratch, kind="checkpoint", run_id=RUN_ID, step=step)
    return prefix


def with_judge(model_dir: Path, to: Path) -> ModelConfig:
    """The model's folder with a judge of random weights beside it."""
    from model.tiny.judge import WEIGHTS_NAME, _Network

    shutil.copytree(model_dir, to)
    (to / "judge").mkdir()
    torch.manual_seed(6)
    save_file(_Network().state_dict(), to / "judge" / WEIGHTS_NAME)
    return ModelConfig(base=str(to), base_prediction_type="v_prediction")


def make_spec(store: ObjectStore, dataset: str, checkpoint: str, model: ModelConfig, **config: Any) -> ValidationSpec:
    """A spec of a validation that takes seconds."""
    fields: dict[str, Any] = {
        "mask_families": ("lama_medium_256", "lama_thick_256"),
        "num_samples": 3,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "batch_size": 2,
        "num_grid_rows": 2,
    }
    return ValidationSpec(
        store_uri=store.uri,
        run_id=RUN_ID,
        step=int(checkpoint[-8:]),
        checkpoint_prefix=checkpoint,
        dataset_prefix=dataset,
        model=model,
        prediction_type="v_prediction",
        schedule=ScheduleSpec(),
        config=ValidationConfig(**(fields | config)),
    )
