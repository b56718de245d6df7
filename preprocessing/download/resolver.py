"""Names to addresses, each name once in a run.

`socket.getaddrinfo` can neither be interrupted nor told how long it may take, so a few threads of our own wait for it,
and everybody else waits for them with a time limit. What they find is kept: 10,000 pictures of one host cost one
question, and so do 100 threads that ask at once.
"""

import collections
import concurrent.futures
import contextlib
import ipaddress
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from preprocessing.download.addresses import Address, unmapped

Lookup = Callable[[str], Sequence[Address]]

NUM_THREADS = 32
MAX_HOSTS = 65_536
_AGAIN_S = 30.0  # after a failure of the name service; "no such name" is kept as long as an answer


def lookup(host: str) -> list[Address]:
    """Every address of a host, as the system's resolver has it, IPv4 first.

    Raises:
        OSError: The name does not resolve (`socket.gaierror`).
    """
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    addresses = {unmapped(ipaddress.ip_address(str(entry[4][0]))) for entry in found}
    return sorted(addresses, key=lambda address: (address.version, int(address)))


@dataclass(frozen=True, slots=True)
class _Entry:
    answer: concurrent.futures.Future[tuple[Address, ...]]
    asked_at: float


class Resolver:
    """A cache of addresses over all threads of a process.

    Args:
        ttl_s: How long an answer is believed.
        look_up: Gives a host's addresses, or raises OSError.
        max_hosts: How many hosts are remembered; the one that was asked for the longest ago goes first.
        num_threads: How many questions may be open at once.
    """

    def __init__(
        self,
        ttl_s: float = 3600.0,
        look_up: Lookup = lookup,
        *,
        max_hosts: int = MAX_HOSTS,
        num_threads: int = NUM_THREADS,
    ) -> None:
        self._ttl_s = ttl_s
        self._look_up = look_up
        self._max_hosts = max_hosts
        self._num_threads = num_threads
        self._entries: collections.OrderedDict[str, _Entry] = collections.OrderedDict()
        self._questions: queue.SimpleQueue[tuple[str, concurrent.futures.Future[tuple[Address, ...]]] | None] = (
            queue.SimpleQueue()
        )
        self._threads: list[threading.Thread] = []
        self._num_open = 0
        self._lock = threading.Lock()

    def addresses(self, host: str, timeout_s: float) -> tuple[Address, ...]:
        """The addresses of a host.

        Args:
            host: A name, or an address in any spelling.
            timeout_s: How long to wait.

        Returns:
            All of them; perhaps none.

        Raises:
            OSError: The name does not resolve, or (`TimeoutError`) there was no answer in time.
        """
        entry = self._entry(host)
        try:
            return entry.answer.result(timeout_s)
        except concurrent.futures.TimeoutError as error:
            raise TimeoutError(f"no answer from the resolver within {timeout_s:.1f} s") from error

    def close(self) -> None:
        """Lets the threads go that are not stuck in a question."""
        for _ in self._threads:
            self._questions.put(None)

    def _entry(self, host: str) -> _Entry:
        now = time.monotonic()
        with self._lock:
            entry = self._entries.get(host)
            if entry is not None and now - entry.asked_at < self._life_s(entry):
                self._entries.move_to_end(host)
                return entry
            entry = self._entries[host] = _Entry(concurrent.futures.Future(), now)
            self._entries.move_to_end(host)
            if len(self._entries) > self._max_hosts:
                self._entries.popitem(last=False)
            self._num_open += 1
            if self._num_open > len(self._threads) and len(self._threads) < self._num_threads:
                # A daemon: a thread that hangs in the system's resolver must not keep the process alive.
                thread = threading.Thread(target=self._serve, name="resolver", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._questions.put((host, entry.answer))
        return entry

    def _life_s(self, entry: _Entry) -> float:
        if not entry.answer.done():
            return self._ttl_s  # asked and not yet answered: the next one waits for the same answer
        error = entry.answer.exception()
        is_passing = error is not None and getattr(error, "errno", None) != socket.EAI_NONAME
        return min(_AGAIN_S, self._ttl_s) if is_passing else self._ttl_s

    def _serve(self) -> None:
        while (question := self._questions.get()) is not None:
            host, answer = question
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                try:
                    answer.set_result(tuple(unmapped(address) for address in self._look_up(host)))
                except (OSError, ValueError) as error:  # ValueError: the host is no name (UnicodeError), or a zone id
                    answer.set_exception(error if isinstance(error, OSError) else OSError(str(error)))
            with self._lock:
                self._num_open -= 1
