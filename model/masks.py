"""Masks: which part of a picture is to be repainted. 1 = repaint, 0 = keep.

Two kinds of generator, as published:

* `sd_*`: independent straight strokes with flat ends, or a few boxes, one kind per mask (Esser's re-implementation, on
  which Stable Diffusion's inpainting models were trained: `sd_512train_large` with `p_full` 0.25).
* `lama_*`: chains of connected strokes with round ends, or boxes (LaMa: Suvorov et al. 2021). Thin, medium and thick
  are for evaluation and refuse masks that cover more than half of the picture.

Besides, `full` is all ones, and `user` takes the user's own masks, from a `model.mask_bank.MaskBank`.

A mask is a pure function of (family, resolution, seed, uid, variant): its random numbers are the output of a hash of
that name, and its pixels follow `model.raster`'s formulas. Neither changes with the process, the order, the machine, or
the release of Python or numpy. Every family is stated at its native resolution, in pixels, and is drawn at any other in
proportion: mask k of a picture has the same shape at 64 px and at 512 px.

`p_full` replaces a mask by all ones, with a coin of its own: the other masks stay what they are. Datasets keep it 0:
the all-ones mask of 25 % of the training samples is drawn anew at each visit, by the trainer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Bool, UInt8

from model.mask_bank import MaskBank
from model.randomness import integers
from model.raster import Drawing, PackedRows, rasterize, unpack_rows
from model.specs import FULL_FAMILY, LATENT_FACTOR, MASK_FAMILIES, USER_FAMILY, MaskSpec

MAX_EVALUATION_AREA: Final = 0.5
MAX_SEGMENTS: Final = 5
"""Of one of LaMa's chains."""

_MAX_ATTEMPTS: Final = 1000
_WORD: Final = 1 << 32
_EVERY_EIGHTH_BIT: Final = np.uint64(0x8080808080808080)

Mask = UInt8[np.ndarray, "height width"]
Masks = UInt8[np.ndarray, "masks height width"]
Below = Callable[[int], int]
"""n → the next random integer in [0, n); of 2^32 it is a whole word, which a probability is compared with."""


def _fixed_point(value: float) -> float:
    """A multiple of 2^-16: what a machine's libm makes of the last bits does not matter."""
    return round(value * 65536) / 65536


# The published angles are integers, read as radians: a direction like any other. (sin, cos).
_SD_DIRECTIONS: Final = [(_fixed_point(math.sin(a)), _fixed_point(math.cos(a))) for a in range(360)]
_LAMA_DIRECTIONS: Final = [(_fixed_point(math.sin(a + 0.01)), _fixed_point(math.cos(a + 0.01))) for a in range(8)]


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

    @property
    def max_words(self) -> int:
        """Random words that a mask takes at most."""
        return 3 + max(5 * self.num_strokes[1], 6 * self.num_boxes[1])


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
    max_angle: int = 4
    box_weight: float = 0.0
    num_boxes: tuple[int, int] = (0, 0)
    box_side: tuple[int, int] = (0, 0)
    box_margin: int = 0
    is_evaluation: bool = True

    @property
    def max_words(self) -> int:
        """Random words that a mask takes at most."""
        return 3 + max(self.num_chains[1] * (3 + 3 * MAX_SEGMENTS), 4 * self.num_boxes[1])


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
assert {*_FAMILIES, FULL_FAMILY} == set(MASK_FAMILIES)


def draw_mask(
    family: str,
    resolution_px: int,
    seed: int,
    uid: str,
    variant: int,
    *,
    p_full: float = 0.0,
    bank: MaskBank | None = None,
) -> Mask:
    """Draws one mask: `draw_masks` of one uid."""
    return draw_masks(family, resolution_px, seed, [uid], variant, p_full=p_full, bank=bank)[0]


def draw_latent_mask(
    family: str,
    resolution_px: int,
    seed: int,
    uid: str,
    variant: int,
    factor: int = LATENT_FACTOR,
    *,
    p_full: float = 0.0,
    bank: MaskBank | None = None,
) -> Mask:
    """Draws one mask on the latent grid: `draw_latent_masks` of one uid."""
    return draw_latent_masks(family, resolution_px, seed, [uid], variant, factor, p_full=p_full, bank=bank)[0]


