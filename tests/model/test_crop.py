"""Crops come back from what a dataset keeps of them, or one line says that they do not."""

import io

import numpy as np
import pytest
from PIL import Image

from model.crop import decode_crop


def _encoded(pixels: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


def test_a_png_is_exact_and_a_jpeg_is_its_own_pixels():
    assert np.array_equal(decode_crop(_encoded(PIXELS, "PNG")), PIXELS)
    jpeg = _encoded(PIXELS, "JPEG")
    with Image.open(io.BytesIO(jpeg)) as picture:
        assert np.array_equal(decode_crop(jpeg), np.array(picture))


@pytest.mark.parametrize(
    "encoded",
    [b"", b"no picture", _encoded(PIXELS, "PNG")[:2000], _encoded(PIXELS, "JPEG")[:900], _encoded(PIXELS, "BMP")],
)
def test_what_cannot_be_decoded_is_one_clear_line(encoded: bytes):
    with pytest.raises(ValueError, match=r"^image: a crop cannot be decoded \(.*\); encode the dataset again$"):
        decode_crop(encoded)
