"""The flow that exports a validated checkpoint and moves the channels that others read."""

from prefect import flow

from flows import tasks
from flows.config import PipelineConfig, resolve
from flows.plan import find_checkpoint, find_dataset, run_spec
from flows.results import PublishSummary, TrainSummary, ValidationSummary
from flows.store import absolute_root
from flows.validate import validate
from infra.storage import open_store


@flow(name="publish")
def publish(
    config: PipelineConfig | str,
    root: str = "var/store",
    trained: TrainSummary | None = None,
    validation: ValidationSummary | None = None,
) -> PublishSummary:
    """Publishes a run's last checkpoint; one without a report is validated first.

    Args:
        config: What was trained, or a recipe's name.
        root: The object store's root.
        trained: The checkpoint; by default the newest one of the config's run.
        validation: Its report.
    """
    config, root = resolve(config), absolute_root(root)
    validation = validation or validate(config, root, trained)
    if trained is not None:
        return tasks.publish(config, root, trained.dataset_prefix, validation, trained.prefix)
    store = open_store(root)
    dataset, manifest = find_dataset(config, store)
    checkpoint, _ = find_checkpoint(store, run_spec(config, root, dataset, manifest))
    return tasks.publish(config, root, dataset, validation, checkpoint)