def draw_masks(
    family: str,
    resolution_px: int,
    seed: int,
    uids: Sequence[str],
    variant: int,
    *,
    p_full: float = 0.0,
    bank: MaskBank | None = None,
) -> Masks:
    """Draws a mask for each uid; many at once are drawn faster than one by one, and are the same.

    Each mask covers at least one cell of the latent grid; those of the evaluation families cover at most half of the
    picture, at full resolution. A mask that does not is drawn again from the next stream of the same name.

    Args:
        family: one of `model.specs.MASK_FAMILIES`, or `user`.
        resolution_px: side of the squares, in pixels; at least 8.
        seed: root of the randomness.
        uids: the pictures'.
        variant: which of each picture's masks, 0, 1, ….
        p_full: probability that a mask is replaced by all ones.
        bank: the user's masks, for the family `user`.

    Returns:
        {0, 1}, 1 = repaint.

    Raises:
        ValueError: an unknown family, `user` without a bank, a resolution below one latent cell, or a `p_full` that is
            no probability.
    """
    return _draw(family, resolution_px, seed, uids, variant, 1, p_full, bank)


def draw_latent_masks(
    family: str,
    resolution_px: int,
    seed: int,
    uids: Sequence[str],
    variant: int,
    factor: int = LATENT_FACTOR,
    *,
    p_full: float = 0.0,
    bank: MaskBank | None = None,
) -> Masks:
    """Draws a mask for each uid on the latent grid: exactly `to_latent_mask` of what `draw_masks` gives.

    Only every `factor`-th pixel of every `factor`-th row is computed, except that whether an evaluation mask covers too
    much is seen at full resolution.

    Args:
        family: as for `draw_masks`; so are the other arguments.
        resolution_px: side of the full masks, in pixels.
        seed: root of the randomness.
        uids: the pictures'.
        variant: which of each picture's masks.
        factor: pixels per latent cell, along one side; a power of two.
        p_full: probability that a mask is replaced by all ones.
        bank: the user's masks.

    Raises:
        ValueError: as for `draw_masks`, or a factor that is no power of two.
    """
    if factor < 1 or factor & (factor - 1):
        raise ValueError(f"factor is {factor}: it must be a power of two")
    return _draw(family, resolution_px, seed, uids, variant, factor, p_full, bank)


def draw_masks_of(spec: MaskSpec, uids: Sequence[str], variant: int, bank: MaskBank | None = None) -> Masks:
    """Draws the masks that a spec names, at full resolution.

    Args:
        spec: what was, or is to be, drawn.
        uids: the pictures'.
        variant: which of each picture's masks.
        bank: the user's masks, for the family `user`; their sha256 must be the spec's.

    Raises:
        ValueError: as for `draw_masks`, or a bank of other masks than the spec's.
    """
    if bank is not None and bank.files_sha256 != spec.files_sha256:
        raise ValueError(
            f"the bank holds {len(bank.files_sha256)} masks, the spec names {len(spec.files_sha256)}, "
            "and their sha256 differ; give the files that the spec names"
        )
    return draw_masks(spec.family, spec.resolution_px, spec.seed, uids, variant, p_full=spec.p_full, bank=bank)


def to_latent_mask(
    mask: UInt8[np.ndarray, "*batch height width"], factor: int = LATENT_FACTOR
) -> UInt8[np.ndarray, "*batch h w"]:
    """The mask, or masks, on the latent grid: nearest neighbor, exactly `mask[..., ::factor, ::factor]`.

    Strokes thinner than a cell may vanish here while they still grey the picture: the published models saw the same.
    """
    return np.ascontiguousarray(mask[..., ::factor, ::factor])


def pack_masks(masks: Masks) -> UInt8[np.ndarray, "masks bytes"]:
    """A bit per cell, row by row, most significant bit first, each mask padded with zeros to whole bytes."""
    return np.packbits(masks.reshape(len(masks), math.prod(masks.shape[1:])), axis=1)


