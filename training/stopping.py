"""When to stop before the last step: a signal, or the end of the time that was granted."""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Final

from infra.child import emit
from infra.errors import EXIT_INTERRUPTED, WalltimeError

LOGGER = logging.getLogger(__name__)

_STOPPING = (signal.SIGTERM, signal.SIGINT)
_SAME_STOP_S: Final = 0.5
"""A terminal and a launcher may each send their signal for one Ctrl-C: within this time they count as one."""


class StoppedTogetherError(KeyboardInterrupt):
    """All ranks end after a signal to any of them, their checkpoint committed."""


class Stop:
    """Whether this rank should stop; all ranks do, at the same step, when any of them should.

    Args:
        walltime_s: Time granted from now on; None for no end.
        margin_s: How long before the end to stop, at least.
    """

    def __init__(self, walltime_s: float | None = None, margin_s: float = 0.0) -> None:
        self.is_signalled = False
        self._walltime_s = walltime_s
        self._margin_s = margin_s
        self._began = time.monotonic()
        self._last_step: float | None = None
        self._longest_step_s = 0.0
        self._longest_save_s = 0.0

    @property
    def is_set(self) -> bool:
        """Whether there was a signal, or the time is nearly over."""
        return self.is_signalled or self.is_time_over

    @property
    def is_time_over(self) -> bool:
        """Whether another step and a save may not end in time."""
        if self._walltime_s is None:
            return False
        margin_s = max(self._margin_s, self._longest_step_s + 2 * self._longest_save_s)
        return time.monotonic() - self._began > self._walltime_s - margin_s

    def note_step(self, save_s: float) -> None:
        """Learns how long a step takes, pauses included, and how long the longest save took."""
        now = time.monotonic()
        if self._last_step is not None:  # the first one's time is the start-up's, too
            self._longest_step_s = max(self._longest_step_s, now - self._last_step)
        self._longest_save_s = max(self._longest_save_s, save_s)
        self._last_step = now

    def error(self, step: int, was_signalled: bool) -> BaseException:
        """What ends the run, once its checkpoint is committed.

        Args:
            step: Of the checkpoint.
            was_signalled: Whether any rank got a signal.
        """
        if was_signalled:
            return StoppedTogetherError()
        return WalltimeError(
            f"train.walltime_s: {self._walltime_s:g} s are nearly over; the checkpoint of step {step} is committed, "
            "the same command goes on from it"
        )

    @contextlib.contextmanager
    def signals_noted(self) -> Iterator[None]:
        """Within, the first SIGTERM or SIGINT is noted, to be acted upon between two steps; the second ends us at once.

        A thread hears them: the main thread may be waiting for other ranks, or for the store, for many minutes.
        """
        ours, theirs = os.pipe()
        os.set_blocking(theirs, False)
        before = {number: signal.signal(number, _leave_to_thread) for number in _STOPPING}
        fd_before = signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
        listener = threading.Thread(target=self._listen, args=(ours,), name="signals", daemon=True)
        listener.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(fd_before)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(theirs)  # the listener reads to the end
            listener.join()
            os.close(ours)

    def _listen(self, pipe: int) -> None:
        noted_at = 0.0
        while received := os.read(pipe, 1):
            if received[0] not in _STOPPING:
                continue  # whatever Python handles writes here
            name, now = signal.Signals(received[0]).name, time.monotonic()
            if not self.is_signalled:
                LOGGER.warning("%s: a checkpoint is written, then the run ends; a second signal ends it at once", name)
                self.is_signalled, noted_at = True, now
            elif now - noted_at > _SAME_STOP_S:
                LOGGER.warning("%s again: the run ends at once, without a checkpoint", name)
                emit({"event": "error", "type": "KeyboardInterrupt", "message": "interrupted twice"})
                os._exit(EXIT_INTERRUPTED)


def _leave_to_thread(number: int, frame: object) -> None:
    """The number is in the pipe already."""
