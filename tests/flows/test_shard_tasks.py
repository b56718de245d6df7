"""Shards as tasks: how they are parted, what fails alone; threads and processes make what one process makes."""

import logging
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows import engines, shard_tasks, tasks
from flows.config import OperationsConfig, PipelineConfig
from flows.engines import check_engine, running_engine
from flows.shard_tasks import MAX_PARTS, NotWantedError, ShardJob, num_parts, split_evenly
from infra import pulse
from infra.errors import ContractError, GateError, TransientError
from infra.storage import open_store
from preprocessing.contracts.manifest import Manifest, dataset_prefix, find_manifest, load_manifest
from preprocessing.download.stage import DownloadStage
from preprocessing.stage import Progress, Stage
from tests.flows.in_one_process import make_in_one_process, shard_files, small_config
from tests.integration.conftest import free_port

# Prefect leaves its clients' sockets to the garbage collector, which may come by during any test here.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


# ---------------------------------------------------------------------------------------------------------------- parts


@given(st.integers(1, 10_000), st.integers(1, 1000))
def test_parts_are_even_and_hold_every_shard_once(num_shards: int, max_tasks: int) -> None:
    parts = split_evenly(range(num_shards), num_parts(num_shards, max_tasks))
    assert [index for part in parts for index in part] == list(range(num_shards))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert min(num_shards, max_tasks) <= len(parts) <= max(MAX_PARTS, max_tasks)


def test_nothing_to_do_is_no_part() -> None:
    assert split_evenly([], num_parts(0, 8)) == []


# -------------------------------------------------------------------------------------------------------------- engines


def test_an_engine_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_EXTRAS", {"ray": ("no_such_module",)})
    with pytest.raises(ValueError, match=r"^operations.task_runner: 'ray' needs the extra: pip install .*\[ray\]'$"):
        check_engine(OperationsConfig(task_runner="ray"))


def test_an_address_is_for_dask_and_ray() -> None:
    with pytest.raises(ValueError, match=r"^operations.task_runner_address: 'tcp://there:1' is of no use"):
        check_engine(OperationsConfig(task_runner="threads", task_runner_address="tcp://there:1"))


@pytest.mark.parametrize("api", [None, "http://127.0.0.1:4200/api"])
def test_tasks_on_other_machines_need_an_api_that_they_reach(api: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    there = OperationsConfig(task_runner="dask", task_runner_address="tcp://198.51.100.7:8786")  # nobody's, by RFC 5737
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    if api is not None:
        monkeypatch.setenv("PREFECT_API_URL", api)
    with pytest.raises(ValueError, match=r"^PREFECT_API_URL: .*'tcp://198.51.100.7:8786'"):
        check_engine(there)
    check_engine(there.model_copy(update={"task_runner_address": "tcp://127.0.0.1:8786"}))
    monkeypatch.setenv("PREFECT_API_URL", "http://203.0.113.7:4200/api")
    check_engine(there)


def test_a_worker_without_the_api_is_the_worlds_fault() -> None:
    from prefect.futures import PrefectFuture

    class Alone:
        def result(self) -> int:
            raise RuntimeError("Failed to reach API at http://127.0.0.1:9/api/")

    job = ShardJob(store_uri="", parent_prefix="", digest="", session="s")
    mapping = shard_tasks._Mapping(engines.Engine(cast(Any, None), ()), job, 1)
    with pytest.raises(TransientError, match="PREFECT_API_URL"):
        mapping._settle(cast("PrefectFuture[int]", Alone()))


def test_a_scheduler_that_does_not_answer_is_the_worlds_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_CONNECT_S", 1)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # it does not listen
        address = f"tcp://127.0.0.1:{closed.getsockname()[1]}"
        config = OperationsConfig(task_runner="dask", task_runner_address=address)
        match = r"^operations.task_runner_address: no Dask scheduler"
        with pytest.raises(TransientError, match=match) as told, running_engine(config, 1):
            pass
    assert address in str(told.value)
    assert "\n" not in str(told.value)


# ---------------------------------------------------------------------------------------------------------------- tasks


class _FewShards:
    """Of a download, as far as the parent asks."""

    name, digest, num_shards = "download", "d" * 64, 6


@pytest.fixture
def mapped(
    prefect_api: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[Callable[[int], int]], None]:
    """Maps one part a shard on two threads; each calls a function with its shard's number instead of making it."""
    from prefect import flow

    config = small_config(8763, **{"operations.task_runner": "threads", "operations.max_tasks": 2})
    monkeypatch.setattr(shard_tasks, "shards", shard_tasks.shards.with_options(retry_delay_seconds=0))

    def run(make: Callable[[int], int]) -> None:
        def make_shards(job: ShardJob, indices: Sequence[int]) -> int:
            assert job.stage == "download"
            return make(*indices)

        monkeypatch.setattr(shard_tasks, "make_shards", make_shards)
        stage = cast(Stage, _FewShards())

        @flow
        def mapping() -> None:
            shard_tasks.map_shards(config, str(tmp_path), "datasets/select/0", stage, lambda _: None)

        mapping()

    return run


def test_a_part_is_tried_again_alone(mapped: Callable[[Callable[[int], int]], None]) -> None:
    tried: list[int] = []

    def make(index: int) -> int:
        tried.append(index)
        if index == 3 and tried.count(3) < 3:
            raise TransientError("away")
        return 1

    mapped(make)
    assert sorted(tried) == [0, 1, 2, 3, 3, 3, 4, 5]


def test_what_may_pass_is_raised_once_the_others_are_made(mapped: Callable[[Callable[[int], int]], None]) -> None:
    made: set[int] = set()

    def make(index: int) -> int:
        if index == 0:
            raise TransientError("the server is away")
        made.add(index)
        return 1

    with pytest.raises(TransientError, match="the server is away"):
        mapped(make)
    assert made == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    "error", [GateError("too few", {"rate": 0.1}), ContractError("two sides"), RuntimeError("bug")]
)
def test_what_does_not_pass_ends_the_stage_at_once(
    mapped: Callable[[Callable[[int], int]], None], error: Exception
) -> None:
    tried: list[int] = []
    is_raised = threading.Event()

    def make(index: int) -> int:
        tried.append(index)
        if index == 0:
            is_raised.set()
            raise error
        assert is_raised.wait(60)
        time.sleep(0.3)  # longer than it takes to hear of the other
        return 1

    with pytest.raises(type(error), match=str(error)) as told:
        mapped(make)
    assert getattr(told.value, "details", None) == getattr(error, "details", None)
    assert len(tried) < 6


