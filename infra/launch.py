"""Starting torch in processes of its own: a training's ranks, the encoders, a validation, an export. No torch here.

The flow's process stays small and cannot be taken down by an out-of-memory kill in a trainer; and whatever happens to
it, the guard (`infra.processes`) sees to it that no child outlives it.
"""

import contextlib
import json
import logging
import os
import queue
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from infra.child import EVENT_PREFIX
from infra.errors import ContractError, GateError, TransientError, WalltimeError
from infra.processes import GuardedProcess

LOGGER = logging.getLogger(__name__)

Event = dict[str, Any]
EventCallback = Callable[[Event], None]

_ROOT = Path(__file__).resolve().parents[1]
_POLL_S = 0.2
_FAILED_GRACE_S = 2.0  # when one rank is dead the others can only wait for it in vain
_ERRORS: dict[str, type[Exception]] = {
    error.__name__: error for error in (ContractError, ValueError, GateError, TransientError, WalltimeError)
}


class KilledError(TransientError):
    """A child was killed by a signal.

    Attributes:
        cause: One line: which child, by which signal, and what is known of the reason.
        may_be_memory: Whether the kernel may have done it for want of memory.
        log: The end of its log.
    """

    def __init__(self, cause: str, log: str, *, may_be_memory: bool) -> None:
        super().__init__(f"{cause}; {log}")
        self.cause, self.log, self.may_be_memory = cause, log, may_be_memory


