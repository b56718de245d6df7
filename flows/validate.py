"""The flow that measures a checkpoint by inpainting held-out pictures."""

from prefect import flow

from flows import tasks
from flows.config import PipelineConfig, resolve
from flows.deployments import staged
from flows.form import NOTHING, ROOT, TextOrNothing, ValidateForm
from flows.plan import find_dataset, find_trained, run_spec, train_summary, validation_spec
from flows.results import TrainSummary, ValidationSummary
from flows.store import absolute_root, locate, read_manifest, run_config
from infra.bundles import find_bundle
from infra.storage import open_store
from training.runspec import checkpoints_prefix


@flow(name="validate")
def validate(config: ValidateForm, root: str = ROOT, checkpoint: TextOrNothing = NOTHING) -> ValidationSummary:
    """Inpaints held-out pictures with a checkpoint, and writes the report.

    Args:
        config: What was trained: a recipe, and settings over it.
        root: The object store's root: a folder, file:///… or s3://bucket/prefix.
        checkpoint: Key or URI of a checkpoint's folder, such as runs/…/checkpoints/step-…; empty (over the API: left
            out, not null): the newest one of the config's run.
    """
    config, root = resolve(config), absolute_root(root)
    tasks.ensure_base(config)
    return tasks.validate(config, root, checkpoint_of(config, root, checkpoint))


def validated(config: PipelineConfig, root: str, trained: TrainSummary) -> ValidationSummary:
    """The flow in this process, or as its deployment, as the config says."""

    def is_done() -> bool:
        store = open_store(root)
        return find_bundle(store, validation_spec(config, root, trained).report_prefix(store)) is not None

    return staged(
        "validate", config, lambda: validate(config, root, trained.prefix), is_done,
        {"root": root, "checkpoint": trained.prefix},
    )  # fmt: skip


def checkpoint_of(config: PipelineConfig, root: str, checkpoint: str | None) -> TrainSummary:
    """A checkpoint of a config's run: the one that is named, or the newest.

    Raises:
        ValueError: It is not there, or not of this run.
    """
    if checkpoint is None:
        return find_trained(config, root)
    store = open_store(root)
    named, (elsewhere, checkpoint) = checkpoint, locate(checkpoint, root, field="checkpoint")
    if elsewhere.uri != store.uri:
        raise ValueError(f"checkpoint: {named!r} is not below root {store.uri}; set root to {elsewhere.uri}")
    recorded = run_config(store, checkpoint.split("/")[1] if checkpoint.startswith("runs/") else "").get(
        "dataset_prefix"
    )
    # What the run was trained on: what the config makes may be another dataset by now.
    dataset = find_dataset(config, store)[0] if recorded is None or config.train.names_datasets else recorded
    run = run_spec(config, root, dataset, read_manifest(store, dataset, field="checkpoint"))
    if not checkpoint.startswith(f"{checkpoints_prefix(run.run_id)}/"):
        raise ValueError(f"checkpoint: {checkpoint!r} is not of run {run.run_id}, which this config names")
    if find_bundle(store, checkpoint) is None:
        raise ValueError(f"checkpoint: {checkpoint!r} is not complete in {store.uri}; leave it out for the newest one")
    return train_summary(store, run, checkpoint, was_done=True, seconds=0)
