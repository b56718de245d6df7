"""Rows that wait in scratch files."""

import os
from pathlib import Path

import polars as pl

from preprocessing.spool import Spool


def test_what_waits_holds_no_file_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    spools = [Spool(tmp_path / f"{number}.arrow") for number in range(40)]
    for number, spool in enumerate(spools):
        for part in range(2):
            spool.add(pl.DataFrame({"shard": [number], "part": [part]}))
        spool.close()
    assert len(os.listdir("/proc/self/fd")) == before
    rows = [row for spool in spools for rows in spool.parts() for row in rows.rows()]
    assert rows == [(number, part) for number in range(40) for part in range(2)]
    assert list(tmp_path.iterdir()) == [], "read once, then gone"


def test_a_spool_without_rows(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "none.arrow")
    spool.close()
    assert list(spool.parts()) == []
