"""What stands in a store: lineage, progress, users; and how few questions that takes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from flows.screens import age_text, status_json, status_screen
from flows.status import datasets_of_run, depth_of, status_of
from infra.bundles import BundleKind, commit_bundle
from infra.channels import move_channel, pointer_to
from infra.storage import ObjectStore, open_store
from infra.storage_s3 import S3Store
from preprocessing.contracts.manifest import (
    MANIFEST_NAME,
    CommittedShard,
    DatasetFile,
    Manifest,
    ShardReport,
    dataset_prefix,
)

NOW = datetime(2026, 1, 2, 8, 0, tzinfo=UTC)
SELECT, DOWNLOAD, OTHER, ENCODE = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
ENCODED = dataset_prefix("encode", ENCODE)


def _report(index: int) -> ShardReport:
    files = (DatasetFile(name=f"shard-{index:05d}.parquet", num_bytes=100, sha256="0" * 64, num_rows=8),)
    return ShardReport(index=index, num_in=10, num_out=8, dropped={"no_url": 2}, files=files)


def _complete(store: ObjectStore, stage: str, digest: str, parents: dict[str, str], num_shards: int = 3) -> str:
    manifest = Manifest(
        stage=stage,
        stage_version=1,
        digest=digest,
        parents=parents,
        config={},
        shards=tuple(_report(index) for index in range(num_shards)),
        created_at="2026-01-02T03:04:05+00:00",
        code_version="0",
    )
    prefix = dataset_prefix(stage, digest)
    store.put(f"{prefix}/{MANIFEST_NAME}", manifest.model_dump_json().encode())
    return prefix


def _begun(store: ObjectStore, stage: str, digest: str, parents: dict[str, str], num_shards: int) -> str:
    prefix = dataset_prefix(stage, digest)

    def put(index: int) -> None:
        committed = CommittedShard(stage=stage, stage_version=1, digest=digest, parents=parents, report=_report(index))
        store.put(f"{prefix}/shard-{index:05d}.parquet", b"x" * 100)
        store.put(f"{prefix}/reports/shard-{index:05d}.json", committed.model_dump_json().encode())

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(put, range(num_shards)))
    return prefix


def _bundle(store: ObjectStore, tmp_path: Path, prefix: str, kind: BundleKind, step: int) -> None:
    folder = tmp_path / prefix
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"w" * 1000)
    commit_bundle(store, prefix, folder, kind=kind, run_id="demo-1", step=step)


def _populate(store: ObjectStore, tmp_path: Path, *, num_begun: int = 2, num_shards: int = 3) -> None:
    """Two selections with downloads, one encoded, one that is being encoded; a run with all that it may leave."""
    _complete(store, "select", SELECT, {"source": "5" * 64}, num_shards)
    _complete(store, "download", DOWNLOAD, {"select": SELECT}, num_shards)
    _complete(store, "download", OTHER, {"select": SELECT}, num_shards)
    _complete(store, "encode", ENCODE, {"download": DOWNLOAD}, num_shards)
    _begun(store, "encode", "e" * 64, {"download": DOWNLOAD}, num_begun)
    store.put("runs/demo-1/config.json", f'{{"dataset_prefix": "{ENCODED}", "train": {{"num_steps": 30}}}}'.encode())
    for step in (10, 20):
        _bundle(store, tmp_path, f"runs/demo-1/checkpoints/step-{step:08d}", "checkpoint", step)
    _bundle(store, tmp_path, "runs/demo-1/validation/step-00000020", "report", 20)
    _bundle(store, tmp_path, "exports/demo-1/step-00000020", "export", 20)
    move_channel(store, "latest", pointer_to(store, "latest", "exports/demo-1/step-00000020"), lambda _: True)


def test_each_dataset_stands_below_the_one_that_it_was_made_from(any_root: str, tmp_path: Path) -> None:
    store = open_store(any_root)
    _populate(store, tmp_path)
    found = status_of(store)
    tree = [(depth_of(item, found.datasets), item.prefix) for item in found.datasets]
    assert tree == [
        (0, dataset_prefix("select", SELECT)),
        (1, dataset_prefix("download", DOWNLOAD)),
        (2, ENCODED),
        (2, dataset_prefix("encode", "e" * 64)),
        (1, dataset_prefix("download", OTHER)),
    ]
    whole, begun = found.datasets[2:4]
    assert (whole.is_complete, whole.num_out, whole.num_bytes, whole.dropped) == (True, 24, 300, {"no_url": 6})
    assert whole.used_by == ("runs/demo-1",)
    assert (begun.is_complete, begun.num_done, begun.num_shards, begun.num_bytes) == (False, 2, 3, 200)
    (run,) = found.runs
    assert (run.step, run.num_steps, run.datasets) == (20, 30, (ENCODED,))
    assert [bundle.step for bundle in run.checkpoints] == [10, 20]
    assert (len(run.reports), len(run.exports)) == (1, 1)
    assert [pointer.channel for pointer in found.channels] == ["latest"]


def test_the_screen_is_a_tree_and_its_keys_can_be_copied(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    _populate(store, tmp_path)
    lines = status_screen(status_of(store), NOW).splitlines()
    assert lines[3].startswith("datasets/select/aaaaaaaaaaaaaaaa")
    assert lines[4].startswith("├─ datasets/download/bbbbbbbbbbbbbbbb")
    assert lines[5].startswith(f"│  ├─ {ENCODED}")
    assert lines[5].split()[-6:] == ["bytes", "5", "h", "ago", "complete", "demo-1"]
    assert "in progress: 2 of 3 shards" in lines[6]
    assert lines[7].startswith("└─ datasets/download/cccccccccccccccc")
    assert any("20 of 30" in line and "2 (10, 20)" in line for line in lines)


def test_the_same_for_programs(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    _populate(store, tmp_path)
    told = status_json(status_of(store))
    assert told["datasets"][ENCODED]["parent"] == dataset_prefix("download", DOWNLOAD)
    assert told["bundles"]["exports/demo-1/step-00000020"]["num_bytes"] == 1000
    assert told["runs"]["demo-1"]["step"] == 20
    assert told["problems"] == []


def test_what_is_broken_hides_nothing_else(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    _populate(store, tmp_path)
    store.put(f"{ENCODED}/{MANIFEST_NAME}", b"{}")
    store.put(f"runs/demo-1/checkpoints/step-00000010/{MANIFEST_NAME}", b"[]")
    store.put("channels/latest.json", b"nonsense")
    store.put("runs/strange/config.json", b"[1]")
    store.put("datasets/encode/ffffffffffffffff/reports/shard-00000.json", b"?")
    found = status_of(store)
    assert len(found.datasets) == 6
    assert len(found.problems) == 3
    assert [run.run_id for run in found.runs] == ["demo-1", "strange"]
    screen = status_screen(found, NOW)
    assert "cannot be read" in screen
    assert "in progress: 1 shards" in screen


def test_a_parent_that_is_gone_is_named(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    _complete(store, "encode", ENCODE, {"download": DOWNLOAD})
    assert f"complete; {dataset_prefix('download', DOWNLOAD)} is gone" in status_screen(status_of(store), NOW)


def test_an_empty_store(any_root: str) -> None:
    found = status_of(open_store(any_root))
    assert (found.datasets, found.runs, found.channels) == ((), (), ())
    assert "dataset: none" in status_screen(found, NOW)


@pytest.fixture
def requests(s3_root: str) -> Iterator[tuple[S3Store, list[str]]]:
    """A store, and the operations that it has asked the server for."""
    store = open_store(s3_root)
    assert isinstance(store, S3Store)
    asked: list[str] = []

    def note(model: Any, **_: Any) -> None:
        asked.append(model.name)

    store.client.meta.events.register("before-call.s3", note)
    yield store, asked
    store.client.meta.events.unregister("before-call.s3", note)


def test_thousands_of_shards_cost_no_more_questions(requests: tuple[S3Store, list[str]], tmp_path: Path) -> None:
    store, asked = requests
    _populate(store, tmp_path)
    asked.clear()
    status_of(store)
    few = len(asked)
    # Files that belong to a complete dataset, more than a listing shows at once.
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: store.put(f"{ENCODED}/train-{i:05d}.parquet", b""), range(1100)))
    _complete(store, "encode", ENCODE, {"download": DOWNLOAD}, num_shards=1100)
    asked.clear()
    found = status_of(store)
    assert found.datasets[2].num_shards == 1100
    assert len(asked) == few
    # 3 stages, 5 datasets (one in progress: a listing and a report), 2 rooms, a run: its config, 3 folders, 4 bundles;
    # the channels' listing and 1 channel, the listing of what `forget` found.
    assert few == 3 + (5 + 2) + 2 + (1 + 3 + 4) + 2 + 1
    assert asked.count("ListObjectsV2") == 3 + 1 + 2 + 3 + 1 + 1


def test_a_dataset_in_progress_is_listed_once(requests: tuple[S3Store, list[str]], tmp_path: Path) -> None:
    store, asked = requests
    _begun(store, "encode", ENCODE, {"download": DOWNLOAD}, 510)  # 1,020 objects: two pages
    asked.clear()
    (found,) = status_of(store).datasets
    assert (found.num_done, found.num_shards) == (510, None)
    assert asked.count("ListObjectsV2") == 3 + 2 + 2 + 1 + 1
    assert len(asked) <= 11


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        ("2026-01-02T07:59:30+00:00", "30 s ago"),
        ("2026-01-02T07:00:00+00:00", "60 min ago"),
        ("2026-01-01T08:00:00+00:00", "24 h ago"),
        ("2025-12-03T08:00:00+00:00", "30 days ago"),
        ("2026-01-02T09:00:00+00:00", "2026-01-02T09:00:00+00:00"),
        ("yesterday", "yesterday"),
        ("2026-01-02T07:00:00", "2026-01-02T07:00:00"),
    ],
)
def test_ages(moment: str, text: str) -> None:
    assert age_text(moment, NOW) == text


def test_the_datasets_of_a_run_in_any_shape_of_its_config() -> None:
    second = "datasets/encode/0123456789abcdef"
    config = {"dataset_prefix": ENCODED, "train": {"datasets": [{"uri": f"s3://b/{second}", "weight": 2}, ENCODED]}}
    assert datasets_of_run(config) == (ENCODED, second)
