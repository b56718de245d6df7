"""What each choice of what to store costs: bytes a sample on disk, and the time of a training step beside fully cached.

Bytes are those of the committed Parquet files, by their size, divided by the rows in them. Steps are whole training
steps (read, complete by the frozen encoders, forward, backward, AdamW) of the tiny models at 64 px on this machine, the
choices taking turns; the ratio is the throughput beside the choice ``all`` in the same run. ``same`` says whether the
conditioning of every sample (mask, masked moments, moments, text embeddings, as the UNet's input is made of them) has
the same bits as where everything of the same crop was cached.

``--full-size`` adds the bytes at 512 px with Stable Diffusion 2's shapes (moments 8 × 64 × 64, text 77 × 1024), encoded
and committed like any dataset; the weights are small random ones of these shapes, since bytes do not depend on them,
and the pictures are made (see photographs.py). The time of its steps is told from counted FLOPs of the real shapes, not
measured.

    python benchmarks/conditioning.py [--quick] [--full-size] [--json]
"""

import argparse
import hashlib
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from infra.storage import ObjectStore, open_store
from model.schedule import alphas_cumprod_of
from model.specs import SD2_UNET_CONFIG, SD2_VAE_CONFIG
from model.tiny.world import draw as draw_scene
from model.tiny.world import scene_at
from model.unet import build_unet, load_unet, widen_conv_in
from preprocessing.contracts.config import EncodeConfig, ModelConfig
from preprocessing.contracts.digests import uid_of
from preprocessing.contracts.manifest import Manifest, dataset_prefix
from preprocessing.contracts.schemas import DOWNLOADED
from preprocessing.encode.stage import EncodeStage
from preprocessing.stage import RowsFile, ShardOutput, rejects_table, run_stage
from training.batch import Batch
from training.conditioning import fields_of
from training.config import TrainConfig
from training.data import TrainingDataset, open_dataset
from training.online import OnlineConditioner, load_conditioner
from training.step import Draws, draw, training_loss, with_full_masks, with_text_dropout

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

# No installed package: the path leads to it, and only where this is a script.
from benchmarks.photographs import photograph  # noqa: E402

KIB: Final = 1024
SEED: Final = 1
BATCH_SIZE: Final = 16
TEXT_DROPOUT, FULL_MASK = 0.1, 0.25


@dataclass(frozen=True)
class Choice:
    """What is stored, and where training then takes the conditioning from."""

    name: str
    encode: dict[str, Any]
    masks: str = "cached"
    text: str = "embeddings"

    @property
    def train(self) -> TrainConfig:
        """A training that fits."""
        return TrainConfig.model_validate(
            {
                "prediction_type": "v_prediction",
                "mask_source": self.masks,
                "text_source": self.text,
                "moments_source": "cached" if self.encode.get("moments", True) else "online",
                "seed": SEED,
                "num_steps": 1,
                "text_dropout": TEXT_DROPOUT,
                "full_mask": FULL_MASK,
            }
        )


NOTHING_CACHED: Final = {"num_mask_variants": 0, "text": "token_ids", "moments": False}
CHOICES: Final = (
    Choice("all", {"image": "png"}),
    Choice("all, no picture", {"image": "none"}),
    Choice("token ids, no picture", {"image": "none", "text": "token_ids"}, text="token_ids"),
    Choice("masks online", {"image": "png", "num_mask_variants": 0}, masks="online"),
    Choice("masks online, jpeg 90", {"image": "jpeg", "num_mask_variants": 0}, masks="online"),
    Choice(
        "masks online, token ids, jpeg 90",
        {"image": "jpeg", "num_mask_variants": 0, "text": "token_ids"},
        masks="online",
        text="token_ids",
    ),
    Choice("lean, png", {"image": "png", **NOTHING_CACHED}, masks="online", text="token_ids"),
    Choice("lean, jpeg 90", {"image": "jpeg", **NOTHING_CACHED}, masks="online", text="token_ids"),
    Choice("lean, jpeg 85", {"image": "jpeg", "image_quality": 85, **NOTHING_CACHED}, masks="online", text="token_ids"),
)


# ------------------------------------------------------------------------------------------------------------- datasets


