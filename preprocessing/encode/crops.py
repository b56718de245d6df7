"""From the bytes of pictures to the squares that the models see, and that are kept."""

import io
import zlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from model.crop import CropBox, central_square, decode_crop
from preprocessing.contracts.reasons import Reason

Refused = list[tuple[str, str, str, str]]
"""uid, url, reason, detail."""


@dataclass(frozen=True)
class Crops:
    """The pictures of some rows, cut.

    Attributes:
        rows: Those whose picture could be read.
        pictures: (n, side, side, 3) uint8: what the models see.
        boxes: Where each was cut.
        images: Each encoded, to be kept; empty where none is.
        refused: The other rows.
    """

    rows: pa.Table
    pictures: np.ndarray
    boxes: list[CropBox]
    images: list[bytes]
    refused: Refused


def crop_rows(rows: pa.Table, side_px: int, image: str, image_quality: int) -> Crops:
    """Decodes, crops and encodes the pictures of rows.

    Args:
        rows: In the ``DOWNLOADED`` schema.
        side_px: Side of the squares.
        image: ``png``, ``jpeg`` or ``none``: see `keep`.
        image_quality: Of JPEG.
    """
    pictures, boxes, images = [], [], []
    refused: Refused = []
    is_readable = np.ones(rows.num_rows, dtype=bool)
    for index, row in enumerate(rows.select(["uid", "url", "image"]).to_pylist()):
        try:
            with Image.open(io.BytesIO(row["image"])) as picture:
                crop, box = central_square(picture, side_px)
        except (OSError, ValueError, SyntaxError) as error:
            is_readable[index] = False
            # Pillow's own words for an unknown format name an address in memory: two runs would give different bytes.
            detail = "of no known format" if isinstance(error, UnidentifiedImageError) else str(error)[:200]
            refused.append((row["uid"], row["url"], Reason.IMAGE_UNREADABLE, detail))
            continue
        crop, kept = keep(crop, image, image_quality)
        pictures.append(crop)
        boxes.append(box)
        images += [kept] if kept is not None else []
    stacked = np.stack(pictures) if pictures else np.empty((0, side_px, side_px, 3), np.uint8)
    return Crops(rows.filter(pa.array(is_readable)), stacked, boxes, images, refused)


def keep(crop: np.ndarray, image: str, image_quality: int) -> tuple[np.ndarray, bytes | None]:
    """Encodes a crop.

    Returns:
        The crop that counts from here on, and its bytes. Of a JPEG it is what decodes from it, so that whoever reads
        the dataset sees the very pixels that were encoded.
    """
    if image == "none":
        return crop, None
    buffer = io.BytesIO()
    if image == "png":
        # Run lengths only: faster than level 1's search, and smaller by a tenth.
        Image.fromarray(crop).save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
        return crop, buffer.getvalue()
    Image.fromarray(crop).save(buffer, "JPEG", quality=image_quality)
    return decode_crop(buffer.getvalue()), buffer.getvalue()
