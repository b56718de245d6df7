"""What stands in the store, what is to do, and every check that can be made before anything is spent. No prefect."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.config import PipelineConfig
from flows.engines import check_engine
from flows.refresh_record import read_record
from flows.results import TrainSummary
from flows.store import dataset_at, read_manifest
from infra.bundles import find_bundle, list_bundles
from infra.errors import TransientError
from infra.storage import ObjectStore, open_store
from preprocessing.contracts.bases import TINY, is_in_place
from preprocessing.contracts.manifest import Manifest, dataset_prefix, find_manifest
from training.compatibility import DatasetSpecs, check_agree, check_specs, parse_specs
from training.conditioning import check_conditioning, encoded_columns
from training.mixture import mixture_digest
from training.runspec import RunSpec, checkpoint_prefix, checkpoints_prefix, run_digest, run_id_of, step_of
from training.runspec_validation import ExportSpec, ValidationSpec

if TYPE_CHECKING:
    from preprocessing.base_weights import BaseState
    from preprocessing.stage import Stage

DATA_STAGES = ("select", "download", "encode")
_CROP_BYTES_PER_PX = {"png": 1.9, "jpeg": 0.28, "none": 0}
"""Of photographs at 512 px; benchmarks/conditioning.py measures it."""


@dataclass(frozen=True)
class PlannedStage:
    """A data stage, and its dataset if that is complete.

    Attributes:
        name: ``select``, ``download`` or ``encode``.
        prefix: Key of the dataset's folder; None while its parent is not there.
        manifest: None if the dataset is not complete.
    """

    name: str
    prefix: str | None
    manifest: Manifest | None


@dataclass(frozen=True)
class PlannedStep:
    """One line of a plan."""

    name: str
    is_done: bool
    detail: str


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        steps: In order.
        checks: What was checked, and how it came out.
        estimates: Rough numbers of what is to do.
    """

    steps: tuple[PlannedStep, ...]
    checks: tuple[str, ...]
    estimates: tuple[str, ...]

    @property
    def is_done(self) -> bool:
        """Whether nothing is to do."""
        return all(step.is_done for step in self.steps)


def data_stage(name: str, config: PipelineConfig, store: ObjectStore, parent: Manifest | None) -> "Stage":
    """Makes a data stage.

    Args:
        name: One of ``DATA_STAGES``.
        config: Of the pipeline.
        store: Where datasets stand.
        parent: What the stage reads; None for the first one, which reads the source.

    Raises:
        ValueError: The source or the model cannot be read.
    """
    # Imported here: each of them takes a part of a second, and most of the commands need none of them.
    if name == "select":
        from preprocessing.select import SelectStage

        return SelectStage(store, config.source, config.select)
    assert parent is not None
    if name == "download":
        from preprocessing.download.stage import DownloadStage

        return DownloadStage(store, parent, config.download)
    from preprocessing.encode.stage import EncodeStage

    return EncodeStage(store, parent, config.encode, config.model)


def selection_in_force(config: PipelineConfig, store: ObjectStore, selected: str) -> str:
    """The selection that the dataset of a config is made from: its own, or a round of it that a refresh has made.

    A refresh that asks again for what had failed gives its selection another digest. Its dataset is the one of the
    config, as long as the config gives the selection that the refresh began with, and stages that lead to that dataset.

    Args:
        config: Of the pipeline.
        store: Where datasets stand.
        selected: Key of the folder of the config's own selection; it stands.

    Returns:
        Key of the folder of the selection.

    Raises:
        ContractError: What stands where the refresh wrote its record is none.
    """
    record, _ = read_record(store, config.recipe)
    if record is None or record.base != read_manifest(store, selected).digest:
        return selected
    encoded = find_manifest(store, record.prefix)
    downloaded = None if encoded is None else find_manifest(store, _parent_prefix(encoded, "download"))
    if downloaded is None or data_stage("encode", config, store, downloaded).digest != record.digest:
        return selected
    prefix = _parent_prefix(downloaded, "select")
    selection = find_manifest(store, prefix)
    if selection is None or data_stage("download", config, store, selection).digest != downloaded.digest:
        return selected
    return prefix


