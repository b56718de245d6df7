"""What a run leaves in Prefect to be looked at: its flow-run page tells the story.

| key | shows |
| --- | --- |
| ``{stage}-progress`` | how far: shards, rows, steps |
| ``{stage}-funnel`` | rows in, each drop reason, rows out |
| ``select-report`` | scores before and after, hosts with most rows, subsets |
| ``download-errors`` | why pictures did not arrive, by kind, reason, what was said, and host |
| ``train-checkpoint`` | where the checkpoint is |
| ``validation-report``, ``validation-samples`` | measures beside those of the last validation, and pictures |
| ``publish-channels`` | the export, and which channels point to it |
| ``story`` | all of it on one page, with links |

An artifact is a view. One that cannot be written is a warning in the log, never the end of a run.
"""

import base64
import contextlib
import io
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast
from urllib.parse import quote, urlsplit
from uuid import UUID

from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import PrefectException

from flows.progress import Listener, duration_text
from flows.results import PublishSummary, StageSummary, TrainSummary, ValidationSummary
from flows.watchdog import current
from infra.bundles import find_bundle, list_bundles
from infra.channels import read_channel
from infra.storage import ObjectNotFoundError, ObjectStore
from preprocessing.contracts.manifest import Manifest
from preprocessing.contracts.reasons import Reason

LOGGER = logging.getLogger(__name__)
_PROGRESS_EVERY_S = 10.0
_MAX_INLINE_BYTES = 300_000  # the API takes about 512 kB at once
_MAX_REJECTS_READ = 200_000
_NUM_DETAILS = 25
_NUM_HOSTS = 15
_LONGEST_DETAIL = 100
_MARKUP = frozenset("\\`*_{}[]<>()#!|~&")

_KINDS = {
    "network": ("host_unknown", "connection_failed", "tls_failed", "timed_out"),
    "HTTP": (
        "http_client_error", "http_not_now", "http_server_error", "rate_limited", "bad_response", "too_many_redirects",
    ),
    "not wanted": ("url_refused", "opted_out", "robots_disallowed"),
    "file": ("body_too_large", "hash_mismatch", "empty_file", "not_an_image"),
    "picture": ("image_truncated", "image_too_large", "image_too_small", "image_broken"),
    "decoder": ("decoder_died", "decode_timed_out", "decode_out_of_memory"),
    "ours": ("lost_by_downloader", "download_failed"),
}  # fmt: skip
_KIND_OF: dict[str, str] = {Reason(reason).value: kind for kind, reasons in _KINDS.items() for reason in reasons}


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


# -------------------------------------------------------------------------------------------------------- data stages


def funnel(summary: StageSummary) -> None:
    """A table: rows in, each drop reason, rows out."""
    rows = [{"row": "in", "count": summary.num_in, "share": "100 %"}]
    for name, count in [*((f"dropped: {r}", n) for r, n in summary.dropped.items()), ("out", summary.num_out)]:
        rows.append({"row": name, "count": count, "share": _share(count, summary.num_in)})
    key = f"{summary.stage}-funnel"
    made = "stood there already" if summary.was_done else f"made in {duration_text(summary.seconds)}"
    kept = f"**{summary.stage}: {summary.num_out:,} of {summary.num_in:,} rows kept**"
    text = f"{kept} ({made}). {link(summary.manifest_uri)}"
    with _never_fatal(key):
        create_table_artifact(rows, key=key, description=text)


def stage_report(summary: StageSummary, store: ObjectStore, manifest: Manifest) -> None:
    """What a stage shows beside its funnel, if anything."""
    if summary.stage == "select":
        selection(summary, store)
    elif summary.stage == "download":
        errors(summary, store, manifest)


