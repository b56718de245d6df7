"""Metadata files of every LAION release, local and in S3, and those that must be refused."""

import gzip
import math
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from infra.storage import open_store
from preprocessing.laion import ROWS, PlainReader, Window, find_metadata, open_metadata, read_rows, windows

# The columns of each release, as they are spelled there.
RELEASES = {
    "laion2B-en-joined": "URL TEXT WIDTH HEIGHT similarity hash punsafe pwatermark",
    "laion2B-multi-joined": "URL TEXT WIDTH HEIGHT LANGUAGE similarity hash punsafe pwatermark",
    "laion2B-en-aesthetic": "URL TEXT WIDTH HEIGHT similarity hash punsafe pwatermark aesthetic",
    "improved_aesthetics_6plus": "URL TEXT WIDTH HEIGHT similarity hash punsafe pwatermark AESTHETIC_SCORE",
    "laion2B-with-md5": "url caption similarity hash punsafe pwatermark md5",
    "laion-coco": "URL top_caption WIDTH HEIGHT similarity hash pwatermark punsafe",
    "img2dataset": "key url caption width height original_width original_height punsafe pwatermark similarity status",
}
VALUES = {
    "url": ["http://a.example/1.jpg", None],
    "text": ["a red circle", None],
    "caption": ["a red circle", None],
    "top_caption": ["a red circle", None],
    "width": [640, None],
    "height": [480, None],
    "original_width": [1640, None],
    "original_height": [1480, None],
    "punsafe": [0.05, None],
    "pwatermark": [0.5, math.nan],
    "similarity": [0.3, None],
    "aesthetic": [5.5, None],
    "aesthetic_score": [5.5, None],
}


