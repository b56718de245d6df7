"""LAION's metadata: files found, columns recognised, rows in one form.

Each LAION release names its columns in its own way; see ``ALIASES``. A file without ``punsafe`` is refused, never read
as if all its rows were safe.
"""

import contextlib
import glob
import io
import itertools
import logging
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from infra.storage import ObjectInfo, ObjectNotFoundError, ObjectStore, open_store
from preprocessing.content_hashes import sha256_of_local, sha256_of_object

LOGGER = logging.getLogger(__name__)

# Our name → LAION's and img2dataset's, case-insensitively, the preferred one first. Where img2dataset wrote the table,
# `original_width` is the width on the web and `width` that of the file it made. LAION's `hash` is not here: it is
# murmur3 of url + text, joins LAION's own tables, and says nothing of the picture.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "url": ("url", "image_url"),
    "caption": ("text", "caption", "top_caption", "alt_text", "alt"),
    "width": ("original_width", "width", "image_width"),
    "height": ("original_height", "height", "image_height"),
    "similarity": ("similarity", "clip_similarity"),
    "punsafe": ("punsafe", "p_unsafe"),
    "pwatermark": ("pwatermark", "p_watermark"),
    "aesthetic": ("aesthetic_score", "aesthetic", "aesthetics"),
    "language": ("language", "lang"),
    "expected_md5": ("md5", "image_md5", "expected_md5"),
    "expected_sha256": ("sha256", "image_sha256", "expected_sha256"),
}
REQUIRED = ("url", "caption", "punsafe")

# The one form of rows. Scores are read as 64-bit numbers, so that a limit is compared with what the file says.
SCORES: Mapping[str, type[pl.DataType]] = {
    "width": pl.Int32,
    "height": pl.Int32,
    "similarity": pl.Float64,
    "punsafe": pl.Float64,
    "pwatermark": pl.Float64,
    "aesthetic": pl.Float64,
}
TEXTS: Mapping[str, type[pl.DataType]] = {
    "url": pl.String,
    "caption": pl.String,
    "language": pl.String,
    "expected_md5": pl.String,
    "expected_sha256": pl.String,
}
_COLUMNS: Mapping[str, type[pl.DataType]] = {**TEXTS, **SCORES}
ROWS: Mapping[str, type[pl.DataType]] = {
    **_COLUMNS,
    "is_text": pl.Boolean,  # false where URL or caption is not UTF-8; such a text is null
}

_BATCH_ROWS = 32_768
_LEAST_WINDOW_ROWS = 4_096
_WINDOW_TEXT_BYTES = 64 << 20
_HOPELESS_ROWS = 1 << 22  # nothing of them is read
_CSV_BLOCK_BYTES = 4 << 20  # a row must fit in
_BUFFER_BYTES = 1 << 20  # of a column; else whole column chunks are read at once
_PARQUET_MAGIC = b"PAR1"
_CSV_SUFFIXES = (".csv", ".csv.gz")
_HASH_DIGITS = {"expected_md5": 32, "expected_sha256": 64}


