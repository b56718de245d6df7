"""Full-size training steps on one GPU: Stable Diffusion 2's UNet, random weights, rows in Parquet, each row a process.

Rows of 512 px with everything cached, bf16, in the largest of several micro batches that fits: the recipe's way, then
with one thing changed: no average, no clipping, torch.compile, channels_last, each ZeRO stage. 256 px. Online masks: a
VAE encode of each masked picture in the step. ``bare`` and ``dreambooth`` as in ``step.py``, with the same UNet.

``mfu`` counts the UNet's forward and backward pass, and the VAE encodes of online masks, at the device's peak (known
devices only). ``idle`` is the share of the time in which the loop waited for data. With --profile FILE the kernels of
three steps, by time, are written to FILE. Ratios are ours / peer in images/s.

    python benchmarks/step_gpu.py [--rows NAME …] [--rounds N] [--steps N] [--quick] [--profile FILE] [--json]

Without a GPU it says so and measures nothing.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

from benchmarks.step_contestants import Contestant  # noqa: E402 - after the path is set
from benchmarks.step_world import make_model, make_pictures, make_run  # noqa: E402
from model.specs import SD2_UNET_CONFIG, SD2_VAE_CONFIG  # noqa: E402
from training.flops import peak_flops_per_s  # noqa: E402

UNET_FLOPS = {512: 2.413e12, 256: 0.543e12}
VAE_FLOPS = {512: 1.117e12, 256: 0.273e12}
TEXT_FLOPS = 0.0451e12
FULL_MASK = 0.25
"""The share of masks of all ones, the configuration's default: their moments are a constant and are not encoded."""

BATCHES = {512: (64, 48, 32, 16, 8, 4), 256: (192, 128, 64, 32, 16)}
CLIP_H_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        contestant: ``ours``, ``bare`` or ``dreambooth``.
        side_px: Of the pictures.
        train: What differs from the recipe's way.
        options: Of the contestant.
        flops: FLOPs an image, for the MFU.
    """

    contestant: str = "ours"
    side_px: int = 512
    train: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    flops: float = UNET_FLOPS[512]


ROWS: dict[str, Row] = {
    "recipe": Row(),
    "no clipping": Row(train={"gradient_clipping": 0.0}),
    "no average": Row(options={"has_average": False}),
    "channels_last": Row(train={"channels_last": True}),
    "compile regional": Row(train={"compile": "regional"}),
    "compile regional, channels_last": Row(train={"compile": "regional", "channels_last": True}),
    "compile whole, channels_last": Row(train={"compile": "whole", "channels_last": True}),
    "activation checkpointing": Row(train={"activation_checkpointing": True}),
    "ZeRO-0": Row(train={"zero_stage": 0}),
    "ZeRO-2": Row(train={"zero_stage": 2}),
    "256 px": Row(side_px=256, flops=UNET_FLOPS[256]),
    "256 px, compile regional, channels_last": Row(
        side_px=256, train={"compile": "regional", "channels_last": True}, flops=UNET_FLOPS[256]
    ),
    "online masks": Row(train={"mask_source": "online"}, flops=UNET_FLOPS[512] + (1 - FULL_MASK) * VAE_FLOPS[512]),
    "bare": Row("bare"),
    "dreambooth": Row("dreambooth", flops=UNET_FLOPS[512] + 2 * VAE_FLOPS[512] + TEXT_FLOPS),
}
OURS = "recipe"


def make_world(folder: Path, sides_px: Sequence[int], num_rows: int) -> dict[int, dict[str, Any]]:
    """Models and rows, for each size of pictures: the run's file, and where the pictures are."""
    model = make_model(
        folder / "model",
        unet=SD2_UNET_CONFIG | {"in_channels": 4},
        vae=SD2_VAE_CONFIG,
        text=CLIP_H_TEXT,
        device="cuda",
    )
    worlds = {}
    for side_px in sides_px:
        place = folder / str(side_px)
        crops = make_pictures(place / "pictures", side_px, 512)
        run = make_run(
            place,
            model,
            side_px=side_px,
            text_width=1024,
            num_rows=num_rows,
            crops=crops,
            precision="bf16",
            encoder_precision="bf16",
            global_batch_size=1,
            micro_batch_size=1,
        )
        (place / "run.json").write_text(run.model_dump_json())
        worlds[side_px] = {"run": place / "run.json", "pictures": str(place / "pictures")}
    return worlds


