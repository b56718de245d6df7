"""LAION's metadata: files found, columns recognised, rows in one form.

Each LAION release names its columns in its own way; see ``ALIASES``. A file without ``punsafe`` is refused, never read
as if all its rows were safe.
"""

import fnmatch
import glob
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from infra.storage import ObjectNotFoundError, open_store, sha256_of_file

# Our name → LAION's and img2dataset's, case-insensitively, the preferred one first. Where img2dataset wrote the table,
# `original_width` is the width on the web and `width` that of the file it made.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "url": ("url", "image_url"),
    "caption": ("text", "caption", "top_caption", "alt_text", "alt"),
    "width": ("original_width", "width", "image_width"),
    "height": ("original_height", "height", "image_height"),
    "similarity": ("similarity", "clip_similarity"),
    "punsafe": ("punsafe", "p_unsafe"),
    "pwatermark": ("pwatermark", "p_watermark"),
    "aesthetic": ("aesthetic_score", "aesthetic", "aesthetics"),
}
REQUIRED = ("url", "caption", "punsafe")

# The one form of rows. Scores are read as 64-bit numbers, so that a limit is compared with what the file says.
ROWS: Mapping[str, type[pl.DataType]] = {
    "url": pl.String,
    "caption": pl.String,
    "width": pl.Int32,
    "height": pl.Int32,
    "similarity": pl.Float64,
    "punsafe": pl.Float64,
    "pwatermark": pl.Float64,
    "aesthetic": pl.Float64,
}

_BATCH_ROWS = 65_536
_PARQUET_MAGIC = b"PAR1"
_CSV_SUFFIXES = (".csv", ".csv.gz")


@dataclass(frozen=True)
class MetadataFile:
    """One file of metadata, here and readable.

    Attributes:
        name: As the user knows it: a path or a URI.
        path: The local file.
        sha256: Of its content.
        kind: Its format.
        columns: Our name → the file's, for the columns that it has.
    """

    name: str
    path: Path
    sha256: str
    kind: Literal["parquet", "csv"]
    columns: Mapping[str, str]


def find_metadata(patterns: Sequence[str], scratch: Path) -> list[MetadataFile]:
    """Finds the files of metadata and checks that they can be used.

    Args:
        patterns: Paths, globs (``**`` crosses folders), ``file://`` and ``s3://`` URIs, which may be globs too.
        scratch: Folder for copies of what is not here.

    Returns:
        The files, sorted by name, each once.

    Raises:
        ValueError: Something matches nothing, or is not usable metadata; names the file and what it lacks.
        TransientError: The object store failed.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        matches = _find_s3(pattern, scratch) if pattern.startswith("s3://") else _find_local(pattern)
        if not matches:
            raise ValueError(
                f"source.metadata: {pattern!r} matches no file; give paths or globs of Parquet or CSV files"
            )
        found.update(matches)
    return [open_metadata(name, path) for name, path in sorted(found.items())]


def open_metadata(name: str, path: Path) -> MetadataFile:
    """Looks into one local file.

    Args:
        name: As the user knows it.
        path: Where it is.

    Raises:
        ValueError: It is neither Parquet nor CSV, or lacks a column that must be there, or has one of a wrong type.
    """
    kind = _kind_of(name, path)
    schema = _schema_of(name, path, kind)
    columns = _recognise(name, schema)
    if kind == "parquet":  # a CSV file has no types: its values are tried when they are read
        for ours, theirs in columns.items():
            _check_type(name, theirs, schema.field(theirs).type, is_text=ROWS[ours] is pl.String)
    return MetadataFile(name, path, sha256_of_file(path), kind, columns)


def source_digest(files: Sequence[MetadataFile]) -> str:
    """What determines the rows: the files' contents in their order, whatever they are called."""
    return hashlib.sha256("\n".join(file.sha256 for file in files).encode()).hexdigest()


def count_rows(file: MetadataFile) -> int:
    """How many rows a file has.

    Raises:
        ValueError: It cannot be read.
    """
    if file.kind == "parquet":
        with pq.ParquetFile(file.path) as reader:
            return reader.metadata.num_rows
    return sum(batch.num_rows for batch in _batches(file))


def read_rows(files: Sequence[MetadataFile], num_rows: int) -> Iterator[pl.DataFrame]:
    """Reads all files, one after the other, as tables of one form.

    Args:
        files: What to read.
        num_rows: Rows in each table; the last may have fewer.

    Yields:
        Tables with the columns ``ROWS``.

    Raises:
        ValueError: A value is not of its column's type, or a file is damaged; names file and column.
    """
    rest = pl.DataFrame(schema=dict(ROWS))
    for file in files:
        for batch in _batches(file):
            rest = pl.concat([rest, _normalized(file, batch)])
            while rest.height >= num_rows:
                yield rest.head(num_rows)
                rest = rest.slice(num_rows)
    if rest.height:
        yield rest


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


