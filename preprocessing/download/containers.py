"""What a picture's file says before anything is decoded: format, size, orientation, and whether the file is whole.

A decoder is never shown a file that these few lines refuse, and of the others only what makes pixels: comments, color
profiles, thumbnails and EXIF, where most of the decoders' surprises live, are left out (JPEG and PNG; WebP and GIF
are handed on as they are, since their readers leave metadata alone).

Allowed are JPEG, PNG, WebP and GIF, by their first bytes; a file's name and its Content-Type say nothing. What stands
behind a file's end marker (a ZIP archive, a script, a second picture) is dropped: a decoder never sees it, and it is
never stored.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from preprocessing.contracts.reasons import Reason

Format = Literal["JPEG", "PNG", "WEBP", "GIF"]

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_PIXEL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_JPEG_SOI = b"\xff\xd8"
_JPEG_EOI, _JPEG_SOS, _JPEG_APP1 = 0xD9, 0xDA, 0xE1
_JPEG_STANDALONE = frozenset({0x01, *range(0xD0, 0xD8)})  # TEM and the restart markers have no length
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15 without DHT, JPG and DAC
# All APPn and comments: EXIF, XMP, color profiles, thumbnails, further pictures. Of APP0 (JFIF) and APP14 (Adobe) only
# what tells of the colors is written anew.
_JPEG_METADATA = frozenset({*range(0xE0, 0xF0), 0xFE})
_JPEG_APP0, _JPEG_APP14 = 0xE0, 0xEE
_JFIF = b"\xff\xe0\x00\x10JFIF\0\1\1\0\0\1\0\1\0\0"
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_MAX_JPEG_SCANS = 50  # encoders write about ten; a thousand over a large picture is an attack on the processor
_MAX_PIECES = 100_000  # segments or chunks, likewise
_JPEG_NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
_EXIF_PREFIX = b"Exif\0\0"
_EXIF_ORIENTATION, _EXIF_SHORT = 0x0112, 3


class ImageRefused(ValueError):  # noqa: N818 - a verdict on a row, not a failure of the program
    """A picture is not taken.

    Attributes:
        reason: The drop reason.
        detail: What was found, for people.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class JpegFrame:
    """How a JPEG holds its pixels.

    Attributes:
        process: The frame's marker: 0xC0 baseline, 0xC1 extended, 0xC2 progressive, others rare.
        precision: Bits a sample.
        components: Identifier, horizontal and vertical sampling factor of each.
        adobe_transform: Of the Adobe segment; None without one.
        has_jfif: Whether there is a JFIF segment.
    """

    process: int
    precision: int
    components: tuple[tuple[int, int, int], ...]
    adobe_transform: int | None = None
    has_jfif: bool = False

    @property
    def is_common(self) -> bool:
        """Whether every decoder reads it: 8 bits, Huffman-coded, gray or three components."""
        return (
            self.process in (_BASELINE, _EXTENDED, _PROGRESSIVE)
            and self.precision == 8
            and len(self.components) in (1, 3)
        )

    @property
    def is_plain(self) -> bool:
        """Whether every reader sees the same colors: YCbCr, baseline or progressive, chroma at full or half size."""
        identifiers = bytes(component[0] for component in self.components)
        samplings = [component[1:] for component in self.components]
        return (
            self.is_common
            and self.process != _EXTENDED
            and len(samplings) == 3
            and self.adobe_transform in (None, 1)
            and (self.has_jfif or self.adobe_transform == 1 or identifiers == b"\1\2\3")
            and samplings[0] in ((1, 1), (2, 1), (1, 2), (2, 2))
            and samplings[1:] == [(1, 1), (1, 1)]
        )


@dataclass(frozen=True)
class Container:
    """A file that is whole, as far as its container tells.

    Attributes:
        format: One of four.
        width: Of the stored picture, in pixels, by the header: before the orientation is applied.
        height: Likewise.
        orientation: EXIF's, 1 to 8; 1 where the file says nothing.
        pixels: A file of the same format with nothing in it but what the pixels need.
        jpeg: How its pixels are held; None for other formats.
    """

    format: Format
    width: int
    height: int
    orientation: int
    pixels: bytes
    jpeg: JpegFrame | None = None


