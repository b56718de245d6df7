"""The flow that makes a dataset: select rows, download their pictures, encode them."""

from prefect import flow

from flows import tasks
from flows.config import PipelineConfig, resolve
from flows.deployments import cancel_children, staged
from flows.form import ROOT, PrepareForm
from flows.plan import data_stage, selection_in_force
from flows.results import PrepareResult
from flows.store import absolute_root, read_manifest
from infra.storage import open_store
from preprocessing.contracts.manifest import dataset_prefix, find_manifest


@flow(name="prepare", on_cancellation=[cancel_children], on_crashed=[cancel_children])
def prepare(config: PrepareForm, root: str = ROOT) -> PrepareResult:
    """Makes the dataset of a config complete: selects rows, downloads their pictures, encodes them.

    Args:
        config: What to make: a recipe, and settings over it.
        root: The object store's root: a folder, file:///… or s3://bucket/prefix.
    """
    config, root = resolve(config), absolute_root(root)
    tasks.ensure_base(config)
    selected = staged(
        "select", config, lambda: tasks.select(config, root), lambda: stands("select", config, root, None),
        {"root": root, "stage": "select"},
    )  # fmt: skip
    selection = selection_in_force(config, open_store(root), selected.prefix)
    downloaded = staged(
        "download", config, lambda: tasks.download(config, root, selection),
        lambda: stands("download", config, root, selection),
        {"root": root, "stage": "download", "parent": selection},
    )  # fmt: skip
    encoded = staged(
        "encode", config, lambda: tasks.encode(config, root, downloaded.prefix),
        lambda: stands("encode", config, root, downloaded.prefix),
        {"root": root, "stage": "encode", "parent": downloaded.prefix},
    )  # fmt: skip
    stages = {summary.stage: summary for summary in (selected, downloaded, encoded)}
    return PrepareResult(datasets={name: summary.manifest_uri for name, summary in stages.items()}, stages=stages)


def stands(stage: str, config: PipelineConfig, root: str, parent: str | None) -> bool:
    """Whether a dataset is complete."""
    store = open_store(root)
    digest = data_stage(stage, config, store, None if parent is None else read_manifest(store, parent)).digest
    return find_manifest(store, dataset_prefix(stage, digest)) is not None
