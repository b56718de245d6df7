"""Rows of a dataset as pictures: the crop, its masks, and what the VAE makes of the stored latents.

The tensors are decoded as they are stored, not made anew: what is wrong in them is seen here. torch is imported only
where there is something to decode.
"""

import base64
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import polars as pl
from PIL import Image, UnidentifiedImageError

from infra.storage import ObjectStore
from model.masks import unpack_mask
from preprocessing.block_lists import host_of
from preprocessing.contracts.display import display_text, number_text
from preprocessing.contracts.manifest import DatasetFile, Manifest
from preprocessing.contracts.tombstones import Tombstones
from preprocessing.known_bases import find_base
from preprocessing.stored_parquet import first_rows

if TYPE_CHECKING:
    from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]  # diffusers exports lazily

LOGGER = logging.getLogger(__name__)

MAX_VARIANTS: Final = 4
"""Masks of a row that are shown."""

_NUM_FILES: Final = 4
_TILE_PX: Final = 320
_BATCH_SIZE: Final = 4
_MAX_PICTURE_BYTES: Final = 32 << 20
_MAX_CAPTION_CHARS: Final = 400
_SCALARS: Final = ("uid", "url", "caption", "punsafe", "pwatermark", "similarity", "aesthetic", "width", "height")

OnProgress = Callable[[int, int], None]
"""Told pictures decoded, and pictures in all."""


@dataclass(frozen=True)
class Tile:
    """One picture.

    Attributes:
        label: What it is.
        alt: The same for those who do not see it.
        source: A ``data:`` URI; None where it cannot be shown.
        note: A few words more.
        is_small: Has fewer pixels than it is drawn with, and is to be drawn without smoothing.
    """

    label: str
    alt: str
    source: str | None
    note: str = ""
    is_small: bool = False


@dataclass(frozen=True)
class Card:
    """One row; all texts are fit for display, and none is escaped.

    Attributes:
        uid: The row's.
        caption: Cut to a length.
        num_caption_chars: Before it was cut; 0 where it was not.
        host: Where the picture came from.
        split: ``train`` or ``validation``, where rows are split by file.
        scores: Name and value of each one that is there.
        tiles: The crop and what was decoded of it.
        variants: For each mask, the mask and what was decoded of the masked picture's latents.
    """

    uid: str
    caption: str
    num_caption_chars: int
    host: str
    split: str
    scores: tuple[tuple[str, str], ...]
    tiles: tuple[Tile, ...] = ()
    variants: tuple[tuple[Tile, ...], ...] = ()

    @property
    def columns(self) -> tuple[tuple[Tile, ...], ...]:
        """What stands below each other: the crop over what was decoded of it, each mask over what it left."""
        return (self.tiles, *self.variants) if self.variants else tuple((tile,) for tile in self.tiles)


