"""Real processes and real signals: nothing that we start outlives us."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.errors import TransientError
from infra.processes import GuardedProcess, run_guarded

PATIENCE_S = 90.0
FOR_EVER = "import time; time.sleep(3600)"

# A command with a child in its own process group, and one that has left the group for a session of its own.
FAMILY = f"""
import os, subprocess, sys, time
for new_session in (False, True):
    child = subprocess.Popen([sys.executable, "-c", {FOR_EVER!r}], start_new_session=new_session)
    print("pid", child.pid, flush=True)
print("pid", os.getpid(), flush=True)
time.sleep(3600)
"""
POOL = """
import multiprocessing, os, time
def work(_):
    print("pid", os.getpid(), flush=True)
    time.sleep(3600)
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(work, range(2), chunksize=1)
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def await_true(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(b")")[2].split()[0] != b"Z"  # dead, though nobody has asked after it yet


def pids_in(log: Path) -> list[int]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [int(line.split()[1]) for line in lines if line.startswith("pid ")]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "child.log"


@pytest.mark.parametrize("code", [0, 1, 3, 255])
def test_the_exit_code_passes_through(log: Path, code: int) -> None:
    assert run_guarded(python(f"raise SystemExit({code})"), log_path=log) == code


def test_a_signal_passes_through_as_a_negative_number(log: Path) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        code = f"import os, signal; signal.signal(2, signal.SIG_DFL); os.kill(os.getpid(), {int(number)})"
        assert run_guarded(python(code), log_path=log) == -number


def test_a_command_that_cannot_be_started_says_so(log: Path) -> None:
    assert run_guarded(["/no/such/command"], log_path=log) == 127
    assert log.read_text() == "cannot start '/no/such/command': No such file or directory\n"


def test_output_goes_to_the_log_and_line_by_line_to_the_caller(log: Path) -> None:
    log.parent.mkdir()
    log.write_text("before\n")
    code = r"import sys; print('out ä'); sys.stdout.flush(); sys.stderr.write('10 %\r20 %\r\n\nlast'); print(end='')"
    lines: list[str] = []
    assert run_guarded(python(code), log_path=log, on_line=lines.append, env={"PYTHONIOENCODING": "utf-8"}) == 0
    assert lines == ["out ä", "10 %", "20 %", "last"]
    assert log.read_bytes() == "before\nout ä\n10 %\r20 %\r\n\nlast".encode()


def test_much_output_is_neither_lost_nor_in_the_way(log: Path) -> None:
    lines: list[str] = []
    assert run_guarded(python("for i in range(100_000): print(i)"), log_path=log, on_line=lines.append) == 0
    assert lines == [str(i) for i in range(100_000)]


def test_an_error_in_the_callers_callback_stops_the_command_and_reaches_the_caller(log: Path) -> None:
    def refuse(line: str) -> None:
        raise ValueError(f"cannot read {line!r}")

    with pytest.raises(ValueError, match="cannot read 'pid "):
        run_guarded(python(FAMILY), log_path=log, on_line=refuse, grace_s=0.2)
    assert not any(map(is_alive, pids_in(log)))


def test_environment_and_folder_are_given(log: Path, tmp_path: Path) -> None:
    code = "import os; print(os.environ['FRUIT'], os.getcwd(), os.environ.get('HOME'))"
    run_guarded(python(code), log_path=log, env={"FRUIT": "pear"}, cwd=tmp_path)
    assert log.read_text().split() == ["pear", str(tmp_path), "None"]


def test_the_command_has_a_group_of_its_own_and_default_signals(log: Path) -> None:
    code = "import os, signal; print(os.getpid(), os.getpgrp(), os.getsid(0), signal.getsignal(1) == signal.SIG_DFL)"
    with GuardedProcess(python(code), log_path=log) as process:
        assert process.wait() == 0
        pid, group, session, default = log.read_text().split()
        assert int(pid) == int(group) == process.pid == process.pgid
        assert int(session) not in (os.getsid(0), os.getpgrp())
        assert default == "True"


def test_stragglers_die_with_the_command(log: Path) -> None:
    assert run_guarded(python(FAMILY.replace("time.sleep(3600)\n", "")), log_path=log) == 0
    assert len(pids_in(log)) == 3
    assert not any(map(is_alive, pids_in(log)))


def test_several_run_at_once(tmp_path: Path) -> None:
    barrier = [tmp_path / f"here-{i}" for i in range(3)]
    code = """
import sys, time
from pathlib import Path
Path(sys.argv[1]).touch()
while not all(Path(name).exists() for name in sys.argv[2:]):
    time.sleep(0.01)
"""
    processes = [
        GuardedProcess([*python(code), path, *barrier], log_path=tmp_path / f"{path.name}.log").start()
        for path in barrier
    ]
    assert [process.wait(PATIENCE_S) for process in processes] == [0, 0, 0]
    for process in processes:
        process.close()


def test_poll_and_wait_with_a_limit(log: Path) -> None:
    with GuardedProcess(python(FOR_EVER), log_path=log) as process:
        assert process.poll() is None
        with pytest.raises(TimeoutError, match="still runs"):
            process.wait(0.05)
        assert process.terminate() == -signal.SIGTERM
        assert process.poll() == process.wait() == -signal.SIGTERM


def test_terminate_lets_a_command_end_in_its_own_way(log: Path) -> None:
    code = f"import signal, sys; signal.signal(15, lambda *_: sys.exit(7)); print('ready', flush=True); {FOR_EVER}"
    with GuardedProcess(python(code), log_path=log) as process:
        await_true(lambda: "ready" in process.last_lines(), "the handler is set")
        assert process.terminate() == 7


def test_terminate_kills_what_ignores_it(log: Path) -> None:
    code = f"import signal; signal.signal(15, signal.SIG_IGN)\n{FAMILY}"
    with GuardedProcess(python(code), log_path=log, grace_s=0.3) as process:
        await_true(lambda: len(pids_in(log)) == 3, "the family is there")
        started = time.monotonic()
        assert process.terminate() == -signal.SIGKILL
        assert time.monotonic() - started >= 0.3
        assert not any(map(is_alive, pids_in(log)))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_parent_leaves_nothing_behind(log: Path, error: type[BaseException]) -> None:
    def run() -> None:
        with GuardedProcess(python(FAMILY), log_path=log, grace_s=1.0):
            await_true(lambda: len(pids_in(log)) == 3, "the family is there")
            raise error

    with pytest.raises(error):
        run()
    assert not any(map(is_alive, pids_in(log)))


PARENT = """
import sys
from pathlib import Path
from infra.processes import run_guarded
run_guarded([sys.executable, *sys.argv[2:]], log_path=Path(sys.argv[1]))
"""


def start_parent(log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*python(PARENT), str(log), *arguments], start_new_session=True)


