"""The select stage: what is kept, in which order, under which digest."""

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra import pulse
from infra.errors import GateError
from infra.storage import ObjectStore, open_store
from preprocessing.contracts.config import DemoWorldConfig, SelectConfig, SourceConfig
from preprocessing.contracts.digests import is_held_out, uid_of
from preprocessing.contracts.manifest import Manifest, dataset_prefix
from preprocessing.contracts.reasons import Reason
from preprocessing.contracts.schemas import REJECTS, SELECTED
from preprocessing.demo.metadata import awkward_rows, metadata_key
from preprocessing.laion import open_metadata
from preprocessing.select import SelectStage, check_gate
from preprocessing.stage import ShardOutput, run_stage

DEMO = SourceConfig(demo=DemoWorldConfig(num_pictures=60), rows_per_shard=50)
# The demo recipe's limits.
LIMITS = SelectConfig(min_side_px=64, max_caption_chars=500, validation_fraction=0.25)


def rows_of(store: ObjectStore, manifest: Manifest, kind: str = "rows") -> list[dict[str, Any]]:
    prefix = dataset_prefix(manifest.stage, manifest.digest)
    rows = []
    for file in manifest.files(kind):
        table = pq.read_table(pa.BufferReader(store.read(f"{prefix}/{file.name}")))
        assert table.schema.equals(SELECTED if kind == "rows" else REJECTS)
        rows += table.to_pylist()
    return rows


def run(tmp_path: Path, columns: dict[str, list], rows_per_shard: int = 3) -> tuple[ObjectStore, Manifest]:
    table = {
        "WIDTH": [100] * len(columns["URL"]),
        "HEIGHT": [100] * len(columns["URL"]),
        "pwatermark": [0.1] * len(columns["URL"]),
    }
    pq.write_table(pa.table(table | columns), tmp_path / "metadata.parquet")
    store = open_store(str(tmp_path / "store"))
    source = SourceConfig(metadata=(str(tmp_path / "metadata.parquet"),), rows_per_shard=rows_per_shard)
    return store, run_stage(store, SelectStage(store, source, LIMITS))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[ObjectStore, Manifest]:
    store = open_store(str(tmp_path_factory.mktemp("store")))
    return store, run_stage(store, SelectStage(store, DEMO, LIMITS))


def test_every_row_of_the_demo_world_ends_as_expected(demo: tuple[ObjectStore, Manifest]) -> None:
    store, manifest = demo
    kept = {row["uid"] for row in rows_of(store, manifest)}
    refused = {(row["uid"], row["reason"]) for row in rows_of(store, manifest, "rejects")}
    awkward = awkward_rows(DEMO.demo)
    for row in awkward:
        uid = uid_of(row.values["URL"] or "", row.values["TEXT"] or "")
        if row.expected_stage == "select":
            assert (uid, row.expected_reason) in refused, row
            assert uid not in kept or row.kind == "duplicate_row"
        else:
            assert uid in kept, row
    num_refused = sum(row.expected_stage == "select" for row in awkward)
    assert manifest.num_in == DEMO.demo.num_pictures + len(awkward)
    assert manifest.num_out == manifest.num_in - num_refused == len(kept)
    for shard in manifest.shards:
        assert shard.num_in == shard.num_out + sum(shard.dropped.values())
    assert {shard.num_in for shard in manifest.shards[:-1]} == {50}


def test_rows_keep_their_order_and_values(demo: tuple[ObjectStore, Manifest], tmp_path: Path) -> None:
    store, manifest = demo
    path = store.local_path(metadata_key(DEMO.demo))
    source = pq.read_table(path).to_pylist()
    kept = rows_of(store, manifest)
    places = {(row["URL"], row["TEXT"]): place for place, row in reversed(list(enumerate(source)))}
    order = [places[row["url"], row["caption"]] for row in kept]
    assert order == sorted(order)
    for place, row in zip(order, kept, strict=True):
        original = source[place]
        assert row["uid"] == uid_of(row["url"], row["caption"])
        assert (row["width"], row["punsafe"], row["aesthetic"]) == (
            original["WIDTH"],
            original["punsafe"],
            original["AESTHETIC_SCORE"],
        )
        assert row["punsafe"] < 0.1
        assert row["split"] == ("validation" if is_held_out(row["uid"], 0.25) else "train")
    assert 0.1 < sum(row["split"] == "validation" for row in kept) / len(kept) < 0.4


def test_s3_gives_the_same(demo: tuple[ObjectStore, Manifest], s3_root: str) -> None:
    store = open_store(s3_root)
    manifest = run_stage(store, SelectStage(store, DEMO, LIMITS))
    assert manifest.digest == demo[1].digest
    assert manifest.shards == demo[1].shards
    assert SelectStage(store, DEMO, LIMITS).digest == manifest.digest


def test_asking_for_the_digest_writes_nothing(demo: tuple[ObjectStore, Manifest], tmp_path: Path) -> None:
    stage = SelectStage(open_store(str(tmp_path / "store")), DEMO, LIMITS)
    assert stage.digest == demo[1].digest
    assert not (tmp_path / "store").exists()


