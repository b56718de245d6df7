"""Publishing: a checkpoint's EMA weights as a folder that others load, and the channels that lead them to it.

``python -m training.export --run FILE``, with an `ExportSpec`. Doing it again changes nothing: an export that stands is
not made again, and a channel moves only by its own rule.
"""

import json
import logging
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from infra.bundles import BundleManifest, commit_bundle, find_bundle, load_bundle
from infra.channels import ChannelPointer, MayReplace, move_channel, pointer_to, read_channel
from infra.child import emit, run_as_child
from infra.errors import ContractError, GateError
from infra.gates import Gate
from infra.storage import ObjectNotFoundError, ObjectStore, open_store
from model.base_files import local_files
from model.base_weights import BASE_NAME
from model.encoders import CLIP_CONFIG_NAME, load_text_encoder, load_vae
from model.single_file import export_single_file, ldm_gaps
from model.weights import export_diffusers
from preprocessing.contracts.digests import weights_sha256
from training.config import PublishConfig
from training.heldout import read_manifest
from training.inpainting import load_ema_unet
from training.licenses import recognize_license
from training.model_card import Lineage, model_card
from training.retention import delete_old_exports
from training.runspec import step_name
from training.runspec_validation import ExportSpec

LOGGER = logging.getLogger(__name__)

LICENSE_NAME: Final = "LICENSE"
NO_LICENSE_TEXT: Final = (
    "NO LICENSE CAME WITH THE BASE WEIGHTS.\n\n"
    "The folder of the base weights held no LICENSE file. Find out under which terms they may be used and passed on\n"
    "before you use or pass on these weights, which are derived from them.\n"
)


