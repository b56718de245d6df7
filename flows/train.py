"""The flow that trains the 9-channel inpainting UNet on a prepared dataset."""

from prefect import flow

from flows import tasks
from flows.config import PipelineConfig, resolve
from flows.plan import find_dataset
from flows.results import TrainSummary
from flows.store import absolute_root
from infra.storage import open_store


@flow(name="train")
def train(config: PipelineConfig | str, root: str = "var/store", dataset: str | None = None) -> TrainSummary:
    """Trains to the last step, going on from the newest checkpoint that stands.

    Args:
        config: What to train, or a recipe's name.
        root: The object store's root.
        dataset: Key of an encoded dataset's folder; by default the one that the config names or makes.
    """
    config, root = resolve(config), absolute_root(root)
    tasks.ensure_base(config)
    if dataset is None or config.train.names_datasets:
        dataset, _ = find_dataset(config, open_store(root))
    return tasks.train(config, root, dataset)
