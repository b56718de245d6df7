"""A training step beside a bare PyTorch loop, and beside the step of diffusers' dreambooth_inpaint, in one run.

The UNet is the shipped tiny one, at 64 px; the VAE and the text tower are made so that one VAE encode takes at most the
share of a UNet step that it takes at full size (1.117 of 2.413 TFLOP an image): the largest width that does not exceed
it, by time measured here. Both shares are told. ``step_contestants.py`` says what each contestant does. All take turns,
a few steps each; medians are over rounds. Ratios are ours / peer in steps/s, above 1 is better: against ``bare``, which
has its batches in memory and knows neither dropout nor full masks nor checks, 1 / 1.05 is the goal; against
``dreambooth`` 1.7, where 1.94 would be all that there is to gain.

    python benchmarks/step.py [--rounds N] [--steps N] [--batch N] [--quick] [--json]
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import nn

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

from benchmarks.step_contestants import Contestant  # noqa: E402 - after the path is set
from benchmarks.step_world import make_model, make_pictures, make_run  # noqa: E402
from model.specs import SD2_VAE_CONFIG  # noqa: E402
from model.unet import build_unet, load_unet  # noqa: E402

SIDE_PX = 64
TRUE_VAE_SHARE = 1.117 / 2.413
TRUE_TEXT_SHARE = 0.0451 / 2.413
WIDTHS = range(4, 65, 2)
TEXT_WIDTH = 64
TINY_UNET = REPOSITORY / "model" / "tiny" / "weights" / "unet"


def _seconds(run: Callable[[], object], num_times: int = 5) -> float:
    run()
    times = []
    for _ in range(num_times):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def vae_config(width: int) -> dict[str, Any]:
    """Stable Diffusion's VAE, narrower."""
    widths = [width, 2 * width, 4 * width, 4 * width]
    return {**SD2_VAE_CONFIG, "block_out_channels": widths, "norm_num_groups": 2, "sample_size": SIDE_PX}


def choose_vae(batch_size: int) -> tuple[dict[str, Any], float]:
    """The widest VAE whose encode takes no larger share of the UNet's step than at full size, and that share."""
    unet = build_unet({**load_unet(TINY_UNET).config, "in_channels": 9}).train()
    side = SIDE_PX // 8
    sample, text = torch.randn(batch_size, 9, side, side), torch.randn(batch_size, 77, TEXT_WIDTH)

    def step() -> None:
        unet(sample, torch.zeros(batch_size), encoder_hidden_states=text, return_dict=False)[
            0
        ].square().mean().backward()

    unet_s = _seconds(step)
    pixels = torch.randn(batch_size, 3, SIDE_PX, SIDE_PX)
    chosen: tuple[dict[str, Any], float] | None = None
    for width in WIDTHS:
        config = vae_config(width)
        vae: nn.Module = AutoencoderKL(**config).requires_grad_(False).eval()
        share = _seconds(lambda vae=vae: vae.encode(pixels), 3) / unet_s  # pyright: ignore[reportCallIssue]  # a module's attribute
        if chosen is not None and share > TRUE_VAE_SHARE:
            break
        chosen = config, share
    assert chosen is not None
    return chosen


def measure(folder: Path, num_rounds: int, num_steps: int, batch_size: int) -> dict[str, Any]:
    """All contestants, in turns: name → seconds of a step, round by round; and what there is to tell of the models."""
    vae, share = choose_vae(batch_size)
    text = {
        "vocab_size": 49408,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    unet = {**load_unet(TINY_UNET).config}
    model = make_model(folder / "model", unet=unet, vae=vae, text=text)
    crops = make_pictures(folder / "pictures", SIDE_PX, 512)
    run = make_run(
        folder,
        model,
        side_px=SIDE_PX,
        text_width=TEXT_WIDTH,
        num_rows=1024,
        crops=crops,
        global_batch_size=batch_size,
        micro_batch_size=batch_size,
        warmup_steps=10,
    )
    path = folder / "run.json"
    path.write_text(run.model_dump_json())
    peer = {"pictures": str(folder / "pictures"), "side_px": SIDE_PX}
    with contextlib.ExitStack() as stack:
        contestants = {
            "ours, ZeRO-1": Contestant("ours", path, folder / "zero1", train={"zero_stage": 1}),
            "ours, ZeRO-0": Contestant("ours", path, folder / "zero0", train={"zero_stage": 0}),
            "bare": Contestant("bare", path, folder / "bare"),
            "dreambooth": Contestant("dreambooth", path, folder / "dreambooth", **peer),
        }
        for contestant in contestants.values():
            stack.enter_context(contestant)
            contestant.take(2)
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(num_rounds):
            for name, contestant in contestants.items():
                seconds[name].append(contestant.take(num_steps)["took"] / num_steps)
    return {"seconds": seconds, "vae_share": share, "vae_width": vae["block_out_channels"][0]}


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="steps of each contestant in a round")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps, options.batch = min(options.rounds, 3), 2, min(options.batch, 8)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.rounds, options.steps, options.batch)
    medians = {name: statistics.median(times) for name, times in found["seconds"].items()}
    print(f"{SIDE_PX} px, batches of {options.batch}, median of {options.rounds} rounds of {options.steps} steps")
    print(
        f"one VAE encode (width {found['vae_width']}) takes {found['vae_share']:.2f} of the UNet's step; "
        f"at full size {TRUE_VAE_SHARE:.2f}"
    )
    print(f"  {'':14} {'ms/step':>9} {'fastest':>9} {'images/s':>9} {'ours / it':>10}")
    ratios = {name: seconds / medians["ours, ZeRO-1"] for name, seconds in medians.items()}
    for name, seconds in medians.items():
        fastest = min(found["seconds"][name])
        print(
            f"  {name:14} {1e3 * seconds:9.1f} {1e3 * fastest:9.1f} {options.batch / seconds:9.1f} {ratios[name]:10.3f}"
        )
    if options.json:
        machine = {"cores": os.cpu_count(), "processor": platform.machine(), "threads": torch.get_num_threads()}
        told = {
            "name": "step",
            "unit": "steps/s",
            "ours": {name: 1 / medians[name] for name in ("ours, ZeRO-1", "ours, ZeRO-0")},
            "peers": {name: {"median": 1 / medians[name]} for name in ("bare", "dreambooth")},
            "ratios": {
                "bare": ratios["bare"],
                "bare_zero0": medians["bare"] / medians["ours, ZeRO-0"],
                "dreambooth": ratios["dreambooth"],
            },
            "vae_share": found["vae_share"],
            "true_vae_share": TRUE_VAE_SHARE,
            "versions": {name: version(name) for name in ("torch", "deepspeed", "diffusers", "accelerate")},
            "machine": machine,
        }
        print(json.dumps(told))


if __name__ == "__main__":
    main()
