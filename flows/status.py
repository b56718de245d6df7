"""What stands in a store: datasets with their lineage, runs, exports, channels. No prefect, no torch, no pyarrow.

Few requests, however many shards there are: folders are asked for by name, and of a complete dataset only its manifest
is read. Only a dataset that is being made is listed, since that tells how far it is.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, TypeVar

from pydantic import ValidationError

from flows.forget_records import read_records
from flows.store import run_config
from infra.bundles import BundleManifest, find_bundle
from infra.channels import ChannelPointer, read_channel
from infra.errors import ContractError
from infra.storage import ObjectNotFoundError, ObjectStore
from preprocessing.contracts.manifest import CommittedShard, Manifest, dataset_prefix, find_manifest
from training.runspec import checkpoints_prefix, run_prefix

_NUM_THREADS = 16
_STAGES = ("select", "download", "encode")
_DATASET_KEY = re.compile(r"datasets/encode/[0-9a-f]{16}")

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class DatasetStatus:
    """A dataset, complete or in progress.

    Attributes:
        prefix: Key of its folder.
        stage: ``select``, ``download`` or ``encode``.
        parent: Key of the folder of the dataset that it was made from; None where it was made from metadata, or where
            nothing says so yet.
        is_complete: Whether its manifest is there.
        num_done: Shards that are committed.
        num_shards: Shards in all; None while that is not known.
        num_in: Rows read; None while it is in progress.
        num_out: Rows kept; None while it is in progress.
        dropped: Refused rows by reason.
        num_bytes: Of all its files.
        created_at: ISO 8601, UTC; None while it is in progress.
        used_by: Keys of the runs that train on it.
        problem: Why it cannot be read, if it cannot.
    """

    prefix: str
    stage: str
    parent: str | None = None
    is_complete: bool = False
    num_done: int = 0
    num_shards: int | None = None
    num_in: int | None = None
    num_out: int | None = None
    dropped: dict[str, int] | None = None
    num_bytes: int = 0
    created_at: str | None = None
    used_by: tuple[str, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class BundleStatus:
    """A checkpoint, a validation report or an export."""

    prefix: str
    kind: str
    run_id: str
    step: int
    num_bytes: int
    created_at: str


@dataclass(frozen=True)
class RunStatus:
    """A training.

    Attributes:
        run_id: Its name.
        datasets: Keys of the folders of the datasets that it trains on.
        step: Of its newest checkpoint; None if it has none.
        num_steps: How far it goes; None if nothing says so.
        checkpoints: The complete ones, oldest first.
        reports: Of its validations.
        exports: What was published of it.
    """

    run_id: str
    datasets: tuple[str, ...]
    step: int | None
    num_steps: int | None
    checkpoints: tuple[BundleStatus, ...]
    reports: tuple[BundleStatus, ...]
    exports: tuple[BundleStatus, ...]


@dataclass(frozen=True)
class Status:
    """What stands in a store.

    Attributes:
        uri: The store's root.
        datasets: Each one after the one that it was made from.
        runs: Sorted by name.
        channels: Sorted by name.
        problems: What could not be read, a line each.
        with_forgotten_rows: Keys of the folders of those bundles that hold rows that were forgotten since, as `forget`
            found, and how many.
    """

    uri: str
    datasets: tuple[DatasetStatus, ...]
    runs: tuple[RunStatus, ...]
    channels: tuple[ChannelPointer, ...]
    problems: tuple[str, ...]
    with_forgotten_rows: dict[str, int] = field(default_factory=dict)


def status_of(store: ObjectStore) -> Status:
    """Looks at a store; what cannot be read is named, and hides nothing else."""
    with ThreadPoolExecutor(_NUM_THREADS) as pool:

        def each(look: Callable[[_In], _Out], items: Iterable[_In]) -> list[_Out]:
            return list(pool.map(look, items))

        stages = each(lambda stage: (stage, store.list_folders(f"datasets/{stage}/")), _STAGES)
        found = each(
            lambda place: _look_at_dataset(store, *place), [(stage, name) for stage, names in stages for name in names]
        )
        rooms = each(store.list_folders, ("runs/", "exports/"))
        names = sorted({*rooms[0], *rooms[1]})
        configs = each(lambda name: run_config(store, name), names)
        folders = [
            folder
            for name in names
            for folder in (checkpoints_prefix(name), f"{run_prefix(name)}/validation", f"exports/{name}")
        ]
        steps = each(lambda folder: [f"{folder}/{step}" for step in store.list_folders(f"{folder}/")], folders)
        bundles = each(lambda prefix: _look_at_bundle(store, prefix), [prefix for part in steps for prefix in part])
        channels = each(
            lambda key: _look_at_channel(store, PurePosixPath(key).stem), [info.key for info in store.list("channels/")]
        )
    runs = [
        _run_status(name, config, [bundle for bundle, _ in bundles if bundle is not None and bundle.run_id == name])
        for name, config in zip(names, configs, strict=True)
    ]
    datasets = [dataset for dataset in found if dataset is not None]
    forgotten = read_records(store)
    problems = [f"{store.uri_of(dataset.prefix)}: {dataset.problem}" for dataset in datasets if dataset.problem]
    problems += [problem for _, problem in (*bundles, *channels) if problem is not None]
    return Status(
        uri=store.uri,
        datasets=tuple(_in_order(_related(datasets, runs))),
        runs=tuple(runs),
        channels=tuple(pointer for pointer, _ in channels if pointer is not None),
        problems=tuple(problems),
        with_forgotten_rows={
            bundle.prefix: num
            for bundle, _ in bundles
            if bundle is not None and (num := forgotten.num_in(store, bundle.prefix))
        },
    )


def depth_of(dataset: DatasetStatus, datasets: Sequence[DatasetStatus]) -> int:
    """How many of a dataset's ancestors are in the store."""
    by_prefix = {other.prefix: other for other in datasets}
    depth = 0
    while dataset.parent is not None and dataset.parent in by_prefix:
        dataset, depth = by_prefix[dataset.parent], depth + 1
    return depth


