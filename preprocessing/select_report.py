"""What select made of the metadata: funnel, histograms of the scores before and after, hosts with most rows.

Memory is constant: histograms have fixed bins. Hosts are counted exactly while there are at most ``MAX_HOSTS`` of
them; beyond that those with the fewest rows so far are forgotten, and the report says by how much a count may be too
low. From ``EXACT_HOSTS_BELOW`` rows of metadata on, hosts are counted in one row of ``HOST_STEP``, chosen by uid:
finding them costs more than all rules.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from preprocessing.block_lists import host_of
from preprocessing.contracts.config import SelectConfig

MAX_HOSTS = 1 << 17
EXACT_HOSTS_BELOW = 1_000_000
HOST_STEP = 8
REPORT_NAMES = ("report.json", "report.html")

_NUM_TOP_HOSTS = 50
_NUM_BINS = 50
_RANGES: Mapping[str, tuple[float, float]] = {
    "punsafe": (0, 1),
    "pwatermark": (0, 1),
    "similarity": (0, 1),
    "aesthetic": (0, 10),
}
_TITLES = {
    "punsafe": "p_unsafe",
    "pwatermark": "p_watermark",
    "similarity": "similarity",
    "aesthetic": "aesthetic score",
}
_TEMPLATES = Path(__file__).parent / "templates"


class Histogram:
    """Counts of a score in equal bins over its range; values outside it count in the outermost bins."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high
        self.counts = np.zeros(_NUM_BINS, np.int64)
        self.num_missing = 0

    def add(self, values: pl.Series) -> None:
        """Adds values; null, NaN and infinite ones count as missing."""
        numbers = values.to_numpy()  # null is NaN
        is_missing = ~np.isfinite(numbers)
        with np.errstate(over="ignore"):  # clipped below
            places = np.multiply(numbers, _NUM_BINS / (self.high - self.low), dtype=np.float32)
        np.clip(places - np.float32(_NUM_BINS * self.low / (self.high - self.low)), 0, _NUM_BINS - 1, out=places)
        places[is_missing] = _NUM_BINS
        counts = np.bincount(places.astype(np.uint8), minlength=_NUM_BINS + 1)
        self.counts += counts[:_NUM_BINS]
        self.num_missing += int(counts[_NUM_BINS])

    def as_json(self, num_rows: int) -> dict[str, Any]:
        """The counts; ``num_rows`` is how many rows there were in all."""
        num_seen = int(self.counts.sum()) + self.num_missing
        return {
            "low": self.low,
            "high": self.high,
            "counts": self.counts.tolist(),
            "num_missing": self.num_missing,
            "num_unread": num_rows - num_seen,
        }


class Tally:
    """Counts, as rows go by.

    Args:
        num_rows: How many there are; from ``EXACT_HOSTS_BELOW`` on, hosts are counted in one row of ``HOST_STEP``.
    """

    def __init__(self, num_rows: int) -> None:
        self._host_step = 1 if num_rows < EXACT_HOSTS_BELOW else HOST_STEP
        self._before = {name: Histogram(*limits) for name, limits in _RANGES.items()}
        self._after = {name: Histogram(*limits) for name, limits in _RANGES.items()}
        self._hosts = pl.DataFrame(schema={"host": pl.String, "count": pl.Int64})
        self._host_error = 0
        self._num_in = self._num_out = 0
        self._dropped: Counter[str] = Counter()
        self._subsets: Counter[str] = Counter()

    def add_scores(self, rows: pl.DataFrame) -> None:
        """Rows as they are read: any of the score columns; those that were not read are left out."""
        for name, histogram in self._before.items():
            if name in rows.columns:
                histogram.add(rows[name])

    def add_shard(self, num_in: int, dropped: Mapping[str, int], kept: pl.DataFrame) -> None:
        """One shard as it was decided; ``kept`` has the columns of candidates."""
        self._num_in += num_in
        self._num_out += kept.height
        self._dropped.update(dropped)
        if not kept.height:
            return
        for name, histogram in self._after.items():
            histogram.add(kept[name])
        if kept["source"].null_count() < kept.height:
            self._subsets.update(dict(kept["source"].value_counts().iter_rows()))
        sample = kept if self._host_step == 1 else kept.filter(pl.col("uid_low") % self._host_step == 0)
        hosts = sample.select(host_of(pl.col("url")).alias("host")).group_by("host").len("count")
        self._add_hosts(hosts.with_columns(pl.col("count").cast(pl.Int64)))

    def _add_hosts(self, hosts: pl.DataFrame) -> None:
        self._hosts = pl.concat([self._hosts, hosts]).group_by("host").agg(pl.col("count").sum())
        if self._hosts.height > MAX_HOSTS:
            ordered = self._hosts.sort(["count", "host"], descending=[True, False])
            self._hosts = ordered.head(MAX_HOSTS // 2)
            self._host_error += int(ordered["count"][MAX_HOSTS // 2])

    def as_json(self, described: Mapping[str, Any]) -> dict[str, Any]:
        """The whole report; ``described`` goes in as it is."""
        top = self._hosts.sort(["count", "host"], descending=[True, False]).head(_NUM_TOP_HOSTS)
        dropped = dict(sorted(self._dropped.items(), key=lambda item: (-item[1], item[0])))
        return {
            **described,
            "num_in": self._num_in,
            "num_out": self._num_out,
            "dropped": dropped,
            "subsets": dict(sorted(self._subsets.items())),
            "scores": {
                name: {
                    "before": self._before[name].as_json(self._num_in),
                    "after": self._after[name].as_json(self._num_out),
                }
                for name in _RANGES
            },
            "hosts": {
                "top": [list(row) for row in top.iter_rows()],
                "may_be_too_low_by": self._host_error,
                "counted_one_in": self._host_step,
            },
        }


def limits_of(config: SelectConfig) -> dict[str, float | None]:
    """The limit of each score."""
    return {
        "punsafe": config.max_punsafe,
        "pwatermark": config.max_pwatermark,
        "similarity": config.min_similarity,
        "aesthetic": config.min_aesthetic,
    }


def write_report(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes the report for programs and for people.

    Args:
        report: ``Tally.as_json``, with ``limits`` as by ``limits_of``.
        folder: Where to.
    """
    paths = [folder / name for name in REPORT_NAMES]
    paths[0].write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    environment = Environment(loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, autoescape=True)
    charts = [
        {
            "title": _TITLES[name],
            "limit": report["limits"].get(name),
            "position": None
            if report["limits"].get(name) is None
            else 100 * (report["limits"][name] - _RANGES[name][0]) / (_RANGES[name][1] - _RANGES[name][0]),
            "rows": [{"label": label, **_bars(scores[label])} for label in ("before", "after")],
        }
        for name, scores in report["scores"].items()
    ]
    page = environment.get_template("select_report.html.j2").render(report=report, charts=charts)
    paths[1].write_text(page, encoding="utf-8")
    return paths


def _bars(histogram: Mapping[str, Any]) -> dict[str, Any]:
    """Heights in percent of the highest bin, with what stands beside the chart."""
    counts = histogram["counts"]
    highest = max(counts) or 1
    width = (histogram["high"] - histogram["low"]) / len(counts)
    bars = [
        {"height": round(100 * count / highest, 2), "from": round(histogram["low"] + index * width, 4), "count": count}
        for index, count in enumerate(counts)
    ]
    return {"bars": bars, "missing": histogram["num_missing"], "unread": histogram["num_unread"], "total": sum(counts)}
