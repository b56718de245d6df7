"""The demo world's metadata: LAION's columns, the same bytes each time, and awkward rows that end as they say."""

import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from infra.storage import open_store
from model.tiny.world import scene_at
from preprocessing.contracts.config import DemoWorldConfig
from preprocessing.contracts.reasons import Reason
from preprocessing.demo.metadata import (
    KINDS,
    LAION_SCHEMA,
    awkward_rows,
    expected_reasons,
    metadata_key,
    put_metadata,
    write_metadata,
)
from preprocessing.demo.server import answer

CONFIG = DemoWorldConfig(num_pictures=60)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    path = tmp_path_factory.mktemp("demo") / "metadata.parquet"
    write_metadata(CONFIG, path)
    assert pq.read_schema(path).equals(LAION_SCHEMA)
    return pq.read_table(path).to_pylist()


def test_columns_are_laions() -> None:
    names = "URL TEXT WIDTH HEIGHT similarity hash punsafe pwatermark AESTHETIC_SCORE"
    assert names.split() == LAION_SCHEMA.names
    types = "string string int32 int32 double int64 float float float"
    assert types.split() == [str(type_) for type_ in LAION_SCHEMA.types]


def test_the_same_bytes_each_time_and_others_for_another_world(tmp_path: Path) -> None:
    for name, config in {
        "a": CONFIG,
        "b": CONFIG,
        "seed": CONFIG.model_copy(update={"seed": 8}),
        "port": CONFIG.model_copy(update={"port": 9000}),
    }.items():
        write_metadata(config, tmp_path / name)
    contents = {name: (tmp_path / name).read_bytes() for name in ("a", "b", "seed", "port")}
    assert contents["a"] == contents["b"]
    assert len(set(contents.values())) == 3


def test_good_rows_are_true(rows: list[dict]) -> None:
    awkward = {row.values["hash"] for row in awkward_rows(CONFIG)}
    good = [row for row in rows if row["hash"] not in awkward]
    repeated = sum(len(kind.changes) for name, kind in KINDS.items() if name == "duplicate_row")
    assert len(good) == CONFIG.num_pictures - repeated
    for row in good:
        scene = scene_at(CONFIG.seed, int(row["URL"].rsplit("/", 1)[1].split(".")[0]))
        assert row["TEXT"] == scene.caption
        assert (row["WIDTH"], row["HEIGHT"]) == (scene.width_px, scene.height_px)
        assert 0 <= row["punsafe"] < 0.1
        assert 0 <= row["pwatermark"] < 0.8
        assert answer(row["URL"].removeprefix(f"http://127.0.0.1:{CONFIG.port}")).status == 200


def test_every_awkward_row_stands_in_the_table_once_or_as_a_copy(rows: list[dict]) -> None:
    awkward = awkward_rows(CONFIG)
    assert len(rows) == CONFIG.num_pictures + len(awkward)
    assert {row.kind for row in awkward} == set(KINDS) == set(expected_reasons())
    counts = {kind: sum(row.kind == kind for row in awkward) for kind in KINDS}
    assert all(2 <= count <= 6 for count in counts.values()), counts
    hashes = [row["hash"] for row in rows]
    for row in awkward:
        assert hashes.count(row.values["hash"]) == (2 if row.kind == "duplicate_row" else 1), row


def test_copies_stand_after_their_originals(rows: list[dict]) -> None:
    copies = [row for row in awkward_rows(CONFIG) if row.original is not None]
    assert {row.kind for row in copies} == {"duplicate_row", "duplicate_url", "duplicate_image"}
    urls = [row["URL"] for row in rows]
    for copy in copies:
        original_url = copy.values["URL"].removesuffix("?copy=1")
        places = [place for place, row in enumerate(rows) if row["hash"] == copy.values["hash"]]
        assert urls.index(original_url) < places[-1] or copy.kind == "duplicate_row"
        assert len(places) == (2 if copy.kind == "duplicate_row" else 1)


def test_awkward_rows_are_spread(rows: list[dict]) -> None:
    awkward = {row.values["hash"] for row in awkward_rows(CONFIG)}
    places = [place for place, row in enumerate(rows) if row["hash"] in awkward]
    assert min(places) < len(rows) / 10
    assert max(places) > len(rows) * 9 / 10


def test_scores_at_the_limit(rows: list[dict]) -> None:
    by_kind: dict[str, list] = {}
    by_hash = {row["hash"]: row for row in rows}
    for row in awkward_rows(CONFIG):
        by_kind.setdefault(row.kind, []).append(by_hash[row.values["hash"]]["punsafe"])
    assert all(value == pytest.approx(0.1, abs=1e-8) and value >= 0.1 for value in by_kind["punsafe_at_limit"])
    assert all(value < 0.1 for value in by_kind["punsafe_just_below"])
    assert all(value is None for value in by_kind["punsafe_null"])
    assert all(value is not None and math.isnan(value) for value in by_kind["punsafe_nan"])


def test_stages_belong_to_their_reasons() -> None:
    for kind in KINDS.values():
        assert (kind.stage is None) == (kind.reason is None)
    assert expected_reasons()["duplicate_image"] is Reason.DUPLICATE_IMAGE
    assert expected_reasons()["caption_with_markup"] is None


def test_awkward_pictures_of_kept_rows_are_served() -> None:
    for row in awkward_rows(CONFIG):
        if row.expected_reason is None:
            path = row.values["URL"].removeprefix(f"http://127.0.0.1:{CONFIG.port}")
            assert answer(path).status in (200, 302), row


def test_put_metadata_writes_once(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    uri = put_metadata(store, CONFIG)
    assert uri == store.uri_of("sources/demo-v1-7-60-8763/metadata.parquet")
    etag = store.head(metadata_key(CONFIG)).etag
    assert put_metadata(store, CONFIG) == uri
    assert store.head(metadata_key(CONFIG)).etag == etag


def test_put_metadata_leaves_what_is_there(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    store.put(metadata_key(CONFIG), b"of another version")
    put_metadata(store, CONFIG)
    assert store.read(metadata_key(CONFIG)) == b"of another version"
