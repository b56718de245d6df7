"""Runs that are cancelled, killed, deserted and doubled under a real Prefect server and a real process worker.

Each time: nothing that the run started is left and nothing is written any more, a rerun completes, and what stands in
the end is what an undisturbed run makes. ``LACUNA_ROUNDS`` says how often (`make soak`; 1 as it comes); each round
prints what was done and how long it took to be noticed.
"""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infra.processes import GuardedProcess
from tests.integration.conftest import SMALL, free_port, shard_hashes, snapshot
from tests.integration.prefect_world import (
    PrefectServer,
    await_true,
    deploy_all,
    kill_worker,
    start_server,
    start_worker,
    started_by,
)

ROUNDS = int(os.environ.get("LACUNA_ROUNDS", "1"))
QUIET_S = 4.0
GONE_S = 45.0
RUN_S = 400.0
SETTINGS = {
    **SMALL,
    "source.demo.num_pictures": 160,
    "train.num_steps": 60,
    "train.checkpoint_every_steps": 10,
    "validation.num_samples": 2,
    "validation.num_object_samples": 2,
    "validation.num_inference_steps": 2,
}


@dataclass
class World:
    """A server, and a store in which a run of the demo stands that nothing disturbed."""

    server: PrefectServer
    folder: Path
    port: int

    @property
    def expected(self) -> Path:
        return self.folder / "expected"

    def parameters(self, root: Path, **settings: Any) -> dict[str, Any]:
        config: dict[str, Any] = {"recipe": "demo"}
        for key, value in {**SETTINGS, "source.demo.port": self.port, **settings}.items():
            at = config
            *sections, name = key.split(".")
            for section in sections:
                at = at.setdefault(section, {})
            at[name] = value
        return {"config": config, "root": str(root)}

    def start(self, root: Path, deployment: str = "pipeline", **settings: Any) -> str:
        return self.server.create_run(deployment, self.parameters(root, **settings))

    def complete(self, root: Path, deployment: str = "pipeline") -> str:
        """Runs to the end, as somebody does who says it again after whatever happened."""
        run = self.start(root, deployment)
        state = self.server.wait_for_end(run, RUN_S)
        assert state["type"] == "COMPLETED", state["message"]
        return run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("prefect")
    with start_server(folder, settings={"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}) as server:
        deploy_all(server)
        yield World(server, folder, free_port())


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Path:
    """The store of a run that nothing happened to."""
    with start_worker(world.server):
        world.complete(world.expected)
    return world.expected


# ------------------------------------------------------------------------------------------------------------ watching


def flow_process_of(worker: GuardedProcess) -> int:
    """The process that a worker has started for its run."""
    return next(pid for pid, command in started_by(worker).items() if command.endswith("-m prefect.engine"))


def await_command(worker: GuardedProcess, module: str) -> None:
    """Waits until something below a worker runs a module."""
    await_true(lambda: any(f"-m {module}" in command for command in started_by(worker).values()), module, RUN_S)


def await_download(worker: GuardedProcess) -> None:
    """Waits until pictures are being asked for."""
    await_command(worker, "preprocessing.download.engine")


def await_steps(worker: GuardedProcess, root: Path) -> None:
    """Waits until a training has a checkpoint, and trains on."""
    await_command(worker, "training.main")
    await_true(lambda: any(root.glob("runs/*/checkpoints/step-*/MANIFEST.json")), "a checkpoint", RUN_S)
    await_command(worker, "training.main")


def await_somewhere(worker: GuardedProcess, root: Path) -> None:
    """Waits until pictures are asked for, or until a training trains: by chance."""
    if random.random() < 0.5:
        await_download(worker)
    else:
        await_steps(worker, root)


def await_nothing_left(worker: GuardedProcess, root: Path) -> float:
    """Waits until nothing runs that a worker has started, and sees that the store stays as it is; returns the wait."""
    took_s = await_true(lambda: not started_by(worker), "the end of all that the worker started", GONE_S)
    before = snapshot(root)
    time.sleep(QUIET_S)
    assert snapshot(root) == before
    assert not started_by(worker)
    return took_s


def run_files(root: Path) -> dict[str, str]:
    """Name → sha256 of the files of the last checkpoint and of the export, by their manifests."""
    found = {}
    for manifest in [
        *sorted(root.glob("runs/*/checkpoints/*/MANIFEST.json"))[-1:],
        *root.glob("exports/*/*/MANIFEST.json"),
    ]:
        key = str(manifest.parent.relative_to(root))
        found |= {f"{key}/{file['name']}": file["sha256"] for file in json.loads(manifest.read_text())["files"]}
    return {name: sha256 for name, sha256 in found.items() if name.endswith((".safetensors", ".bin"))}


def assert_as_undisturbed(root: Path, expected: Path) -> None:
    assert shard_hashes(root) == shard_hashes(expected)
    assert run_files(root) == run_files(expected) != {}


# ------------------------------------------------------------------------------------------------------- disturbances


def cancel_in_mid_download(world: World, root: Path, worker: GuardedProcess) -> str:
    run = world.start(root)
    await_download(worker)
    return _cancel(world, root, worker, run)


def cancel_in_mid_train(world: World, root: Path, worker: GuardedProcess) -> str:
    run = world.start(root)
    await_steps(worker, root)
    newest = max(root.glob("runs/*/checkpoints/step-*")).name
    told = _cancel(world, root, worker, run)
    saved = max(path.parent for path in root.glob("runs/*/checkpoints/step-*/MANIFEST.json")).name
    assert saved >= newest
    return f"{told}; training at {newest} left {saved}"


def _cancel(world: World, root: Path, worker: GuardedProcess, run: str) -> str:
    world.server.cancel(run)
    began = time.monotonic()
    state = world.server.wait_for_end(run, 60)
    ended_s = time.monotonic() - began
    assert state["type"] == "CANCELLED", state
    await_nothing_left(worker, root)
    return f"Cancelled after {ended_s:.1f} s"


def kill_the_worker(world: World, root: Path, worker: GuardedProcess) -> str:
    run = world.start(root)
    await_somewhere(worker, root)
    kill_worker(world.server, worker)
    gone_s = await_nothing_left(worker, root)
    state = world.server.wait_for_end(run, 30)
    assert state["type"] == "CRASHED", state
    return f"nothing left after {gone_s:.1f} s, Crashed"


def kill_the_flow(world: World, root: Path, worker: GuardedProcess) -> str:
    run = world.start(root)
    await_somewhere(worker, root)
    os.kill(flow_process_of(worker), signal.SIGKILL)
    gone_s = await_nothing_left(worker, root)
    began = time.monotonic()
    state = world.server.wait_for_end(run, 60)
    assert state["type"] == "CRASHED", state
    return f"nothing left after {gone_s:.1f} s, Crashed {gone_s + QUIET_S + time.monotonic() - began:.1f} s after"


def restart_the_server(world: World, root: Path, worker: GuardedProcess) -> str:
    run = world.start(root)
    await_somewhere(worker, root)
    world.server.restart()
    state = world.server.wait_for_end(run, RUN_S)
    assert state["type"] == "COMPLETED", state
    return "Completed all the same"


def two_at_once(world: World, root: Path, worker: GuardedProcess) -> str:
    ident = world.server.deployment_id("pipeline")
    world.server.patch(f"/deployments/{ident}", {"concurrency_limit": None})
    runs = [world.start(root), world.start(root)]
    states = [world.server.wait_for_end(run, 2 * RUN_S) for run in runs]
    assert [state["type"] for state in states] == ["COMPLETED", "COMPLETED"], states
    return "both Completed"


# --------------------------------------------------------------------------------------------------------------- tests


Disturbance = Callable[[World, Path, GuardedProcess], str]


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    "disturb",
    [cancel_in_mid_download, cancel_in_mid_train, kill_the_worker, kill_the_flow, restart_the_server, two_at_once],
)
def test_a_rerun_ends_as_if_nothing_had_happened(
    disturb: Disturbance, world: World, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(1, ROUNDS + 1):
        root = tmp_path / f"store-{number}"
        with start_worker(world.server) as worker:
            told = disturb(world, root, worker)
        began = time.monotonic()
        with start_worker(world.server):
            world.complete(root)
        assert_as_undisturbed(root, undisturbed)
        with capsys.disabled():
            print(f"\n{disturb.__name__} {number}/{ROUNDS}: {told}; the rerun took {time.monotonic() - began:.0f} s")  # noqa: T201 - it is what the campaign is for
        shutil.rmtree(root)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_a_run_whose_machine_dies_is_crashed_within_two_minutes(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world.server.lacuna("operate", "install-automations", "--heartbeat-s", "30")
    again = json.loads(world.server.lacuna("operate", "install-automations", "--heartbeat-s", "30", "--json"))
    assert set(again["automations"].values()) == {"left as it was"}
    root = tmp_path / "store"
    with start_worker(world.server) as worker:
        run = world.start(root, "pipeline", **{"train.num_steps": 100_000})
        await_steps(worker, root)
        flow = flow_process_of(worker)
        kill_worker(world.server, worker)
        os.kill(flow, signal.SIGKILL)
        took_s = await_true(lambda: world.server.state(run).get("type") == "CRASHED", "Crashed", 120)
    assert "No heartbeat" in world.server.state(run)["message"]
    with capsys.disabled():
        print(f"\na dead machine's run was Crashed after {took_s:.0f} s")  # noqa: T201 - it is what the campaign is for