def _find_s3(pattern: str, scratch: Path) -> dict[str, Path]:
    """Downloads what matches."""
    bucket, _, key_pattern = pattern.removeprefix("s3://").partition("/")
    if not bucket or not key_pattern:
        raise ValueError(f"source.metadata: {pattern!r} names no object; write s3://bucket/path/*.parquet")
    store = open_store(f"s3://{bucket}")
    if glob.has_magic(key_pattern):
        beginning = key_pattern[: min(key_pattern.find(sign) for sign in "*?[" if sign in key_pattern)]
        keys = [info.key for info in store.list(beginning) if _key_matches(info.key, key_pattern)]
    else:
        keys = [key_pattern]
    found = {}
    for key in keys:
        # Named by its URI: objects of one name in two prefixes must not overwrite each other.
        name = f"s3://{bucket}/{key}"
        path = scratch / hashlib.sha256(name.encode()).hexdigest()[:16] / Path(key).name
        try:
            store.download(key, path)
        except ObjectNotFoundError:
            continue
        found[name] = path
    return found


def _key_matches(key: str, pattern: str) -> bool:
    """Whether a key matches as a path would: a single star does not cross slashes."""
    return fnmatch.fnmatchcase(key, pattern) and ("**" in pattern or key.count("/") == pattern.count("/"))


def _kind_of(name: str, path: Path) -> Literal["parquet", "csv"]:
    with path.open("rb") as file:
        if file.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC:
            return "parquet"
    if path.name.lower().endswith(_CSV_SUFFIXES):
        return "csv"
    raise ValueError(
        f"source.metadata: {name} is neither a Parquet nor a CSV file; give one, or a glob that leaves it out"
    )


def _schema_of(name: str, path: Path, kind: Literal["parquet", "csv"]) -> pa.Schema:
    try:
        if kind == "parquet":
            return pq.read_schema(path)
        with pa_csv.open_csv(path, parse_options=pa_csv.ParseOptions(newlines_in_values=True)) as reader:
            return reader.schema
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> ValueError:
    said = " ".join(str(error).split())[:200]
    return ValueError(f"source.metadata: {name} cannot be read ({said}); give a whole Parquet or CSV file")


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


def _batches(file: MetadataFile) -> Iterator[pa.RecordBatch]:
    """The columns that we know, in pieces.

    Raises:
        ValueError: The file is damaged, or a value of a CSV file is not a number.
    """
    names = list(file.columns.values())
    try:
        if file.kind == "parquet":
            with pq.ParquetFile(file.path) as parquet:
                for batch in parquet.iter_batches(_BATCH_ROWS, columns=names):
                    batch.validate(full=True)  # text that is not UTF-8 would crash those who trust it
                    yield batch
            return
        convert = pa_csv.ConvertOptions(
            include_columns=names,
            column_types={
                theirs: pa.string() if ROWS[ours] is pl.String else pa.float64()
                for ours, theirs in file.columns.items()
            },
        )
        parse = pa_csv.ParseOptions(newlines_in_values=True)
        with pa_csv.open_csv(file.path, parse_options=parse, convert_options=convert) as reader:
            yield from reader
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file.name, error) from error


def _normalized(file: MetadataFile, batch: pa.RecordBatch) -> pl.DataFrame:
    """A batch in the form ``ROWS``; columns that the file lacks are null."""
    read = pl.from_arrow(pa.table(batch))
    assert isinstance(read, pl.DataFrame)
    columns = []
    for ours, dtype in ROWS.items():
        theirs = file.columns.get(ours)
        if theirs is None:
            columns.append(pl.repeat(None, read.height, dtype=dtype, eager=True).alias(ours))
            continue
        try:
            columns.append(_converted(read[theirs], dtype).alias(ours))
        except pl.exceptions.PolarsError as error:
            said = " ".join(str(error).split())[:200]
            raise ValueError(
                f"source.metadata: {file.name}: column {theirs!r} has values that are not "
                f"{'text' if dtype is pl.String else 'numbers'} ({said}); correct the column"
            ) from error
    return pl.DataFrame(columns)


def _converted(values: pl.Series, dtype: type[pl.DataType]) -> pl.Series:
    """Values of a file in our type; what cannot be a size in pixels (NaN, or beyond 32 bits) is missing."""
    if dtype is pl.String:
        return values.cast(pl.String)
    if values.dtype in (pl.Categorical, pl.Enum):  # their codes are no values
        values = values.cast(pl.String)
    numbers = values.cast(pl.Float64)
    return numbers.fill_nan(None).cast(pl.Int32, strict=False) if dtype is pl.Int32 else numbers
