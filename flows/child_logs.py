"""What child processes say, in the flow run's log: seldom enough to be read. The whole of it is in their log files."""

import contextlib
import logging
import re
import threading
import time
from pathlib import Path

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

from infra.child import EVENT_PREFIX
from infra.processes import GuardedProcess

LOGGER = logging.getLogger(__name__)

Logger = logging.Logger | logging.LoggerAdapter[logging.Logger]

_LONGEST = 500
_ALARMING = re.compile(r"\b(?:WARNING|ERROR|CRITICAL|FATAL|Traceback)\b")


def run_logger() -> Logger:
    """The log of the task or flow run that we are in; a module's log where there is none."""
    try:
        return get_run_logger()
    except MissingContextError:
        return LOGGER


def say(logger: Logger, level: int, text: str) -> None:
    """Logs from a thread that must live on.

    Where nobody reads the console any more, as when a worker is killed under its flow, the console's writer raises
    `SystemExit`, which would end the thread without a word.
    """
    with contextlib.suppress(SystemExit):
        logger.log(level, "%s", text)


class LineRelay:
    """Hands lines of children to a log: at most one ordinary and one alarming line in a while, with a count of others.

    The newest line that waits is told at the end, so the last words are never lost. For `infra.processes.relayed_to`.

    Attributes:
        last_lines: A child's log file → the newest line that it wrote there.

    Args:
        logger: Where to.
        stage: What the children work for.
        every_s: How often.
    """

    def __init__(self, logger: Logger, stage: str, every_s: float = 1.0) -> None:
        self.last_lines: dict[Path, str] = {}
        self._lock = threading.Lock()
        self._levels = {
            level: _Limited(logger, level, every_s, time.monotonic() - every_s)
            for level in (logging.INFO, logging.WARNING)
        }
        self._stage = stage

    def __call__(self, process: GuardedProcess, line: str) -> None:
        """Takes a line; events, which are for programs, are not told."""
        if line.startswith(EVENT_PREFIX):
            return
        level = logging.WARNING if _ALARMING.search(line) else logging.INFO
        with self._lock:
            self.last_lines[process.log_path] = line
            self._levels[level].take(f"{self._stage} {process.log_path.stem}: {line[:_LONGEST]}")

    def flush(self) -> None:
        """Tells what still waits."""
        with self._lock:
            for limited in self._levels.values():
                limited.flush()


class _Limited:
    """Lines of one level."""

    def __init__(self, logger: Logger, level: int, every_s: float, told: float) -> None:
        self._logger, self._level, self._every_s, self._told = logger, level, every_s, told
        self._waiting: str | None = None
        self._num_left_out = 0

    def take(self, text: str) -> None:
        if self._waiting is not None:
            self._num_left_out += 1
        self._waiting = text
        if time.monotonic() - self._told >= self._every_s:
            self.flush()

    def flush(self) -> None:
        if self._waiting is None:
            return
        left_out = f" ({self._num_left_out} lines before it left out)" if self._num_left_out else ""
        say(self._logger, self._level, f"{self._waiting}{left_out}")
        self._waiting, self._num_left_out, self._told = None, 0, time.monotonic()
