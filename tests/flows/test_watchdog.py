"""The watch over a stage: real children that stand still, real time, a real diagnosis."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flows import watchdog
from flows.watchdog import current, descendants, watching
from infra import pulse
from infra.errors import GateError, TransientError
from infra.processes import GuardedProcess, run_guarded
from tests.integration.prefect_world import await_true

COUNTS = "import os, time\nfor i in range(10**6):\n    print('row', i, os.getpid(), flush=True)\n    time.sleep(0.05)"


def test_a_child_that_stands_still_ends_the_stage_with_a_diagnosis(tmp_path: Path) -> None:
    began = time.monotonic()
    lines = 0

    def on_line(line: str) -> None:
        nonlocal lines
        lines += 1
        watch.note(lines, 10**6)
        if lines == 20:
            os.kill(int(line.split()[2]), signal.SIGSTOP)

    with (  # noqa: PT012
        pytest.raises(TransientError) as caught,
        watching("download", limit_s=2) as watch,
        GuardedProcess([sys.executable, "-c", COUNTS], log_path=tmp_path / "log.txt", on_line=on_line) as process,
    ):
        process.wait(60)
        raise TransientError("rank 0 was killed by SIGKILL")
    assert time.monotonic() - began < 30
    said = str(caught.value)
    assert said.startswith("download: no progress for 2 s (operations.stall_timeout_s = 2); it has stood at 2")
    assert f"{process.pid} (" in said
    assert "stopped" in said
    assert "sockets open" in said
    assert f"the last line of {tmp_path / 'log.txt'}: 'row" in said
    assert "\n" not in said
    assert "rank 0 was killed" in str(caught.value.__cause__)
    assert not Path(f"/proc/{process.pid}").exists()


def test_a_stage_that_gets_on_is_left_alone(tmp_path: Path) -> None:
    with watching("encode", limit_s=0.6) as watch:
        assert current() is watch
        for done in range(8):
            time.sleep(0.2)
            watch.note(done, 8)
        for _ in range(8):  # within one shard
            time.sleep(0.2)
            pulse.beat()
    assert current() is None


def test_the_same_count_again_is_no_progress() -> None:
    with (  # noqa: PT012
        pytest.raises(TransientError, match="it has stood at 3 of 9"),
        watching("encode", limit_s=0.5) as watch,
    ):
        while True:
            watch.note(3, 9)
            time.sleep(0.05)


def test_work_of_our_own_that_hangs_is_interrupted_in_whatever_thread() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with watching("select", limit_s=0.5):
                while True:
                    time.sleep(0.05)
        except TransientError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert "operations.stall_timeout_s = 0.5" in str(errors[0])


def test_what_a_stage_raises_by_itself_is_not_touched() -> None:
    with pytest.raises(GateError, match="too few"), watching("select", limit_s=60):
        raise GateError("too few")


def test_an_ordinary_handler_of_errors_does_not_take_the_interruption() -> None:
    def stubborn() -> None:
        while True:
            try:
                time.sleep(0.05)
            except Exception:  # noqa: S112 - as a per-row boundary would
                continue

    with pytest.raises(TransientError, match="no progress"), watching("encode", limit_s=0.5):
        stubborn()


def test_only_what_the_stage_has_started_under_a_guard_is_killed(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(3600)"]
    with GuardedProcess(sleep, log_path=tmp_path / "server") as server:
        _end_a_stage(tmp_path)
        assert server.poll() is None


def _end_a_stage(tmp_path: Path) -> None:
    others = {child.pid for child in descendants()}  # servers of other tests
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with pytest.raises(TransientError), watching("train", limit_s=1):
            run_guarded([sys.executable, "-c", "import time; time.sleep(3600)"], log_path=tmp_path / "log")
        assert bystander.poll() is None
        assert {child.pid for child in descendants()} - others == {bystander.pid}
    finally:
        bystander.kill()
        bystander.wait()


def test_children_are_relayed_seldom_with_a_count_and_the_last_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = "for i in range(500): print('@lacuna {}'); print('line', i)\nprint('WARNING: odd')\nprint('the end')"
    with caplog.at_level("INFO", logger="flows.child_logs"), watching("train", limit_s=60):
        run_guarded([sys.executable, "-c", code], log_path=tmp_path / "rank-0.log")
    said = [record.getMessage() for record in caplog.records if record.name == "flows.child_logs"]
    assert 3 <= len(said) < 10
    assert said[0] == "train rank-0: line 0"
    assert [record.levelname for record in caplog.records if "odd" in record.getMessage()] == ["WARNING"]
    assert any(
        text.startswith("train rank-0: the end (") and text.endswith("lines before it left out)") for text in said
    )
    assert not any("@lacuna" in text for text in said)
    assert (tmp_path / "rank-0.log").read_text().count("line") == 500


ORPHAN = """
import os, subprocess, sys
flow = '''
import os, signal, sys, time
os.environ["PREFECT__FLOW_RUN_ID"] = "any"
import flows.prepare
def told(number, frame):
    print("told to end", flush=True)
    sys.exit(7)
signal.signal(signal.SIGTERM, told)
print("pid", os.getpid(), flush=True)
time.sleep(3600)
'''
subprocess.run([sys.executable, "-c", flow])
"""


def test_a_flow_whose_worker_is_killed_ends_by_itself_between_two_stages_too() -> None:
    worker = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    with worker.stdout:
        pid = int(worker.stdout.readline().split()[1])
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
        assert worker.stdout.readline() == "told to end\n"
    await_true(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text(), "its end", 30)


def test_outside_a_worker_nobody_is_missed() -> None:
    assert watchdog._WORKER_PID is None


def test_a_console_that_nobody_reads_any_more_ends_no_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise SystemExit(1)  # as rich does for a broken pipe

    logger = logging.Logger("gone")
    logger.addHandler(Gone())
    monkeypatch.setattr(watchdog, "run_logger", lambda: logger)
    code = "for i in range(10**5): print('a line that must be read, or the child stands still')"
    with pytest.raises(TransientError, match="no progress"), watching("train", limit_s=3):  # noqa: PT012
        assert run_guarded([sys.executable, "-c", code], log_path=tmp_path / "log", timeout_s=60) == 0
        while True:
            time.sleep(0.05)
