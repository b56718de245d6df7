"""The download dies everywhere, and is started again: what comes out is what an undisturbed run makes.

At each operation on the store, before it and after it; and by SIGKILLs at random moments, of the whole process group
or of any one process that the run has started. A trial is one fresh run that is disturbed, started again, and compared
with the undisturbed one, row by row. The long campaigns say how many trials there were, how many failed, and up to
which rate of failures that leaves open with 95 % confidence.
"""

import itertools
import math
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.storage_folder import FolderStore
from preprocessing.contracts.manifest import Manifest
from preprocessing.demo.server import running_server
from preprocessing.download.stage import DownloadStage
from tests.integration.download_world import (
    ACTIONS,
    CONFIG,
    DisturbedStore,
    Found,
    download,
    look_at,
    scratch_of,
    select_rows,
    start,
)

SHORT_STEP = 9
NUM_GROUP_KILLS = 300
NUM_SINGLE_KILLS = 100
_HANG_S = 60.0
_BUSY = float(os.environ.get("LACUNA_BUSY_FACTOR", "1"))  # a machine shared with others is no hang


@dataclass(frozen=True)
class World:
    """A server that runs, and what an undisturbed run makes of it."""

    folder: Path
    port: int
    digest: str
    whole: Found
    num_operations: int
    duration_s: float

    def fresh(self, name: str) -> tuple[Path, Manifest]:
        root = self.folder / name
        return root, select_rows(root, self.port)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("crash")
    with running_server() as port:
        root = folder / "whole"
        selected = select_rows(root, port)
        store = DisturbedStore(root)
        digest = download(store, selected).digest
        started = time.monotonic()
        other = folder / "second"
        finish(other, select_rows(other, port))
        duration_s = time.monotonic() - started
        whole = look_at(root, digest)
        assert look_at(other, digest) == whole
        yield World(folder, port, digest, whole, store.num_operations, duration_s)


def processes_of(root: Path) -> dict[int, int]:
    """Process → its parent, of what names a run's scratch folder in its arguments, and of what that has started."""
    parents, found = {}, set()
    for process in Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes()
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if str(scratch_of(root)).encode() in words:
            found.add(int(process.name))
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: parents[pid] for pid in found}


def wait_until_none_is_left(root: Path) -> None:
    deadline = time.monotonic() + _HANG_S * _BUSY
    while left := processes_of(root):
        assert time.monotonic() < deadline, f"{left} outlive their run"
        time.sleep(0.05)


def finish(root: Path, selected: Manifest) -> None:
    """Runs to the end, in at most a minute."""
    child = start(root, selected)
    try:
        _, said = child.communicate(timeout=_HANG_S * _BUSY)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        pytest.fail("hangs")
    assert child.returncode == 0, said[-2000:]


def die_and_go_on(world: World, action: str, operation: int) -> bool:
    root, selected = world.fresh(f"{action}-{operation}")
    child = start(root, selected, (action, operation))
    child.communicate(timeout=_HANG_S * _BUSY)
    assert child.returncode == -signal.SIGKILL
    wait_until_none_is_left(root)
    download(FolderStore(root), selected)
    assert look_at(root, world.digest) == world.whole
    shutil.rmtree(root)
    return True


