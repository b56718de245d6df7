"""How near a repainted hole is to what was there: PSNR, SSIM and L1, inside the mask only.

All three take pictures as uint8, or as floats in [0, 1], with channels last, and give one float64 a picture. They are
averages over the masked pixels and the three channels, so pictures with small holes count as much as those with large
ones.
"""

from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

MAX_PSNR_DB: Final = 100.0
"""A perfect hole would have an infinite PSNR, and one such would spoil every mean."""

_WINDOW: Final = 11
_SIGMA: Final = 1.5
_C1: Final = 0.01**2
_C2: Final = 0.03**2


def masked_l1(predicted: np.ndarray, target: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Mean absolute difference inside the mask.

    Args:
        predicted: (batch, height, width, 3), uint8 or floats in [0, 1].
        target: The same.
        masks: (batch, height, width), {0, 1}; 1 is the hole.

    Returns:
        (batch,) float64 in [0, 1].

    Raises:
        ValueError: A mask is empty, or shapes differ.
    """
    predicted, target, weights = _checked(predicted, target, masks)
    return _masked_mean(np.abs(predicted - target).mean(axis=-1), weights)


def masked_psnr_db(predicted: np.ndarray, target: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio inside the mask: 10 log10(1 / mean squared error), in dB, at most 100.

    Args:
        predicted: (batch, height, width, 3), uint8 or floats in [0, 1].
        target: The same.
        masks: (batch, height, width), {0, 1}; 1 is the hole.

    Returns:
        (batch,) float64; higher is nearer.

    Raises:
        ValueError: A mask is empty, or shapes differ.
    """
    predicted, target, weights = _checked(predicted, target, masks)
    mean_squared = _masked_mean(((predicted - target) ** 2).mean(axis=-1), weights)
    return -10 * np.log10(np.maximum(mean_squared, 10 ** (-MAX_PSNR_DB / 10)))


def masked_ssim(predicted: np.ndarray, target: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Structural similarity, averaged over the masked pixels of its map.

    The window is a Gaussian, 11 × 11, σ 1.5, and sees zeros beyond the border, as LaMa's evaluation has it; so
    surroundings of a hole count in as far as the window reaches.

    Args:
        predicted: (batch, height, width, 3), uint8 or floats in [0, 1].
        target: The same.
        masks: (batch, height, width), {0, 1}; 1 is the hole.

    Returns:
        (batch,) float64, at most 1.

    Raises:
        ValueError: A mask is empty, or shapes differ.

    Source: Wang et al. 2004, eq. 13; advimman/lama `saicinpainting/evaluation/losses/ssim.py`.
    """
    predicted, target, weights = _checked(predicted, target, masks)
    x, y = (torch.from_numpy(images).permute(0, 3, 1, 2) for images in (predicted, target))
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x, variance_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    ssim = ((2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)) / (
        (mean_x**2 + mean_y**2 + _C1) * (variance_x + variance_y + _C2)
    )
    return _masked_mean(ssim.mean(dim=1).numpy(), weights)


def gaussian_window() -> np.ndarray:
    """The window of `masked_ssim` along one axis: (11,) float64, sum 1."""
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    window = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    return window / window.sum()


def _blurred(images: Tensor) -> Tensor:
    """The Gaussian window's mean around each pixel, one axis after the other, channel by channel."""
    channels = images.shape[1]
    window = torch.from_numpy(gaussian_window())
    rows = window.reshape(1, 1, 1, _WINDOW).expand(channels, 1, 1, _WINDOW)
    columns = window.reshape(1, 1, _WINDOW, 1).expand(channels, 1, _WINDOW, 1)
    half = _WINDOW // 2
    across = functional.conv2d(images, rows, padding=(0, half), groups=channels)
    return functional.conv2d(across, columns, padding=(half, 0), groups=channels)


def _checked(predicted: np.ndarray, target: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both pictures as float64 in [0, 1], and the mask as float64."""
    if predicted.shape != target.shape or predicted.shape[:-1] != masks.shape or predicted.ndim != 4:
        raise ValueError(
            f"pictures {predicted.shape} and {target.shape}, masks {masks.shape}: expected (batch, height, width, 3) "
            "twice and (batch, height, width)"
        )
    if not masks.any(axis=(1, 2)).all():
        raise ValueError("a mask is empty: nothing in it can be measured")
    return _unit(predicted), _unit(target), masks.astype(np.float64)


def _unit(images: np.ndarray) -> np.ndarray:
    scaled = images.astype(np.float64)
    return scaled / 255 if images.dtype == np.uint8 else scaled


def _masked_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (values * weights).sum(axis=(1, 2)) / weights.sum(axis=(1, 2))