def measure(
    name: str,
    world: Mapping[str, Any],
    folder: Path,
    *,
    num_rounds: int,
    num_steps: int,
    batches: Sequence[int],
    profile: Path | None = None,
) -> dict[str, Any]:
    """One row, in the largest micro batch that fits."""
    row, problem = ROWS[name], ""
    environment = {"DS_ACCELERATOR": "cuda"} | ({} if profile is None else {"PROFILE_STEPS": str(profile)})
    for batch_size in batches:
        train = {**row.train, "global_batch_size": batch_size, "micro_batch_size": batch_size}
        options = {**row.options, "train": train, "side_px": row.side_px, "pictures": world["pictures"]}
        place = folder / f"{name} {batch_size}".replace(" ", "-").replace(",", "")
        try:
            with Contestant(row.contestant, world["run"], place, environment, **options) as contestant:
                contestant.take(4)  # compiles, tunes, fills the loader
                taken = [contestant.take(num_steps) for _ in range(num_rounds)]
        except RuntimeError as error:
            problem = str(error)
            if "out of memory" in problem.lower() or "micro_batch_size" in problem:
                continue
            return {"problem": problem}
        images = num_steps * batch_size
        return {
            "batch": batch_size,
            "images_per_s": statistics.median(images / one["took"] for one in taken),
            "fastest": max(images / one["took"] for one in taken),
            "idle": sum(one["waited"] for one in taken) / sum(one["took"] for one in taken),
            "peak_gib": max(one["peak_bytes"] for one in taken) / 2**30,
        }
    return {"problem": f"none of {list(batches)} fits: {problem}"}


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS], default=[*ROWS], metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps of a round")
    parser.add_argument("--batch", type=int, help="the only micro batch to try")
    parser.add_argument("--profile", type=Path, help="where the kernels of the recipe's way are written")
    parser.add_argument("--quick", action="store_true", help="only the recipe's way, bare and dreambooth; two rounds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing is measured")
        return
    if options.quick:
        options.rows, options.rounds = [OURS, "bare", "dreambooth"], 2
    device = torch.cuda.get_device_name()
    peak = peak_flops_per_s(device, "bf16")
    found: dict[str, dict[str, Any]] = {}
    print(f"{device}, bf16, median of {options.rounds} rounds of {options.steps} steps")
    print(f"  {'':42} {'batch':>5} {'images/s':>9} {'fastest':>8} {'MFU':>6} {'idle':>6} {'GiB':>6}")
    with tempfile.TemporaryDirectory() as folder:
        worlds = make_world(Path(folder), sorted({ROWS[name].side_px for name in options.rows}), 1024)
        torch.cuda.empty_cache()
        for name in options.rows:
            side_px = ROWS[name].side_px
            found[name] = one = measure(
                name,
                worlds[side_px],
                Path(folder),
                num_rounds=options.rounds,
                num_steps=options.steps,
                batches=BATCHES[side_px] if options.batch is None else [options.batch],
                profile=options.profile if name == OURS else None,
            )
            if "problem" in one:
                print(f"  {name:42} {one['problem'].splitlines()[-1][:100]}")
                continue
            if peak is not None:
                one["mfu"] = one["images_per_s"] * ROWS[name].flops / peak
            mfu = f"{100 * one['mfu']:5.1f}%" if "mfu" in one else ""
            print(
                f"  {name:42} {one['batch']:5} {one['images_per_s']:9.1f} {one['fastest']:8.1f} {mfu:>6} "
                f"{100 * one['idle']:5.2f}% {one['peak_gib']:6.1f}",
                flush=True,
            )
    if options.json:
        print(json.dumps(told(found, device)))


def told(found: Mapping[str, Mapping[str, Any]], device: str) -> dict[str, Any]:
    """The last line."""
    speeds = {name: one["images_per_s"] for name, one in found.items() if "images_per_s" in one}
    peers = [name for name in speeds if ROWS[name].contestant != "ours"]
    best = max((speed for name, speed in speeds.items() if _is_cached_512(name)), default=None)
    ratios = {}
    with contextlib.suppress(KeyError):
        ratios = {name: speeds[OURS] / speeds[name] for name in peers}
    if best is not None:
        ratios |= {f"{name}, best of ours": best / speeds[name] for name in peers}
    return {
        "name": "step_gpu",
        "unit": "images/s",
        "ours": {name: one for name, one in found.items() if name not in peers},
        "peers": {name: found[name] for name in peers},
        "ratios": ratios,
        "versions": {name: version(name) for name in ("torch", "deepspeed", "diffusers", "accelerate")},
        "machine": {"gpu": device},
    }


def _is_cached_512(name: str) -> bool:
    row = ROWS[name]
    return row.contestant == "ours" and row.side_px == 512 and row.train.get("mask_source") != "online"


if __name__ == "__main__":
    main()
