"""What is in a dataset, in figures: columns and their bytes, distributions of scores and sizes, hosts, storage."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import polars as pl
import pyarrow as pa

from infra.storage import ObjectStore
from preprocessing.block_lists import host_of
from preprocessing.contracts.manifest import DatasetFile, Manifest
from preprocessing.stored_parquet import open_parquet

MAX_FILES: Final = 64
"""Of a dataset with more files as many are read, evenly spread: the figures of its rows are estimates then."""

_MAX_ROWS: Final = 1_000_000
_NUM_THREADS: Final = 8
_NUM_BINS: Final = 48
_NUM_HOSTS: Final = 20


@dataclass(frozen=True)
class Column:
    """A column of the rows.

    Attributes:
        name: Its name.
        dtype: Arrow's name of its type.
        bytes_per_row: As it is stored, compression included.
        means: What it holds, in a few words; empty where the name says it.
    """

    name: str
    dtype: str
    bytes_per_row: float
    means: str = ""


@dataclass(frozen=True)
class Histogram:
    """How a number is distributed.

    Attributes:
        name: Of the column, or of what was made of it.
        title: For people.
        unit: ``px``, ``characters``, or empty.
        low: Where the first bin begins.
        high: Where the last one ends.
        counts: Of each bin, all of one width.
        num_missing: Null, NaN or infinite.
        quantiles: The smallest value, those at 5 %, 50 % and 95 %, the largest; empty without values.
        limit: What `select` compared it with, if it did, and as what: ``("below", 0.1)``.
    """

    name: str
    title: str
    unit: str
    low: float
    high: float
    counts: tuple[int, ...]
    num_missing: int
    quantiles: tuple[float, ...]
    limit: tuple[str, float] | None = None


@dataclass(frozen=True)
class Contents:
    """What is in a dataset.

    Attributes:
        num_rows: Rows in all.
        num_rows_read: Rows that the figures are of.
        num_files: Files of rows in all.
        num_files_read: Those that were read.
        columns: In the order of the schema.
        histograms: Of what numbers there are.
        hosts: With most rows, and how many.
        num_hosts: Different hosts.
        storage: What kind of file (``train``, ``validation``, ``rows``, ``rejects``, ``extra``): files, rows, bytes.
    """

    num_rows: int = 0
    num_rows_read: int = 0
    num_files: int = 0
    num_files_read: int = 0
    columns: tuple[Column, ...] = ()
    histograms: tuple[Histogram, ...] = ()
    hosts: tuple[tuple[str, int], ...] = ()
    num_hosts: int = 0
    storage: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether all rows were read."""
        return self.num_files_read == self.num_files


def read_contents(
    store: ObjectStore,
    prefix: str,
    manifest: Manifest,
    *,
    limits: Mapping[str, Any] | None = None,
    with_values: bool = True,
) -> Contents:
    """Looks into a dataset's files.

    Args:
        store: Where it is.
        prefix: Key of its folder.
        manifest: Its manifest.
        limits: The config of the `select` dataset that it comes from, whose limits are drawn.
        with_values: Whether to read scores, sizes and hosts; else only the files' footers.
    """
    files = [file for file in manifest.files("rows") if file.num_rows]
    chosen = _spread(files)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        parts = list(pool.map(lambda file: _read_file(store, file.key(prefix), with_values), chosen))
    empty = _columns_of_empty(store, prefix, manifest) if not parts else ()
    values = pl.concat([part.values for part in parts], how="diagonal") if parts and with_values else pl.DataFrame()
    hosts = values.select(host_of(pl.col("url")).alias("host")) if "url" in values.columns else None
    counted = None if hosts is None else hosts.group_by("host").len("n").sort(["n", "host"], descending=[True, False])
    return Contents(
        num_rows=sum(file.num_rows for file in files),
        num_rows_read=sum(part.num_rows for part in parts),
        num_files=len(files),
        num_files_read=len(parts),
        columns=_columns(parts) or empty,
        histograms=_histograms(values, limits or {}),
        hosts=() if counted is None else tuple(counted.head(_NUM_HOSTS).iter_rows()),
        num_hosts=0 if counted is None else counted.height,
        storage=storage_of(manifest),
    )


