"""The guard: a small process that starts one command, and takes care that nothing of it outlives its parent.

Run by path, with nothing but the standard library: ``python -I -S guard.py FD COMMAND ARGUMENT…``. FD is one end of a
socket pair, the parent's only link. The guard is in a session of its own, so that no signal to the parent's group
reaches it; the command is in a process group of its own below it. On the socket:

* the guard says ``pid N`` when the command runs, and ``exit CODE`` (negative: killed by that signal) when all is gone;
* the parent says ``stop SECONDS``: TERM to the group, and KILL after so many seconds;
* the end of file, which the kernel delivers however the parent dies, means KILL at once.

The guard adopts orphans (Linux: PR_SET_CHILD_SUBREAPER), so that descendants that left the group are found and killed
too; and the command dies with the guard (PR_SET_PDEATHSIG), should somebody kill that.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Iterator

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_CANNOT_START = 127
_CHECK_PARENT_S = 1.0
_GIVE_UP_S = 20.0  # a process in an uninterruptible wait (a dead network disk) cannot even be killed


def main(link: int, argv: list[str]) -> int:
    """Start the command, and return when nothing of it is left.

    Args:
        link: The socket to the parent.
        argv: The command.

    Returns:
        The guard's own exit code, always 0; the command's goes through the socket.
    """
    parent = os.getppid()
    os.set_inheritable(link, False)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    child = _start(argv)
    _say(link, f"pid {child}")
    # The guard holds no end of the output: its reader sees the end of file when the command's processes are gone.
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)
    status = _watch(link, wake_read, parent, child)
    status = _kill_all(child, status)
    _say(link, f"exit {os.waitstatus_to_exitcode(status) if status is not None else -signal.SIGKILL}")
    return 0


def _start(argv: list[str]) -> int:
    guard = os.getpid()
    child = os.fork()
    if child:
        with contextlib.suppress(OSError):  # the child does it as well: whoever comes first
            os.setpgid(child, child)
        return child
    try:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)  # what is ignored stays ignored through exec
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == guard:
            os.execvp(argv[0], argv)  # noqa: S606 - from an argument list, and no shell is wanted
    except OSError as error:
        os.write(2, f"cannot start {argv[0]!r}: {error.strerror}\n".encode())
    finally:
        os._exit(_CANNOT_START)


def _watch(link: int, wake: int, parent: int, child: int) -> int | None:
    """Wait until the command ends, or must end.

    Returns:
        The command's wait status; None if it must be killed now.
    """
    poll = select.poll()
    poll.register(link, select.POLLIN)
    poll.register(wake, select.POLLIN)
    deadline = None
    while True:
        status = _reap(child)
        if status is not None:
            return status
        # A process that the parent has forked may hold the socket open after the parent's death: so look for that, too.
        wait_s = _CHECK_PARENT_S if deadline is None else min(_CHECK_PARENT_S, deadline - time.monotonic())
        if wait_s <= 0 or os.getppid() != parent:
            return None
        for descriptor, _ in poll.poll(wait_s * 1000 + 1):
            if descriptor == wake:
                os.read(wake, 4096)
                continue
            try:
                words = os.read(link, 4096).split()
            except OSError:
                return None
            if not words:
                return None
            grace_s = float(words[-1])  # the newest word counts: a second, more impatient stop shortens the first
            deadline = time.monotonic() + grace_s
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child, signal.SIGTERM)


def _reap(child: int) -> int | None:
    """Bury whoever has died, adopted orphans included; return the command's wait status if it was among them."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == child:
                found = status
            if pid == 0:
                break
    return found


def _kill_all(child: int, status: int | None) -> int | None:
    """Kill the group and every descendant: orphans become the guard's children, so this ends when it has none."""
    give_up = time.monotonic() + _GIVE_UP_S
    while time.monotonic() < give_up:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        for pid in _children():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while True:
                pid, reaped = os.waitpid(-1, os.WNOHANG)
                if pid == child:
                    status = reaped
                if pid == 0:
                    break
        except ChildProcessError:
            return status
        time.sleep(0.01)
    return status


def _children() -> Iterator[int]:
    me = str(os.getpid()).encode()
    with contextlib.suppress(FileNotFoundError):  # no /proc: the group has to do
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                    # pid (name) state parent …, where the name may hold anything
                    if file.read().rpartition(b")")[2].split()[1] == me:
                        yield int(name)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _say(link: int, line: str) -> None:
    with contextlib.suppress(OSError):  # nobody may be left to hear it
        os.write(link, f"{line}\n".encode())


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
