"""The whole pipeline as one flow: metadata in, published checkpoint out."""

from prefect import flow

from flows.config import PipelineConfig, resolve
from flows.prepare import prepare
from flows.publish import publish
from flows.results import RunResult
from flows.store import absolute_root
from flows.train import train
from flows.validate import validate


@flow(name="pipeline")
def pipeline(config: PipelineConfig | str, root: str = "var/store") -> RunResult:
    """Runs every stage that is not done yet.

    Args:
        config: What to run, or a recipe's name.
        root: The object store's root.
    """
    config, root = resolve(config), absolute_root(root)
    prepared = prepare(config, root)
    trained = train(config, root, prepared.dataset_prefix)
    validated = validate(config, root, trained)
    published = publish(config, root, trained, validated)
    return RunResult(
        run_id=trained.run_id,
        datasets=prepared.datasets,
        stages=prepared.stages,
        checkpoint=trained.checkpoint,
        report=validated.report,
        grid=validated.grid,
        export=published.export,
        channel=published.channel,
        summary=validated.summary,
        train=trained,
        validation=validated,
        publish=published,
    )
