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
| metadata, comments, thumbnails, color profiles, what follows the file's end | dropped |

What is stored is RGB JPEG. A JPEG that is small enough, upright and plain (8 bits, baseline or progressive, YCbCr with
chroma at full or half size) keeps its own coded pixels: a second generation would only lose. All others are encoded
with chroma at full size.

Common JPEGs go through simplejpeg: unlike Pillow's and OpenCV's, it hears the decoder's warnings, so that damaged and
cut data is refused and not filled with gray. Large ones are decoded at 1/2 or 1/4 of their size, never under the wanted
one. Reducing is OpenCV's, since Pillow's Lanczos takes five times as long; the result is within 35 dB of a full decode
and Lanczos, 43 dB for ordinary pictures.
"""

import hashlib
import io
import re
import struct
import zlib
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import GifImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.reasons import Reason
from preprocessing.download.containers import Container, Format, ImageRefused, read_container

Pixels = NDArray[np.uint8]  # height × width × RGB

MAX_SIDE_PX = 16_384
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
    cv2.error,
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
# libjpeg's warnings that mean damage: data missing, or out of step. A few stray bytes before a marker are many a
# camera's habit, and so are odd header fields.
_DAMAGE = re.compile(r"premature end|corrupt jpeg data(?!: \d extraneous)", re.IGNORECASE)
_JPEG_SCALES = (1, 2, 4)  # the fast ones of libjpeg; 8 is a plain average of blocks, and too coarse
_JPEG_PROOF_SCALE = 8


@dataclass(frozen=True)
class NormalizedImage:
    """A picture as it is stored.

    Attributes:
        image: JPEG, three components, without metadata.
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
    target = reduced_size(container.width, container.height, config.image_size_px)
    is_turned = container.orientation >= 5
    try:
        stored = _kept(container, target) or _encode(_upright(_decode(container, target), container), config)
    except _DECODER_ERRORS as error:
        raise _refusal(error) from error
    return NormalizedImage(
        image=stored,
        width=target[is_turned],
        height=target[not is_turned],
        original_width=container.height if is_turned else container.width,
        original_height=container.width if is_turned else container.height,
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _refusal(error: Exception) -> Exception:
    """What a decoder's error means."""
    if isinstance(error, ImageRefused):
        return error
    said = str(error).lower()
    if "memory" in said:  # malloc's failure, as each library words it
        return MemoryError(str(error))
    is_short = "truncated" in said or "premature end" in said
    reason = Reason.IMAGE_TRUNCATED if is_short else Reason.IMAGE_BROKEN
    return ImageRefused(reason, f"{type(error).__name__}: {error}")


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
    if max(width, height) > MAX_SIDE_PX:
        raise ImageRefused(Reason.IMAGE_TOO_LARGE, f"{width} × {height} pixels: a side is over {MAX_SIDE_PX:,}")
    if min(width, height) < config.min_image_side_px:
        raise ImageRefused(
            Reason.IMAGE_TOO_SMALL,
            f"{width} × {height} pixels are under download.min_image_side_px = {config.min_image_side_px}",
        )
    if max(width, height) > config.max_aspect * min(width, height):
        raise ImageRefused(
            Reason.ASPECT_EXTREME, f"{width} × {height} pixels are over download.max_aspect = {config.max_aspect:g}"
        )


def _kept(container: Container, target: tuple[int, int]) -> bytes | None:
    """The file itself, if it may be stored as it is, and all of it can be decoded."""
    is_fit = target == (container.width, container.height) and container.orientation == 1
    if not is_fit or container.jpeg is None or not container.jpeg.is_plain:
        return None
    # Damage shows while coefficients are read; what is made of them does not matter here, so make little.
    return None if _decode_jpeg(container, _JPEG_PROOF_SCALE, "GRAY") is None else container.pixels


def _decode(container: Container, target: tuple[int, int]) -> Pixels:
    """The picture in RGB, reduced to the wanted size, not yet upright."""
    pixels, scale = None, 1
    if container.jpeg is not None and container.jpeg.is_common:
        ratio = min(container.width // target[0], container.height // target[1])
        scale = max(scale for scale in _JPEG_SCALES if scale == 1 or scale <= ratio)
        pixels = _decode_jpeg(container, scale)
    if pixels is None:
        pixels, scale = _decode_with_pillow(container), 1
    return _reduce(pixels, *target, scale, container)


def _decode_jpeg(container: Container, scale: int, colors: Literal["RGB", "GRAY"] = "RGB") -> Pixels | None:
    """Decodes at 1/scale; None where the decoder does not know the kind, or complains of what may be harmless."""
    size = -(-container.height // scale), -(-container.width // scale)
    try:
        pixels = simplejpeg.decode_jpeg(container.pixels, colors, min_height=size[0], min_width=size[1], strict=True)
    except ValueError as error:
        said = str(error)
        if "memory" not in said.lower() and not _DAMAGE.search(said):
            return None
        raise
    if pixels.shape[:2] != size:
        # Two readers of one header must not differ: else the limit was held against the wrong size.
        raise ImageRefused(Reason.IMAGE_BROKEN, f"decoded to {pixels.shape[1]} × {pixels.shape[0]}, not {size[::-1]}")
    return pixels


def _decode_with_pillow(container: Container) -> Pixels:
    with _READERS[container.format](io.BytesIO(container.pixels)) as file:
        if file.size != (container.width, container.height):
            raise ImageRefused(
                Reason.IMAGE_BROKEN,
                f"its header says {container.width} × {container.height}, its decoder {file.width} × {file.height}",
            )
        file.load()
        return np.asarray(_to_rgb(file))


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit gray, the only such mode among the four formats
        return Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info:
        with_alpha = picture.convert("RGBA")
        white = Image.new("RGB", with_alpha.size, "white")
        white.paste(with_alpha, mask=with_alpha)
        return white
    return picture.convert("RGB")


def _reduce(pixels: Pixels, width: int, height: int, scale: int, container: Container) -> Pixels:
    """Resamples without aliasing: area averages of a picture that is sampled at twice the wanted size.

    Args:
        pixels: The picture at 1/scale; where that does not divide its size, the last row and column stand for less than
            a pixel each, and are left out, so that nothing is stretched.
        width: Wanted.
        height: Likewise.
        scale: At which it was decoded.
        container: Its true size.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    whole_width, whole_height = container.width // scale, container.height // scale
    fine_width = round(2 * width * whole_width * scale / container.width)
    fine_height = round(2 * height * whole_height * scale / container.height)
    is_finer = whole_width >= fine_width and whole_height >= fine_height
    fine = cv2.resize(
        pixels[:whole_height, :whole_width],
        (fine_width, fine_height),
        interpolation=cv2.INTER_AREA if is_finer else cv2.INTER_CUBIC,
    )
    if (fine_height, fine_width) != (2 * height, 2 * width):
        below, beside = 2 * height - fine_height, 2 * width - fine_width
        fine = cv2.copyMakeBorder(fine, 0, below, 0, beside, cv2.BORDER_REPLICATE)
    return np.asarray(cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def _upright(pixels: Pixels, container: Container) -> Pixels:
    turn = _UPRIGHT.get(container.orientation)
    return pixels if turn is None else np.asarray(Image.fromarray(pixels).transpose(turn))


def _encode(pixels: Pixels, config: DownloadConfig) -> bytes:
    pixels = np.ascontiguousarray(pixels)
    return simplejpeg.encode_jpeg(pixels, quality=config.encode_quality, colorspace="RGB", colorsubsampling="444")
