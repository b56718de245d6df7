"""From a picture of any size to the square that the VAE sees, and back from the bytes in which a dataset keeps it."""

import io
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


def decode_crop(encoded: bytes) -> np.ndarray:
    """The crop that a dataset keeps: the very pixels whose moments it stores.

    One decoder for the encode stage, its checks and the training, since two decoders of JPEG may differ by a bit.

    Args:
        encoded: A PNG or a JPEG.

    Returns:
        uint8, ``(side, side, 3)``, RGB, read-only.

    Raises:
        ValueError: It cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=["PNG", "JPEG"]) as picture:
            return np.asarray(picture.convert("RGB"))
    except (ValueError, OSError, SyntaxError) as error:  # Pillow's, of a PNG that breaks off in its middle
        raise ValueError(f"image: a crop cannot be decoded ({error}); encode the dataset again") from error
