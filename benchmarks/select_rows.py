"""Selecting rows of LAION-like metadata beside a plain DuckDB query and bare polars, on the same files, in one run.

Ours is the select stage as the pipeline runs it (``run_stage``): rows judged with a reason for each that goes, uids,
train/validation split, histograms, shards committed with hashes and accounted for. The peers filter by the same limits
on scores, sizes and captions, and write one Parquet file, zstd level 1 as ours, with the columns that ours has: their
uid is the md5 of URL and caption. ``…_plain`` is the same without uid and split: LAION's columns as they stand. Where
duplicates are dropped, the peers are asked for the same in their own words. Each run is a child process: time is the
child's own around the work, without imports; memory is its peak, as the kernel counts it (VmHWM). The sha256 of the
metadata, which ours needs to name the result, is taken beforehand: it is remembered from run to run.

Scenarios: ``plain`` (rules on single rows), ``duplicates`` (one row a URL as well), ``strict`` (a limit on punsafe that
a tenth of the rows pass), ``sorted`` (the same limit, on files ordered by punsafe: statistics prove that most row
groups hold nothing), ``rare`` and ``pruned`` (as these two, with a limit that one row in a hundred passes), ``rejects``
(as ``plain``, each refused row written; ours only). Ratios are ours / peer in rows/s; ``self_sorted`` and
``self_pruned`` are ours, ordered / shuffled.

    python benchmarks/select.py [--rows N] [--rounds N] [--quick] [--json]

DuckDB is no dependency of Lacuna: the peers run with ``$LACUNA_BENCH_PYTHON``, else in a virtual environment that this
makes under ``var/``, with this environment's polars.
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

REPOSITORY = Path(__file__).resolve().parents[1]
ROWS_PER_GROUP = 250_000
GROUPS_PER_FILE = 8
ROWS_PER_SHARD = 200_000
DUCKDB = "duckdb==2.0.0"
LIMITS: dict[str, Any] = {"max_punsafe": 0.1, "max_pwatermark": 0.8, "min_side_px": 512, "max_aspect": 3.0}
PUNSAFE = {"strict": 5e-4, "sorted": 5e-4, "rare": 7e-7, "pruned": 7e-7}  # 10 % and 1 % of the rows are below
ORDERED = {"sorted": "strict", "pruned": "rare"}  # the same, shuffled
SCENARIOS = ("plain", "duplicates", "strict", "sorted", "rare", "pruned", "rejects")
QUICK_SCENARIOS = ("plain", "strict", "sorted")

_BEGINNINGS = [
    "red",
    "blue",
    "old",
    "wood",
    "sun",
    "stone",
    "paint",
    "moun",
    "wed",
    "kit",
    "art",
    "print",
    "cot",
    "bri",
    "por",
    "flo",
    "vin",
    "hand",
    "sum",
    "win",
]
_ENDINGS = [
    "",
    *["ing", "tain", "ten", "ter", "ish", "set", "work", "ton", "er", "house", "land", "ding", "chen", "berg"],
]
_WORDS = pl.Series([beginning + ending for beginning in _BEGINNINGS for ending in _ENDINGS])
_NUM_PHRASES = 1 << 16
_NUM_SCORES = 1 << 22


@functools.cache
def _phrases() -> pl.Series:
    """Two to eight words each; two of them make a caption."""
    rng = np.random.default_rng(0)
    num_words = pl.Series("n", rng.integers(2, 9, _NUM_PHRASES))
    words = [_WORDS.gather(rng.integers(0, len(_WORDS), _NUM_PHRASES)).alias(f"w{i}") for i in range(8)]
    first = [pl.when(pl.col("n") > i).then(f"w{i}") for i in range(8)]
    joined = pl.concat_str(first, separator=" ", ignore_nulls=True)
    return pl.DataFrame([num_words, *words]).select(joined).to_series()


@functools.cache
def _unsafe_scores() -> np.ndarray:
    """What punsafe is drawn from, ascending; so any range of quantiles can be drawn from, too."""
    return np.sort(np.random.default_rng(0).beta(0.35, 3, _NUM_SCORES)).astype(np.float32)


def make_rows(num_rows: int, seed: int) -> pl.DataFrame:
    """LAION-joined-like rows: URLs of about 100 characters, captions of about 60; 3 % of URLs come again.

    Args:
        num_rows: How many.
        seed: Which.
    """
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 2**62, num_rows)
    hosts = rng.zipf(1.3, num_rows) % 200_000
    again = rng.random(num_rows) < 0.03
    ids[again] = rng.integers(0, 300_000, int(again.sum())) * 7919
    hosts[again] = ids[again] % 1000
    halves = [_phrases().gather(rng.integers(0, _NUM_PHRASES, num_rows)).alias(name) for name in ("first", "second")]
    return pl.DataFrame([pl.Series("id", ids), pl.Series("host", hosts), *halves]).select(
        URL=pl.format(
            "https://cdn{}.shop-{}.example.com/wp-content/uploads/20{}/0{}/{}-product-photo-{}x{}.jpg",
            pl.col("host") % 7, "host", pl.col("id") % 12 + 10, pl.col("id") % 9 + 1, "id", pl.col("id") % 900 + 100,
            pl.col("id") % 700 + 100,
        ),
        TEXT=pl.concat_str("first", "second", separator=" "),
        WIDTH=pl.Series(rng.lognormal(6.4, 0.6, num_rows).astype(np.int32)),
        HEIGHT=pl.Series(rng.lognormal(6.3, 0.6, num_rows).astype(np.int32)),
        similarity=pl.Series(0.28 + 0.15 * rng.beta(1.5, 5, num_rows)),
        hash=pl.Series(rng.integers(-(2**63), 2**63 - 1, num_rows)),
        punsafe=pl.Series(rng.choice(_unsafe_scores(), num_rows)),
        pwatermark=pl.Series(rng.beta(0.6, 1.4, num_rows).astype(np.float32)),
        AESTHETIC_SCORE=pl.Series(rng.normal(5, 0.7, num_rows).astype(np.float32)),
    )  # fmt: skip


def write_metadata(shuffled: Path, ordered: Path, num_rows: int) -> None:
    """Writes files of row groups as large as LAION's, snappy-compressed, twice: as they come, and ordered by punsafe.

    The second differs in punsafe only, which rises from row group to row group.
    """
    for folder in (shuffled, ordered):
        folder.mkdir(parents=True)
    rows_per_group = min(num_rows, ROWS_PER_GROUP)
    num_groups = num_rows // rows_per_group
    scores = _unsafe_scores()
    for first in range(0, num_groups, GROUPS_PER_FILE):
        name = f"part-{first // GROUPS_PER_FILE:05d}.parquet"
        with contextlib.ExitStack() as stack:
            writers: list[pq.ParquetWriter] = []
            for index in range(first, min(first + GROUPS_PER_FILE, num_groups)):
                rows = make_rows(rows_per_group, index)
                limits = [place * len(scores) // num_groups for place in (index, index + 1)]
                drawn = np.random.default_rng(index).choice(scores[slice(*limits)], rows_per_group)
                tables = [
                    part.to_arrow(compat_level=pl.CompatLevel.oldest())
                    for part in (rows, rows.with_columns(punsafe=pl.Series(drawn)))
                ]
                if not writers:
                    paths = (shuffled / name, ordered / name)
                    writers = [
                        stack.enter_context(pq.ParquetWriter(path, tables[0].schema, compression="snappy"))
                        for path in paths
                    ]
                for writer, table in zip(writers, tables, strict=True):
                    writer.write_table(table, row_group_size=rows_per_group)


def run_ours(
    folder: Path, scratch: Path, *, drop_duplicates: bool, rejects: Literal["all", "counts"] = "counts"
) -> dict[str, Any]:
    """The select stage, into a store in a folder."""
    from infra.storage import open_store
    from preprocessing.contracts.config import SelectConfig, SourceConfig
    from preprocessing.select import SelectStage
    from preprocessing.stage import run_stage

    source = SourceConfig(metadata=(f"{folder}/*.parquet",), rows_per_shard=ROWS_PER_SHARD)
    config = SelectConfig(**LIMITS, rejects=rejects, drop_duplicates=drop_duplicates)
    store = open_store(str(scratch / "store"))
    stage = SelectStage(store, source, config)
    assert stage.digest  # hashes the files, or finds their hashes
    started = time.perf_counter()
    manifest = run_stage(store, stage)
    return {"seconds": time.perf_counter() - started, "num_out": manifest.num_out, "dropped": manifest.dropped}


def run_duckdb(folder: Path, scratch: Path, *, drop_duplicates: bool, same_columns: bool = True) -> dict[str, Any]:
    """One query: COPY … TO; with all columns that ours writes, uid and split among them, or without these."""
    import duckdb  # pyright: ignore[reportMissingImports]  # in the peers' environment

    connection = duckdb.connect()
    connection.execute(f"SET temp_directory = '{scratch}'")
    uid = "md5(concat(URL, TEXT)) AS uid," if same_columns else ""
    query = f"""
        SELECT {uid} URL AS url, TEXT AS caption, WIDTH AS width, HEIGHT AS height,
               similarity::FLOAT AS similarity, punsafe, pwatermark, AESTHETIC_SCORE AS aesthetic
        FROM read_parquet('{folder}/*.parquet')
        WHERE punsafe < {LIMITS["max_punsafe"]} AND NOT isnan(punsafe)
          AND pwatermark < {LIMITS["max_pwatermark"]} AND NOT isnan(pwatermark)
          AND least(WIDTH, HEIGHT) >= {LIMITS["min_side_px"]}
          AND greatest(WIDTH, HEIGHT) <= {LIMITS["max_aspect"]} * least(WIDTH, HEIGHT)
          AND trim(URL) <> '' AND length(trim(TEXT)) BETWEEN 1 AND 2000"""  # noqa: S608
    if drop_duplicates:
        query = f"SELECT DISTINCT ON (url) * FROM ({query})"  # noqa: S608
    if same_columns:
        query = f"""
            SELECT *, NULL::VARCHAR AS expected_md5, NULL::VARCHAR AS expected_sha256, NULL::VARCHAR AS source,
                   CASE WHEN uid < '051eb851eb851eb851eb851eb851eb85' THEN 'validation' ELSE 'train' END AS split
            FROM ({query})"""  # noqa: S608
    started = time.perf_counter()
    target = f"'{scratch}/out.parquet' (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1)"
    counted = connection.execute(f"COPY ({query}) TO {target}").fetchall()
    return {"seconds": time.perf_counter() - started, "num_out": counted[0][0], "version": duckdb.__version__}


def run_polars(folder: Path, scratch: Path, *, drop_duplicates: bool, same_columns: bool = True) -> dict[str, Any]:
    """One lazy query: scan_parquet … sink_parquet; with all columns that ours writes, or without uid and the like."""
    shorter, longer = pl.min_horizontal("WIDTH", "HEIGHT"), pl.max_horizontal("WIDTH", "HEIGHT")
    rows = pl.scan_parquet(f"{folder}/*.parquet").filter(
        (pl.col("punsafe") < LIMITS["max_punsafe"])
        & pl.col("punsafe").is_finite()
        & (pl.col("pwatermark") < LIMITS["max_pwatermark"])
        & pl.col("pwatermark").is_finite()
        & (shorter >= LIMITS["min_side_px"])
        & (longer <= LIMITS["max_aspect"] * shorter)
        & (pl.col("URL").str.strip_chars() != "")
        & pl.col("TEXT").str.strip_chars().str.len_chars().is_between(1, 2000)
    )
    names = {"URL": "url", "TEXT": "caption", "WIDTH": "width", "HEIGHT": "height", "AESTHETIC_SCORE": "aesthetic"}
    columns = [*names, "punsafe", "pwatermark", pl.col("similarity").cast(pl.Float32)]
    rows = rows.select(columns).rename(names)
    if drop_duplicates:
        rows = rows.unique("url", keep="any")
    if same_columns:
        import polars_hash  # noqa: F401  # gives expressions the namespace `nchash`

        uid = pl.concat_str("url", "caption").nchash.md5()  # pyright: ignore[reportAttributeAccessIssue]
        nothing = [pl.lit(None, pl.String).alias(name) for name in ("expected_md5", "expected_sha256", "source")]
        is_held_out = pl.col("uid") < "051eb851eb851eb851eb851eb851eb85"
        split = pl.when(is_held_out).then(pl.lit("validation")).otherwise(pl.lit("train"))
        rows = rows.with_columns(uid.alias("uid"), *nothing).with_columns(split.alias("split"))
    started = time.perf_counter()
    rows.sink_parquet(scratch / "out.parquet", compression="zstd", compression_level=1)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "num_out": pq.read_metadata(scratch / "out.parquet").num_rows,
        "version": pl.__version__,
    }


RUNNERS = {
    "ours": run_ours,
    "ours_rejects": functools.partial(run_ours, rejects="all"),
    "duckdb": run_duckdb,
    "polars": run_polars,
    "duckdb_plain": functools.partial(run_duckdb, same_columns=False),
    "polars_plain": functools.partial(run_polars, same_columns=False),
}
PEERS = ("duckdb", "polars", "duckdb_plain", "polars_plain")


def runners_of(scenario: str) -> tuple[str, ...]:
    """Who runs a scenario."""
    if scenario == "rejects":
        return ("ours_rejects",)
    return ("ours", *PEERS) if scenario in ("plain", "duplicates") else ("ours", "duckdb", "polars")


def in_child(python: str, who: str, folder: Path, scenario: str) -> dict[str, Any]:
    """Runs one of ``RUNNERS`` in a process of its own; adds its peak memory and processor time."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [python, str(REPOSITORY / "benchmarks" / "select.py"), "--child", who, scenario, str(folder), scratch]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": scratch}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{who} ended with {process.returncode}")
    return json.loads(said.splitlines()[-1]) | {"cpu_s": usage.ru_utime + usage.ru_stime}


