"""How two datasets are compared: distances of scores, counts, gates, and a page that trusts nobody."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

from infra.errors import GateError
from infra.storage import ObjectStore, open_store
from preprocessing.contracts.config import RefreshConfig
from preprocessing.contracts.manifest import dataset_prefix
from preprocessing.drift import Drift, Lineage, check_gates, compare, stability_index, write_report
from preprocessing.stage import RowsFile, ShardOutput, rejects_table, run_stage
from tests.preprocessing.given import GivenTables

CONFIG = RefreshConfig(max_drift=0.25)
_VALUES = np_st.arrays(np.float32, st.integers(20, 200), elements=st.floats(0, 1, width=32))


class Encoded(GivenTables):
    name, parents = "encode", {"download": "d" * 64}

    def __init__(self, digit: str, rows: Sequence[dict[str, object]]) -> None:
        super().__init__([pa.Table.from_pylist(list(rows))])
        self.digest = digit * 64

    def output(self, index: int) -> ShardOutput:
        rows = RowsFile(f"train-{index:05d}.parquet", self.tables[index], split="train")
        return ShardOutput(index, self.tables[index].num_rows, (rows,), rejects_table([], [], [], []))


def lineage(store: ObjectStore, digit: str, rows: Sequence[dict[str, object]]) -> Lineage:
    manifest = run_stage(store, Encoded(digit, rows))
    return Lineage(dataset_prefix("encode", manifest.digest), {"encode": manifest})


def rows_of(start: int, stop: int, *, host: str = "a.example", similarity: float = 0.3) -> list[dict[str, object]]:
    rng = np.random.default_rng(start)
    return [
        {
            "uid": f"{index:032x}",
            "url": f"https://{host}/{index}.png",
            "punsafe": float(rng.random() / 10),
            "pwatermark": None if index % 7 == 0 else float(rng.random()),
            "similarity": similarity + float(rng.random()) / 10,
        }
        for index in range(start, stop)
    ]


@pytest.fixture
def drift(tmp_path: Path) -> Drift:
    store = open_store(str(tmp_path))
    before = lineage(store, "a", rows_of(0, 200))
    strange = rows_of(190, 200, host="<script>alert(1)</script>.example")
    return compare(
        store, before, lineage(store, "b", [*rows_of(50, 190), *strange, *rows_of(200, 260, similarity=0.5)])
    )


def test_rows_are_counted(drift: Drift) -> None:
    assert (drift.num_new, len(drift.gone), drift.num_kept) == (60, 50, 150)
    assert drift.gone[0] == f"{0:032x}"


def test_the_gates(drift: Drift) -> None:
    kept = {gate.field: gate.is_kept for gate in drift.gates(CONFIG)}
    assert kept == {"max_lost_share": True, "max_drift": False}, "similarity has gone up, and is asked last"
    strict = RefreshConfig(max_lost_share=0.2, max_drift=None)
    with pytest.raises(GateError, match=r"^refresh\.max_lost_share: 50 of the last dataset's 200 rows are gone, over"):
        check_gates(drift, strict, "the report")
    with pytest.raises(GateError, match=r"^refresh\.max_drift: similarity has shifted by [0-9.]+ \(PSI\), over the"):
        check_gates(drift, CONFIG, "the report")
    check_gates(drift, RefreshConfig(max_drift=None), "the report")


def test_the_report(drift: Drift, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    key = write_report(store, drift, CONFIG)
    report = json.loads(store.read(key.removesuffix(".html") + ".json"))
    assert report["rows"] == {"before": 200, "now": 210, "new": 60, "gone": 50, "kept": 150}
    hosts = {host: (before, now) for host, before, now in report["hosts"]}
    assert hosts["a.example"] == (200, 200)
    assert sum(report["scores"]["similarity"]["now"]) == 210
    assert sum(report["scores"]["pwatermark"]["before"]) == 200 - len(range(0, 200, 7))
    page = store.read(key).decode()
    assert "<script" not in page
    assert "alert(1)" not in page or "&lt;script&gt;" in page
    assert "refused" in page


def test_the_first_dataset_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    first = compare(store, None, lineage(store, "a", rows_of(0, 150)))
    assert (first.num_new, first.gone, first.num_kept) == (150, [], 0)
    assert first.gates(CONFIG) == []
    assert b"The first one." in store.read(write_report(store, first, CONFIG))


def test_a_few_rows_have_no_distance(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    few = compare(store, lineage(store, "a", rows_of(0, 50)), lineage(store, "b", rows_of(0, 50, similarity=0.6)))
    assert set(few.distances.values()) == {None}


@given(_VALUES)
def test_equal_values_have_no_distance(values: np.ndarray) -> None:
    assert stability_index(values, values) == pytest.approx(0, abs=1e-12)
    assert stability_index(values, np.random.default_rng(0).permutation(values)) == pytest.approx(0, abs=1e-12)


@given(_VALUES, _VALUES)
def test_a_distance_is_never_negative(before: np.ndarray, now: np.ndarray) -> None:
    assert 0 <= stability_index(before, now) < 20


def test_the_usual_reading_of_the_index() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(0.3, 0.05, 20_000)
    assert stability_index(before, rng.normal(0.3, 0.05, 20_000)) < 0.01
    assert 0.1 < stability_index(before, rng.normal(0.325, 0.05, 20_000)) < 0.3
    assert stability_index(before, rng.normal(0.4, 0.05, 20_000)) > 1