def _parent_prefix(manifest: Manifest, stage: str) -> str:
    return dataset_prefix(stage, manifest.parents[stage])


def look_up_stages(config: PipelineConfig, store: ObjectStore) -> list[PlannedStage]:
    """Looks for the datasets of a config, stage by stage, until one is not complete.

    Raises:
        ValueError: The source or the model cannot be read.
    """
    found: list[PlannedStage] = []
    parent: Manifest | None = None
    for name in DATA_STAGES:
        if (found and parent is None) or (name == "encode" and config.model.find_directory() is None):
            found.append(PlannedStage(name, None, None))
            continue
        prefix = dataset_prefix(name, data_stage(name, config, store, parent).digest)
        parent = find_manifest(store, prefix)
        if name == "select" and parent is not None and config.model.find_directory() is not None:
            prefix = selection_in_force(config, store, prefix)
            parent = find_manifest(store, prefix)
        found.append(PlannedStage(name, prefix, parent))
    return found


def find_dataset(config: PipelineConfig, store: ObjectStore) -> tuple[str, Manifest]:
    """The encoded dataset to train on: the one that ``train.dataset`` names, or the one that `prepare` makes.

    Of several it is the first: the one whose held-out pictures are looked at.

    Returns:
        Key of its folder, and its manifest.

    Raises:
        ValueError: It is not there.
    """
    if config.train.dataset is not None:
        return _encoded_at(store, config.train.dataset, "train.dataset")
    if config.train.datasets:
        return _encoded_at(store, next(iter(config.train.datasets)), "train.datasets")
    last = look_up_stages(config, store)[-1]
    if last.prefix is None or last.manifest is None:
        raise ValueError(
            f"dataset: none of this config is in {store.uri}; run `lacuna prepare` with the same options first"
        )
    return last.prefix, last.manifest


def _encoded_at(store: ObjectStore, uri: str, field: str) -> tuple[str, Manifest]:
    prefix, manifest = dataset_at(store, uri, field=field)
    if manifest.stage != "encode":
        raise ValueError(f"{field}: {uri!r} is a {manifest.stage} dataset; give an encode dataset")
    return prefix, manifest


def _mixture_of(config: PipelineConfig, store: ObjectStore) -> tuple[dict[str, float], str]:
    """The datasets that ``train.datasets`` names, by their folders' keys, and the digest of their mixture."""
    weights: dict[str, float] = {}
    specs: dict[str, DatasetSpecs] = {}
    digests: dict[str, float] = {}
    for uri, weight in config.train.datasets.items():
        prefix, manifest = _encoded_at(store, uri, "train.datasets")
        if prefix in weights:
            raise ValueError(f"train.datasets: {uri!r} is named twice; add its weights up")
        weights[prefix] = digests[manifest.digest] = weight
        its = specs[prefix] = parse_specs(manifest, prefix)
        check_conditioning(config.train, its.columns, its.masks.family, prefix)
    check_agree(specs)
    return weights, mixture_digest(digests)


def run_spec(config: PipelineConfig, root: str, prefix: str, manifest: Manifest) -> RunSpec:
    """What the training of a config on a dataset is told.

    Raises:
        ContractError: The dataset was not encoded by this model's encoders, or lacks what training asks for. Better
            known before any process starts.
    """
    specs = parse_specs(manifest, prefix)
    check_specs(specs, config.model)
    check_conditioning(config.train, specs.columns, specs.masks.family, prefix)
    mixture, digest = _mixture_of(config, open_store(root)) if config.train.datasets else ({}, manifest.digest)
    run_id = run_id_of(config.recipe, run_digest(config.train, config.model, digest))
    return RunSpec(
        run_id=run_id,
        store_uri=root,
        dataset_prefix=prefix,
        mixture=mixture,
        model=config.model,
        train=config.train,
    )


