"""How far a training is, by a clock that the test holds."""

import json

import pytest

from training import progress
from training.progress import Progress


class Clock:
    """What ``time.monotonic`` gives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def _events(capsys: pytest.CaptureFixture[str]) -> list[dict[str, float]]:
    return [json.loads(line.removeprefix("@lacuna ")) for line in capsys.readouterr().out.splitlines()]


def test_speed_utilization_and_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    clock = Clock(monkeypatch)
    told = Progress(100, 16, peak_images_per_s=200.0)
    for step in range(1, 11):
        clock.now += 0.5
        assert told.note(step, 0.25) == {"images_per_s": 32.0, "mfu": 0.16}
    events = _events(capsys)
    assert [event["step"] for event in events] == [2, 4, 6, 8, 10], "once a second"
    assert events[-1] == {
        "event": "step",
        "step": 10,
        "num_steps": 100,
        "loss": 0.25,
        "images_per_s": 32.0,
        "mfu": 0.16,
        "left_s": 45.0,
    }


def test_a_pause_is_no_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    clock = Clock(monkeypatch)
    told = Progress(4, 8)
    clock.now += 2
    told.note(1, 0.5)
    clock.now += 600
    told.skip_pause()
    clock.now += 2
    assert told.note(2, 0.5) == {"images_per_s": 4.0}
    assert [event["left_s"] for event in _events(capsys)] == [6.0, 4.0]


def test_the_last_step_is_told_however_short(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    clock = Clock(monkeypatch)
    told = Progress(3, 8)
    for step in (1, 2, 3):
        clock.now += 0.01
        told.note(step, 0.5)
    (event,) = _events(capsys)
    assert (event["step"], event["left_s"]) == (3, 0.0)
