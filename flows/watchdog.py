"""Ends a stage that has stopped making progress, with a diagnosis, and a flow whose worker is gone.

A heartbeat says that a process lives, not that it gets on: a flow may wait for a child that stands still for ever, its
heart beating. So what is watched here is progress: a stage in which nothing new is done for
``operations.stall_timeout_s`` fails as the outside world's fault, is tried again, and goes on from what stands in the
store. The trainers and the download have watches of their own below this one, which see more and are quicker.

A process worker that is killed leaves its flow runs to themselves: nobody could cancel them any more. They end as if
they had been told to, with their time for a checkpoint; that is watched from the import of this module on, which every
flow imports, once in each process.
"""

import contextlib
import contextvars
import ctypes
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Concatenate, Final, ParamSpec, Self, TypeVar

from flows.child_logs import LineRelay, Logger, run_logger, say
from flows.config import PipelineConfig
from flows.progress import duration_text
from infra import pulse
from infra.errors import EXIT_INTERRUPTED, EXIT_OUTSIDE_WORLD, TransientError
from infra.processes import relayed_to

LOGGER = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
StageFunction = Callable[Concatenate[PipelineConfig, P], T]

_LONGEST_WAIT_S: Final = 1.0
_LEAVE_S: Final = 20.0
"""How long a stage may take to notice that its children are dead, and how long to notice an exception."""

_ORPHAN_GRACE_S: Final = 30.0
"""As long as Prefect's own worker waits between TERM and KILL."""

_MAX_SHOWN: Final = 8
_STATES: Final = {
    "R": "running", "S": "sleeping", "D": "waiting for a disk", "T": "stopped", "t": "traced", "Z": "dead", "I": "idle",
}  # fmt: skip

# Of a flow process that a worker started; any other may outlive who started it.
_WORKER_PID: Final = os.getppid() if os.environ.get("PREFECT__FLOW_RUN_ID") else None

_current: contextvars.ContextVar["Watch | None"] = contextvars.ContextVar("watch", default=None)


def current() -> "Watch | None":
    """The watch over the stage that we are in."""
    return _current.get()


def watched(stage: str) -> Callable[[StageFunction[P, T]], StageFunction[P, T]]:
    """Decorates a stage's function, the first argument of which is the config: it is watched while it runs."""

    def decorate(function: StageFunction[P, T]) -> StageFunction[P, T]:
        @functools.wraps(function)
        def run(config: PipelineConfig, /, *args: P.args, **kwargs: P.kwargs) -> T:
            with watching(stage, config.operations.stall_timeout_s):
                return function(config, *args, **kwargs)

        return run

    return decorate


@contextlib.contextmanager
def watching(stage: str, limit_s: float) -> Iterator["Watch"]:
    """Watches over what runs in the block, and relays what its children say to the run's log.

    Args:
        stage: Which.
        limit_s: How long nothing new may be done.

    Raises:
        TransientError: Nothing was; the message is a diagnosis.
    """
    logger = run_logger()
    relay = LineRelay(logger, stage)
    with Watch(stage, limit_s, relay, logger) as watch:
        token = _current.set(watch)
        try:
            with relayed_to(relay), pulse.listening(watch.touch):
                yield watch
        finally:
            _current.reset(token)
            relay.flush()


class _StalledError(BaseException):
    """Raised in the stage's thread from outside; no handler of ordinary errors may take it for one."""


