"""The loop that commits shards: killed, repeated, lied to."""

import concurrent.futures
import errno
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from infra.errors import ContractError, TransientError
from infra.storage import ObjectStore, open_store, sha256_of_bytes
from preprocessing.contracts.config import DemoWorldConfig, SelectConfig, SourceConfig
from preprocessing.contracts.manifest import MANIFEST_NAME, Manifest, dataset_prefix
from preprocessing.contracts.reasons import Reason
from preprocessing.select import SelectStage
from preprocessing.stage import (
    Progress,
    RowsFile,
    ShardOutput,
    find_manifest,
    find_report,
    load_manifest,
    rejects_table,
    run_shards,
    run_stage,
)

ROOT = Path(__file__).resolve().parents[2]
SOURCE = SourceConfig(demo=DemoWorldConfig(num_pictures=60), rows_per_shard=10)
LIMITS = SelectConfig(min_side_px=64)

# Commits as many shards as it is told, says so, and then stands still until it is killed.
INTERRUPTED_RUN = """
import sys, threading
from infra.storage import open_store
from preprocessing.contracts.config import SelectConfig, SourceConfig
from preprocessing.select import SelectStage
from preprocessing.stage import run_stage

root, source, limits, num_shards = sys.argv[1:]

def stand_still(progress):
    if progress.num_done == int(num_shards):
        print("committed", flush=True)
        threading.Event().wait()

store = open_store(root)
source, limits = SourceConfig.model_validate_json(source), SelectConfig.model_validate_json(limits)
run_stage(store, SelectStage(store, source, limits), stand_still)
"""


class CountingStage:
    """Three shards of two rows, one of which is refused; counts what it is asked for."""

    name = "counting"
    version = 1
    digest = "d" * 64
    config: dict[str, Any]
    num_shards = 3

    def __init__(self) -> None:
        self.config = {"limit": 1}
        self.made: list[int] = []

    @property
    def parents(self) -> dict[str, str]:
        return {"source": "p" * 64}

    def specs(self) -> dict[str, dict[str, Any]]:
        return {}

    def write_extra_files(self, folder: Path) -> Sequence[Path]:
        (folder / "constants.json").write_text("{}")
        return [folder / "constants.json"]

    def outputs(self, indices: Sequence[int], scratch: Path) -> Iterator[ShardOutput]:
        for index in reversed(indices):  # any order is allowed
            self.made.append(index)
            yield self.output(index)

    def output(self, index: int) -> ShardOutput:
        rows = pa.table({"value": [index]})
        rejects = rejects_table([f"uid-{index}"], [None], [Reason.NO_URL], [None])
        return ShardOutput(index, 2, (RowsFile(f"shard-{index:05d}.parquet", rows),), rejects)


PREFIX = dataset_prefix(CountingStage.name, CountingStage.digest)


