"""The flow that trains the 9-channel inpainting UNet on a prepared dataset."""

import contextlib
import logging
from collections.abc import Iterator

import httpx
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.runtime import deployment

from flows import tasks
from flows.config import PipelineConfig, resolve
from flows.deployments import staged
from flows.form import NOTHING, ROOT, TextOrNothing, TrainForm
from flows.plan import find_dataset, run_spec
from flows.results import TrainSummary
from flows.store import absolute_root, read_manifest
from infra.bundles import find_bundle
from infra.storage import open_store
from training.runspec import RunSpec, checkpoint_prefix

LOGGER = logging.getLogger(__name__)


@flow(name="train")
def train(config: TrainForm, root: str = ROOT, dataset: TextOrNothing = NOTHING) -> TrainSummary:
    """Trains to the last step, going on from the newest checkpoint that stands.

    Args:
        config: What to train: a recipe, and settings over it.
        root: The object store's root: a folder, file:///… or s3://bucket/prefix.
        dataset: Key of an encoded dataset's folder; empty (over the API: left out, not null): the one that the config
            names or makes.
    """
    config, root = resolve(config), absolute_root(root)
    tasks.ensure_base(config)
    run = _run_of(config, root, dataset)
    with _one_at_a_time(run):
        return tasks.train(config, root, run.dataset_prefix)


def trained(config: PipelineConfig, root: str, dataset: str) -> TrainSummary:
    """The flow in this process, or as its deployment, as the config says."""

    def is_done() -> bool:
        run = _run_of(config, root, dataset)
        return find_bundle(open_store(root), checkpoint_prefix(run.run_id, run.train.num_steps)) is not None

    return staged("train", config, lambda: train(config, root, dataset), is_done, {"root": root, "dataset": dataset})


def _run_of(config: PipelineConfig, root: str, dataset: str | None) -> RunSpec:
    store = open_store(root)
    if dataset is None or config.train.names_datasets:
        return run_spec(config, root, *find_dataset(config, store))
    return run_spec(config, root, dataset, read_manifest(store, dataset, field="train.dataset"))


@contextlib.contextmanager
def _one_at_a_time(run: RunSpec) -> Iterator[None]:
    """Lets runs of deployments that train the same wait for one another: a limit of Prefect that bears the run's id.

    It saves the work of doing a thing twice, and is no guard: what stands in the store does not depend on it, a slot
    whose holder died is free after a minute, and who trains at the command line is not made to wait. A limit of a
    deployment would not do, for that is one for all run ids.
    """
    if deployment.id is None:
        yield
        return
    name = f"lacuna-train-{run.run_id}"
    with contextlib.suppress(ObjectAlreadyExists), get_client(sync_client=True) as client:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
    try:
        with concurrency(name, lease_duration=60):
            yield
    finally:  # else one would stay for each run that has failed; who begins next makes it again
        _delete_limit(name)


def _delete_limit(name: str) -> None:
    """Deletes a limit; what became of the training does not depend on whether that works."""
    try:
        with contextlib.suppress(ObjectNotFound), get_client(sync_client=True) as client:
            client.delete_global_concurrency_limit_by_name(name)
    except httpx.HTTPError as error:
        LOGGER.warning("the limit %s is not deleted: %s: %s", name, type(error).__name__, error)
