"""The demo world's metadata: a Parquet file in LAION's columns, with awkward rows as the real one has them.

Good rows point at the pictures 0 … num_pictures - 1. Each awkward row comes on top and has a picture of its own
(indices from num_pictures on), so that it is refused for its own reason only; the exceptions are duplicates, which
stand somewhere after their original. The order of rows is a permutation drawn from the seed.

LAION's ``hash`` is murmur3 of url + text. It only joins LAION's own tables, so it is blake2b here, of 64 bits likewise.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import AlreadyExistsError, ObjectStore
from model.tiny.world import WORLD_VERSION, Scene, philox, scene_at
from preprocessing.contracts.config import DemoWorldConfig
from preprocessing.contracts.digests import uid_of
from preprocessing.contracts.reasons import Reason
from preprocessing.demo.server import HOST, awkward_path, picture_path

LAION_SCHEMA = pa.schema(
    [
        ("URL", pa.string()),
        ("TEXT", pa.string()),
        ("WIDTH", pa.int32()),
        ("HEIGHT", pa.int32()),
        ("similarity", pa.float64()),
        ("hash", pa.int64()),
        ("punsafe", pa.float32()),
        ("pwatermark", pa.float32()),
        ("AESTHETIC_SCORE", pa.float32()),
    ]
)

StageName = Literal["select", "download", "encode"]


@dataclass(frozen=True)
class AwkwardKind:
    """One kind of awkward row.

    Attributes:
        changes: What differs from a good row, by column, once per row of this kind. In ``URL`` and ``TEXT``, ``{url}``
            stands for the row's own good URL.
        stage: Which stage refuses it; None where it is kept.
        reason: Why; None where it is kept.
        served_as: The server's kind, where the picture is the awkward part.
        is_copy: Whether it repeats a good row.
    """

    changes: tuple[dict[str, Any], ...]
    stage: StageName | None = None
    reason: Reason | None = None
    served_as: str | None = None
    is_copy: bool = False


@dataclass(frozen=True)
class AwkwardRow:
    """An awkward row and what must become of it, under the limits of the demo recipe.

    Attributes:
        kind: A key of ``KINDS``.
        values: By column of ``LAION_SCHEMA``.
        expected_stage: Which stage refuses it; None where it is kept.
        expected_reason: Why; None where it is kept.
        original: Index of the good row that it repeats and that stands before it in the table.
    """

    kind: str
    values: dict[str, Any]
    expected_stage: StageName | None
    expected_reason: Reason | None
    original: int | None = None


def _served(kind: str, num_rows: int, reason: Reason | None = None) -> AwkwardKind:
    return AwkwardKind(({},) * num_rows, "download" if reason else None, reason, served_as=kind)


def _scored(reason: Reason | None, column: str, *values: float | None) -> AwkwardKind:
    return AwkwardKind(tuple({column: value} for value in values), "select" if reason else None, reason)


def _captioned(*captions: str | None, reason: Reason | None = None) -> AwkwardKind:
    return AwkwardKind(tuple({"TEXT": caption} for caption in captions), "select" if reason else None, reason)


def _at(stage: StageName, reason: Reason, *urls: str | None) -> AwkwardKind:
    return AwkwardKind(tuple({"URL": url} for url in urls), stage, reason)


def _sized(reason: Reason, *sizes: tuple[int | None, int | None]) -> AwkwardKind:
    return AwkwardKind(tuple({"WIDTH": width, "HEIGHT": height} for width, height in sizes), "select", reason)


_DATA_URL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
_JUST_BELOW = float(np.nextafter(np.float32(0.1), np.float32(0)))

KINDS: dict[str, AwkwardKind] = {
    # scores
    "punsafe_just_below": _scored(None, "punsafe", _JUST_BELOW, 0.0),
    "punsafe_at_limit": _scored(Reason.PUNSAFE_HIGH, "punsafe", 0.1, 0.1, 0.1),
    "punsafe_just_above": _scored(Reason.PUNSAFE_HIGH, "punsafe", 0.1000001, 0.10001),
    "punsafe_high": _scored(Reason.PUNSAFE_HIGH, "punsafe", 0.35, 0.35, 0.99, 0.99, 1.0),
    "punsafe_null": _scored(Reason.PUNSAFE_MISSING, "punsafe", None, None, None),
    "punsafe_nan": _scored(Reason.PUNSAFE_MISSING, "punsafe", float("nan"), float("nan"), float("nan")),
    "pwatermark_high": _scored(Reason.PWATERMARK_HIGH, "pwatermark", 0.9, 0.9, 1.0),
    "pwatermark_missing": _scored(Reason.PWATERMARK_MISSING, "pwatermark", None, float("nan")),
    # sizes
    "size_small": _sized(Reason.SIDE_SMALL, (32, 32), (32, 32), (63, 640)),
    "size_missing": _sized(Reason.SIDE_SMALL, (None, None), (None, 128)),
    "aspect_extreme": _sized(Reason.ASPECT_EXTREME, (640, 64), (64, 640)),
    # the web
    "dead_port": _at("download", Reason.CONNECTION_FAILED, "http://127.0.0.1:9/a.jpg", "http://127.0.0.1:9/b.jpg"),
    "dead_host": _at("download", Reason.HOST_UNKNOWN, "http://pictures.invalid/a.jpg", "http://pictures.invalid/b.jpg"),
    "missing": _served("missing", 6, Reason.HTTP_CLIENT_ERROR),
    "server_error": _served("server_error", 3, Reason.HTTP_SERVER_ERROR),
    "redirect": _served("redirect", 3),
    "slow": _served("slow", 2, Reason.TIMED_OUT),
    "html": _served("html", 4, Reason.NOT_AN_IMAGE),
    "truncated": _served("truncated", 4, Reason.IMAGE_TRUNCATED),
    "empty": _served("empty", 3, Reason.EMPTY_FILE),
    "huge": _served("huge", 2, Reason.IMAGE_TOO_LARGE),
    "opted_out": _served("opted_out", 3, Reason.OPTED_OUT),
    "opted_out_noimageai": _served("opted_out_noimageai", 2, Reason.OPTED_OUT),
    # formats
    "alpha": _served("alpha", 3),
    "cmyk": _served("cmyk", 3),
    "animated": _served("animated", 3),
    "gray": _served("gray", 3),
    "webp": _served("webp", 3),
    # URLs
    "url_missing": _at("select", Reason.NO_URL, None, None, "", "   "),
    "url_file": _at("download", Reason.URL_REFUSED, "file:///etc/hostname", "file:///etc/passwd"),
    "url_ftp": _at("download", Reason.URL_REFUSED, "ftp://127.0.0.1/a.jpg", "ftp://pictures.invalid/a.jpg"),
    "url_data": _at("download", Reason.URL_REFUSED, _DATA_URL, f"{_DATA_URL}#2"),
    "url_private": _at(
        "download", Reason.URL_REFUSED, "http://10.0.0.1/a.jpg", "http://169.254.169.254/latest/meta-data/"
    ),
    # captions
    "caption_empty": _captioned("", "", reason=Reason.CAPTION_EMPTY),
    "caption_blank": _captioned("   ", "\n\t\u3000", reason=Reason.CAPTION_EMPTY),
    "caption_null": _captioned(None, None, reason=Reason.CAPTION_EMPTY),
    "caption_long": _captioned("a large red circle " * 158, "x" * 3000, reason=Reason.CAPTION_LONG),
    "caption_in_other_script": _captioned(
        "青い背景の左側にある大きな赤い円", "دائرة حمراء كبيرة على اليسار", "बाईं ओर एक बड़ा लाल वृत्त 🔴👨‍👩‍👧"
    ),
    "caption_with_markup": _captioned(
        "<script>alert(1)</script>", "{{7*7}}", "![x](http://example.invalid/x.png)", "'; DROP TABLE rows; -- \"\\"
    ),
    "caption_with_controls": _captioned(
        "a red\x1b[31m circle\x07", "a\tblue\r\nsquare", "a green\x00 star\u202e\u200d"
    ),
    # copies
    "duplicate_row": AwkwardKind(({},) * 4, "select", Reason.DUPLICATE_ROW, is_copy=True),
    "duplicate_url": AwkwardKind(
        ({"TEXT": "another caption of this picture"}, {"TEXT": "yet another one"}, {"TEXT": "and a third"}),
        "select",
        Reason.DUPLICATE_URL,
        is_copy=True,
    ),
    "duplicate_image": AwkwardKind(({"URL": "{url}?copy=1"},) * 3, "encode", Reason.DUPLICATE_IMAGE, is_copy=True),
}


def expected_reasons() -> dict[str, Reason | None]:
    """Kind of awkward row → the reason under which it ends with the demo recipe; None where it is kept."""
    return {kind: described.reason for kind, described in KINDS.items()}


def awkward_rows(config: DemoWorldConfig) -> list[AwkwardRow]:
    """The awkward rows, in no particular order; a pure function of the config."""
    rng = philox("awkward", config.seed, config.num_pictures)
    num_copies = sum(len(described.changes) for described in KINDS.values() if described.is_copy)
    originals = iter(rng.choice(config.num_pictures, size=num_copies, replace=False).tolist())
    rows = []
    index = config.num_pictures
    for kind, described in KINDS.items():
        for changes in described.changes:
            original = next(originals) if described.is_copy else None
            values = _good_values(config, scene_at(config.seed, index if original is None else original))
            if described.served_as is not None:
                values["URL"] = _address(config) + awkward_path(config.seed, described.served_as, index)
            if described.served_as == "huge":
                values.update(WIDTH=20_000, HEIGHT=20_000)
            changes = {
                name: value.replace("{url}", values["URL"]) if name == "URL" and value else value
                for name, value in changes.items()
            }
            if kind == "duplicate_url":  # of one URL the smallest uid stays: this one must have a larger one
                while uid_of(values["URL"], changes["TEXT"]) < uid_of(values["URL"], values["TEXT"]):
                    changes["TEXT"] += "!"
            rows.append(AwkwardRow(kind, _hashed(values | changes), described.stage, described.reason, original))
            index += original is None
    return rows


def _address(config: DemoWorldConfig) -> str:
    return f"http://{HOST}:{config.port}"


def _good_values(config: DemoWorldConfig, scene: Scene) -> dict[str, Any]:
    """A row that every rule of the demo recipe keeps; scores as skewed as LAION's."""
    rng = philox("scores", scene.seed, scene.index)
    extension = {3: "png", 7: "webp"}.get(scene.index % 10, "jpg")
    return {
        "URL": _address(config) + picture_path(scene.seed, scene.index, extension),
        "TEXT": scene.caption,
        "WIDTH": scene.width_px,
        "HEIGHT": scene.height_px,
        "similarity": 0.28 + 0.15 * rng.beta(1.5, 5),
        "punsafe": 0.099 * rng.beta(0.6, 6),
        "pwatermark": 0.75 * rng.beta(0.8, 5),
        "AESTHETIC_SCORE": float(np.clip(rng.normal(5.3, 0.6), 1, 9)),
    }