def run_module(
    module: str,
    spec: dict[str, Any],
    *,
    workdir: Path,
    on_event: EventCallback,
    num_processes: int = 1,
    stall_timeout_s: float | None = None,
    grace_s: float = 10.0,
    hears_every_rank: bool = False,
) -> dict[str, Any]:
    """Runs ``python -m module --run FILE`` in child processes and waits for its result.

    The module's main is a call of `infra.child.run_as_child`. Several processes find their places in the
    environment, as torch's and DeepSpeed's launchers set it: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.

    Args:
        module: Name of the module, such as ``training.validation``.
        spec: What FILE holds, JSON values.
        workdir: FILE, the logs and the child's scratch go here; it is made if need be.
        on_event: Called, in this thread, with each event of rank 0; or of every rank, then with its ``rank`` added.
        num_processes: How many.
        stall_timeout_s: How long all ranks may be silent (no event) before they count as hung; None for ever.
        grace_s: How long a child has to end by itself when we are interrupted.
        hears_every_rank: Whether ``on_event`` is called for the other ranks, too.

    Returns:
        The payload of rank 0's ``done`` event.

    Raises:
        ValueError: A child said that its input is bad; likewise `ContractError`, `GateError` and `TransientError`.
        TransientError: A child was killed or hung.
        RuntimeError: A child failed otherwise; the message holds the end of its log.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    spec_path = workdir / f"{module.rpartition('.')[2]}.json"
    spec_path.write_text(json.dumps(spec, indent=1, ensure_ascii=False), encoding="utf-8")
    argv = [sys.executable, "-P", "-m", module, "--run", str(spec_path)]
    events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
    port = _free_port()
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(
                GuardedProcess(
                    argv,
                    env=_environment(rank, num_processes, port),
                    log_path=workdir / f"rank-{rank}.log",
                    on_line=_listener(events, rank),
                    grace_s=grace_s,
                )
            )
            for rank in range(num_processes)
        ]
        watch = _Watch(module, children, events, on_event, stall_timeout_s, hears_every_rank=hears_every_rank)
        return watch.until_done()


class _Watch:
    """Waits for the children of one call of `run_module`."""

    def __init__(
        self,
        module: str,
        children: Sequence[GuardedProcess],
        events: "queue.SimpleQueue[tuple[int, Event]]",
        on_event: EventCallback,
        stall_timeout_s: float | None,
        *,
        hears_every_rank: bool = False,
    ) -> None:
        self._module = module
        self._children = children
        self._events = events
        self._on_event = on_event
        self._stall_timeout_s = stall_timeout_s
        self._hears_every_rank = hears_every_rank
        self._heard = time.monotonic()
        self._done: Event | None = None
        self._errors: list[Event] = []
        self._oom_kills_before = _num_oom_kills()

    def until_done(self) -> dict[str, Any]:
        while True:
            codes = [child.poll() for child in self._children]
            if any(codes):
                self._raise_failure(codes)
            if all(code == 0 for code in codes):
                break
            self._listen(_POLL_S)
            self._check_stall()
        for child in self._children:
            child.wait()  # its last lines
        self._listen(0)
        if self._done is None:
            raise RuntimeError(f"{self._module} ended without a result; the end of its log:\n{self._tail(0)}")
        return {key: value for key, value in self._done.items() if key != "event"}

    def _listen(self, timeout_s: float) -> None:
        """Takes in all events that are there; waits for the first one."""
        with contextlib.suppress(queue.Empty):
            rank, event = self._events.get(timeout=timeout_s) if timeout_s else self._events.get_nowait()
            while True:
                self._heard = time.monotonic()
                kind = event.get("event")
                if kind == "error":
                    self._errors.append(event)
                elif rank == 0 or self._hears_every_rank:
                    if kind == "done" and rank == 0:
                        self._done = event
                    self._on_event({**event, "rank": rank} if self._hears_every_rank else event)
                rank, event = self._events.get_nowait()

    def _check_stall(self) -> None:
        silent_s = time.monotonic() - self._heard
        if self._stall_timeout_s is None or silent_s < self._stall_timeout_s:
            return
        for child in self._children:
            child.terminate(_FAILED_GRACE_S)
        raise TransientError(
            f"{self._module} made no progress for {silent_s:.0f} s and was stopped; the end of "
            f"{self._children[0].log_path}:\n{self._tail(0)}"
        )

    def _raise_failure(self, codes: Sequence[int | None]) -> None:
        """Raises what the first rank that failed died of; the others are stopped."""
        # The one that knows the reason may not be the first to be seen dead: its peers fall over its closed sockets.
        for child in self._children:
            child.terminate(_FAILED_GRACE_S)
        self._listen(0)
        for event in self._errors:
            if event["type"] in _ERRORS:
                raise _ERRORS[event["type"]](event["message"])
        rank, code = next((rank, code) for rank, code in enumerate(codes) if code)
        log = f"the end of {self._children[rank].log_path}:\n{self._tail(rank)}"
        if self._errors:
            raise TransientError(f"{self._module} was interrupted from outside; run again to go on")
        if code < 0:
            name = signal.Signals(-code).name
            is_kill = name == "SIGKILL"
            reason = " (out of memory?)" if is_kill else ""
            if is_kill and _num_oom_kills() > self._oom_kills_before:
                reason = " (meanwhile the kernel killed a process of this machine because memory was short)"
            raise KilledError(f"{self._module}: rank {rank} was killed by {name}{reason}", log, may_be_memory=is_kill)
        raise RuntimeError(f"{self._module}: rank {rank} failed with exit code {code}; {log}")

    def _tail(self, rank: int) -> str:
        return self._children[rank].last_lines()


def _listener(events: "queue.SimpleQueue[tuple[int, Event]]", rank: int) -> Callable[[str], None]:
    def on_line(line: str) -> None:
        if not line.startswith(EVENT_PREFIX):
            return
        try:
            event = json.loads(line.removeprefix(EVENT_PREFIX))
        except json.JSONDecodeError:
            LOGGER.warning("rank %d: an event that is no JSON: %s", rank, line)
            return
        events.put((rank, event))

    return on_line


def _environment(rank: int, num_processes: int, port: int) -> dict[str, str]:
    env = dict(os.environ)
    # Found by path, wherever we were started; with -P the current folder, which may have a `model/`, does not count.
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), env.get("PYTHONPATH")]))
    env["PYTHONUNBUFFERED"] = "1"
    env.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_processes),
        LOCAL_WORLD_SIZE=str(num_processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    return env


def _num_oom_kills() -> int:
    """How many processes of this machine the kernel has killed for want of memory; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("oom_kill ")).split()[1])
    return 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