@dataclass(frozen=True)
class ContactSheet:
    """Rows as pictures, and what there is to say about all of them."""

    cards: tuple[Card, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Latents:
    """What is needed of the dataset's `LatentSpec`; read leniently: a page about an old dataset is still a page."""

    channels: int
    side: int
    scaling_factor: float
    dtype: np.dtype
    weights_sha256: str

    @staticmethod
    def of(manifest: Manifest) -> "_Latents | None":
        spec = manifest.specs.get("latents", {})
        try:
            side = int(spec["resolution_px"]) // int(spec.get("factor", 8))
            dtype = np.dtype({"float16": "<f2", "float32": "<f4"}[spec.get("dtype", "float16")])
            return _Latents(
                int(spec["channels"]), side, float(spec["scaling_factor"]), dtype, str(spec["weights_sha256"])
            )
        except (KeyError, TypeError, ValueError):
            return None

    def mean(self, moments: bytes) -> np.ndarray | None:
        """(channels, h, w) float32; None where the bytes are not as many as they should be."""
        values = np.frombuffer(moments, self.dtype) if len(moments) % self.dtype.itemsize == 0 else np.empty(0)
        if values.size != 2 * self.channels * self.side**2:
            return None
        return values.reshape(2 * self.channels, self.side, self.side)[: self.channels].astype(np.float32)

    def mask(self, bits: bytes) -> np.ndarray | None:
        """(h, w) uint8 in {0, 1}."""
        if len(bits) != (self.side**2 + 7) // 8:
            return None
        return unpack_mask(bits, (self.side, self.side))


def make_contact_sheet(
    store: ObjectStore,
    prefix: str,
    manifest: Manifest,
    num_rows: int,
    *,
    bases: Sequence[Path] = (),
    on_progress: OnProgress | None = None,
) -> ContactSheet:
    """Shows some rows of a dataset, always the same ones: the first of each of some files, spread evenly over it.

    Forgotten rows are not among them.

    Args:
        store: Where it is.
        prefix: Key of its folder.
        manifest: Its manifest.
        num_rows: How many; fewer where there are fewer.
        bases: Folders of base weights that may hold the VAE by which it was encoded, beside those on this machine.
        on_progress: Told how much is decoded.
    """
    files = [file for file in manifest.files("rows") if file.num_rows]
    parts = _choose(files, num_rows)
    latents = _Latents.of(manifest)
    variants = range(MAX_VARIANTS)
    tensors = ["moments", *(f"mask_{k}" for k in variants), *(f"masked_moments_{k}" for k in variants)]
    rows, tombstones = [], Tombstones.load(store)
    for file, count in parts:
        table = first_rows(store, file.key(prefix), count, [*_SCALARS, "sha256", "image", *tensors])
        rows += [
            {**row, "_split": file.split or row.get("split") or ""}
            for row in table.to_pylist()
            if not tombstones.match(row.get("uid"), row.get("url"), None, row.get("sha256"))
        ]
    notes, decoded = [], {}
    wanted = _to_decode(rows, latents)
    if wanted and latents is not None:
        base = find_base({"vae": latents.weights_sha256}, bases)
        if base is None:
            notes.append(
                f"The latents are not decoded: no VAE with sha256 {latents.weights_sha256[:16]}… is on this machine. "
                "Name the base weights that the dataset was encoded with by --base."
            )
        else:
            decoded = _decode(base / "vae", latents, wanted, on_progress)
    cards = tuple(_card(number, row, latents, decoded) for number, row in enumerate(rows))
    return ContactSheet(cards, (*notes, *_remarks(manifest, rows)))


def _choose(files: Sequence[DatasetFile], num_rows: int) -> list[tuple[DatasetFile, int]]:
    """Some files, spread evenly, and how many rows of each; held-out rows are looked at, too."""
    if not files or num_rows < 1:
        return []
    held_out = [file for file in files if file.split == "validation"]
    others = [file for file in files if file.split != "validation"]
    num_held_out = min(len(held_out), 1)
    num_others = min(len(others), max(1, _NUM_FILES - num_held_out), num_rows)
    chosen = [others[index * len(others) // num_others] for index in range(num_others)] if others else []
    chosen += held_out[: max(0, min(num_held_out, num_rows - len(chosen)))]
    counts, left = {}, num_rows
    for place, file in enumerate(sorted(chosen, key=lambda file: file.num_rows)):  # what a small one lacks, others give
        counts[file.name] = min(file.num_rows, -(-left // (len(chosen) - place)))
        left -= counts[file.name]
    for file in files:  # shards of a few rows: then more of them
        if left and file.name not in counts:
            counts[file.name] = min(file.num_rows, left)
            left -= counts[file.name]
    return [(file, counts[file.name]) for file in files if file.name in counts]


def _remarks(manifest: Manifest, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if manifest.stage != "encode" or not rows:
        return []
    first = rows[0]
    remarks = []
    if "image" not in first:
        remarks.append("The crops are not stored (encode.image none): what is seen comes from the latents.")
    if "moments" not in first:
        remarks.append("The moments are not stored (encode.moments false): training encodes the stored crop.")
    num_variants = manifest.specs.get("masks", {}).get("num_variants", manifest.config.get("num_mask_variants", 0))
    if num_variants == 0:
        remarks.append("No masks are stored (K = 0): they are drawn while training.")
    elif isinstance(num_variants, int) and num_variants > MAX_VARIANTS:
        remarks.append(f"The first {MAX_VARIANTS} of {num_variants} masks are shown.")
    return remarks


# ------------------------------------------------------------------------------------------------------------ decoding


def _to_decode(rows: Sequence[Mapping[str, Any]], latents: _Latents | None) -> dict[tuple[int, str], np.ndarray]:
    """(row, column) → latents' mean, of all moments that are there and have the size that they should have."""
    if latents is None:
        return {}
    found = {}
    for number, row in enumerate(rows):
        for name in row:
            if name == "moments" or name.startswith("masked_moments_"):
                mean = latents.mean(row[name])
                if mean is not None and np.isfinite(mean).all():
                    found[number, name] = mean
    return found


def _decode(
    folder: Path,
    latents: _Latents,
    wanted: Mapping[tuple[int, str], np.ndarray],
    on_progress: OnProgress | None,
) -> dict[tuple[int, str], np.ndarray]:
    """The same keys → (side, side, 3) uint8."""
    import torch

    from model.encoders import load_vae, pixels_to_images

    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = load_vae(folder, device)
    keys = list(wanted)
    decoded: dict[tuple[int, str], np.ndarray] = {}
    for start in range(0, len(keys), _BATCH_SIZE):
        part = keys[start : start + _BATCH_SIZE]
        means = torch.from_numpy(np.stack([wanted[key] for key in part]))
        decoded.update(zip(part, _pictures(vae, means, latents, pixels_to_images), strict=True))
        if on_progress is not None:
            on_progress(len(decoded), len(keys))
    return decoded


def _pictures(vae: "AutoencoderKL", means: Any, latents: _Latents, to_images: Callable[[Any], Any]) -> np.ndarray:
    from model.encoders import decode_latents

    pixels = decode_latents(vae, means * latents.scaling_factor, latents.scaling_factor)
    return to_images(pixels).cpu().numpy()


# --------------------------------------------------------------------------------------------------------------- cards


def _card(
    number: int,
    row: Mapping[str, Any],
    latents: _Latents | None,
    decoded: Mapping[tuple[int, str], np.ndarray],
) -> Card:
    caption = row.get("caption") or ""
    shown = display_text(caption, _MAX_CAPTION_CHARS)
    about = display_text(caption, 120) or "a picture without caption"
    tiles = []
    if "image" in row:
        tiles.append(_stored_picture(row["image"], about))
    if (number, "moments") in decoded:
        tiles.append(_tile("decoded moments", f"Decoded from its moments: {about}", decoded[number, "moments"]))
    elif "moments" in row and latents is not None and _is_broken(latents, row["moments"]):
        tiles.append(Tile("decoded moments", "", None, "not finite, or of a wrong size"))
    variants = []
    for k in range(MAX_VARIANTS):
        pair = _variant(number, k, row, latents, decoded, about)
        if pair:
            variants.append(pair)
    url = row.get("url") or ""
    return Card(
        uid=display_text(str(row.get("uid", "")), 64),
        caption=shown,
        num_caption_chars=len(caption) if len(caption) > _MAX_CAPTION_CHARS else 0,
        host=display_text(_host(url), 120),
        split=display_text(str(row["_split"]), 20),
        scores=tuple(
            (name, number_text(row[name]))
            for name in ("punsafe", "pwatermark", "similarity", "aesthetic")
            if isinstance(row.get(name), float) and np.isfinite(row[name])
        ),
        tiles=tuple(tiles),
        variants=tuple(variants),
    )


def _variant(
    number: int,
    k: int,
    row: Mapping[str, Any],
    latents: _Latents | None,
    decoded: Mapping[tuple[int, str], np.ndarray],
    about: str,
) -> tuple[Tile, ...]:
    """Mask k and what was decoded of the masked picture; without what is not there."""
    tiles = []
    mask = latents.mask(row[f"mask_{k}"]) if latents is not None and f"mask_{k}" in row else None
    if mask is not None:
        share = f"{mask.mean():.0%} hidden"
        source = _data_uri(Image.fromarray(mask * 255).convert("1"), "PNG")
        tiles.append(Tile(f"mask {k}", f"Mask {k}, white is repainted: {share}", source, share, is_small=True))
    if (number, f"masked_moments_{k}") in decoded:
        picture = decoded[number, f"masked_moments_{k}"]
        tiles.append(_tile(f"decoded masked latents {k}", f"Decoded from masked latents {k}: {about}", picture))
    elif latents is not None and f"masked_moments_{k}" in row and _is_broken(latents, row[f"masked_moments_{k}"]):
        tiles.append(Tile(f"decoded masked latents {k}", "", None, "not finite, or of a wrong size"))
    return tuple(tiles)


def _is_broken(latents: _Latents, moments: bytes) -> bool:
    mean = latents.mean(moments)
    return mean is None or not np.isfinite(mean).all()


def _host(url: str) -> str:
    return pl.DataFrame({"url": [url]}).select(host_of(pl.col("url"))).item()


def _stored_picture(data: bytes, about: str) -> Tile:
    """The stored picture, made anew: what is sent to a browser are pixels, never a stranger's file."""
    try:
        if len(data) > _MAX_PICTURE_BYTES:
            raise ValueError(f"{len(data)} bytes")
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            width, height = image.size
            if width * height > _MAX_PICTURE_BYTES:
                raise ValueError(f"{width} × {height}")
            picture = np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:
        return Tile("picture", "", None, "neither PNG nor JPEG")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return Tile("picture", "", None, f"cannot be read: {display_text(str(error), 80)}")
    kind = "PNG" if data.startswith(b"\x89PNG") else "JPEG"
    return _tile("picture", about, picture, f"{width} × {height} {kind}, {len(data):,} bytes")


def _tile(label: str, alt: str, picture: np.ndarray, note: str = "") -> Tile:
    image = Image.fromarray(picture)
    is_small = max(image.size) < _TILE_PX // 2
    if max(image.size) > _TILE_PX:
        image.thumbnail((_TILE_PX, _TILE_PX), Image.Resampling.LANCZOS)
    source = _data_uri(image, "PNG") if is_small else _data_uri(image, "JPEG")
    return Tile(label, alt, source, note, is_small)


def _data_uri(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    if kind == "JPEG":
        image.save(buffer, kind, quality=88, optimize=True)
    else:
        image.save(buffer, kind, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
