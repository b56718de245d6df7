"""Child processes that never outlive us: each command in a process group of its own, under a guard.

Downloads and trainings run as children, often with children of their own (pools, data loaders). Whatever happens to us,
an exception, Ctrl-C, a SIGKILL of our whole process group, all of them must end: a forgotten trainer would go on
writing and hold its device. No code of ours runs when we are killed, so a small process beside us, `infra.guard`, sees
to it.
"""

import collections
import contextlib
import contextvars
import logging
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, BinaryIO, Self

from infra.errors import TransientError

_log = logging.getLogger(__name__)
_GUARD = Path(__file__).with_name("guard.py").resolve()
_START_S = 60.0
_READ_BYTES = 1 << 16
_LONGEST_LINE_BYTES = 1 << 16
_NUM_LAST_LINES = 20
_WATCH_S = 0.25
_DRAIN_S = 5.0

Relay = Callable[["GuardedProcess", str], None]
_relay: contextvars.ContextVar[Relay | None] = contextvars.ContextVar("relay", default=None)


@contextlib.contextmanager
def relayed_to(relay: Relay) -> Iterator[None]:
    """Hears each line of every child that is started in the block, whoever starts it.

    Args:
        relay: Called, from a thread of the child's, with the child and the line. It must not raise.
    """
    token = _relay.set(relay)
    try:
        yield
    finally:
        _relay.reset(token)


