"""The rule for a pixel, beside the shapes' definitions in exact arithmetic, point by point."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.raster import Drawing, rasterize, unpack_rows

SIDE = 28
HAIR = Fraction(1, 500)  # in pixels, or their squares: float32 has 24 bits
coordinates = st.integers(-4 * SIDE, 8 * SIDE).map(lambda n: n / 4)
extents = st.integers(1, 8 * SIDE).map(lambda n: n / 4)
directions = st.integers(-16, 16).flatmap(
    lambda n: st.sampled_from([(n / 16, (1 - (n / 16) ** 2) ** 0.5), ((1 - (n / 16) ** 2) ** 0.5, n / 16)])
)


def bits(drawing: Drawing, step: int = 1) -> np.ndarray:
    return unpack_rows(rasterize([drawing], SIDE, step), -(-SIDE // step))[0]


def check(drawn: np.ndarray, depth: Callable[[int, int], Fraction]) -> None:
    """`depth` is how deep a point lies inside, below zero outside; on the edge itself, either will do here."""
    for y in range(SIDE):
        for x in range(SIDE):
            exact = depth(x, y)
            if abs(exact) > HAIR:
                assert drawn[y, x] == (exact > 0), (x, y, float(exact))


def clamp(value: Fraction, low: Fraction, high: Fraction) -> Fraction:
    return max(low, min(value, high))


@settings(deadline=None, max_examples=20)
@given(coordinates, coordinates, directions, extents, extents)
def test_a_stroke_is_a_rectangle_along_its_direction(x0, y0, direction, length, width):
    drawing = Drawing()
    dx, dy = direction
    drawing.add_stroke(x0, y0, dx, dy, length, width)
    exact_dx, exact_dy, half = Fraction(dx), Fraction(dy), Fraction(width) / 2

    def depth(x: int, y: int) -> Fraction:
        right, down = x - Fraction(x0), y - Fraction(y0)
        along, across = exact_dx * right + exact_dy * down, exact_dy * right - exact_dx * down
        return min(along, Fraction(length) - along, half - abs(across))

    check(bits(drawing), depth)


@settings(deadline=None, max_examples=20)
@given(coordinates, coordinates, coordinates, coordinates, extents)
def test_a_segment_is_what_is_near_its_line(x0, y0, x1, y1, width):
    drawing = Drawing()
    drawing.add_segment(x0, y0, x1, y1, width)
    ax, ay, bx, by = map(Fraction, (x0, y0, x1 - x0, y1 - y0))
    square = bx * bx + by * by

    def depth(x: int, y: int) -> Fraction:
        t = clamp(((x - ax) * bx + (y - ay) * by) / square, Fraction(0), Fraction(1)) if square else Fraction(0)
        return Fraction(width) ** 2 / 4 - (ax + t * bx - x) ** 2 - (ay + t * by - y) ** 2

    check(bits(drawing), depth)


@settings(deadline=None, max_examples=20)
@given(coordinates, coordinates, extents, extents, st.integers(0, SIDE).map(float))
def test_a_box_has_round_corners(left, top, width, height, corner_radius):
    drawing = Drawing()
    drawing.add_box(left, top, width, height, corner_radius)
    radius = min(Fraction(corner_radius), Fraction(width) / 2, Fraction(height) / 2)
    x0, y0, x1, y1 = (Fraction(v) for v in (left, top, left + width, top + height))

    def depth(x: int, y: int) -> Fraction:
        inside = min(x - x0, x1 - x, y - y0, y1 - y)
        corner_x, corner_y = clamp(Fraction(x), x0 + radius, x1 - radius), clamp(Fraction(y), y0 + radius, y1 - radius)
        if corner_x != x and corner_y != y:
            return min(inside, radius**2 - (x - corner_x) ** 2 - (y - corner_y) ** 2)
        return inside

    check(bits(drawing), depth)


def test_edges_are_half_open():
    """A width of w pixels covers w of them, not w + 1: the left and the upper edge belong to a shape."""
    box, disc, across = Drawing(), Drawing(), Drawing()
    box.add_box(3, 5, 7, 4, 0)
    assert np.argwhere(bits(box)).tolist() == [[y, x] for y in range(5, 9) for x in range(3, 10)]
    disc.add_segment(14, 14, 14, 14, 6)
    assert np.flatnonzero(bits(disc)[14]).tolist() == list(range(11, 17))
    assert np.flatnonzero(bits(disc).any(axis=1)).tolist() == list(range(12, 17))  # its first row is a point: x < x
    across.add_stroke(4, 10, 0.0, 1.0, 12, 6)
    assert np.argwhere(bits(across)).tolist() == [[y, x] for y in range(10, 22) for x in range(1, 7)]


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(coordinates, coordinates, coordinates, coordinates, extents), max_size=4),
    st.lists(st.tuples(coordinates, coordinates, directions, extents, extents), max_size=4),
    st.lists(st.tuples(coordinates, coordinates, extents, extents, extents), max_size=4),
    st.sampled_from([2, 4, 8, 16]),
)
def test_the_coarse_grid_is_every_step_th_point_of_the_fine_one(segments, strokes, boxes, step):
    drawing = Drawing()
    for segment in segments:
        drawing.add_segment(*segment)
    for x, y, (dx, dy), length, width in strokes:
        drawing.add_stroke(x, y, dx, dy, length, width)
    for box in boxes:
        drawing.add_box(*box)
    assert np.array_equal(bits(drawing, step), bits(drawing)[::step, ::step])


@pytest.mark.parametrize("side", [64, 100, 512])
def test_drawings_do_not_touch_one_another(side):
    drawings = []
    for index in range(60):  # more rows than one pass takes
        drawing = Drawing()
        drawing.add_segment(index, 2 * index, side - index, side, 9.0)
        drawing.add_stroke(index, index, 0.6, 0.8, side / 2, 20.0)
        drawing.add_box(index, 0, 5, 5, 2)
        drawings.append(drawing)
    together = unpack_rows(rasterize(drawings, side), side)
    alone = [unpack_rows(rasterize([drawing], side), side)[0] for drawing in drawings]
    assert np.array_equal(together, np.stack(alone))
    assert unpack_rows(rasterize([Drawing()], side), side).sum() == 0