def launched_run(config: PipelineConfig, root: str) -> RunSpec:
    """What training processes are told that someone else starts, in another folder and perhaps on other machines.

    Raises:
        ValueError: There is no dataset, or it does not fit.
    """
    run = run_spec(config, root, *find_dataset(config, open_store(root)))
    base = run.model.base
    if base == TINY or "://" in base:
        return run
    model = run.model.model_copy(update={"base": str(Path(base).expanduser().absolute())})
    return run.model_copy(update={"model": model})


def find_trained(config: PipelineConfig, root: str) -> TrainSummary:
    """The newest complete checkpoint of a config's run.

    Raises:
        ValueError: There is none, or no dataset.
    """
    store = open_store(root)
    run = run_spec(config, root, *find_dataset(config, store))
    last = checkpoint_prefix(run.run_id, run.train.num_steps)
    found = [last] if find_bundle(store, last) is not None else list_bundles(store, checkpoints_prefix(run.run_id))
    if not found:
        raise ValueError(
            f"checkpoint: run {run.run_id} has none in {store.uri}; run `lacuna train` with the same options first"
        )
    return train_summary(store, run, found[-1], was_done=True, seconds=0)


def train_summary(store: ObjectStore, run: RunSpec, checkpoint: str, *, was_done: bool, seconds: float) -> TrainSummary:
    """What the flows say of a checkpoint; ``checkpoint`` is the key of its folder."""
    return TrainSummary(
        run_id=run.run_id,
        step=step_of(checkpoint),
        prefix=checkpoint,
        checkpoint=store.uri_of(checkpoint),
        dataset_prefix=run.dataset_prefix,
        was_done=was_done,
        seconds=seconds,
    )


def validation_spec(config: PipelineConfig, root: str, trained: TrainSummary) -> ValidationSpec:
    """What the validation of a checkpoint is told."""
    return ValidationSpec(
        store_uri=root,
        run_id=trained.run_id,
        step=trained.step,
        checkpoint_prefix=trained.prefix,
        dataset_prefix=trained.dataset_prefix,
        model=config.model,
        prediction_type=config.train.prediction_type,
        schedule=config.train.schedule,
        config=config.validation,
    )


def export_spec(
    config: PipelineConfig, root: str, trained: TrainSummary, report_prefix: str, datasets: Sequence[str]
) -> ExportSpec:
    """What the export of a checkpoint is told; ``datasets`` are keys of folders, in the order of their making."""
    return ExportSpec(
        store_uri=root,
        run_id=trained.run_id,
        step=trained.step,
        checkpoint_prefix=trained.prefix,
        report_prefix=report_prefix,
        dataset_prefixes=tuple(datasets),
        model=config.model,
        train=config.train,
        config=config.publish,
    )


def dataset_lineage(store: ObjectStore, prefix: str, manifest: Manifest) -> list[tuple[str, Manifest]]:
    """A dataset and what it was made from, each with the key of its folder, in the order in which they were made.

    A parent that is no longer in the store ends the walk.
    """
    lineage = [(prefix, manifest)]
    while (parents := lineage[0][1].parents) and (stage := next(iter(parents))) in DATA_STAGES:
        parent_prefix = dataset_prefix(stage, parents[stage])
        try:
            lineage.insert(0, (parent_prefix, read_manifest(store, parent_prefix)))
        except ValueError:
            break
    return lineage


def make_plan(config: PipelineConfig, root: str) -> Plan:
    """Looks at everything and changes nothing.

    Raises:
        ValueError: Something that can be checked beforehand is wrong.
    """
    from preprocessing.base_weights import look_up_base

    check_engine(config.operations)
    if not config.train.names_datasets:
        columns, family = encoded_columns(config.encode), config.encode.mask_family
        check_conditioning(config.train, columns, family, "the dataset that `encode` is to make")
    store = open_store(root)
    stages = look_up_stages(config, store)
    base = look_up_base(config.model)
    steps = [] if is_in_place(config.model.source) else [PlannedStep("base", base.is_ready, base.detail)]
    steps += [_data_step(stage, base) for stage in stages]
    steps += _model_steps(config, root, store, stages[-1], base)
    source = "the demo world" if config.source.is_demo else ", ".join(config.source.patterns)
    checks = (
        f"metadata readable: {source}",
        f"model files there: {base.detail if base.is_ready else config.model.base}"
        + (f" (sha256 {base.sha256})" if base.sha256 else ""),
        f"store readable: {store.uri}",
    )
    return Plan(tuple(steps), checks, tuple(_estimates(config, stages)))