# ------------------------------------------------------------------------------------------------------------ datasets


def _look_at_dataset(store: ObjectStore, stage: str, name: str) -> DatasetStatus | None:
    prefix = f"datasets/{stage}/{name}"
    try:
        manifest = find_manifest(store, prefix)
    except ContractError as error:
        return DatasetStatus(prefix, stage, problem=str(error))
    return _in_progress(store, stage, prefix) if manifest is None else _complete(prefix, manifest)


def _complete(prefix: str, manifest: Manifest) -> DatasetStatus:
    files = [*(file for shard in manifest.shards for file in shard.files), *manifest.extra_files]
    return DatasetStatus(
        prefix,
        manifest.stage,
        parent=_parent_of(manifest.parents),
        is_complete=True,
        num_done=len(manifest.shards),
        num_shards=len(manifest.shards),
        num_in=manifest.num_in,
        num_out=manifest.num_out,
        dropped=manifest.dropped,
        num_bytes=sum(file.num_bytes for file in files),
        created_at=manifest.created_at,
    )


def _in_progress(store: ObjectStore, stage: str, prefix: str) -> DatasetStatus | None:
    """A dataset without a manifest: what is there of it; None where nothing is."""
    reports, num_bytes, num_objects = [], 0, 0
    for info in store.list(f"{prefix}/"):
        num_objects += 1
        if info.key.startswith(f"{prefix}/reports/"):
            reports.append(info.key)
        else:
            num_bytes += info.num_bytes
    if not num_objects:
        return None
    parent = None
    if reports:
        try:
            parent = _parent_of(CommittedShard.model_validate_json(store.read(reports[0])).parents)
        except (ValidationError, ObjectNotFoundError):  # the run that goes on will make that shard again
            parent = None
    return DatasetStatus(prefix, stage, parent=parent, num_done=len(reports), num_bytes=num_bytes)


def _parent_of(parents: dict[str, str]) -> str | None:
    return next((dataset_prefix(stage, digest) for stage, digest in parents.items() if stage in _STAGES), None)


def _related(datasets: Sequence[DatasetStatus], runs: Sequence[RunStatus]) -> list[DatasetStatus]:
    """Adds what others know: how many shards there will be (as many as the parent has), and who trains on it."""
    by_prefix = {dataset.prefix: dataset for dataset in datasets}
    related = []
    for dataset in datasets:
        parent = by_prefix.get(dataset.parent or "")
        num_shards = dataset.num_shards
        if num_shards is None and parent is not None:
            num_shards = parent.num_shards
        users = tuple(run_prefix(run.run_id) for run in runs if dataset.prefix in run.datasets)
        related.append(replace(dataset, num_shards=num_shards, used_by=users))
    return related


def _in_order(datasets: Sequence[DatasetStatus]) -> list[DatasetStatus]:
    """Each dataset after its parent, and among siblings the oldest first; what is in progress comes last."""
    there = {dataset.prefix for dataset in datasets}
    children: dict[str | None, list[DatasetStatus]] = {}
    for dataset in sorted(datasets, key=lambda item: (_STAGES.index(item.stage), item.created_at or "~", item.prefix)):
        children.setdefault(dataset.parent if dataset.parent in there else None, []).append(dataset)

    def below(prefix: str | None) -> list[DatasetStatus]:
        return [item for child in children.get(prefix, ()) for item in (child, *below(child.prefix))]

    return below(None)


# ------------------------------------------------------------------------------------------------------- runs, bundles


def datasets_of_run(config: dict[str, Any]) -> tuple[str, ...]:
    """Keys of the folders of the datasets that a run's config names, in its order."""
    return tuple(dict.fromkeys(_DATASET_KEY.findall(json.dumps(config))))


def _run_status(run_id: str, config: dict[str, Any], bundles: Sequence[BundleStatus]) -> RunStatus:
    of_kind = {
        kind: tuple(sorted((b for b in bundles if b.kind == kind), key=lambda bundle: bundle.step))
        for kind in ("checkpoint", "report", "export")
    }
    train = config.get("train")
    num_steps = train.get("num_steps") if isinstance(train, dict) else None
    checkpoints = of_kind["checkpoint"]
    return RunStatus(
        run_id=run_id,
        datasets=datasets_of_run(config),
        step=checkpoints[-1].step if checkpoints else None,
        num_steps=num_steps if isinstance(num_steps, int) else None,
        checkpoints=checkpoints,
        reports=of_kind["report"],
        exports=of_kind["export"],
    )


def _look_at_bundle(store: ObjectStore, prefix: str) -> tuple[BundleStatus | None, str | None]:
    """A complete bundle, or nothing; and what is wrong with it."""
    try:
        manifest = find_bundle(store, prefix)
    except ContractError as error:
        return None, str(error)
    return (None if manifest is None else _bundle_status(prefix, manifest)), None


def _bundle_status(prefix: str, manifest: BundleManifest) -> BundleStatus:
    return BundleStatus(prefix, manifest.kind, manifest.run_id, manifest.step, manifest.num_bytes, manifest.created_at)


def _look_at_channel(store: ObjectStore, name: str) -> tuple[ChannelPointer | None, str | None]:
    try:
        return read_channel(store, name), None
    except ValueError as error:
        return None, str(error)