def export(spec: ExportSpec, scratch: Path, on_progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Makes and commits the export of one checkpoint, and moves the channels that may move.

    Args:
        spec: What to publish.
        scratch: An empty folder for files in between.
        on_progress: Called with what is being done.

    Returns:
        ``prefix`` of the export's folder, ``channels``: name → what became of it (``moved …`` or ``kept: why``),
        ``deleted``: prefixes of old exports, and ``was_done``: whether the export was there before.

    Raises:
        ValueError: A metric that a channel's rule asks for is not in the report, or inputs do not belong together.
    """
    notify = on_progress or (lambda what: None)
    store = open_store(spec.store_uri)
    report = _load_report(store, spec)
    summary = {name: float(value) for name, value in report.metadata["summary"].items()}
    check_metrics(spec.config, summary)  # before anything is published
    done = find_bundle(store, spec.export_prefix)
    if done is None:
        notify("export")
        _make(store, spec, summary, scratch)
    else:
        check_same_form(done, spec)
    notify("channels")
    channels = {name: _move(store, spec, name, summary) for name in spec.config.channels}
    for name, outcome in channels.items():
        LOGGER.info("channel %s: %s", name, outcome)
    deleted = []
    if spec.config.keep_exports is not None:
        notify("retention")
        deleted = delete_old_exports(store, spec.run_id, spec.config.keep_exports)
        LOGGER.info("%d old exports were deleted: %s", len(deleted), ", ".join(deleted))
    return {"prefix": spec.export_prefix, "channels": channels, "deleted": deleted, "was_done": done is not None}


# ------------------------------------------------------------------------------------------------------------- folder


def _make(store: ObjectStore, spec: ExportSpec, summary: Mapping[str, float], scratch: Path) -> None:
    folder = scratch / "export"
    folder.mkdir()
    unet = load_ema_unet(store, spec.checkpoint_prefix, scratch)
    lineage = _lineage(store, spec, unet.config)
    license_path = _license_path(spec.model.directory)
    if not lineage.license.is_there:
        LOGGER.warning("%s: %s", license_path, NO_LICENSE_TEXT.splitlines()[0])
        license_path = scratch / "NO_LICENSE"
        license_path.write_text(NO_LICENSE_TEXT, encoding="utf-8")
    name = f"{spec.run_id}-{step_name(spec.step)}.safetensors" if spec.config.single_file else None
    card = model_card(spec, lineage, summary, single_file=name)
    _write_weights(folder, spec, lineage, unet, license_path, card, name)
    (folder / "README.md").write_text(card, encoding="utf-8")
    shutil.copyfile(license_path, folder / LICENSE_NAME)
    determined_by = _determined_by(spec, lineage)
    (folder / "config.json").write_text(json.dumps(determined_by, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (folder / "report.json").write_bytes(store.read(f"{spec.report_prefix}/report.json"))
    commit_bundle(
        store,
        spec.export_prefix,
        folder,
        kind="export",
        run_id=spec.run_id,
        step=spec.step,
        metadata={
            "prediction_type": spec.train.prediction_type,
            "zero_terminal_snr": spec.train.schedule.zero_terminal_snr,
            "checkpoint": spec.checkpoint_prefix,
            "report": spec.report_prefix,
            "datasets": determined_by["datasets"],
            "license": lineage.license.id,
            "has_license": lineage.license.is_there,
            "single_file": name,
            "form": _form(spec.config),
            "summary": dict(summary),
        },
    )


def _license_path(base: Path) -> Path:
    """The base's licence, whatever it is called there; it need not exist."""
    return base / (local_files(base)[1].license or LICENSE_NAME)


def _lineage(store: ObjectStore, spec: ExportSpec, unet_config: Mapping[str, Any]) -> Lineage:
    base = spec.model.directory
    record = base / BASE_NAME
    text_cfg = json.loads((base / "open_clip" / CLIP_CONFIG_NAME).read_text("utf-8"))["model_cfg"]["text_cfg"]
    return Lineage(
        manifests=[read_manifest(store, prefix) for prefix in spec.dataset_prefixes],
        weights={name: weights_sha256(base / name) for name in ("unet", "vae", "open_clip")},
        base=json.loads(record.read_text("utf-8")) if record.is_file() else {},
        license=recognize_license(_license_path(base)),
        gaps=ldm_gaps(unet_config, load_vae(base / "vae").config, text_width=text_cfg["width"]),
    )


def _write_weights(
    folder: Path,
    spec: ExportSpec,
    lineage: Lineage,
    unet: UNet2DConditionModel,
    license_path: Path,
    card: str,
    single_file: str | None,
) -> None:
    base = spec.model.directory
    shared: dict[str, Any] = {
        "unet": unet,
        "vae_dir": base / "vae",
        "prediction_type": spec.train.prediction_type,
        "schedule": spec.train.schedule,
        "dtype": {"float32": torch.float32, "float16": torch.float16}[spec.config.dtype],
    }
    export_diffusers(
        folder / "diffusers",
        text_encoder=load_text_encoder(base / "open_clip", load_image_tower=False),
        license_path=license_path,
        model_card=card,
        **shared,
    )
    if single_file is not None:
        export_single_file(
            folder / single_file,
            text_dir=base / "open_clip",
            resolution_px=lineage.latents.get("resolution_px"),
            metadata=_header(spec, lineage),
            **shared,
        )


def _header(spec: ExportSpec, lineage: Lineage) -> dict[str, str]:
    """What the single file's header says of where it came from."""
    return {
        "modelspec.title": f"{spec.run_id}, step {spec.step}",
        "modelspec.license": lineage.license.name,
        "lacuna.run_id": spec.run_id,
        "lacuna.step": str(spec.step),
        "lacuna.datasets": json.dumps({m.stage: m.digest for m in lineage.manifests}, sort_keys=True),
        "lacuna.base_weights_sha256": json.dumps(dict(lineage.weights), sort_keys=True),
    }


def _determined_by(spec: ExportSpec, lineage: Lineage) -> dict[str, Any]:
    return {
        "run_id": spec.run_id,
        "step": spec.step,
        "checkpoint": spec.checkpoint_prefix,
        "report": spec.report_prefix,
        "datasets": {manifest.stage: manifest.digest for manifest in lineage.manifests},
        "base": spec.model.base,
        "base_record": dict(lineage.base),
        "base_weights_sha256": dict(lineage.weights),
        "license": lineage.license.id,
        "train": spec.train.model_dump(mode="json"),
        "publish": spec.config.model_dump(mode="json"),
    }


def _load_report(store: ObjectStore, spec: ExportSpec) -> BundleManifest:
    try:
        report = load_bundle(store, spec.report_prefix)
    except ObjectNotFoundError:
        uri = store.uri_of(spec.report_prefix)
        raise ValueError(f"export: {uri} holds no report; validate the checkpoint first") from None
    if (report.kind, report.run_id, report.step) != ("report", spec.run_id, spec.step):
        raise ContractError(
            f"export: {spec.report_prefix} is a {report.kind} of {report.run_id} step {report.step}, the checkpoint is "
            f"of {spec.run_id} step {spec.step}"
        )
    return report


def check_same_form(done: BundleManifest, spec: ExportSpec) -> None:
    """Refuses to pass an export that stands off as one in another form: exports are immutable.

    Raises:
        ValueError: Names the setting, what it is now, and what the export was made with.
    """
    made_with = done.metadata.get("form", {})
    for name, now in _form(spec.config).items():
        if name in made_with and made_with[name] != now:
            raise ValueError(
                f"publish.{name}: {now!r}, but {spec.run_id} step {spec.step} was exported with {made_with[name]!r}; "
                "exports do not change: set it back, or publish another step"
            )


def _form(config: PublishConfig) -> dict[str, Any]:
    """The settings that change an export's files."""
    return {"dtype": config.dtype, "single_file": config.single_file, "base_model": config.base_model}


# ----------------------------------------------------------------------------------------------------------- channels


def check_metrics(config: PublishConfig, summary: Mapping[str, float]) -> None:
    """Refuses rules over metrics that the report does not have.

    Raises:
        ValueError: Names the field, the metric, and those that there are.
    """
    asked = {f"publish.stable_min.{name}": name for name in config.stable_min} if "stable" in config.channels else {}
    if "best" in config.channels:
        asked["publish.best_metric"] = config.best_metric
    for field, name in asked.items():
        if name not in summary:
            why = " (the base's text encoder has no image tower)" if name.endswith("text_similarity") else ""
            raise ValueError(
                f"{field}: the report has no metric {name!r}{why}; choose one of {', '.join(sorted(summary))}"
            )


def _move(store: ObjectStore, spec: ExportSpec, name: str, summary: Mapping[str, float]) -> str:
    """Moves one channel if its rule lets it, and says what became of it."""
    pointer = pointer_to(store, name, spec.export_prefix, dict(summary))
    current = read_channel(store, name)
    if current is not None and (current.bundle, current.manifest_sha256) == (pointer.bundle, pointer.manifest_sha256):
        return "kept: points to this export already"
    refusals: list[str] = []
    gate = Gate(report=spec.report_prefix, minimum=spec.config.stable_min)
    try:
        moved = move_channel(store, name, pointer, _rule(store, spec.config, pointer, refusals), gate=gate)
    except GateError as error:
        return f"kept: {error}"
    if moved is not None:
        return f"moved to {pointer.bundle}"
    return f"kept: {refusals[-1] if refusals else 'it points to a later step of this run'}"


def _rule(store: ObjectStore, config: PublishConfig, pointer: ChannelPointer, refusals: list[str]) -> MayReplace:
    """The rule of a channel; why it refuses is appended to ``refusals``."""

    def may_replace(current: ChannelPointer | None) -> bool:
        reason = None
        if pointer.channel == "best":
            reason = not_better(config.best_metric, pointer, current)
        elif current is not None:
            reason = _not_newer(store, pointer, current)
        if reason is not None:
            refusals.append(reason)
        return reason is None

    return may_replace


def not_better(metric: str, pointer: ChannelPointer, current: ChannelPointer | None) -> str | None:
    """Says why a candidate is not better; one that was chosen by another metric, or by none, is no competitor."""
    value = pointer.metrics.get(metric, math.nan)
    if math.isnan(value):
        return f"{metric} is no number"
    standing = math.nan if current is None else current.metrics.get(metric, math.nan)
    if current is None or math.isnan(standing) or value > standing:
        return None
    return f"{metric} {value:.4g} is not above {standing:.4g} of {current.bundle}"


def _not_newer(store: ObjectStore, pointer: ChannelPointer, current: ChannelPointer) -> str | None:
    """Says why a candidate is not newer: by step within a run, by the time of the export between runs."""
    if pointer.run_id == current.run_id:
        return None if pointer.step >= current.step else f"{current.bundle} is a later step of the same run"
    standing = find_bundle(store, current.bundle)
    ours = load_bundle(store, pointer.bundle)
    if standing is None or ours.created_at >= standing.created_at:
        return None
    return f"{current.bundle} was exported later"


def main(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The child's work: publishes what the spec says, and reports progress as events."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    spec = ExportSpec.model_validate(data)
    started = time.monotonic()

    with tempfile.TemporaryDirectory(prefix="export-", dir=folder) as scratch:
        result = export(spec, Path(scratch), lambda what: emit({"event": "export", "what": what}))
    return {**result, "seconds": time.monotonic() - started}


if __name__ == "__main__":
    sys.exit(run_as_child(main))
