"""The user's own masks, as pictures, and which of them a training picture wears."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from model.randomness import integers
from model.specs import LATENT_FACTOR


class MaskBank:
    """Masks given as pictures: bright = 1 = repaint. They are stretched to squares: nearest neighbor.

    Args:
        pictures: (height, width) arrays of any size, uint8 in [0, 255], float in [0, 1], or bool. What is at least half
            of the full range is 1.
        resolution_px: Side of the squares.
        files_sha256: What identifies each, by default the sha256 of its values; the masks are put in the order of
            these, so that neither names nor the order of files matter. Of equal ones, one is kept.
        names: What to call each in messages.

    Raises:
        ValueError: There is no mask, or one is no mask, or covers no cell of the latent grid; names it.
    """

    def __init__(
        self,
        pictures: Sequence[np.ndarray],
        resolution_px: int,
        files_sha256: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
    ):
        names = names or [f"mask {index}" for index in range(len(pictures))]
        hashes = files_sha256 or [_content_sha256(picture) for picture in pictures]
        if not hashes:
            raise ValueError("a bank of masks needs at least one mask")
        found = {
            sha256: np.packbits(_fitted(picture, resolution_px, name))
            for sha256, picture, name in zip(hashes, pictures, names, strict=True)
        }
        self.resolution_px = resolution_px
        self.files_sha256: tuple[str, ...] = tuple(sorted(found))
        self._packed = np.stack([found[sha256] for sha256 in self.files_sha256])

    def __len__(self) -> int:
        return len(self._packed)

    def choose(self, seed: int, uid: str, variant: int) -> int:
        """Which mask a picture wears: its variants take turns from a start of its own, so that they differ.

        Where there are fewer masks than variants, they begin again.
        """
        start = integers(1, "mask bank", seed, uid)(len(self))
        return (start + variant) % len(self)

    def masks(self, indices: Sequence[int]) -> UInt8[np.ndarray, "masks height width"]:
        """The masks of these numbers."""
        side = self.resolution_px
        return np.unpackbits(self._packed[list(indices)], axis=1, count=side * side).reshape(-1, side, side)


def _content_sha256(picture: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(f"{picture.shape} {picture.dtype.str}:".encode() + picture.tobytes()).hexdigest()


def _fitted(picture: np.ndarray[Any, Any], resolution_px: int, name: str) -> UInt8[np.ndarray, "height width"]:
    mask = _binarized(picture, name)
    rows, columns = (np.arange(resolution_px) * side // resolution_px for side in mask.shape)
    fitted = mask[np.ix_(rows, columns)]
    if not fitted[::LATENT_FACTOR, ::LATENT_FACTOR].any():
        raise ValueError(
            f"{name}: it covers no cell of the latent grid at {resolution_px} px; "
            "give a mask with a larger area to be repainted (bright = repaint)"
        )
    return fitted


def _binarized(picture: np.ndarray[Any, Any], name: str) -> UInt8[np.ndarray, "height width"]:
    if picture.ndim != 2 or 0 in picture.shape:
        raise ValueError(f"{name}: its shape is {picture.shape}; a mask is (height, width)")
    if picture.dtype == np.bool_:
        mask = picture
    elif picture.dtype == np.uint8:
        mask = picture >= 128
    elif np.issubdtype(picture.dtype, np.floating):
        if not ((picture >= 0) & (picture <= 1)).all():  # NaN is refused too
            raise ValueError(f"{name}: its values are not all in [0, 1]; divide them by their full range")
        mask = picture >= 0.5
    else:
        raise ValueError(f"{name}: its dtype is {picture.dtype}; give uint8, bool, or float in [0, 1]")
    if not mask.any():
        raise ValueError(f"{name}: nothing in it is to be repainted; a mask is at least half bright somewhere")
    return mask.astype(np.uint8)
