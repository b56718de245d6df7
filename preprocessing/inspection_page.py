"""The page of `lacuna inspect --html`: one file, no script, nothing fetched; every text is escaped.

Captions, URLs and hosts are strangers' text: they come here fit for display (`preprocessing.contracts.display`), the
template engine escapes them, and the page's policy forbids it to run or load anything.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from preprocessing.contact_sheet import ContactSheet
from preprocessing.contents import Contents, Histogram, round_step
from preprocessing.contracts.display import bytes_text, display_text, number_text, share_text

_TEMPLATES: Final = Path(__file__).with_name("templates")
_MAX_VALUE_CHARS: Final = 600
_NUM_FILES: Final = 200
_NUM_TICKS: Final = 5

# Of a chart, in its own units.
_WIDTH, _HEIGHT, _TOP, _BOTTOM = 320, 112, 14, 20


@dataclass(frozen=True)
class Fact:
    """One line about the whole: a name and a value.

    Attributes:
        label: What it is.
        value: As text.
        is_code: A digest, a key, a URI.
    """

    label: str
    value: str
    is_code: bool = False


@dataclass(frozen=True)
class Step:
    """One stage of the way to this dataset.

    Attributes:
        stage: ``select``, ``download`` or ``encode``.
        prefix: Key of the dataset's folder.
        num_in: Rows read.
        num_out: Rows kept.
        dropped: Refused rows by reason, most frequent first.
        created_at: ISO 8601, UTC.
        is_this: Whether the page is about it.
    """

    stage: str
    prefix: str
    num_in: int
    num_out: int
    dropped: Mapping[str, int]
    created_at: str
    is_this: bool = False


@dataclass(frozen=True)
class ListedFile:
    """One file, by its manifest."""

    name: str
    num_rows: int | None
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Page:
    """What a page shows; what is empty is left out.

    Attributes:
        kind: ``encode dataset``, ``checkpoint``, …
        name: Short: what tells it from others of its kind.
        summary: The figures that matter most: label and value.
        facts: What it is and where it comes from.
        steps: From the metadata to this dataset, or to the one that a run was trained on.
        steps_note: What to say about them.
        sheet: Rows as pictures.
        contents: The rows in figures.
        tables: By title: specs, config, measured figures.
        files: As many as there are; the page lists the first ones.
        picture: A ``data:`` URI of the report's own grid, and what it shows.
    """

    kind: str
    name: str
    summary: Sequence[tuple[str, str]]
    facts: Sequence[Fact]
    steps: Sequence[Step] = ()
    steps_note: str = ""
    sheet: ContactSheet | None = None
    contents: Contents | None = None
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    files: Sequence[ListedFile] = ()
    picture: tuple[str, str] | None = None


def render_page(page: Page) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number_text,
        "bytes": bytes_text,
        "share": share_text,
        "display": display_text,
        "moment": moment_text,
    }
    contents = page.contents
    return environment.get_template("inspection.html.j2").render(
        page=page,
        sheet_title="Contact sheet" if page.sheet and any(card.tiles for card in page.sheet.cards) else "Some rows",
        steps=[_step(step, page.steps[0].num_in) for step in page.steps],
        charts=[_chart(histogram) for histogram in contents.histograms] if contents is not None else [],
        columns=_columns(contents),
        hosts=_hosts(contents),
        storage=_storage(contents),
        tables={title: _flat(values) for title, values in page.tables.items() if values},
        files=page.files[:_NUM_FILES],
    )


# ------------------------------------------------------------------------------------------------------- texts


def moment_text(moment: str) -> str:
    """``2026-11-23 07:33:36 UTC``; what is no such time stays as it is."""
    try:
        return f"{datetime.fromisoformat(moment).astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    except ValueError:
        return display_text(moment, 40)


def _flat(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names with dots and values as JSON, cut to a length."""
    found = []
    for key, value in values.items():
        name = display_text(str(key), 80)
        if isinstance(value, Mapping) and value:
            found += [(f"{name}.{inner}", text) for inner, text in _flat(value)]
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            found.append((name, display_text(text, _MAX_VALUE_CHARS)))
    return found


# --------------------------------------------------------------------------------------------------- figures


