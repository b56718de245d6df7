"""Files that try decoders: generated, the same in every run, each with what may become of it.

No file is stored and none was downloaded. `corpus` is what strangers may send; `benign` is what decent servers send.
"""

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from preprocessing.contracts.reasons import Reason

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PAYLOAD = b"<?php echo 'payload'; ?><script>alert(1)</script>"
NUM_OFFSETS = 100

ACCEPTED = None
TAKEN = frozenset({ACCEPTED})
BROKEN = frozenset({Reason.IMAGE_BROKEN})
TRUNCATED = frozenset({Reason.IMAGE_TRUNCATED})
TOO_LARGE = frozenset({Reason.IMAGE_TOO_LARGE})
TOO_SMALL = frozenset({Reason.IMAGE_TOO_SMALL})
FOREIGN = frozenset({Reason.NOT_AN_IMAGE})
# Damage that a decoder may pass over, as browsers do, or not.
ANY = frozenset({ACCEPTED, *BROKEN, *TRUNCATED, *TOO_LARGE, *TOO_SMALL, *FOREIGN, Reason.ASPECT_EXTREME})
MENDED = TAKEN | BROKEN | TRUNCATED


@dataclass(frozen=True)
class Sample:
    """One file.

    Attributes:
        name: Group and number.
        make: Makes its bytes.
        expected: The reasons that are right; None stands for acceptance.
        is_heavy: Whether it takes seconds to make or to judge.
    """

    name: str
    make: Callable[[], bytes]
    expected: frozenset[Reason | None]
    is_heavy: bool = False

    @property
    def group(self) -> str:
        return self.name.partition("/")[0]


