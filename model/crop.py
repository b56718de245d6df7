"""From a picture of any size to the square that the VAE sees."""

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class CropBox:
    """Where a square was cut: from the picture resized to (width, height), at (top, left); all in pixels."""

    top: int
    left: int
    resized_width: int
    resized_height: int


def central_square(picture: Image.Image, side_px: int) -> tuple[np.ndarray, CropBox]:
    """Resizes the shorter side to ``side_px`` (bicubic, as Stable Diffusion does) and cuts the central square.

    Args:
        picture: Any size and mode; read as RGB.
        side_px: Side of the square.

    Returns:
        uint8, ``(side_px, side_px, 3)``, and where it was cut.
    """
    scale = side_px / min(picture.size)
    width, height = (max(side_px, round(length * scale)) for length in picture.size)
    resized = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    box = CropBox((height - side_px) // 2, (width - side_px) // 2, width, height)
    square = resized.crop((box.left, box.top, box.left + side_px, box.top + side_px))
    return np.array(square), box