class Downloaded:
    """A download dataset, put into the store without a network."""

    name, version, digest, parents, config = "download", 1, "d" * 64, {"select": "s" * 64}, {}
    num_shards = 1

    def __init__(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> None:
        rows = []
        for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            buffer, url = io.BytesIO(), f"https://pictures.example/some/folder/{index:08d}.jpg"
            picture.save(buffer, "JPEG", quality=95)
            rows.append(
                {
                    **dict.fromkeys(DOWNLOADED.names, 1),
                    **dict.fromkeys(("expected_md5", "expected_sha256", "source")),
                    "uid": uid_of(url, caption),
                    "url": url,
                    "caption": caption,
                    "split": "train",
                    "image": buffer.getvalue(),
                    "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
                }
            )
        self._rows = pa.Table.from_pylist(rows, schema=DOWNLOADED)

    def specs(self) -> dict[str, dict[str, Any]]:
        """None: it holds no tensors."""
        return {}

    def write_extra_files(self, folder: Path) -> Sequence[Path]:
        """None."""
        return []

    def outputs(self, indices: Sequence[int], scratch: Path) -> Iterator[ShardOutput]:
        """The one shard."""
        for index in indices:
            files = (RowsFile("shard-00000.parquet", self._rows),)
            yield ShardOutput(index, self._rows.num_rows, files, rejects_table([], [], [], []))


@dataclass(frozen=True)
class Size:
    """KiB a sample of a dataset's training files: in all, and of the columns that weigh."""

    total: float
    columns: dict[str, float]


class Encodings:
    """Datasets of the same pictures, each encoded when it is first asked for."""

    def __init__(
        self, store: ObjectStore, pictures: Sequence[Image.Image], captions: Sequence[str], base: str, **encode: Any
    ) -> None:
        self.store, self._encode = store, encode
        self.model = ModelConfig(base=base, base_prediction_type="v_prediction")
        self._downloaded = run_stage(store, Downloaded(pictures, captions))

    def manifest_of(self, encode: dict[str, Any]) -> Manifest:
        """The dataset of a choice."""
        config = EncodeConfig.model_validate(self._encode | encode)
        return run_stage(self.store, EncodeStage(self.store, self._downloaded, config, self.model))

    def size_of(self, encode: dict[str, Any]) -> Size:
        """What it takes."""
        manifest = self.manifest_of(encode)
        files = manifest.files("rows", split="train")
        num_rows = sum(file.num_rows for file in files)
        columns: dict[str, float] = {}
        for file in files:
            path = self.store.local_path(f"{dataset_prefix('encode', manifest.digest)}/{file.name}")
            metadata = pq.ParquetFile(path).metadata
            for group in range(metadata.num_row_groups):
                for place in range(metadata.num_columns):
                    chunk = metadata.row_group(group).column(place)
                    name = _weighty(chunk.path_in_schema)
                    columns[name] = columns.get(name, 0) + chunk.total_compressed_size / num_rows / KIB
        return Size(sum(file.num_bytes for file in files) / num_rows / KIB, columns)


def _weighty(column: str) -> str:
    if column.startswith(("mask_", "masked_moments_")):
        return "masks"
    return column if column in ("image", "moments", "text_embeddings", "token_ids") else "other"


# ---------------------------------------------------------------------------------------------------------------- steps


class Training:
    """Steps of one choice, on the UNet that all share."""

    def __init__(self, choice: Choice, encodings: Encodings, scratch: Path, unet: Any) -> None:
        manifest, train = encodings.manifest_of(choice.encode), choice.train
        prefix = dataset_prefix("encode", manifest.digest)
        self.dataset: TrainingDataset = open_dataset(encodings.store, prefix, scratch, fields=fields_of(train))
        self.conditioner: OnlineConditioner | None = load_conditioner(
            train,
            self.dataset.specs,
            self.dataset.constants,
            directory=encodings.model.directory,
            device=torch.device("cpu"),
        )
        self._unet = unet
        self._optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-6)
        self._alphas_cumprod = alphas_cumprod_of(train.schedule)

    def step(self, step: int) -> None:
        """One step."""
        batch, draws = self._batch(step, BATCH_SIZE)
        result = training_loss(
            self._unet,
            batch,
            draws,
            self.dataset.constants,
            prediction_type="v_prediction",
            scaling_factor=self.dataset.specs.latents.scaling_factor,
            alphas_cumprod=self._alphas_cumprod,
            device=torch.device("cpu"),
        )
        self._optimizer.zero_grad()
        result.loss.backward()
        self._optimizer.step()

    def conditioning(self) -> dict[str, str]:
        """For each uid the sha256 of what the UNet's input is made of, for every sample at its first visit."""
        batch, draws = self._batch(0, len(self.dataset))
        constants = self.dataset.constants
        assert batch.mask is not None
        assert batch.masked_moments is not None
        assert batch.moments is not None
        assert batch.text_embeddings is not None
        mask, masked_moments = with_full_masks(
            batch.mask, batch.masked_moments, draws.is_full_mask, constants.full_mask_moments
        )
        text = with_text_dropout(batch.text_embeddings, draws.drops_text, constants.null_text_embedding)
        parts = (mask, masked_moments, batch.moments, text)
        return {
            uid: hashlib.sha256(b"".join(part[row].contiguous().numpy().tobytes() for part in parts)).hexdigest()
            for row, uid in enumerate(batch.uids)
        }

    def _batch(self, step: int, size: int) -> tuple[Batch, Draws]:
        batch = self.dataset.batch_at(step, seed=SEED, global_batch_size=size)
        latents = self.dataset.specs.latents
        draws = draw(
            batch.uids,
            seed=SEED,
            step=step,
            latent_shape=(latents.channels, latents.latent_px, latents.latent_px),
            num_timesteps=len(self._alphas_cumprod),
            text_dropout=TEXT_DROPOUT,
            full_mask=FULL_MASK,
        )
        return (batch if self.conditioner is None else self.conditioner.complete(batch, draws)), draws


