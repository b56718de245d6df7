"""What a data stage tells of its progress: rows kept, rows/s, and the time that is left."""

import itertools

import pytest

from flows import artifacts, tasks
from preprocessing.contracts.manifest import DatasetFile, ShardReport
from preprocessing.stage import Progress


class _Heard:
    def __init__(self) -> None:
        self.told: list[tuple[int, int, str]] = []

    def advance(self, stage: str, num_done: int, num_total: int, text: str = "") -> None:
        self.told.append((num_done, num_total, text))

    def finish(self, stage: str, text: str) -> None:
        pass


def test_speed_and_time_left_count_only_what_was_made_now(monkeypatch: pytest.MonkeyPatch):
    heard = _Heard()
    progress = artifacts.ProgressArtifact("encode", heard)
    monkeypatch.setattr(progress, "_told", float("inf"))  # Prefect is told at the end only, and there is none here
    monkeypatch.setattr(tasks.time, "monotonic", itertools.count(0.0, 10.0).__next__)
    tell = tasks._teller(progress)
    tell(Progress("encode", 4, 10, was_done=True))
    file = DatasetFile(name="train-00004.parquet", num_bytes=1, sha256="", num_rows=80)
    report = ShardReport(index=4, num_in=100, num_out=80, dropped={"image_unreadable": 20}, files=(file,))
    tell(Progress("encode", 5, 10, report))
    assert heard.told[0] == (4, 10, "0 rows kept")
    num_done, num_total, text = heard.told[1]
    assert (num_done, num_total) == (5, 10)
    seconds = 100 / float(text.split(", ")[1].removesuffix(" rows/s"))
    assert seconds in (10, 20, 30)  # the clock moves at each look
    left = {10: "0:00:50", 20: "0:01:40", 30: "0:02:30"}[int(seconds)]
    assert text.startswith("80 rows kept, ")
    assert text.endswith(f"{left} left"), text
