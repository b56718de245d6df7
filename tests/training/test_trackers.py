"""Curves: from the lines of ``metrics.jsonl``, without a double step, and never at the cost of the training."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra.storage import ObjectStore
from training.metrics_log import MetricsLog
from training.trackers import Trackers, check_trackers, flatten

FAKE_MLFLOW = """
from types import SimpleNamespace as Namespace
import json, pathlib

STORE = pathlib.Path(STORE_PATH)

class MlflowClient:
    def _read(self):
        return json.loads(STORE.read_text()) if STORE.exists() else {"runs": {}}
    def _write(self, state):
        STORE.write_text(json.dumps(state))
    def get_experiment_by_name(self, name):
        return Namespace(experiment_id="1") if STORE.exists() else None
    def create_experiment(self, name):
        self._write({"runs": {}})
        return "1"
    def search_runs(self, experiment_ids, filter_string, max_results):
        tag = filter_string.split("'")[1]
        found = [key for key, run in self._read()["runs"].items() if run["tags"]["lacuna.run_id"] == tag]
        return [Namespace(info=Namespace(run_id=key)) for key in found]
    def create_run(self, experiment_id, tags, run_name):
        state = self._read()
        state["runs"]["r1"] = {"tags": tags, "points": [], "params": [], "status": "RUNNING"}
        self._write(state)
        return Namespace(info=Namespace(run_id="r1"))
    def update_run(self, run_id, status):
        pass
    def get_metric_history(self, run_id, key):
        return [Namespace(step=p[2]) for p in self._read()["runs"][run_id]["points"] if p[0] == key]
    def log_batch(self, run_id, metrics=(), params=(), synchronous=True):
        if any(metric.step == FAIL_AT for metric in metrics):
            raise ConnectionError("the server is gone")
        state = self._read()
        state["runs"][run_id]["points"] += [[m.key, m.value, m.step] for m in metrics]
        state["runs"][run_id]["params"] += [[p.key, p.value] for p in params]
        self._write(state)
    def set_terminated(self, run_id, status=None):
        state = self._read()
        state["runs"][run_id]["status"] = status or "FINISHED"
        self._write(state)

def flush_async_logging():
    pass
"""
FAKE_ENTITIES = """
class Metric:
    def __init__(self, key, value, timestamp, step):
        self.key, self.value, self.timestamp, self.step = key, value, timestamp, step
class Param:
    def __init__(self, key, value):
        self.key, self.value = key, value
"""
WANDB_SESSIONS = """
import sys
from pathlib import Path
from training.trackers import Trackers

folder = Path(sys.argv[1])
for session, steps in enumerate((range(1, 4), range(3, 6))):
    trackers = Trackers(("wandb",), "demo-0123456789ab", folder / str(session), {"seed": 3})
    trackers.start(steps[0] - 1)
    for step in steps:
        trackers.log(step, {"loss": 1 / step})
    trackers.close(is_done=True)
"""


def _fake_mlflow(folder: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int = -1) -> Path:
    """Puts a package of MLflow's name, with the calls we make, before all others; returns where it keeps runs."""
    package = folder / "fakes" / "mlflow"
    package.mkdir(parents=True)
    kept = folder / "mlflow.json"
    (package / "__init__.py").write_text(
        FAKE_MLFLOW.replace("STORE_PATH", repr(str(kept))).replace("FAIL_AT", str(fail_at))
    )
    (package / "entities.py").write_text(FAKE_ENTITIES)
    monkeypatch.syspath_prepend(str(package.parent))
    for name in [name for name in sys.modules if name.partition(".")[0] == "mlflow"]:
        monkeypatch.delitem(sys.modules, name)
    return kept


@pytest.fixture(autouse=True)
def _forget_fakes() -> Any:
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "mlflow"]:
        del sys.modules[name]


def test_lines_become_curves():
    line = {
        "loss": 0.25,
        "grad_norm": None,
        "num": 3,
        "is_it": True,
        "reason": "none",
        "uids": ["a"],
        "loss_by_mask": {"full": {"mean": 0.5, "num_samples": 3}, "partial": {"mean": None, "num_samples": 0}},
        "times": {"data_s": 0.5},
    }
    assert flatten(line) == {"loss": 0.25, "num": 3.0, "loss_by_mask/full": 0.5, "times/data_s": 0.5}


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_one_clear_line(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"train\.trackers: {name} is not installed; pip install {name}"):
        check_trackers(("tensorboard", name))


