"""Download and encode over a local Dask cluster of two worker processes: the same files as in one process."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows.engines import is_still_wanted
from infra.processes import GuardedProcess
from infra.storage import open_store
from preprocessing.contracts.manifest import Manifest, find_manifest
from tests.flows.in_one_process import SMALL, make_in_one_process, shard_files, small_config
from tests.integration.conftest import free_port

ROOM = Path(__file__).resolve().parents[2]
_START_S = 120.0


class Cluster:
    """A scheduler and workers, each a process; what ``dask scheduler`` and ``dask worker`` start, on loopback."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.workers: list[GuardedProcess] = []
        self.address = f"tcp://127.0.0.1:{free_port()}"
        port = self.address.rpartition(":")[2]
        self._scheduler = self._start(
            "scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard", says="Scheduler at:"
        )

    def add_worker(self) -> GuardedProcess:
        """Starts a worker of one thread, which nobody starts again."""
        worker = self._start(
            "worker", self.address, "--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory",
            str(self._folder), says="Registered to:",
        )  # fmt: skip
        self.workers.append(worker)
        return worker

    def close(self) -> None:
        for process in (*self.workers, self._scheduler):
            process.terminate()
            process.close()

    def _start(self, what: str, *arguments: str, says: str) -> GuardedProcess:
        env = os.environ | {"PYTHONPATH": str(ROOM), "OMP_NUM_THREADS": "1"}
        said: list[str] = []
        process = GuardedProcess(
            [sys.executable, "-P", "-m", f"distributed.cli.dask_{what}", *arguments],
            env=env,
            cwd=self._folder,  # what it needs of the code it imports, from wherever that is installed
            log_path=self._folder / f"{what}-{len(self.workers)}.log",
            on_line=said.append,
        ).start()
        wait_until(lambda: any(says in line for line in said) or process.poll() is not None)
        assert process.poll() is None, process.last_lines()
        return process


def wait_until(is_so: Callable[[], bool], timeout_s: float = _START_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    found = Cluster(tmp_path)
    try:
        for _ in range(2):
            found.add_worker()
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def wanted(port: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """What one process makes."""
    return make_in_one_process(small_config(port), tmp_path_factory.mktemp("one"))


def _prepare(folder: Path, port: int, address: str) -> subprocess.Popen[str]:
    """`lacuna prepare` over the cluster."""
    settings = {
        **SMALL,
        "source.demo.port": port,
        "operations.task_runner": "dask",
        "operations.task_runner_address": address,
        "operations.max_tasks": 2,
    }
    flags = [flag for key, value in settings.items() for flag in ("--set", f"{key}={json.dumps(value)}")]
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "prepare", "--recipe", "demo", "--root", str(folder / "store"), *flags],
        env=os.environ | {"PREFECT_HOME": str(folder / "prefect"), "PYTHONPATH": str(ROOM)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _end(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said[-4000:]
    return said


def _assert_same(folder: Path, wanted: dict[str, Manifest]) -> None:
    store = open_store(str(folder / "store"))
    for name, manifest in wanted.items():
        found = find_manifest(store, f"datasets/{name}/{manifest.digest[:16]}")
        assert found is not None, name
        assert found.digest == manifest.digest
        assert shard_files(found) == shard_files(manifest)


def test_two_workers_make_what_one_process_makes(
    cluster: Cluster, wanted: dict[str, Manifest], port: int, tmp_path: Path
) -> None:
    _end(_prepare(tmp_path, port, cluster.address))
    _assert_same(tmp_path, wanted)


@pytest.mark.soak
@pytest.mark.parametrize("stage", ["download", "encode"])
def test_a_worker_that_is_killed_changes_nothing_but_the_time(
    cluster: Cluster, wanted: dict[str, Manifest], port: int, tmp_path: Path, stage: str
) -> None:
    process = _prepare(tmp_path, port, cluster.address)
    try:
        reports = tmp_path / "store" / "datasets" / stage
        wait_until(lambda: any(reports.glob("*/reports/*.json")) or process.poll() is not None, 300)
        os.kill(cluster.workers[0].pid, signal.SIGKILL)
        made = len(list(reports.glob("*/reports/*.json")))
        _end(process)
    finally:
        process.kill()
    assert made < len(wanted[stage].shards), "it was killed in the middle"
    assert cluster.workers[0].wait(10) == -signal.SIGKILL
    _assert_same(tmp_path, wanted)


def _until_unwanted(begun: str, ended: str) -> None:
    Path(begun).touch()
    deadline = time.monotonic() + 60
    while is_still_wanted() and time.monotonic() < deadline:
        time.sleep(0.05)
    Path(ended).write_text("unwanted" if time.monotonic() < deadline else "wanted")


@pytest.mark.parametrize("how", ["cancelled", "left"])
def test_a_running_task_learns_that_nobody_waits_for_it(cluster: Cluster, how: str) -> None:
    from distributed import Client

    with tempfile.TemporaryDirectory() as folder:
        begun, ended = Path(folder) / "begun", Path(folder) / "ended"
        with Client(cluster.address, set_as_default=False) as client:
            future = client.submit(_until_unwanted, str(begun), str(ended), pure=False)
            wait_until(begun.exists)
            if how == "cancelled":
                future.cancel()
        wait_until(lambda: ended.exists() and bool(ended.read_text()))
        assert ended.read_text() == "unwanted"
