"""What people read on the last screen of a command: text in, text out; nothing is printed here."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from flows.forget import Forgotten
from flows.plan import Plan
from flows.results import (
    PrepareResult,
    PublishSummary,
    RefreshResult,
    RunResult,
    StageSummary,
    TrainSummary,
    ValidationSummary,
)
from flows.status import BundleStatus, DatasetStatus, Status, depth_of
from flows.verification import Verification
from infra.channels import Pulled
from preprocessing.contracts.display import bytes_text

_NUM_REASONS = 4
_NUM_STEPS = 4


def run_screen(result: RunResult) -> str:
    """What a run of the pipeline came to."""
    return "\n".join(
        [
            *_stage_lines(result.stages.values()),
            train_screen(result.train),
            _validation_line(result.validation),
            _line("published", _was_done(result.publish.was_done, _channels(result.channel))),
            "",
            _line("report", result.report),
            _line("grid", result.grid),
            _line("checkpoint", result.checkpoint),
            _line("export", result.export),
        ]
    )


def prepare_screen(result: PrepareResult) -> str:
    """What became of each stage, and where the dataset is."""
    return "\n".join([*_stage_lines(result.stages.values()), _line("dataset", result.datasets["encode"])])


def train_screen(result: TrainSummary) -> str:
    """How far a training is."""
    return _line("trained", _was_done(result.was_done, f"run {result.run_id} to step {result.step}", result.seconds))


def validate_screen(result: ValidationSummary) -> str:
    """What was measured, and where the report is."""
    return "\n".join([_validation_line(result), _line("report", result.report), _line("grid", result.grid)])


def publish_screen(result: PublishSummary) -> str:
    """What was published, and where."""
    return "\n".join(
        [_line("published", _was_done(result.was_done, _channels(result.channel))), _line("export", result.export)]
    )


def pull_screen(found: Pulled) -> str:
    """What is in the folder now."""
    manifest = found.manifest
    size = f"{len(manifest.files)} files, {manifest.num_bytes / 1e6:.1f} MB"
    what = "verified" if found.is_changed else "unchanged"
    return f"{manifest.run_id} step {manifest.step}: {size}, {what}"


def pull_json(found: Pulled, to: Path) -> dict[str, Any]:
    """The same for programs: the bundle's manifest, and where it is."""
    return {
        "to": str(to.absolute()),
        "bundle": found.bundle,
        "manifest_sha256": found.manifest_sha256,
        "is_changed": found.is_changed,
        "num_restarts": found.num_restarts,
        **found.manifest.model_dump(mode="json"),
    }


def refresh_screen(result: RefreshResult) -> str:
    """What is new."""
    lines = _stage_lines(result.stages.values())
    if not result.changed:
        lines.append(_line("refresh", f"nothing changed: {result.num_kept} rows"))
    else:
        since = "" if result.previous_digest is None else f" since {result.previous_digest[:16]}"
        lines.append(
            _line(
                "refresh", f"{result.num_new} rows are new{since}, {result.num_gone} are gone, {result.num_kept} stayed"
            )
        )
    if result.num_opted_out or result.num_forgotten:
        opted_out = f"{result.num_opted_out} rows have opted out, {result.num_forgotten} were withdrawn"
        lines.append(_line("forgotten", f"{opted_out}: no batch has them any more"))
    if result.report is not None:
        lines.append(_line("changes", result.report))
    lines.append(_line("dataset", result.datasets["encode"]))
    return "\n".join([*lines, *([] if result.train is None else [train_screen(result.train)])])


