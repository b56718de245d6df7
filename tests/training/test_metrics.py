"""The metrics against the formulas, written out pixel by pixel."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.metrics import MAX_PSNR_DB, gaussian_window, masked_l1, masked_psnr_db, masked_ssim

SIDE = 17


def pictures(seed: int, num: int = 2):
    rng = np.random.default_rng(seed)
    target = rng.integers(0, 256, (num, SIDE, SIDE, 3), dtype=np.uint8)
    noise = rng.integers(-40, 41, target.shape)
    predicted = np.clip(target.astype(int) + noise, 0, 255).astype(np.uint8)
    masks = (rng.random((num, SIDE, SIDE)) < 0.3).astype(np.uint8)
    masks[:, 3, 4] = 1
    return predicted, target, masks


@given(st.integers(0, 1000))
@settings(max_examples=5, deadline=None)
def test_psnr_and_l1_are_their_formulas(seed: int):
    predicted, target, masks = pictures(seed)
    for i in range(len(masks)):
        differences = [
            (float(predicted[i, y, x, c]) - float(target[i, y, x, c])) / 255
            for y in range(SIDE)
            for x in range(SIDE)
            if masks[i, y, x]
            for c in range(3)
        ]
        l1 = math.fsum(map(abs, differences)) / len(differences)
        psnr = -10 * math.log10(math.fsum(d * d for d in differences) / len(differences))
        assert masked_l1(predicted, target, masks)[i] == pytest.approx(l1, rel=1e-12)
        assert masked_psnr_db(predicted, target, masks)[i] == pytest.approx(psnr, rel=1e-12)


def test_ssim_is_its_formula():
    predicted, target, masks = pictures(5, num=1)
    offsets = range(-5, 6)
    weights = {(u, v): math.exp(-(u * u + v * v) / (2 * 1.5**2)) for u in offsets for v in offsets}
    total = math.fsum(weights.values())

    def blurred(values: np.ndarray, y: int, x: int) -> float:
        return math.fsum(
            w / total * values[y + u, x + v] for (u, v), w in weights.items() if 0 <= y + u < SIDE and 0 <= x + v < SIDE
        )

    found = []
    for y, x in np.argwhere(masks[0]):
        for c in range(3):
            a, b = predicted[0, ..., c] / 255, target[0, ..., c] / 255
            ma, mb = blurred(a, y, x), blurred(b, y, x)
            va, vb, ab = (
                blurred(a * a, y, x) - ma * ma,
                blurred(b * b, y, x) - mb * mb,
                blurred(a * b, y, x) - ma * mb,
            )
            found.append((2 * ma * mb + 1e-4) * (2 * ab + 9e-4) / ((ma * ma + mb * mb + 1e-4) * (va + vb + 9e-4)))
    assert masked_ssim(predicted, target, masks)[0] == pytest.approx(math.fsum(found) / len(found), rel=1e-10)


def test_window_is_symmetric_and_sums_to_one():
    window = gaussian_window()
    assert window.shape == (11,)
    assert window.sum() == pytest.approx(1, abs=1e-15)
    assert (window == window[::-1]).all()
    assert window[5] / window[6] == pytest.approx(math.exp(1 / (2 * 1.5**2)))


def test_equal_pictures_are_perfect_and_floats_are_taken_as_they_are():
    predicted, target, masks = pictures(1)
    assert masked_psnr_db(target, target, masks).tolist() == [MAX_PSNR_DB] * 2
    assert masked_l1(target, target, masks).tolist() == [0, 0]
    assert masked_ssim(target, target, masks) == pytest.approx([1, 1], abs=1e-12)
    for metric in (masked_psnr_db, masked_l1, masked_ssim):
        assert metric(predicted / 255, target / 255, masks) == pytest.approx(metric(predicted, target, masks))


def test_only_the_hole_counts():
    predicted, target, masks = pictures(2)
    elsewhere = np.where(masks[..., None] > 0, predicted, 255 - predicted)
    assert (masked_psnr_db(elsewhere, target, masks) == masked_psnr_db(predicted, target, masks)).all()
    assert (masked_l1(elsewhere, target, masks) == masked_l1(predicted, target, masks)).all()


def test_empty_masks_and_wrong_shapes_are_refused():
    predicted, target, masks = pictures(3)
    masks[1] = 0
    with pytest.raises(ValueError, match="empty"):
        masked_l1(predicted, target, masks)
    with pytest.raises(ValueError, match="expected"):
        masked_l1(predicted, target[:1], masks)
