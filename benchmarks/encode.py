"""What the encode stage costs beside the bare models: rows/s end to end against loops over tensors in memory.

Ours goes from a committed ``download`` dataset of JPEGs to a committed ``encode`` dataset: reads, decodes, crops, keeps
the crop as PNG, draws K masks a row, runs the VAE K + 1 times and the text tower once a row, looks for what is not
finite, packs, writes Parquet, hashes, commits, and in the end writes the constants and the manifest.

The peers run only the models, on pixels, masks and tokens that are ready in memory, with the same weights, the same
layout (channels_last), the same threads and no copying out of what comes: ``bare`` as one would write it, in the best
of several batch sizes (they are tried first) and with torch's own threads in each operation; ``bare_fixed`` in the
fixed shape that makes our bytes independent of batch, order and threads (`model.fixed_shape`). Ratio = ours / peer in
rows/s; against ``bare_fixed`` it is at best 1.

Without --full-size the tiny models of the demo, at 64 px. With it Stable Diffusion 2's VAE and ViT-H's text tower, of
random weights, at 512 px: on a CPU a few rows, K = 1. On a GPU also images/s of the VAE and captions/s of the text
tower alone, in --precision.

    python benchmarks/encode.py [--full-size] [--precision fp32|bf16|fp16] [--quick] [--json]
"""

import argparse
import hashlib
import io
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import nn

from model.base_configs import VIT_H_14
from model.crop import central_square
from model.encoders import (
    TextEncoder,
    encode_moments,
    encode_stored_moments,
    encode_stored_text,
    images_to_pixels,
    masked_pixels,
)
from model.masks import draw_masks_of
from model.specs import SD2_SCALING_FACTOR, SD2_VAE_CONFIG, LatentSpec, MaskSpec, TextSpec
from model.tiny.world import draw, scene_at
from preprocessing.contracts.config import EncodeConfig, ModelConfig
from preprocessing.contracts.digests import uid_of
from preprocessing.contracts.schemas import DOWNLOADED
from preprocessing.encode.kernel import Encoders
from preprocessing.encode.models import DTYPES
from preprocessing.encode.stage import EncodeStage
from preprocessing.stage import RowsFile, ShardOutput, rejects_table, run_stage

from infra.storage import open_store  # isort: skip

MODEL: Final = ModelConfig(base="tiny", base_prediction_type="v_prediction")


@dataclass(frozen=True)
class Case:
    """What is measured."""

    num_rows: int
    num_shards: int
    num_rounds: int
    config: EncodeConfig
    batches: tuple[int, ...]


def case_of(*, full_size: bool, quick: bool, precision: Literal["fp32", "bf16", "fp16"]) -> Case:
    """The sizes for this machine."""
    if not full_size:
        config = EncodeConfig(
            resolution_px=64, mask_family="lama_train_256", num_mask_variants=3, batch_size=64, precision=precision
        )
        return Case(256 if quick else 1024, 4, 5 if quick else 7, config, (16, 64))
    if torch.cuda.is_available():
        config = EncodeConfig(num_mask_variants=1, batch_size=32, precision=precision)
        return Case(512 if quick else 2048, 4, 3 if quick else 5, config, (16, 32, 64))
    config = EncodeConfig(num_mask_variants=1, batch_size=4, precision=precision)
    return Case(2 if quick else 4, 1 if quick else 2, 1 if quick else 3, config, (1, 2))


class Downloaded:
    """A download dataset, put into the store without a network."""

    name, version, digest, parents, config = "download", 1, "d" * 64, {"select": "s" * 64}, {}

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        self._tables = tables
        self.num_shards = len(tables)

    def specs(self) -> dict[str, dict[str, Any]]:
        """None: it holds no tensors."""
        return {}

    def write_extra_files(self, folder: Path) -> Sequence[Path]:
        """None."""
        return []

    def outputs(self, indices: Sequence[int], scratch: Path) -> Iterator[ShardOutput]:
        """The shards."""
        for index in indices:
            rows = RowsFile(f"shard-{index:05d}.parquet", self._tables[index])
            yield ShardOutput(index, rows.num_rows, (rows,), rejects_table([], [], [], []))