class Watch:
    """Sees to it that a stage gets on; a context manager, entered by the thread that does the work.

    Args:
        stage: Which.
        limit_s: How long nothing new may be done.
        relay: Knows the children's logs.
        logger: Is told before anything is ended.
    """

    def __init__(self, stage: str, limit_s: float, relay: LineRelay, logger: Logger) -> None:
        self._stage, self._limit_s, self._relay, self._logger = stage, limit_s, relay, logger
        self._lock = threading.Lock()
        self._left = threading.Event()
        self._thread_id = 0
        self._older: set[int] = set()
        self._diagnosis: str | None = None
        self._is_interrupted = False
        self._at: tuple[int, int] = (0, 0)
        self.touch()

    def note(self, num_done: int, num_total: int) -> None:
        """So much is done of so much; the same as before is no progress."""
        if num_done != self._at[0]:
            self.touch()
        self._at = num_done, num_total

    def touch(self) -> None:
        """There is progress that cannot be counted."""
        self._progressed, self._progressed_at = time.monotonic(), datetime.now(UTC)

    def __enter__(self) -> Self:
        self._thread_id = threading.get_ident()
        self._older = {child.pid for child in descendants()}  # servers of this process, which the next try needs
        self.touch()
        threading.Thread(target=self._watch, name=f"watch over {self._stage}", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while True:
            try:
                self._leave()
                break
            except _StalledError:  # it comes when it comes
                continue
        # What ends without an error after its children were killed may have taken half of their work for the whole.
        if self._diagnosis is not None and (error is None or isinstance(error, (Exception, _StalledError))):
            raise TransientError(self._diagnosis) from (None if isinstance(error, _StalledError) else error)

    def _leave(self) -> None:
        with self._lock:
            self._left.set()
            if self._is_interrupted:
                _interrupt(self._thread_id, None)

    def _watch(self) -> None:
        while not self._left.wait(min(self._limit_s / 4, _LONGEST_WAIT_S)):
            if time.monotonic() - self._progressed > self._limit_s:
                self._end_stage()
                return

    def _end_stage(self) -> None:
        """Makes the stage fail: by the death of its children, else by an exception, else by our own end."""
        self._diagnosis = self._diagnose()
        say(self._logger, logging.ERROR, self._diagnosis)
        guarded = [child for child in descendants() if child.is_guarded and child.pid not in self._older]
        for child in guarded:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child.pid, signal.SIGKILL)
        if guarded and self._left.wait(_LEAVE_S / 2):
            return
        with self._lock:
            if self._left.is_set():
                return
            self._is_interrupted = True
            _interrupt(self._thread_id, _StalledError)
        if not self._left.wait(_LEAVE_S):
            LOGGER.critical("%s; it cannot be interrupted, so the whole process ends", self._diagnosis)
            os._exit(EXIT_OUTSIDE_WORLD)

    def _diagnose(self) -> str:
        silent_s = time.monotonic() - self._progressed
        num_done, num_total = self._at
        parts = [
            f"{self._stage}: no progress for {duration_text(silent_s)} (operations.stall_timeout_s = "
            f"{self._limit_s:g}); it has stood at {num_done} of {num_total} since {self._progressed_at:%H:%M:%S} UTC"
        ]
        children = [child for child in descendants() if not child.is_guard]
        shown = "; ".join(child.text for child in children[:_MAX_SHOWN])
        more = f"; and {len(children) - _MAX_SHOWN} more" if len(children) > _MAX_SHOWN else ""
        parts.append(f"its children: {shown}{more}" if children else "it has no children")
        for path, line in list(self._relay.last_lines.items())[-2:]:
            parts.append(f"the last line of {path}: {line[:200]!r}")
        return ". ".join(parts)


@dataclass(frozen=True)
class Descendant:
    """A process below ours.

    Attributes:
        pid: Its id.
        command: What it runs, cut to a readable length.
        state: One letter, as the kernel has it.
        is_guard: Whether it is a guard of `infra.processes`.
        is_guarded: Whether there is one above it.
    """

    pid: int
    command: str
    state: str
    is_guard: bool
    is_guarded: bool

    @property
    def text(self) -> str:
        """What it is doing, in a few words."""
        folder = Path("/proc") / str(self.pid)
        waits_in = num_sockets = None
        with contextlib.suppress(OSError):
            waits_in = (folder / "wchan").read_text().strip("0\n")
        with contextlib.suppress(OSError):
            num_sockets = sum(_link_of(entry).startswith("socket:") for entry in (folder / "fd").iterdir())
        words = [_STATES.get(self.state, self.state)]
        words += [f"in {waits_in}"] if waits_in else []
        words += [f"{num_sockets} sockets open"] if num_sockets is not None else []
        return f"{self.pid} ({self.command}) {', '.join(words)}"


def descendants() -> list[Descendant]:
    """All processes below this one, by the kernel; empty where there is no /proc."""
    found: dict[int, tuple[int, str]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            # pid (name) state parent …, where the name may hold anything
            state, parent = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
            found[int(folder.name)] = int(parent), state
    below: list[Descendant] = []
    level = [(os.getpid(), False)]
    while level:
        pid, is_guarded = level.pop()
        for child in sorted(other for other, (parent, _) in found.items() if parent == pid):
            command = _command_of(child)
            is_guard = "/infra/guard.py" in command
            below.append(Descendant(child, _shortened(command), found[child][1], is_guard, is_guarded))
            level.append((child, is_guarded or is_guard))
    return below


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _shortened(command: str) -> str:
    words = command.split() or ["?"]
    text = " ".join([Path(words[0]).name, *words[1:]])
    return text if len(text) <= 80 else f"{text[:79]}…"


def _link_of(path: Path) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(path)
    return ""


def _interrupt(thread_id: int, error: type[BaseException] | None) -> None:
    """Raises in another thread as soon as that runs Python again; None takes back what has not been raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread_id), None if error is None else ctypes.py_object(error)
    )


def _end_with_worker(worker_pid: int) -> None:
    """Ends this process once its parent is another one, with time for a checkpoint."""
    while os.getppid() == worker_pid:
        time.sleep(_LONGEST_WAIT_S)
    say(LOGGER, logging.ERROR, f"the worker is gone (process {worker_pid}); the flow ends")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_ORPHAN_GRACE_S)
    os._exit(EXIT_INTERRUPTED)  # the children's guards see it, and kill them


if _WORKER_PID is not None:
    threading.Thread(target=_end_with_worker, args=(_WORKER_PID,), name="watch over the worker", daemon=True).start()
