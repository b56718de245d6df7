"""How much of the time a training trains where the whole job is killed every few minutes, and started again.

The job is what a cluster starts: `training.launch.train` on the run that ``lacuna plan --write-run`` writes. The killer
spares nobody: SIGKILL to the job's process group. Counted is the time in which steps were taken that nobody had to take
again; starting, resuming and steps that were lost are not.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.integration.conftest import Lacuna

ROOT = Path(__file__).parents[2]
JOB = """
import json, sys
from pathlib import Path
from training.launch import train
from training.runspec import RunSpec

if __name__ == "__main__":
    run = RunSpec.model_validate_json(Path(sys.argv[1]).read_text())
    train(run, workdir=Path(sys.argv[2]), on_event=lambda event: print(json.dumps(event), flush=True))
"""


def _number(name: str, default: float) -> float:
    return float(os.environ.get(f"LACUNA_GOODPUT_{name}", default))


@dataclass
class Life:
    """One start of the job, to its end by a signal.

    Attributes:
        job: The process; the first of its group.
        first: The step that it went on from.
        steps: When each step was told of, and its number.
        saved: The last step of which it committed a checkpoint.
    """

    job: subprocess.Popen[str]
    first: int = 0
    steps: list[tuple[float, int]] = field(default_factory=list)
    saved: int = 0

    def listen(self) -> None:
        assert self.job.stdout is not None
        for line in self.job.stdout:
            event = json.loads(line)
            if event["event"] == "step":
                self.steps.append((time.monotonic(), event["step"]))
            elif event["event"] == "resumed":
                self.first = event["step"]
            elif event["event"] == "checkpoint":
                self.saved = event["step"]

    def kill(self, number: signal.Signals) -> None:
        os.killpg(self.job.pid, number)
        self.job.wait()

    def kept_s(self, until: int) -> float:
        """How long it took the steps, up to one, that nobody had to take again."""
        kept = [at for at, step in self.steps if step <= until]
        return kept[-1] - kept[0] if kept else 0.0


def _start(folder: Path) -> tuple[Life, threading.Thread]:
    life = Life(
        subprocess.Popen(
            [sys.executable, "-P", str(folder / "job.py"), str(folder / "run.json"), str(folder / "work")],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
    )
    listener = threading.Thread(target=life.listen)
    listener.start()
    return life, listener


def _prepare(lacuna: Lacuna, folder: Path) -> None:
    """The demo's dataset, and a run on it that does not end by itself."""
    settings = {
        "train.num_steps": 10**6,
        "train.checkpoint_every_steps": int(_number("CHECKPOINT_STEPS", 25)),  # by Young's formula, for this killer
    }
    small = bool(int(_number("SMALL", 0)))
    for verb, extra in (("prepare", []), ("plan", ["--write-run", str(folder / "run.json")])):
        argv = lacuna.argv(verb, str(folder / "store"), **settings)
        if not small:  # the recipe as it is
            flags = [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]
            argv = [*argv[: argv.index("--set")], *flags]
        done = subprocess.run(
            [*argv, *extra], env=lacuna.environment(), cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.soak
@pytest.mark.timeout(2 * 3600)
def test_a_job_that_is_killed_every_three_minutes(lacuna: Lacuna, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    every_s, total_s = _number("KILL_EVERY_S", 180), 60 * _number("MINUTES", 30)
    _prepare(lacuna, tmp_path)
    (tmp_path / "job.py").write_text(JOB)
    lives: list[Life] = []
    recoveries_s: list[float] = []
    began = time.monotonic()
    while True:
        started = killed_at = time.monotonic()  # the first start counts as a recovery, too
        life, listener = _start(tmp_path)
        lives.append(life)
        end = min(began + total_s, started + every_s)
        while time.monotonic() < end:
            assert life.job.poll() is None, "the job ended by itself"
            time.sleep(0.1)
        is_last = time.monotonic() >= began + total_s
        life.kill(signal.SIGKILL)
        listener.join()
        if life.steps:
            recoveries_s.append(life.steps[0][0] - killed_at)
        if is_last:
            break
    took_s = time.monotonic() - began
    ends = [*(life.first for life in lives[1:]), lives[-1].saved]
    kept_s = sum(life.kept_s(end) for life, end in zip(lives, ends, strict=True))
    recoveries_s.sort()
    p95_s = recoveries_s[min(len(recoveries_s) - 1, int(0.95 * len(recoveries_s)))]
    with capsys.disabled():
        print(  # noqa: T201 - the campaign's result
            f"\ngoodput {kept_s / took_s:.1%} of {took_s:.0f} s with a SIGKILL every {every_s:g} s ({len(lives) - 1} "
            f"kills); from a kill to the next step p95 {p95_s:.1f} s, median {recoveries_s[len(recoveries_s) // 2]:.1f}"
            f" s; {lives[-1].steps[-1][1] if lives[-1].steps else 0} steps"
        )
    assert len(recoveries_s) == len(lives), "a life was too short to take a step"
    assert kept_s / took_s >= _number("MIN", 0.85)
    assert p95_s <= _number("RECOVERY_S", 60)
