"""One Prefect task a stage: what is there already, else the stage's own runner; retried if the outside world failed.

Nothing is cached or persisted by Prefect: whether a thing is done is decided by what stands in the store. Arguments and
results are references and counts. What a stage needs is imported when it runs.
"""

import contextlib
import datetime
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task, exponential_backoff

from flows import artifacts, events
from flows.child_logs import run_logger
from flows.config import PipelineConfig
from flows.plan import data_stage, dataset_lineage, export_spec, run_spec, train_summary, validation_spec
from flows.progress import listener, training_text, training_warning
from flows.publication import find_publication, pointers, record_publication, settled_channels
from flows.results import PublishSummary, StageSummary, TrainSummary, ValidationSummary
from flows.retention import delete_encoded_pictures, fetch_again_if_needed
from flows.server import beside
from flows.store import read_manifest
from flows.watchdog import current, watched
from infra import pulse
from infra.bundles import find_bundle
from infra.errors import GateError, TransientError
from infra.storage import ObjectStore, open_store
from preprocessing.contracts.manifest import MANIFEST_NAME, Manifest, dataset_prefix, find_manifest
from training.runspec_validation import ExportSpec

if TYPE_CHECKING:
    from preprocessing.contracts.manifest import ShardReport
    from preprocessing.stage import Progress, Stage