@dataclass(frozen=True)
class MetadataFile:
    """One file of metadata, readable, here or in S3.

    Attributes:
        name: As the user knows it: a path or a URI.
        kind: Its format.
        columns: Our name → the file's, for the columns that it has.
        schema: The file's own.
        place: The local path, or the store and what it says of the object.
    """

    name: str
    kind: Literal["parquet", "csv"]
    columns: Mapping[str, str]
    schema: pa.Schema
    place: Path | tuple[ObjectStore, ObjectInfo]

    @cached_property
    def sha256(self) -> str:
        """Of the content; see ``content_hashes`` for when it is computed anew."""
        _ = self._stamp  # taken before the content is hashed
        return sha256_of_local(self.place) if isinstance(self.place, Path) else sha256_of_object(*self.place)

    @cached_property
    def _stamp(self) -> tuple[int, int] | None:
        """Size and time of a local file when it was first asked for; objects are checked by their hash."""
        return _stamp_of(self.place) if isinstance(self.place, Path) else None

    def check_unchanged(self) -> None:
        """To be called after reading.

        Raises:
            ValueError: A local file is not the one that was hashed.
        """
        if isinstance(self.place, Path) and self._stamp != _stamp_of(self.place):
            raise ValueError(f"source.metadata: {self.name} was changed after it was hashed; run this again")

    @contextlib.contextmanager
    def local(self, scratch: Path | None = None) -> Iterator[Path]:
        """The file as a local path: itself, or a copy that is gone afterwards.

        Args:
            scratch: Where the copy is made; else where temporary files go.
        """
        if isinstance(self.place, Path):
            yield self.place
            return
        store, info = self.place
        with tempfile.TemporaryDirectory(prefix="lacuna-metadata-", dir=scratch) as folder:
            path = Path(folder) / Path(info.key).name
            store.download(info.key, path, self.sha256)
            yield path

    @cached_property
    def num_rows(self) -> int:
        """How many rows it has; a CSV file is read for it.

        Raises:
            ValueError: It cannot be read.
        """
        if self.kind == "parquet":
            return self.parquet_metadata.num_rows
        with self.local() as path:
            return sum(batch.num_rows for batch in _batches(self, path))

    @cached_property
    def parquet_metadata(self) -> pq.FileMetaData:
        """Of a Parquet file, what its end says.

        Raises:
            ValueError: It cannot be read.
        """
        with _readable(self.name), contextlib.closing(_source(self.place)) as source:
            return pq.read_metadata(source)

    @property
    def is_plain(self) -> bool:
        """Whether it is Parquet with texts and numbers as such: then it can be read the quick way."""
        if self.kind != "parquet":
            return False
        of = pa.types
        for ours, theirs in self.columns.items():
            type_ = self.schema.field(theirs).type
            number = (of.is_integer(type_) or of.is_floating(type_)) and not of.is_float16(type_)
            if not (number if ours in SCORES else of.is_string(type_) or of.is_large_string(type_)):
                return False
        return True


def _stamp_of(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


class _Object(io.RawIOBase):
    """An object in S3 as a file that can be searched in: only what is asked for is fetched."""

    def __init__(self, store: ObjectStore, info: ObjectInfo) -> None:
        self._store, self._info, self._at = store, info, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._info.num_bytes)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        rest = max(0, self._info.num_bytes - self._at)
        data = self._store.read_range(self._info.key, self._at, rest if size < 0 else min(size, rest))
        self._at += len(data)
        return data


def _source(place: Path | tuple[ObjectStore, ObjectInfo]) -> pa.NativeFile:
    return pa.OSFile(str(place)) if isinstance(place, Path) else pa.PythonFile(_Object(*place), mode="r")


def find_metadata(patterns: Sequence[str]) -> list[MetadataFile]:
    """Finds the files of metadata and checks that they can be used. Of each, only the beginning and end are read.

    Args:
        patterns: Paths, globs (``**`` crosses folders), ``file://`` and ``s3://`` URIs, which may be globs too.

    Returns:
        The files, sorted by name, each once.

    Raises:
        ValueError: Something matches nothing, or is not usable metadata; names the file and what it lacks.
        TransientError: The object store failed.
    """
    found: dict[str, Path | tuple[ObjectStore, ObjectInfo]] = {}
    for pattern in patterns:
        matches = _find_s3(pattern) if pattern.startswith("s3://") else _find_local(pattern)
        if not matches:
            raise ValueError(
                f"source.metadata: {pattern!r} matches no file; give paths or globs of Parquet or CSV files"
            )
        found.update(matches)
    return [open_metadata(name, place) for name, place in sorted(found.items())]


