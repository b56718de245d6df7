"""What a run leaves in Prefect to be looked at: tables of drop reasons, progress, pictures and links.

An artifact is a view. One that cannot be written is a warning in the log, never the end of a run.
"""

import base64
import contextlib
import json
import logging
import time
from collections.abc import Iterator
from typing import cast
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import PrefectException

from flows.progress import Listener
from flows.results import PublishSummary, StageSummary, TrainSummary, ValidationSummary
from infra.storage import ObjectNotFoundError, ObjectStore

LOGGER = logging.getLogger(__name__)
_PROGRESS_EVERY_S = 10.0
_MAX_INLINE_BYTES = 300_000  # the API takes about 512 kB at once


@contextlib.contextmanager
def _never_fatal(key: str) -> Iterator[None]:
    try:
        yield
    except (
        PrefectException,
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # httpx's errors are RuntimeErrors or OSErrors, or…
        LOGGER.warning("artifact %s was not written: %s", key, error)


def funnel(summary: StageSummary) -> None:
    """A table: rows in, each drop reason, rows out."""
    rows = [{"row": "in", "count": summary.num_in, "share": "100 %"}]
    for name, count in [*((f"dropped: {r}", n) for r, n in summary.dropped.items()), ("out", summary.num_out)]:
        rows.append({"row": name, "count": count, "share": f"{100 * count / max(1, summary.num_in):.1f} %"})
    key = f"{summary.stage}-funnel"
    with _never_fatal(key):
        create_table_artifact(
            rows, key=key, description=f"{summary.manifest_uri} ({'already done' if summary.was_done else 'made'})"
        )


def selection(summary: StageSummary, store: ObjectStore) -> None:
    """What ``select`` reports beside the funnel: scores before and after, hosts with most rows, subsets."""
    name = "select-report"
    with _never_fatal(name), contextlib.suppress(ObjectNotFoundError):
        found = json.loads(store.read(f"{summary.prefix}/report.json"))
        scores = "\n".join(
            f"| {score} | {sum(both['before']['counts'])} | {both['before']['num_missing']} | "
            f"{both['before']['num_unread']} | {sum(both['after']['counts'])} |"
            for score, both in found["scores"].items()
        )
        parts = [
            f"Report: `{store.uri_of(f'{summary.prefix}/report.html')}`",
            f"| score | rows with one | missing | not read | kept |\n| --- | --- | --- | --- | --- |\n{scores}",
            "\n".join(
                ["| host | rows |", "| --- | --- |", *(f"| {host} | {n} |" for host, n in found["hosts"]["top"])]
            ),
        ]
        if found["subsets"]:
            parts.append("\n".join(f"- `{subset}`: {count} rows" for subset, count in found["subsets"].items()))
        create_markdown_artifact("\n\n".join(parts), key=name)


def checkpoint(summary: TrainSummary) -> None:
    """Where the checkpoint is."""
    _markdown("train-checkpoint", f"Run `{summary.run_id}`, step {summary.step}: `{summary.checkpoint}`")


def report(summary: ValidationSummary, store: ObjectStore) -> None:
    """The measures, the grid of samples if it is small, and where the report is."""
    measures = "\n".join(
        f"| {name} | {value} |" for name, value in summary.summary.items() if not isinstance(value, (dict, list))
    )
    parts = [f"Report: `{summary.report}`  \nGrid: `{summary.grid}`", f"| measure | value |\n| --- | --- |\n{measures}"]
    with contextlib.suppress(ObjectNotFoundError):
        picture = store.read(f"{summary.prefix}/grid.png")
        if len(picture) <= _MAX_INLINE_BYTES:
            parts.append(f"![samples](data:image/png;base64,{base64.b64encode(picture).decode()})")
    _markdown("validation-report", "\n\n".join(parts))


def publication(summary: PublishSummary) -> None:
    """What was published, and the channels."""
    channels = "\n".join(f"- `{name}`: {what}" for name, what in summary.channel.items())
    _markdown("publish-channels", f"`{summary.export}`\n\n{channels}")


def _markdown(key: str, text: str) -> None:
    with _never_fatal(key):
        create_markdown_artifact(text, key=key)


class ProgressArtifact:
    """Tells a listener how far a stage is and, now and then, Prefect too.

    Args:
        stage: Which.
        listener: Who else is told.
    """

    def __init__(self, stage: str, listener: Listener) -> None:
        self._stage = stage
        self._listener = listener
        self._id: UUID | None = None
        self._told = -_PROGRESS_EVERY_S

    def advance(self, num_done: int, num_total: int, text: str = "") -> None:
        """``num_done`` of ``num_total`` are done."""
        self._listener.advance(self._stage, num_done, num_total, text)
        now = time.monotonic()
        if now - self._told < _PROGRESS_EVERY_S and num_done < num_total:
            return
        self._told = now
        percent = 100.0 * num_done / max(1, num_total)
        key = f"{self._stage}-progress"
        with _never_fatal(key):
            if self._id is None:
                # Typed for async callers, too; called from here it returns the id.
                self._id = cast(UUID, create_progress_artifact(percent, key=key, description=text or None))
            else:
                update_progress_artifact(self._id, percent, description=text or None)

    def finish(self, text: str) -> None:
        """The stage is done."""
        self._listener.finish(self._stage, text)