def unpack_mask(data: bytes | memoryview, shape: tuple[int, int]) -> Mask:
    """The inverse of `pack_masks`, of one mask.

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


def _draw(
    family: str,
    resolution_px: int,
    seed: int,
    uids: Sequence[str],
    variant: int,
    step: int,
    p_full: float,
    bank: MaskBank | None,
) -> Masks:
    _check(family, resolution_px, p_full, bank)
    if family == USER_FAMILY:
        assert bank is not None
        masks = bank.masks([bank.choose(seed, uid, variant) for uid in uids])[:, ::step, ::step].copy()
    elif family == FULL_FAMILY:
        return np.ones((len(uids), -(-resolution_px // step), -(-resolution_px // step)), dtype=np.uint8)
    else:
        packed = _draw_packed(family, resolution_px, seed, uids, variant, step)
        masks = unpack_rows(packed, -(-resolution_px // step))
    if p_full:
        for index, uid in enumerate(uids):
            coin = integers(1, "full mask", seed, variant, uid)
            if coin(_WORD) < p_full * _WORD:
                masks[index] = 1
    return masks


def _check(family: str, resolution_px: int, p_full: float, bank: MaskBank | None) -> None:
    if family not in MASK_FAMILIES and family != USER_FAMILY:
        raise ValueError(f"mask family is {family!r}: choose one of {', '.join((*MASK_FAMILIES, USER_FAMILY))}")
    if (family == USER_FAMILY) != (bank is not None):
        raise ValueError(f"mask family is {family!r}: a bank of masks goes with {USER_FAMILY!r}, and only with it")
    if bank is not None and bank.resolution_px != resolution_px:
        raise ValueError(f"resolution_px is {resolution_px}, the bank's is {bank.resolution_px}: make them equal")
    if resolution_px < LATENT_FACTOR:
        raise ValueError(f"resolution_px is {resolution_px}: it must be at least {LATENT_FACTOR}")
    if not 0 <= p_full <= 1:
        raise ValueError(f"p_full is {p_full}: a probability is in [0, 1]")


def _draw_packed(
    family: str, resolution_px: int, seed: int, uids: Sequence[str], variant: int, step: int
) -> PackedRows:
    """Draws, looks, and draws again what is not acceptable."""
    parameters = _FAMILIES[family]
    # The latent grid suffices to see that a mask is not empty there, but not to measure it.
    looked_at = LATENT_FACTOR if step == LATENT_FACTOR and not parameters.is_evaluation else 1
    packed: PackedRows | None = None
    pending = list(range(len(uids)))
    for attempt in range(_MAX_ATTEMPTS):
        drawings = [_drawing(family, resolution_px, seed, uids[index], variant, attempt) for index in pending]
        drawn = rasterize(drawings, resolution_px, looked_at)
        is_good = _acceptable(drawn, resolution_px, looked_at, parameters.is_evaluation)
        if looked_at != step:
            drawn = rasterize(drawings, resolution_px, step)
        if packed is None:
            packed = drawn
        else:
            packed[pending] = drawn
        if is_good.all():
            return packed
        pending = [index for index, good in zip(pending, is_good, strict=True) if not good]
    raise AssertionError(f"no acceptable {family} mask at {resolution_px} px in {_MAX_ATTEMPTS} attempts")


def _acceptable(packed: PackedRows, resolution_px: int, step: int, is_evaluation: bool) -> Bool[np.ndarray, " masks"]:
    on_latent_grid = packed if step == LATENT_FACTOR else packed[:, ::LATENT_FACTOR] & _EVERY_EIGHTH_BIT
    is_good = np.bitwise_or.reduce(on_latent_grid, axis=(1, 2)) != 0
    if is_evaluation:
        areas_px = np.bitwise_count(packed).sum(axis=(1, 2), dtype=np.int64)
        is_good &= areas_px <= MAX_EVALUATION_AREA * resolution_px**2
    return is_good


def _drawing(family: str, resolution_px: int, seed: int, uid: str, variant: int, attempt: int) -> Drawing:
    parameters = _FAMILIES[family]
    below = integers(parameters.max_words, "mask", family, attempt, seed, variant, uid)
    drawing = Drawing()
    scale = resolution_px / parameters.native_px
    if isinstance(parameters, _StableDiffusion):
        if below(_WORD) < parameters.stroke_probability * _WORD:
            _draw_strokes(drawing, parameters, scale, below)
        else:
            _draw_rounded_boxes(drawing, parameters, scale, below)
    elif below(_WORD) * (1 + parameters.box_weight) < _WORD:
        _draw_chains(drawing, parameters, scale, below)
    else:
        _draw_boxes(drawing, parameters, scale, below)
    return drawing


def _draw_strokes(drawing: Drawing, parameters: _StableDiffusion, scale: float, below: Below) -> None:
    """Separate strokes. Their source speaks of a chain, but draws a new start for each."""
    (min_num, max_num), (min_length, max_length) = parameters.num_strokes, parameters.stroke_length
    min_width, max_width = parameters.stroke_width
    for _ in range(min_num + below(max_num - min_num)):
        x, y = below(parameters.native_px), below(parameters.native_px)
        dx, dy = _SD_DIRECTIONS[below(360)]
        length, width = min_length + below(max_length - min_length), min_width + below(max_width - min_width)
        drawing.add_stroke(x * scale, y * scale, dx, dy, length * scale, width * scale)


def _draw_rounded_boxes(drawing: Drawing, parameters: _StableDiffusion, scale: float, below: Below) -> None:
    """Rectangles, or squares with rounded corners that take the width for the height and may leave the canvas."""
    (min_num, max_num), (min_side, max_side) = parameters.num_boxes, parameters.box_side
    margin = parameters.box_margin
    room = parameters.native_px - 2 * margin + 1  # less the side of a box: the number of places for it
    for _ in range(min_num + below(max_num - min_num)):
        height, width = min_side + below(max_side - min_side), min_side + below(max_side - min_side)
        left, top = margin + below(room - width), margin + below(room - height)
        is_square, radius = below(2), below(60)
        if is_square:
            drawing.add_box(left * scale, top * scale, width * scale, width * scale, radius * scale)
        else:
            drawing.add_box(left * scale, top * scale, width * scale, height * scale)


def _draw_chains(drawing: Drawing, parameters: _Lama, scale: float, below: Below) -> None:
    """Chains of up to five segments, each of which begins where the one before it ended."""
    (min_num, max_num), (min_length, max_length) = parameters.num_chains, parameters.segment_length
    min_width, max_width = parameters.segment_width
    side = parameters.native_px
    for chain in range(min_num + below(max_num - min_num + 1)):
        x, y = below(side), below(side)
        mirror = -1 if chain % 2 == 0 else 1  # 2π - angle
        for _ in range(1 + below(MAX_SEGMENTS)):
            sine, cosine = _LAMA_DIRECTIONS[below(parameters.max_angle)]
            length = min_length + below(max_length - min_length + 1)
            width = min_width + below(max_width - min_width + 1)
            end_x, end_y = int(x + mirror * length * sine), int(y + length * cosine)
            end_x, end_y = min(max(end_x, 0), side), min(max(end_y, 0), side)
            drawing.add_segment(x * scale, y * scale, end_x * scale, end_y * scale, width * scale)
            x, y = end_x, end_y


def _draw_boxes(drawing: Drawing, parameters: _Lama, scale: float, below: Below) -> None:
    (min_num, max_num), (min_side, max_side) = parameters.num_boxes, parameters.box_side
    margin = parameters.box_margin
    room = parameters.native_px - 2 * margin + 1  # less the side of a box: the number of places for it
    for _ in range(min_num + below(max_num - min_num + 1)):
        width, height = min_side + below(max_side - min_side + 1), min_side + below(max_side - min_side + 1)
        left, top = margin + below(room - width), margin + below(room - height)
        drawing.add_box(left * scale, top * scale, width * scale, height * scale)