def _step(step: Step, num_rows: int) -> dict[str, Any]:
    num_dropped = sum(step.dropped.values())
    return {
        "step": step,
        "kept": 100 * step.num_out / step.num_in if step.num_in else 0,
        "of_all": share_text(step.num_out, num_rows),
        "num_dropped": num_dropped,
        "reasons": [
            {"name": name, "count": count, "width": 100 * count / max(step.dropped.values())}
            for name, count in sorted(step.dropped.items(), key=lambda item: (-item[1], item[0]))
        ],
    }


def _columns(contents: Contents | None) -> list[dict[str, Any]]:
    if contents is None:
        return []
    largest = max((column.bytes_per_row for column in contents.columns), default=0) or 1
    return [{"column": column, "width": 100 * column.bytes_per_row / largest} for column in contents.columns]


def _hosts(contents: Contents | None) -> list[dict[str, Any]]:
    if contents is None or not contents.hosts:
        return []
    highest = contents.hosts[0][1]
    return [
        {"name": display_text(host, 80) or "(none)", "count": count, "width": 100 * count / highest}
        for host, count in contents.hosts
    ]


_KINDS: Final = {
    "train": "rows of the training split",
    "validation": "held-out rows",
    "rows": "rows",
    "rejects": "refused rows, with their reasons",
    "extra": "constants and reports of the whole dataset",
}


def _storage(contents: Contents | None) -> list[dict[str, Any]]:
    if contents is None:
        return []
    total = sum(num_bytes for _, _, num_bytes in contents.storage.values()) or 1
    return [
        {
            "kind": kind,
            "means": _KINDS.get(kind, ""),
            "num_files": num_files,
            "num_rows": None if kind == "extra" else num_rows,
            "num_bytes": num_bytes,
            "width": 100 * num_bytes / total,
        }
        for kind, (num_files, num_rows, num_bytes) in contents.storage.items()
    ]


def _chart(histogram: Histogram) -> dict[str, Any]:
    """Where everything is in the drawing: bars, ticks, the limit."""
    span = histogram.high - histogram.low
    highest = max(histogram.counts, default=0)
    floor, room = _HEIGHT - _BOTTOM, _HEIGHT - _BOTTOM - _TOP
    step = _WIDTH / max(1, len(histogram.counts))
    bars = []
    for index, count in enumerate(histogram.counts):
        if count:
            height = max(1.0, room * count / highest)
            first, last = (histogram.low + span * place / len(histogram.counts) for place in (index, index + 1))
            label = f"{number_text(first)} to {number_text(last)}: {count:,}"
            bars.append(
                {"x": f"{index * step:.2f}", "y": f"{floor - height:.2f}", "height": f"{height:.2f}", "label": label}
            )
    quantiles = histogram.quantiles
    limit = None
    if histogram.limit is not None and histogram.low <= histogram.limit[1] <= histogram.high:
        limit = _WIDTH * (histogram.limit[1] - histogram.low) / span
    return {
        "histogram": histogram,
        "bars": bars,
        "bar_width": f"{max(0.5, step - 0.8):.2f}",
        "width": _WIDTH,
        "height": _HEIGHT,
        "floor": floor,
        "highest": highest,
        "ticks": _ticks(histogram.low, histogram.high),
        "limit": None if limit is None else f"{limit:.1f}",
        "limit_text": "" if histogram.limit is None else f"{histogram.limit[0]} {number_text(histogram.limit[1])}",
        "limit_anchor": "end" if limit is not None and limit > _WIDTH / 2 else "start",
        "num_values": sum(histogram.counts),
        "is_cut": bool(quantiles) and (quantiles[-1] > histogram.high or quantiles[0] < histogram.low),
        "unit": f" {histogram.unit}" if histogram.unit else "",
    }


def _ticks(low: float, high: float) -> list[dict[str, str]]:
    """Round numbers along the axis; those at its ends stay inside the drawing."""
    step = round_step((high - low) / _NUM_TICKS)
    ticks = []
    for place in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        x = _WIDTH * (place * step - low) / (high - low)
        anchor = "start" if x < 0.03 * _WIDTH else "end" if x > 0.97 * _WIDTH else "middle"
        ticks.append({"x": f"{x:.1f}", "text": number_text(round(place * step, 12)), "anchor": anchor})
    return ticks