@pytest.mark.parametrize("whole_group", [True, False])
def test_a_killed_parent_takes_all_its_descendants_along(log: Path, whole_group: bool) -> None:
    parent = start_parent(log, "-c", FAMILY)
    try:
        await_true(lambda: len(pids_in(log)) == 3, "the family is there")
        assert all(map(is_alive, pids_in(log)))
        if whole_group:
            os.killpg(parent.pid, signal.SIGKILL)
        else:
            parent.kill()
    finally:
        parent.kill()
        parent.wait()
    await_true(lambda: not any(map(is_alive, pids_in(log))), "the family is gone")


def test_a_killed_parent_takes_a_pool_of_workers_along(log: Path, tmp_path: Path) -> None:
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    parent = start_parent(log, str(script))
    try:
        await_true(lambda: len(pids_in(log)) == 2, "the workers are there")
        os.killpg(parent.pid, signal.SIGKILL)
    finally:
        parent.kill()
        parent.wait()
    await_true(lambda: not any(map(is_alive, pids_in(log))), "the workers are gone")


FORKING_PARENT = """
import os, sys, time
from pathlib import Path
from infra.processes import GuardedProcess
process = GuardedProcess([sys.executable, "-c", sys.argv[2]], log_path=Path(sys.argv[1])).start()
fork = os.fork()
if fork:
    Path(sys.argv[3]).write_text(str(fork))
time.sleep(3600)
"""


def test_a_fork_that_holds_the_parents_socket_does_not_keep_the_command_alive(log: Path, tmp_path: Path) -> None:
    note = tmp_path / "fork"
    parent = subprocess.Popen([*python(FORKING_PARENT), str(log), FAMILY, str(note)], start_new_session=True)
    try:
        await_true(lambda: len(pids_in(log)) == 3 and note.exists() and note.read_text(), "the family is there")
        parent.kill()
        parent.wait()
        assert is_alive(int(note.read_text()))
        await_true(lambda: not any(map(is_alive, pids_in(log))), "the family is gone")
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()


def test_a_killed_guard_takes_the_command_along(log: Path) -> None:
    with GuardedProcess(python(FAMILY), log_path=log) as process:
        await_true(lambda: len(pids_in(log)) == 3, "the family is there")
        guard = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(guard, signal.SIGKILL)
        assert process.wait(PATIENCE_S) == -signal.SIGKILL
        in_group, in_session, command = pids_in(log)
        await_true(lambda: not is_alive(command) and not is_alive(in_group), "the group is gone")
        os.kill(in_session, signal.SIGKILL)  # the one case that leaves somebody behind: guard killed, and session left


def test_a_thread_that_ends_does_not_take_the_command_along(log: Path) -> None:
    started: list[GuardedProcess] = []
    thread = threading.Thread(target=lambda: started.append(GuardedProcess(python(FOR_EVER), log_path=log).start()))
    thread.start()
    thread.join()
    with pytest.raises(TimeoutError):
        started[0].wait(0.3)
    started[0].terminate()


def test_a_hung_command_is_stopped(log: Path) -> None:
    clock = itertools.count()

    def progress() -> int:  # gets on until the command has said all that it will ever say, however slow the machine
        return -1 if log.exists() and "step 2" in log.read_text() else next(clock)

    code = f"print('step 1', flush=True); print('step 2', flush=True); {FOR_EVER}"
    with pytest.raises(TransientError, match=r"(?s)time.sleep.* made no progress for 0.5 s.*step 1\nstep 2"):
        run_guarded(python(code), log_path=log, stall_timeout_s=0.5, is_alive_signal=progress, grace_s=0.2)


def test_a_command_without_a_signal_of_life_is_judged_by_its_log(log: Path) -> None:
    with pytest.raises(TransientError, match=r"made no progress for 0\.5 s"):
        run_guarded(python(FOR_EVER), log_path=log, stall_timeout_s=0.5, grace_s=0.2)


def test_a_slow_command_that_gets_on_is_left_alone(log: Path) -> None:
    progress = itertools.count().__next__
    code = "import time; time.sleep(1.5)"
    assert run_guarded(python(code), log_path=log, stall_timeout_s=0.6, is_alive_signal=progress) == 0


def test_a_command_that_takes_too_long_is_stopped(log: Path) -> None:
    with pytest.raises(TransientError, match=r"took longer than 0.3 s"):
        run_guarded(python(FAMILY), log_path=log, timeout_s=0.3, grace_s=0.2)
    assert not any(map(is_alive, pids_in(log)))