def is_transient(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether a failed task may be tried again: only if the outside world failed."""
    return isinstance(state.result(raise_on_failure=False), TransientError)


RETRIED: dict[str, Any] = {
    "retries": 2,
    "retry_delay_seconds": exponential_backoff(backoff_factor=5),
    "retry_jitter_factor": 0.2,
    "retry_condition_fn": is_transient,
    "cache_policy": NO_CACHE,
    "persist_result": False,
}


@task(name="base", tags={"data"}, **RETRIED)
@watched("base")
def base(config: PipelineConfig) -> None:
    """Fetches and converts the base weights, in a process of its own."""
    from preprocessing.base_weights import resolve_base

    started = time.monotonic()
    progress = artifacts.ProgressArtifact("base", listener())

    def on_step(what: str) -> None:
        pulse.beat()
        progress.advance(0, 1, what)

    folder = resolve_base(config.model, on_step)
    progress.finish(_done_text(False, f"{config.model.base} is now {folder}", time.monotonic() - started))


def ensure_base(config: PipelineConfig) -> None:
    """Makes the base weights ready, as a task of their own if there is anything to do.

    Raises:
        ValueError: They cannot be used, or are not those of the pin.
    """
    from preprocessing.base_weights import resolve_base

    if config.model.find_directory() is None:
        base(config)
    else:
        resolve_base(config.model)  # no more than checks


@task(name="select", tags={"data"}, **RETRIED)
@watched("select")
def select(config: PipelineConfig, root: str) -> StageSummary:
    """Selects rows of the metadata."""

    def gate(manifest: Manifest) -> None:
        from preprocessing.select import check_gate

        check_gate(manifest, config.select)

    return _run_data_stage("select", config, root, None, gate)


@task(name="download", tags={"data", "network"}, **RETRIED)
@watched("download")
def download(config: PipelineConfig, root: str, selected: str) -> StageSummary:
    """Downloads the pictures of the selected rows; ``selected`` is the key of their dataset's folder."""
    fetch_again_if_needed(config, root, selected)

    def gate(manifest: Manifest) -> None:
        from preprocessing.download.stage import check_gate

        check_gate(manifest, config.download)

    def refused(store: ObjectStore, stage: "Stage", manifest: Manifest) -> None:
        from preprocessing.download.stage import ask_again

        ask_again(store, stage, manifest)

    return _run_data_stage("download", config, root, selected, gate, on_refusal=refused)


@task(name="encode", tags={"data", "lacuna-gpu"}, **RETRIED)
@watched("encode")
def encode(config: PipelineConfig, root: str, downloaded: str) -> StageSummary:
    """Encodes downloaded pictures into training rows; ``downloaded`` is the key of their dataset's folder."""

    def gate(manifest: Manifest) -> None:
        from preprocessing.encode.stage import check_gate

        check_gate(manifest, config.select.validation_fraction)

    def in_workers(stage: "Stage", tell: Callable[["Progress"], None]) -> None:
        from preprocessing.encode.job import EncodeJob, num_gpus, run_workers
        from preprocessing.stage import Progress, reported_shards

        num_processes = config.encode.num_processes or max(1, num_gpus())
        if num_processes == 1 and num_gpus() == 0:
            return  # here: a process of its own would free no GPU, and take its time to start
        done = reported_shards(open_store(root), stage)

        def on_shard(report: "ShardReport") -> None:
            if report.index not in done:  # two may make one
                done.add(report.index)
                tell(Progress(stage.name, len(done), stage.num_shards, report))

        tell(Progress(stage.name, len(done), stage.num_shards, was_done=bool(done)))
        job = EncodeJob(store_uri=root, downloaded_prefix=downloaded, encode=config.encode, model=config.model)
        with _workdir(root, "encode") as workdir:
            run_workers(job, num_processes, workdir=workdir, on_shard=on_shard)

    summary = _run_data_stage("encode", config, root, downloaded, gate, in_workers)
    delete_encoded_pictures(config, root, downloaded)
    return summary


@task(name="train", tags={"lacuna-gpu"}, **RETRIED)
@watched("train")
def train(config: PipelineConfig, root: str, dataset: str) -> TrainSummary:
    """Trains to the last step, from the newest checkpoint on; ``dataset`` is the encoded dataset's folder's key."""
    from training.launch import train as launch

    started = time.monotonic()
    store = open_store(root)
    run = run_spec(config, root, dataset, read_manifest(store, dataset, field="train.dataset"))
    progress = artifacts.ProgressArtifact("train", listener())
    watch, logger = current(), run_logger()

    def on_event(event: dict[str, Any]) -> None:
        if event.get("event") == "step":
            progress.advance(event["step"], event["num_steps"], training_text(event))
        elif watch is not None and event.get("event") in ("started", "resumed", "uploading", "checkpoint"):
            watch.touch()
        if (warning := training_warning(event)) is not None:
            logger.warning("%s", warning)

    with _workdir(root, run.run_id) as workdir:
        result = launch(run, workdir=workdir, on_event=on_event)
    seconds = time.monotonic() - started
    summary = train_summary(store, run, result.checkpoint_prefix, was_done=result.was_done, seconds=seconds)
    artifacts.checkpoint(summary)
    progress.finish(_done_text(summary.was_done, f"step {summary.step}", summary.seconds))
    return summary


@task(name="validate", tags={"lacuna-gpu"}, **RETRIED)
@watched("validate")
def validate(config: PipelineConfig, root: str, trained: TrainSummary) -> ValidationSummary:
    """Inpaints held-out pictures with a checkpoint."""
    started = time.monotonic()
    store = open_store(root)
    spec = validation_spec(config, root, trained)
    progress = artifacts.ProgressArtifact("validate", listener())
    was_done = find_bundle(store, spec.report_prefix(store)) is not None
    if not was_done:
        _run_child("training.validation", spec.model_dump(mode="json"), root, trained.run_id, progress)
    prefix = spec.report_prefix(store)
    report = json.loads(store.read(f"{prefix}/report.json"))
    summary = ValidationSummary(
        run_id=trained.run_id,
        step=trained.step,
        prefix=prefix,
        report=store.uri_of(f"{prefix}/report.html"),
        grid=store.uri_of(f"{prefix}/grid.png"),
        summary=report["summary"],
        num_samples=report["num_samples"],
        num_object_samples=(report["prompt_following"] or {}).get("num_samples", 0),
        was_done=was_done,
        seconds=time.monotonic() - started,
    )
    artifacts.report(summary, store)
    progress.finish(_done_text(was_done, "report written", summary.seconds))
    return summary


@task(name="publish", tags={"publish"}, **RETRIED)
@watched("publish")
def publish(config: PipelineConfig, root: str, trained: TrainSummary, validation: ValidationSummary) -> PublishSummary:
    """Exports a validated checkpoint and moves the channels that may be moved."""
    started = time.monotonic()
    store = open_store(root)
    manifest = read_manifest(store, trained.dataset_prefix)
    lineage = dataset_lineage(store, trained.dataset_prefix, manifest)
    spec = export_spec(config, root, trained, validation.prefix, [prefix for prefix, _ in lineage])
    progress = artifacts.ProgressArtifact("publish", listener())
    channels = settled_channels(store, spec)
    was_done = channels is not None
    if channels is None:
        stood = pointers(store, spec)
        result = _run_child("training.export", spec.model_dump(mode="json"), root, trained.run_id, progress)
        channels = result["channels"]
        record_publication(store, spec, stood, channels)
    summary = _published(store, spec, channels, was_done=was_done, seconds=time.monotonic() - started)
    events.checkpoint_published(store, summary, trained, store.uri_of(f"{trained.dataset_prefix}/{MANIFEST_NAME}"))
    artifacts.publication(summary)
    artifacts.story(store, lineage, trained, validation, summary)
    progress.finish(_done_text(was_done, "export and channels", summary.seconds))
    return summary


@task(name="published", tags={"publish"}, **RETRIED)
def published_elsewhere(
    config: PipelineConfig, root: str, trained: TrainSummary, validation: ValidationSummary
) -> PublishSummary | None:
    """What another flow run has published and said of the channels; None where the store knows of none."""
    store = open_store(root)
    lineage = dataset_lineage(store, trained.dataset_prefix, read_manifest(store, trained.dataset_prefix))
    spec = export_spec(config, root, trained, validation.prefix, [prefix for prefix, _ in lineage])
    made = find_publication(store, spec)
    channels = settled_channels(store, spec) if made is None else made.channels
    if channels is None:
        return None
    summary = _published(store, spec, channels, was_done=False, seconds=0.0)
    artifacts.publication(summary)
    artifacts.story(store, lineage, trained, validation, summary)
    return summary


def is_published(config: PipelineConfig, root: str, trained: TrainSummary, validation: ValidationSummary) -> bool:
    """Whether the export stands, and nothing has to be asked about its channels."""
    return settled_channels(open_store(root), export_spec(config, root, trained, validation.prefix, ())) is not None


def _published(
    store: ObjectStore, spec: ExportSpec, channels: dict[str, str], *, was_done: bool, seconds: float
) -> PublishSummary:
    return PublishSummary(
        run_id=spec.run_id,
        step=spec.step,
        prefix=spec.export_prefix,
        export=store.uri_of(spec.export_prefix),
        channel=channels,
        was_done=was_done,
        seconds=seconds,
    )


def _run_data_stage(
    name: str,
    config: PipelineConfig,
    root: str,
    parent_prefix: str | None,
    gate: Callable[[Manifest], None],
    in_workers: "Callable[[Stage, Callable[[Progress], None]], None] | None" = None,
    *,
    on_refusal: "Callable[[ObjectStore, Stage, Manifest], None] | None" = None,
) -> StageSummary:
    """Makes a dataset if it is not there.

    Args:
        name: Of the stage.
        config: Of the pipeline.
        root: Of the store.
        parent_prefix: Key of the folder of what the stage reads.
        gate: Asked of the dataset each time, also where it was there.
        in_workers: May make it in other processes, or leave it to this one; not asked where `operations.task_runner`
            maps the shards over tasks.
        on_refusal: Where given, a dataset that the gate refuses is not complete, so that nothing takes it for done;
            called with what was refused.
    """
    from preprocessing.stage import run_stage

    started = time.monotonic()
    store = open_store(root)
    stage = data_stage(name, config, store, None if parent_prefix is None else read_manifest(store, parent_prefix))
    prefix = dataset_prefix(name, stage.digest)
    progress = artifacts.ProgressArtifact(name, listener())
    done = find_manifest(store, prefix)

    def gate_first(manifest: Manifest) -> None:
        try:
            gate(manifest)
        except GateError:
            assert on_refusal is not None
            on_refusal(store, stage, manifest)
            summary = _summary(store, prefix, manifest, was_done=False, seconds=time.monotonic() - started)
            artifacts.funnel(summary)  # it shows why
            progress.finish(f"refused: {summary.num_out} of {summary.num_in} rows came")
            raise

    if done is None:
        with _pictures_served(name, config):
            tell = _teller(progress)
            if parent_prefix is not None and config.operations.task_runner is not None:
                from flows.shard_tasks import map_shards

                map_shards(config, root, parent_prefix, stage, tell)
            elif in_workers is not None:
                in_workers(stage, tell)
            # It finds there what workers or tasks made.
            manifest = run_stage(store, stage, tell, None if on_refusal is None else gate_first)
    else:
        manifest = done
    summary = _summary(store, prefix, manifest, was_done=done is not None, seconds=time.monotonic() - started)
    artifacts.funnel(summary)
    artifacts.stage_report(summary, store, manifest)
    progress.finish(_done_text(summary.was_done, f"{summary.num_out} of {summary.num_in} rows kept", summary.seconds))
    gate(manifest)
    # Only then: who hears of a dataset may use it.
    parent_uris = [] if parent_prefix is None else [store.uri_of(f"{parent_prefix}/{MANIFEST_NAME}")]
    events.dataset_committed(summary, manifest.created_at, manifest.parents, parent_uris)
    return summary


def _summary(store: ObjectStore, prefix: str, manifest: Manifest, *, was_done: bool, seconds: float) -> StageSummary:
    return StageSummary(
        stage=manifest.stage,
        manifest_uri=store.uri_of(f"{prefix}/{MANIFEST_NAME}"),
        prefix=prefix,
        digest=manifest.digest,
        num_in=manifest.num_in,
        num_out=manifest.num_out,
        dropped=manifest.dropped,
        was_done=was_done,
        seconds=seconds,
    )


def _teller(progress: artifacts.ProgressArtifact) -> Callable[["Progress"], None]:
    """Tells rows kept, and of what was made here and now, rows/s and the time that is left."""
    started = time.monotonic()
    num_rows = num_kept = num_made = 0

    def tell(at: "Progress") -> None:
        nonlocal num_rows, num_kept, num_made
        text = f"{num_kept} rows kept"
        if at.report is not None:
            num_rows, num_kept, num_made = num_rows + at.report.num_in, num_kept + at.report.num_out, num_made + 1
            seconds = max(1e-3, time.monotonic() - started)
            left_s = (at.num_shards - at.num_done) * seconds / num_made
            left = datetime.timedelta(seconds=round(left_s))
            text = f"{num_kept} rows kept, {num_rows / seconds:.3g} rows/s, {left} left"
        progress.advance(at.num_done, at.num_shards, text)

    return tell


@contextlib.contextmanager
def _pictures_served(name: str, config: PipelineConfig) -> Iterator[None]:
    """The demo world's pictures exist only while they are downloaded."""
    if name != "download" or not config.source.is_demo:
        yield
        return
    from preprocessing.demo.server import serve_demo_world

    with serve_demo_world(config.source.demo.port):
        yield


def _run_child(
    module: str, spec: dict[str, Any], root: str, run_id: str, progress: artifacts.ProgressArtifact
) -> dict[str, Any]:
    """Runs a module that needs torch in a process of its own."""
    from infra.launch import run_module

    def on_event(event: dict[str, Any]) -> None:
        if "what" in event:
            progress.advance(event.get("num_done", 0), event.get("num_total", 1), event["what"])

    with _workdir(root, run_id) as workdir:
        return run_module(module, spec, workdir=workdir, on_event=on_event)


@contextlib.contextmanager
def _workdir(root: str, run_id: str) -> Iterator[Path]:
    """A folder for a child's scratch and logs: removed when all went well, kept with its logs otherwise."""
    parent = beside(root, "work")
    parent.mkdir(parents=True, exist_ok=True)
    workdir = Path(tempfile.mkdtemp(prefix=f"{run_id}-", dir=parent))
    yield workdir
    shutil.rmtree(workdir, ignore_errors=True)


def _done_text(was_done: bool, what: str, seconds: float) -> str:
    return f"already done: {what}" if was_done else f"{what} ({seconds:.0f} s)"
