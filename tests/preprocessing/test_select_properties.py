"""Whatever the rows, the rules, the shards and the files: the result is that of a plain loop; and it is nested, bounded
in memory, and never taken for that of another input."""

import csv
import json
import math
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.storage import open_store
from preprocessing.contracts.config import SelectConfig, SourceConfig, SubsetConfig
from preprocessing.contracts.digests import is_held_out, uid_of
from preprocessing.contracts.manifest import Manifest, dataset_prefix
from preprocessing.contracts.reasons import Reason
from preprocessing.select import SelectStage
from preprocessing.stage import run_stage
from tests.preprocessing import select_reference as reference

TYPES = {
    "url": pa.string(),
    "caption": pa.string(),
    "width": pa.int64(),
    "height": pa.int64(),
    "similarity": pa.float64(),
    "punsafe": pa.float32(),
    "pwatermark": pa.float64(),
    "aesthetic": pa.float32(),
    "language": pa.string(),
}

texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=6)
scores = st.none() | st.floats(width=32) | st.sampled_from([0.1, 0.0, 0.05, 0.05, 0.5])
sides = st.none() | st.sampled_from([0, 63, 64, 100, 193, 2**31 - 1, 2**31, 2**62, -5]) | st.just(100)
rows_of_any_kind = st.lists(
    st.fixed_dictionaries(
        {
            "url": st.none() | st.sampled_from(["http://a/1", "http://a/2", "http://b/1", "http://b/2", "x"]) | texts,
            "caption": st.none() | st.sampled_from(["c", "d", "c\x00", "é🙂"]) | texts,
            "width": sides,
            "height": sides,
            "similarity": scores,
            "punsafe": scores | st.just(0.01),
            "pwatermark": scores | st.just(0.01),
            "aesthetic": scores,
            "language": st.sampled_from([None, "en", " EN ", "de"]),
        }
    ),
    max_size=30,
)
good_rows = st.lists(
    st.fixed_dictionaries(
        {
            "url": st.sampled_from([f"http://{host}/{path}" for host in "abc" for path in range(4)]),
            "caption": st.sampled_from("cdef"),
            **{name: st.just(100) for name in ("width", "height")},
            **{name: st.just(0.05) for name in ("similarity", "punsafe", "pwatermark", "aesthetic")},
            "language": st.just("en"),
        }
    ),
    max_size=40,
)
rules = st.builds(
    SelectConfig,
    max_punsafe=st.sampled_from([0.1, 0.5]),
    max_pwatermark=st.sampled_from([None, 0.8]),
    min_similarity=st.sampled_from([None, None, 0.05]),
    min_aesthetic=st.sampled_from([None, None, 0.05]),
    min_side_px=st.just(64),
    languages=st.sampled_from([(), ("en",)]),
    min_caption_chars=st.sampled_from([0, 1]),
    max_caption_chars=st.sampled_from([4, 2000]),
    subsample=st.sampled_from([1.0, 0.5]),
    drop_duplicates=st.booleans(),
    max_rows_per_host=st.sampled_from([None, 1, 3]),
    max_rows=st.sampled_from([None, 0 + 1, 5]),
    rejects=st.sampled_from(["all", "counts"]),
    validation_fraction=st.just(0.3),
)


