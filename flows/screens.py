"""What people read on the last screen of a command: text in, text out; nothing is printed here."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

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
from flows.store import Status
from infra.bundles import BundleManifest
from preprocessing.contracts.manifest import Manifest

_NUM_REASONS = 4


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
    lines.append(_line("dataset", result.datasets["encode"]))
    return "\n".join([*lines, *([] if result.train is None else [train_screen(result.train)])])


def plan_screen(plan: Plan) -> str:
    """What is done, what is to do, what was checked, what it will take."""
    lines = [_line(step.name, f"{'done ' if step.is_done else 'to do'}  {step.detail}") for step in plan.steps]
    lines += [_line("checked", check) for check in plan.checks]
    return "\n".join([*lines, *(_line("estimate", estimate) for estimate in plan.estimates)])


def status_screen(status: Status) -> str:
    """What stands in a store, as tables."""
    parts = []
    datasets = [
        (prefix, f"{manifest.num_out:,}", f"{sum(manifest.dropped.values()):,}", manifest.created_at)
        for prefix, manifest in status.datasets
    ]
    parts.append(table(("dataset", "rows", "dropped", "made"), datasets))
    bundles = [
        (prefix, manifest.kind, str(manifest.step), f"{manifest.num_bytes / 1e6:,.1f}", manifest.created_at)
        for prefix, manifest in status.bundles
    ]
    parts.append(table(("bundle", "kind", "step", "MB", "made"), bundles))
    channels = [(item.channel, item.bundle, str(item.step), item.moved_at[:19]) for item in status.channels]
    parts.append(table(("channel", "points to", "step", "moved"), channels))
    parts.append(_line("runs", ", ".join(status.runs) or "none"))
    return "\n\n".join(parts)


def status_json(status: Status) -> dict[str, Any]:
    """The same for programs."""
    return {
        "datasets": {
            prefix: {
                "stage": m.stage,
                "digest": m.digest,
                "num_in": m.num_in,
                "num_out": m.num_out,
                "dropped": m.dropped,
            }
            for prefix, m in status.datasets
        },
        "bundles": {prefix: {"kind": m.kind, "run_id": m.run_id, "step": m.step} for prefix, m in status.bundles},
        "runs": list(status.runs),
        "channels": {item.channel: item.model_dump(mode="json") for item in status.channels},
    }


def inspect_json(uri: str, manifest: Manifest | BundleManifest, schema: Mapping[str, str]) -> dict[str, Any]:
    """A dataset or bundle for programs."""
    if isinstance(manifest, BundleManifest):
        return {"uri": uri, **manifest.model_dump(mode="json")}
    return {
        "uri": uri,
        "stage": manifest.stage,
        "digest": manifest.digest,
        "parents": manifest.parents,
        "num_in": manifest.num_in,
        "num_out": manifest.num_out,
        "dropped": manifest.dropped,
        "num_shards": len(manifest.shards),
        "config": manifest.config,
        "specs": manifest.specs,
        "schema": dict(schema),
        "created_at": manifest.created_at,
    }


def inspect_screen(described: Mapping[str, Any]) -> str:
    """A dataset or bundle for people."""
    lines = []
    for name, value in described.items():
        if name == "files":
            lines += [f"  {file['name']}  {file['num_bytes']:,} bytes" for file in value]
        elif isinstance(value, dict) and value:
            lines.append(name)
            lines += [
                f"  {key:<24} {inner if isinstance(inner, (str, int, float)) else json.dumps(inner)}"
                for key, inner in value.items()
            ]
        else:
            lines.append(_line(name, value))
    return "\n".join(lines)


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
