"""Plain lines: throttled by stage, never the last word swallowed."""

import io

import pytest

from flows.progress import Lines, duration_text, training_text


def test_lines_are_throttled_by_stage() -> None:
    stream = io.StringIO()
    lines = Lines(stream, every_s=3600)
    for step in range(5):
        lines.advance("train", step, 5, f"loss {step}")
        lines.advance("encode", step, 5)
    lines.finish("train", "step 5 (3 s)")
    assert stream.getvalue().splitlines() == ["train     0/5 loss 0", "encode    0/5", "train     step 5 (3 s)"]


def test_every_advance_is_told_without_a_throttle() -> None:
    stream = io.StringIO()
    lines = Lines(stream, every_s=0)
    for step in range(3):
        lines.advance("train", step, 3)
    assert len(stream.getvalue().splitlines()) == 3


def test_a_training_step_in_a_few_words() -> None:
    event = {"loss": 0.12345, "images_per_s": 144.9, "mfu": 0.3531, "left_s": 7800.0}
    assert training_text(event) == "loss 0.1235, 145 images/s, MFU 35 %, 2 h 10 min left"
    assert training_text({"loss": 0.5, "images_per_s": 1.26, "left_s": 0.0}) == "loss 0.5000, 1.3 images/s"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (5399, "1 h 30 min"), (200_000, "2 d 7 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