def forget_screen(found: Forgotten) -> str:
    """What holds the rows, what was cleaned, and what cannot be."""
    new = "would be new" if found.is_dry_run else "are new"
    lines = [_line("forgotten", f"{found.num_new} tombstones {new}, {found.num_tombstones} in all")]
    for dataset in found.datasets:
        counts = f"{dataset.num_rows:,} rows, {dataset.num_rejects:,} refused rows"
        lines.append(_line(dataset.stage, f"{dataset.prefix} holds {counts}"))
    for bundle in found.bundles:
        seen = "was trained on" if bundle.kind != "report" else "may show"
        text = f"{bundle.prefix} {seen} {bundle.num_seen:,} of {bundle.num_rows:,} rows"
        channels = f" (channel {', '.join(bundle.channels)})" if bundle.channels else ""
        lines.append(_line(bundle.kind, text + channels))
    lines += [_line("in progress", f"{prefix}: clean it once it is complete") for prefix in found.in_progress]
    if found.compacted is not None:
        lines.append(
            _line("compacted", f"{len(found.compacted)} datasets, {found.num_files_deleted} old files are deleted")
        )
        if found.held_by:
            lines.append(_line("not cleaned", f"{len(found.held_by)} bundles above: delete them, or train anew"))
    elif found.datasets and not found.is_dry_run:
        lines.append(_line("next", "`lacuna forget --compact` removes the rows from the files, too"))
    return "\n".join(lines)


def plan_screen(plan: Plan) -> str:
    """What is done, what is to do, what was checked, what it will take."""
    lines = [_line(step.name, f"{'done ' if step.is_done else 'to do'}  {step.detail}") for step in plan.steps]
    lines += [_line("checked", check) for check in plan.checks]
    return "\n".join([*lines, *(_line("estimate", estimate) for estimate in plan.estimates)])


def status_screen(status: Status, now: datetime) -> str:
    """What stands in a store: datasets as a tree, runs, channels."""
    parts = [
        f"store {status.uri}",
        table(("dataset", "rows", "bytes", "age", "state", "used by"), [*_dataset_rows(status, now)]),
        table(("run", "step", "checkpoints", "validated", "exported", "bytes", "trained on"), [*_run_rows(status)]),
        table(("channel", "points to", "step", "moved"), [*_channel_rows(status, now)]),
    ]
    if status.with_forgotten_rows:
        parts.append(
            "\n".join(
                f"{prefix} was trained on, or shows, {num:,} rows that were forgotten since"
                for prefix, num in sorted(status.with_forgotten_rows.items())
            )
        )
    if status.problems:
        parts.append("\n".join(f"cannot be read: {problem}" for problem in status.problems))
    return "\n\n".join(parts)


def _dataset_rows(status: Status, now: datetime) -> Iterator[tuple[str, ...]]:
    last = {(item.parent, depth_of(item, status.datasets)): item.prefix for item in status.datasets}
    open_depths: set[int] = set()
    for item in status.datasets:
        depth = depth_of(item, status.datasets)
        is_last = last[item.parent, depth] == item.prefix
        open_depths = {level for level in open_depths if level < depth} | (set() if is_last else {depth})
        branch = "".join("│  " if level in open_depths else "   " for level in range(1, depth))
        branch += ("└─ " if is_last else "├─ ") if depth else ""
        rows = "" if item.num_out is None else f"{item.num_out:,}"
        used_by = ", ".join(run.removeprefix("runs/") for run in item.used_by)
        age = "" if item.created_at is None else age_text(item.created_at, now)
        yield f"{branch}{item.prefix}", rows, bytes_text(item.num_bytes), age, _state(item, status), used_by


def _state(item: DatasetStatus, status: Status) -> str:
    if item.problem is not None:
        return "cannot be read"
    if not item.is_complete:
        of = "" if item.num_shards is None else f" of {item.num_shards:,}"
        return f"in progress: {item.num_done:,}{of} shards"
    is_there = item.parent is None or any(other.prefix == item.parent for other in status.datasets)
    return "complete" if is_there else f"complete; {item.parent} is gone"


def _run_rows(status: Status) -> Iterator[tuple[str, ...]]:
    for run in status.runs:
        of = "" if run.num_steps is None else f" of {run.num_steps:,}"
        bundles = (*run.checkpoints, *run.reports, *run.exports)
        yield (
            run.run_id,
            f"none{of}" if run.step is None else f"{run.step:,}{of}",
            _steps(run.checkpoints),
            _steps(run.reports),
            _steps(run.exports),
            bytes_text(sum(bundle.num_bytes for bundle in bundles)),
            ", ".join(run.datasets),
        )