# Whole: `make soak`. Here every ninth operation, in turn before and after it.
@pytest.mark.timeout(600)
def test_dying_at_some_operations(world: World) -> None:
    operations = range(2, world.num_operations + 1, SHORT_STEP)
    for number, operation in enumerate(operations):
        die_and_go_on(world, ACTIONS[number % 2], operation)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_dying_at_every_operation(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    campaign = Campaign()
    for operation in range(1, world.num_operations + 1):
        for action in ACTIONS:
            campaign.run(lambda action=action, operation=operation: die_and_go_on(world, action, operation))
    campaign.end(capsys, "deaths at an operation of the store")


class Campaign:
    """Trials of which none ends the others by failing."""

    def __init__(self) -> None:
        self.num_trials = 0
        self.failures: list[str] = []

    def run(self, trial: Callable[[], bool]) -> None:
        """Counts a trial, unless it says that nothing was disturbed."""
        try:
            self.num_trials += trial()
        except (AssertionError, pytest.fail.Exception) as error:
            self.num_trials += 1
            self.failures.append(str(error)[:2000])

    def end(self, capsys: pytest.CaptureFixture[str], what: str) -> None:
        """Says what came of it."""
        with capsys.disabled():
            print(  # noqa: T201 - the campaign's result
                f"\n{what}: {self.num_trials} trials, {len(self.failures)} failures, "
                f"95 % upper bound of the failure rate {upper_bound(self.num_trials, len(self.failures)):.4f}"
            )
        assert not self.failures, "\n\n".join(self.failures)


def upper_bound(num_trials: int, num_failures: int) -> float:
    """Clopper and Pearson's one-sided 95 % bound, by bisection; for no failure about 3 / n."""

    def at_most(rate: float) -> float:
        return sum(math.comb(num_trials, k) * rate**k * (1 - rate) ** (num_trials - k) for k in range(num_failures + 1))

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at_most(middle) > 0.05 else (low, middle)
    return high


def test_the_bound() -> None:
    assert upper_bound(300, 0) == pytest.approx(1 - 0.05 ** (1 / 300), abs=1e-9)
    assert upper_bound(100, 1) == pytest.approx(0.0466, abs=1e-4)  # tabulated
    assert upper_bound(10, 10) == pytest.approx(1.0)


def kill_a_group(world: World, number: int, draws: random.Random) -> bool:
    """Kills a run's group at a random moment, in every fourth trial the next run's, too. Whether one was hit."""
    root, selected = world.fresh(f"group-{number}-{draws.random()}")
    num_hit = 0
    for _ in range(1 if draws.random() < 0.75 else 2):
        child = start(root, selected)
        try:
            _, said = child.communicate(timeout=draws.uniform(0.2, 1.0) * world.duration_s)
            assert child.returncode == 0, said[-2000:]
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            num_hit += 1
            wait_until_none_is_left(root)
    finish(root, selected)
    assert look_at(root, world.digest) == world.whole
    shutil.rmtree(root)
    return num_hit > 0


def kill_one_child(world: World, number: int, draws: random.Random) -> bool:
    """Kills one of the processes that the run has started; the run, or the next, makes the same. Whether one was hit.

    A run whose helper was killed may end with exit code 4, the world's fault, and then the next run goes on.
    """
    root, selected = world.fresh(f"child-{number}-{draws.random()}")
    child = start(root, selected)
    while child.poll() is None and not processes_of(root):
        time.sleep(0.01)
    time.sleep(draws.uniform(0, 0.4) * world.duration_s)  # into the life of what it has started
    victims = sorted(processes_of(root))
    hit = bool(victims)
    if hit:
        try:
            os.kill(draws.choice(victims), signal.SIGKILL)
        except ProcessLookupError:
            hit = False
    try:
        _, said = child.communicate(timeout=_HANG_S * _BUSY)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        pytest.fail("hangs after one of its processes was killed")
    assert child.returncode in (0, 4), said[-2000:]
    wait_until_none_is_left(root)
    if child.returncode:
        finish(root, selected)
    assert look_at(root, world.digest) == world.whole
    shutil.rmtree(root)
    return hit


@pytest.mark.timeout(600)
def test_killed_groups_and_killed_children(world: World) -> None:
    draws = random.Random(1)
    assert any(kill_a_group(world, number, draws) for number in range(5))
    assert any(kill_one_child(world, number, draws) for number in range(5))


@pytest.mark.soak
@pytest.mark.timeout(6 * 3600)
def test_killed_groups(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("LACUNA_SEED", time.time()))
    num_kills = int(os.environ.get("LACUNA_GROUP_KILLS", NUM_GROUP_KILLS))
    draws, campaign = random.Random(seed), Campaign()
    for number in itertools.takewhile(lambda _: campaign.num_trials < num_kills, itertools.count()):
        campaign.run(lambda number=number: kill_a_group(world, number, draws))
    campaign.end(capsys, f"SIGKILLs of the process group (seed {seed})")


@pytest.mark.soak
@pytest.mark.timeout(6 * 3600)
def test_killed_children(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("LACUNA_SEED", time.time()))
    num_kills = int(os.environ.get("LACUNA_CHILD_KILLS", NUM_SINGLE_KILLS))
    draws, campaign = random.Random(seed), Campaign()
    for number in itertools.takewhile(lambda _: campaign.num_trials < num_kills, itertools.count()):
        campaign.run(lambda number=number: kill_one_child(world, number, draws))
    campaign.end(capsys, f"SIGKILLs of a single process (seed {seed})")


def test_two_runs_at_once_end_with_one_dataset(world: World) -> None:
    root, selected = world.fresh("twice")
    runs = [start(root, selected), start(root, selected)]
    said = [run.communicate(timeout=_HANG_S * _BUSY) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert look_at(root, world.digest) == world.whole
    again = DownloadStage(FolderStore(root), selected, CONFIG)
    assert again.digest == world.digest