def read_container(data: bytes) -> Container:
    """Reads what a file says of itself, without decoding.

    Args:
        data: The whole file.

    Returns:
        Its container.

    Raises:
        ImageRefused: ``EMPTY_FILE``; ``NOT_AN_IMAGE`` by its first bytes; ``IMAGE_TRUNCATED`` where it ends before its
            format's end marker; ``IMAGE_BROKEN`` where it does not follow its format.

    Source: ITU T.81 annex B (JPEG), RFC 2083 (PNG), RFC 9649 (WebP), the GIF89a specification, EXIF 2.3 § 4.6.
    """
    if not data:
        raise ImageRefused(Reason.EMPTY_FILE, "0 bytes")
    if data.startswith(_JPEG_SOI + b"\xff"):
        container = _read_jpeg(data)
    elif data.startswith(_PNG_SIGNATURE):
        container = _read_png(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        container = _read_webp(data)
    elif data[:6] in (b"GIF87a", b"GIF89a"):
        container = _read_gif(data)
    else:
        raise ImageRefused(Reason.NOT_AN_IMAGE, f"{len(data)} bytes that begin with {data[:16]!r}")
    if container.width < 1 or container.height < 1:
        raise _broken(f"{container.format} of {container.width} × {container.height} pixels")
    return container


def _truncated(what: str, data: bytes) -> ImageRefused:
    return ImageRefused(Reason.IMAGE_TRUNCATED, f"{what} after {len(data)} bytes")


def _broken(detail: str) -> ImageRefused:
    return ImageRefused(Reason.IMAGE_BROKEN, detail)


def _read_jpeg(data: bytes) -> Container:
    """Walks the markers to the end of the image: one inside a thumbnail must not count."""
    frames: list[tuple[int, bytes]] = []
    orientation, adobe_transform, has_jfif, num_scans = 1, None, False, 0
    kept: list[bytes] = []
    for marker, segment, whole in _jpeg_segments(data):
        if marker in _JPEG_FRAMES:
            frames.append((marker, segment))
        elif marker == _JPEG_APP1 and segment.startswith(_EXIF_PREFIX):
            orientation = exif_orientation(segment)
        elif marker == _JPEG_APP0 and segment.startswith(b"JFIF\0"):
            has_jfif = True
        elif marker == _JPEG_APP14 and segment.startswith(b"Adobe") and len(segment) >= 12:
            adobe_transform = segment[11]
        elif marker == _JPEG_SOS:
            num_scans += 1
        if num_scans > _MAX_JPEG_SCANS:
            raise _broken(f"JPEG of over {_MAX_JPEG_SCANS} scans")
        if marker not in _JPEG_METADATA:
            kept.append(whole)
    if len(frames) != 1:
        raise _broken(f"JPEG of {len(frames)} frames")
    (process, header) = frames[0]
    if len(header) < 6 or len(header) < 6 + 3 * header[5]:
        raise _broken("JPEG frame header too short")
    components = tuple((header[at], header[at + 1] >> 4, header[at + 1] & 15) for at in range(6, 6 + 3 * header[5], 3))
    frame = JpegFrame(process, header[0], components, adobe_transform, has_jfif)
    size = int.from_bytes(header[3:5], "big"), int.from_bytes(header[1:3], "big")
    colors = _JFIF if has_jfif else b""
    if adobe_transform is not None:
        colors += b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0" + bytes([adobe_transform])
    return Container("JPEG", *size, orientation, b"".join([_JPEG_SOI, colors, *kept, b"\xff\xd9"]), frame)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Marker, body and whole of each segment up to the end of the image; a scan's coded data belongs to its whole."""
    position = 2
    for _ in range(_MAX_PIECES):
        marker, position = _next_jpeg_marker(data, position)
        if marker == _JPEG_EOI:
            return
        if marker in _JPEG_STANDALONE:
            continue
        start = position
        position += int.from_bytes(data[start : start + 2], "big")
        if start + 2 > len(data) or position > len(data):
            raise _truncated(f"JPEG ends inside segment 0x{marker:02X}", data)
        segment = data[start + 2 : position]
        if marker == _JPEG_SOS:  # entropy-coded data follows, up to the next real marker
            found = _JPEG_NEXT_MARKER.search(data, position)
            if found is None:
                raise _truncated("JPEG without its end marker", data)
            position = found.start()
        yield marker, segment, b"\xff" + data[start - 1 : position]
    raise _broken(f"JPEG of over {_MAX_PIECES:,} segments")


def _next_jpeg_marker(data: bytes, position: int) -> tuple[int, int]:
    """The next marker and the position behind it; decoders pass over junk between segments, and so does this."""
    position = data.find(0xFF, position)
    if position < 0:
        raise _truncated("JPEG without its end marker", data)
    while position < len(data) and data[position] == 0xFF:
        position += 1
    if position >= len(data):
        raise _truncated("JPEG without its end marker", data)
    return data[position], position + 1


def _read_png(data: bytes) -> Container:
    size: tuple[int, int] | None = None
    orientation = 1
    kept = [_PNG_SIGNATURE]
    for number, (kind, start, end) in enumerate(_png_chunks(data)):
        body = data[start + 8 : end - 4]
        if (kind == b"IHDR") != (number == 0) or number > _MAX_PIECES:
            raise _broken(f"PNG has {kind!r} as chunk {number}")
        if kind == b"IHDR" and len(body) == 13:
            size = int.from_bytes(body[:4], "big"), int.from_bytes(body[4:8], "big")
        if kind == b"eXIf":
            orientation = exif_orientation(body)
        if kind in _PNG_PIXEL_CHUNKS:
            kept.append(data[start:end])
    if size is None:
        raise _broken("PNG without a header")
    return Container("PNG", *size, orientation, b"".join(kept))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each chunk, up to the closing one."""
    position = len(_PNG_SIGNATURE)
    kind = b""
    while kind != b"IEND":
        if position + 12 > len(data):
            raise _truncated("PNG without its end chunk", data)
        kind = data[position + 4 : position + 8]
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if end > len(data):
            raise _truncated(f"PNG ends inside chunk {kind!r}", data)
        yield kind, position, end
        position = end


def _read_webp(data: bytes) -> Container:
    end = 8 + int.from_bytes(data[4:8], "little")
    if len(data) < end or len(data) < 30:
        raise _truncated(f"WebP of {end} bytes ends", data)
    kind = data[12:16]
    if kind == b"VP8X":
        size = 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    elif kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        size = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 ":
        size = int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    else:
        raise _broken(f"WebP that begins with chunk {kind!r}")
    return Container("WEBP", *size, _webp_orientation(data, end), data[:end])


def _webp_orientation(data: bytes, end: int) -> int:
    position = 12
    while position + 8 <= end:
        body_end = position + 8 + int.from_bytes(data[position + 4 : position + 8], "little")
        if data[position : position + 4] == b"EXIF":
            return exif_orientation(data[position + 8 : body_end])
        position = body_end + body_end % 2  # chunks start at even offsets
    return 1


def _read_gif(data: bytes) -> Container:
    """Walks the blocks to the trailer; the picture is the first frame, which may be larger than the screen."""
    if len(data) < 13:
        raise _truncated("GIF ends inside its header", data)
    width, height = struct.unpack_from("<HH", data, 6)
    position = 13 + _gif_palette_num_bytes(data[10])
    num_frames = 0
    while True:
        introducer = data[position : position + 1]
        if introducer == b";":
            break
        if introducer == b"!":
            position = _skip_gif_blocks(data, position + 2)
        elif introducer == b"," and position + 10 < len(data):
            left, top, frame_width, frame_height, flags = struct.unpack_from("<HHHHB", data, position + 1)
            if num_frames == 0:
                width, height = max(width, left + frame_width), max(height, top + frame_height)
            num_frames += 1
            position = _skip_gif_blocks(data, position + 11 + _gif_palette_num_bytes(flags))
        elif position + 10 >= len(data):
            raise _truncated("GIF without its trailer", data)
        else:
            raise _broken(f"GIF has an unknown block at byte {position}")
    if num_frames == 0:
        raise _broken("GIF without a frame")
    return Container("GIF", width, height, 1, data)


def _gif_palette_num_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _skip_gif_blocks(data: bytes, position: int) -> int:
    while position < len(data) and data[position]:
        position += 1 + data[position]
    if position >= len(data):
        raise _truncated("GIF ends inside a block", data)
    return position + 1


def exif_orientation(exif: bytes) -> int:
    r"""The orientation that an EXIF block asks for.

    Args:
        exif: A TIFF structure, with or without ``Exif\0\0`` before it; anything at all may stand in it.

    Returns:
        1 to 8 as EXIF has it; 1 (upright) where it says nothing that makes sense.
    """
    tiff = exif.removeprefix(_EXIF_PREFIX)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return 1
    (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
    if directory + 2 > len(tiff):
        return 1
    (num_entries,) = struct.unpack_from(f"{order}H", tiff, directory)
    for index in range(num_entries):
        position = directory + 2 + 12 * index
        if position + 12 > len(tiff):
            break
        tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, position)
        if tag == _EXIF_ORIENTATION and kind == _EXIF_SHORT:
            return value if 1 <= value <= 8 else 1
    return 1