def open_metadata(name: str, place: Path | tuple[ObjectStore, ObjectInfo]) -> MetadataFile:
    """Looks into one file.

    Args:
        name: As the user knows it.
        place: Where it is.

    Raises:
        ValueError: It is neither Parquet nor CSV, or lacks a column that must be there, or has one of a wrong type.
    """
    with contextlib.closing(_source(place)) as source:
        kind = _kind_of(name, source)
        source.seek(0)
        schema = _schema_of(name, source, kind)
    columns = _recognise(name, schema)
    if kind == "parquet":  # a CSV file has no types: its values are tried when they are read
        for ours, theirs in columns.items():
            _check_type(name, theirs, schema.field(theirs).type, is_text=ours in TEXTS)
    return MetadataFile(name, kind, columns, schema, place)


def read_rows(file: MetadataFile, path: Path, start: int = 0, stop: int | None = None) -> Iterator[pl.DataFrame]:
    """Reads a file, or a part of it, as tables of one form.

    Args:
        file: What to read.
        path: Where it is, locally.
        start: Rows to leave out at the beginning.
        stop: The number of the first row that is not read; None for all.

    Yields:
        Tables with the columns ``ROWS``, in order.

    Raises:
        ValueError: A value is not of its column's type, or a file is damaged; names file and column.
    """
    done, groups = _groups(file, start, stop) if file.kind == "parquet" else (0, None)
    for batch in _batches(file, path, groups):
        first = min(batch.num_rows, max(0, start - done))
        last = batch.num_rows if stop is None else max(first, min(batch.num_rows, stop - done))
        done += batch.num_rows
        if last > first or batch.num_rows == 0:
            yield _normalized(file, batch.slice(first, last - first))


@dataclass(frozen=True)
class Window:
    """Rows of a plain file that are read at once.

    Attributes:
        start: The first one's number in the file.
        num_rows: How many.
        is_hopeless: Whether statistics say that none has a ``punsafe`` below the limit, and that none is null; some may
            be NaN, which statistics do not count.
    """

    start: int
    num_rows: int
    is_hopeless: bool


def windows(file: MetadataFile, max_punsafe: float, max_rows: int) -> Iterator[Window]:
    """Cuts a plain file into windows: small row groups are joined, large ones divided.

    Args:
        file: ``is_plain``.
        max_punsafe: The limit; infinite where statistics do not matter.
        max_rows: In a window, fewer where texts are long.

    Yields:
        Windows, in order, all rows together.

    Raises:
        ValueError: The file is damaged.
    """
    metadata = file.parquet_metadata
    with _readable(file.name):
        places = {metadata.schema.column(place).path: place for place in range(metadata.num_columns)}
        texts = [places[file.columns[name]] for name in TEXTS if name in file.columns]
        start = end = 0
        most = max_rows
        was_hopeless = False
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            is_hopeless = _minimum(group, places[file.columns["punsafe"]]) >= max_punsafe
            num_bytes = sum(group.column(place).total_uncompressed_size for place in texts)
            fitting = int(_WINDOW_TEXT_BYTES * group.num_rows / max(num_bytes, 1))
            limit = _HOPELESS_ROWS if is_hopeless else min(max_rows, max(_LEAST_WINDOW_ROWS, fitting))
            if end > start and (is_hopeless != was_hopeless or end - start + group.num_rows > min(most, limit)):
                yield from _divided(start, end, most, was_hopeless)
                start = end
            most = limit if start == end else min(most, limit)
            was_hopeless, end = is_hopeless, end + group.num_rows
        yield from _divided(start, end, most, was_hopeless)


