import hashlib
import io
import random
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.reasons import Reason
from preprocessing.download.containers import ImageRefused, exif_orientation, read_container
from preprocessing.download.images import NormalizedImage, normalize_image, reduced_size

CONFIG = DownloadConfig.model_validate({"image_size_px": 64, "max_image_area_px": 1_000_000, "max_aspect": 8})


def picture(width: int = 90, height: int = 70) -> Image.Image:
    """Four quadrants, smooth and of different colors, so that turning and mirroring show."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = 230, 30, 30
    pixels[: height // 2, width // 2 :] = 30, 210, 30
    pixels[height // 2 :, : width // 2] = 30, 30, 230
    pixels[height // 2 :, width // 2 :] = 230, 230, 30
    return Image.fromarray(pixels)


def noise() -> Image.Image:
    """Incompressible: any part of its file holds pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(stored: NormalizedImage) -> Image.Image:
    image = Image.open(io.BytesIO(stored.image), formats=["JPEG"])
    image.load()
    return image


def refusal(data: bytes, config: DownloadConfig = CONFIG) -> Reason:
    with pytest.raises(ImageRefused) as refused:
        normalize_image(data, config)
    assert refused.value.detail
    return refused.value.reason


def corners(image: Image.Image) -> list[str]:
    """The color of each quadrant, by name: top left, top right, bottom left, bottom right."""
    names = {"r": (230, 30, 30), "g": (30, 210, 30), "b": (30, 30, 230), "y": (230, 230, 30)}
    width, height = image.size
    found = []
    for x, y in ((0.2, 0.2), (0.8, 0.2), (0.2, 0.8), (0.8, 0.8)):
        pixel = np.asarray(image.convert("RGB"))[int(y * height), int(x * width)].astype(int)
        found.append(min(names, key=lambda name: float(np.abs(pixel - names[name]).sum())))
    return found


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize(
    "data",
    [
        encoded(picture(), "JPEG", quality=95),
        encoded(picture(), "JPEG", quality=95, progressive=True),
        encoded(picture(), "JPEG", quality=95, restart_marker_blocks=1),
        encoded(picture(), "PNG"),
        encoded(picture().convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        encoded(picture(), "WEBP", quality=95),
        encoded(picture(), "WEBP", lossless=True),
        encoded(picture(), "WEBP", lossless=True, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"),
        encoded(picture(), "GIF"),
        encoded(picture().convert("CMYK"), "JPEG", quality=95),
        encoded(picture(), "GIF", save_all=True, append_images=[picture().rotate(180)], comment=b"a comment"),
        encoded(picture(), "WEBP", save_all=True, append_images=[picture().rotate(180)], lossless=True),
        encoded(picture(), "PNG", save_all=True, append_images=[picture().rotate(180)]),
        encoded(picture(), "JPEG", comment=b"\xff\xd9 not the end", icc_profile=b"nonsense" * 20),
        encoded(picture(), "JPEG") + b"\0" * 100,
    ],
    ids=str,
)
def test_each_kind_comes_through(data: bytes) -> None:
    stored = normalize_image(data, CONFIG)
    assert (stored.original_width, stored.original_height) == (90, 70)
    assert (stored.width, stored.height) == (82, 64)
    assert stored.sha256 == hashlib.sha256(data).hexdigest()
    image = decoded(stored)
    assert image.mode == "RGB"
    assert image.size == (82, 64)
    assert corners(image) == ["r", "g", "b", "y"]
    assert not {"exif", "icc_profile", "comment"} & set(image.info)
    assert normalize_image(data, CONFIG) == stored


def test_a_small_picture_is_not_enlarged() -> None:
    stored = normalize_image(encoded(picture(40, 30), "PNG"), CONFIG)
    assert (stored.width, stored.height) == (40, 30)


def test_gray_and_one_bit() -> None:
    for mode in ("L", "1"):
        stored = normalize_image(encoded(Image.new(mode, (30, 30), 255), "PNG"), CONFIG)
        assert np.asarray(decoded(stored)).min() >= 250


@pytest.mark.parametrize("value", [0, 0x40FF, 0x8000, 0xFFFF])
def test_16_bits_keep_the_high_byte(value: int) -> None:
    gray = Image.fromarray(np.full((20, 20), value, np.uint16))
    pixels = np.asarray(decoded(normalize_image(encoded(gray, "PNG"), CONFIG))).astype(int)
    assert np.abs(pixels - (value >> 8)).max() <= 2
    rows = (b"\0" + struct.pack(">HHH", value, value, value) * 20) * 20
    header = struct.pack(">IIBBBBB", 20, 20, 16, 2, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    rgb = np.asarray(decoded(normalize_image(b"\x89PNG\r\n\x1a\n" + body, CONFIG))).astype(int)
    assert np.abs(rgb - (value >> 8)).max() <= 2


def test_alpha_is_composited_over_white() -> None:
    half = picture()
    half.putalpha(Image.new("L", half.size, 0))
    assert np.asarray(decoded(normalize_image(encoded(half, "PNG"), CONFIG))).min() >= 250
    half.putalpha(Image.new("L", half.size, 128))
    for kind in ("PNG", "WEBP"):
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        top_left = np.asarray(decoded(normalize_image(encoded(half, kind, **options), CONFIG)))[10, 10].astype(int)
        assert np.abs(top_left - [242, 142, 142]).max() <= 6
    gray = Image.merge("LA", (Image.new("L", (20, 20), 0), Image.new("L", (20, 20), 0)))
    assert np.asarray(decoded(normalize_image(encoded(gray, "PNG"), CONFIG))).min() >= 250


def test_a_transparent_color_is_white() -> None:
    for kind in ("PNG", "GIF"):
        paletted = Image.new("P", (20, 20), 3)
        paletted.putpalette([0] * 768)
        data = encoded(paletted, kind, transparency=3)
        assert np.asarray(decoded(normalize_image(data, CONFIG))).min() >= 250, kind
    data = encoded(Image.new("RGB", (20, 20), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert np.asarray(decoded(normalize_image(data, CONFIG))).min() >= 250


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), kind, exif=exif.tobytes())
    stored = normalize_image(data, CONFIG)
    image = decoded(stored)
    expected = {
        1: "rgby",
        2: "gryb",
        3: "ybgr",
        4: "byrg",
        5: "rbgy",
        6: "bryg",
        7: "ygbr",
        8: "gyrb",
    }[orientation]
    assert corners(image) == list(expected)
    turned = orientation >= 5
    assert (stored.original_width, stored.original_height) == ((70, 90) if turned else (90, 70))
    assert image.size == (stored.width, stored.height) == ((64, 82) if turned else (82, 64))
    assert not image.getexif()


@settings(deadline=None)
@given(
    st.binary(max_size=80),
    st.sampled_from([b"", b"Exif\0\0", b"II*\0", b"MM\0*", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08"]),
)
def test_any_exif_gives_an_orientation(rest: bytes, start: bytes) -> None:
    assert 1 <= exif_orientation(start + rest) <= 8


def test_what_is_not_an_image() -> None:
    assert refusal(b"") is Reason.EMPTY_FILE
    for data in (b"<!doctype html><p>gone", b"GIF", b"\xff\xd8", b"BM" + bytes(60), b"%PDF-1.7", b"II*\0", bytes(500)):
        assert refusal(data) is Reason.NOT_AN_IMAGE
    for kind in ("BMP", "TIFF", "ICO", "PPM"):
        assert refusal(encoded(picture(), kind)) is Reason.NOT_AN_IMAGE


@pytest.mark.parametrize(
    "data",
    [
        encoded(noise(), "JPEG"),
        encoded(noise(), "JPEG", progressive=True),
        encoded(noise(), "JPEG", exif=b"Exif\0\0" + encoded(picture(20, 20), "JPEG")),  # a thumbnail has an end, too
        encoded(noise(), "PNG"),
        encoded(noise(), "WEBP"),
        encoded(noise(), "WEBP", lossless=True),
        encoded(noise(), "GIF", save_all=True, append_images=[picture(40, 40)]),
    ],
    ids=["jpeg", "progressive", "thumbnail", "png", "webp", "webp_lossless", "gif"],
)
def test_a_truncated_file_is_never_taken_for_whole(data: bytes) -> None:
    normalize_image(data, CONFIG)
    lengths = {round(len(data) * share / 100) for share in range(100)} | {len(data) - 1, len(data) - 2}
    verdicts = [refusal(data[:length]) for length in sorted(lengths)]
    assert set(verdicts) <= {Reason.EMPTY_FILE, Reason.NOT_AN_IMAGE, Reason.IMAGE_TRUNCATED}
    assert verdicts.count(Reason.IMAGE_TRUNCATED) > 90


def test_data_that_ends_early_inside_a_whole_container() -> None:
    data = encoded(noise(), "PNG")
    start = data.index(b"IDAT") - 4
    length = int.from_bytes(data[start : start + 4], "big")
    body = data[start + 8 : start + 8 + length // 2]
    cut = data[:start] + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    assert refusal(cut) is Reason.IMAGE_TRUNCATED


def test_broken_data() -> None:
    png = bytearray(encoded(picture(), "PNG"))
    png[png.index(b"IDAT") + 12] ^= 0xFF
    assert refusal(bytes(png)) is Reason.IMAGE_BROKEN
    assert refusal(b"\x89PNG\r\n\x1a\n" + png_chunk(b"IEND", b"")) is Reason.IMAGE_BROKEN
    assert refusal(b"\xff\xd8\xff\xd9") is Reason.IMAGE_BROKEN
    webp = bytearray(encoded(picture(), "WEBP"))
    webp[20:26] = bytes(6)
    assert refusal(bytes(webp)) is Reason.IMAGE_BROKEN


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_size_and_shape_are_judged_by_the_header(kind: str) -> None:
    data = encoded(picture(200, 100), kind)
    assert refusal(data, CONFIG.model_copy(update={"max_image_area_px": 19_999})) is Reason.IMAGE_TOO_LARGE
    normalize_image(data, CONFIG.model_copy(update={"max_image_area_px": 20_000}))
    assert refusal(data, CONFIG.model_copy(update={"max_aspect": 1.9})) is Reason.ASPECT_EXTREME
    normalize_image(data, CONFIG.model_copy(update={"max_aspect": 2.0}))


def test_a_bomb_costs_nothing() -> None:
    """A header of 900 megapixels without the data: whoever decoded first would say something else."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 6, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"no") + png_chunk(b"IEND", b"")
    gif = bytearray(encoded(picture(8, 8), "GIF"))
    frame = gif.rindex(b",\0\0\0\0\x08\0\x08\0")
    gif[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"  # a frame larger than the screen
    default = DownloadConfig.model_validate({})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refusal(bomb, default) is Reason.IMAGE_TOO_LARGE
        assert refusal(bytes(gif), default) is Reason.IMAGE_TOO_LARGE
        # Over Pillow's own limit for warnings, but allowed here: none comes.
        large = Image.new("1", (10_000, 9_500))
        lax = DownloadConfig.model_validate({"max_image_area_px": 100_000_000, "image_size_px": 8})
        assert normalize_image(encoded(large, "PNG"), lax).width == 8


def test_metadata_bombs_are_not_read() -> None:
    text = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(5_000_000), 9))
    data = encoded(picture(), "PNG")
    start = data.index(b"IDAT") - 4
    assert normalize_image(data[:start] + text + data[start:], CONFIG).image == normalize_image(data, CONFIG).image


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF"]), st.integers(1, 150), st.integers(1, 150), st.integers(8, 100))
def test_sizes(kind: str, width: int, height: int, shorter_side: int) -> None:
    config = DownloadConfig.model_validate({"image_size_px": shorter_side, "max_aspect": 1000, "min_image_side_px": 1})
    data = encoded(picture(width, height), kind)
    container = read_container(data)
    assert (container.width, container.height) == (width, height)
    stored = normalize_image(data, config)
    assert (stored.width, stored.height) == reduced_size(width, height, shorter_side)
    assert min(stored.width, stored.height) == min(width, height, shorter_side)
    assert abs(stored.width * height - stored.height * width) <= max(width, height)
    assert decoded(stored).size == (stored.width, stored.height)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF"]), st.integers(0, 2**32), st.integers(1, 12))
def test_whatever_comes_ends_in_a_picture_or_a_reason(kind: str, seed: int, num_bytes: int) -> None:
    data = bytearray(encoded(picture(24, 24), kind))
    source = random.Random(seed)
    for _ in range(num_bytes):
        data[source.randrange(len(data))] = source.randrange(256)
    try:
        stored = normalize_image(bytes(data), CONFIG)
    except ImageRefused:
        return
    assert decoded(stored).size == (stored.width, stored.height)


def test_a_placeholder_is_too_small() -> None:
    assert refusal(encoded(picture(15, 400), "PNG")) == Reason.IMAGE_TOO_SMALL
    assert refusal(encoded(picture(1, 1), "JPEG")) == Reason.IMAGE_TOO_SMALL
    assert normalize_image(encoded(picture(16, 16), "PNG"), CONFIG).width == 16
