"""The flow that exports a validated checkpoint and moves the channels that others read."""

from prefect import flow

from flows import tasks
from flows.config import PipelineConfig, resolve
from flows.plan import find_trained
from flows.results import PublishSummary, TrainSummary, ValidationSummary
from flows.store import absolute_root
from flows.validate import validate


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
    tasks.ensure_base(config)
    trained = trained or find_trained(config, root)
    return tasks.publish(config, root, trained, validation or validate(config, root, trained))