def _divided(start: int, end: int, most: int, is_hopeless: bool) -> Iterator[Window]:
    """Windows of equal size, as few as there can be with at most so many rows each."""
    num_windows = -(-(end - start) // most)
    edges = [start + (end - start) * index // num_windows for index in range(num_windows + 1)] if num_windows else []
    for first, last in itertools.pairwise(edges):
        yield Window(first, last - first, is_hopeless)


class PlainReader:
    """Reads windows of a plain file with polars, which takes half the time that Arrow takes.

    Args:
        file: What to read; ``is_plain``.
        path: Where it is, locally.
    """

    def __init__(self, file: MetadataFile, path: Path) -> None:
        self._file = file
        self._rows = pl.scan_parquet(path, glob=False, hive_partitioning=False, low_memory=True, cache=False)

    def read(self, window: Window, names: Iterable[str]) -> pl.DataFrame | None:
        """Reads some columns.

        Args:
            window: Which rows.
            names: Columns of ``ROWS``.

        Returns:
            As many rows as the window has. None where polars does not read them: a text is not UTF-8, the file is
            damaged, or has something that polars does not know. ``read_rows`` reads it, or says what is wrong.
        """
        columns = [self._column(name) for name in names]
        try:
            if not any(column.meta.root_names() for column in columns):  # the file would be read for nothing
                return pl.select(pl.repeat(None, window.num_rows).alias("")).with_columns(columns).drop("")
            rows = self._rows.slice(window.start, window.num_rows).select(columns).collect()
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
            LOGGER.info("%s: polars does not read it (%s)", self._file.name, " ".join(str(error).split())[:200])
            return None
        return rows if rows.height == window.num_rows else None

    def _column(self, name: str) -> pl.Expr:
        if name == "is_text":
            return pl.lit(True).alias(name)
        theirs = self._file.columns.get(name)
        if theirs is None:
            return pl.lit(None, ROWS[name]).alias(name)
        if name in SCORES:
            return _number(theirs, self._types[theirs], SCORES[name]).alias(name)
        return _clean_hash(pl.col(theirs).cast(pl.String), name).alias(name)

    @cached_property
    def _types(self) -> pl.Schema:
        return self._rows.collect_schema()


def _minimum(group: pq.RowGroupMetaData, place: int) -> float:
    """The least value of a column without nulls, if statistics say it, which leave NaN out; else minus infinity."""
    found = group.column(place).statistics
    if found is None or not found.has_min_max or not found.has_null_count or found.null_count:
        return -math.inf
    return float(found.min) if isinstance(found.min, (int, float)) else -math.inf


def _number(column: str, theirs: pl.DataType, ours: type[pl.DataType]) -> pl.Expr:
    """A column of numbers in our type; what cannot be a size in pixels (NaN, or beyond 32 bits) is missing."""
    values = pl.col(column)
    if ours is not pl.Int32 or theirs == pl.Int32:
        return values.cast(ours)
    return (values.fill_nan(None) if theirs.is_float() else values).cast(pl.Int32, strict=False)


def _clean_hash(values: pl.Expr, name: str) -> pl.Expr:
    """A hash in lower case; null where it is none. Other texts stay as they are."""
    if name not in _HASH_DIGITS:
        return values
    values = values.str.strip_chars().str.to_lowercase()
    return pl.when(values.str.contains(rf"^[0-9a-f]{{{_HASH_DIGITS[name]}}}$")).then(values)


def _find_local(pattern: str) -> dict[str, Path]:
    if pattern.startswith("file://"):
        pattern = unquote(urlsplit(pattern).path)
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise ValueError(f"source.metadata: {pattern!r} is a folder; write {str(path / '*.parquet')!r}")
    if path.is_file():  # before globbing: a name may contain brackets
        return {str(path.resolve()): path.resolve()}
    found = [Path(name).resolve() for name in glob.glob(str(path), recursive=True)]
    return {str(path): path for path in found if path.is_file()}


def _find_s3(pattern: str) -> dict[str, tuple[ObjectStore, ObjectInfo]]:
    bucket, _, key_pattern = pattern.removeprefix("s3://").partition("/")
    if not bucket or not key_pattern:
        raise ValueError(f"source.metadata: {pattern!r} names no object; write s3://bucket/path/*.parquet")
    store = open_store(f"s3://{bucket}")
    if glob.has_magic(key_pattern):
        beginning = key_pattern[: min(key_pattern.find(sign) for sign in "*?[" if sign in key_pattern)]
        matches = _key_matcher(key_pattern)
        found = [info for info in store.list(beginning) if matches(info.key)]
    else:
        try:
            found = [store.head(key_pattern)]
        except ObjectNotFoundError:
            found = []
    return {f"s3://{bucket}/{info.key}": (store, info) for info in found}


def _key_matcher(pattern: str) -> Callable[[str], object]:
    """A test whether a key matches as a path would.

    ``*``, ``?`` and brackets do not cross slashes; a part that is ``**`` stands for any number of folders, none
    included; inside a part ``**`` is as good as ``*``.
    """
    parts = pattern.split("/")
    translated = ""
    for index, part in enumerate(parts):
        is_last = index == len(parts) - 1
        if part == "**":
            translated += ".*" if is_last else "(?:[^/]+/)*"
        else:
            translated += _PART.sub(_translated, part) + ("" if is_last else "/")
    return re.compile(translated, re.DOTALL).fullmatch


_PART = re.compile(r"\*+|\?|\[(!?)(\]?[^\]]*)\]|.", re.DOTALL)


def _translated(sign: re.Match[str]) -> str:
    """One sign of a glob as a regular expression; none of them matches a slash."""
    text = sign[0]
    if text.startswith("*"):
        return "[^/]*"
    if text == "?":
        return "[^/]"
    if len(text) > 1:  # brackets
        inside = re.sub(r"([\\\[\]^&~|])", r"\\\1", sign[2])
        return f"(?!/)[{'^' if sign[1] else ''}{inside}]"
    return re.escape(text)


def _kind_of(name: str, source: pa.NativeFile) -> Literal["parquet", "csv"]:
    if source.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC:
        return "parquet"
    if name.lower().endswith(_CSV_SUFFIXES):
        return "csv"
    raise ValueError(
        f"source.metadata: {name} is neither a Parquet nor a CSV file; give one, or a glob that leaves it out"
    )


def _schema_of(name: str, source: pa.NativeFile, kind: Literal["parquet", "csv"]) -> pa.Schema:
    with _readable(name):
        if kind == "parquet":
            return pq.read_schema(source)
        stream = pa.CompressedInputStream(source, "gzip") if name.lower().endswith(".gz") else source
        with pa_csv.open_csv(stream, read_options=_CSV_READ, parse_options=_CSV_PARSE) as reader:
            return reader.schema


_CSV_READ = pa_csv.ReadOptions(block_size=_CSV_BLOCK_BYTES)
_CSV_PARSE = pa_csv.ParseOptions(newlines_in_values=True)


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turns Arrow's errors into one line.

    Raises:
        ValueError: The file is damaged, or a value of a CSV file is not a number.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"source.metadata: {name} cannot be read ({said}); give a whole Parquet or CSV file"
        ) from error


def _recognise(name: str, schema: pa.Schema) -> dict[str, str]:
    """Our names → the file's.

    Raises:
        ValueError: One that must be there is not, or two differ by case only.
    """
    columns = {}
    for ours, aliases in ALIASES.items():
        for alias in aliases:
            theirs = [column for column in schema.names if column.lower() == alias]
            if len(theirs) > 1:
                raise ValueError(f"source.metadata: {name} has the columns {', '.join(theirs)}; leave only one of them")
            if theirs:
                columns[ours] = theirs[0]
                break
        else:
            if ours in REQUIRED:
                why = "; missing scores never count as safe" if ours == "punsafe" else ""
                raise ValueError(
                    f"source.metadata: {name} has no {ours} column ({' or '.join(aliases)}, in any case); it has "
                    f"{', '.join(schema.names)}{why}"
                )
    return columns


def _check_type(name: str, column: str, type_: pa.DataType, *, is_text: bool) -> None:
    if isinstance(type_, pa.DictionaryType):
        type_ = type_.value_type
    of = pa.types
    text = (of.is_string, of.is_large_string, of.is_string_view, of.is_binary, of.is_large_binary, of.is_null)
    number = (of.is_integer, of.is_floating, of.is_decimal, of.is_string, of.is_large_string, of.is_null)
    if not any(check(type_) for check in (text if is_text else number)):
        raise ValueError(
            f"source.metadata: {name}: column {column!r} is {type_}, expected {'text' if is_text else 'numbers'}; "
            "convert the column"
        )


def _groups(file: MetadataFile, start: int, stop: int | None) -> tuple[int, range]:
    """The row groups of a Parquet file in which some rows are, and the number of the first one's first row."""
    metadata = file.parquet_metadata
    ends = np.cumsum([metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)])
    first = int(np.searchsorted(ends, start, side="right"))
    last = len(ends) if stop is None else min(len(ends), int(np.searchsorted(ends, stop)) + 1)
    return int(ends[first - 1]) if first else 0, range(first, last)


