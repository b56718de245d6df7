"""Decoding of the crops that a dataset keeps."""

import io

import numpy as np
from PIL import Image

from infra.errors import ContractError


def decode_crop(encoded: bytes) -> np.ndarray:
    """The crop that was encoded: by Pillow, as the encode stage looks at what it keeps, so to the same pixels.

    Args:
        encoded: A PNG or a JPEG.

    Returns:
        (side, side, 3) uint8, RGB.

    Raises:
        ContractError: It cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=["PNG", "JPEG"]) as picture:
            return np.asarray(picture.convert("RGB"))
    except (ValueError, OSError) as error:
        raise ContractError(f"image: a crop cannot be decoded ({error}); encode the dataset again") from error