def test_a_lost_task_is_the_worlds_fault(mapped: Callable[[Callable[[int], int]], None]) -> None:
    from prefect.futures import PrefectFuture

    class Lost:
        def result(self) -> int:
            raise BrokenExecutor("a process ended abruptly")

    engine = engines.Engine(cast(Any, None), (BrokenExecutor,))
    job = ShardJob(store_uri="", parent_prefix="", digest="", session="s")
    passing = shard_tasks._Mapping(engine, job, 1)._settle(cast("PrefectFuture[int]", Lost()))
    assert "lost a task" in str(passing[0])


def test_a_stage_ends_between_shards_once_nobody_waits() -> None:
    closed = threading.Event()

    class Endless:
        name = "download"

        def outputs(self, indices: Sequence[int], scratch: Path) -> Iterator[int]:
            try:
                yield from indices
            finally:
                closed.set()

    outputs = shard_tasks._Endable(cast(Stage, Endless()), "over").outputs(range(9), Path())
    assert [next(outputs), next(outputs)] == [0, 1]
    shard_tasks._ended.add("over")
    with pytest.raises(NotWantedError):
        next(outputs)
    assert closed.is_set()


# ---------------------------------------------------------------------------------------------------------- real stages


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def reference(port: int, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Manifest]]:
    """The store of one process, and its datasets."""
    root = tmp_path_factory.mktemp("reference")
    return root, make_in_one_process(small_config(port), root)


def _run(config: PipelineConfig, root: Path, selected: Manifest) -> dict[str, Manifest]:
    from prefect import flow

    @flow
    def download_and_encode() -> list[str]:
        downloaded = tasks.download(config, str(root), dataset_prefix("select", selected.digest))
        return [downloaded.prefix, tasks.encode(config, str(root), downloaded.prefix).prefix]

    store = open_store(str(root))
    made = [load_manifest(store, prefix) for prefix in download_and_encode()]
    return {manifest.stage: manifest for manifest in made}


def _assert_same(made: dict[str, Manifest], wanted: dict[str, Manifest]) -> None:
    for name, manifest in made.items():
        assert manifest.digest == wanted[name].digest
        assert shard_files(manifest) == shard_files(wanted[name])


