"""Masks: which part of a picture is to be repainted. 1 = repaint, 0 = keep.

Two kinds of generator, as published:

* `sd_*`: independent straight strokes with flat ends, or a few boxes, one kind per mask (Esser's re-implementation, on
  which Stable Diffusion's inpainting models were trained: `sd_512train_large`).
* `lama_*`: chains of connected strokes with round ends, or boxes (LaMa: Suvorov et al. 2021). Thin, medium and thick
  are for evaluation and refuse masks that cover more than half of the picture.

Every family is stated at its native resolution, in pixels, and is drawn at any other in proportion: mask k of a
picture has the same shape at 64 px and at 512 px. The all-ones mask of 25 % of the training samples is not drawn here:
the trainer draws it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from model.randomness import stream
from model.specs import MASK_FAMILIES

LATENT_FACTOR: Final = 8
MAX_EVALUATION_AREA: Final = 0.5
_MAX_ATTEMPTS: Final = 1000

Mask = UInt8[np.ndarray, "height width"]


@dataclass(frozen=True, kw_only=True)
class _StableDiffusion:
    """Parameters of an `sd_*` family. Ranges are half open [low, high), in native pixels.

    Source: pesser/stable-diffusion `ldm/data/inpainting/synthetic_mask.py`.
    """

    native_px: int
    stroke_probability: float
    num_strokes: tuple[int, int]
    stroke_length: tuple[int, int]
    stroke_width: tuple[int, int]
    num_boxes: tuple[int, int] = (1, 4)
    box_side: tuple[int, int] = (30, 150)
    box_margin: int = 10
    is_evaluation: bool = False


@dataclass(frozen=True, kw_only=True)
class _Lama:
    """Parameters of a `lama_*` family: relative weights of the two kinds, and closed ranges [low, high], native pixels.

    Source: advimman/lama `saicinpainting/training/data/masks.py`, `configs/training/data/abl-04-256-mh-dist.yaml`,
    `configs/data_gen/random_{thin,medium,thick}_{256,512}.yaml`. The number of chains includes the file's own + 1.
    """

    native_px: int
    num_chains: tuple[int, int]
    segment_length: tuple[int, int]
    segment_width: tuple[int, int]
    box_weight: float = 0.0
    num_boxes: tuple[int, int] = (0, 0)
    box_side: tuple[int, int] = (0, 0)
    box_margin: int = 0
    is_evaluation: bool = True


_FAMILIES: Final[dict[str, _StableDiffusion | _Lama]] = {
    "sd_256narrow": _StableDiffusion(
        native_px=256, stroke_probability=1.0, num_strokes=(4, 50), stroke_length=(10, 40), stroke_width=(5, 10)
    ),
    "sd_256train": _StableDiffusion(
        native_px=256, stroke_probability=0.5, num_strokes=(1, 5), stroke_length=(10, 200), stroke_width=(5, 100)
    ),
    "sd_512train": _StableDiffusion(
        native_px=512,
        stroke_probability=0.5,
        num_strokes=(1, 5),
        stroke_length=(10, 450),
        stroke_width=(5, 250),
        box_side=(30, 300),
    ),
    "sd_512train_large": _StableDiffusion(
        native_px=512,
        stroke_probability=0.5,
        num_strokes=(1, 5),
        stroke_length=(10, 450),
        stroke_width=(5, 400),
        box_side=(75, 450),
    ),
    "lama_train_256": _Lama(
        native_px=256,
        num_chains=(1, 6),
        segment_length=(10, 209),
        segment_width=(5, 104),
        box_weight=1.0,
        num_boxes=(1, 4),
        box_side=(30, 150),
        box_margin=10,
        is_evaluation=False,
    ),
    "lama_thin_256": _Lama(native_px=256, num_chains=(4, 51), segment_length=(10, 49), segment_width=(5, 14)),
    "lama_medium_256": _Lama(
        native_px=256,
        num_chains=(4, 6),
        segment_length=(10, 109),
        segment_width=(5, 54),
        box_weight=0.3,
        num_boxes=(1, 5),
        box_side=(10, 50),
    ),
    "lama_thick_256": _Lama(
        native_px=256,
        num_chains=(1, 6),
        segment_length=(10, 209),
        segment_width=(5, 104),
        box_weight=0.3,
        num_boxes=(1, 3),
        box_side=(30, 150),
        box_margin=10,
    ),
    "lama_thin_512": _Lama(native_px=512, num_chains=(4, 71), segment_length=(10, 109), segment_width=(5, 24)),
    "lama_medium_512": _Lama(
        native_px=512,
        num_chains=(4, 11),
        segment_length=(10, 209),
        segment_width=(5, 104),
        box_weight=0.3,
        num_boxes=(1, 5),
        box_side=(30, 150),
    ),
    "lama_thick_512": _Lama(
        native_px=512,
        num_chains=(1, 6),
        segment_length=(10, 459),
        segment_width=(5, 254),
        box_weight=0.3,
        num_boxes=(1, 4),
        box_side=(30, 300),
        box_margin=10,
    ),
}
assert {*_FAMILIES, "full"} == set(MASK_FAMILIES)


def draw_mask(family: str, resolution_px: int, seed: int, uid: str, variant: int) -> Mask:
    """Draws one mask: a pure function of its arguments.

    The mask covers at least one cell of the latent grid; those of the evaluation families cover at most half of the
    picture. A mask that does not is drawn again from the next stream of the same name.

    Args:
        family: one of `model.specs.MASK_FAMILIES`.
        resolution_px: side of the square, in pixels; at least 8.
        seed: root of the randomness.
        uid: the picture's.
        variant: which of the picture's masks, 0, 1, ….

    Returns:
        {0, 1}, 1 = repaint.

    Raises:
        ValueError: an unknown family, or a resolution below one latent cell.
    """
    if family not in MASK_FAMILIES:
        raise ValueError(f"mask family is {family!r}: choose one of {', '.join(MASK_FAMILIES)}")
    if resolution_px < LATENT_FACTOR:
        raise ValueError(f"resolution_px is {resolution_px}: it must be at least {LATENT_FACTOR}")
    if family == "full":
        return np.ones((resolution_px, resolution_px), dtype=np.uint8)
    parameters = _FAMILIES[family]
    for attempt in range(_MAX_ATTEMPTS):
        random = stream("mask", family, seed, uid, variant, attempt)
        canvas = _Canvas(resolution_px, parameters.native_px)
        if isinstance(parameters, _StableDiffusion):
            _draw_stable_diffusion(canvas, parameters, random)
        else:
            _draw_lama(canvas, parameters, random)
        mask = canvas.mask()
        if to_latent_mask(mask).any() and not (parameters.is_evaluation and mask.mean() > MAX_EVALUATION_AREA):
            return mask
    raise AssertionError(f"no acceptable {family} mask at {resolution_px} px in {_MAX_ATTEMPTS} attempts")


def to_latent_mask(mask: Mask, factor: int = LATENT_FACTOR) -> UInt8[np.ndarray, "h w"]:
    """The mask on the latent grid: nearest neighbor, exactly `mask[::factor, ::factor]`.

    Strokes thinner than a cell may vanish here while they still grey the picture: the published models saw the same.
    """
    return np.ascontiguousarray(mask[::factor, ::factor])


def pack_mask(mask: Mask) -> bytes:
    """A bit per cell, row by row, most significant bit first, padded with zeros to whole bytes."""
    return np.packbits(mask.reshape(-1)).tobytes()


def unpack_mask(data: bytes | memoryview, shape: tuple[int, int]) -> Mask:
    """The inverse of `pack_mask`.

    Args:
        data: (height · width + 7) // 8 bytes.
        shape: (height, width) of the mask.

    Raises:
        ValueError: the number of bytes does not fit the shape.
    """
    num_cells = math.prod(shape)
    if len(data) != (num_cells + 7) // 8:
        raise ValueError(f"a packed {shape[0]}x{shape[1]} mask has {(num_cells + 7) // 8} bytes, not {len(data)}")
    return np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=num_cells).reshape(shape)


class _Canvas:
    """A square on which shapes stated in native pixels are painted at the wanted resolution."""

    def __init__(self, resolution_px: int, native_px: int):
        self.native_px = native_px
        self._scale = resolution_px / native_px
        self._image = Image.new("L", (resolution_px, resolution_px), 0)
        self._draw = ImageDraw.Draw(self._image)

    def mask(self) -> Mask:
        return np.array(self._image, dtype=np.uint8)

    def line(self, start: tuple[float, float], end: tuple[float, float], width: int, *, has_round_ends: bool) -> None:
        (x0, y0), (x1, y1) = ((x * self._scale, y * self._scale) for x, y in (start, end))
        width_px = max(1, round(width * self._scale))
        self._draw.line([x0, y0, x1, y1], fill=1, width=width_px)
        if has_round_ends:
            radius = (width_px - 1) / 2
            for x, y in ((x0, y0), (x1, y1)):
                self._draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=1)

    def box(self, left: int, top: int, width: int, height: int, corner_radius: int = 0) -> None:
        x0, y0 = round(left * self._scale), round(top * self._scale)
        x1 = max(x0, round((left + width) * self._scale) - 1)  # PIL paints the last row and column too
        y1 = max(y0, round((top + height) * self._scale) - 1)
        self._draw.rounded_rectangle([x0, y0, x1, y1], radius=corner_radius * self._scale, fill=1)


def _draw_stable_diffusion(canvas: _Canvas, parameters: _StableDiffusion, random: np.random.Generator) -> None:
    draw: Callable[..., None] = (
        _draw_strokes if random.random() < parameters.stroke_probability else _draw_rounded_boxes
    )
    draw(canvas, parameters, random)


def _draw_strokes(canvas: _Canvas, parameters: _StableDiffusion, random: np.random.Generator) -> None:
    """Separate strokes. Their source speaks of a chain, but draws a new start for each."""
    for _ in range(random.integers(*parameters.num_strokes)):
        x, y = (int(value) for value in random.integers(0, canvas.native_px, size=2))
        angle = float(random.integers(0, 360))  # read as radians, as published: a direction like any other
        length, width = int(random.integers(*parameters.stroke_length)), int(random.integers(*parameters.stroke_width))
        end = (x + length * math.sin(angle), y + length * math.cos(angle))
        canvas.line((x, y), end, width, has_round_ends=False)


def _draw_rounded_boxes(canvas: _Canvas, parameters: _StableDiffusion, random: np.random.Generator) -> None:
    """Rectangles, or squares with rounded corners that take the width for the height and may leave the canvas."""
    for _ in range(random.integers(*parameters.num_boxes)):
        height, width = (int(side) for side in random.integers(*parameters.box_side, size=2))
        left, top = (
            int(random.integers(parameters.box_margin, canvas.native_px - parameters.box_margin - side + 1))
            for side in (width, height)
        )
        if random.random() < 0.5:
            canvas.box(left, top, width, height)
        else:
            canvas.box(left, top, width, width, corner_radius=int(random.integers(0, 60)))


def _draw_lama(canvas: _Canvas, parameters: _Lama, random: np.random.Generator) -> None:
    draw: Callable[..., None] = _draw_boxes if random.random() * (1 + parameters.box_weight) >= 1 else _draw_chains
    draw(canvas, parameters, random)


def _draw_chains(canvas: _Canvas, parameters: _Lama, random: np.random.Generator) -> None:
    for chain in range(random.integers(*parameters.num_chains, endpoint=True)):
        x, y = (int(value) for value in random.integers(0, canvas.native_px, size=2))
        for _ in range(random.integers(1, 6)):
            angle = 0.01 + int(random.integers(0, 4))  # radians: four directions, mirrored for every other chain
            if chain % 2 == 0:
                angle = 2 * math.pi - angle
            length = int(random.integers(*parameters.segment_length, endpoint=True))
            width = int(random.integers(*parameters.segment_width, endpoint=True))
            end_x = min(max(int(x + length * math.sin(angle)), 0), canvas.native_px)
            end_y = min(max(int(y + length * math.cos(angle)), 0), canvas.native_px)
            canvas.line((x, y), (end_x, end_y), width, has_round_ends=True)
            x, y = end_x, end_y


def _draw_boxes(canvas: _Canvas, parameters: _Lama, random: np.random.Generator) -> None:
    for _ in range(random.integers(*parameters.num_boxes, endpoint=True)):
        width, height = (int(side) for side in random.integers(*parameters.box_side, endpoint=True, size=2))
        left, top = (
            int(random.integers(parameters.box_margin, canvas.native_px - parameters.box_margin - side + 1))
            for side in (width, height)
        )
        canvas.box(left, top, width, height)