def downloaded_rows(num_rows: int, side_px: int) -> pa.Table:
    """Drawn pictures as `download` keeps them: JPEGs of quality 95, shorter side ``side_px`` or the world's own."""
    rows = []
    for index in range(num_rows):
        scene, buffer = scene_at(3, index), io.BytesIO()
        picture = draw(scene)
        scale = max(1.0, side_px / min(picture.size))
        size = (round(picture.width * scale), round(picture.height * scale))
        picture.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
        url = f"http://pictures.test/{index}"
        rows.append(
            dict.fromkeys(DOWNLOADED.names, 1)
            | {
                **dict.fromkeys(("expected_md5", "expected_sha256", "source")),
                "uid": uid_of(url, scene.caption),
                "url": url,
                "caption": scene.caption,
                "split": "train" if index % 50 else "validation",
                "image": buffer.getvalue(),
                "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
            }
        )
    return pa.Table.from_pylist(rows, schema=DOWNLOADED)


def full_size_encoders(config: EncodeConfig) -> Encoders:
    """Stable Diffusion 2's encoders with random weights: what they compute means nothing, and takes as long."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from open_clip.model import CLIP

    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), DTYPES[config.precision]
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(SD2_VAE_CONFIG)
    assert isinstance(vae, AutoencoderKL)
    nn.Module.to(vae.requires_grad_(False).eval(), device, dtype)  # diffusers' own `to` is typed wrongly
    smallest = {"image_size": 8, "patch_size": 8, "layers": 1, "width": 64, "head_width": 64}
    clip = CLIP(**{**VIT_H_14, "vision_cfg": smallest})
    clip.visual = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]  # deliberately nothing
    text = TextEncoder(clip, VIT_H_14, has_image_tower=False).to(device, dtype)
    return Encoders(
        vae,
        text,
        LatentSpec(
            resolution_px=config.resolution_px,
            scaling_factor=SD2_SCALING_FACTOR,
            precision=config.precision,
            weights_sha256="random",
        ),
        TextSpec(width=text.width, precision=config.precision, weights_sha256="random"),
        MaskSpec(
            family=config.mask_family,
            resolution_px=config.resolution_px,
            num_variants=config.num_mask_variants,
            seed=config.mask_seed,
        ),
        config,
    )


class Ours:
    """The stage, from one committed dataset to the next."""

    def __init__(self, case: Case, encoders: Encoders | None, folder: Path) -> None:
        per_shard = case.num_rows // case.num_shards
        rows = downloaded_rows(case.num_rows, case.config.resolution_px)
        self.rows = rows
        self._store = open_store(str(folder / "store"))
        self._folder = folder / "store"
        shards = [rows.slice(start, per_shard) for start in range(0, case.num_rows, per_shard)]
        self._downloaded = run_stage(self._store, Downloaded(shards))
        self._config = case.config
        self.encoders = encoders if encoders is not None else self._stage().encoders

    def _stage(self) -> EncodeStage:
        stage = EncodeStage(self._store, self._downloaded, self._config, MODEL)
        if hasattr(self, "encoders"):
            stage.__dict__["encoders"] = self.encoders  # loaded once: what is measured is encoding
        return stage

    def __call__(self) -> None:
        """Makes the dataset, and removes what an earlier round made."""
        manifest = run_stage(self._store, self._stage())
        assert manifest.num_out == len(self.rows), manifest.dropped

    def clear(self) -> None:
        """Removes the dataset."""
        shutil.rmtree(self._folder / "datasets" / "encode", ignore_errors=True)


class Bare:
    """The models only, on what is ready in memory."""

    def __init__(self, rows: pa.Table, encoders: Encoders, batch_size: int) -> None:
        side, spec = encoders.latent_spec.resolution_px, encoders.mask_spec
        crops = []
        for data in rows.column("image").to_pylist():
            with Image.open(io.BytesIO(data)) as picture:
                crops.append(central_square(picture, side)[0])
        device = encoders.vae.device
        self.pixels = images_to_pixels(np.stack(crops)).contiguous(memory_format=torch.channels_last).to(device)
        uids = rows.column("uid").to_pylist()
        drawn = [torch.from_numpy(draw_masks_of(spec, uids, k)).to(device) for k in range(spec.num_variants)]
        self.masks = drawn
        self.holes = [masks[:, None].float() for masks in drawn]
        self.token_ids = encoders.text.tokenize(rows.column("caption").to_pylist()).to(device)
        self._encoders = encoders
        self.batch_size = batch_size

    def __call__(self) -> None:
        """All rows, in batches, with torch's own threads."""
        vae, text = self._encoders.vae, self._encoders.text
        for start in range(0, len(self.pixels), self.batch_size):
            part = slice(start, start + self.batch_size)
            encode_moments(vae, self.pixels[part])
            for holes in self.holes:
                encode_moments(vae, masked_pixels(self.pixels[part], holes[part]))
            text.embed_text(self.token_ids[part])
        _wait()

    def fixed(self) -> None:
        """All rows in the fixed shape."""
        vae, text, size = self._encoders.vae, self._encoders.text, self._encoders.config.batch_size
        for start in range(0, len(self.pixels), size):
            part = slice(start, start + size)
            pixels = self.pixels[part]
            masks = torch.cat([torch.zeros_like(self.masks[0][part]), *(masks[part] for masks in self.masks)])
            encode_stored_moments(vae, pixels, masks, batch_size=size)
            encode_stored_text(text, self.token_ids[part], batch_size=size)
        _wait()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], None]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def on_gpu(encoders: Encoders, batch_size: int) -> dict[str, float]:
    """Images/s of the VAE's encoder and captions/s of the text tower, each alone."""
    side = encoders.latent_spec.resolution_px
    pixels = torch.rand(4 * batch_size, 3, side, side, device="cuda") * 2 - 1
    ids = encoders.text.tokenize(["a photograph of a cat"] * 1024).cuda()

    def images() -> None:
        encode_stored_moments(encoders.vae, pixels, batch_size=batch_size)
        _wait()

    def captions() -> None:
        encode_stored_text(encoders.text, ids, batch_size=4 * batch_size)
        _wait()

    for run in (images, captions):
        run()
    times = {run.__name__: statistics.median(seconds(run) for _ in range(7)) for run in (images, captions)}
    return {"vae_images_per_s": len(pixels) / times["images"], "captions_per_s": len(ids) / times["captions"]}


