"""Which checkpoints of a run stay, which exports of a recipe, and how the others go."""

import contextlib
import json
import logging
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from infra.bundles import MANIFEST_NAME, BundleManifest, delete_bundle, find_bundle
from infra.channels import named_bundles, read_channel
from infra.claims import Claim
from infra.errors import ContractError
from infra.storage import ObjectNotFoundError, ObjectStore
from training.runspec import EXPORTS_PREFIX, checkpoints_prefix, recipe_of, step_of, validation_prefix

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """What is kept; a checkpoint stays for any one of these reasons.

    Attributes:
        last: So many of the newest.
        every_steps: Those of steps that are a multiple of it.
        best: So many of the best, by `metric`, among those that were validated.
        metric: Of a validation report's ``summary``; higher is better.
    """

    last: int = 3
    every_steps: int | None = None
    best: int = 0
    metric: str = "masked_psnr_db"


def steps_to_keep(
    steps: Sequence[int], retention: Retention, metrics: Mapping[int, float], named: set[int]
) -> set[int]:
    """Chooses.

    Args:
        steps: Of all complete checkpoints, oldest first.
        retention: What is kept.
        metrics: Step → the metric, where there is a validation report.
        named: Steps that a channel names.
    """
    kept = set(steps[-retention.last :]) | (named & set(steps))
    if retention.every_steps is not None:
        kept |= {step for step in steps if step % retention.every_steps == 0}
    # Of equal ones the newer: it has been trained for longer.
    ranked = sorted((step for step in steps if step in metrics), key=lambda step: (metrics[step], step), reverse=True)
    return kept | set(ranked[: retention.best])


def delete_old(store: ObjectStore, run_id: str, retention: Retention) -> list[str]:
    """Deletes what is not kept, and what killed saves and deletions left behind; never what is being read.

    Args:
        store: Where the run is.
        run_id: The run.
        retention: What is kept.

    Returns:
        Prefixes of the checkpoints that were deleted.
    """
    found = list_checkpoints(store, run_id)
    complete = [prefix for prefix, names in found.items() if MANIFEST_NAME in names]
    steps = [step_of(prefix) for prefix in complete]
    if not steps:
        return []
    metrics = _metrics_of(store, run_id, steps, retention.metric) if retention.best else {}
    kept = steps_to_keep(steps, retention, metrics, _steps_named_by_channels(store, run_id))
    deleted = []
    for prefix in complete:
        if step_of(prefix) in kept:
            continue
        if delete_bundle(store, prefix):
            deleted.append(prefix)
        else:
            LOGGER.info("%s is being read: it stays for now", store.uri_of(prefix))
    for prefix in found:
        # One that is damaged is kept to be looked at, until it would have gone anyway.
        if prefix not in complete and step_of(prefix) < min(steps[-retention.last :]):
            delete_bundle(store, prefix)
    return deleted


def delete_old_exports(store: ObjectStore, run_id: str, keep: int) -> list[str]:
    """Deletes exports of all runs of a recipe but those published last, and what killed deletions left behind.

    What a channel points to stays, what it pointed to before, what is being read or published, and what cannot be read:
    that is left to be looked at. Where a channel cannot be read, nothing is deleted.

    Args:
        store: Where the exports are.
        run_id: A run of the recipe.
        keep: So many of those that were published last stay, whatever their step.

    Returns:
        Prefixes of the exports that were deleted.
    """
    try:
        named = named_bundles(store)
    except ContractError as error:
        LOGGER.warning("publish.keep_exports: nothing is deleted, since a channel cannot be read: %s", error)
        return []
    found = _readable_exports(store, recipe_of(run_id))
    complete = {prefix: manifest for prefix, manifest in found.items() if manifest is not None}
    last = set(sorted(complete, key=lambda prefix: _age_of(complete[prefix]))[-keep:])
    deleted = []
    # One that is named and not complete: a deletion was killed just after a channel came to name it, and is undone.
    for prefix in sorted(found.keys() - last - (named & complete.keys())):
        # Whoever publishes it, perhaps once more, holds the claim; while we hold it, nobody begins to.
        claim = Claim(store, prefix, f"retention {uuid.uuid4().hex}", lambda: False)
        if not claim.take_now():
            continue
        try:
            is_gone = delete_bundle(store, prefix, lambda prefix=prefix: prefix in named_bundles(store))
        except ContractError as error:
            LOGGER.warning("%s stays, since it cannot be said who names it: %s", store.uri_of(prefix), error)
            continue
        finally:
            claim.release()
        if not is_gone:
            LOGGER.info("%s is being read, or a channel came to name it: it stays for now", store.uri_of(prefix))
        elif prefix in complete:
            deleted.append(prefix)
    return deleted


def _readable_exports(store: ObjectStore, recipe: str) -> dict[str, BundleManifest | None]:
    """Prefix → manifest, None where it is not complete; those that cannot be read are named in the log."""
    found: dict[str, BundleManifest | None] = {}
    for prefix in _list_exports(store, recipe):
        try:
            found[prefix] = find_bundle(store, prefix)
        except ContractError as error:
            LOGGER.warning("publish.keep_exports: this one stays, since it cannot be read: %s", error)
    return found


def _list_exports(store: ObjectStore, recipe: str) -> list[str]:
    """Prefixes below which there is anything, also what is not complete."""
    runs = [run_id for run_id in store.list_folders(f"{EXPORTS_PREFIX}/") if recipe_of(run_id) == recipe]
    keys = (info.key.split("/") for run_id in runs for info in store.list(f"{EXPORTS_PREFIX}/{run_id}/"))
    return sorted({"/".join(parts[:3]) for parts in keys if len(parts) > 3})


def _age_of(manifest: BundleManifest) -> tuple[str, str, int]:
    return manifest.created_at, manifest.run_id, manifest.step


def list_checkpoints(store: ObjectStore, run_id: str) -> dict[str, set[str]]:
    """Prefix → names of what lies below it, for every step of which there is anything; oldest first."""
    parent = f"{checkpoints_prefix(run_id)}/"
    found: dict[str, set[str]] = {}
    for info in store.list(parent):
        step, _, name = info.key.removeprefix(parent).partition("/")
        with contextlib.suppress(ValueError):
            step_of(step)  # else it is none of ours
            found.setdefault(f"{parent}{step}", set()).add(name)
    return dict(sorted(found.items()))


def _steps_named_by_channels(store: ObjectStore, run_id: str) -> set[int]:
    """A channel may name the checkpoint, or what was exported from it: both keep it."""
    keys = [info.key for info in store.list("channels/")]
    names = [key.removeprefix("channels/").removesuffix(".json") for key in keys if key.endswith(".json")]
    pointers = [read_channel(store, name) for name in names]
    return {pointer.step for pointer in pointers if pointer is not None and pointer.run_id == run_id}


def _metrics_of(store: ObjectStore, run_id: str, steps: Sequence[int], name: str) -> dict[int, float]:
    metrics: dict[int, float] = {}
    for step in steps:
        # A report that is not there, or that says nothing of the metric, keeps nothing.
        with contextlib.suppress(ObjectNotFoundError, json.JSONDecodeError, KeyError, TypeError, ValueError):
            report = json.loads(store.read(f"{validation_prefix(run_id, step)}/report.json"))
            value = float(report["summary"][name])
            if math.isfinite(value):
                metrics[step] = value
    return metrics
