"""Plain lines: throttled by stage, never the last word swallowed."""

import io

from flows.progress import Lines


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
