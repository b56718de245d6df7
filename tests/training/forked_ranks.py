"""Training ranks that start in a second: forked from a process that has imported torch and DeepSpeed already.

Everything but the imports is what `training.launch` starts: `training.main` on a spec, its arguments, its environment,
its logs. ``python -m tests.training.forked_ranks`` is the process that forks; `Ranks` is its handle. A module may bring
its own main: ``harness:main`` instead of ``training.main:main``. A `Node` is a machine among several: its ranks are a
process group of their own, with scratch, environment and network namespace of their own.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
_PR_SET_PDEATHSIG = 1
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Node:
    """A machine, as a hostfile's line names it.

    Attributes:
        address: Where the others reach it.
        slots: Processes that it runs.
        workdir: Its own scratch, and its ranks' logs.
        environment: Variables beside those that say which rank a process is.
        namespace: File that holds its network namespace open; None for the common one.
    """

    address: str
    slots: int
    workdir: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    namespace: Path | None = None


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

    def start(
        self,
        spec: Any,
        workdir: Path,
        num_processes: int,
        main: str = "training.main:main",
        environment: Mapping[str, str] | None = None,
    ) -> Started:
        """Starts ranks.

        Args:
            spec: What main is given, JSON values.
            workdir: Scratch and logs.
            num_processes: How many.
            main: ``module:function``.
            environment: Variables beside those that say which rank a process is.
        """
        (started,) = self.start_nodes(spec, [Node("127.0.0.1", num_processes, workdir, environment or {})], main)
        return started

    def start_nodes(self, spec: Any, nodes: Sequence[Node], main: str = "training.main:main") -> list[Started]:
        """Starts ranks on several nodes, as a launcher with a hostfile does: numbered from the first node on."""
        world_size = sum(node.slots for node in nodes)
        port = _free_port()
        started, first_rank = [], 0
        for node in nodes:
            node.workdir.mkdir(parents=True, exist_ok=True)
            (node.workdir / "spec.json").write_text(json.dumps(spec))
            places = [
                {
                    "RANK": str(first_rank + local_rank),
                    "LOCAL_RANK": str(local_rank),
                    "LOCAL_WORLD_SIZE": str(node.slots),
                    "WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": nodes[0].address,
                    "MASTER_PORT": str(port),
                    **node.environment,
                }
                for local_rank in range(node.slots)
            ]
            namespace = None if node.namespace is None else str(node.namespace)
            order = {"workdir": str(node.workdir), "places": places, "main": main, "namespace": namespace}
            started.append(Started(tuple(self._ask(order)), node.workdir))
            first_rank += node.slots
        return started

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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
    for place in order["places"]:
        pid = os.fork()
        if pid == 0:
            _die_with_parent()
            os.setpgid(0, pids[0] if pids else 0)
            _be_rank(place, order)
        os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    return pids


def _be_rank(place: dict[str, str], order: dict[str, Any]) -> None:
    from infra.child import run_as_child

    code = 70
    try:
        workdir = Path(order["workdir"])
        log = os.open(workdir / f"rank-{place['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for number in (1, 2):
            os.dup2(log, number)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        if order["namespace"] is not None:
            _enter(order["namespace"])
        os.environ.update(place)
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


def _enter(namespace: str) -> None:
    """This thread's network namespace, and so that of every thread which it starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(namespace, "rb") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")


if __name__ == "__main__":
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed.*")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    _serve()