def test_tensorboard_is_not_insisted_upon(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert check_trackers(("tensorboard",)) == ()
    (record,) = caplog.records
    assert "pip install tensorboard" in record.getMessage()


def test_looking_imports_nothing():
    code = (
        "import sys, training.trackers as t\n"
        "try: t.check_trackers(('tensorboard', 'wandb', 'mlflow'))\n"
        "except ValueError: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'tensorboard', 'wandb', 'mlflow')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=120)


def _session(store: ObjectStore, folder: Path, names: tuple[str, ...], start: int, stop: int, put_at: int) -> None:
    """Takes steps start + 1 … stop, and puts what there is after step ``put_at``, as a checkpoint does."""
    trackers = Trackers(names, "demo-0123456789ab", folder / "trackers", {"seed": 3})
    log = MetricsLog(folder, store, "demo-0123456789ab", trackers)
    log.start(start, 8 * start)
    for step in range(start + 1, stop + 1):
        log.append(step=step, loss=1 / step)
        if step == put_at:
            log.put()
    log.close(is_done=True)


def _steps(store: ObjectStore) -> list[int]:
    lines = store.read("runs/demo-0123456789ab/metrics.jsonl").decode().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_mlflow_goes_on_without_a_double_step(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kept = _fake_mlflow(tmp_path, monkeypatch)
    _session(store, tmp_path / "first", ("mlflow",), 0, 5, put_at=3)  # killed after step 5, of which 3 are in the store
    _session(store, tmp_path / "second", ("mlflow",), 3, 8, put_at=8)
    run = json.loads(kept.read_text())["runs"]["r1"]
    assert run["points"] == [["loss", 1 / step, step] for step in range(1, 9)]
    assert run["params"] == [["seed", "3"]]
    assert run["status"] == "FINISHED"
    assert _steps(store) == [*range(1, 9)]


def test_one_that_fails_is_dropped_and_the_training_goes_on(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    kept = _fake_mlflow(tmp_path, monkeypatch, fail_at=3)
    with caplog.at_level(logging.WARNING):
        _session(store, tmp_path, ("mlflow",), 0, 6, put_at=6)
    assert [record.getMessage() for record in caplog.records] == [
        "mlflow failed and is told no more; the training goes on: ConnectionError('the server is gone')"
    ]
    assert len(json.loads(kept.read_text())["runs"]["r1"]["points"]) == 2
    assert _steps(store) == [*range(1, 7)]


def test_one_that_cannot_start_is_dropped(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    _session(store, tmp_path, ("mlflow",), 0, 2, put_at=2)
    assert _steps(store) == [1, 2]


def test_tensorboard_goes_on_without_a_double_step(store: ObjectStore, tmp_path: Path):
    pytest.importorskip("tensorboard")
    # In a process of its own: TensorBoard's packages warn of their own imports.
    code = (
        "import sys; from pathlib import Path; from infra.storage import open_store\n"
        "from tests.training.test_trackers import _session\n"
        "store, folder = open_store(sys.argv[1]), Path(sys.argv[2])\n"
        "_session(store, folder / 'first', ('tensorboard',), 0, 5, put_at=5)\n"
        "_session(store, folder / 'second', ('tensorboard',), 3, 8, put_at=8)\n"
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        "found = EventAccumulator(str(folder / 'store/runs/demo-0123456789ab/tensorboard')).Reload()\n"
        "print([event.step for event in found.Scalars('loss')])\n"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "store"), str(tmp_path)]
    done = subprocess.run(argv, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [*range(1, 9)]


def test_wandb_keeps_a_run_without_a_network(tmp_path: Path):
    pytest.importorskip("wandb")
    env = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", WANDB_SESSIONS, str(tmp_path)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stderr
    for session in ("0", "1"):
        (kept,) = (tmp_path / session / "wandb").rglob("wandb/offline-run-*/run-demo-0123456789ab.wandb")
        assert kept.stat().st_size > 0
