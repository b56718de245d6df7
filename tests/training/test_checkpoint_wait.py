"""Ranks that wait for an upload: longer than the process group has patience, but not for a rank that is dead."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.forked_ranks import Ranks, Started
from tests.training.wait_harness import TIMEOUT_S

MAIN = "tests.training.wait_harness:main"
PATIENCE_S = 120.0  # for a busy machine


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as ranks:
        yield ranks


def _start(ranks: Ranks, tmp_path: Path, upload_s: float) -> Started:
    return ranks.start({"store": str(tmp_path / "store"), "upload_s": upload_s}, tmp_path / "work", 2, MAIN)


def _is_heard(started: Started, event: str) -> bool:
    return any(found["event"] == event for found in started.events())


def test_an_upload_may_take_longer_than_any_collective(ranks: Ranks, tmp_path: Path):
    started = _start(ranks, tmp_path, 2 * TIMEOUT_S)
    assert ranks.wait(started) == [0, 0], started.log()
    assert started.events()[-1]["seconds"] > 1.5 * TIMEOUT_S
    assert _is_heard(started, "uploading")  # what the launcher hears


@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_that_is_dead_ends_the_wait(ranks: Ranks, tmp_path: Path, dead: int):
    started = _start(ranks, tmp_path, 5 * TIMEOUT_S)
    deadline = time.monotonic() + PATIENCE_S
    while not _is_heard(started, "uploading"):
        assert time.monotonic() < deadline, started.log()
        time.sleep(0.05)
    os.kill(started.pids[dead], signal.SIGKILL)
    codes = ranks.wait(started)
    assert codes[dead] == -signal.SIGKILL
    assert codes[1 - dead] not in (0, -signal.SIGKILL), started.log()