def _steps(bundles: Sequence[BundleStatus]) -> str:
    """How many there are, and of which steps."""
    steps = [f"{bundle.step:,}" for bundle in bundles]
    if not steps:
        return "none"
    return f"{len(steps)} ({', '.join(steps if len(steps) <= _NUM_STEPS else [steps[0], '…', steps[-1]])})"


def _channel_rows(status: Status, now: datetime) -> Iterator[tuple[str, ...]]:
    for item in status.channels:
        yield item.channel, item.bundle, f"{item.step:,}", age_text(item.moved_at, now)


def status_json(status: Status) -> dict[str, Any]:
    """The same for programs."""
    return {
        "uri": status.uri,
        "datasets": {item.prefix: _without_prefix(item) for item in status.datasets},
        "runs": {run.run_id: asdict(run) for run in status.runs},
        "bundles": {
            bundle.prefix: _without_prefix(bundle)
            for run in status.runs
            for bundle in (*run.checkpoints, *run.reports, *run.exports)
        },
        "channels": {item.channel: item.model_dump(mode="json") for item in status.channels},
        "with_forgotten_rows": status.with_forgotten_rows,
        "problems": list(status.problems),
    }


def _without_prefix(item: DatasetStatus | BundleStatus) -> dict[str, Any]:
    return {name: value for name, value in asdict(item).items() if name != "prefix"}


def age_text(moment: str, now: datetime) -> str:
    """``4 h ago``; the moment itself where it is no time, or in the future by another machine's clock."""
    try:
        seconds = (now - datetime.fromisoformat(moment)).total_seconds()
    except (TypeError, ValueError):
        return moment
    if seconds < -60:
        return moment
    for name, length, limit in (("s", 1, 90), ("min", 60, 5400), ("h", 3600, 48 * 3600)):
        if seconds < limit:
            return f"{max(0, seconds) / length:.0f} {name} ago"
    return f"{seconds / 86400:.0f} days ago"


def inspect_screen(described: Mapping[str, Any]) -> str:
    """A dataset or bundle for people; ``described`` is `flows.inspection.inspect_json`."""
    parts = ["\n".join(_line(name, text) for name, text in _facts(described))]
    if described["lineage"]:
        parts.append(table(("stage", "kept", "of", "refused", "why"), [*_funnel_rows(described["lineage"])]))
    if described["missing"]:
        parts.append(f"{described['missing']}, from which it was made, is no longer in the store")
    if described.get("columns"):
        rows = [(c["name"], c["dtype"], f"{c['bytes_per_row']:,.1f}", c["means"]) for c in described["columns"]]
        parts.append(table(("column", "type", "bytes a row", "what it holds"), rows))
    if "storage" in described:
        rows = [
            (kind, f"{c['num_files']:,}", f"{c['num_rows']:,}", bytes_text(c["num_bytes"]))
            for kind, c in described["storage"].items()
        ]
        parts.append(table(("files", "number", "rows", "bytes"), rows))
    for title in ("specs", "config", "metadata"):
        if described.get(title):
            parts.append("\n".join([title, *(f"  {key:<24} {_value(v)}" for key, v in described[title].items())]))
    if "files" in described:
        parts.append(
            table(("file", "bytes"), [(file["name"], f"{file['num_bytes']:,}") for file in described["files"]])
        )
    return "\n\n".join(parts)