def python_with_duckdb() -> str:
    """The peers' interpreter."""
    given = os.environ.get("LACUNA_BENCH_PYTHON")
    if given:
        return given
    peers = runpy.run_path(str(REPOSITORY / "benchmarks" / "peers.py"))  # this folder is not where Python looks
    ours = (f"{name}=={version(name)}" for name in ("numpy", "polars", "polars-hash", "pyarrow"))
    return peers["peers_python"]("select", [DUCKDB, *ours])


def main() -> None:
    """Runs all, alternating, and prints the medians."""
    if sys.argv[1:2] == ["--child"]:
        who, scenario, folder, scratch = sys.argv[2:]
        LIMITS["max_punsafe"] = PUNSAFE.get(scenario, LIMITS["max_punsafe"])
        result = RUNNERS[who](Path(folder), Path(scratch), drop_duplicates=scenario == "duplicates")
        # Not ru_maxrss, which starts from the memory of the process that started this one.
        peak_kib = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]
        print(json.dumps(result | {"rss_mib": int(peak_kib) / 1024}))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="default: 20 million; with --quick 2 million")
    parser.add_argument("--rounds", type=int, help="default: 3; with --quick 1")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, help="default: all; with --quick three")
    parser.add_argument(
        "--metadata", type=Path, help="a folder for the metadata, to be made once; default: a passing one"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds: under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    num_rows = args.rows or (2_000_000 if args.quick else 20_000_000)
    num_rounds = args.rounds or (1 if args.quick else 3)
    scenarios = args.scenarios or (QUICK_SCENARIOS if args.quick else SCENARIOS)
    pythons = dict.fromkeys(RUNNERS, sys.executable) | dict.fromkeys(PEERS, python_with_duckdb())
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="lacuna-bench-") as name:
        made = (args.metadata or Path(name)) / f"{num_rows}-rows"
        shuffled, ordered = made / "shuffled", made / "ordered"
        if not made.exists():
            with tempfile.TemporaryDirectory(dir=made.parent) as half:
                write_metadata(Path(half) / "shuffled", Path(half) / "ordered", num_rows)
                shutil.copytree(half, made, copy_function=os.link)
        for _ in range(num_rounds):
            for scenario in scenarios:
                for who in runners_of(scenario):
                    folder = ordered if scenario in ORDERED else shuffled
                    result = in_child(pythons[who], who, folder, scenario)
                    print(scenario, who, {key: result[key] for key in ("seconds", "cpu_s", "rss_mib")}, file=sys.stderr)
                    found.setdefault((scenario, who), []).append(result)
    rates = {
        key: num_rows / statistics.median(result["seconds"] for result in results) for key, results in found.items()
    }
    print(f"{num_rows:,} rows, median of {num_rounds}; {os.cpu_count()} cores")
    print(f"{'scenario':12}{'who':14}{'rows/s':>12}{'rows out':>12}{'CPU s':>8}{'peak MiB':>10}{'ours/peer':>11}")
    for (scenario, who), results in found.items():
        ratio = f"{rates[scenario, 'ours'] / rates[scenario, who]:.2f}" if who in PEERS else ""
        cpu_s = statistics.median(result["cpu_s"] for result in results)
        rss_mib = max(result["rss_mib"] for result in results)
        rate, num_out = rates[scenario, who], results[-1]["num_out"]
        print(f"{scenario:12}{who:14}{rate:12,.0f}{num_out:12,}{cpu_s:8.1f}{rss_mib:10.0f}{ratio:>11}")
    against_self = {
        f"self_{scenario}": rates[scenario, "ours"] / rates[other, "ours"]
        for scenario, other in ORDERED.items()
        if {scenario, other} <= set(scenarios)
    }
    for name, ratio in against_self.items():
        print(f"{name}, ours on ordered files against ours on shuffled ones: {ratio:.1f}")
    print("drop reasons:", next(iter(found.values()))[-1]["dropped"])
    if args.json:
        ratios = {
            who if scenario == "plain" else f"{who}_{scenario}": rates[scenario, "ours"] / rates[scenario, who]
            for scenario, who in found
            if who in PEERS
        }
        result = {
            "name": "select",
            "unit": "rows/s",
            "ours": {s: rate for (s, who), rate in rates.items() if who not in PEERS}
            | {
                "peak_rss_mib": max(
                    r["rss_mib"] for (_, who), results in found.items() if who not in PEERS for r in results
                )
            },
            "peers": {who: {s: rates[s, who] for s in scenarios if (s, who) in rates} for who in PEERS},
            "ratios": ratios | against_self,
            "versions": {
                "duckdb": DUCKDB.partition("==")[2],
                "polars": pl.__version__,
                "pyarrow": pa.__version__,
                "python": platform.python_version(),
            },
            "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
        }
        print(json.dumps(result))
