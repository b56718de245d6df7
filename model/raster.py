"""Shapes to bits: which points of a grid lie inside a union of convex shapes.

Why not an imaging library: its rule for a pixel on an edge changes between releases, and it cannot be asked for every
eighth pixel only. Here the rule is a formula. A shape covers, of each row ``y``, one half-open interval
``lo(y) <= x < hi(y)``, where ``lo`` and ``hi`` are float32 expressions (their coefficients float64 ones, rounded once)
of ``+ - * / sqrt`` alone, which IEEE 754 rounds in one way: the same bits on every machine. The coarse grid asks the
same formula at fewer points, so what it says is what the fine grid says there.

Rows are 64-bit words until the end: an interval is the exclusive or of two rows of a table, a union is an or.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, sqrt
from typing import Final

import numpy as np
from jaxtyping import Float32, UInt8, UInt64

_FAR: Final = 1e9
_ROWS_AT_ONCE: Final = 2048
"""Rows of shapes per pass: enough that numpy's overhead does not count, few enough to stay in the cache."""

PackedRows = UInt64[np.ndarray, "masks height words"]
_Rows = Float32[np.ndarray, " rows"]
_Parameters = Float32[np.ndarray, "parameters rows"]
_Bounds = Float32[np.ndarray, "2 rows"]
_Shapes = list[tuple[float, ...]]


@dataclass(slots=True)
class Drawing:
    """The shapes of one mask, in pixels of the fine grid. Each begins with its rows: top <= y < bottom.

    Attributes:
        boxes: (top, bottom, left, right).
        bands: Rectangles at any angle. (top, bottom, start, slope, extent, start, slope, extent): the points between
            the lines x = start + slope * y and that plus extent, of both pairs of parallel lines.
        rounds: What a disc covers that goes along a segment, or around a box: (top, bottom, start, extent, tilt, slope,
            left, right, radius squared). Rows count from `start`. The edge at the left of a row is the disc's whose
            centre is at ``row - tilt``, but in [0, extent], and there at x = left + slope * row; at the right likewise
            with ``row + tilt``.
    """

    boxes: _Shapes = field(default_factory=list)
    bands: _Shapes = field(default_factory=list)
    rounds: _Shapes = field(default_factory=list)

    def add_stroke(self, x: float, y: float, dx: float, dy: float, length: float, width: float) -> None:
        """A straight stroke with flat ends: a rectangle from (x, y) in the direction (dx, dy), a unit vector.

        Of a point's offset from (x, y), the part along the stroke is in [0, length], the part across it in
        [-width / 2, width / 2].
        """
        # A pair of lines that are level has no x for a y: the limits of the rows say what it says.
        start_across = start_along = -_FAR
        slope_across = slope_along = 0.0
        extent_across = extent_along = 2 * _FAR
        if dy:
            slope_across, extent_across = dx / dy, width / abs(dy)
            start_across = x - slope_across * y - extent_across / 2
        if dx:
            slope_along, extent_along = -dy / dx, length / abs(dx)
            start_along = x - slope_along * y - (extent_along if dx < 0 else 0.0)
        reach, overhang = length * dy, abs(dx) * width / 2
        self.bands.append(
            (
                (y + reach if reach < 0 else y) - overhang,
                (y + reach if reach > 0 else y) + overhang,
                start_across,
                slope_across,
                extent_across,
                start_along,
                slope_along,
                extent_along,
            )
        )

    def add_segment(self, x0: float, y0: float, x1: float, y1: float, width: float) -> None:
        """A segment with round ends: the points within width / 2 of the line from (x0, y0) to (x1, y1)."""
        if y0 > y1:
            x0, y0, x1, y1 = x1, y1, x0, y0
        radius, dx, dy = width / 2, x1 - x0, y1 - y0
        if dy:
            slope, tilt, left, right = dx / dy, radius * dx / sqrt(dx * dx + dy * dy), x0, x0
        else:
            slope, tilt, left, right = 0.0, 0.0, min(x0, x1), max(x0, x1)
        self.rounds.append((y0 - radius, y1 + radius, y0, dy, tilt, slope, left, right, radius * radius))

    def add_box(self, left: float, top: float, width: float, height: float, corner_radius: float = 0.0) -> None:
        """A rectangle with round corners, whose radius is at most half of the shorter side; it may leave the canvas."""
        right, bottom = left + width, top + height
        radius = min(corner_radius, width / 2, height / 2) if corner_radius else 0.0
        self.boxes.append((top + radius, bottom - radius, left, right))
        if radius:
            disc = (top + radius, height - 2 * radius, 0.0, 0.0, left + radius, right - radius, radius * radius)
            self.rounds += [(top, top + radius, *disc), (bottom - radius, bottom, *disc)]


