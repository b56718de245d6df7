"""Pictures and captions of the demo world as arrays, to train and to judge the tiny models on."""

import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.crop import central_square
from model.tiny.world import Scene, draw, scene_at

# The demo's own world has another seed (see preprocessing/demo): no tiny model has seen a picture that the demo serves.
TRAINING_SEED = 20_260_823
SIDE_PX = 64


@dataclass(frozen=True)
class Corpus:
    """Scenes and their pictures.

    Attributes:
        images: uint8, ``(num_scenes, side_px, side_px, 3)``.
        scenes: What they show, in the same order.
    """

    images: np.ndarray
    scenes: list[Scene]

    @property
    def captions(self) -> list[str]:
        """One caption a picture."""
        return [scene.caption for scene in self.scenes]


def _crop(scene: Scene) -> np.ndarray:
    return central_square(draw(scene), SIDE_PX)[0]


def render(seed: int, start: int, num_scenes: int, *, cache: Path | None = None) -> Corpus:
    """Draws scenes ``start … start + num_scenes - 1`` of a world.

    Args:
        seed: The world's seed.
        start: Index of the first scene.
        num_scenes: How many.
        cache: A folder that keeps the pictures between runs.

    Returns:
        The corpus; the same for the same arguments, on every machine.
    """
    scenes = [scene_at(seed, start + offset) for offset in range(num_scenes)]
    path = None if cache is None else cache / f"world-{seed}-{start}-{num_scenes}.npy"
    if path is not None and path.exists():
        return Corpus(np.load(path), scenes)
    with multiprocessing.get_context("spawn").Pool() as pool:
        images = np.stack(pool.map(_crop, scenes, chunksize=64))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, images)
    return Corpus(images, scenes)
