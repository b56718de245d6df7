import numpy as np
import pytest

from model.mask_bank import MaskBank
from model.masks import draw_latent_masks, draw_mask, draw_masks, draw_masks_of
from model.specs import MaskSpec


def half(value: object, dtype: type, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    picture = np.zeros(size, dtype)
    picture[:, : size[1] // 2] = value
    return picture


def many(num_masks: int) -> list[np.ndarray]:
    return [np.eye(64, k=k, dtype=np.uint8) * 255 for k in range(-8 * num_masks, 0, 8)]


@pytest.mark.parametrize("picture", [half(255, np.uint8), half(128, np.uint8), half(0.5, np.float32), half(True, bool)])
def test_half_of_the_full_range_is_one(picture):
    bank = MaskBank([picture], 64)
    mask = draw_mask("user", 64, 0, "a", 0, bank=bank)
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, half(1, np.uint8, (64, 64)))
    assert np.array_equal(draw_latent_masks("user", 64, 0, ["a"], 0, bank=bank)[0], half(1, np.uint8, (8, 8)))


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (half(127, np.uint8), "mask 1: nothing in it is to be repainted"),
        (half(0.49, np.float64), "mask 1: nothing in it"),
        (half(255.0, np.float32), r"mask 1: its values are not all in \[0, 1\]"),
        (half(np.nan, np.float32), r"mask 1: its values are not all in \[0, 1\]"),
        (half(1, np.int32), "mask 1: its dtype is int32"),
        (np.zeros((4, 4, 3), np.uint8), r"mask 1: its shape is \(4, 4, 3\)"),
        (np.zeros((0, 4), np.uint8), r"mask 1: its shape is \(0, 4\)"),
        (np.eye(64, k=1, dtype=np.uint8) * 255, "mask 1: it covers no cell of the latent grid at 64 px"),
    ],
)
def test_what_is_no_mask_is_refused(picture, message):
    with pytest.raises(ValueError, match=message):
        MaskBank([half(255, np.uint8), picture], 64)


def test_a_bank_needs_a_mask_and_the_drawing_s_resolution():
    with pytest.raises(ValueError, match="at least one mask"):
        MaskBank([], 64)
    with pytest.raises(ValueError, match="resolution_px is 32, the bank's is 64"):
        draw_mask("user", 32, 0, "a", 0, bank=MaskBank(many(1), 64))
    with pytest.raises(ValueError, match="'full': a bank of masks goes with 'user'"):
        draw_mask("full", 64, 0, "a", 0, bank=MaskBank(many(1), 64))


def test_the_choice_depends_on_contents_and_name_only():
    pictures = many(5)
    bank, same = MaskBank(pictures, 64), MaskBank([*pictures[::-1], pictures[2]], 64)
    assert bank.files_sha256 == same.files_sha256
    uids = [str(index) for index in range(200)]
    drawn = draw_masks("user", 64, 3, uids, 1, bank=bank)
    assert np.array_equal(drawn, draw_masks("user", 64, 3, uids, 1, bank=same))
    chosen = [bank.choose(3, uid, 1) for uid in uids]
    assert np.bincount(chosen).min() > 20
    assert chosen != [bank.choose(4, uid, 1) for uid in uids]


def test_a_picture_s_variants_are_different_masks_while_there_are_any():
    bank = MaskBank(many(5), 64)
    for uid in "abcdef":
        chosen = [bank.choose(0, uid, variant) for variant in range(10)]
        assert len(set(chosen[:5])) == 5
        assert chosen[5:] == chosen[:5]


def test_a_spec_names_its_files():
    bank, other = MaskBank(many(3), 64), MaskBank(many(2), 64)
    spec = MaskSpec(family="user", resolution_px=64, num_variants=2, seed=4, files_sha256=bank.files_sha256)
    assert MaskSpec.from_json(spec.to_json() | {"files_sha256": list(bank.files_sha256)}) == spec
    assert np.array_equal(draw_masks_of(spec, ["a"], 1, bank), draw_masks("user", 64, 4, ["a"], 1, bank=bank))
    with pytest.raises(ValueError, match="the bank holds 2 masks, the spec names 3"):
        draw_masks_of(spec, ["a"], 1, other)
