"""Decodes strangers' files in processes that may die without harm.

A file can make a decoder crash, hang or take all memory; here that costs a process of a few milliseconds and the one
row, which gets a named reason: ``DECODER_DIED``, ``DECODE_TIMED_OUT`` or ``DECODE_OUT_OF_MEMORY``. See `decoder` for
what such a process may do.
"""

import collections
import contextlib
import fcntl
import itertools
import json
import logging
import mmap
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Self

from infra.errors import TransientError
from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.reasons import Reason
from preprocessing.download import decoder
from preprocessing.download.addresses import Verdict
from preprocessing.download.images import NormalizedImage

LOGGER = logging.getLogger(__name__)

_START_S = 60.0
_ANSWER_S = 20.0  # the nursery forks or kills in milliseconds
_NUM_TRIES = 2  # of a picture whose decoder was killed, and of starting the nursery
_PICTURES_A_DECODER = 4096  # then a fresh one: what a C library leaks does not add up
_SOCKET_BUFFER_BYTES = 1 << 20
_MAX_OVERHEAD_BYTES = 1 << 16
_ANSWER_BYTES = 4096  # longer than all answers but the pictures that do not fit into the shared memory
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
# What a decoder may know of our environment: no secret is among it.
_INHERITED = frozenset({"PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ"})


@dataclass(frozen=True)
class Limits:
    """What one picture may cost.

    Attributes:
        memory_bytes: Address space, on top of what a decoder has when it is born.
        cpu_s: Processor time; counted in whole seconds, so up to one more.
        wall_s: Time from handing the file over to the answer, a second try included; so that with the clearing up a
            caller waits 15 s at most for a picture.
    """

    memory_bytes: int = 1_500_000_000
    cpu_s: float = 10.0
    wall_s: float = 14.0