def storage_of(manifest: Manifest) -> dict[str, tuple[int, int, int]]:
    """Files, rows and bytes of each kind of file, by the manifest."""
    found: dict[str, tuple[int, int, int]] = {}
    for file in (*(f for shard in manifest.shards for f in shard.files), *manifest.extra_files):
        kind = file.split or file.kind
        num_files, num_rows, num_bytes = found.get(kind, (0, 0, 0))
        found[kind] = (num_files + 1, num_rows + file.num_rows, num_bytes + file.num_bytes)
    return found


def _spread(files: Sequence[DatasetFile]) -> list[DatasetFile]:
    """All files, or as many as may be read, evenly spread."""
    num_rows = sum(file.num_rows for file in files)
    num_files = min(len(files), MAX_FILES, max(1, int(len(files) * min(1.0, _MAX_ROWS / max(1, num_rows)))))
    return [files[index * len(files) // num_files] for index in range(num_files)] if files else []


# ------------------------------------------------------------------------------------------------------------ one file


@dataclass(frozen=True)
class _Part:
    num_rows: int
    schema: pa.Schema
    num_bytes: Mapping[str, int]
    values: pl.DataFrame


_SCALARS: Final = (
    "punsafe", "pwatermark", "similarity", "aesthetic", "width", "height",
    "original_width", "original_height", "image_width", "image_height", "resized_width", "resized_height",
)  # fmt: skip


def _read_file(store: ObjectStore, key: str, with_values: bool) -> _Part:
    with open_parquet(store, key) as file:
        num_bytes: dict[str, int] = {}
        for group in range(file.num_row_groups):
            metadata = file.metadata.row_group(group)
            for index in range(metadata.num_columns):
                chunk = metadata.column(index)
                name = chunk.path_in_schema.partition(".")[0]
                num_bytes[name] = num_bytes.get(name, 0) + chunk.total_compressed_size
        values = pl.DataFrame()
        if with_values:
            names = [name for name in (*_SCALARS, "url", "caption") if name in file.schema_arrow.names]
            table = pl.from_arrow(file.read(columns=names))
            assert isinstance(table, pl.DataFrame)
            values = _derived(table)
        return _Part(file.metadata.num_rows, file.schema_arrow, num_bytes, values)


def _derived(table: pl.DataFrame) -> pl.DataFrame:
    """Scores as they are, shorter sides, and the captions' lengths instead of the captions."""
    pairs = (("", "metadata_side"), ("original_", "original_side"), ("image_", "image_side"))
    sides = [
        pl.min_horizontal(f"{start}width", f"{start}height").alias(name)
        for start, name in pairs
        if f"{start}width" in table.columns and f"{start}height" in table.columns
    ]
    captions = [pl.col("caption").str.len_chars().alias("caption_chars")] if "caption" in table.columns else []
    kept = [name for name in ("punsafe", "pwatermark", "similarity", "aesthetic", "url") if name in table.columns]
    return table.select(*kept, *sides, *captions)


# ------------------------------------------------------------------------------------------------------------- columns


def _columns(parts: Sequence[_Part]) -> tuple[Column, ...]:
    if not parts:
        return ()
    num_rows = max(1, sum(part.num_rows for part in parts))
    return tuple(
        Column(
            item.name,
            str(item.type),
            sum(part.num_bytes.get(item.name, 0) for part in parts) / num_rows,
            meaning_of(item.name),
        )
        for item in parts[0].schema
    )


def _columns_of_empty(store: ObjectStore, prefix: str, manifest: Manifest) -> tuple[Column, ...]:
    """The schema of a dataset without rows, if it has a file of them at all."""
    files = manifest.files("rows")
    if not files:
        return ()
    with open_parquet(store, files[0].key(prefix)) as file:
        return tuple(Column(item.name, str(item.type), 0.0, meaning_of(item.name)) for item in file.schema_arrow)


_MEANINGS: Final = {
    "uid": "128-bit id of (url, caption)",
    "punsafe": "probability of unsafe content",
    "pwatermark": "probability of a watermark",
    "similarity": "cosine of picture and caption, by the metadata",
    "aesthetic": "predicted aesthetic score",
    "width": "px, by the metadata",
    "height": "px, by the metadata",
    "image": "the picture, encoded",
    "sha256": "of the picture's bytes",
    "moments": "VAE posterior: mean | logvar, unscaled",
    "text_embeddings": "hidden states of the text tower",
    "token_ids": "77 token ids, uint16",
}


def meaning_of(name: str) -> str:
    """What a column holds, in a few words; empty where its name says it."""
    stem, _, number = name.rpartition("_")
    if number.isdigit() and stem == "mask":
        return f"latent mask {number}: a bit a cell, 1 = repaint"
    if number.isdigit() and stem == "masked_moments":
        return f"moments of the picture × (1 − mask {number})"
    return _MEANINGS.get(name, "")


# ---------------------------------------------------------------------------------------------------------- histograms


@dataclass(frozen=True)
class _Shown:
    """How a number is drawn: where its axis must begin and end, if it must, and the select limits that apply."""

    title: str
    unit: str = ""
    low: float | None = None
    limit: tuple[str, str] | None = None  # as what, key of the select config


_SHOWN: Final[Mapping[str, _Shown]] = {
    "punsafe": _Shown("p(unsafe)", low=0, limit=("below", "max_punsafe")),
    "pwatermark": _Shown("p(watermark)", low=0, limit=("below", "max_pwatermark")),
    "similarity": _Shown("Similarity of picture and caption", limit=("at least", "min_similarity")),
    "aesthetic": _Shown("Aesthetic score", limit=("at least", "min_aesthetic")),
    "metadata_side": _Shown("Shorter side, by the metadata", "px", low=0, limit=("at least", "min_side_px")),
    "original_side": _Shown("Shorter side, as downloaded", "px", low=0),
    "image_side": _Shown("Shorter side, as stored", "px", low=0),
    "caption_chars": _Shown("Length of the caption", "characters", low=0),
}


def _histograms(values: pl.DataFrame, limits: Mapping[str, Any]) -> tuple[Histogram, ...]:
    return tuple(
        _histogram(name, shown, values[name], limits) for name, shown in _SHOWN.items() if name in values.columns
    )


def _histogram(name: str, shown: _Shown, column: pl.Series, limits: Mapping[str, Any]) -> Histogram:
    numbers = column.cast(pl.Float64).to_numpy()  # null is NaN
    finite = numbers[np.isfinite(numbers)]
    limit = None
    if shown.limit is not None and isinstance(limits.get(shown.limit[1]), (int, float)):
        limit = shown.limit[0], float(limits[shown.limit[1]])
    low, high = _range(finite, shown, limit)
    counts = np.histogram(np.clip(finite, low, high), _NUM_BINS, (low, high))[0] if len(finite) else []
    quantiles = np.quantile(finite, (0, 0.05, 0.5, 0.95, 1)).tolist() if len(finite) else []
    return Histogram(
        name,
        shown.title,
        shown.unit,
        low,
        high,
        tuple(int(count) for count in counts),
        int(len(numbers) - len(finite)),
        tuple(quantiles),
        limit,
    )


def _range(values: np.ndarray, shown: _Shown, limit: tuple[str, float] | None) -> tuple[float, float]:
    """A range with round ends that holds nearly all values, and the limit: one outlier must not flatten the rest."""
    if not len(values):
        return 0.0, 1.0
    low, high = (float(value) for value in np.quantile(values, (0.001, 0.999)))
    inner = float(np.quantile(values, 0.95))
    if high > 4 * max(inner, 1e-12) and inner > 0:
        high = 2 * inner
    ends = [low, high] + ([limit[1]] if limit is not None else [])
    low, high = (min(ends) if shown.low is None else shown.low), max(ends)
    if high <= low:
        high = low + max(abs(low), 1e-3)
    step = round_step((high - low) / 8)
    return float(np.floor(low / step) * step), float(np.ceil(high / step - 1e-9) * step)


def round_step(step: float) -> float:
    """The next larger number of 1, 2, 5 × 10^n."""
    power = 10 ** np.floor(np.log10(step))
    return float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9)))
