"""Ends a rank that has stopped making progress, whoever started it, and says where it stands."""

import contextlib
import faulthandler
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

from infra.child import emit
from infra.errors import EXIT_OUTSIDE_WORLD

LOGGER = logging.getLogger(__name__)

_PATIENCE: Final = 1.2
"""Times the limit: our own launcher, which asks whether *any* rank is alive, comes first."""

_LONGEST_WAIT_S: Final = 1.0


class Watchdog:
    """Runs in a thread of its own; a context manager, which may be entered again and again.

    Where one rank hangs the others wait for it in a collective call, without end or until that times out. Each then
    ends by itself, with the stack of every thread in its log, so that a launcher without a watch of its own (torchrun,
    Slurm) may start anew.

    Args:
        limit_s: How long `note` may not be called.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = _PATIENCE * limit_s
        self._noted = time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def note(self) -> None:
        """There is progress."""
        self._noted = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it looks away: what is done there has limits of its own."""
        self._noted = math.inf
        try:
            yield
        finally:
            self.note()

    def __enter__(self) -> Self:
        self.note()
        self._ended.clear()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(min(self._limit_s / 4, _LONGEST_WAIT_S)):
            silent_s = time.monotonic() - self._noted
            if silent_s < self._limit_s:
                continue
            message = f"no progress for {silent_s:.0f} s (train.stall_timeout_s); the log says where each thread stands"
            try:
                LOGGER.error("%s", message)
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                emit({"event": "error", "type": "TransientError", "message": message})
            finally:  # also where nobody reads what we say any more
                os._exit(EXIT_OUTSIDE_WORLD)
