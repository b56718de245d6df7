"""The user's own masks, read from files."""

import glob
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".jpg", ".jpeg")


@dataclass(frozen=True)
class MaskFile:
    """One mask.

    Attributes:
        name: Its path.
        sha256: Of its bytes.
        pixels: (height, width) uint8; bright is what is to be repainted.
    """

    name: str
    sha256: str
    pixels: np.ndarray


def read_mask_files(patterns: Sequence[str]) -> list[MaskFile]:
    """Reads pictures as masks.

    Args:
        patterns: Files, folders, and globs (``**`` crosses folders).

    Returns:
        The masks, sorted by name, each once.

    Raises:
        ValueError: A pattern matches nothing, or a file is no picture; names it.
    """
    paths: set[Path] = set()
    for pattern in patterns:
        matches = _find(pattern)
        if not matches:
            raise ValueError(
                f"encode.mask_files: {pattern!r} matches no file; give pictures, a folder of them, or globs"
            )
        paths.update(matches)
    return [_read(path) for path in sorted(paths)]


def _find(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        return [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES]
    if path.is_file():
        return [path]
    return [Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file()]


def _read(path: Path) -> MaskFile:
    from PIL import Image  # costs a part of a second, which most commands do not need

    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            if picture.has_transparency_data:
                raise ValueError("parts of it are transparent, which could mean either; flatten it: bright = repaint")
            pixels = _gray(picture)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"encode.mask_files: {str(path)!r} cannot be read as a mask ({error})") from error
    return MaskFile(str(path), hashlib.sha256(data).hexdigest(), pixels)


def _gray(picture: "Image.Image") -> np.ndarray:
    """8 bits a pixel; of 16 bits the upper half, where PIL's own conversion would clip to white."""
    if picture.mode.startswith("I;16") or picture.mode == "I":
        return (np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is unknown; save it with 8 bits")
    return np.array(picture.convert("L"))
