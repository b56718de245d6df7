"""The whole pipeline as one flow: metadata in, published checkpoint out."""

from prefect import flow, tags

from flows.config import resolve
from flows.deployments import cancel_children
from flows.form import ROOT, PipelineForm
from flows.prepare import prepare
from flows.publish import published
from flows.results import RunResult
from flows.store import absolute_root
from flows.train import trained
from flows.validate import validated


@flow(name="pipeline", on_cancellation=[cancel_children], on_crashed=[cancel_children])
def pipeline(config: PipelineForm, root: str = ROOT) -> RunResult:
    """Metadata in, published checkpoint out: runs every stage that is not done yet.

    Args:
        config: What to run: a recipe, and settings over it.
        root: The object store's root: a folder, file:///… or s3://bucket/prefix.
    """
    config, root = resolve(config), absolute_root(root)
    with tags("lacuna"):  # flows that run inside this one do not get its tags by themselves
        prepared = prepare(config, root)
        checkpoint = trained(config, root, prepared.dataset_prefix)
        report = validated(config, root, checkpoint)
        export = published(config, root, checkpoint, report)
    return RunResult(
        run_id=checkpoint.run_id,
        datasets=prepared.datasets,
        stages=prepared.stages,
        checkpoint=checkpoint.checkpoint,
        report=report.report,
        grid=report.grid,
        export=export.export,
        channel=export.channel,
        summary=report.summary,
        train=checkpoint,
        validation=report,
        publish=export,
    )
