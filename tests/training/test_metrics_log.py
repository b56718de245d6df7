"""``metrics.jsonl`` after a resume and after going back: each step once, and notes of what was passed over."""

import json
from pathlib import Path
from typing import Any

from infra.storage import ObjectStore
from training.metrics_log import MetricsLog
from training.trackers import Trackers

KEY = "runs/demo/metrics.jsonl"


def _log(store: ObjectStore, folder: Path) -> MetricsLog:
    return MetricsLog(folder, store, "demo", Trackers((), "demo", folder / "trackers", {}))


def _lines(store: ObjectStore) -> list[dict[str, Any]]:
    return [json.loads(line) for line in store.read(KEY).decode().splitlines()]


def test_a_resumed_run_goes_on_where_its_checkpoint_stands(store: ObjectStore, tmp_path: Path):
    first = _log(store, tmp_path / "first")
    first.start(0, 0)
    first.append(step=1, loss=0.5)
    first.note(step=2, position=8, skipped="loss")  # samples 8 to 15 gave no step
    first.append(step=2, loss=0.25)
    first.note(step=3, position=24, skipped="loss")
    first.append(step=3, loss=0.125)
    first.put()

    second = _log(store, tmp_path / "second")
    second.start(2, 24)  # the checkpoint was written just before the second note
    assert second.objects() == {KEY: b"".join(json.dumps(line).encode() + b"\n" for line in _lines(store)[:3])}
    second.append(step=3, loss=0.1)
    second.put()
    assert [line["step"] for line in _lines(store)] == [1, 2, 2, 3]
    assert _lines(store)[-1]["loss"] == 0.1


def test_going_back_takes_steps_out_and_leaves_notes(store: ObjectStore, tmp_path: Path):
    log = _log(store, tmp_path)
    log.start(0, 0)
    for step in (1, 2, 3):
        log.append(step=step, loss=1.0)
    log.note(step=4, position=24, skipped="loss")
    log.go_back(1, 32)
    log.note(step=2, position=31, rolled_back={"from_step": 3})
    log.append(step=2, loss=0.5)
    log.put()
    assert [(line["step"], line.get("loss")) for line in _lines(store)] == [(1, 1.0), (4, None), (2, None), (2, 0.5)]


def test_a_new_run_begins_with_nothing(store: ObjectStore, tmp_path: Path):
    store.put(KEY, b'{"step": 1}\n')
    log = _log(store, tmp_path)
    log.start(0, 0)
    log.put()
    assert _lines(store) == []
