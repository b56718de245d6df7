"""Decodes strangers' files in processes that may die without harm.

A file can make a decoder crash, hang or take all memory; here that costs a process of a few milliseconds and the one
row, which gets a named reason: ``DECODER_DIED``, ``DECODE_TIMED_OUT`` or ``DECODE_OUT_OF_MEMORY``. See `decoder` for
what such a process may do.
"""

import contextlib
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
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
        if self._is_closed:
            raise RuntimeError("these Decoders are closed")
        worker = self._idle.get()
        try:
            deadline = time.monotonic() + self._limits.wall_s
            verdict: NormalizedImage | Verdict = Reason.DECODER_DIED, "was not decoded"
            for _ in range(_NUM_TRIES):
                if worker is None:
                    worker = self._start()
                try:
                    return worker.ask(data, deadline)
                except TimeoutError:
                    self._end(worker)
                    worker = None
                    return Reason.DECODE_TIMED_OUT, f"took over {self._limits.wall_s:g} s"
                except _DeadError as error:
                    how = self._end(worker)
                    worker = None
                    if how == signal.SIGXCPU.name:
                        return Reason.DECODE_TIMED_OUT, f"took over {self._limits.cpu_s:g} s of processor time"
                    verdict = Reason.DECODER_DIED, f"its decoder ended with {how}{error}"
                    LOGGER.warning("download: a decoder ended with %s%s", how, error)
            return verdict
        finally:
            if worker is not None and (worker.is_spent or worker.num_asked >= _PICTURES_A_DECODER):
                self._end(worker)
                worker = None
            self._idle.put(worker)

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
        with its:
            try:
                for end in (ours, its):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
                socket.send_fds(self._link, [decoder.WORD.pack(b"F", 0)], [its.fileno()])
                return _Decoder(self._read_status(), ours, self._most)
            except OSError:
                ours.close()
                raise

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

    def __init__(self, pid: int, link: socket.socket, most: int) -> None:
        self.pid = pid
        self.num_asked = 0
        self.is_spent = False
        self._link = link
        self._most = most

    def ask(self, data: bytes, deadline: float) -> NormalizedImage | Verdict:
        """Hands a file over and waits for what becomes of it.

        Raises:
            TimeoutError: There was no answer by the deadline (on the monotonic clock).
            _DeadError: There will be none.
        """
        self.num_asked += 1
        try:
            self._send(decoder.LENGTH.pack(len(data)), deadline)
            self._send(data, deadline)
            kind, length = decoder.ANSWER.unpack(self._receive(decoder.ANSWER.size, deadline))
            if length > self._most + len(data):
                raise _DeadError(f", after it announced {length:,} bytes")
            return self._read(kind, self._receive(length, deadline))
        except TimeoutError:
            raise
        except OSError as error:
            raise _DeadError from error

    def _read(self, kind: int, body: bytes) -> NormalizedImage | Verdict:
        try:
            if kind != decoder.KIND_PICTURE:
                reason, _, detail = body.decode().partition("\n")
                self.is_spent = kind == decoder.KIND_LAST
                return Reason(reason), detail[: decoder.MAX_DETAIL_CHARS]
            width, height, original_width, original_height, sha256 = decoder.PICTURE.unpack_from(body)
        except (ValueError, decoder.struct.error) as error:
            raise _DeadError(", after an answer that makes no sense") from error
        image = body[decoder.PICTURE.size :]
        return NormalizedImage(image, width, height, original_width, original_height, sha256.hex())

    def hang_up(self) -> None:
        """Closes the socket: whoever waits on it wakes, here and there."""
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        self._link.close()

    def _send(self, data: bytes, deadline: float) -> None:
        self._link.settimeout(_left_s(deadline))
        self._link.sendall(data)

    def _receive(self, num_bytes: int, deadline: float) -> bytes:
        buffer = bytearray(num_bytes)
        view = memoryview(buffer)
        while view:
            self._link.settimeout(_left_s(deadline))
            count = self._link.recv_into(view)
            if count == 0:
                raise ConnectionResetError
            view = view[count:]
        return bytes(buffer)


def _left_s(deadline: float) -> float:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in _INHERITED}
    paths = [os.path.abspath(path) for path in sys.path]
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