def selection(summary: StageSummary, store: ObjectStore) -> None:
    """What ``select`` reports beside the funnel: scores before and after, hosts with most rows, subsets."""
    name = "select-report"
    with _never_fatal(name), contextlib.suppress(ObjectNotFoundError):
        found = json.loads(store.read(f"{summary.prefix}/report.json"))
        scores = [
            (
                score,
                sum(both["before"]["counts"]),
                both["before"]["num_missing"],
                both["before"]["num_unread"],
                sum(both["after"]["counts"]),
            )
            for score, both in found["scores"].items()
        ]
        parts = [
            "# What was selected",
            f"Report: {link(store.uri_of(f'{summary.prefix}/report.html'))}",
            _table(("score", "rows with one", "missing", "not read", "kept"), scores),
            _table(("host", "rows"), [(_plain(host), count) for host, count in found["hosts"]["top"]]),
        ]
        if found["subsets"]:
            parts.append("\n".join(f"- `{subset}`: {count} rows" for subset, count in found["subsets"].items()))
        create_markdown_artifact("\n\n".join(parts), key=name)


def errors(summary: StageSummary, store: ObjectStore, manifest: Manifest) -> None:
    """Why pictures did not arrive: counts by kind and reason, what was said most often, and the hosts concerned."""
    key = "download-errors"
    num_lost = sum(summary.dropped.values())
    with _never_fatal(key):
        kinds: Counter[str] = Counter()
        for reason, count in summary.dropped.items():
            kinds[_KIND_OF.get(reason, "other")] += count
        parts = [
            f"# {num_lost:,} of {summary.num_in:,} pictures did not arrive",
            _table(("kind", "pictures", "share"), [(k, n, _share(n, summary.num_in)) for k, n in kinds.most_common()]),
            _table(
                ("kind", "reason", "pictures", "share"),
                [
                    (_KIND_OF.get(r, "other"), f"`{r}`", n, _share(n, summary.num_in))
                    for r, n in summary.dropped.items()
                ],
            ),
        ]
        if num_lost:
            details, hosts, num_read = _read_rejects(store, summary.prefix, manifest)
            of_all = "" if num_read == num_lost else f" (of {num_read:,} that were looked at)"
            parts += [
                f"## What was said{of_all}",
                _table(("reason", "detail", "pictures"), [(f"`{r}`", _plain(d), n) for (r, d), n in details]),
                f"## Hosts{of_all}",
                _table(("host", "pictures lost", "most often"), [(_plain(h), n, f"`{why}`") for h, n, why in hosts]),
            ]
        create_markdown_artifact("\n\n".join(parts), key=key, description="Why pictures did not arrive.")


def _read_rejects(
    store: ObjectStore, prefix: str, manifest: Manifest
) -> tuple[list[tuple[tuple[str, str], int]], list[tuple[str, int, str]], int]:
    """Counts of (reason, detail without its numbers), and of hosts with their most frequent reason; rows read."""
    from preprocessing.stored_parquet import open_parquet

    details: Counter[tuple[str, str]] = Counter()
    hosts: dict[str, Counter[str]] = {}
    num_read = 0
    for entry in manifest.files("rejects"):
        if num_read >= _MAX_REJECTS_READ:
            break
        with open_parquet(store, entry.key(prefix)) as file:
            for row in file.read(columns=["url", "reason", "detail"]).to_pylist():
                num_read += 1
                host = _host_of(row["url"])
                details[row["reason"], class_of(row["detail"], host)] += 1
                hosts.setdefault(host, Counter())[row["reason"]] += 1
    worst = sorted(((h, sum(why.values()), why.most_common(1)[0][0]) for h, why in hosts.items()), key=lambda x: -x[1])
    return details.most_common(_NUM_DETAILS), worst[:_NUM_HOSTS], num_read


def class_of(detail: str | None, host: str) -> str:
    """What details of one kind have in common: without their addresses, paths and numbers but for HTTP's codes."""
    words = [
        "…" if "://" in word or "/" in word or (host and host in word) or sum(c.isdigit() for c in word) > 3 else word
        for word in (detail or "").split()
    ]
    return " ".join(words)[:_LONGEST_DETAIL]


def _host_of(url: str | None) -> str:
    try:
        return urlsplit(url or "").hostname or "(no host)"
    except ValueError:
        return "(no host)"


# ------------------------------------------------------------------------------------------------ training and beyond


