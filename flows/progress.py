"""Who is told how far the work is: the tasks tell, and the command line (or nobody) listens. No prefect."""

import contextlib
import contextvars
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

LOGGER = logging.getLogger(__name__)
_LINE_EVERY_S = 5.0


class Listener(Protocol):
    """Is told how far each stage is."""

    def advance(self, stage: str, num_done: int, num_total: int, text: str = "") -> None:
        """``num_done`` of ``num_total`` shards, steps or pictures are done; ``text`` says more in a few words."""
        ...

    def finish(self, stage: str, text: str) -> None:
        """The stage is done."""
        ...


class Silent:
    """Listens to nothing: Prefect workers, whose progress is in artifacts."""

    def advance(self, stage: str, num_done: int, num_total: int, text: str = "") -> None:
        """Does nothing."""

    def finish(self, stage: str, text: str) -> None:
        """Leaves a line in the log."""
        LOGGER.info("%s: %s", stage, text)


class Lines:
    """Plain lines for logs and pipes, at most one every few seconds and stage."""

    def __init__(self, stream: TextIO | None = None, every_s: float = _LINE_EVERY_S) -> None:
        self._stream = stream or sys.stderr
        self._every_s = every_s
        self._last: dict[str, float] = {}

    def advance(self, stage: str, num_done: int, num_total: int, text: str = "") -> None:
        """Writes a line if the last one of this stage is old enough."""
        now = time.monotonic()
        if now - self._last.get(stage, -self._every_s) >= self._every_s:
            self._last[stage] = now
            self._write(f"{stage:<9} {num_done}/{num_total} {text}")

    def finish(self, stage: str, text: str) -> None:
        """Writes a line."""
        self._write(f"{stage:<9} {text}")

    def _write(self, line: str) -> None:
        self._stream.write(f"{line.rstrip()}\n")
        self._stream.flush()


class Bars:
    """A bar for each stage, on a terminal."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.fields[stage]:<9}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "Bars":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def advance(self, stage: str, num_done: int, num_total: int, text: str = "") -> None:
        """Moves the stage's bar."""
        self._bars.update(self._task(stage), completed=num_done, total=num_total, description=text)

    def finish(self, stage: str, text: str) -> None:
        """Fills the stage's bar."""
        task = self._task(stage)
        total = next(bar.total for bar in self._bars.tasks if bar.id == task) or 1
        self._bars.update(task, completed=total, total=total, description=text)
        self._bars.stop_task(task)

    def _task(self, stage: str) -> TaskID:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task("", stage=stage, total=None)
        return self._tasks[stage]


def training_text(event: Mapping[str, Any]) -> str:
    """A training's ``step`` event in a few words: loss, speed, share of the devices' peak where known, time left."""
    parts = [] if event.get("loss") is None else [f"loss {event['loss']:.4f}"]
    speed = event["images_per_s"]
    parts.append(f"{speed:.0f} images/s" if speed >= 10 else f"{speed:.2g} images/s")
    if "mfu" in event:
        parts.append(f"MFU {100 * event['mfu']:.0f} %")
    if event.get("left_s"):
        parts.append(f"{duration_text(event['left_s'])} left")
    return ", ".join(parts)


def training_warning(event: Mapping[str, Any]) -> str | None:
    """What an operator should know of a training's event: a bad step was skipped, or steps were taken back."""
    if event.get("event") == "skipped":
        return (
            f"train: the step after {event['step']} is skipped, its {event['reason']} is not finite; "
            f"{event['num_samples']} samples: {', '.join(event['uids'])}; {event['num_skipped']} steps skipped so far"
        )
    if event.get("event") == "rolled_back":
        return (
            f"train: rolled back from step {event['from_step']} to {event['step']}, {event['reason']} not finite; "
            f"{event['num_samples']} samples are not seen again"
        )
    return None


def duration_text(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 20 min``, ``2 d 4 h``: rounded to what matters."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


_listener: contextvars.ContextVar[Listener] = contextvars.ContextVar("listener", default=Silent())  # noqa: B039 - it has no state


def listener() -> Listener:
    """Whoever listens now."""
    return _listener.get()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Shows the progress of what runs in the block on stderr: bars on a terminal, plain lines otherwise."""
    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        token = _listener.set(stack.enter_context(Bars(console)) if console.is_terminal else Lines())
        stack.callback(_listener.reset, token)
        yield
