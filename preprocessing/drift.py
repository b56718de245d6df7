"""How a dataset differs from the one before it: rows, reasons, hosts, scores; for programs, for people, and for gates.

The distance of two distributions of a score is the population stability index, over ten bins that hold a tenth of
the earlier rows each: the sum of (q - p) · ln(q / p), with half a row added to each bin. Below 0.1 little has changed,
above 0.25 much has.

Source: Siddiqi, Credit Risk Scorecards (2006), for the index and how it is read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from infra.errors import GateError
from infra.storage import ObjectStore
from preprocessing.block_lists import host_of
from preprocessing.contracts.config import RefreshConfig
from preprocessing.contracts.manifest import DRIFT_PREFIX, Manifest
from preprocessing.stored_parquet import open_parquet

FORMAT_VERSION: Final = 1
SCORES: Final[Mapping[str, tuple[float, float]]] = {"punsafe": (0, 1), "pwatermark": (0, 1), "similarity": (0, 1)}
MIN_ROWS: Final = 100
"""Of each side, below which a distance of scores says more of chance than of them."""

_NUM_BINS: Final = 50
_NUM_QUANTILES: Final = 10
_NUM_TOP_HOSTS: Final = 30
_TEMPLATES: Final = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Lineage:
    """A dataset, and what it was made from.

    Attributes:
        prefix: Key of the encoded dataset's folder.
        manifests: Stage → manifest; ``encode`` is there, and of the others those that still stand.
    """

    prefix: str
    manifests: Mapping[str, Manifest]

    @property
    def encoded(self) -> Manifest:
        """The dataset itself."""
        return self.manifests["encode"]

    @property
    def success_rate(self) -> float | None:
        """Downloaded / selected rows; None where that is not known any more, or none was selected."""
        downloaded = self.manifests.get("download")
        return None if downloaded is None or not downloaded.num_in else downloaded.num_out / downloaded.num_in


@dataclass(frozen=True)
class Profile:
    """What there is to compare of a dataset's rows.

    Attributes:
        uids: Of all rows.
        hosts: ``host``, ``count``.
        scores: Name → values, without those that are missing; float32.
    """

    uids: pl.Series
    hosts: pl.DataFrame
    scores: Mapping[str, np.ndarray]

    @classmethod
    def read(cls, store: ObjectStore, prefix: str, manifest: Manifest) -> "Profile":
        """Reads five columns of a dataset: about 60 bytes a row stay in memory."""
        uids = [pl.Series("uid", [], pl.String)]
        hosts = pl.DataFrame(schema={"host": pl.String, "count": pl.UInt32})
        scores: dict[str, list[np.ndarray]] = {name: [np.empty(0, np.float32)] for name in SCORES}
        for file in manifest.files("rows"):
            with open_parquet(store, file.key(prefix)) as stored:
                rows = pl.from_arrow(stored.read(["uid", "url", *SCORES]))
            assert isinstance(rows, pl.DataFrame)
            uids.append(rows["uid"])
            found = rows.select(host_of(pl.col("url")).alias("host")).group_by("host").len("count")
            hosts = pl.concat([hosts, found]).group_by("host").agg(pl.col("count").sum().cast(pl.UInt32))
            for name, values in scores.items():
                numbers = rows[name].to_numpy()  # null is NaN
                values.append(numbers[np.isfinite(numbers)].astype(np.float32))
        return cls(pl.concat(uids), hosts, {name: np.concatenate(values) for name, values in scores.items()})


@dataclass(frozen=True)
class Gate:
    """A limit, and what was found.

    Attributes:
        field: Of the config.
        found: What is held against the limit.
        limit: The config's.
        is_kept: Whether it is.
        text: What was found, for people.
    """

    field: str
    found: float
    limit: float
    is_kept: bool
    text: str


@dataclass(frozen=True)
class Drift:
    """How one dataset differs from an earlier one.

    Attributes:
        before: The earlier one; None: there is none.
        now: The dataset.
        rows_before: Its rows; None likewise.
        rows_now: Likewise.
    """

    before: Lineage | None
    now: Lineage
    rows_before: Profile | None = field(repr=False)
    rows_now: Profile = field(repr=False)

    @cached_property
    def gone(self) -> list[str]:
        """The uids of rows that are not there any more, sorted."""
        if self.rows_before is None:
            return []
        return self.rows_before.uids.filter(~self.rows_before.uids.is_in(self.rows_now.uids.implode())).sort().to_list()

    @property
    def num_new(self) -> int:
        """Rows that were not there."""
        return len(self.rows_now.uids) - self.num_kept

    @property
    def num_kept(self) -> int:
        """Rows in both."""
        return 0 if self.rows_before is None else len(self.rows_before.uids) - len(self.gone)

    @cached_property
    def distances(self) -> dict[str, float | None]:
        """Score → stability index; None where there are too few rows to tell."""
        found: dict[str, float | None] = dict.fromkeys(SCORES)
        if self.rows_before is not None:
            for name in SCORES:
                before, now = self.rows_before.scores[name], self.rows_now.scores[name]
                if min(len(before), len(now)) >= MIN_ROWS:
                    found[name] = stability_index(before, now)
        return found

    def gates(self, config: RefreshConfig) -> list[Gate]:
        """Every limit that applies."""
        found = []
        if self.rows_before is not None and len(self.rows_before.uids):
            share, num = len(self.gone) / len(self.rows_before.uids), len(self.rows_before.uids)
            text = f"{len(self.gone):,} of the last dataset's {num:,} rows are gone"
            found.append(Gate("max_lost_share", share, config.max_lost_share, share <= config.max_lost_share, text))
        rate = self.now.success_rate
        if rate is not None:
            text = f"{rate:.3f} of the selected pictures are there"
            found.append(Gate("min_success_rate", rate, config.min_success_rate, rate >= config.min_success_rate, text))
        for name, distance in self.distances.items():
            if distance is not None and config.max_drift is not None:
                text = f"{name} has shifted by {distance:.3f} (PSI)"
                found.append(Gate("max_drift", distance, config.max_drift, distance <= config.max_drift, text))
        return found

    def as_json(self, config: RefreshConfig) -> dict[str, Any]:
        """The whole report."""
        before, now = self.before, self.now
        return {
            "format_version": FORMAT_VERSION,
            "digest": now.encoded.digest,
            "previous_digest": None if before is None else before.encoded.digest,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "rows": {
                "before": 0 if self.rows_before is None else len(self.rows_before.uids),
                "now": len(self.rows_now.uids),
                "new": self.num_new,
                "gone": len(self.gone),
                "kept": self.num_kept,
            },
            "stages": {
                stage: {
                    "before": None if before is None else _counts(before.manifests.get(stage)),
                    "now": _counts(now.manifests.get(stage)),
                }
                for stage in ("select", "download", "encode")
            },
            "success_rate": {"before": None if before is None else before.success_rate, "now": now.success_rate},
            "hosts": self._hosts(),
            "scores": {name: self._score(name) for name in SCORES},
            "gates": [vars(gate) for gate in self.gates(config)],
        }

    def _hosts(self) -> list[list[Any]]:
        """Hosts whose rows changed most in number: host, before, now."""
        now = self.rows_now.hosts.rename({"count": "now"})
        before = now.clear() if self.rows_before is None else self.rows_before.hosts
        both = before.rename({before.columns[1]: "before"}).join(now, on="host", how="full", coalesce=True)
        both = both.select(
            pl.col("host").fill_null(""),
            pl.col("before").cast(pl.Int64).fill_null(0),
            pl.col("now").cast(pl.Int64).fill_null(0),
        )
        change = (pl.col("now") - pl.col("before")).abs()
        ordered = both.sort(change, "now", "host", descending=[True, True, False])
        return [list(row) for row in ordered.head(_NUM_TOP_HOSTS).iter_rows()]

    def _score(self, name: str) -> dict[str, Any]:
        low, high = SCORES[name]
        sides = {"before": self.rows_before, "now": self.rows_now}
        counts = {
            side: []
            if rows is None
            else np.histogram(np.clip(rows.scores[name], low, high), _NUM_BINS, (low, high))[0].tolist()
            for side, rows in sides.items()
        }
        return {"low": low, "high": high, **counts, "distance": self.distances[name]}


def stability_index(before: np.ndarray, now: np.ndarray) -> float:
    """The population stability index; see above.

    Args:
        before: Finite values, n.
        now: Finite values, m.
    """
    inner = np.unique(np.quantile(before, np.linspace(0, 1, _NUM_QUANTILES + 1)[1:-1]))
    edges = np.concatenate([[-np.inf], inner, [np.inf]])
    p, q = (np.histogram(values, edges)[0] + 0.5 for values in (before, now))
    p, q = p / p.sum(), q / q.sum()
    return float(((q - p) * np.log(q / p)).sum())


def compare(store: ObjectStore, before: Lineage | None, now: Lineage) -> Drift:
    """Reads the rows of both datasets."""
    rows_before = None if before is None else Profile.read(store, before.prefix, before.encoded)
    return Drift(before, now, rows_before, Profile.read(store, now.prefix, now.encoded))


def write_report(store: ObjectStore, drift: Drift, config: RefreshConfig) -> str:
    """Writes the report beside the dataset's manifest, as JSON and as a page.

    Returns:
        Key of the page; that of the JSON differs in its end only.
    """
    report = drift.as_json(config)
    against = (report["previous_digest"] or "nothing")[:16]
    key = f"{drift.now.prefix}/{DRIFT_PREFIX}{against}"
    store.put(f"{key}.json", (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    store.put(f"{key}.html", page(report).encode())
    return f"{key}.html"


def page(report: Mapping[str, Any]) -> str:
    """The report for people; whatever strangers wrote is escaped."""
    environment = Environment(loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, autoescape=True)
    charts = [
        {
            "title": name,
            "distance": score["distance"],
            "rows": [{"label": side, "bars": _heights(score[side]), "total": sum(score[side])} for side in _SIDES],
        }
        for name, score in report["scores"].items()
    ]
    reasons = {
        stage: sorted({reason for side in _SIDES for reason in (counts[side] or {"dropped": {}})["dropped"]})
        for stage, counts in report["stages"].items()
    }
    return environment.get_template("drift.html.j2").render(report=report, charts=charts, reasons=reasons)


_SIDES: Final = ("before", "now")


def _heights(counts: Sequence[int]) -> list[float]:
    """In percent of the highest."""
    highest = max(counts, default=0) or 1
    return [round(100 * count / highest, 2) for count in counts]


def _counts(manifest: Manifest | None) -> dict[str, Any] | None:
    if manifest is None:
        return None
    return {
        "digest": manifest.digest,
        "num_in": manifest.num_in,
        "num_out": manifest.num_out,
        "dropped": manifest.dropped,
    }


def check_gates(drift: Drift, config: RefreshConfig, report: str) -> None:
    """Refuses what is too different.

    Args:
        drift: What was found.
        config: The limits.
        report: Where the report is, for the message.

    Raises:
        GateError: A limit is not kept; the first of them.
    """
    for gate in drift.gates(config):
        if not gate.is_kept:
            over = "under" if gate.field == "min_success_rate" else "over"
            raise GateError(
                f"refresh.{gate.field}: {gate.text}, {over} the limit of {gate.limit:g}; the last dataset stands. Look "
                f"at {report}; if it is right so, refresh again with another limit"
            )
