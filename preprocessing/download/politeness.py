"""Manners towards hosts: few connections at once, pauses where they are asked for, and an end to asking in vain.

All limits are for one process: ``download.num_processes`` times as much may reach a host.
"""

import collections
import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.reasons import Reason
from preprocessing.download.addresses import Verdict

MAX_WAIT_S = 120.0  # for one's turn; longer would look like a stall
_MAX_HOSTS = 65_536


class NotNowError(Exception):
    """A host is not asked.

    Attributes:
        verdict: Why.
    """

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict[1])
        self.verdict = verdict


@dataclass(slots=True)
class _Host:
    changed: threading.Condition  # on the lock of all: only those who wait for this host are woken
    num_now: int = 0
    next_at: float = 0.0  # on the monotonic clock
    delay_s: float = 0.0
    num_failures: int = 0  # in a row
    closed: Verdict | None = None


class HostTurns:
    """Who may ask which host, and when.

    Args:
        config: Its limits per host.
    """

    def __init__(self, config: DownloadConfig) -> None:
        self._config = config
        self._hosts: collections.OrderedDict[str, _Host] = collections.OrderedDict()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def turn(self, host: str, max_wait_s: float = MAX_WAIT_S) -> Iterator[float]:
        """One's turn to ask a host.

        Yields:
            How long it was waited for, in seconds.

        Raises:
            NotNowError: The host is left alone for the rest of the run, or the turn did not come.
        """
        entry, waited_s = self._enter(host, max_wait_s)
        try:
            yield waited_s
        finally:
            with self._lock:
                entry.num_now -= 1
                entry.changed.notify()

    def succeeded(self, host: str) -> None:
        """Notes that a host has answered."""
        entry = self._hosts.get(host)  # no lock: a host that is forgotten at this moment has nothing to remember
        if entry is not None:
            entry.num_failures = 0

    def failed(self, host: str, verdict: Verdict) -> None:
        """Notes that a host could not be reached or did not answer in time."""
        limit = self._config.max_host_failures
        with self._lock:
            entry = self._entry(host)
            entry.num_failures += 1
            if limit and entry.num_failures >= limit and entry.closed is None:
                reason, detail = verdict
                entry.closed = reason, f"{host} failed {limit} times in a row, the last time: {detail}"
                entry.changed.notify_all()

    def pause(self, host: str, duration_s: float) -> None:
        """Leaves a host alone for a while, or for the rest of the run where it asks for more than is waited for."""
        with self._lock:
            entry = self._entry(host)
            if duration_s > self._config.max_retry_after_s:
                entry.closed = Reason.RATE_LIMITED, f"{host} asked for a pause of {duration_s:.0f} s"
                entry.changed.notify_all()
            else:
                entry.next_at = max(entry.next_at, time.monotonic() + duration_s)

    def slow_down(self, host: str, delay_s: float) -> None:
        """Keeps at least this long between two requests, up to ``download.max_retry_after_s``."""
        with self._lock:
            self._entry(host).delay_s = min(delay_s, self._config.max_retry_after_s)

    def _entry(self, host: str) -> _Host:
        entry = self._hosts.get(host)
        if entry is None:
            entry = self._hosts[host] = _Host(threading.Condition(self._lock), delay_s=self._config.host_delay_s)
            if len(self._hosts) > _MAX_HOSTS:
                self._forget_one()
        self._hosts.move_to_end(host)
        return entry

    def _forget_one(self) -> None:
        for name, entry in self._hosts.items():
            if entry.num_now == 0 and entry.closed is None:
                del self._hosts[name]
                return

    def _enter(self, host: str, max_wait_s: float) -> tuple[_Host, float]:
        started = now = time.monotonic()
        with self._lock:
            entry = self._entry(host)
            while True:
                if entry.closed is not None:
                    raise NotNowError(entry.closed)
                if entry.num_now < self._config.max_connections_per_host and entry.next_at <= now:
                    break
                left_s = started + max_wait_s - now
                if left_s <= 0:
                    raise NotNowError((Reason.TIMED_OUT, f"{host} was busy with other rows for {max_wait_s:.0f} s"))
                pause_s = entry.next_at - now if entry.next_at > now else left_s
                entry.changed.wait(min(pause_s, left_s))
                now = time.monotonic()
            entry.num_now += 1
            delay_s = entry.delay_s
            if delay_s:
                entry.next_at = now + delay_s
        return entry, now - started


class ByteBudget:
    """How many bytes all answers in flight may take together.

    Args:
        num_bytes: In all.
    """

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes
        self._changed = threading.Condition()

    def take(self, num_bytes: int, timeout_s: float) -> bool:
        """Takes some, waiting for others to give theirs back; False where none came free in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._left >= num_bytes, timeout_s):
                return False
            self._left -= num_bytes
            return True

    def give_back(self, num_bytes: int) -> None:
        """Gives back what was taken."""
        with self._changed:
            self._left += num_bytes
            self._changed.notify_all()