def write(path: Path, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def write_minimal(path: Path, url: str = "http://a.example/1.jpg", punsafe: object = 0.01) -> Path:
    return write(path, URL=[url], TEXT=["a caption"], punsafe=[punsafe])


def read(tmp_path: Path, *patterns: str | Path) -> pl.DataFrame:
    tables = []
    for file in find_metadata([str(p) for p in patterns]):
        with file.local(tmp_path) as path:
            tables += list(read_rows(file, path))
            assert sum(table.height for table in tables[-1:]) <= file.num_rows
    return pl.concat(tables)


def error_of(tmp_path: Path, *patterns: str | Path) -> str:
    """The one line that a user sees."""
    with pytest.raises(ValueError, match=r"^source\.metadata: ") as caught:
        read(tmp_path, *patterns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("release", RELEASES)
def test_every_release_becomes_one_form(tmp_path: Path, release: str) -> None:
    names = RELEASES[release].split()
    write(tmp_path / "part.parquet", **{name: VALUES.get(name.lower(), ["other", None]) for name in names})
    rows = read(tmp_path, tmp_path / "part.parquet")
    assert dict(rows.schema) == {name: dtype() for name, dtype in ROWS.items()}
    first, second = rows.rows(named=True)
    has_size = "width" in [name.lower() for name in names]
    assert (first["url"], first["caption"]) == ("http://a.example/1.jpg", "a red circle")
    assert first["width"] == (1640 if release == "img2dataset" else 640 if has_size else None)
    assert (first["punsafe"], first["similarity"]) == (0.05, 0.3)
    assert first["aesthetic"] == (5.5 if "aesthetic" in release else None)
    assert [second[name] for name in ("url", "caption", "width", "height", "punsafe", "similarity")] == [None] * 6
    assert math.isnan(second["pwatermark"])


def test_32_bit_scores_keep_their_value(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", URL=["u"], TEXT=["t"], punsafe=pa.array([0.1], pa.float32()))
    assert read(tmp_path, tmp_path / "a.parquet")["punsafe"][0] == 0.10000000149011612


def test_sizes_as_pandas_writes_them(tmp_path: Path) -> None:
    widths = [512.0, math.nan, None, 1e12]
    write(tmp_path / "a.parquet", URL=["u"] * 4, TEXT=["t"] * 4, punsafe=[0.0] * 4, WIDTH=widths)
    assert read(tmp_path, tmp_path / "a.parquet")["width"].to_list() == [512, None, None, None]


def test_other_types_that_mean_the_same(tmp_path: Path) -> None:
    write(
        tmp_path / "a.parquet",
        URL=pa.array(["u", "v"], pa.large_string()),
        TEXT=pa.array(["t", "t"]).dictionary_encode(),
        punsafe=pa.array(["0.5", "nan"]),
        pwatermark=pa.nulls(2),
        WIDTH=pa.array([1, 2], pa.uint16()),
    )
    rows = read(tmp_path, tmp_path / "a.parquet")
    assert rows.select("url", "caption", "width", "pwatermark").rows() == [("u", "t", 1, None), ("v", "t", 2, None)]
    assert rows["punsafe"][0] == 0.5
    assert math.isnan(rows["punsafe"][1])


def test_csv(tmp_path: Path) -> None:
    text = (
        "URL,TEXT,WIDTH,HEIGHT,punsafe,pwatermark,note\n"
        'http://a.example/1.jpg,"one, ""two""\nthree",512.0,400,0.05,0.5,x\n'
        "http://a.example/2.jpg,,,,,NaN,y\n"
    )
    (tmp_path / "a.csv").write_text(text)
    with gzip.open(tmp_path / "b.csv.gz", "wt") as file:
        file.write(text)
    rows = read(tmp_path, tmp_path / "a.csv")
    assert rows.select("url", "caption", "width", "height", "punsafe").rows() == [
        ("http://a.example/1.jpg", 'one, "two"\nthree', 512, 400, 0.05),
        ("http://a.example/2.jpg", "", None, None, None),
    ]
    assert read(tmp_path, tmp_path / "b.csv.gz").equals(rows)
    assert [file.num_rows for file in find_metadata([str(tmp_path / "*.csv*")])] == [2, 2]


def test_parquet_and_csv_of_the_same_rows_are_the_same(tmp_path: Path) -> None:
    table = pa.table({"url": ["u", "v"], "text": ["s", "t"], "punsafe": [0.25, None], "width": [1, 2]})
    pq.write_table(table, tmp_path / "a.parquet")
    pa_csv.write_csv(table, tmp_path / "a.csv")
    assert read(tmp_path, tmp_path / "a.csv").equals(read(tmp_path, tmp_path / "a.parquet"))


def test_globs_are_sorted_and_each_file_is_read_once(tmp_path: Path) -> None:
    for name in ("b/2.parquet", "a/1.parquet", "a/c/3.parquet"):
        write_minimal(tmp_path / name, url=name)
    patterns = [tmp_path / "*" / "*.parquet", tmp_path / "b" / "2.parquet", f"file://{tmp_path}/a/**/*.parquet"]
    assert read(tmp_path, *patterns)["url"].to_list() == ["a/1.parquet", "a/c/3.parquet", "b/2.parquet"]


def test_a_name_with_brackets(tmp_path: Path) -> None:
    assert read(tmp_path, write_minimal(tmp_path / "part[1].parquet")).height == 1


def test_s3(s3_root: str, tmp_path: Path) -> None:
    store = open_store(s3_root)
    for name in ("laion/1.parquet", "laion/2.parquet", "laion/deep/1.parquet", "laion/readme.txt"):
        store.upload(name, write_minimal(tmp_path / "file", url=name))
    assert read(tmp_path, f"{s3_root}/laion/*.parquet")["url"].to_list() == ["laion/1.parquet", "laion/2.parquet"]
    assert read(tmp_path, f"{s3_root}/laion/**/*.parquet").height == 3
    assert read(tmp_path, f"{s3_root}/**/1.parquet").height == 2
    assert read(tmp_path, f"{s3_root}/l?ion/[12].parquet").height == 2
    assert read(tmp_path, f"{s3_root}/laion/**.parquet").height == 2
    assert read(tmp_path, f"{s3_root}/laion/deep/1.parquet")["url"].to_list() == ["laion/deep/1.parquet"]
    assert "matches no file" in error_of(tmp_path, f"{s3_root}/laion/3.parquet")
    assert "matches no file" in error_of(tmp_path, f"{s3_root}/nothing/*.parquet")
    assert "names no object" in error_of(tmp_path, s3_root.rsplit("/", 1)[0])
    file = find_metadata([f"{s3_root}/laion/1.parquet"])[0]
    assert file.name == f"{s3_root}/laion/1.parquet"


@pytest.mark.parametrize("pattern", ["nothing.parquet", "*.parquet"])
def test_nothing_found(tmp_path: Path, pattern: str) -> None:
    message = error_of(tmp_path, tmp_path / pattern)
    assert str(tmp_path / pattern) in message
    assert "matches no file" in message


def test_a_folder(tmp_path: Path) -> None:
    assert str(tmp_path / "*.parquet") in error_of(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("missing", "kept"), [("punsafe", "URL, TEXT"), ("URL", "TEXT, punsafe"), ("TEXT", "URL, punsafe")]
)
def test_a_column_that_must_be_there(tmp_path: Path, missing: str, kept: str) -> None:
    columns = {"URL": ["u"], "TEXT": ["t"], "punsafe": [0.0]}
    del columns[missing]
    path = write(tmp_path / "a.parquet", **columns)
    message = error_of(tmp_path, path)
    ours = {"punsafe": "punsafe", "URL": "url", "TEXT": "caption"}[missing]
    assert f"{path} has no {ours} column" in message
    assert kept in message


def test_a_csv_without_punsafe(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("url,text\nu,t\n")
    assert "has no punsafe column" in error_of(tmp_path, tmp_path / "a.csv")


def test_one_file_of_many_without_punsafe(tmp_path: Path) -> None:
    write_minimal(tmp_path / "1.parquet")
    write(tmp_path / "2.parquet", URL=["u"], TEXT=["t"])
    assert f"{tmp_path / '2.parquet'} has no punsafe column" in error_of(tmp_path, tmp_path / "*.parquet")


def test_columns_that_differ_by_case_only(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", URL=["u"], url=["v"], TEXT=["t"], punsafe=[0.0])
    assert "has the columns URL, url; leave only one" in error_of(tmp_path, path)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"punsafe": ["0.1", "unsafe"]}, "column 'punsafe' has values that are not numbers"),
        ({"punsafe": [True, False]}, "column 'punsafe' is bool, expected numbers"),
        ({"punsafe": [[0.1], [0.2]]}, "column 'punsafe' is list<element: double>, expected numbers"),
        ({"URL": [1, 2]}, "column 'URL' is int64, expected text"),
        ({"TEXT": [1.5, 2.5]}, "column 'TEXT' is double, expected text"),
    ],
)
def test_a_column_of_a_wrong_type(tmp_path: Path, columns: dict[str, list], said: str) -> None:
    path = write(tmp_path / "a.parquet", **({"URL": ["u", "v"], "TEXT": ["s", "t"], "punsafe": [0.0, 0.0]} | columns))
    assert f"{path}: {said}" in error_of(tmp_path, path)


def test_a_csv_with_text_for_a_number(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("url,text,punsafe\nu,t,unsafe\n")
    message = error_of(tmp_path, tmp_path / "a.csv")
    assert "a.csv cannot be read" in message
    assert "unsafe" in message


@pytest.mark.parametrize("name", ["a.parquet", "a.json", "a.csv"])
def test_not_a_table(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    message = error_of(tmp_path, tmp_path / name)
    assert ("cannot be read" if name == "a.csv" else "is neither a Parquet nor a CSV file") in message


def test_a_damaged_file(tmp_path: Path) -> None:
    path = write_minimal(tmp_path / "a.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    assert "a.parquet cannot be read" in error_of(tmp_path, path)


def test_text_that_is_not_utf8_is_missing_and_said_so(tmp_path: Path) -> None:
    text = pa.array([b"\xff\xfe", b"good", None], pa.binary()).view(pa.string())
    path = write(tmp_path / "a.parquet", URL=["u", "v", "w"], TEXT=text, punsafe=[0.0] * 3)
    assert read(tmp_path, path).select("caption", "is_text").rows() == [(None, False), ("good", True), (None, True)]
    (tmp_path / "a.csv").write_bytes(b"url,text,punsafe\nu,\xff,0\nv,\xc3\xa9,0\n")
    assert read(tmp_path, tmp_path / "a.csv").select("caption", "is_text").rows() == [(None, False), ("é", True)]


def test_hashes_are_carried_in_one_form(tmp_path: Path) -> None:
    md5, sha256 = "AB" * 16, " " + "cd" * 32
    hashes = pa.array([1, 2], pa.int64())  # LAION's `hash` is none of a picture
    path = write(
        tmp_path / "a.parquet", URL=["u"] * 2, TEXT=["t"] * 2, punsafe=[0.0] * 2, hash=hashes, MD5=[md5, "x"],
        sha256=[None, sha256],
    )  # fmt: skip
    rows = read(tmp_path, path).select("expected_md5", "expected_sha256").rows()
    assert rows == [("ab" * 16, None), (None, "cd" * 32)]


def write_plain(path: Path, num_rows: int, row_group_size: int, caption: bytes = b"a caption") -> Path:
    """Rows with the numbers 0 to n - 1 as widths, punsafe rising from 0 to 1."""
    numbers = pa.array(range(num_rows), pa.int32())
    columns: dict[str, pa.Array] = {
        "url": pa.array([f"http://a.example/{i}" for i in range(num_rows)]),
        "caption": pa.array([caption] * num_rows, pa.binary()).view(pa.string()),
        "punsafe": pa.array([i / num_rows for i in range(num_rows)], pa.float32()),
        **dict.fromkeys(("width", "height"), numbers),
        **dict.fromkeys(("similarity", "pwatermark", "aesthetic"), pa.array([0.5] * num_rows)),
    }
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


@pytest.mark.parametrize(
    ("row_group_size", "max_rows", "limit", "expected"),
    [
        (100, 100, 1.0, [(start, 100, False) for start in range(0, 1000, 100)]),
        (100, 250, 1.0, [(start, 200, False) for start in range(0, 1000, 200)]),  # joined
        (1000, 400, 1.0, [(0, 333, False), (333, 333, False), (666, 334, False)]),  # divided
        (100, 250, 0.3, [(0, 200, False), (200, 100, False), (300, 700, True)]),  # nothing is read of most
    ],
)
def test_windows(
    tmp_path: Path, row_group_size: int, max_rows: int, limit: float, expected: list[tuple[int, int, bool]]
) -> None:
    path = write_plain(tmp_path / "a.parquet", 1000, row_group_size)
    assert list(windows(open_metadata("a", path), limit, max_rows)) == [Window(*window) for window in expected]


def test_long_captions_make_windows_smaller(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pq.read_table(write_plain(path, 20_000, 20_000, b"x" * 10_000))
    pq.write_table(table, path, use_dictionary=False)
    found = list(windows(open_metadata("a", path), 1.0, 1 << 20))
    assert sum(window.num_rows for window in found) == 20_000
    assert max(window.num_rows for window in found) <= 64 * 2**20 / 10_000


@pytest.mark.parametrize("missing", [[], ["width", "aesthetic", "pwatermark"]])
def test_both_ways_to_read_agree(tmp_path: Path, missing: list[str]) -> None:
    path = write_plain(tmp_path / "a.parquet", 1000, 300)
    pq.write_table(pq.read_table(path).drop_columns(missing), path, row_group_size=300)
    file = open_metadata("a", path)
    assert file.is_plain
    reader = PlainReader(file, path)
    for start, num_rows in ((0, 1000), (0, 300), (250, 100), (599, 2), (900, 100)):
        quick = reader.read(Window(start, num_rows, is_hopeless=False), ROWS)
        slow = pl.concat(read_rows(file, path, start, start + num_rows))
        assert quick is not None
        assert quick.equals(slow)
        assert quick.schema == slow.schema


def test_what_polars_does_not_read_is_left_to_arrow(tmp_path: Path) -> None:
    path = write_plain(tmp_path / "a.parquet", 10, 5, b"\xff")
    reader = PlainReader(open_metadata("a", path), path)
    window = Window(0, 10, is_hopeless=False)
    assert reader.read(window, ("url", "caption")) is None
    assert reader.read(window, ("url", "language")) is not None