def write_files(folder: Path, rows: list[dict[str, Any]], cuts: list[int], group: int) -> str:
    """The rows in as many Parquet files as there are cuts and one."""
    ends = [*sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    start = 0
    for number, end in enumerate(ends):
        part = rows[start:end]
        table = pa.table({name: pa.array([row[name] for row in part], type_) for name, type_ in TYPES.items()})
        pq.write_table(table, folder / f"{number:03d}.parquet", row_group_size=group)
        start = end
    return f"{folder}/*.parquet"


def kept_rows(folder: Path, patterns: str, config: SelectConfig, shard: int) -> tuple[Manifest, list[dict[str, Any]]]:
    store = open_store(str(folder / "store"))
    manifest = run_stage(store, SelectStage(store, SourceConfig(metadata=(patterns,), rows_per_shard=shard), config))
    return manifest, rows_of(folder, manifest, "rows")


def rows_of(folder: Path, manifest: Manifest, kind: Literal["rows", "rejects"]) -> list[dict[str, Any]]:
    store, prefix = open_store(str(folder / "store")), dataset_prefix("select", manifest.digest)
    tables = [pq.read_table(pa.BufferReader(store.read(f"{prefix}/{file.name}"))) for file in manifest.files(kind)]
    return [row for table in tables for row in table.to_pylist()]


def nan_as_none(row: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}


def comparable(dropped: Mapping[Any, int], config: SelectConfig) -> dict[str, int]:
    """Rows by reason; where they are only counted, statistics may prove them unsafe without telling NaN from high."""
    counts = Counter({str(reason): count for reason, count in dropped.items()})
    if config.rejects == "counts":
        counts[Reason.PUNSAFE_HIGH] += counts.pop(Reason.PUNSAFE_MISSING, 0)
    return {reason: count for reason, count in counts.items() if count}


@settings(deadline=None, max_examples=40)
@given(
    rows=rows_of_any_kind | good_rows,
    config=rules,
    shard=st.integers(1, 12),
    cuts=st.lists(st.integers(0, 30), max_size=3),
    group=st.integers(1, 10),
)
def test_it_keeps_what_a_plain_loop_keeps(
    rows: list[dict[str, Any]], config: SelectConfig, shard: int, cuts: list[int], group: int
) -> None:
    reasons = reference.select(rows, config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest, kept = kept_rows(folder, write_files(folder, rows, cuts, group), config, shard)
        rejected = rows_of(folder, manifest, "rejects")
    expected = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
    assert [(row["url"], row["caption"]) for row in kept] == [(row["url"], row["caption"] or "") for row in expected]
    assert [row["uid"] for row in kept] == [uid_of(row["url"], row["caption"] or "") for row in expected]
    assert all(row["split"] == ("validation" if is_held_out(row["uid"], 0.3) else "train") for row in kept)
    assert comparable(manifest.dropped, config) == comparable(Counter(filter(None, reasons)), config)
    for index, report in enumerate(manifest.shards):
        part = reasons[index * shard : (index + 1) * shard]
        assert report.num_in == len(part)
        assert comparable(report.dropped, config) == comparable(Counter(filter(None, part)), config)
    assert bool(manifest.files("rejects")) == (config.rejects == "all" and bool(rows))
    if config.rejects == "all":
        assert [row["reason"] for row in rejected] == [reason for reason in reasons if reason is not None]


@settings(deadline=None, max_examples=15)
@given(rows=good_rows, config=rules)
def test_a_smaller_subsample_is_a_part_of_a_larger_one(rows: list[dict[str, Any]], config: SelectConfig) -> None:
    config = config.model_copy(update={"max_rows": None})
    found: list[set[str]] = []
    for share in (0.1, 0.4, 1.0):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            patterns = write_files(folder, rows, [], 100)
            found.append({
                row["uid"] for row in kept_rows(folder, patterns, config.model_copy(update={"subsample": share}), 50)[1]
            })  # fmt: skip
    for share, part in zip((0.1, 0.4), found, strict=False):
        assert part == {uid for uid in found[2] if int(uid[:16], 16) < share * 2**64}


@settings(deadline=None, max_examples=25)
@given(rows=rows_of_any_kind)
def test_csv_is_the_same_as_parquet(rows: list[dict[str, Any]]) -> None:
    config = SelectConfig(min_side_px=64, validation_fraction=0.3)
    for row in rows:  # what CSV cannot say: NUL, a bare \r, and text that is null
        for name in ("url", "caption"):
            row[name] = (row[name] or "").replace("\r", " ").replace("\0", " ")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "a.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(TYPES), quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows([{k: "" if v is None else v for k, v in row.items()} for row in rows])
        manifest, kept = kept_rows(folder, str(folder / "a.csv"), config, 7)
    reasons = reference.select(rows, config)
    expected = [(row["url"], row["caption"]) for row, reason in zip(rows, reasons, strict=True) if reason is None]
    assert [(row["url"], row["caption"]) for row in kept] == expected
    assert manifest.num_in == len(rows)


ROW = {
    "url": "http://a/1", "caption": "c", "width": 100, "height": 100, "similarity": 0.5, "punsafe": 0.01,
    "pwatermark": 0.1, "aesthetic": 5.0, "language": "en",
}  # fmt: skip


@pytest.mark.parametrize("rejects", ["all", "counts"])
def test_text_that_is_not_utf8_costs_its_row_only(tmp_path: Path, rejects: Any) -> None:
    columns = {name: pa.array([ROW[name]] * 5, type_) for name, type_ in TYPES.items()}
    columns["url"] = pa.array([f"http://a/{i}" for i in range(5)])
    columns["caption"] = pa.array([b"good", b"\xff", b"good", b"\xc3\x28", b"good"]).view(pa.string())
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=2)
    config = SelectConfig(min_side_px=64, rejects=rejects)
    manifest, kept = kept_rows(tmp_path, str(tmp_path / "a.parquet"), config, 2)
    assert [row["url"][-1] for row in kept] == ["0", "2", "4"]
    assert manifest.dropped == {Reason.TEXT_INVALID: 2}


@pytest.mark.parametrize("rejects", ["all", "counts"])
def test_row_groups_that_cannot_pass_are_counted(tmp_path: Path, rejects: Any) -> None:
    """Where rejects are only counted, they are not even read, so that NaN among them is high; nulls are told apart."""
    scores = [0.05, 0.06, 0.5, 0.7, 0.9, math.nan, 0.9, None]
    rows = [ROW | {"url": f"http://a/{i}", "punsafe": score} for i, score in enumerate(scores)]
    config = SelectConfig(min_side_px=64, rejects=rejects)
    manifest, kept = kept_rows(tmp_path, write_files(tmp_path, rows, [], 2), config, 3)
    assert len(kept) == 2
    is_counting = rejects == "counts"
    missing = 1 if is_counting else 2
    assert manifest.dropped == {Reason.PUNSAFE_HIGH: 6 - missing, Reason.PUNSAFE_MISSING: missing}
    assert [file.num_rows for file in manifest.files()] == [2]  # of the other shards, nothing is kept
    store = open_store(str(tmp_path / "store"))
    report = json.loads(store.read(f"{dataset_prefix('select', manifest.digest)}/report.json"))
    assert (report["num_in"], report["num_out"], report["dropped"]) == (8, 2, manifest.dropped)
    assert report["scores"]["punsafe"]["before"]["num_missing"] == missing
    assert report["scores"]["aesthetic"]["before"]["num_unread"] == (4 if is_counting else 0)
    assert report["hosts"]["top"] == [["a", 2]]


def test_the_page_escapes_what_the_web_says(tmp_path: Path) -> None:
    rows = [ROW | {"url": "http://<script>alert(1)</script>/x"}]
    manifest, _ = kept_rows(tmp_path, write_files(tmp_path, rows, [], 2), SelectConfig(min_side_px=64), 3)
    page = open_store(str(tmp_path / "store")).read(f"{dataset_prefix('select', manifest.digest)}/report.html").decode()
    assert "&lt;script&gt;" in page
    assert "<script" not in page


def test_subsets_by_weight(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        rows = [ROW | {"url": f"http://{name}/{i}"} for i in range(400)]
        write_files(tmp_path / name, rows, [], 100)
    subsets = {
        "big": SubsetConfig(metadata=(f"{tmp_path}/a/*",), weight=3),
        "small": SubsetConfig(metadata=(f"{tmp_path}/b/*",), weight=1),
    }
    store = open_store(str(tmp_path / "store"))
    config = SelectConfig(min_side_px=64, rejects="counts")
    manifest = run_stage(store, SelectStage(store, SourceConfig(subsets=subsets, rows_per_shard=300), config))
    files = [store.read(f"{dataset_prefix('select', manifest.digest)}/{file.name}") for file in manifest.files()]
    sources = [row["source"] for data in files for row in pq.read_table(pa.BufferReader(data)).to_pylist()]
    assert sources.count("big") == 400
    assert 60 < sources.count("small") < 200


@pytest.mark.parametrize(
    ("path", "dataset", "is_withdrawn"),
    [
        ("laion2B-en/part.parquet", None, True),
        ("LAION_400M/part.parquet", None, True),
        ("laion-high-resolution.parquet", None, True),
        ("laion1B-nolang.parquet", None, True),
        ("improved_aesthetics_6plus.parquet", None, True),
        ("relaion2B-en-research-safe/part.parquet", None, False),
        ("re-laion2B-multi/part.parquet", None, False),
        ("mine.parquet", None, False),
        ("mine.parquet", "laion2B-multi", True),
        ("laion2B-en-lookalike.parquet", "my own", False),
    ],
)
def test_withdrawn_sets_need_an_acknowledgement(
    tmp_path: Path, path: str, dataset: str | None, is_withdrawn: bool
) -> None:
    file = tmp_path / path
    file.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({name: pa.array([ROW[name]], type_) for name, type_ in TYPES.items()}), file)
    store = open_store(str(tmp_path / "store"))
    source = SourceConfig(metadata=(str(file),), dataset=dataset)
    config = SelectConfig(min_side_px=64)
    if is_withdrawn:
        with pytest.raises(ValueError, match=r"^source\.metadata: .*withdrawn.*acknowledge_withdrawn=true") as caught:
            assert SelectStage(store, source, config).digest
        assert "\n" not in str(caught.value)
    source = source.model_copy(update={"acknowledge_withdrawn": True})
    manifest = run_stage(store, SelectStage(store, source, config))
    assert bool(manifest.config["withdrawn"]) == is_withdrawn


def test_every_change_of_input_or_config_is_noticed(tmp_path: Path) -> None:
    rows = [ROW | {"url": f"http://a/{i}"} for i in range(6)]
    for name in ("hosts", "urls", "hashes"):
        (tmp_path / name).write_text({"hosts": "x.example\n", "urls": "http://x/\n", "hashes": "ab" * 16}[name])
    base = SelectConfig(min_side_px=64)
    patterns = write_files(tmp_path, rows, [3], 10)
    store = open_store(str(tmp_path / "store"))

    def digest(config: SelectConfig = base, **source: Any) -> str:
        return SelectStage(store, SourceConfig.model_validate({"metadata": (patterns,)} | source), config).digest

    def changed(index: int, **values: Any) -> None:
        write_files(tmp_path, [row | values if i == index else row for i, row in enumerate(rows)], [3], 10)

    before = digest()
    assert digest() == before
    changes: dict[str, Any] = {
        "max_punsafe": 0.2, "max_pwatermark": None, "min_similarity": 0.1, "min_aesthetic": 1.0, "min_side_px": 65,
        "max_aspect": 2.0, "languages": ("en",), "min_caption_chars": 2, "max_caption_chars": 99,
        "drop_boilerplate": True, "subsample": 0.5, "drop_duplicates": False, "max_rows_per_host": 2, "max_rows": 3,
        "rejects": "counts", "validation_fraction": 0.1, "block_hosts": str(tmp_path / "hosts"),
        "block_urls": str(tmp_path / "urls"), "block_hashes": str(tmp_path / "hashes"),
    }  # fmt: skip
    digests = [digest(base.model_copy(update={name: value})) for name, value in changes.items()]
    digests += [digest(rows_per_shard=7), digest(metadata=(patterns.replace("*", "000"),))]
    subset = SubsetConfig(metadata=(patterns,))
    digests += [digest(metadata=(), subsets={name: subset}) for name in ("one", "other")]
    (tmp_path / "hosts").write_text("y.example\n")
    digests.append(digest(base.model_copy(update={"block_hosts": str(tmp_path / "hosts")})))
    for index, values in ((0, {"caption": "d"}), (5, {"punsafe": 0.02}), (2, {"width": 101})):
        changed(index, **values)
        digests.append(digest())
    write_files(tmp_path, rows[::-1], [3], 10)
    digests.append(digest())
    assert len({before, *digests}) == 1 + len(digests)
    assert len(digests) >= 20
    write_files(tmp_path, rows, [3], 10)
    assert digest() == before
    assert digest(base.model_copy(update={"min_rows": 5})) == before


def test_block_lists_are_counted_never_shown(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# private\nsecret.example\nother.example\n\n")
    rows = [ROW | {"url": "http://secret.example/x"}, ROW]
    config = SelectConfig(min_side_px=64, block_hosts=str(tmp_path / "hosts"))
    manifest, kept = kept_rows(tmp_path, write_files(tmp_path, rows, [], 10), config, 10)
    assert [row["url"] for row in kept] == ["http://a/1"]
    assert manifest.config["block_lists"]["hosts"]["count"] == 2
    assert "secret" not in manifest.model_dump_json()
    assert str(tmp_path) not in json.dumps(manifest.config)
    (tmp_path / "hosts").write_text("fine.example\nhttp://secret.example/\n")
    with pytest.raises(ValueError, match=r"^select\.block_hosts: line 2 of") as caught:
        assert SelectStage(open_store(str(tmp_path / "s2")), SourceConfig(metadata=("x",)), config).config
    assert "secret" not in str(caught.value)


_CHILD = """
import re, sys
from infra.storage import open_store
from preprocessing.contracts.config import SelectConfig, SourceConfig
from preprocessing.select import SelectStage
from preprocessing.stage import run_stage
store = open_store(sys.argv[2])
source = SourceConfig(metadata=(sys.argv[1],), rows_per_shard=100_000)
run_stage(store, SelectStage(store, source, SelectConfig(min_side_px=64, max_punsafe=0.1, rejects=sys.argv[3])))
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def _peak_mib(pattern: str, store: Path, rejects: str) -> float:
    """Of a process of its own, by VmHWM: the peak that wait4 tells starts from the memory of the parent."""
    command = [sys.executable, "-c", _CHILD, pattern, str(store), rejects]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(said.splitlines()[-1]) / 1024


@pytest.mark.soak
@pytest.mark.parametrize("rejects", ["all", "counts"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, rejects: str) -> None:
    """2 and 8 million rows: two thirds are candidates, so that the rules over several rows are under load, too."""
    count = 250_000
    for number in range(32):
        ids = range(number * count, (number + 1) * count)
        urls = pa.array([f"http://host-{i % 5000}.example/a/quite/long/path/to/a/picture/{i}.jpg" for i in ids])
        columns = {"url": urls, "caption": pa.array([f"caption number {i}" for i in ids])}
        for name in ("width", "height"):
            columns[name] = pa.array([100] * count, pa.int32())
        for name in ("similarity", "pwatermark", "aesthetic"):
            columns[name] = pa.array([0.05] * count, pa.float32())
        columns["punsafe"] = pa.array([0.5 if i % 3 == 0 else 0.05 for i in ids], pa.float32())
        pq.write_table(pa.table(columns), tmp_path / f"{number:02d}.parquet", row_group_size=50_000)
    small = _peak_mib(f"{tmp_path}/0[0-7].parquet", tmp_path / "small", rejects)
    large = _peak_mib(f"{tmp_path}/*.parquet", tmp_path / "large", rejects)
    assert large <= 512, (small, large)
    assert large <= 1.15 * small, (small, large)