def measure_steps(trainings: dict[str, Training], num_rounds: int, num_steps: int) -> dict[str, float]:
    """Seconds a step of each, median over rounds in which they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    for index in range(num_rounds + 1):  # the first round warms up
        for name, training in trainings.items():
            started = time.perf_counter()
            for step in range(num_steps):
                training.step(index * num_steps + step)
            if index:
                seconds[name].append((time.perf_counter() - started) / num_steps)
    return {name: statistics.median(values) for name, values in seconds.items()}


def same_as_cached(choice: Choice, training: Training, encodings: Encodings, scratch: Path, unet: Any) -> bool:
    """Whether the choice conditions as a dataset does that holds everything of the same crop."""
    crop: dict[str, Any] = {name: value for name, value in choice.encode.items() if name.startswith("image")}
    crop = {"image": "png"} if crop["image"] == "none" else crop
    if choice.masks == "online":
        crop["num_mask_variants"] = 1  # the mask of the first visit
    reference = Training(Choice("", crop), encodings, scratch, unet)
    return training.conditioning() == reference.conditioning()


# ------------------------------------------------------------------------------------------------------------ full size


def full_size_model(folder: Path) -> None:
    """Random weights of Stable Diffusion 2's shapes outside, and small ones within."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    torch.manual_seed(SEED)
    vae = SD2_VAE_CONFIG | {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1}
    AutoencoderKL(**vae).save_pretrained(folder / "vae")
    clip: dict[str, Any] = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 2},
    }
    (folder / "open_clip").mkdir()
    (folder / "open_clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": clip}))
    save_file(CLIP(**clip).state_dict(), folder / "open_clip" / "open_clip_model.safetensors")
    unet = SD2_UNET_CONFIG | {"block_out_channels": [32] * 4, "attention_head_dim": 2, "layers_per_block": 1}
    build_unet(unet).save_pretrained(folder / "unet")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "v_prediction"}))
    (folder / "LICENSE").write_text("Random numbers.\n")


def count_flops() -> dict[str, float]:
    """TFLOP a sample at 512 px, counted on the real shapes: a training step of the UNet, and what is made online."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from open_clip.model import CLIP
    from torch.utils.flop_counter import FlopCounterMode

    def of(run: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        return counter.get_total_flops() / 1e12

    with torch.device("meta"):
        unet, vae = build_unet(SD2_UNET_CONFIG), AutoencoderKL(**SD2_VAE_CONFIG)
        latents, text = torch.empty(1, 9, 64, 64), torch.empty(1, 77, 1024)
        clip = CLIP(
            embed_dim=1024,
            vision_cfg={"image_size": 32, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16},  # pyright: ignore[reportArgumentType]  # a dict is taken
            text_cfg={"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 23},  # pyright: ignore[reportArgumentType]  # likewise
        )
        ids = torch.zeros(1, 77, dtype=torch.int64)
        return {
            "unet": 3 * of(lambda: unet(latents, torch.zeros(1), encoder_hidden_states=text)),
            "vae": of(lambda: vae.encode(torch.empty(1, 3, 512, 512))),
            "text": of(lambda: clip.encode_text(ids)),
        }


def step_by_flops(choice: Choice, flops: dict[str, float]) -> float:
    """A step's FLOPs beside those of the fully cached one: what is replaced by constants is not made."""
    extra = (1 - FULL_MASK) * flops["vae"] if choice.masks == "online" else 0
    extra += 0 if choice.encode.get("moments", True) else flops["vae"]
    extra += (1 - TEXT_DROPOUT) * flops["text"] if choice.text == "token_ids" else 0
    return 1 + extra / flops["unet"]


