"""What a dataset takes over from an earlier one: by shard where it is the same, by row otherwise, and never wrongly."""

import io
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.storage import ObjectStore, open_store
from preprocessing.contracts.config import DownloadConfig, EncodeConfig, ModelConfig
from preprocessing.contracts.manifest import Manifest, dataset_prefix
from preprocessing.contracts.reasons import Reason
from preprocessing.contracts.tombstones import Tombstone, Tombstones
from preprocessing.demo.server import picture_path, running_server
from preprocessing.download.recheck import is_turn, turns
from preprocessing.download.stage import DownloadStage
from preprocessing.encode import stage as encode_stage
from preprocessing.encode.stage import EncodeStage
from preprocessing.references import references_to
from preprocessing.reuse import (
    PreviousRows,
    RoundStage,
    agreed_round,
    find_previous,
    forget_previous,
    rows_digest,
    say_previous,
)
from preprocessing.stage import run_stage
from tests.preprocessing.given import Given
from tests.preprocessing.pictures import Downloaded, picture_row, picture_table

MODEL = ModelConfig(base="tiny", base_prediction_type="v_prediction")
CONFIG = EncodeConfig(resolution_px=64, mask_family="lama_train_256", num_mask_variants=1, batch_size=4)
DOWNLOAD = DownloadConfig.model_validate({"allow_networks": ["127.0.0.0/8"], "image_size_px": 48, "retries": 0})


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The uids of the rows that go through the models, from here on."""
    seen: list[str] = []
    prepare = encode_stage.prepare

    def counting(rows: pa.Table, encoders: Any) -> Any:
        seen.extend(rows.column("uid").to_pylist())
        return prepare(rows, encoders)

    monkeypatch.setattr(encode_stage, "prepare", counting)
    return seen


def downloaded(store: ObjectStore, digit: str, shards: Sequence[Sequence[dict[str, object]]]) -> Manifest:
    stage = Downloaded([picture_table(rows) for rows in shards])
    stage.digest = digit * 64
    return run_stage(store, stage)


def encode(store: ObjectStore, parent: Manifest, previous: Manifest | None = None, **config: object) -> Manifest:
    stage = EncodeStage(store, parent, CONFIG.model_copy(update=config), MODEL, "cpu")
    if previous is not None:
        say_previous(store, "encode", stage.digest, dataset_prefix("encode", previous.digest))
    return run_stage(store, stage)


def files(manifest: Manifest) -> list[tuple[str, str]]:
    return [(file.name, file.sha256) for shard in manifest.shards for file in shard.files]


def folders(manifest: Manifest) -> list[set[str | None]]:
    return [{file.folder for file in shard.files} for shard in manifest.shards]


def test_a_dataset_that_takes_over_is_the_one_that_is_made_anew(
    any_root: str, tmp_path: Path, encoded: list[str]
) -> None:
    store = open_store(any_root)
    rows = [picture_row(index) for index in range(15)]
    copy = picture_row(20, image=rows[1]["image"], sha256=rows[1]["sha256"])
    first = encode(store, downloaded(store, "a", [rows[:5], rows[5:10], [*rows[10:], copy]]))
    assert sorted(encoded) == sorted(str(row["uid"]) for row in rows)
    encoded.clear()

    # The copy's first is gone, so it counts; one picture is another; one row's score is; the second shard stays.
    other, rescored = picture_row(3), rows[4] | {"similarity": 0.9}
    replaced = picture_row(30)
    other |= {"image": replaced["image"], "sha256": replaced["sha256"]}
    shards = [[rows[0], rows[2], other, rescored], rows[5:10], [rows[14], *rows[10:14], copy]]
    second = encode(store, downloaded(store, "b", shards), first)
    assert sorted(encoded) == sorted([str(other["uid"]), str(copy["uid"])])
    prefix = dataset_prefix("encode", first.digest)
    assert folders(second) == [{None}, {prefix}, {None}]
    assert set(references_to(store, prefix)) == {file.key(prefix) for file in first.shards[1].files}

    scratch = open_store(str(tmp_path / "scratch"))
    anew = encode(scratch, downloaded(scratch, "b", shards))
    assert (second.digest, files(second), second.specs) == (anew.digest, files(anew), anew.specs)

    # A third one names files of the first, not of the second that named them.
    encoded.clear()
    third = encode(store, downloaded(store, "c", shards[1:]), second)
    assert folders(third) == [{prefix}, {dataset_prefix("encode", second.digest)}]
    assert encoded == []


def test_other_settings_take_nothing_over(tmp_path: Path, encoded: list[str]) -> None:
    store = open_store(str(tmp_path))
    parent = downloaded(store, "a", [[picture_row(index) for index in range(3)]])
    first = encode(store, parent)
    for config in ({"mask_seed": 1}, {"image": "jpeg"}):
        encoded.clear()
        encode(store, parent, first, **config)
        assert len(encoded) == 3


def test_what_is_forgotten_is_not_taken_over(tmp_path: Path, encoded: list[str]) -> None:
    store = open_store(str(tmp_path))
    rows = [picture_row(index) for index in range(4)]
    first = encode(store, downloaded(store, "a", [rows]))
    Tombstones.add(store, [Tombstone.of("sha256", str(rows[2]["sha256"]))])
    encoded.clear()
    second = encode(store, downloaded(store, "b", [rows]), first)
    assert (second.num_out, second.dropped, encoded) == (3, {Reason.FORGOTTEN: 1}, [])


def test_damaged_files_are_not_taken_over(tmp_path: Path, encoded: list[str]) -> None:
    store = open_store(str(tmp_path))
    rows = [picture_row(index) for index in range(6)]
    first = encode(store, downloaded(store, "a", [rows]))
    file = first.files("rows", "train")[0]
    key = file.key(dataset_prefix("encode", first.digest))
    data = bytearray(store.read(key))
    data[len(data) // 2] ^= 1
    store.put(key, bytes(data))
    encoded.clear()
    second = encode(store, downloaded(store, "b", [rows[1:]]), first)
    assert second.num_out == 5
    assert len(encoded) >= file.num_rows - 1
    anew = open_store(str(tmp_path / "anew"))
    assert files(encode(anew, downloaded(anew, "b", [rows[1:]]))) == files(second)


def test_an_earlier_dataset_that_is_gone_is_none(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    say_previous(store, "encode", "a" * 64, "datasets/encode/gone")
    assert find_previous(store, "encode", "a" * 64) is None
    store.put("ledger/reuse/encode-aaaaaaaaaaaaaaaa.json", b"[]")
    assert find_previous(store, "encode", "a" * 64) is None
    say_previous(store, "encode", "b" * 64, dataset_prefix("encode", "b" * 64))  # itself
    assert [info.key for info in store.list("ledger/reuse/")] == ["ledger/reuse/encode-aaaaaaaaaaaaaaaa.json"]
    forget_previous(store, "encode", "a" * 64)
    assert not list(store.list("ledger/reuse/"))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), max_size=8), max_size=4), st.lists(st.integers(0, 60), max_size=10))
def test_rows_are_found_where_they_stand(tmp_path_factory: Any, shards: list[list[int]], wanted: list[int]) -> None:
    store = open_store(str(tmp_path_factory.mktemp("store")))
    manifest = run_stage(store, Given([[f"http://a.example/{n}" for n in shard] for shard in shards]))
    rows = PreviousRows(store, dataset_prefix("select", manifest.digest), manifest, "url")
    urls = [f"http://a.example/{n}" for n in wanted]
    numbers, table = rows.read(rows.find(pa.array(urls, pa.string())), ["url"])
    there = {n for shard in shards for n in shard}
    assert numbers.tolist() == [place for place, n in enumerate(wanted) if n in there]
    assert ([] if table is None else table.column("url").to_pylist()) == [urls[number] for number in numbers]


def test_the_digest_of_rows_is_of_their_values() -> None:
    rows = picture_table([picture_row(index, aesthetic=float("nan"), similarity=None) for index in range(3)])
    assert rows_digest(rows.drop_columns(["image"])) == rows_digest(
        pa.concat_tables([rows.slice(0, 1), rows.slice(1)]).drop_columns(["image"])
    )
    others = [rows.slice(1), rows.set_column(2, "caption", pa.array(["a", "b", "c"], pa.string()))]
    assert len({rows_digest(table.drop_columns(["image"])) for table in [rows, *others]}) == 3


def test_a_round_is_the_same_selection_under_another_digest(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    selected = run_stage(store, Given([["http://a.example/1", "http://a.example/2"], ["http://a.example/3"]]))
    prefix = dataset_prefix("select", selected.digest)
    one = run_stage(store, RoundStage(prefix, selected, ["u1"]))
    other = run_stage(store, RoundStage(prefix, selected, ["u2"]))
    again = run_stage(store, RoundStage(dataset_prefix("select", one.digest), one, ["u1"]))
    assert len({selected.digest, one.digest, other.digest, again.digest}) == 4
    assert files(one) == files(again) == files(selected)
    assert folders(again) == [{prefix}, {prefix}]


def test_two_agree_on_a_round(any_root: str) -> None:
    store = open_store(any_root)
    assert agreed_round(store, "d" * 64, ["u1", "u2"]) == ["u1", "u2"]
    assert agreed_round(store, "d" * 64, ["u2"]) == ["u1", "u2"]
    assert agreed_round(store, "e" * 64, ["u2"]) == ["u2"]


@given(st.lists(st.floats(0.01, 40), min_size=1, max_size=30), st.lists(st.integers(0, 2**128 - 1), max_size=20))
def test_every_row_has_its_turn_once_in_a_period(gaps_days: list[float], uids: list[int]) -> None:
    days, now = 30.0, datetime(2026, 1, 1, tzinfo=UTC)
    num_turns = dict.fromkeys([f"{uid:032x}" for uid in uids], 0)
    started = now
    for gap in gaps_days:
        start, length = turns(now, now + timedelta(days=gap), days)
        now += timedelta(days=gap)
        for uid in num_turns:
            num_turns[uid] += is_turn(uid, start, length)
    least = int((now - started) / timedelta(days=days) - 1e-6)
    assert all(num >= least - sum(gap > days for gap in gaps_days) * 2 for num in num_turns.values())
    if all(gap < days for gap in gaps_days):
        assert all(least <= num <= least + 1 for num in num_turns.values())


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with running_server() as port:
        yield port


def test_pictures_are_taken_over_by_url_where_their_bytes_are_those_that_are_expected(
    tmp_path: Path, port: int
) -> None:
    store = open_store(str(tmp_path))
    urls = [f"http://127.0.0.1:{port}{picture_path(3, index)}" for index in range(6)]
    first = run_stage(store, DownloadStage(store, run_stage(store, Given([urls[:3], urls[3:]])), DOWNLOAD))
    prefix = dataset_prefix("download", first.digest)
    stage = DownloadStage(store, run_stage(store, Given([urls[:3], urls[4:]])), DOWNLOAD)
    say_previous(store, "download", stage.digest, prefix)
    second = run_stage(store, stage)
    assert folders(second) == [{prefix}, {None}]
    assert (second.num_out, list(store.list(f"ledger/download/{second.digest[:16]}"))) == (5, [])
    table = pq.read_table(
        io.BytesIO(store.read(second.shards[1].files[0].key(dataset_prefix("download", second.digest))))
    )
    assert table.column("url").to_pylist() == urls[4:]

    # Other bytes are expected now: they are asked for, and are not those.
    other = run_stage(store, Given([urls[:2]], expected_md5="0" * 32))
    stage = DownloadStage(store, other, DOWNLOAD)
    say_previous(store, "download", stage.digest, prefix)
    assert run_stage(store, stage).dropped == {Reason.HASH_MISMATCH: 2}
