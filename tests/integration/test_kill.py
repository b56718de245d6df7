"""kill -9 of the whole process group at random moments, each followed by the same command."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import Lacuna, shard_hashes

NUM_KILLS = 10


def _run_killed(lacuna: Lacuna, root: Path, after_s: float) -> bool:
    """Starts the command in a group of its own and kills the group after a while; whether it was still running."""
    child = subprocess.Popen(
        lacuna.argv("run", str(root)),
        env=lacuna.environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        child.wait(after_s)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        return True
    return False


def _campaign(demo: dict[str, Any], demo_root: Path, lacuna: Lacuna, root: Path, num_kills: int, seed: int) -> int:
    draws = random.Random(seed)
    parts = [*demo["stages"].values(), demo["train"], demo["validation"]]
    longest_s = 10 + sum(part["seconds"] for part in parts)
    killed = 0
    for _ in range(num_kills):
        killed += _run_killed(lacuna, root, draws.uniform(8, longest_s))
    result = lacuna.run("run", str(root))
    own = {Path(uri).parent.name for uri in demo["datasets"].values()}  # other tests add to that store
    expected = {name: files for name, files in shard_hashes(demo_root).items() if name.partition("/")[2][:16] in own}
    assert len(expected) == len(own) == 3
    assert shard_hashes(root) == expected
    assert result["run_id"] == demo["run_id"]
    assert result["channel"]
    return killed


@pytest.mark.timeout(900)
def test_killed_and_started_again_is_the_uninterrupted_run(
    demo: dict[str, Any], demo_root: Path, lacuna: Lacuna, tmp_path: Path
):
    assert _campaign(demo, demo_root, lacuna, tmp_path / "store", num_kills=1, seed=1) == 1


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_kills(demo: dict[str, Any], demo_root: Path, lacuna: Lacuna, tmp_path: Path, record_property: Any):
    killed = _campaign(demo, demo_root, lacuna, tmp_path / "store", NUM_KILLS, seed=int(time.time()))
    record_property("killed_while_running", killed)
    assert killed >= NUM_KILLS // 2
