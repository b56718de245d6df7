"""Committing a checkpoint while training goes on: one at a time, retried, and never failing silently."""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from infra.errors import TransientError

LOGGER = logging.getLogger(__name__)

RETRY_DELAYS_S: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Between attempts, beside the store's own retries: two minutes of outage are outlived by stores that have none."""

_SIGN_OF_LIFE_S: Final = 5.0


class Uploader:
    """Runs one piece of work at a time in a thread of its own.

    The thread is no daemon: a process that ends for another reason lets it finish.

    Attributes:
        longest_s: How long the longest finished work took, waiting and retries included.

    Args:
        delays_s: Waits between the attempts of one work; there is one attempt more than waits.
    """

    def __init__(self, delays_s: Sequence[float] = RETRY_DELAYS_S) -> None:
        self.longest_s = 0.0
        self._delays_s = tuple(delays_s)
        self._thread: threading.Thread | None = None
        self._name = ""
        self._began = 0.0
        self._error: BaseException | None = None
        self._done: list[str] = []
        self._lock = threading.Lock()

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Begins a work; none may be under way, `wait` sees to that.

        Args:
            name: What is made known by `take_done` once it is done.
            work: May be called several times; what it raises but `TransientError` ends it at once.
        """
        assert self._thread is None, "one at a time: wait first"
        self._name, self._began = name, time.monotonic()
        self._thread = threading.Thread(target=self._run, args=(name, work), name=f"commit {name}")
        self._thread.start()

    def wait(self, on_wait: Callable[[str], None] = lambda name: None, at_most_s: float = math.inf) -> bool:
        """Waits for the work that is under way, if any; says so if it has to.

        Args:
            on_wait: Called with the work's name, every few seconds: a sign of life.
            at_most_s: How long to wait.

        Returns:
            Whether nothing is under way any more.

        Raises:
            TransientError: The work failed, after all attempts. What else it raised is raised here, too.
        """
        if self._thread is not None:
            if self._thread.is_alive():
                took_s = time.monotonic() - self._began
                LOGGER.info("waiting for the upload of %s, which began %.1f s ago", self._name, took_s)
            deadline = time.monotonic() + at_most_s
            while self._thread.is_alive():
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return False
                self._thread.join(min(_SIGN_OF_LIFE_S, left_s))
                on_wait(self._name)
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return True

    def take_done(self) -> list[str]:
        """Names of what was done since the last call, in order. Does not wait."""
        with self._lock:
            done, self._done = self._done, []
        return done

    def _run(self, name: str, work: Callable[[], None]) -> None:
        try:
            self._attempt(name, work)
        except BaseException as error:  # raised again in the thread that waits
            LOGGER.error("the upload of %s failed: %s", name, error)
            self._error = error
            return
        self.longest_s = max(self.longest_s, time.monotonic() - self._began)
        with self._lock:
            self._done.append(name)

    def _attempt(self, name: str, work: Callable[[], None]) -> None:
        for delay_s in self._delays_s:
            try:
                return work()
            except TransientError as error:
                LOGGER.warning("the upload of %s failed and is tried again in %.0f s: %s", name, delay_s, error)
                time.sleep(delay_s)
        return work()