def measure(case: Case, encoders: Encoders | None) -> dict[str, Any]:
    """Rows/s of ours and of the peers, taking turns."""
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(case, encoders, Path(folder))
        tried = [Bare(ours.rows, ours.encoders, size) for size in case.batches]
        ours()  # each side once before it counts
        tried[0].fixed()
        warm = [seconds(bare) if case.num_rounds > 1 else index for index, bare in enumerate(tried)]
        best = tried[int(np.argmin([seconds(bare) for bare in tried] if case.num_rounds > 1 else warm))]
        runs: dict[str, Callable[[], None]] = {"ours": ours, "bare": best, "bare_fixed": best.fixed}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for index in range(case.num_rounds):
            order = list(runs)[index % len(runs) :] + list(runs)[: index % len(runs)]
            for name in order:
                ours.clear()
                times[name].append(seconds(runs[name]))
        found = {name: case.num_rows / statistics.median(values) for name, values in times.items()}
        ratios = {
            name: statistics.median(peer / own for own, peer in zip(times["ours"], times[name], strict=True))
            for name in ("bare", "bare_fixed")
        }
        alone = on_gpu(ours.encoders, case.config.batch_size) if torch.cuda.is_available() else {}
    return {"rates": found, "ratios": ratios, "bare_batch_size": best.batch_size, "alone": alone}


def main() -> None:
    """Measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--full-size", action="store_true", help="Stable Diffusion 2's models at 512 px, random weights"
    )
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32")
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    case = case_of(full_size=args.full_size, quick=args.quick, precision=args.precision)
    found = measure(case, full_size_encoders(case.config) if args.full_size else None)
    config, rates, ratios = case.config, found["rates"], found["ratios"]
    print(
        f"rows/s: {case.num_rows} rows of {config.resolution_px} px in {case.num_shards} shards, "
        f"K = {config.num_mask_variants}, {config.precision}, median of {case.num_rounds}"
    )
    print(f"  ours        JPEG to committed Parquet              {rates['ours']:10.2f}")
    print(f"  bare        models only, batch {found['bare_batch_size']:<3}                 {rates['bare']:10.2f}")
    print(f"  bare_fixed  models only, in the fixed shape        {rates['bare_fixed']:10.2f}")
    print(f"  ratio to bare {ratios['bare']:.2f}, to bare_fixed {ratios['bare_fixed']:.2f}")
    for name, value in found["alone"].items():
        print(f"  {name:<20} {value:10.1f}")
    if args.json:
        result = {
            "name": "encode",
            "unit": "rows/s",
            "ours": {"median": rates["ours"], "full_size": args.full_size, "precision": args.precision}
            | found["alone"],
            "peers": {name: {"median": rates[name]} for name in ratios},
            "ratios": ratios,
            "versions": {"torch": torch.__version__, "pyarrow": pa.__version__, "python": platform.python_version()},
            "machine": {
                "cores": os.cpu_count(),
                "processor": platform.machine(),
                "threads": torch.get_num_threads(),
                "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            },
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
