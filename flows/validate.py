"""The flow that measures a checkpoint by inpainting held-out pictures."""

from prefect import flow

from flows import tasks
from flows.config import PipelineConfig, resolve
from flows.plan import find_trained
from flows.results import TrainSummary, ValidationSummary
from flows.store import absolute_root


@flow(name="validate")
def validate(
    config: PipelineConfig | str, root: str = "var/store", trained: TrainSummary | None = None
) -> ValidationSummary:
    """Writes the report of a run's last checkpoint.

    Args:
        config: What was trained, or a recipe's name.
        root: The object store's root.
        trained: The checkpoint; by default the newest one of the config's run.
    """
    config, root = resolve(config), absolute_root(root)
    tasks.ensure_base(config)
    return tasks.validate(config, root, trained or find_trained(config, root))