class Decoders:
    """A pool of decoder processes; a context manager that leaves none behind, even if we are killed.

    Args:
        config: ``image_size_px``, ``encode_quality`` and the limits on pictures are used.
        num_processes: Default: as many as there are cores for us.
        limits: What one picture may cost.
    """

    def __init__(
        self, config: DownloadConfig, num_processes: int | None = None, *, limits: Limits | None = None
    ) -> None:
        self.num_processes = num_processes or len(os.sched_getaffinity(0))
        self._config = config
        self._limits = limits or Limits()
        self._nursery: _Nursery | None = None
        self._lock = threading.Lock()  # one word to the nursery at a time
        self._idle: queue.LifoQueue[_Decoder | None] = queue.LifoQueue()  # None: a place without a process
        self._alive: dict[int, _Decoder] = {}
        self._is_closed = False

    def __enter__(self) -> Self:
        try:
            for _ in range(self.num_processes):
                self._idle.put(self._start())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the decoders that live now."""
        with self._lock:
            return tuple(self._alive)

    def normalize(self, data: bytes) -> NormalizedImage | Verdict:
        """`images.normalize_image` in another process. Blocks; may be called from many threads.

        A decoder that is killed by a signal (a crash, the kernel's out-of-memory killer, an operator) is replaced, and
        the picture tried once more, within the same ``wall_s``; one that overran its time is not tried again.

        Args:
            data: The file as it arrived.

        Returns:
            The picture, or a drop reason with its detail.

        Raises:
            TransientError: No decoder could be started.
        """
        return self.normalize_all([data])[0]

    def normalize_all(self, files: Sequence[bytes]) -> list[NormalizedImage | Verdict]:
        """`normalize` for several files, one after the other: handing them over together costs less.

        Args:
            files: As they arrived.

        Returns:
            Of each, in order, the picture, or a drop reason with its detail.

        Raises:
            TransientError: No decoder could be started.
        """
        if self._is_closed:
            raise RuntimeError("these Decoders are closed")
        worker = self._idle.get()
        results: list[NormalizedImage | Verdict] = []
        try:
            while len(results) < len(files):
                given, worker = worker, None  # one that fails is not put back
                worker = self._ask(given, files[len(results) :], results)
            return results
        finally:
            self._idle.put(worker)

    def _ask(
        self, worker: "_Decoder | None", files: Sequence[bytes], results: list[NormalizedImage | Verdict]
    ) -> "_Decoder | None":
        """Adds what becomes of at least the first of some files; and the decoder, unless it has ended."""
        deadline = time.monotonic() + self._limits.wall_s
        num_before = len(results)
        for attempt in range(1, _NUM_TRIES + 1):
            if worker is None:
                worker = self._start()
            try:
                for _ in range(worker.ask(files[:1] if attempt > 1 else files, deadline)):
                    results.append(worker.answer(deadline))
                    deadline = time.monotonic() + self._limits.wall_s
                    if worker.is_spent:
                        break
            except TimeoutError:
                self._end(worker)
                results.append((Reason.DECODE_TIMED_OUT, f"took over {self._limits.wall_s:g} s"))
                return None
            except _DeadError as error:
                how = self._end(worker)
                worker = None
                if how == signal.SIGXCPU.name:
                    detail = f"took over {self._limits.cpu_s:g} s of processor time"
                    results.append((Reason.DECODE_TIMED_OUT, detail))
                    return None
                LOGGER.warning("download: a decoder ended with %s%s", how, error)
                if len(results) > num_before:
                    return None  # what it died of is the first of those that are left, and tried again
                if attempt == _NUM_TRIES:
                    results.append((Reason.DECODER_DIED, f"its decoder ended with {how}{error}"))
                continue
            if worker.is_spent or worker.num_asked >= _PICTURES_A_DECODER:
                self._end(worker)
                return None
            return worker
        return None

    def close(self) -> None:
        """Ends all of them; a file that is still being decoded counts as its decoder's death."""
        self._is_closed = True
        with self._lock:
            nursery, self._nursery = self._nursery, None
            if nursery is not None:
                nursery.close()
            for worker in self._alive.values():
                worker.hang_up()
            self._alive.clear()

    def _start(self) -> "_Decoder":
        """A fresh decoder, from a fresh nursery if the old one has died."""
        with self._lock:
            for attempt in range(1, _NUM_TRIES + 1):
                if self._is_closed:
                    raise TransientError("download: the decoders were closed while a picture waited for one")
                if self._nursery is None:
                    self._nursery = _Nursery(self._config, self._limits)
                try:
                    worker = self._nursery.fork()
                except OSError as error:
                    LOGGER.warning("download: the decoders' nursery has died (%s), attempt %d", error, attempt)
                    self._nursery.close()
                    self._nursery = None
                    continue
                self._alive[worker.pid] = worker
                return worker
        raise TransientError(f"download: no decoder could be started, in {_NUM_TRIES} attempts; see the log")

    def _end(self, worker: "_Decoder") -> str:
        """Ends a decoder and says how it ended: a signal's name or an exit code."""
        with self._lock:
            self._alive.pop(worker.pid, None)
            worker.hang_up()
            try:
                status = decoder.UNKNOWN_PID if self._nursery is None else self._nursery.end(worker.pid)
            except OSError:
                status = decoder.UNKNOWN_PID  # the nursery died, and its decoders with it; `_start` sees to it
        if status == decoder.UNKNOWN_PID:
            return "its nursery"
        code = os.waitstatus_to_exitcode(status)
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
        return f"code {code}"


class _DeadError(Exception):
    """A decoder hung up, or answered what no decoder says; the message is empty or starts with a separator."""


class _Nursery:
    """The process that forks decoders. Not thread-safe."""

    def __init__(self, config: DownloadConfig, limits: Limits) -> None:
        self._most = 4 * int(config.image_size_px**2 * config.max_aspect) + _MAX_OVERHEAD_BYTES
        ours, its = socket.socketpair()
        self._link = ours
        with its:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    decoder.__name__,
                    str(its.fileno()),
                    json.dumps(asdict(limits)),
                    config.model_dump_json(),
                ],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                pass_fds=[its.fileno()],
            )
        try:
            ours.settimeout(_START_S)
            self._read_status()
        except OSError as error:
            self.close()
            raise TransientError(f"download: the decoders' nursery did not start: {error}") from error
        ours.settimeout(_ANSWER_S)

    def fork(self) -> "_Decoder":
        """A fresh decoder.

        Raises:
            OSError: The nursery is dead.
        """
        ours, its = socket.socketpair()
        memory = os.memfd_create("picture", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            for end in (ours, its):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
            os.ftruncate(memory, decoder.SHARED_BYTES)
            # Memory that the other side cuts off would kill whoever reads it.
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
            shared = mmap.mmap(memory, decoder.SHARED_BYTES)
            socket.send_fds(self._link, [decoder.WORD.pack(b"F", 0)], [its.fileno(), memory])
            return _Decoder(self._read_status(), ours, shared, self._most)
        except OSError:
            ours.close()
            raise
        finally:
            its.close()
            os.close(memory)

    def end(self, pid: int) -> int:
        """Kills a decoder and returns its wait status.

        Raises:
            OSError: The nursery is dead.
        """
        self._link.sendall(decoder.WORD.pack(b"E", pid))
        return self._read_status()

    def close(self) -> None:
        """Ends the nursery and, since they die with it, every decoder."""
        self._link.close()
        self._process.kill()
        self._process.wait()

    def _read_status(self) -> int:
        status = self._link.recv(decoder.STATUS.size, socket.MSG_WAITALL)
        if len(status) < decoder.STATUS.size:
            raise ConnectionResetError("it hung up")
        return decoder.STATUS.unpack(status)[0]


class _Decoder:
    """One decoder process, asked by one thread at a time.

    Attributes:
        pid: Its process id.
        num_asked: Files it was given.
        is_spent: Whether it has ended itself after its answer.
    """

    def __init__(self, pid: int, link: socket.socket, shared: mmap.mmap, most: int) -> None:
        self.pid = pid
        self.num_asked = 0
        self.is_spent = False
        self._link = link
        self._shared = shared
        self._most = most
        self._received = bytearray()
        self._lengths = collections.deque[int]()  # of the files that are not answered
        self._offset = self._room = 0  # of the next of them, in the shared memory

    def ask(self, files: Sequence[bytes], deadline: float) -> int:
        """Hands files over: as many of the first ones as there is room for, at least one.

        Returns:
            How many; for each of them `answer` is to be called.

        Raises:
            TimeoutError: They were not taken by the deadline (on the monotonic clock).
            _DeadError: The decoder is dead.
        """
        small = itertools.takewhile(lambda data: len(data) <= decoder.SLOT_BYTES, files[: decoder.NUM_SLOTS])
        some = list(small) or files[:1]
        room = decoder.SLOT_BYTES if len(some) > 1 else decoder.SHARED_BYTES
        self._lengths = collections.deque(len(data) for data in some)
        self.num_asked += len(some)
        message: list[bytes] = []
        try:
            for slot, data in enumerate(some):
                offset = slot * decoder.SLOT_BYTES
                message.append(decoder.REQUEST.pack(offset, len(data), room))
                if len(data) <= room:
                    self._shared[offset : offset + len(data)] = data
                else:
                    message.append(data)
            self._link.settimeout(_left_s(deadline))
            self._link.sendall(b"".join(message))
        except TimeoutError:
            raise
        except (OSError, ValueError) as error:  # ValueError: somebody has closed the memory
            raise _DeadError from error
        self._offset, self._room = 0, room
        return len(some)

    def answer(self, deadline: float) -> NormalizedImage | Verdict:
        """Waits for what becomes of the next of the files.

        Raises:
            TimeoutError: There was no answer by the deadline (on the monotonic clock).
            _DeadError: There will be none.
        """
        try:
            answer = self._read(*self._receive(self._most + self._lengths.popleft(), deadline))
        except TimeoutError:
            raise
        except (OSError, ValueError) as error:
            raise _DeadError from error
        self._offset += decoder.SLOT_BYTES
        return answer

    def _receive(self, most: int, deadline: float) -> tuple[int, bytes]:
        """Kind and body of the next answer."""
        received, wanted = self._received, decoder.ANSWER.size
        while True:
            if len(received) >= decoder.ANSWER.size:
                kind, length = decoder.ANSWER.unpack_from(received)
                if length > most:
                    raise _DeadError(f", after it announced {length:,} bytes")
                wanted = decoder.ANSWER.size + length
                if len(received) >= wanted:
                    body = bytes(received[decoder.ANSWER.size : wanted])
                    del received[:wanted]
                    return kind, body
            self._link.settimeout(_left_s(deadline))
            piece = self._link.recv(max(_ANSWER_BYTES, wanted - len(received)))
            if not piece:
                raise ConnectionResetError
            received += piece

    def _read(self, kind: int, body: bytes) -> NormalizedImage | Verdict:
        try:
            if kind != decoder.KIND_PICTURE:
                reason, _, detail = body.decode().partition("\n")
                self.is_spent = kind == decoder.KIND_LAST
                return Reason(reason), detail[: decoder.MAX_DETAIL_CHARS]
            width, height, original_width, original_height, sha256, length = decoder.PICTURE.unpack_from(body)
        except (ValueError, decoder.struct.error) as error:
            raise _DeadError(", after an answer that makes no sense") from error
        shared = self._shared[self._offset : self._offset + length] if length <= self._room else b""
        image = shared or body[decoder.PICTURE.size :]
        if len(image) != length:
            raise _DeadError(", after a picture of another length than it announced")
        return NormalizedImage(image, width, height, original_width, original_height, sha256.hex())

    def hang_up(self) -> None:
        """Closes the socket: whoever waits on it wakes, here and there. The memory goes with it."""
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        self._link.close()
        self._shared.close()


def _left_s(deadline: float) -> float:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in _INHERITED}
    paths = [os.path.abspath(path) for path in sys.path]
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
