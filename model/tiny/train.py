"""Trains everything that `model/tiny/weights` holds, from nothing, in one command.

    python -m model.tiny.train --output model/tiny/weights

About two hours on 2 cores. A part whose files are there is not trained again; 0 steps leave a part out.
"""

import argparse
import logging
import os
from collections.abc import Callable
from pathlib import Path

from model.tiny.judge import train_judge
from model.tiny.train_clip import train_clip
from model.tiny.train_unet import train_unet
from model.tiny.train_vae import train_vae

LOGGER = logging.getLogger(__name__)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "weights")
    parser.add_argument(
        "--cache", type=Path, default=Path("var/tiny"), help="drawn pictures are kept here between runs"
    )
    parser.add_argument("--num-pictures", type=int, default=16_000)
    parser.add_argument("--vae-steps", type=int, default=2600)
    parser.add_argument("--clip-steps", type=int, default=1000)
    parser.add_argument("--judge-steps", type=int, default=400)
    parser.add_argument("--unet-steps", type=int, default=6000)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    corpus = {"num_pictures": args.num_pictures, "cache": args.cache}
    out: Path = args.output
    parts: list[tuple[str, int, Callable[[Path, int], None]]] = [
        ("vae", args.vae_steps, lambda folder, steps: train_vae(folder, num_steps=steps, **corpus)),
        ("open_clip", args.clip_steps, lambda folder, steps: train_clip(folder, num_steps=steps, **corpus)),
        ("judge", args.judge_steps, lambda folder, steps: train_judge(folder, num_steps=steps, **corpus)),
        ("unet", args.unet_steps, lambda folder, steps: train_unet(folder.parent, out, num_steps=steps, **corpus)),
    ]
    for name, num_steps, train in parts:
        if num_steps == 0 or any((out / name).glob("*.safetensors")):
            LOGGER.info("%s: %s", out / name, "left out" if num_steps == 0 else "is there")
            continue
        train(out / name, num_steps)
    num_bytes = sum(os.path.getsize(path) for path in out.rglob("*.safetensors"))
    LOGGER.info("%s: %.2f MB of weights", out, num_bytes / 1e6)


if __name__ == "__main__":
    main()