def checkpoint(summary: TrainSummary) -> None:
    """Where the checkpoint is."""
    made = "stood there already" if summary.was_done else f"trained in {duration_text(summary.seconds)}"
    text = f"# Checkpoint of step {summary.step}\n\nRun `{summary.run_id}` ({made}): {link(summary.checkpoint)}"
    _markdown("train-checkpoint", text)


def report(summary: ValidationSummary, store: ObjectStore) -> None:
    """The measures beside those of the last validation before this one, and where the report is; then the pictures."""
    with _never_fatal("validation-report"):
        _markdown(
            "validation-report",
            "\n\n".join(
                [
                    f"# Validation of step {summary.step}",
                    f"Run `{summary.run_id}`, {summary.num_samples} held-out pictures. Report: {link(summary.report)}, "
                    f"pictures: {link(summary.grid)}",
                    _measures(summary, store),
                ]
            ),
        )
    key = "validation-samples"
    with _never_fatal(key), contextlib.suppress(ObjectNotFoundError):
        picture = inline_picture(store.read(f"{summary.prefix}/grid.png"))
        create_image_artifact(picture, key=key, description=f"Repainted held-out pictures, step {summary.step}.")


def _measures(summary: ValidationSummary, store: ObjectStore) -> str:
    before, whose = previous_measures(store, summary)
    rows = []
    for name, value in summary.summary.items():
        if isinstance(value, (int, float)):
            was = before.get(name)
            known = isinstance(was, (int, float))
            rows.append((name, f"{value:.4g}", f"{was:.4g}" if known else "", f"{value - was:+.4g}" if known else ""))
    if not before:
        return _table(("measure", "value"), [row[:2] for row in rows])
    return f"Before: {whose}\n\n{_table(('measure', 'value', 'before', 'change'), rows)}"


def previous_measures(store: ObjectStore, summary: ValidationSummary) -> tuple[Mapping[str, Any], str]:
    """What the last checkpoint that was validated before measured, and which that was.

    It is the run's own last one before this step; for a run's first, what the channel ``latest`` points to.
    """
    steps = sorted(
        prefix
        for prefix in list_bundles(store, f"runs/{summary.run_id}/validation")
        if prefix < summary.prefix and (found := find_bundle(store, prefix)) is not None and found.step < summary.step
    )
    if steps:
        found = json.loads(store.read(f"{steps[-1]}/report.json"))
        return found["summary"], f"`{steps[-1].rpartition('/')[2]}` of the same run"
    pointer = read_channel(store, "latest")
    if pointer is None or (pointer.run_id, pointer.step) == (summary.run_id, summary.step):
        return {}, ""
    return pointer.metrics, f"`{pointer.run_id}` step {pointer.step}, which `latest` points to"


def inline_picture(png: bytes, max_bytes: int = _MAX_INLINE_BYTES) -> str:
    """A picture as a data URI; one that is too large is made smaller until it fits."""
    if len(png) <= max_bytes:
        return f"data:image/png;base64,{base64.b64encode(png).decode()}"
    from PIL import Image

    with Image.open(io.BytesIO(png)) as opened:
        picture = opened.convert("RGB")
    for scale in (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1):
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        data = io.BytesIO()
        picture.resize(size, Image.Resampling.LANCZOS).save(data, "JPEG", quality=85)
        if data.tell() <= max_bytes:
            return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
    raise ValueError(
        f"a picture of {picture.width}x{picture.height} px is over {max_bytes} bytes at a tenth of its size"
    )


def publication(summary: PublishSummary) -> None:
    """What was published, and the channels."""
    channels = "\n".join(f"- `{name}`: {what}" for name, what in summary.channel.items())
    _markdown("publish-channels", f"# Published\n\n{link(summary.export)}\n\n{channels}")