def kill_after(root: Path, num_shards: int) -> None:
    """Runs a stage in a process of its own and kills it, and all that it started, once it has committed some shards."""
    argv = [sys.executable, "-c", INTERRUPTED_RUN, str(root), SOURCE.model_dump_json(), LIMITS.model_dump_json()]
    process = subprocess.Popen(
        [*argv, str(num_shards)], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        assert process.stdout is not None
        said = process.stdout.readline()
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert said == "committed\n"


def test_a_run_that_was_killed_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    whole_store = open_store(str(tmp_path / "whole"))
    whole = run_stage(whole_store, SelectStage(whole_store, SOURCE, LIMITS))
    num_shards = len(whole.shards)
    assert num_shards > 9
    for num_committed in (1, 3):
        kill_after(tmp_path / "killed", num_committed)
    store = open_store(str(tmp_path / "killed"))
    prefix = dataset_prefix("select", whole.digest)
    assert find_manifest(store, prefix) is None
    stage = SelectStage(store, SOURCE, LIMITS)
    done = [find_report(store, stage, index) is not None for index in range(num_shards)]
    num_done = sum(done)
    assert 3 <= num_done < num_shards  # more than 3: some commits are ahead of what progress tells
    seen: list[Progress] = []
    manifest = run_stage(store, SelectStage(store, SOURCE, LIMITS), seen.append)
    assert manifest.digest == whole.digest
    assert manifest.shards == whole.shards  # with the sha256 of every file
    assert [progress.num_done for progress in seen] == list(range(num_done, num_shards + 1))
    assert seen[0].was_done


def test_a_complete_dataset_is_not_made_again(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    first = run_stage(store, CountingStage())
    etags = {info.key: info.etag for info in store.list(PREFIX)}
    again = CountingStage()
    assert run_stage(store, again) == first
    assert again.made == []
    assert {info.key: info.etag for info in store.list(PREFIX)} == etags
    assert [file.name for file in first.extra_files] == ["constants.json"]
    assert [shard.index for shard in first.shards] == [0, 1, 2]
    assert (first.num_in, first.num_out, first.dropped) == (6, 3, {"no_url": 3})


def _altered(data: bytes, **changes: Any) -> bytes:
    return json.dumps(json.loads(data) | changes).encode()


# What somebody may have done to the report of shard 1: each is noticed, and the shard made again.
REPORT_DAMAGE: dict[str, Callable[[bytes, bytes], bytes]] = {
    "empty": lambda ours, _: b"",
    "truncated": lambda ours, _: ours[:-7],
    "of another shard": lambda _, shard_2: shard_2,
    "of another dataset": lambda ours, _: _altered(ours, digest="e" * 64),
    "of another dataset with the same folder": lambda ours, _: _altered(ours, digest="d" * 16 + "e" * 48),
    "of another stage": lambda ours, _: _altered(ours, stage="select"),
    "of another input": lambda ours, _: _altered(ours, parents={"source": "q" * 64}),
    "of another format": lambda ours, _: _altered(ours, format_version=2),
    "without its dataset": lambda ours, _: json.dumps(json.loads(ours)["report"]).encode(),
    "counts do not add up": lambda ours, _: _altered(ours, report=json.loads(ours)["report"] | {"num_in": 3}),
}


@pytest.mark.parametrize("damage", REPORT_DAMAGE)
def test_a_report_that_is_none_of_this_shard_is_noticed(tmp_path: Path, damage: str) -> None:
    store = open_store(str(tmp_path))
    first = run_stage(store, CountingStage())
    store.delete(f"{PREFIX}/{MANIFEST_NAME}")
    key = f"{PREFIX}/reports/shard-00001.json"
    ours = store.read(key)
    store.put(key, REPORT_DAMAGE[damage](ours, store.read(f"{PREFIX}/reports/shard-00002.json")))
    assert find_report(store, CountingStage(), 1) is None
    again = CountingStage()
    assert run_stage(store, again).shards == first.shards
    assert again.made == [1]
    assert store.read(key) == ours


class NeverTheSame(CountingStage):
    """Makes other bytes each time."""

    def output(self, index: int) -> ShardOutput:
        rows = pa.table({"value": [uuid.uuid4().hex]})
        return replace(super().output(index), rows=(RowsFile(f"shard-{index:05d}.parquet", rows),), is_repeatable=False)


def test_the_first_report_of_a_shard_stands(tmp_path: Path) -> None:
    """Two runs make a shard at the same time, with different bytes: one's files are what both name."""
    store = open_store(str(tmp_path))

    class Slower(NeverTheSame):
        def output(self, index: int) -> ShardOutput:
            ours = super().output(index)
            if index == 1:
                run_shards(store, NeverTheSame(), [1])  # the other run, while we make ours
            return ours

    manifest = run_stage(store, Slower())
    _assert_whole(store, manifest)


def test_many_tasks_share_the_shards(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with concurrent.futures.ThreadPoolExecutor(4) as tasks:  # parts overlap
        list(tasks.map(lambda part: run_shards(store, NeverTheSame(), part), ([0, 1], [1, 2], [2], [0])))
    assert find_manifest(store, PREFIX) is None
    last = NeverTheSame()
    _assert_whole(store, run_stage(store, last))
    assert last.made == []


def _assert_whole(store: ObjectStore, manifest: Manifest) -> None:
    """Everything that is named is there with its hash, and no other table is."""
    files = {f"{PREFIX}/{file.name}": file.sha256 for shard in manifest.shards for file in shard.files}
    found = [info.key for info in store.list(f"{PREFIX}/") if info.key.endswith(".parquet")]
    assert {key: sha256_of_bytes(store.read(key)) for key in found} == files


def test_a_full_disk_is_the_worlds_fault(tmp_path: Path) -> None:
    class NoRoom(CountingStage):
        def output(self, index: int) -> ShardOutput:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/scratch/file")

    with pytest.raises(TransientError, match=r"counting: /scratch/file: No space left on device; is there room"):
        run_stage(open_store(str(tmp_path)), NoRoom())


@pytest.mark.parametrize("damage", ["truncated", "missing", "report", "half written"])
def test_a_shard_that_is_not_what_its_report_says_is_made_again(tmp_path: Path, damage: str) -> None:
    store = open_store(str(tmp_path))
    first = run_stage(store, CountingStage())
    store.delete(f"{PREFIX}/{MANIFEST_NAME}")
    file, report = f"{PREFIX}/shard-00001.parquet", f"{PREFIX}/reports/shard-00001.json"
    if damage == "truncated":
        store.put(file, store.read(file)[:-7])
    elif damage == "missing":
        store.delete(file)
    elif damage == "report":
        store.put(report, store.read(report)[:-7])
    else:  # killed between the rows and the report
        store.delete(report)
    again = CountingStage()
    manifest = run_stage(store, again)
    assert again.made == [1]
    assert manifest.shards == first.shards
    assert pq.read_table(pa.BufferReader(store.read(file))).to_pylist() == [{"value": 1}]


def test_rows_that_are_not_accounted_for_are_refused(tmp_path: Path) -> None:
    class LosesARow(CountingStage):
        def output(self, index: int) -> ShardOutput:
            whole = super().output(index)
            return ShardOutput(index, 3 if index == 1 else 2, whole.rows, whole.rejects)

    store = open_store(str(tmp_path))
    with pytest.raises(ValidationError, match="shard 1: num_in 3 != num_out 1"):
        run_stage(store, LosesARow())
    assert find_manifest(store, PREFIX) is None
    assert find_report(store, LosesARow(), 1) is None
    assert find_report(store, LosesARow(), 2) is not None


def test_a_shard_that_is_not_made_is_an_error(tmp_path: Path) -> None:
    class SkipsAShard(CountingStage):
        def outputs(self, indices: Sequence[int], scratch: Path) -> Iterator[ShardOutput]:
            return super().outputs([index for index in indices if index != 1], scratch)

    store = open_store(str(tmp_path))
    with pytest.raises(RuntimeError, match=r"shards \[1\] were not made"):
        run_stage(store, SkipsAShard())
    assert find_manifest(store, PREFIX) is None


def test_of_two_runs_at_once_the_first_manifest_stands(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))

    class Overtaken(CountingStage):
        def write_extra_files(self, folder: Path) -> Sequence[Path]:
            other = CountingStage()
            other.config = {"limit": 2}  # so that its manifest differs
            run_stage(store, other)
            return super().write_extra_files(folder)

    assert run_stage(store, Overtaken()).config == {"limit": 2}


def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    run_stage(store, CountingStage())
    key = f"{PREFIX}/{MANIFEST_NAME}"
    store.put(key, json.dumps(json.loads(store.read(key)) | {"format_version": 2}).encode())
    with pytest.raises(ContractError, match="not a manifest of format 1"):
        load_manifest(store, PREFIX)