def _facts(described: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("uri", "kind", "run_id", "step", "stage", "digest", "created_at", "code_version"):
        if name in described:
            yield name, str(described[name])
    if described.get("num_forgotten_rows"):
        yield "caution", f"it holds {described['num_forgotten_rows']:,} rows that were forgotten since"
    for stage, digest in described.get("parents", {}).items():
        yield "made from", f"{stage} {digest}"
    shards = f", {described['num_shards']:,} shards" if "num_shards" in described else ""
    yield "size", f"{bytes_text(described['num_bytes'])}{shards}"
    if not described["conditional_writes"]:
        yield "caution", "written to a store that does not decide races of writers"


def _funnel_rows(lineage: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for step in lineage:
        refused = step["dropped"]
        why = ", ".join(f"{name} {count:,}" for name, count in refused.items())
        yield step["stage"], f"{step['num_out']:,}", f"{step['num_in']:,}", f"{sum(refused.values()):,}", why


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def verify_screen(found: Verification) -> str:
    """What was read and found to be as it should be."""
    lines = [f"{found.num_files:,} files, {bytes_text(found.num_bytes)}: all are what the manifest says"]
    if found.rows is not None:
        rows = found.rows
        lines.append(f"{rows.num_compared} rows encoded again: {rows.num_identical} are the same to the last bit")
        lines.append(f"compared: {', '.join(rows.columns) or 'nothing'}")
        lines += [f"not compared: {name}, {why}" for name, why in rows.not_compared.items()]
    return "\n".join(lines)


def verify_json(found: Verification) -> dict[str, Any]:
    """The same, and the problems, for programs."""
    return {**asdict(found), "problems": [asdict(problem) for problem in found.problems]}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns."""
    if not rows:
        return f"{header[0]}: none"
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (header, *rows)
    )


def _stage_lines(stages: Any) -> list[str]:
    return [_stage_line(summary) for summary in stages]


def _stage_line(summary: StageSummary) -> str:
    verb = {"select": "selected", "download": "downloaded", "encode": "encoded"}[summary.stage]
    reasons = list(summary.dropped.items())
    why = ", ".join(f"{name} {count}" for name, count in reasons[:_NUM_REASONS])
    rest = sum(count for _, count in reasons[_NUM_REASONS:])
    dropped = (
        "" if not reasons else f"; dropped {sum(summary.dropped.values())}: {why}{f', other {rest}' if rest else ''}"
    )
    return _line(verb, _was_done(summary.was_done, f"{summary.num_out} of {summary.num_in}", summary.seconds) + dropped)


_METHODS = (("ours", ""), ("Telea", "telea_"), ("mean fill", "mean_fill_"))
_MEASURES = (
    ("masked_psnr_db", "PSNR in the hole, dB"),
    ("masked_ssim", "SSIM"),
    ("masked_l1", "L1"),
    ("image_text_similarity", "image-text similarity"),
)


def _validation_line(result: ValidationSummary) -> str:
    """Ours beside the two plain fillings, and how often the caption decided."""
    found = result.summary
    parts = []
    for key, name in _MEASURES:
        values = [f"{label} {found[prefix + key]:.3g}" for label, prefix in _METHODS if prefix + key in found]
        if values:
            parts.append(f"{name}: {', '.join(values)}  (n = {result.num_samples} a mask family)")
    if "object_agreement" in found:
        shuffled = found.get("shuffled_object_agreement")
        against = "" if shuffled is None else f", with shuffled captions {shuffled:.0%}"
        agreement = f"{found['object_agreement']:.0%}{against}  (n = {result.num_object_samples})"
        parts.append(f"what the caption names appears: {agreement}")
        key = "object_hole_text_similarity"
        values = [f"{label} {found[prefix + key]:.3g}" for label, prefix in _METHODS if prefix + key in found]
        if values:
            parts.append(f"hidden object, image-text similarity in the hole: {', '.join(values)}")
    head = _was_done(result.was_done, f"step {result.step}", result.seconds)
    return "\n".join([_line("measured", head), *(f"{'':<12} {part}" for part in parts)])


def _channels(channels: Mapping[str, str]) -> str:
    names: dict[str, list[str]] = {}
    for name, what in channels.items():
        names.setdefault(what, []).append(name)
    return "; ".join(f"{', '.join(those)}: {what}" for what, those in names.items()) or "no channel"


def _was_done(was_done: bool, what: str, seconds: float | None = None) -> str:
    if was_done:
        return f"{what} (already done)"
    return what if seconds is None else f"{what} ({seconds:.0f} s)"


def _line(name: str, value: object) -> str:
    return f"{name:<12} {value}"
