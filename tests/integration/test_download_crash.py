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
from pathlib import Path

import pytest

from infra.storage_folder import FolderStore
from preprocessing.contracts.manifest import Manifest
from preprocessing.download.stage import DownloadStage
from tests.integration.download_world import (
    ACTIONS,
    CONFIG,
    HANG_S,
    World,
    download,
    look_at,
    processes_of,
    start,
    undisturbed,
    wait_until_none_is_left,
)

SHORT_STEP = 9


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with undisturbed(tmp_path_factory.mktemp("crash")) as found:
        yield found


@pytest.fixture(scope="module")
def duration_s(world: World) -> float:
    """What a run in a process takes that nothing disturbs; it makes the same as one in ours."""
    root, selected = world.fresh("second")
    started = time.monotonic()
    finish(root, selected)
    duration_s = time.monotonic() - started
    assert look_at(root, world.digest) == world.whole
    return duration_s


def finish(root: Path, selected: Manifest) -> None:
    """Runs to the end, in at most a minute."""
    child = start(root, selected)
    try:
        _, said = child.communicate(timeout=HANG_S)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        pytest.fail("hangs")
    assert child.returncode == 0, said[-2000:]


def die_and_go_on(world: World, action: str, operation: int) -> bool:
    root, selected = world.fresh(f"{action}-{operation}")
    child = start(root, selected, (action, operation))
    child.communicate(timeout=HANG_S)
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


def kill_a_group(world: World, duration_s: float, number: int, draws: random.Random) -> bool:
    """Kills a run's group at a random moment, in every fourth trial the next run's, too. Whether one was hit."""
    root, selected = world.fresh(f"group-{number}-{draws.random()}")
    num_hit = 0
    for _ in range(1 if draws.random() < 0.75 else 2):
        child = start(root, selected)
        try:
            _, said = child.communicate(timeout=draws.uniform(0.2, 1.0) * duration_s)
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


def kill_one_child(world: World, duration_s: float, number: int, draws: random.Random) -> bool:
    """Kills one of the processes that the run has started; the run, or the next, makes the same. Whether one was hit.

    A run whose helper was killed may end with exit code 4, the world's fault, and then the next run goes on.
    """
    root, selected = world.fresh(f"child-{number}-{draws.random()}")
    child = start(root, selected)
    while child.poll() is None and not processes_of(root):
        time.sleep(0.01)
    time.sleep(draws.uniform(0, 0.4) * duration_s)  # into the life of what it has started
    victims = sorted(processes_of(root))
    hit = bool(victims)
    if hit:
        try:
            os.kill(draws.choice(victims), signal.SIGKILL)
        except ProcessLookupError:
            hit = False
    try:
        _, said = child.communicate(timeout=HANG_S)
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


Kill = Callable[[World, float, int, random.Random], bool]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kill", [kill_a_group, kill_one_child])
def test_some_kills(world: World, duration_s: float, kill: Kill) -> None:
    draws = random.Random(1)
    assert any(kill(world, duration_s, number, draws) for number in range(5))


@pytest.mark.soak
@pytest.mark.timeout(6 * 3600)
@pytest.mark.parametrize(
    ("kill", "what", "variable", "num_kills"),
    [
        (kill_a_group, "the process group", "LACUNA_GROUP_KILLS", 300),
        (kill_one_child, "a single process", "LACUNA_CHILD_KILLS", 100),
    ],
    ids=["groups", "children"],
)
def test_many_kills(
    world: World,
    duration_s: float,
    capsys: pytest.CaptureFixture[str],
    kill: Kill,
    what: str,
    variable: str,
    num_kills: int,
) -> None:
    seed = int(os.environ.get("LACUNA_SEED", time.time()))
    num_kills = int(os.environ.get(variable, num_kills))
    draws, campaign = random.Random(seed), Campaign()
    for number in itertools.takewhile(lambda _: campaign.num_trials < num_kills, itertools.count()):
        campaign.run(lambda number=number: kill(world, duration_s, number, draws))
    campaign.end(capsys, f"SIGKILLs of {what} (seed {seed})")


def test_two_runs_at_once_end_with_one_dataset(world: World) -> None:
    root, selected = world.fresh("twice")
    runs = [start(root, selected), start(root, selected)]
    said = [run.communicate(timeout=HANG_S) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert look_at(root, world.digest) == world.whole
    again = DownloadStage(FolderStore(root), selected, CONFIG)
    assert again.digest == world.digest
