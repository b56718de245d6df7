"""Tells the colour and the shape of an object in a picture of the demo world.

A small convolutional network fitted on real pictures of the demo world, never on what a model painted: it judges
whether the object in a repainted hole is the one that the caption names.
"""

import itertools
import logging
from pathlib import Path
from typing import final

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from model.safetensors_writer import save_safetensors
from model.tiny.corpus import TRAINING_SEED, render
from model.tiny.world import COLORS, SHAPES, philox

LOGGER = logging.getLogger(__name__)

CROP_PX = 32
MARGIN = 0.15
WEIGHTS_NAME = "judge.safetensors"
_COLOR_NAMES = tuple(COLORS)


class _Network(nn.Sequential):
    def __init__(self) -> None:
        widths = (3, 24, 32, 48)
        blocks: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            blocks += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(4, after), nn.SiLU(), nn.MaxPool2d(2)]
        super().__init__(*blocks, nn.Flatten(), nn.Linear(48 * 16, len(_COLOR_NAMES) + len(SHAPES)))


@final
class Judge:
    """The fitted network."""

    def __init__(self, network: nn.Module):
        self._network = network.float().eval().requires_grad_(False)

    @torch.no_grad()
    def classify(self, crops: np.ndarray) -> tuple[list[str], list[str]]:
        """Names what each crop shows.

        Args:
            crops: uint8, ``(num_crops, 32, 32, 3)``, from ``object_crop``.

        Returns:
            A colour and a shape for each crop.
        """
        logits = self._network(_pixels(crops))
        colors, shapes = logits.split([len(_COLOR_NAMES), len(SHAPES)], dim=1)
        return [_COLOR_NAMES[i] for i in colors.argmax(1)], [SHAPES[i] for i in shapes.argmax(1)]


def object_crop(image: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """The square around an object.

    Args:
        image: uint8, ``(side, side, 3)``: a central square.
        box: left, top, right, bottom as fractions of the side.

    Returns:
        uint8, ``(32, 32, 3)``, with a margin around the box.
    """
    side = image.shape[0]
    left, top, right, bottom = box
    grow = MARGIN * (right - left)
    window = tuple(side * edge for edge in (left - grow, top - grow, right + grow, bottom + grow))
    crop = Image.fromarray(image).transform(
        (CROP_PX, CROP_PX), Image.Transform.EXTENT, window, Image.Resampling.BILINEAR
    )
    return np.array(crop)


def load_judge(directory: Path | None = None) -> Judge:
    """Loads the shipped judge, or the one in ``directory``."""
    folder = directory or Path(__file__).parent / "weights" / "judge"
    network = _Network()
    network.load_state_dict({key: value.float() for key, value in load_file(folder / WEIGHTS_NAME).items()})
    return Judge(network)


def train_judge(output: Path, *, num_steps: int, num_pictures: int, cache: Path) -> None:
    """Fits the judge on drawn pictures and writes ``output/judge.safetensors`` (fp16).

    The crops are shifted and blurred at random, as a picture that went through the VAE is a little soft.
    """
    torch.manual_seed(0)
    corpus = render(TRAINING_SEED, 0, num_pictures, cache=cache)
    crops, colors, shapes = [], [], []
    for image, scene in zip(corpus.images, corpus.scenes, strict=True):
        for item in scene.objects:
            crops.append(_shifted_crop(image, item.box, scene.index))
            colors.append(_COLOR_NAMES.index(item.color))
            shapes.append(SHAPES.index(item.shape))
    images, color_ids, shape_ids = np.stack(crops), torch.tensor(colors), torch.tensor(shapes)
    network = _Network().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, num_steps)
    draws = np.random.default_rng(0)
    for step in range(num_steps):
        rows = draws.integers(len(images), size=128)
        logits = network(_softened(_pixels(images[rows]), step))
        color_logits, shape_logits = logits.split([len(_COLOR_NAMES), len(SHAPES)], dim=1)
        loss = functional.cross_entropy(color_logits, color_ids[rows]) + functional.cross_entropy(
            shape_logits, shape_ids[rows]
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == num_steps - 1:
            LOGGER.info("judge step %d: loss %.4f", step, loss.item())
    output.mkdir(parents=True, exist_ok=True)
    save_safetensors(output / WEIGHTS_NAME, {key: value.half() for key, value in network.state_dict().items()})


def _shifted_crop(image: np.ndarray, box: tuple[float, float, float, float], index: int) -> np.ndarray:
    draws = philox("judge", index, box)
    dx, dy = draws.uniform(-0.02, 0.02, size=2)
    return object_crop(image, (box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy))


def _softened(pixels: Tensor, step: int) -> Tensor:
    if step % 2:
        return pixels
    return functional.avg_pool2d(functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def _pixels(crops: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