def rasterize(drawings: Sequence[Drawing], side_px: int, step: int = 1) -> PackedRows:
    """Paints each drawing on a square grid of its own.

    Args:
        drawings: The shapes.
        side_px: Of the fine grid.
        step: Only points whose coordinates are multiples of it; a power of two, so that dividing by it is exact.

    Returns:
        A bit per point, rows padded with zeros to whole words; as bytes, the most significant bit comes first.
    """
    num_cells = -(-side_px // step)
    table = _prefixes(num_cells)
    packed = np.zeros((len(drawings) * num_cells, table.shape[1]), dtype=np.uint64)
    bands, rounds = _Pass(_band_bounds), _Pass(_round_bounds)
    for index, drawing in enumerate(drawings):
        place = index * num_cells
        for top, bottom, left, right in drawing.boxes:
            first, last = _cells_before(top, step, num_cells), _cells_before(bottom, step, num_cells)
            lo, hi = _cells_before(left, step, num_cells), _cells_before(right, step, num_cells)
            rows = packed[place + first : place + last]
            np.bitwise_or(rows, table[lo] ^ table[hi], out=rows)
        for shapes, one_pass in ((drawing.bands, bands), (drawing.rounds, rounds)):
            if shapes:
                one_pass.add(shapes, place, step, num_cells)
                if one_pass.num_rows >= _ROWS_AT_ONCE:
                    one_pass.paint(packed, table, step)
    bands.paint(packed, table, step)
    rounds.paint(packed, table, step)
    return packed.reshape(len(drawings), num_cells, table.shape[1])


def unpack_rows(packed: PackedRows, num_cells: int) -> UInt8[np.ndarray, "masks height width"]:
    """Bits to bytes, 0 or 1 for each point, without the padding."""
    if num_cells % 64:
        return np.unpackbits(packed.view(np.uint8), axis=-1, count=num_cells)
    return np.unpackbits(packed.view(np.uint8).reshape(-1)).reshape(len(packed), num_cells, num_cells)


def _cells_before(edge: float, step: int, num_cells: int) -> int:
    """How many points of a row or column lie before an edge."""
    count = ceil(edge / step)
    return 0 if count < 0 else num_cells if count > num_cells else count


class _Pass:
    """Shapes of one kind, of many drawings, that are painted in one go."""

    def __init__(self, bounds_of: Callable[[_Rows, _Parameters], _Bounds]):
        self._bounds_of = bounds_of
        self._clear()

    def _clear(self) -> None:
        self.num_rows = 0
        self._shapes: _Shapes = []
        self._firsts: list[int] = []
        self._places: list[int] = []
        self._counts: list[int] = []

    def add(self, shapes: _Shapes, place: int, step: int, num_cells: int) -> None:
        """Notes the shapes of a drawing whose row 0 is row `place` of all."""
        num_rows = self.num_rows
        for shape in shapes:  # written out, and not as nice as `_cells_before`, because of thin masks' hundred shapes
            first, last = ceil(shape[0] / step), ceil(shape[1] / step)
            if first < 0:
                first = 0
            if last > num_cells:
                last = num_cells
            if first < last:
                self._shapes.append(shape)
                self._firsts.append(first - num_rows)
                self._places.append(place + first)
                self._counts.append(last - first)
                num_rows += last - first
        self.num_rows = num_rows

    def paint(self, packed: np.ndarray, table: np.ndarray, step: int) -> None:
        """Paints what was noted, and forgets it."""
        if not self._shapes:
            return
        shapes = np.array(self._shapes, dtype=np.float32).T
        shapes[0] = self._firsts
        parameters = shapes.repeat(self._counts, axis=1)
        y = parameters[0]
        y += np.arange(self.num_rows, dtype=np.float32)
        if step != 1:
            y *= step
        bounds = self._bounds_of(y, parameters)
        if step != 1:
            bounds /= step
        np.minimum(bounds[0], bounds[1], out=bounds[0])
        np.ceil(bounds, out=bounds)
        index = bounds.astype(np.intp)
        spans = table.take(index[0], axis=0, mode="clip")  # what is off the canvas begins or ends at its edge
        spans ^= table.take(index[1], axis=0, mode="clip")
        start = 0
        for place, count in zip(self._places, self._counts, strict=True):
            rows = packed[place : place + count]
            np.bitwise_or(rows, spans[start : start + count], out=rows)
            start += count
        self._clear()


def _band_bounds(y: _Rows, parameters: _Parameters) -> _Bounds:
    _, _, start_across, slope_across, extent_across, start_along, slope_along, extent_along = parameters
    bounds = np.empty((2, len(y)), dtype=np.float32)
    across = slope_across * y
    across += start_across
    along = slope_along * y
    along += start_along
    np.maximum(across, along, out=bounds[0])
    across += extent_across
    along += extent_along
    np.minimum(across, along, out=bounds[1])
    return bounds


def _round_bounds(y: _Rows, parameters: _Parameters) -> _Bounds:
    _, _, start, extent, tilt, slope, left, right, square = parameters
    row = y - start
    centre = np.empty((2, len(y)), dtype=np.float32)
    np.subtract(row, tilt, out=centre[0])
    np.add(row, tilt, out=centre[1])
    np.maximum(centre, 0, out=centre)
    np.minimum(centre, extent, out=centre)
    bounds = slope * centre
    bounds[0] += left
    bounds[1] += right
    centre -= row
    centre *= centre
    np.subtract(square, centre, out=centre)
    np.abs(centre, out=centre)  # rounding may leave a hair below zero
    np.sqrt(centre, out=centre)
    bounds[0] -= centre[0]
    bounds[1] += centre[1]
    return bounds


@functools.lru_cache(maxsize=8)
def _prefixes(num_cells: int) -> UInt64[np.ndarray, "lengths words"]:
    """Row k has its first k bits set."""
    bits = np.zeros((num_cells + 1, -(-num_cells // 64) * 64), dtype=np.uint8)
    bits[:, :num_cells] = np.tri(num_cells + 1, num_cells, -1, dtype=np.uint8)
    return np.packbits(bits, axis=1).view(np.uint64)
