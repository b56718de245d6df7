"""Masks a second on one core, at 512 px, beside straightforward implementations of the published generators.

The family `sd_512train_large`: ours, and on the latent grid directly, beside
    pil         as published: the mask is an array of floats, and each stroke takes it to a PIL picture and back
    pil_uint8   the same with an array of bytes, and no arithmetic on it
    pil_single  the kindest: one canvas, to an array once
The family `lama_thick_512`, without its limit on the area: ours beside
    cv2         a float32 canvas and cv2.line, as published

Ours draws in batches of 16, as encoding does; `one by one` calls once a mask. Peers and ours alternate within each
round; a figure is the median of rounds, in seconds of processor time, so that others on the machine count less. The
peers are written here from the description of the generators.

    python benchmarks/masks.py [--quick] [--json]
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import PIL
from numpy.random import RandomState
from PIL import Image, ImageDraw

from model import masks
from model.masks import draw_latent_mask, draw_latent_masks, draw_mask, draw_masks

SIDE_PX = 512
BATCH_SIZE = 16
SD_FAMILY, LAMA_FAMILY = "sd_512train_large", "lama_thick_512"
UNIT = "masks/s"


class _Pil:
    """Stable Diffusion's generator, 512train-large, each shape through a PIL picture of its own."""

    def __init__(self, random: RandomState):
        self._random = random

    def blank(self) -> np.ndarray:
        return np.zeros((SIDE_PX, SIDE_PX))

    def to_picture(self, mask: np.ndarray) -> Image.Image:
        return Image.fromarray((255 * (mask > 0)).astype(np.uint8))

    def to_array(self, picture: Image.Image) -> np.ndarray:
        return np.array(picture) / 255

    def draw(self) -> np.ndarray:
        mask = self.blank()
        if self._random.uniform() < 0.5:
            for line, width in _strokes(self._random):
                picture = self.to_picture(mask)
                ImageDraw.Draw(picture).line(line, fill=255, width=width)
                mask = self.to_array(picture)
            return mask
        for (left, top, right, bottom), radius in _boxes(self._random):
            if radius is None:
                mask[top:bottom, left:right] = 1
                continue
            picture = self.to_picture(mask)
            ImageDraw.Draw(picture).rounded_rectangle((left, top, right, bottom), radius=radius, fill=255)
            mask = self.to_array(picture)
        return mask


class _PilUint8(_Pil):
    def blank(self) -> np.ndarray:
        return np.zeros((SIDE_PX, SIDE_PX), np.uint8)

    def to_picture(self, mask: np.ndarray) -> Image.Image:
        return Image.fromarray(mask)

    def to_array(self, picture: Image.Image) -> np.ndarray:
        return np.array(picture)


class _PilSingle(_Pil):
    def draw(self) -> np.ndarray:
        picture = Image.new("L", (SIDE_PX, SIDE_PX))
        canvas = ImageDraw.Draw(picture)
        if self._random.uniform() < 0.5:
            for line, width in _strokes(self._random):
                canvas.line(line, fill=1, width=width)
        else:
            for box, radius in _boxes(self._random):
                canvas.rounded_rectangle(box, radius=radius or 0, fill=1)
        return np.asarray(picture)


def _strokes(random: RandomState) -> Iterator[tuple[tuple[float, float, float, float], int]]:
    for _ in range(random.randint(1, 5)):
        x, y = random.randint(0, SIDE_PX), random.randint(0, SIDE_PX)
        angle, length, width = random.randint(0, 360), random.randint(10, 450), random.randint(5, 400)
        yield (x, y, x + length * math.sin(angle), y + length * math.cos(angle)), int(width)


def _boxes(random: RandomState) -> Iterator[tuple[tuple[int, int, int, int], int | None]]:
    for _ in range(random.randint(1, 4)):
        width, height = int(random.randint(75, 450)), int(random.randint(75, 450))
        left = int(random.randint(10, SIDE_PX - 10 - width + 1))
        top = int(random.randint(10, SIDE_PX - 10 - height + 1))
        if random.uniform() < 0.5:
            yield (left, top, left + width, top + height), None
        else:
            yield (left, top, left + width, top + width), int(random.randint(0, 60))


def lama_with_cv2(random: RandomState) -> np.ndarray:
    """LaMa's mixed generator with the parameters of `random_thick_512`, before masks are refused for their area."""
    mask = np.zeros((SIDE_PX, SIDE_PX), np.float32)
    if random.uniform() * 1.3 >= 1:
        for _ in range(random.randint(1, 5)):
            width, height = random.randint(30, 301), random.randint(30, 301)
            left, top = random.randint(10, SIDE_PX - 10 - width + 1), random.randint(10, SIDE_PX - 10 - height + 1)
            mask[top : top + height, left : left + width] = 1
        return mask
    for chain in range(random.randint(1, 7)):
        x, y = random.randint(SIDE_PX), random.randint(SIDE_PX)
        for _ in range(1 + random.randint(5)):
            angle = 0.01 + random.randint(4)
            if chain % 2 == 0:
                angle = 2 * math.pi - angle
            length, width = 10 + random.randint(450), 5 + random.randint(250)
            end_x = min(max(int(x + length * math.sin(angle)), 0), SIDE_PX)
            end_y = min(max(int(y + length * math.cos(angle)), 0), SIDE_PX)
            cv2.line(mask, (x, y), (end_x, end_y), 1.0, width)
            x, y = end_x, end_y
    return mask


