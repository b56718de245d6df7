"""A run on two machines that have nothing but an object store in common; and what happens when one of them dies."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from infra.errors import EXIT_BAD_INPUT, EXIT_OUTSIDE_WORLD, ContractError
from infra.s3_server import S3Server
from infra.storage import ObjectStore, open_store
from tests.infra.s3_fault_proxy import FaultPlan, running_proxy
from tests.training.ends import clear, hex_losses, state_sha256
from tests.training.forked_ranks import Node, Ranks, Started
from tests.training.machines import Machines, two_machines
from training import main, peers
from training.engine import init_distributed
from training.peers import Peers
from training.runspec import RunSpec
from training.world import World

MakeRun = Callable[..., RunSpec]
MAX_S = 60.0


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as ranks:
        yield ranks


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with two_machines() as machines:
        yield machines


@pytest.fixture
def store(s3_root: str) -> ObjectStore:
    return open_store(s3_root)


@pytest.fixture
def s3_environment(machines: Machines, s3_server: S3Server) -> Iterator[dict[str, str]]:
    """How both machines reach the store, and nothing else of the host."""
    with running_proxy(s3_server.endpoint_url, FaultPlan(None), machines.host_address) as proxy:
        yield {**s3_server.environment, "AWS_ENDPOINT_URL": proxy.endpoint_url}


def _nodes(machines: Machines, folder: Path, slots: int, environment: dict[str, str]) -> list[Node]:
    return [
        machine.node(slots, folder / name, **environment)
        for name, machine in (("first", machines.first), ("second", machines.second))
    ]


def _spec(run: RunSpec) -> Any:
    return run.model_dump(mode="json")


def _wait_for(started: Started, kind: str, count: int = 1) -> None:
    deadline = time.monotonic() + 300
    while sum(event["event"] == kind for event in started.events()) < count:
        assert time.monotonic() < deadline, started.log()
        assert not any(event["event"] == "error" for event in started.events()), started.log()
        time.sleep(0.05)


@pytest.mark.soak  # two minutes; `test_a_pulled_cable_ends_both_sides` has two machines, too
def test_a_machine_dies_and_the_run_goes_on_to_the_same_end(
    make_run: MakeRun,
    store: ObjectStore,
    tmp_path: Path,
    ranks: Ranks,
    machines: Machines,
    s3_environment: dict[str, str],
    s3_server: S3Server,
):
    run = make_run(num_steps=12, checkpoint_every_steps=2, micro_batch_size=2, num_processes=4, zero_stage=2)
    # Alone, on one machine.
    started = ranks.start(_spec(run), tmp_path / "alone", 4, environment=s3_server.environment)
    assert ranks.wait(started) == [0] * 4, started.log()
    expected = (state_sha256(store, run, 12), hex_losses(store, run))
    clear(store, run)

    first, second = ranks.start_nodes(_spec(run), _nodes(machines, tmp_path / "killed", 2, s3_environment))
    _wait_for(first, "checkpoint")
    began = time.monotonic()
    second.kill()
    codes = ranks.wait(first)
    took_s = time.monotonic() - began
    assert ranks.wait(second) == [-signal.SIGKILL] * 2
    assert codes == [EXIT_OUTSIDE_WORLD] * 2, first.log()
    assert took_s < MAX_S
    error = first.events()[-1]
    assert error["type"] == "TransientError"
    assert "rank 2 on" in error["message"] or "rank 3 on" in error["message"]
    assert "goes on from the last checkpoint" in error["message"]

    # On the same machines, of which one has lost its disk.
    nodes = _nodes(machines, tmp_path / "again", 2, s3_environment)
    first, second = ranks.start_nodes(_spec(run), nodes)
    assert ranks.wait(first) + ranks.wait(second) == [0] * 4, first.log() + second.log()
    resumed = next(event for event in first.events() if event["event"] == "resumed")
    assert 0 < resumed["step"] < 12
    assert (state_sha256(store, run, 12), hex_losses(store, run)) == expected
    assert not (nodes[1].workdir / "scratch" / "resume").exists()
    print(f"\na machine died ({'namespaces' if machines.are_apart else 'addresses'}): ended in {took_s:.1f} s")  # noqa: T201


def one_refuses(spec: dict[str, Any], workdir: Path) -> None:
    """Two processes that meet; then one of them has a problem, and the other one waits for it."""
    world = World(int(os.environ["RANK"]), 0, 2, torch.device("cpu"))
    with Peers(world):
        init_distributed(world, 600)
        if world.rank == 1:
            raise ContractError("this machine has another dataset")
        dist.barrier()


def test_why_a_process_ended_is_known_on_the_other_machine(
    tmp_path: Path, ranks: Ranks, machines: Machines, s3_environment: dict[str, str]
):
    nodes = _nodes(machines, tmp_path, 1, s3_environment)
    first, second = ranks.start_nodes({}, nodes, "tests.training.test_nodes:one_refuses")
    assert ranks.wait(first) == [EXIT_OUTSIDE_WORLD], first.log()
    assert ranks.wait(second) == [EXIT_BAD_INPUT], second.log()
    message = first.events()[-1]["message"]
    assert "rank 1 on" in message
    assert "ended: ContractError: this machine has another dataset" in message


def impatient(spec: dict[str, Any], workdir: Path) -> dict[str, Any] | None:
    """`training.main`, for a test that cannot wait so long."""
    peers.SILENCE_S, peers._GRACE_S, peers._BEAT_S = 15.0, 3.0, 1.0  # pyright: ignore[reportAttributeAccessIssue]
    return main.main(spec, workdir)


@pytest.mark.parametrize(
    "program",
    ["tests.training.test_nodes:impatient", pytest.param("training.main:main", marks=pytest.mark.soak)],
)
def test_a_pulled_cable_ends_both_sides(
    make_run: MakeRun,
    tmp_path: Path,
    ranks: Ranks,
    machines: Machines,
    s3_environment: dict[str, str],
    program: str,
):
    """No connection is closed, nothing is refused: there is only silence."""
    if not machines.are_apart:
        pytest.skip("network namespaces are not allowed here")
    run = make_run(num_steps=10**5, checkpoint_every_steps=10**5, num_processes=2)
    first, second = ranks.start_nodes(_spec(run), _nodes(machines, tmp_path, 1, s3_environment), program)
    try:
        _wait_for(first, "step")
        with machines.second.cable_pulled():
            began = time.monotonic()
            assert ranks.wait(first) == [EXIT_OUTSIDE_WORLD], first.log()
            took_s = time.monotonic() - began
            assert ranks.wait(second) == [EXIT_OUTSIDE_WORLD], second.log()
        assert took_s < MAX_S
        assert "rank 1 on" in first.events()[-1]["message"]
        assert "has said nothing for" in first.events()[-1]["message"]
        assert "rank 0 on" in second.log()
    finally:
        for each in (first, second):
            each.kill()