def story(
    store: ObjectStore,
    datasets: Sequence[tuple[str, Manifest]],
    trained: TrainSummary,
    validation: ValidationSummary,
    published: PublishSummary,
) -> None:
    """The whole run on one page: rows, steps, measures, channels, and where everything is.

    Args:
        store: Where it all stands.
        datasets: Key of each dataset's folder and its manifest, in the order in which they were made.
        trained: The checkpoint.
        validation: Its validation.
        published: Its export.
    """
    with _never_fatal("story"):
        rows = [
            (
                manifest.stage,
                f"{manifest.num_in:,}",
                f"{manifest.num_out:,}",
                _share(manifest.num_out, manifest.num_in),
                ", ".join(f"{reason} {count:,}" for reason, count in list(manifest.dropped.items())[:3]),
                link(store.uri_of(f"{prefix}/MANIFEST.json"), manifest.digest[:16]),
            )
            for prefix, manifest in datasets
        ]
        channels = "; ".join(f"`{name}` {what}" for name, what in published.channel.items())
        parts = [
            f"# {trained.run_id}, step {trained.step:,}",
            f"Published as {link(published.export)}. Channels: {channels or 'none'}.",
            "## Data",
            _table(("stage", "rows in", "rows out", "kept", "dropped most", "dataset"), rows),
            "## Training",
            f"Checkpoint: {link(trained.checkpoint)}",
            "## Validation",
            f"Report: {link(validation.report)}, pictures: {link(validation.grid)}",
            _measures(validation, store),
        ]
        create_markdown_artifact("\n\n".join(parts), key="story", description="The whole run on one page.")


# --------------------------------------------------------------------------------------------------------------- words


def link(uri: str, text: str = "") -> str:
    """A URI as markdown that can be clicked: also a folder of this machine, and an object of AWS by AWS's console.

    Args:
        uri: Of an object or folder.
        text: What is shown; the end of the URI if it is empty.
    """
    text = text or "/".join(uri.rstrip("/").split("/")[-2:])
    if uri.startswith("s3://"):
        if os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3"):
            return f"`{uri}`"  # a store of one's own has no page that we know of
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        kind = "object" if "." in key.rpartition("/")[2] else "buckets"
        key = key if kind == "object" else f"{key}/"
        return f"[{text}](https://console.aws.amazon.com/s3/{kind}/{quote(bucket)}?prefix={quote(key)})"
    address = uri if "://" in uri else f"file://{uri}"
    return f"[{text}]({quote(address, safe=':/?#[]@!$&*+,;=%~')})"


def _share(count: int, of: int) -> str:
    return f"{100 * count / max(1, of):.1f} %"


def _table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table."""
    lines = [headers, ["---"] * len(headers), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else " ".join(str(value).split())


def _plain(text: str) -> str:
    """Text from the world outside: it cannot break a table, nor bring links and pictures of its own."""
    return "".join(f"&#{ord(char)};" if char in _MARKUP else char for char in text)


def _markdown(key: str, text: str) -> None:
    with _never_fatal(key):
        create_markdown_artifact(text, key=key)


class ProgressArtifact:
    """Tells a listener how far a stage is, the watch over it and, now and then, Prefect too.

    Args:
        stage: Which.
        listener: Who else is told.
    """

    def __init__(self, stage: str, listener: Listener) -> None:
        self._stage = stage
        self._listener = listener
        self._watch = current()
        self._id: UUID | None = None
        self._told = -_PROGRESS_EVERY_S

    def advance(self, num_done: int, num_total: int, text: str = "") -> None:
        """``num_done`` of ``num_total`` are done."""
        self._listener.advance(self._stage, num_done, num_total, text)
        if self._watch is not None:
            self._watch.note(num_done, num_total)
        now = time.monotonic()
        if now - self._told < _PROGRESS_EVERY_S and num_done < num_total:
            return
        self._told = now
        percent = 100.0 * num_done / max(1, num_total)
        key = f"{self._stage}-progress"
        said = f"{self._stage}: {num_done:,} of {num_total:,}{f', {text}' if text else ''}"
        with _never_fatal(key):
            if self._id is None:
                # Typed for async callers, too; called from here it returns the id.
                self._id = cast(UUID, create_progress_artifact(percent, key=key, description=said))
            else:
                update_progress_artifact(self._id, percent, description=said)

    def finish(self, text: str) -> None:
        """The stage is done."""
        self._listener.finish(self._stage, text)
        if self._id is not None:
            with _never_fatal(f"{self._stage}-progress"):
                update_progress_artifact(self._id, 100.0, description=f"{self._stage}: {text}")
        if self._watch is not None:
            self._watch.touch()