def sd_with_pil(random: RandomState) -> np.ndarray:
    """Stable Diffusion's generator, 512train-large, as `pil_uint8` draws it."""
    return _PilUint8(random).draw()


def _runs() -> dict[str, Callable[[int], None]]:
    """Name → draws that many masks; nothing is kept."""
    uids = [f"{index:032x}" for index in range(4096)]
    next_start = iter(range(0, 1 << 60, BATCH_SIZE))

    def one_by_one(draw: Callable[..., np.ndarray], family: str) -> Callable[[int], None]:
        def run(num_masks: int) -> None:
            variant = next(next_start)
            for index in range(num_masks):
                draw(family, SIDE_PX, 0, uids[index % len(uids)], variant)

        return run

    def in_batches(draw: Callable[..., np.ndarray], family: str) -> Callable[[int], None]:
        def run(num_masks: int) -> None:
            variant = next(next_start)
            for start in range(0, num_masks, BATCH_SIZE):
                draw(family, SIDE_PX, 0, uids[start : start + BATCH_SIZE], variant)

        return run

    def peer(draw: Callable[[], np.ndarray]) -> Callable[[int], None]:
        def run(num_masks: int) -> None:
            for _ in range(num_masks):
                draw()

        return run

    random = RandomState(0)
    return {
        "sd": in_batches(draw_masks, SD_FAMILY),
        "sd one by one": one_by_one(draw_mask, SD_FAMILY),
        "sd 64 px": in_batches(draw_latent_masks, SD_FAMILY),
        "sd 64 px one by one": one_by_one(draw_latent_mask, SD_FAMILY),
        "pil": peer(_Pil(random).draw),
        "pil_uint8": peer(_PilUint8(random).draw),
        "pil_single": peer(_PilSingle(random).draw),
        "lama": in_batches(draw_masks, LAMA_FAMILY),
        "lama one by one": one_by_one(draw_mask, LAMA_FAMILY),
        "cv2": peer(lambda: lama_with_cv2(random)),
    }


def _rates(num_rounds: int, seconds_each: float) -> dict[str, float]:
    """Masks a second, the median of rounds in which all take their turns."""
    runs = _runs()
    num_masks = {}
    for name, run in runs.items():  # warm up, and see how many make a turn
        run(BATCH_SIZE)
        started = time.process_time()
        run(2 * BATCH_SIZE)
        each = (time.process_time() - started) / (2 * BATCH_SIZE)
        num_masks[name] = BATCH_SIZE * max(1, min(256, round(seconds_each / each / BATCH_SIZE)))
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(num_rounds):
        for name, run in runs.items():
            started = time.process_time()
            run(num_masks[name])
            rates[name].append(num_masks[name] / (time.process_time() - started))
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    """Runs all in turns, and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    lama = masks._FAMILIES[LAMA_FAMILY]
    masks._FAMILIES[LAMA_FAMILY] = dataclasses.replace(lama, is_evaluation=False)  # the peer refuses none
    num_rounds = 7 if args.quick else 15
    rates = _rates(num_rounds, 0.2)
    peers = {name: rates.pop(name) for name in ("pil", "pil_uint8", "pil_single", "cv2")}
    sd_ratios = {name: rates["sd"] / peers[name] for name in ("pil", "pil_uint8", "pil_single")}
    latent_ratios = {f"latent_{name}": rates["sd 64 px"] / peers[name] for name in ("pil", "pil_uint8", "pil_single")}
    ratios = {**sd_ratios, "cv2": rates["lama"] / peers["cv2"], **latent_ratios}
    print(f"{UNIT} on one core, 512 x 512, median of {num_rounds} rounds")
    for name, rate in (*rates.items(), *peers.items()):
        print(f"  {name:22}{rate:10.0f}")
    print("times as fast as")
    for name, ratio in ratios.items():
        print(f"  {name:22}{ratio:10.1f}")
    if args.json:
        result = {
            "name": "masks",
            "unit": UNIT,
            "ours": {name: {"median": rate} for name, rate in rates.items()},
            "peers": {name: {"median": rate} for name, rate in peers.items()},
            "ratios": ratios,
            "versions": {
                "numpy": np.__version__,
                "pillow": PIL.__version__,
                "opencv": cv2.__version__,
                "python": platform.python_version(),
            },
            "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "threads": 1},
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
