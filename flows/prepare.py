"""The flow that makes a dataset: select rows, download their pictures, encode them."""

from prefect import flow

from flows import tasks
from flows.config import PipelineConfig, resolve
from flows.results import PrepareResult
from flows.store import absolute_root


@flow(name="prepare")
def prepare(config: PipelineConfig | str, root: str = "var/store") -> PrepareResult:
    """Makes the dataset of a config complete.

    Args:
        config: What to make, or a recipe's name.
        root: The object store's root.
    """
    config, root = resolve(config), absolute_root(root)
    tasks.ensure_base(config)
    selected = tasks.select(config, root)
    downloaded = tasks.download(config, root, selected.prefix)
    encoded = tasks.encode(config, root, downloaded.prefix)
    stages = {summary.stage: summary for summary in (selected, downloaded, encoded)}
    return PrepareResult(datasets={name: summary.manifest_uri for name, summary in stages.items()}, stages=stages)