class GuardedProcess:
    """One command under a guard; a context manager that leaves nothing running behind it.

    The command gets no stdin. Its stdout and stderr are appended to a log file and handed on line by line.

    Attributes:
        argv: The command.
        log_path: Where its output goes.
        pid: The command's process id, which is also its process group's; 0 before `start`.
        returncode: Its exit code, the negative signal number if it was killed, None while it runs.

    Args:
        argv: The command and its arguments. One that cannot be started ends with 127 and says so in the log.
        env: Its whole environment; None for ours.
        cwd: Its working directory; None for ours.
        log_path: File to append to; its folder is made if need be.
        on_line: Called, from a thread, with each line of output that is not blank (a carriage return ends a line
            too, for progress bars). What it raises is raised again by `wait`.
        grace_s: Seconds between TERM and KILL when it is stopped.
    """

    def __init__(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        log_path: Path,
        on_line: Callable[[str], None] | None = None,
        grace_s: float = 10.0,
    ) -> None:
        self.argv = [os.fspath(word) for word in argv]
        self.log_path = log_path
        self.pid = 0
        self.returncode: int | None = None
        self._env = env
        self._cwd = cwd
        self._on_line = on_line
        self._relay = _relay.get()
        self._grace_s = grace_s
        self._guard: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._said = b""
        self._reader: threading.Thread | None = None
        self._last_lines: collections.deque[str] = collections.deque(maxlen=_NUM_LAST_LINES)
        self._on_line_error: BaseException | None = None

    @property
    def pgid(self) -> int:
        """The command's process group."""
        return self.pid

    def start(self) -> Self:
        """Start the command.

        Raises:
            TransientError: The machine could not start the guard.
        """
        if self._guard is not None:
            raise RuntimeError("a GuardedProcess runs once")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        ours, guards = socket.socketpair()
        self._link = ours
        try:
            with guards:
                self._guard = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(_GUARD), str(guards.fileno()), *self.argv],
                    env=None if self._env is None else dict(self._env),
                    cwd=self._cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=[guards.fileno()],
                    start_new_session=True,
                    bufsize=0,
                )
            self._reader = threading.Thread(target=self._read, name=f"output of {self.argv[0]}", daemon=True)
            self._reader.start()
            if not self._hear(_START_S) or (self.pid == 0 and self.returncode is None):
                raise TransientError(f"{self.name} was not started within {_START_S:.0f} s")
        except BaseException:
            self.close()
            raise
        return self

    @property
    def name(self) -> str:
        """The command as one would type it, cut to a readable length."""
        line = shlex.join(self.argv)
        return line if len(line) <= 200 else f"{line[:197]}..."

    def poll(self) -> int | None:
        """Return the exit code if the command has ended, else None."""
        while self.returncode is None and self._hear(0):
            pass
        return self.returncode

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for the end of the command and of all its descendants.

        Args:
            timeout_s: How long; None for ever.

        Returns:
            The exit code, or the negative signal number if it was killed.

        Raises:
            TimeoutError: It still runs.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self.returncode is None:
            left_s = _WATCH_S if deadline is None else min(_WATCH_S, deadline - time.monotonic())
            if self._on_line_error is not None:
                self.terminate()
                break
            if left_s < 0:
                raise TimeoutError(f"{self.name} still runs after {timeout_s} s")
            self._hear(left_s)
        self._drain()
        if self._on_line_error is not None:
            raise self._on_line_error
        return self.returncode if self.returncode is not None else -signal.SIGKILL

    def terminate(self, grace_s: float | None = None) -> int:
        """Stop the command and all its descendants: TERM, and KILL to those that are left after a while.

        Args:
            grace_s: How long to wait between the two; None for the process's own.

        Returns:
            The exit code, as from `wait`.
        """
        grace_s = self._grace_s if grace_s is None else grace_s
        if self.poll() is None and self._link is not None:
            with contextlib.suppress(OSError):
                self._link.sendall(f"stop {grace_s:.3f}\n".encode())
            deadline = time.monotonic() + grace_s + _START_S
            while self.returncode is None and time.monotonic() < deadline:
                self._hear(_WATCH_S)
        self.close()
        return self.returncode if self.returncode is not None else -signal.SIGKILL

    def last_lines(self) -> str:
        """Return the last lines of the output, for messages."""
        return "\n".join(self._last_lines)

    def close(self) -> None:
        """Release everything; what still runs is killed at once."""
        if self._link is not None:
            self._link.close()  # the end of file is the guard's order to kill
            self._link = None
        if self._guard is not None:
            try:
                self._guard.wait(timeout=_START_S)
            except subprocess.TimeoutExpired:
                self._guard.kill()
                self._guard.wait()
            if self.returncode is None:
                self.returncode = -signal.SIGKILL
        self._drain()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.terminate()
        finally:  # a second Ctrl-C, while we wait for the first one's grace
            self.close()

    def _hear(self, timeout_s: float) -> bool:
        """Take in what the guard says; return whether it said anything."""
        if self._link is None or not select.select([self._link], [], [], max(0.0, timeout_s))[0]:
            return False
        try:
            said = self._link.recv(4096)
        except OSError:
            said = b""
        if not said:
            self._lose_guard()
            return True
        *lines, self._said = (self._said + said).split(b"\n")
        for line in lines:
            word, value = line.split()
            if word == b"pid":
                self.pid = int(value)
            else:
                self.returncode = int(value)
        return True

    def _lose_guard(self) -> None:
        """Do the guard's work where somebody killed it: the command has died with it, its own children may live."""
        if self.returncode is None:
            self.returncode = -signal.SIGKILL
            if self.pid:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)

    def _drain(self) -> None:
        """Wait for the last lines; not for ever, since a process that could not be killed may hold the pipe."""
        if self._reader is not None and self._reader is not threading.current_thread():
            self._reader.join(_DRAIN_S)

    def _read(self) -> None:
        assert self._guard is not None
        assert self._guard.stdout is not None
        with self._guard.stdout as output, open(self.log_path, "ab") as log:
            self._copy(output, log)

    def _copy(self, output: IO[bytes], log: BinaryIO) -> None:
        rest = b""
        while data := output.read(_READ_BYTES):
            log.write(data)
            log.flush()
            *lines, rest = (rest + data).replace(b"\r", b"\n").split(b"\n")
            if len(rest) > _LONGEST_LINE_BYTES:
                lines.append(rest)
                rest = b""
            for line in lines:
                self._hand_on(line)
        self._hand_on(rest)

    def _hand_on(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if not text:
            return
        self._last_lines.append(text)
        if self._relay is not None:
            self._relay(self, text)
        if self._on_line is not None and self._on_line_error is None:
            try:
                self._on_line(text)
            except BaseException as error:  # raised again in the thread that waits; this one must go on reading
                self._on_line_error = error


def run_guarded(
    argv: Sequence[str | os.PathLike[str]],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    log_path: Path,
    on_line: Callable[[str], None] | None = None,
    stall_timeout_s: float | None = None,
    is_alive_signal: Callable[[], object] | None = None,
    timeout_s: float | None = None,
    grace_s: float = 10.0,
) -> int:
    """Run a command to its end under a guard, and watch that it gets on.

    Args:
        argv: The command and its arguments.
        env: Its whole environment; None for ours.
        cwd: Its working directory; None for ours.
        log_path: File to which its output is appended.
        on_line: Called, from a thread, with each line of its output.
        stall_timeout_s: How long `is_alive_signal` may stay the same before the command counts as hung.
        is_alive_signal: Returns something that changes while the command gets on: a count of files, a step. None for
            the size of the log.
        timeout_s: How long the command may take in all.
        grace_s: Seconds between TERM and KILL when it is stopped.

    Returns:
        The exit code, or the negative signal number if it was killed.

    Raises:
        TransientError: It hung or took too long, and was stopped; names the command, the time and the log's last lines.
    """
    process = GuardedProcess(argv, env=env, cwd=cwd, log_path=log_path, on_line=on_line, grace_s=grace_s)
    signal_of_life = is_alive_signal or (lambda: log_path.stat().st_size if log_path.exists() else 0)
    with process:
        started = changed = time.monotonic()
        last = signal_of_life() if stall_timeout_s is not None else None
        while True:
            try:
                return process.wait(_WATCH_S)
            except TimeoutError:
                now = time.monotonic()
            if stall_timeout_s is not None:
                value = signal_of_life()
                if value != last:
                    last, changed = value, now
                elif now - changed > stall_timeout_s:
                    _stop_and_raise(process, f"made no progress for {stall_timeout_s:g} s")
            if timeout_s is not None and now - started > timeout_s:
                _stop_and_raise(process, f"took longer than {timeout_s:g} s")


def _stop_and_raise(process: GuardedProcess, what: str) -> None:
    _log.warning("%s %s; it is being stopped", process.name, what)
    process.terminate()
    raise TransientError(
        f"{process.name} {what} and was stopped; the last lines of {process.log_path}:\n{process.last_lines()}"
    )