def preflight(config: PipelineConfig, root: str) -> Plan:
    """A plan, and if anything is to do, a trial of the store: it takes writes and decides races.

    Raises:
        ValueError: Something that can be checked beforehand is wrong, such as a root that cannot be reached.
        TransientError: Something else cannot be reached.
    """
    store = open_store(root)
    try:
        plan = make_plan(config, root)
    except TransientError:
        store.check_writable()  # if it is the root, this says what to change
        raise
    if not plan.is_done:
        store.check_writable()
    return plan


def _data_step(stage: PlannedStage, base: "BaseState") -> PlannedStep:
    if stage.manifest is not None:
        return PlannedStep(
            stage.name, True, f"{stage.manifest.num_out} of {stage.manifest.num_in} rows, {stage.prefix}"
        )
    unknown = f"its digest is known once {'its parent is done' if base.is_ready else 'the base is converted'}"
    return PlannedStep(stage.name, False, stage.prefix or unknown)


def _model_steps(
    config: PipelineConfig, root: str, store: ObjectStore, encoded: PlannedStage, base: "BaseState"
) -> list[PlannedStep]:
    if not base.is_ready:
        after = "base" if config.train.names_datasets else "encode"
        return [PlannedStep(name, False, f"after {after}") for name in ("train", "validate", "publish")]
    if config.train.names_datasets:
        prefix, manifest = find_dataset(config, store)
    elif encoded.prefix is None or encoded.manifest is None:
        return [PlannedStep(name, False, "after encode") for name in ("train", "validate", "publish")]
    else:
        prefix, manifest = encoded.prefix, encoded.manifest
    run = run_spec(config, root, prefix, manifest)
    last = checkpoint_prefix(run.run_id, run.train.num_steps)
    if find_bundle(store, last) is None:
        there = list_bundles(store, checkpoints_prefix(run.run_id))
        detail = (
            f"goes on from step {step_of(there[-1])} of {run.train.num_steps}"
            if there
            else f"{run.train.num_steps} steps"
        )
        return [
            PlannedStep("train", False, f"{detail}, run {run.run_id}"),
            *(PlannedStep(n, False, "after train") for n in ("validate", "publish")),
        ]
    trained = train_summary(store, run, last, was_done=True, seconds=0)
    report = validation_spec(config, root, trained).report_prefix(store)
    export = export_spec(config, root, trained, report, ())
    return [
        PlannedStep("train", True, last),
        PlannedStep("validate", find_bundle(store, report) is not None, report),
        PlannedStep("publish", find_bundle(store, export.export_prefix) is not None, export.export_prefix),
    ]


def _estimates(config: PipelineConfig, stages: Sequence[PlannedStage]) -> list[str]:
    known = [stage.manifest.num_out for stage in stages if stage.manifest is not None]
    if config.source.is_demo and not known:
        known = [config.source.demo.num_pictures]
    if not known:
        return []
    encode = config.encode
    moments_bytes = 2 * 8 * (encode.resolution_px // 8) ** 2 * (encode.moments + encode.num_mask_variants)
    row_bytes = moments_bytes + round(_CROP_BYTES_PER_PX[encode.image] * encode.resolution_px**2)
    train = config.train
    return [
        f"at most {known[-1]} rows to encode",
        f"about {known[-1] * row_bytes / 1e6:,.0f} MB of training rows, without the text embeddings",
        f"{train.num_steps * train.global_batch_size:,} samples to train on: "
        f"{train.num_steps * train.global_batch_size / max(1, known[-1]):.1f} epochs",
    ]
