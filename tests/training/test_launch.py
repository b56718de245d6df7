"""The launcher, with children that do not train: how they end is what it raises. And the names of things."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from infra.errors import ContractError, GateError, TransientError
from infra.launch import KilledError, run_module
from training.runspec import checkpoint_prefix, run_id_of, step_of

CHILD = """
import os, signal, sys, time
from infra.errors import ContractError, GateError, TransientError
from infra.child import emit, run_as_child

ERRORS = {error.__name__: error for error in (ContractError, GateError, TransientError, ValueError, KeyError)}

def main(spec, workdir):
    rank = int(os.environ["RANK"])
    emit({"event": "step", "rank": rank, "world_size": int(os.environ["WORLD_SIZE"])})
    print("just a line of log")
    what = spec["ranks"][rank]
    if what in ERRORS:
        raise ERRORS[what]("the reason")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        time.sleep(600)
    return {"answer": 42, "folder": str(workdir)} if rank == 0 else None

if __name__ == "__main__":
    sys.exit(run_as_child(main))
"""


@pytest.fixture(autouse=True)
def _child_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lacuna_test_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def _run(tmp_path: Path, *ranks: str, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    result = run_module(
        "lacuna_test_child",
        {"ranks": list(ranks)},
        workdir=tmp_path / "work",
        on_event=events.append,
        num_processes=len(ranks),
        **options,
    )
    return result, events


def test_result_events_and_logs(tmp_path: Path):
    result, events = _run(tmp_path, "fine", "fine")
    assert result == {"answer": 42, "folder": str(tmp_path / "work")}
    assert [event["event"] for event in events] == ["step", "done"], "only rank 0 is heard"
    assert events[0]["world_size"] == 2
    assert "just a line of log" in (tmp_path / "work" / "rank-1.log").read_text()


@pytest.mark.parametrize("error", [ContractError, ValueError, GateError, TransientError])
def test_an_error_of_a_child_is_raised_here(tmp_path: Path, error: type[Exception]):
    with pytest.raises(error, match=r"^the reason$") as caught:
        _run(tmp_path, error.__name__)
    assert type(caught.value) is error


def test_when_one_rank_dies_the_others_are_stopped(tmp_path: Path):
    started = time.monotonic()
    with pytest.raises(ContractError, match="the reason"):
        _run(tmp_path, "hang", "ContractError")
    assert time.monotonic() - started < 300, "it waited for the rank that hangs"


def test_an_unforeseen_error_shows_the_log(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"(?s)rank 0 failed with exit code 1.*KeyError: 'the reason'"):
        _run(tmp_path, "KeyError")


def test_a_killed_child_may_be_tried_again(tmp_path: Path):
    with pytest.raises(TransientError, match=r"rank 0 was killed by SIGKILL \(") as caught:
        _run(tmp_path, "kill")
    assert isinstance(caught.value, KilledError)
    assert caught.value.may_be_memory
    assert "\n" not in caught.value.cause
    assert "just a line of log" in caught.value.log


def test_a_silent_child_is_stopped(tmp_path: Path):
    with pytest.raises(TransientError, match="no progress"):
        _run(tmp_path, "hang", stall_timeout_s=3)


def test_what_a_caller_raises_stops_the_children(tmp_path: Path):
    def refuse(event: dict[str, Any]) -> None:
        raise ArithmeticError("enough")

    with pytest.raises(ArithmeticError, match="enough"):
        run_module(
            "lacuna_test_child", {"ranks": ["hang"]}, workdir=tmp_path / "work", on_event=refuse, num_processes=1
        )


def test_names():
    assert checkpoint_prefix("demo-0123456789ab", 100) == "runs/demo-0123456789ab/checkpoints/step-00000100"
    assert step_of("runs/x/checkpoints/step-00000100") == 100
    assert run_id_of("demo", "0123456789abcdef") == "demo-0123456789ab"
    with pytest.raises(ValueError, match="names no step"):
        step_of("runs/x/checkpoints/latest")


def test_the_launcher_imports_no_torch():
    import subprocess

    code = "import training.launch, infra.child, sys; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=300)