def _hashed(values: dict[str, Any]) -> dict[str, Any]:
    digest = hashlib.blake2b(f"{values['URL'] or ''}{values['TEXT'] or ''}".encode(), digest_size=8).digest()
    return values | {"hash": int.from_bytes(digest, "big", signed=True)}


def _rows_in_order(config: DemoWorldConfig) -> Iterator[dict[str, Any]]:
    """All rows, awkward ones spread among the good ones, copies after their originals."""
    rng = philox("order", config.seed, config.num_pictures)
    good_places = rng.random(config.num_pictures)
    placed: list[tuple[float, int, AwkwardRow | None]] = [
        (place, index, None) for index, place in enumerate(good_places.tolist())
    ]
    for number, row in enumerate(awkward_rows(config)):
        earliest = 0.0 if row.original is None else float(good_places[row.original])
        placed.append((earliest + (1 - earliest) * rng.random(), config.num_pictures + number, row))
    for _, index, row in sorted(placed, key=lambda item: item[:2]):
        yield row.values if row is not None else _hashed(_good_values(config, scene_at(config.seed, index)))


def write_metadata(config: DemoWorldConfig, path: Path) -> None:
    """Writes the demo world's metadata as Parquet, the same bytes each time (for one version of pyarrow and numpy).

    Args:
        config: Which world.
        path: The file to write.
    """
    rows = list(_rows_in_order(config))
    columns = [pa.array([row[item.name] for row in rows], item.type, from_pandas=False) for item in LAION_SCHEMA]
    pq.write_table(pa.table(columns, schema=LAION_SCHEMA), path, compression="zstd", row_group_size=4096)


def metadata_key(config: DemoWorldConfig) -> str:
    """Where in a store the demo world's metadata stands."""
    return f"sources/demo-v{WORLD_VERSION}-{config.seed}-{config.num_pictures}-{config.port}/metadata.parquet"


def put_metadata(store: ObjectStore, config: DemoWorldConfig) -> str:
    """Puts the demo world's metadata into a store, where it is not there yet; what stands there stays.

    Returns:
        Its URI.
    """
    key = metadata_key(config)
    if not store.exists(key):
        with tempfile.TemporaryDirectory(prefix="lacuna-demo-") as folder:
            path = Path(folder) / "metadata.parquet"
            write_metadata(config, path)
            with contextlib.suppress(AlreadyExistsError):  # another run, with another pyarrow: its rows are equal
                store.put_if_absent(key, path.read_bytes())
    return store.uri_of(key)
