"""Training ranks that start in a second: forked from a process that has imported torch and DeepSpeed already.

Everything but the imports is what `training.launch` starts: `training.main` on a spec, its arguments, its environment,
its logs. ``python -m tests.training.forked_ranks`` is the process that forks; `Ranks` is its handle. A module may bring
its own main: ``harness:main`` instead of ``training.main:main``.
"""

import contextlib
import ctypes
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Started:
    """Ranks under way, in a process group of their own.

    Attributes:
        pids: Of each rank; the first is the group's id.
        workdir: Where ``rank-0.log`` … are.
    """

    pids: tuple[int, ...]
    workdir: Path

    def kill(self) -> None:
        """SIGKILL to all of them."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pids[0], signal.SIGKILL)

    def events(self) -> list[dict[str, Any]]:
        """What rank 0 has told so far."""
        path = self.workdir / "rank-0.log"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        marked = [line for line in lines if line.startswith("@lacuna ") and line.endswith("\n")]
        return [json.loads(line.removeprefix("@lacuna ")) for line in marked]

    def log(self) -> str:
        """Of all ranks."""
        return "\n".join(path.read_text() for path in sorted(self.workdir.glob("rank-*.log")))


class Ranks:
    """The process that forks; a context manager."""

    def __enter__(self) -> Self:
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.forked_ranks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=ROOT,
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()  # the end of its input is its end

    def start(self, spec: Any, workdir: Path, num_processes: int, main: str = "training.main:main") -> Started:
        """Starts ranks.

        Args:
            spec: What main is given, JSON values.
            workdir: Scratch and logs.
            num_processes: How many.
            main: ``module:function``.
        """
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "spec.json").write_text(json.dumps(spec))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids = self._ask({"workdir": str(workdir), "num_processes": num_processes, "port": port, "main": main})
        return Started(tuple(pids), workdir)

    def wait(self, started: Started) -> list[int]:
        """Waits for the end of ranks; returns their exit codes, negative where a signal killed them."""
        return self._ask({"wait": started.pids})

    def run(self, spec: Any, workdir: Path, num_processes: int) -> Started:
        """Starts ranks and expects them to end well."""
        started = self.start(spec, workdir, num_processes)
        assert self.wait(started) == [0] * num_processes, started.log()
        return started

    def _ask(self, order: dict[str, Any]) -> list[int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


# ---------------------------------------------------------------------------------------------- the process that forks


def _die_with_parent() -> None:
    """However the parent ends, SIGKILL included: nothing of a campaign may go on for ever."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _serve() -> None:
    _die_with_parent()
    import deepspeed  # noqa: F401  # what the ranks would import, each for itself
    import diffusers.models.unets.unet_2d_condition  # noqa: F401
    import torch

    import training.loop
    import training.main  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        answer = [_exit_code(pid) for pid in order["wait"]] if "wait" in order else _fork_all(order)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _fork_all(order: dict[str, Any]) -> list[int]:
    pids: list[int] = []
    for rank in range(order["num_processes"]):
        pid = os.fork()
        if pid == 0:
            _die_with_parent()
            os.setpgid(0, pids[0] if pids else 0)
            _be_rank(rank, order)
        os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    return pids


def _be_rank(rank: int, order: dict[str, Any]) -> None:
    from infra.child import run_as_child

    code = 70
    try:
        workdir = Path(order["workdir"])
        log = os.open(workdir / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for number in (1, 2):
            os.dup2(log, number)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(order["num_processes"]),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(order["port"]),
        )
        sys.argv = ["main", "--run", str(workdir / "spec.json")]
        module, _, name = order["main"].partition(":")
        code = run_as_child(getattr(importlib.import_module(module), name))
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed.*")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    _serve()
