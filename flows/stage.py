"""The flow of one data stage, for deployments on pools of their own: downloads near the network, encoding on GPUs."""

from typing import Literal

from prefect import flow

from flows import tasks
from flows.config import PipelineConfig, resolve
from flows.form import NOTHING, ROOT, PrepareForm, TextOrNothing
from flows.plan import DATA_STAGES, look_up_stages
from flows.results import StageSummary
from flows.store import absolute_root, dataset_at
from infra.storage import ObjectStore, open_store


@flow(name="stage")
def stage(
    config: PrepareForm,
    root: str = ROOT,
    stage: Literal["select", "download", "encode"] = "select",
    parent: TextOrNothing = NOTHING,
) -> StageSummary:
    """Makes one dataset of a config; what it is made from must stand in the store.

    Args:
        config: What to make: a recipe, and settings over it.
        root: The object store's root: a folder, file:///… or s3://bucket/prefix.
        stage: Which dataset.
        parent: Key or URI of the dataset that it is made from; select has none. Empty (over the API: left out, not
            null): the one of this config.
    """
    config, root = resolve(config), absolute_root(root)
    if stage == "select":
        if parent is not None:
            raise ValueError(f"parent: {parent!r} is of no use: that stage reads metadata alone; leave it out")
        return tasks.select(config, root)
    if stage == "encode":
        tasks.ensure_base(config)
    made_from = _parent_of(stage, config, open_store(root), parent)
    return tasks.download(config, root, made_from) if stage == "download" else tasks.encode(config, root, made_from)


def _parent_of(stage: str, config: PipelineConfig, store: ObjectStore, parent: str | None) -> str:
    """Key of the dataset that a stage is made from: the one that is named, or that of the config."""
    before = DATA_STAGES[DATA_STAGES.index(stage) - 1]
    if parent is None:
        found = next(one for one in look_up_stages(config, store) if one.name == before)
        if found.prefix is None or found.manifest is None:
            raise ValueError(f"stage: {stage} needs the {before} dataset of this config; run stage {before} first")
        return found.prefix
    prefix, manifest = dataset_at(store, parent, field="parent")
    if manifest.stage != before:
        raise ValueError(f"parent: {parent!r} is of stage {manifest.stage}; {stage} is made from a {before} dataset")
    return prefix
