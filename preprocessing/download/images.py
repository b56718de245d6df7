"""From the bytes that arrived to the picture that is stored: one pure function.

| found | done |
| --- | --- |
| EXIF orientation | applied, then dropped |
| alpha, or a transparent color | composited over white |
| palette, gray, one bit | RGB |
| CMYK, YCCK | RGB by Pillow's plain formula; color profiles are dropped, not applied |
| 16 bits a channel | the high byte |
| animation | the first frame |
| shorter side over ``image_size_px`` | reduced to it, aspect kept; smaller pictures are left |
| metadata, comments, thumbnails, color profiles | dropped |
"""

import hashlib
import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import GifImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.reasons import Reason
from preprocessing.download.containers import Container, Format, ImageRefused, read_container

# The readers themselves and not `Image.open`: nothing else can be chosen, and a large picture is refused by our limit,
# by its header, and not announced by a warning.
_READERS: dict[Format, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
}
# What Pillow's readers raise for bad input, as its own fuzzers list it.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DRAFT_GAP = 2  # decode JPEG at no less than twice the wanted size: the rest is Lanczos'


@dataclass(frozen=True)
class NormalizedImage:
    """A picture as it is stored.

    Attributes:
        image: JPEG, RGB, 4:4:4, without metadata.
        width: In pixels, upright.
        height: Likewise.
        original_width: As it arrived, upright.
        original_height: Likewise.
        sha256: Of the bytes as they arrived.
    """

    image: bytes
    width: int
    height: int
    original_width: int
    original_height: int
    sha256: str


def normalize_image(data: bytes, config: DownloadConfig) -> NormalizedImage:
    """Checks, decodes and stores a picture; equal bytes give equal bytes.

    Args:
        data: The file as it arrived.
        config: ``image_size_px``, ``encode_quality``, ``max_image_area_px`` and ``max_aspect`` are used.

    Returns:
        The picture.

    Raises:
        ImageRefused: With the drop reason. Size and shape are judged by the header, before anything is decoded.
    """
    container = read_container(data)
    _check_size(container, config)
    try:
        picture = _decode(container, config.image_size_px)
        stored = _encode(picture, config.encode_quality)
    except _DECODER_ERRORS as error:
        if isinstance(error, ImageRefused):
            raise
        detail = f"{type(error).__name__}: {error}"
        is_short = isinstance(error, (OSError, EOFError)) and "truncated" in str(error).lower()
        raise ImageRefused(Reason.IMAGE_TRUNCATED if is_short else Reason.IMAGE_BROKEN, detail) from error
    is_turned = container.orientation >= 5
    return NormalizedImage(
        image=stored,
        width=picture.width,
        height=picture.height,
        original_width=container.height if is_turned else container.width,
        original_height=container.width if is_turned else container.height,
        sha256=hashlib.sha256(data).hexdigest(),
    )


def reduced_size(width: int, height: int, shorter_side: int) -> tuple[int, int]:
    """The size after reducing a picture until its shorter side is ``shorter_side``; its own where it is not larger."""
    if min(width, height) <= shorter_side:
        return width, height
    if width <= height:
        return shorter_side, round(height * shorter_side / width)
    return round(width * shorter_side / height), shorter_side


def _check_size(container: Container, config: DownloadConfig) -> None:
    width, height = container.width, container.height
    if width * height > config.max_image_area_px:
        raise ImageRefused(
            Reason.IMAGE_TOO_LARGE,
            f"{width} × {height} pixels are over download.max_image_area_px = {config.max_image_area_px:,}",
        )
    if min(width, height) < config.min_image_side_px:
        raise ImageRefused(
            Reason.IMAGE_TOO_SMALL,
            f"{width} × {height} pixels are under download.min_image_side_px = {config.min_image_side_px}",
        )
    if max(width, height) > config.max_aspect * min(width, height):
        raise ImageRefused(
            Reason.ASPECT_EXTREME, f"{width} × {height} pixels are over download.max_aspect = {config.max_aspect:g}"
        )


def _decode(container: Container, shorter_side: int) -> Image.Image:
    with _READERS[container.format](io.BytesIO(container.pixels)) as file:
        if file.size != (container.width, container.height):
            # Two readers of one header must not differ: else the limit was held against the wrong size.
            raise ImageRefused(
                Reason.IMAGE_BROKEN,
                f"its header says {container.width} × {container.height}, its decoder {file.width} × {file.height}",
            )
        target = reduced_size(container.width, container.height, shorter_side)
        if container.format == "JPEG":
            file.draft(None, (_DRAFT_GAP * target[0], _DRAFT_GAP * target[1]))
        file.load()
        picture = _to_rgb(file)
    if picture.size != target:
        picture = picture.resize(target, Image.Resampling.LANCZOS, reducing_gap=3.0)
    turn = _UPRIGHT.get(container.orientation)
    return picture if turn is None else picture.transpose(turn)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit gray, the only such mode among the four formats
        return Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info:
        with_alpha = picture.convert("RGBA")
        white = Image.new("RGBA", with_alpha.size, "white")
        return Image.alpha_composite(white, with_alpha).convert("RGB")
    return picture.convert("RGB")


def _encode(picture: Image.Image, quality: int) -> bytes:
    picture.info.clear()  # a GIF's comment would otherwise go on into the JPEG
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