@functools.lru_cache(maxsize=64)
def textured(width: int, height: int, seed: int = 0, roughness: float = 1.0) -> Image.Image:
    """A picture with detail at every scale, as photographs have it; not to be changed in place."""
    source = np.random.default_rng(seed)
    total = np.full((height, width, 3), 128, np.float32)
    for cell, strength in ((128, 50), (32, 35), (8, 20), (2, 8 * roughness), (1, 4 * roughness)):
        coarse = source.normal(0, 1, (height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        layers = [
            Image.fromarray(coarse[..., band]).resize((width, height), Image.Resampling.BICUBIC) for band in range(3)
        ]
        total += strength * np.stack([np.asarray(layer) for layer in layers], -1)
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@functools.cache
def small(kind: str, **options: Any) -> bytes:
    """A well-formed file of 64 × 48 pixels."""
    return encoded(textured(64, 48), kind, **options)


# --- PNG


def png_chunk(kind: bytes, body: bytes, crc: int | None = None) -> bytes:
    check = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)


def png_header(width: int, height: int, depth: int = 8, color: int = 2, *more: int) -> bytes:
    rest = (0, 0, 0)[len(more) :]
    return png_chunk(b"IHDR", struct.pack(">IIBB", width, height, depth, color) + bytes([*more, *rest]))


def png(header: bytes, *chunks: bytes) -> bytes:
    return PNG_SIGNATURE + header + b"".join(chunks) + png_chunk(b"IEND", b"")


def deflated_zeros(num_bytes: int) -> bytes:
    """A zlib stream of so many zeros, without making them: one part of a hundredth, repeated."""
    step = 1_000_000
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    part = squeeze.compress(bytes(step)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    last = zlib.compressobj(9, zlib.DEFLATED, -15)
    rest = last.compress(bytes(num_bytes % step)) + last.flush()
    adler = (num_bytes % 65521) << 16 | 1
    return b"\x78\xda" + part * (num_bytes // step) + rest + struct.pack(">I", adler)


def png_bomb(width: int, height: int, depth: int, color: int) -> bytes:
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    row = 1 + (width * channels * depth + 7) // 8
    palette = [png_chunk(b"PLTE", bytes(6))] if color == 3 else []
    return png(png_header(width, height, depth, color), *palette, png_chunk(b"IDAT", deflated_zeros(row * height)))


def png_insert(data: bytes, *chunks: bytes) -> bytes:
    at = data.index(b"IDAT") - 4
    return data[:at] + b"".join(chunks) + data[at:]


def _pngs() -> Iterator[tuple[str, Callable[[], bytes], frozenset[Reason | None]]]:
    whole = small("PNG")
    rows = zlib.compress(b"".join(b"\0" + bytes(3 * 40) for _ in range(40)))
    idat = png_chunk(b"IDAT", rows)
    header = png_header(40, 40)
    for width, height in ((30_000, 30_000), (65_535, 65_535), (16_384, 16_384), (9_000, 9_000), (17_000, 1_000)):
        for depth, color in ((1, 0), (8, 0), (8, 2), (8, 6), (16, 2), (8, 3)):
            if width * height * depth * (4 if color == 6 else 3 if color == 2 else 1) > 4e10:
                continue  # over 5 GB of zeros: nothing new, and slow to make
            yield "bomb", functools.partial(png_bomb, width, height, depth, color), TOO_LARGE
    yield "bomb", functools.partial(png_bomb, 3_000, 3_000, 8, 6), TAKEN
    yield "heavy_bomb", functools.partial(png_bomb, 8_000, 8_000, 8, 6), TAKEN
    yield "heavy_bomb", functools.partial(png_bomb, 8_000, 8_000, 16, 6), TAKEN | {Reason.DECODE_OUT_OF_MEMORY}
    yield "bomb", lambda: png(header, png_chunk(b"IDAT", deflated_zeros(2_000_000_000))), TAKEN
    text = deflated_zeros(50_000_000)
    for kind, head in ((b"zTXt", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0"), (b"iCCP", b"p\0\0")):
        yield "metadata_bomb", functools.partial(png_insert, whole, png_chunk(kind, head + text)), TAKEN
    yield "metadata_bomb", lambda: png_insert(whole, *[png_chunk(b"tEXt", b"k\0" + bytes(900))] * 9_000), TAKEN
    for width, height, expected in (
        (0, 40, BROKEN),
        (40, 0, BROKEN),
        (0, 0, BROKEN),
        (0x80000001, 40, TOO_LARGE),
        (0xFFFFFFFF, 0xFFFFFFFF, TOO_LARGE),
        (0x7FFFFFFF, 1, TOO_LARGE),
    ):
        yield "size", functools.partial(png, png_header(width, height), idat), expected
    for depth, color in ((3, 2), (0, 0), (255, 255), (16, 3), (1, 2), (8, 1), (8, 5), (4, 6)):
        yield "header", functools.partial(png, png_header(40, 40, depth, color), idat), BROKEN
    for more in ((1,), (0, 1), (0, 0, 2), (0, 0, 255)):
        yield "header", functools.partial(png, png_header(40, 40, 8, 2, *more), idat), MENDED
    for length in (0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, len(idat), 2_000_000):
        yield "length", functools.partial(_png_with_length, whole, length), TRUNCATED
    for length in (0, 1, 7, len(rows) - 1):
        yield "length", functools.partial(_png_with_length, whole, length), BROKEN | TRUNCATED
    for kind in (b"IHDR", b"IDAT", b"IEND"):
        at = whole.index(kind)
        end = at + 4 + int.from_bytes(whole[at - 4 : at], "big")
        bad = whole[:end] + bytes(byte ^ 0xFF for byte in whole[end : end + 4]) + whole[end + 4 :]
        yield "crc", functools.partial(bytes, bad), BROKEN if kind == b"IHDR" else MENDED
    crafted: list[tuple[tuple[bytes, ...], frozenset[Reason | None]]] = [
        ((header,), BROKEN | TRUNCATED),  # no pixels
        ((header, header, idat), BROKEN),
        ((idat, header), BROKEN),
        ((png_chunk(b"IHDR", b""), idat), BROKEN),
        ((png_chunk(b"IHDR", bytes(12)), idat), BROKEN),
        ((header, png_chunk(b"IDAT", b"")), BROKEN | TRUNCATED),
        ((header, png_chunk(b"IDAT", b""), idat), MENDED),
        ((header, png_chunk(b"IDAT", rows[: len(rows) // 2])), TRUNCATED),
        ((header, png_chunk(b"IDAT", b"\x78\xda" + bytes(200))), BROKEN | TRUNCATED),
        ((header, png_chunk(b"IDAT", rows + bytes(100_000))), TAKEN),
        ((header, png_chunk(b"tRNS", bytes(300)), idat), MENDED),
        ((header, png_chunk(b"tRNS", b"\0"), idat), MENDED),
        ((header, png_chunk(b"CgBI", bytes(4)), idat), TAKEN),
        ((header, png_chunk(b"XXXX", PAYLOAD), idat), TAKEN),
        ((header, png_chunk(b"PLTE", bytes(3 * 300)), idat), MENDED),
        ((header, png_chunk(b"acTL", struct.pack(">II", 1_000_000, 0)), idat), TAKEN),
        ((header, idat, png_chunk(b"fdAT", bytes(4) + rows)), TAKEN),
        ((header, png_chunk(b"IDAT", zlib.compress(b"\x05" * (121 * 40)))), BROKEN),  # a filter that does not exist
        ((png_header(40, 40, 8, 3), png_chunk(b"IDAT", zlib.compress(bytes(41 * 40)))), MENDED),  # without its palette
        ((png_header(40, 40, 8, 3), png_chunk(b"PLTE", b"abcd"), idat), MENDED),
        (
            (
                png_header(40, 40, 8, 3),
                png_chunk(b"PLTE", b"abc"),
                png_chunk(b"IDAT", zlib.compress(b"\xff" * 41 * 40)),
            ),
            BROKEN,
        ),
    ]
    for chunks, expected in crafted:
        yield (
            "crafted",
            functools.partial(lambda chunks: PNG_SIGNATURE + b"".join(chunks) + png_chunk(b"IEND", b""), chunks),
            expected,
        )
    yield "crafted", lambda: png(header, *[png_chunk(b"IDAT", b"")] * 150_000, idat), BROKEN
    frames = [textured(64, 48, seed) for seed in range(3)]
    yield "animated", lambda: encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]), TAKEN


def _png_with_length(whole: bytes, length: int) -> bytes:
    at = whole.index(b"IDAT") - 4
    return whole[:at] + struct.pack(">I", length) + whole[at + 4 :]


# --- JPEG


def jpeg_segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def jpeg_with_size(data: bytes, width: int, height: int) -> bytes:
    at = _sof(data)
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def _sof(data: bytes) -> int:
    for marker in (b"\xff\xc0\x00\x11\x08", b"\xff\xc2\x00\x11\x08", b"\xff\xc2\x00\x0b\x08", b"\xff\xc0\x00\x0b\x08"):
        if marker in data:
            return data.index(marker)
    raise ValueError("no frame")


def many_scans(width: int, height: int, num_scans: int) -> bytes:
    """A progressive gray JPEG whose last scan stands there so many times."""
    data = encoded(Image.new("L", (width, height), 77), "JPEG", progressive=True)
    starts = [at for at in range(len(data) - 1) if data[at : at + 2] == b"\xff\xda"]
    scan = data[starts[-1] : -2]
    return data[: starts[-1]] + scan * max(0, num_scans - len(starts) + 1) + b"\xff\xd9"


def exif_blocks() -> list[bytes]:
    """TIFF structures that lead a careless reader in circles or out of bounds."""
    entry = struct.pack("<HHII", 0x0112, 3, 1, 1)
    head = b"II*\0\x08\0\0\0"
    return [
        head + b"\1\0" + entry + b"\x08\0\0\0",  # the next directory is this one
        head + b"\1\0" + struct.pack("<HHII", 0x8769, 4, 1, 8) + bytes(4),  # so is the sub-directory
        head + b"\xff\xff" + entry * 3,
        b"II*\0\xff\xff\xff\xff",
        b"II*\0\0\0\0\0" + entry,
        head + b"\1\0" + struct.pack("<HHII", 0x0112, 3, 0xFFFFFFFF, 0xFFFFFFFF) + bytes(4),
        head + b"\1\0" + struct.pack("<HHII", 0x0112, 2, 1, 6) + bytes(4),  # a text for an orientation
        head + b"\1\0" + struct.pack("<HHII", 0x0112, 3, 1, 9) + bytes(4),
        head + b"\1\0" + struct.pack("<HHII", 0x0112, 3, 1, 0xFFFF) + bytes(4),
        b"MM\0*" + bytes(4),
        b"",
        b"II",
        PAYLOAD,
    ]


def _jpegs() -> Iterator[tuple[str, Callable[[], bytes], frozenset[Reason | None]]]:
    whole, progressive = small("JPEG"), small("JPEG", progressive=True)
    for width, height in ((65_535, 65_535), (65_500, 65_500), (16_385, 40), (30_000, 30_000), (9_000, 9_000)):
        for data in (whole, progressive):
            yield "size", functools.partial(jpeg_with_size, data, width, height), TOO_LARGE
    for width, height in ((0, 40), (40, 0), (0, 0)):
        yield "size", functools.partial(jpeg_with_size, whole, width, height), BROKEN
    for width, height in ((8_000, 8_000), (4_000, 4_000), (640, 480)):  # pixels that never come
        for data in (whole, progressive):
            yield "size", functools.partial(jpeg_with_size, data, width, height), BROKEN | TRUNCATED
    yield "size", functools.partial(jpeg_with_size, whole, 16, 16), MENDED  # more pixels than it says
    for num_scans, expected in ((1_000, BROKEN), (51, BROKEN), (50, TAKEN)):
        yield "scans", functools.partial(many_scans, 64, 64, num_scans), expected
    yield "scans", functools.partial(many_scans, 4_000, 4_000, 1_000), BROKEN
    yield "heavy_scans", functools.partial(many_scans, 8_000, 8_000, 1_000), BROKEN
    yield "heavy_scans", functools.partial(many_scans, 8_000, 8_000, 50), TAKEN | {Reason.DECODE_TIMED_OUT}
    start = _sof(whole)
    for at, value, expected in (
        (start + 4, 12, BROKEN),  # precision
        (start + 4, 0, BROKEN),
        (start + 9, 0, BROKEN),  # components
        (start + 9, 1, BROKEN),
        (start + 9, 255, BROKEN),
        (start + 11, 0x00, BROKEN),  # sampling factors
        (start + 11, 0x55, BROKEN),
        (start + 11, 0x44, MENDED),
        (start + 11, 0x31, MENDED),
        (start + 12, 3, BROKEN),  # a quantization table that is not there
        (start + 12, 255, BROKEN),
        (start + 1, 0xC1, TAKEN),  # extended: what it holds is baseline
        (start + 1, 0xC3, BROKEN),
        (start + 1, 0xC5, BROKEN),
        (start + 1, 0xC9, MENDED),  # arithmetic
        (start + 1, 0xCB, BROKEN),
        (start + 1, 0xC2, MENDED),
        (start + 1, 0xF7, BROKEN),  # JPEG-LS: no frame at all
    ):
        yield (
            "frame",
            functools.partial(lambda at, value: whole[:at] + bytes([value]) + whole[at + 1 :], at, value),
            expected,
        )
    body = whole[2:]
    first = [
        (jpeg_segment(0xC4, b"\0" + b"\xff" * 16 + bytes(200)), BROKEN),  # 4080 codes of one length and less
        (jpeg_segment(0xC4, b"\x1f" + bytes(16)), BROKEN),
        (jpeg_segment(0xC4, b"\0\3" + bytes(15) + b"\1\2\3"), MENDED),
        (jpeg_segment(0xDB, b"\xff" + bytes(64)), BROKEN),
        (jpeg_segment(0xDB, b"\0" + bytes(64)), MENDED),
        (jpeg_segment(0xDB, b"\0"), BROKEN | TAKEN),
        (jpeg_segment(0xDD, b"\0\1"), MENDED),
        (jpeg_segment(0xDD, b""), MENDED),
        (jpeg_segment(0xDC, b"\0\x20"), MENDED),
        (jpeg_segment(0xC0, bytes(3)), BROKEN),
        (jpeg_segment(0xC8, b"JPG"), MENDED),
        (jpeg_segment(0xE0, b"JFIF\0\7\7\0\0\1\0\1\xff\xff" + bytes(99)), TAKEN),
        (jpeg_segment(0xEE, b"Adobe" + bytes(7)), TAKEN),
        (jpeg_segment(0xEE, b"Adobe\0d\0\0\0\0\xff"), MENDED),
        (jpeg_segment(0xE2, b"ICC_PROFILE\0\1\1" + deflated_zeros(20_000_000)[:60_000]), TAKEN),
        (jpeg_segment(0xE2, b"ICC_PROFILE\0\xff\0"), TAKEN),
        (jpeg_segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\xff\xff\xff\xff"), TAKEN),
        (jpeg_segment(0xFE, PAYLOAD), TAKEN),
        (b"\xff" * 1_000_000, TAKEN),
        (bytes(1_000_000), FOREIGN),
        (b"\xff\xd0" * 150_000, BROKEN),
        (b"\xff\xe5\0\0", MENDED),
        (b"\xff\xe5\0\1", MENDED),
        (jpeg_segment(0xFE, bytes(65_000)) * 100, TAKEN),
        (b"\xff\xe1\xff\xff", BROKEN | TRUNCATED | TAKEN),
        (b"\xff\xd8", BROKEN | TRUNCATED),
    ]
    for inserted, expected in first:
        yield "segment", functools.partial(lambda inserted: b"\xff\xd8" + inserted + body, inserted), expected
    for marker, expected in ((b"\xff\xdb", BROKEN), (b"\xff\xc4", MENDED), (b"\xff\xda", BROKEN)):
        yield "segment", functools.partial(lambda marker: whole.replace(marker, b"\xff\xfe"), marker), expected
    yield "segment", lambda: whole[:-2] + jpeg_segment(0xDA, b"\1\1\0\0\x3f\0") + b"\0\xff\xd9", MENDED
    yield "segment", lambda: b"\xff\xd8\xff\xd9", BROKEN
    yield "segment", lambda: b"\xff\xd8\xff\xda\0\2\xff\xd9", BROKEN
    at = whole.index(b"\xff\xda") + 14
    for junk in (b"\xff\xd3", b"\xff\xdc\0\4\0\1", b"\xff\0" * 50_000, b"\xff\xd0" * 5_000):
        yield "coded_data", functools.partial(lambda junk: whole[: at + 90] + junk + whole[at + 90 :], junk), MENDED
    for seed in range(20):
        noise = random.Random(seed).randbytes(3_000).replace(b"\xff", b"\xfe")
        yield "coded_data", functools.partial(lambda noise: whole[:at] + noise + b"\xff\xd9", noise), MENDED
    for share in range(1, 20):
        # A progressive picture may do without its last scans: that is a whole file, only coarser.
        for data, expected in ((whole, BROKEN | TRUNCATED), (progressive, MENDED)):
            cut = at + (len(data) - at) * share // 20
            yield "cut_and_ended", functools.partial(lambda data, cut: data[:cut] + b"\xff\xd9", data, cut), expected
    for number, block in enumerate(exif_blocks()):
        yield "exif", functools.partial(encoded, textured(64, 48), "JPEG", exif=b"Exif\0\0" + block), TAKEN
        yield "exif", functools.partial(encoded, textured(64, 48), "WEBP", exif=block), TAKEN
        yield "exif", functools.partial(png_insert, small("PNG"), png_chunk(b"eXIf", block)), TAKEN
        del number


# --- WebP


def riff(*chunks: tuple[bytes, bytes], length: int | None = None) -> bytes:
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body) if length is None else length) + body


def u24(value: int) -> bytes:
    return value.to_bytes(3, "little")


def webp_payload(width: int, height: int, *, lossless: bool = True, color: int = 60) -> tuple[bytes, bytes]:
    data = encoded(Image.new("RGB", (width, height), (color, 120, 200)), "WEBP", lossless=lossless)
    return data[12:16], data[20 : 20 + int.from_bytes(data[16:20], "little")]


def webp_animation(num_frames: int, canvas: int = 64, frame: int = 64, offset: int = 0) -> bytes:
    kind, payload = webp_payload(frame, frame)
    inner = kind + struct.pack("<I", len(payload)) + payload + b"\0" * (len(payload) % 2)
    one = (b"ANMF", u24(offset) + u24(offset) + u24(frame - 1) + u24(frame - 1) + u24(10) + b"\0" + inner)
    head = (b"VP8X", b"\2\0\0\0" + u24(canvas - 1) + u24(canvas - 1))
    return riff(head, (b"ANIM", bytes(6)), *[one] * num_frames)


def _webps() -> Iterator[tuple[str, Callable[[], bytes], frozenset[Reason | None]]]:
    whole, lossless = small("WEBP"), small("WEBP", lossless=True)
    kind, payload = webp_payload(64, 64)
    still = (kind, payload)
    for num_frames in (2, 100, 10_000):
        yield "animated", functools.partial(webp_animation, num_frames), TAKEN
    yield "animated", lambda: webp_animation(0), BROKEN
    yield "animated", lambda: webp_animation(2, 64, 32, 100), BROKEN  # outside of the canvas
    yield "animated", lambda: webp_animation(2, 16_384), TOO_LARGE
    yield "heavy_animated", lambda: webp_animation(2, 8_000), TAKEN | {Reason.DECODE_OUT_OF_MEMORY}
    for width, height in ((16_384, 16_384), (9_000, 9_000), (1 << 24, 1 << 24), (1 << 24, 1)):
        head = b"\0\0\0\0" + u24(width - 1) + u24(height - 1)
        yield "size", functools.partial(riff, (b"VP8X", head), still), TOO_LARGE
    for bits in (0xFFFFFFF, 0x3FFF, 0x3FFF << 14):
        bad = b"\x2f" + struct.pack("<I", bits) + payload[5:]
        expected = TOO_LARGE if bits == 0xFFFFFFF else TOO_SMALL
        yield "size", functools.partial(riff, (b"VP8L", bad)), expected
    at = whole.index(b"\x9d\x01\x2a")
    for width, height, expected in ((0, 0, BROKEN), (0x3FFF, 0x3FFF, TOO_LARGE), (640, 480, BROKEN | TRUNCATED)):
        sized = whole[: at + 3] + struct.pack("<HH", width, height) + whole[at + 7 :]
        yield "size", functools.partial(bytes, sized), expected
    for length in (0, 4, 11, 12, 30):
        yield (
            "length",
            functools.partial(lambda length: whole[:4] + struct.pack("<I", length) + whole[8:], length),
            MENDED,
        )
    for length in (len(whole), 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFFFFF7):
        yield (
            "length",
            functools.partial(lambda length: whole[:4] + struct.pack("<I", length) + whole[8:], length),
            TRUNCATED,
        )
    for length in (0, 1, 0x7FFFFFFF, 0xFFFFFFFF):
        yield (
            "length",
            functools.partial(lambda length: whole[:16] + struct.pack("<I", length) + whole[20:], length),
            BROKEN | TRUNCATED,
        )
    head = (b"VP8X", b"\x3e\0\0\0" + u24(63) + u24(63))
    for extra in (
        (b"ICCP", deflated_zeros(50_000_000)),
        (b"EXIF", b"\xff" * 1_000),
        (b"XMP ", PAYLOAD * 1_000),
        (b"ALPH", b"\xff" * 50),
        (b"JUNK", PAYLOAD),
    ):
        yield "chunk", functools.partial(riff, head, extra, still), MENDED
        yield "chunk", functools.partial(riff, (b"VP8X", b"\0\0\0\0" + u24(63) + u24(63)), still, extra), MENDED
    for kind_, body in (
        (b"JUNK", bytes(64)),
        (b"VP8X", bytes(4)),
        (b"VP8L", b"\x2f" + bytes(60)),
        (b"VP8L", bytes(60)),
    ):
        yield "chunk", functools.partial(riff, (kind_, body)), BROKEN | TOO_SMALL | TRUNCATED
    for seed in range(30):  # random prefix codes, where libwebp's CVE-2023-4863 was
        noise = random.Random(seed).randbytes(2_000)
        yield "coded_data", functools.partial(riff, (b"VP8L", payload[:5] + noise)), MENDED
    for seed in range(20):
        noise = random.Random(seed).randbytes(2_000)
        yield (
            "coded_data",
            functools.partial(lambda noise: whole[: at + 7] + noise[: len(whole) - at - 7], noise),
            MENDED | TRUNCATED,
        )
    for share in range(1, 20):
        body = payload_of(lossless)
        cut = body[: max(8, len(body) * share // 20)]
        yield "cut_and_ended", functools.partial(riff, (b"VP8L", cut)), BROKEN | TRUNCATED


def payload_of(webp: bytes) -> bytes:
    return webp[20 : 20 + int.from_bytes(webp[16:20], "little")]


# --- GIF


def gif(width: int, height: int, *blocks: bytes, flags: int = 0x80) -> bytes:
    palette = bytes(range(6)) if flags & 0x80 else b""
    return b"GIF89a" + struct.pack("<HHBBB", width, height, flags, 0, 0) + palette + b"".join(blocks) + b";"


def gif_frame(
    width: int, height: int, left: int = 0, top: int = 0, code_size: int = 2, data: bytes | None = None
) -> bytes:
    coded = b"\x44\x01" if data is None else data  # clear, end
    pieces = b"".join(bytes([len(coded[at : at + 255])]) + coded[at : at + 255] for at in range(0, len(coded), 255))
    return b"," + struct.pack("<HHHHB", left, top, width, height, 0) + bytes([code_size]) + pieces + b"\0"


def _gifs() -> Iterator[tuple[str, Callable[[], bytes], frozenset[Reason | None]]]:
    whole = small("GIF")
    at = whole.rindex(b",\0\0\0\0\x40\0\x30\0")
    frame = whole[at:-1]
    for width, height in ((65_535, 65_535), (30_000, 30_000), (9_000, 9_000), (17_000, 1_000)):
        yield "size", functools.partial(gif, width, height, gif_frame(20, 20)), TOO_LARGE
        yield "size", functools.partial(gif, 20, 20, gif_frame(width, height)), TOO_LARGE
    yield "size", lambda: gif(20, 20, gif_frame(20, 20, 65_000, 65_000)), TOO_LARGE
    yield "size", lambda: gif(0, 0, gif_frame(0, 0)), BROKEN
    yield "size", lambda: gif(8_000, 8_000, gif_frame(20, 20)), TAKEN | TRUNCATED | BROKEN
    yield "size", lambda: gif(40, 40, gif_frame(0, 40)), MENDED
    for code_size in (0, 1, 8, 9, 12, 13, 255):
        yield "coded_data", functools.partial(gif, 40, 40, gif_frame(40, 40, code_size=code_size)), MENDED
    yield "coded_data", lambda: gif(40, 40, gif_frame(40, 40, data=b"\x24\x49\x92" * 300_000)), MENDED  # clear for ever
    for seed in range(20):
        noise = random.Random(seed).randbytes(3_000)
        yield "coded_data", functools.partial(gif, 40, 40, gif_frame(40, 40, data=noise)), MENDED
    head = whole[:at]
    yield "animated", lambda: head + frame * 10_000 + b";" if len(frame) < 1_500 else head + frame * 2_000 + b";", TAKEN
    yield "animated", lambda: head + b"!\xff\x0bNETSCAPE2.0\3\1\0\0\0" + frame * 3 + b";", TAKEN
    yield "animated", lambda: head + frame + gif_frame(65_535, 65_535) + b";", TAKEN  # only the first frame counts
    yield "chunk", lambda: head + b"!\xfe" + (b"\xff" + bytes(255)) * 20_000 + b"\0" + frame + b";", TAKEN
    yield "chunk", lambda: head + b"!\xfe" + b"\x01x" * 500_000 + b"\0" + frame + b";", TAKEN
    yield "chunk", lambda: head + b"!\xf9\xff" + bytes(255) + b"\0" + frame + b";", MENDED
    yield "chunk", lambda: head + b"!\xf9\0" + frame + b";", MENDED
    yield "chunk", lambda: head + b"!" + frame + b";", BROKEN | TRUNCATED
    yield "chunk", lambda: head + b"x" + frame + b";", BROKEN
    yield "chunk", lambda: head + b";" + frame + b";", BROKEN
    yield "chunk", lambda: gif(40, 40, gif_frame(40, 40), flags=0), MENDED  # no palette
    yield "chunk", lambda: gif(40, 40, gif_frame(40, 40), flags=0x87), TRUNCATED | BROKEN
    for share in range(1, 20):
        cut = at + (len(whole) - at) * share // 20
        yield "cut_and_ended", functools.partial(lambda cut: whole[:cut] + b"\0;", cut), BROKEN | TRUNCATED


# --- what is something else, or two things at once


def _foreign() -> Iterator[tuple[str, Callable[[], bytes], frozenset[Reason | None]]]:
    picture = textured(64, 48)
    for kind in (
        "BMP",
        "TIFF",
        "ICO",
        "PPM",
        "TGA",
        "JPEG2000",
        "AVIF",
        "DDS",
        "PCX",
        "SGI",
        "ICNS",
        "PDF",
        "EPS",
        "SPIDER",
    ):
        image = picture.convert("F") if kind == "SPIDER" else picture
        yield "foreign", functools.partial(encoded, image, kind), FOREIGN
    bombs = [
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 65_535, 65_535, 1, 24, 0, 0, 0, 0, 0, 0),
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, -1, -(2**31), 1, 32, 3, 0, 0, 0, 0, 0),
        b"II*\0\x08\0\0\0\2\0" + struct.pack("<HHIIHHII", 256, 4, 1, 60_000, 257, 4, 1, 60_000) + bytes(4),
        b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 256, 4, 0xFFFFFFFF, 8) + b"\x08\0\0\0",
        b"MM\0+\0\x08\0\0" + b"\xff" * 64,
        b"\xff\x4f\xff\x51\0\x29\0\0" + struct.pack(">IIIIIIIIH", 60_000, 60_000, 0, 0, 1, 1, 0, 0, 3) + bytes(9),
        b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(64),
        b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(200),
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200),
        b"P6 60000 60000 255\n",
        b"\x01\xda\1\1\0\3\xff\xff\xff\xff\0\3" + bytes(500),
        b"8BPS\0\1" + bytes(6) + b"\0\3" + struct.pack(">II", 300_000, 300_000) + b"\0\x08\0\3",
        b"SIMPLE  =                    T",
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        b"<?xml version='1.0'?><!DOCTYPE l [<!ENTITY a 'aa'><!ENTITY b '&a;&a;'>]><svg>&b;</svg>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n(/etc/passwd) (r) file",
        b"%PDF-1.7\n1 0 obj\n",
        b"<!doctype html><html><script>location='http://169.254.169.254/'</script>",
        b"PK\3\4" + bytes(26),
        b"\x1f\x8b\x08\0" + deflated_zeros(50_000_000),
        b"\x7fELF\2\1\1" + bytes(57),
        b"MZ" + bytes(62),
        b"\0\0\1\0\1\0" + bytes(16),
        b"push graphic-context\nfill 'url(https://example.com/\"|ls \"-la)'",
        b"RIFF\x20\0\0\0AVI LIST",
        b"GIF88a" + bytes(50),
        b"\x89PNG\n\x1a\n" + bytes(50),
        b"\xff\xd8" + bytes(50),
        b"\xef\xbb\xbf<svg/>",
        bytes(1000),
        b"\n" * 10,
    ]
    for data in bombs:
        yield "foreign", functools.partial(bytes, data), FOREIGN
    yield "foreign", lambda: b"", frozenset({Reason.EMPTY_FILE})
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        whole = small(kind)
        for tail in (b"PK\3\4" + PAYLOAD, PAYLOAD * 100, b"MZ" + bytes(9_000), small("JPEG"), small("PNG")):
            yield "polyglot", functools.partial(lambda whole, tail: whole + tail, whole, tail), TAKEN
        for head in (b"%PDF-1.7\n", b"<html>", b"\n"):
            yield "polyglot", functools.partial(lambda whole, head: head + whole, whole, head), FOREIGN
    script = b"GIF89a/*\xff\0" + b"\0\0\0*/=1;alert(1);"
    yield "polyglot", functools.partial(bytes, script), TRUNCATED | BROKEN
    js = bytearray(small("GIF"))
    js[6:8] = b"/*"  # the width of the screen: 10,799
    yield (
        "polyglot",
        functools.partial(lambda data: data + b"*/=1;alert(1)//", bytes(js)),
        frozenset({Reason.ASPECT_EXTREME}),
    )
    yield "polyglot", lambda: small("JPEG")[:2] + jpeg_segment(0xFE, b"PK\3\4" + PAYLOAD) + small("JPEG")[2:], TAKEN
    yield "polyglot", lambda: png_insert(small("PNG"), png_chunk(b"tEXt", b"x\0" + PAYLOAD)), TAKEN
    wide = Image.new("RGB", (2_000, 20))
    for kind in ("JPEG", "PNG", "GIF", "WEBP"):
        yield "shape", functools.partial(encoded, wide, kind), frozenset({Reason.ASPECT_EXTREME})
        yield "shape", functools.partial(encoded, Image.new("RGB", (1, 1)), kind), TOO_SMALL
        yield "shape", functools.partial(encoded, Image.new("RGB", (15, 15)), kind), TOO_SMALL


def _damaged() -> Iterator[tuple[str, Callable[[], bytes], frozenset[Reason | None]]]:
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        whole = small(kind)
        for number in range(NUM_OFFSETS):
            length = 16 + (len(whole) - 16) * number // NUM_OFFSETS
            yield f"truncated_{kind}", functools.partial(lambda whole, length: whole[:length], whole, length), TRUNCATED
        for seed in range(40):
            yield f"flipped_{kind}", functools.partial(flipped, whole, seed), ANY


def flipped(data: bytes, seed: int) -> bytes:
    """Some bits turned over, behind the first bytes."""
    source = random.Random(seed)
    damaged = bytearray(data)
    for _ in range(1 + seed % 8):
        damaged[source.randrange(12, len(data))] ^= 1 << source.randrange(8)
    return bytes(damaged)


def corpus() -> list[Sample]:
    """All hostile files, in the same order every time."""
    found = [
        *((f"png_{group}", make, expected) for group, make, expected in _pngs()),
        *((f"jpeg_{group}", make, expected) for group, make, expected in _jpegs()),
        *((f"webp_{group}", make, expected) for group, make, expected in _webps()),
        *((f"gif_{group}", make, expected) for group, make, expected in _gifs()),
        *_foreign(),
        *_damaged(),
    ]
    return [
        Sample(f"{group}/{number:04d}", make, expected, is_heavy="heavy" in group)
        for number, (group, make, expected) in enumerate(found)
    ]


# --- what decent servers send


@dataclass(frozen=True)
class Benign:
    """A picture as decent servers send it."""

    name: str
    data: bytes


def benign(count: int) -> Iterator[Benign]:
    """Pictures in all formats, modes and usual encoder settings, in turn; sizes and contents differ."""
    makers = _benign_makers()
    source = random.Random(5)
    bases = [textured(256, 256, seed, roughness=seed / 2) for seed in range(8)]
    for number in range(count):
        name, make = makers[number % len(makers)]
        left, top = source.randrange(96), source.randrange(96)
        picture = bases[source.randrange(8)].crop(
            (left, top, left + source.randrange(32, 160), top + source.randrange(32, 160))
        )
        yield Benign(f"{name}/{number}", make(picture))


def _benign_makers() -> list[tuple[str, Callable[[Image.Image], bytes]]]:
    found: list[tuple[str, Callable[[Image.Image], bytes]]] = []

    def add(name: str, kind: str, mode: str | None = None, **options: Any) -> None:
        def make(picture: Image.Image) -> bytes:
            turned = picture if mode is None else in_mode(picture, mode)
            return encoded(turned, kind, **options)

        found.append((name, make))

    for subsampling in (0, 1, 2):
        for progressive in (False, True):
            add(
                f"jpeg_{subsampling}_{progressive}",
                "JPEG",
                quality=60 + 15 * subsampling,
                subsampling=subsampling,
                progressive=progressive,
                optimize=True,
            )
    add("jpeg_restarts", "JPEG", restart_marker_blocks=3)
    add("jpeg_gray", "JPEG", "L")
    add("jpeg_gray_progressive", "JPEG", "L", progressive=True)
    add("jpeg_cmyk", "JPEG", "CMYK")
    add("jpeg_rgb", "JPEG", keep_rgb=True)
    add("jpeg_icc", "JPEG", icc_profile=bytes(3_000), comment=b"a comment", dpi=(300, 300))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        add(f"jpeg_turned_{orientation}", "JPEG", exif=exif.tobytes())
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        add(f"png_{mode}", "PNG", mode)
    add("png_transparent_index", "PNG", "P", transparency=3)
    add("png_transparent_color", "PNG", "RGB", transparency=(128, 128, 128))
    add("png_bits", "PNG", "P", bits=8, optimize=True)
    add("webp", "WEBP")
    add("webp_alpha", "WEBP", "RGBA")
    add("webp_lossless", "WEBP", lossless=True)
    add("webp_lossless_alpha", "WEBP", "RGBA", lossless=True)
    add("gif", "GIF")
    add("gif_gray", "GIF", "L")
    add("gif_transparent", "GIF", "P", transparency=3)
    add("gif_interlaced", "GIF", "P", interlace=1)
    for kind in ("GIF", "WEBP", "PNG"):
        found.append((f"{kind}_animated", functools.partial(_animated, kind)))
    return found


def _animated(kind: str, picture: Image.Image) -> bytes:
    frames = [picture.rotate(90 * turn) for turn in range(1, 4)]
    return encoded(picture, kind, save_all=True, append_images=frames, duration=100, loop=0)


def in_mode(picture: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257 + 3)
    if mode in ("LA", "RGBA"):
        with_alpha = picture.convert(mode)
        with_alpha.putalpha(picture.getchannel("G"))
        return with_alpha
    if mode == "P":
        return picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    return picture.convert(mode)