@pytest.mark.usefixtures("prefect_api")
def test_threads_make_what_one_process_makes(
    reference: tuple[Path, dict[str, Manifest]], port: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, wanted = reference
    shutil.copytree(before / "datasets" / "select", tmp_path / "datasets" / "select")
    config = small_config(port, **{"operations.task_runner": "threads", "operations.max_tasks": 2})
    with caplog.at_level(logging.WARNING):
        made = _run(config, tmp_path, wanted["select"])
    _assert_same(made, wanted)
    assert shard_tasks._loaded._found is None  # the models are not kept for the training's time


@pytest.mark.soak
@pytest.mark.usefixtures("prefect_api")
def test_processes_make_what_is_left(reference: tuple[Path, dict[str, Manifest]], port: int, tmp_path: Path) -> None:
    before, wanted = reference
    shutil.copytree(before / "datasets", tmp_path / "datasets")
    left = dataset_prefix("encode", wanted["encode"].digest)
    num_shards = len(wanted["encode"].shards)
    (tmp_path / left / "MANIFEST.json").unlink()
    stood = tmp_path / left / "reports" / "shard-00000.json"
    for index in range(1, num_shards):
        (tmp_path / left / "reports" / f"shard-{index:05d}.json").unlink()
    written = stood.stat().st_mtime_ns
    told: list[Progress] = []
    config = small_config(
        port,
        **{"operations.task_runner": "processes", "operations.max_tasks": 2, "operations.stall_timeout_s": 0.4},
    )
    beats: list[int] = []
    store = open_store(str(tmp_path))
    parent = dataset_prefix("download", wanted["download"].digest)

    from flows.plan import data_stage

    stage = data_stage("encode", config, store, wanted["download"])
    with pulse.listening(lambda: beats.append(1)):
        shard_tasks.map_shards(config, str(tmp_path), parent, stage, told.append)
    assert beats  # of other processes
    assert not list(store.list(f"{left}/signs/"))
    made = find_manifest(store, left)
    assert made is not None
    _assert_same({"encode": made}, wanted)
    assert stood.stat().st_mtime_ns == written  # what stood was not made again
    assert [at.num_done for at in told] == list(range(1, num_shards + 1))  # and is counted
    assert sum(at.report.num_out for at in told if at.report) == sum(s.num_out for s in made.shards[1:])


def test_a_task_elsewhere_leaves_signs_seldom_and_each_is_one_beat(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    job = ShardJob(store_uri=str(tmp_path), parent_prefix="", digest="d" * 64, session="s", sign_every_s=0.3)
    signs = shard_tasks._Signs(store, job)
    heard: list[int] = []

    def look() -> int:
        heard.clear()
        signs._next_s = 0.0
        with pulse.listening(lambda: heard.append(1)):
            signs.look()
        return len(heard)

    assert look() == 0
    with shard_tasks._signing(store, job, "part-00003"):
        assert look() == 0  # begun is not got on
        for _ in range(100):
            pulse.beat()
        (first,) = store.list(job.signs_prefix)
        assert look() == 1
        assert look() == 0
        time.sleep(0.35)
        pulse.beat()
        (second,) = store.list(job.signs_prefix)
        assert (first.key, first.etag != second.etag) == (second.key, True)
        assert look() == 1
    signs.delete()
    assert not list(store.list())


def test_other_code_is_refused(reference: tuple[Path, dict[str, Manifest]], port: int) -> None:
    root, wanted = reference
    job = ShardJob(
        store_uri=str(root),
        parent_prefix=dataset_prefix("select", wanted["select"].digest),
        digest="0" * 64,
        session="other",
        download=small_config(port).download,
    )
    with pytest.raises(ContractError, match=rf"worker's code .* would make dataset {wanted['download'].digest[:16]}"):
        shard_tasks.make_shards(job, [0])


def test_tasks_of_a_process_share_what_is_loaded_but_not_what_a_stage_notes(
    reference: tuple[Path, dict[str, Manifest]], port: int
) -> None:
    root, wanted = reference
    job = ShardJob(
        store_uri=str(root),
        parent_prefix=dataset_prefix("select", wanted["select"].digest),
        digest=wanted["download"].digest,
        session="one",
        download=small_config(port).download,
    )
    stages = [cast(DownloadStage, shard_tasks._loaded.get(job)[1]) for _ in range(2)]
    assert stages[0] is not stages[1]
    assert stages[0]._ledger is stages[1]._ledger
    shard_tasks._loaded.forget("one")
