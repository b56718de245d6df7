"""The flow that exports a validated checkpoint and moves the channels that others read."""

import logging

from prefect import flow

from flows import tasks
from flows.config import PipelineConfig, resolve
from flows.deployments import staged
from flows.forget_records import read_records
from flows.form import NOTHING, ROOT, PublishForm, TextOrNothing
from flows.results import PublishSummary, TrainSummary, ValidationSummary
from flows.store import absolute_root
from flows.validate import checkpoint_of
from infra.storage import open_store

LOGGER = logging.getLogger(__name__)


@flow(name="publish")
def publish(config: PublishForm, root: str = ROOT, checkpoint: TextOrNothing = NOTHING) -> PublishSummary:
    """Exports a checkpoint and moves the channels that may be moved; one without a report is validated first.

    Args:
        config: What was trained: a recipe, and settings over it.
        root: The object store's root: a folder, file:///… or s3://bucket/prefix.
        checkpoint: Key or URI of a checkpoint's folder, such as runs/…/checkpoints/step-…; empty (over the API: left
            out, not null): the newest one of the config's run.
    """
    config, root = resolve(config), absolute_root(root)
    tasks.ensure_base(config)
    found = checkpoint_of(config, root, checkpoint)
    return _publish_here(config, root, found, tasks.validate(config, root, found))


def _publish_here(
    config: PipelineConfig, root: str, found: TrainSummary, validated: ValidationSummary
) -> PublishSummary:
    """The task, and a warning where the checkpoint was trained on rows that were forgotten since."""
    store = open_store(root)
    num_forgotten = read_records(store).num_in(store, found.prefix)
    if num_forgotten:
        LOGGER.warning(
            "publish: %s was trained on at least %d rows that were forgotten since; withdraw it, or train again",
            store.uri_of(found.prefix),
            num_forgotten,
        )
    return tasks.publish(config, root, found, validated)


def published(config: PipelineConfig, root: str, trained: TrainSummary, validated: ValidationSummary) -> PublishSummary:
    """The task in this process, or the flow as its deployment, as the config says."""
    return staged(
        "publish", config, lambda: _publish_here(config, root, trained, validated),
        lambda: tasks.is_published(config, root, trained, validated),
        {"root": root, "checkpoint": trained.prefix},
        lambda: tasks.published_elsewhere(config, root, trained, validated),
    )  # fmt: skip