def _batches(file: MetadataFile, path: Path, groups: Iterable[int] | None = None) -> Iterator[pa.RecordBatch]:
    """The columns that we know, in pieces; of a Parquet file all row groups or some.

    Raises:
        ValueError: The file is damaged, or a value of a CSV file is not a number.
    """
    names = list(dict.fromkeys(file.columns.values()))
    with _readable(file.name):
        if file.kind == "parquet":
            with pq.ParquetFile(path, buffer_size=_BUFFER_BYTES) as parquet:
                yield from parquet.iter_batches(_BATCH_ROWS, groups, columns=names)
            return
        types = {theirs: pa.string() if ours in TEXTS else pa.float64() for ours, theirs in file.columns.items()}
        convert = pa_csv.ConvertOptions(include_columns=names, column_types=types, check_utf8=False)
        with pa_csv.open_csv(path, read_options=_CSV_READ, parse_options=_CSV_PARSE, convert_options=convert) as reader:
            yield from reader


def _normalized(file: MetadataFile, batch: pa.RecordBatch) -> pl.DataFrame:
    """A batch in the form ``ROWS``; what the file lacks is null."""
    read = pl.from_arrow(pa.Table.from_batches([_as_bytes(batch)]))
    assert isinstance(read, pl.DataFrame)
    columns = []
    is_text = pl.Series(np.ones(read.height, bool))
    for ours, dtype in _COLUMNS.items():
        theirs = file.columns.get(ours)
        if theirs is None:
            columns.append(pl.Series(ours, dtype=dtype).clear(read.height))  # nulls
            continue
        try:
            values = _converted(read[theirs], dtype).alias(ours)
        except pl.exceptions.PolarsError as error:
            said = " ".join(str(error).split())[:200]
            raise ValueError(
                f"source.metadata: {file.name}: column {theirs!r} has values that are not "
                f"{'text' if dtype is pl.String else 'numbers'} ({said}); correct the column"
            ) from error
        if ours in ("url", "caption") and values.null_count() > read[theirs].null_count():
            is_text &= values.is_not_null() | read[theirs].is_null()
        if ours in _HASH_DIGITS:
            values = values.to_frame().select(_clean_hash(pl.col(ours), ours).alias(ours))[ours]
        columns.append(values)
    return pl.DataFrame([*columns, is_text.alias("is_text")])


def _as_bytes(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch as it is if its texts are UTF-8; else texts as bytes, since they would crash those who trust them."""
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        of = pa.types
        arrays = []
        for array in batch.columns:
            if of.is_dictionary(array.type):
                array = array.dictionary_decode()
            if of.is_string(array.type) or of.is_large_string(array.type):
                array = array.view(pa.binary() if of.is_string(array.type) else pa.large_binary())
            array.validate(full=True)
            arrays.append(array)
        return pa.RecordBatch.from_arrays(arrays, names=batch.schema.names)
    return batch


def _decoded(value: bytes) -> str | None:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _converted(values: pl.Series, dtype: type[pl.DataType]) -> pl.Series:
    """Values of a file in our type; bytes that are not UTF-8 are null."""
    if values.dtype == pl.Binary:  # seldom; polars refuses all of them for one
        return pl.Series([None if value is None else _decoded(value) for value in values], dtype=pl.String)
    if dtype is pl.String:
        return values.cast(pl.String)
    if values.dtype in (pl.Categorical, pl.Enum):  # their codes are no values
        values = values.cast(pl.String)
    numbers = values.cast(pl.Float64)
    return numbers.fill_nan(None).cast(pl.Int32, strict=False) if dtype is pl.Int32 else numbers