# ----------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Measures all choices and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows and steps: under a minute")
    parser.add_argument(
        "--full-size", action="store_true", help="also bytes at 512 px with Stable Diffusion 2's shapes"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run_tiny(Path(folder), num_rows=32 if args.quick else 256, num_steps=1 if args.quick else 4)
        if args.full_size:
            result["full_size"] = run_full_size(Path(folder), num_rows=8 if args.quick else 64)
    if args.json:
        print(json.dumps(result))


def run_tiny(folder: Path, num_rows: int, num_steps: int) -> dict[str, Any]:
    """The tiny models at 64 px: bytes, steps, equality."""
    scenes = [scene_at(3, index) for index in range(num_rows)]
    encodings = Encodings(
        open_store(str(folder / "tiny")),
        [draw_scene(scene) for scene in scenes],
        [scene.caption for scene in scenes],
        "tiny",
        resolution_px=64,
        mask_family="lama_train_256",
        num_mask_variants=3,
        batch_size=BATCH_SIZE,
    )
    unet = load_unet(encodings.model.directory / "unet")
    widen_conv_in(unet)
    unet.train()
    trainings = {choice.name: Training(choice, encodings, folder / "cache", unet) for choice in CHOICES}
    seconds = measure_steps(trainings, 5, num_steps)
    sizes = {choice.name: encodings.size_of(choice.encode) for choice in CHOICES}
    same = {
        choice.name: same_as_cached(choice, trainings[choice.name], encodings, folder / "cache", unet)
        for choice in CHOICES
    }
    ratios = {name: seconds["all"] / value for name, value in seconds.items()}
    print(f"tiny models, 64 px, K = 3, {num_rows} rows, batches of {BATCH_SIZE}, median of 5 rounds")
    print(f"  {'':34} {'KiB/sample':>10} {'ms/step':>8} {'ratio':>6}  same")
    for name in trainings:
        print(
            f"  {name:34} {sizes[name].total:10.2f} {1e3 * seconds[name]:8.1f} {ratios[name]:6.2f}  "
            f"{'yes' if same[name] else 'NO'}"
        )
    return {
        "name": "conditioning",
        "unit": "steps/s",
        "ours": {name: 1 / value for name, value in seconds.items()},
        "peers": {"cached": {"median": 1 / seconds["all"]}},
        "ratios": ratios,
        "kib_per_sample": {name: size.total for name, size in sizes.items()},
        "same_conditioning": same,
        "versions": {"torch": torch.__version__, "pyarrow": pa.__version__, "python": platform.python_version()},
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "threads": torch.get_num_threads()},
    }


def run_full_size(folder: Path, num_rows: int) -> dict[str, Any]:
    """Bytes at 512 px with Stable Diffusion 2's shapes; steps by their FLOPs."""
    full_size_model(folder / "model")
    captions = [
        f"{scene_at(3, index).caption}, a photograph taken on an afternoon in town" for index in range(num_rows)
    ]
    encodings = Encodings(
        open_store(str(folder / "full")),
        [Image.fromarray(photograph(index)) for index in range(num_rows)],
        captions,
        str(folder / "model"),
        resolution_px=512,
        num_mask_variants=4,
        batch_size=4,
    )
    flops = count_flops()
    print(
        f"\nStable Diffusion 2's shapes, 512 px, K = 4, {num_rows} pictures; steps by counted FLOPs (TFLOP a sample: "
        f"UNet forward and backward {flops['unet']:.2f}, VAE {flops['vae']:.2f}, text {flops['text']:.3f})"
    )
    names = ("image", "moments", "masks", "text_embeddings", "token_ids", "other")
    print(f"  {'':34} {'KiB/sample':>10} {'step':>6}   {' '.join(f'{name:>10.10}' for name in names)}")
    told: dict[str, Any] = {}
    for choice in CHOICES:
        size, step = encodings.size_of(choice.encode), step_by_flops(choice, flops)
        columns = " ".join(f"{size.columns.get(name, 0):10.2f}" for name in names)
        print(f"  {choice.name:34} {size.total:10.2f} {step:6.2f}   {columns}")
        told[choice.name] = {"kib_per_sample": size.total, "step_by_flops": step, "columns": size.columns}
    return told | {"flops": flops}


if __name__ == "__main__":
    main()
