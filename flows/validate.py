"""The flow that measures a checkpoint by inpainting held-out pictures."""

from prefect import flow

from flows import tasks
from flows.config import PipelineConfig, resolve
from flows.plan import find_checkpoint, find_dataset, run_spec
from flows.results import TrainSummary, ValidationSummary
from flows.store import absolute_root
from infra.storage import open_store


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
    if trained is not None:
        return tasks.validate(config, root, trained.dataset_prefix, trained.prefix, trained.step)
    store = open_store(root)
    dataset, manifest = find_dataset(config, store)
    checkpoint, step = find_checkpoint(store, run_spec(config, root, dataset, manifest))
    return tasks.validate(config, root, dataset, checkpoint, step)