def test_the_digest_follows_what_changes_the_result(demo: tuple[ObjectStore, Manifest]) -> None:
    store, manifest = demo
    others = [
        SelectStage(store, DEMO, LIMITS.model_copy(update={"max_punsafe": 0.05})),
        SelectStage(store, DEMO.model_copy(update={"rows_per_shard": 51}), LIMITS),
        SelectStage(store, DEMO.model_copy(update={"demo": DemoWorldConfig(num_pictures=61)}), LIMITS),
    ]
    assert len({manifest.digest, *(stage.digest for stage in others)}) == 4


def test_the_digest_does_not_follow_names(demo: tuple[ObjectStore, Manifest], tmp_path: Path) -> None:
    path = tmp_path / "renamed.parquet"
    demo[0].download(metadata_key(DEMO.demo), path)
    source = DEMO.model_copy(update={"metadata": (str(path),)})
    store = open_store(str(tmp_path / "store"))
    assert SelectStage(store, source, LIMITS).digest == demo[1].digest


def test_making_a_stage_reads_nothing(tmp_path: Path) -> None:
    stage = SelectStage(open_store(str(tmp_path)), SourceConfig(metadata=("nothing.parquet",)), LIMITS)
    with pytest.raises(ValueError, match=r"^source\.metadata: 'nothing\.parquet' matches no file"):
        assert stage.digest


def test_the_first_kept_row_wins(tmp_path: Path) -> None:
    store, manifest = run(
        tmp_path,
        {
            "URL": ["u", "u", "u", "u", "u", "v", "v"],
            "TEXT": ["a", "a", "b", "a", "b", "c", "c"],
            "punsafe": [0.5, 0.0, 0.0, 0.0, 0.0, None, 0.0],
        },
        rows_per_shard=2,
    )
    assert [(row["url"], row["caption"]) for row in rows_of(store, manifest)] == [("u", "a"), ("v", "c")]
    assert [row["reason"] for row in rows_of(store, manifest, "rejects")] == [
        Reason.PUNSAFE_HIGH,
        Reason.DUPLICATE_URL,
        Reason.DUPLICATE_ROW,
        Reason.DUPLICATE_ROW,
        Reason.PUNSAFE_MISSING,
    ]
    assert [shard.num_in for shard in manifest.shards] == [2, 2, 2, 1]


def test_it_beats_before_the_first_shard_is_there(tmp_path: Path) -> None:
    assert LIMITS.drop_duplicates  # so all rows are read first
    heard: list[int] = []
    stage = SelectStage(open_store(str(tmp_path / "store")), DEMO, LIMITS)
    with pulse.listening(lambda: heard.append(1)), contextlib.closing(_generator(stage, tmp_path)) as outputs:
        next(outputs)
        assert heard


def _generator(stage: SelectStage, scratch: Path) -> Generator[ShardOutput]:
    yield from stage.outputs(range(stage.num_shards), scratch)


def test_rejects_name_the_row_and_the_value(tmp_path: Path) -> None:
    store, manifest = run(tmp_path, {"URL": [None, "u"], "TEXT": [None, "t"], "punsafe": [0.0, 0.25]})
    assert rows_of(store, manifest, "rejects") == [
        {"uid": uid_of("", ""), "url": None, "reason": "no_url", "detail": "missing"},
        {"uid": uid_of("u", "t"), "url": "u", "reason": "punsafe_high", "detail": "0.25"},
    ]


def test_no_rows_at_all(tmp_path: Path) -> None:
    columns = {
        "URL": pa.array([], pa.string()),
        "TEXT": pa.array([], pa.string()),
        "punsafe": pa.array([], pa.float32()),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    store = open_store(str(tmp_path / "store"))
    source = SourceConfig(metadata=(str(tmp_path / "a.parquet"),))
    manifest = run_stage(store, SelectStage(store, source, LIMITS))
    assert (manifest.num_in, manifest.shards) == (0, ())
    with pytest.raises(GateError, match="there were none"):
        check_gate(manifest, LIMITS)


def test_the_gate(tmp_path: Path) -> None:
    _, manifest = run(tmp_path, {"URL": ["u", "v"], "TEXT": ["s", "t"], "punsafe": [0.5, 0.0]})
    check_gate(manifest, LIMITS)
    with pytest.raises(GateError, match=r"^select\.min_rows: 1 of 2 rows were kept, fewer than 2 \(punsafe_high 1\)"):
        check_gate(manifest, LIMITS.model_copy(update={"min_rows": 2}))


def test_a_file_that_changes_after_it_was_hashed_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "metadata.parquet"
    pl.DataFrame({"url": ["http://a.example/1"], "caption": ["a cat"], "punsafe": [0.0]}).write_parquet(path)
    file = open_metadata(str(path), path)
    assert len(file.sha256) == 64
    file.check_unchanged()
    pl.DataFrame({"url": ["http://a.example/22"], "caption": ["a dog"], "punsafe": [0.0]}).write_parquet(path)
    with pytest.raises(ValueError, match=r"metadata\.parquet was changed after it was hashed"):
        file.check_unchanged()
