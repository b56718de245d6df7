"""Shards of download and encode as tasks of their own, mapped over an engine: `operations.task_runner`.

A task gets references only: where the store is, which dataset is read, what to make, and which shards. It makes them
with the stage's own `run_shards`, so what it commits is what one process would have, and a task that is tried again, or
runs twice, finds what is there. The parent submits the parts in which something is to do, as many at a time as it may,
looks into the store for what came, and then runs the stage itself, which finds all done and writes the manifest.

A shard may take longer than the parent's watch is patient. Where the parent does not hear the beats of `infra.pulse`,
in other processes, a task leaves a sign of them in the store now and then, and the parent beats when there is a new
one.
"""

import contextlib
import copy
import math
import os
import queue
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from prefect import task
from prefect.futures import PrefectFuture

from flows.config import OperationsConfig, PipelineConfig
from flows.engines import Engine, is_still_wanted, place_here, running_engine
from flows.tasks import RETRIED
from infra import pulse
from infra.errors import ContractError, TransientError
from infra.storage import ObjectStore, open_store
from preprocessing.contracts.bases import TINY
from preprocessing.contracts.config import DownloadConfig, EncodeConfig, ModelConfig
from preprocessing.contracts.manifest import Record, dataset_prefix, load_manifest
from preprocessing.encode.job import num_gpus

if TYPE_CHECKING:
    from preprocessing.stage import Progress, ShardOutput, Stage

PARTS_A_WORKER: Final = 8
"""What a straggler costs at the end: an eighth of one worker's share."""

MAX_PARTS: Final = 400
"""Task runs of a stage, but for an engine that runs more at a time."""

_NO_API: Final = "Failed to reach API"  # Prefect's words, of no type of its own
_LOOK_EVERY_S: Final = 5.0
_LONGEST_SIGN_S: Final = 60.0
_LOOKING_SHARE: Final = 0.05  # of the time, where listing the store takes long


class ShardJob(Record):
    """A dataset of which shards are to be made; all that a task needs to know, but which.

    Attributes:
        store_uri: Where datasets stand.
        parent_prefix: Key of the folder of the dataset that is read.
        digest: Of the dataset that is made; code that would make another one is refused.
        session: Of the run that asks: what is loaded is kept in a worker's process for as long.
        download: For a download.
        encode: For an encoding; then with ``model``.
        model: With which models.
        num_gpus: Of the machine of the flow, where its tasks run there, too.
        sign_every_s: How often a task that gets on leaves a sign of it; None where the flow hears it by itself.
    """

    store_uri: str
    parent_prefix: str
    digest: str
    session: str
    download: DownloadConfig | None = None
    encode: EncodeConfig | None = None
    model: ModelConfig | None = None
    num_gpus: int = 0
    sign_every_s: float | None = None

    @property
    def stage(self) -> str:
        """Its name."""
        return "encode" if self.encode is not None else "download"

    @property
    def signs_prefix(self) -> str:
        """Key of the folder of the signs of this session's tasks."""
        return f"{dataset_prefix(self.stage, self.digest)}/signs/{self.session}"


# ------------------------------------------------------------------------------------------------------ in the worker


@task(name="shards", task_run_name="{name}", **RETRIED)
def shards(name: str, job: str, indices: list[int]) -> int:
    """Makes some shards of a dataset; see `make_shards`. It has no tags: its parent holds the slots of those.

    Args:
        name: For people.
        job: A `ShardJob` as JSON.
        indices: Of the shards; none of them to complete the dataset.

    Returns:
        How many are there.
    """
    from flows.shard_tasks import make_shards  # the worker's own: what is sent there is this function alone

    return make_shards(ShardJob.model_validate_json(job), indices)


def make_shards(job: ShardJob, indices: Sequence[int]) -> int:
    """Makes some shards of a dataset, in this process; with no indices, completes a dataset of which all shards stand.

    Returns:
        How many of them are there.

    Raises:
        ContractError: The code here would make another dataset.
        TransientError: The outside world failed; what is done is kept.
    """
    from preprocessing.stage import run_shards, run_stage

    store, stage = _loaded.get(job)
    with _signing(store, job, f"part-{indices[0]:05d}" if indices else "manifest"):
        if not indices:
            return len(run_stage(store, stage).shards)
        return len(run_shards(store, cast("Stage", _Endable(stage, job.session)), indices))


@contextlib.contextmanager
def _signing(store: ObjectStore, job: ShardJob, name: str) -> Iterator[None]:
    """Within, beats leave a sign in the store, one of many does. Who beats cannot be told: any work of this process."""
    every_s = job.sign_every_s
    if every_s is None:
        yield
        return
    lock, told = threading.Lock(), -math.inf

    def tell() -> None:
        nonlocal told
        if time.monotonic() - told < every_s or not lock.acquire(blocking=False):
            return
        try:
            told = time.monotonic()
            with contextlib.suppress(TransientError):  # the work itself will meet it, if it lasts
                store.put(f"{job.signs_prefix}/{name}", f"{told}".encode())
        finally:
            lock.release()

    with pulse.listening(tell):
        yield


class NotWantedError(RuntimeError):
    """Nobody waits for what a task makes; what it has made stands."""


_ended: set[str] = set()
"""Sessions of this process that are over before their tasks are."""


class _Endable:
    """A stage that ends between two shards once nobody waits for them."""

    def __init__(self, stage: "Stage", session: str) -> None:
        self._stage, self._session = stage, session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def outputs(self, indices: Sequence[int], scratch: Path) -> "Iterator[ShardOutput]":
        made = cast("Generator[ShardOutput]", self._stage.outputs(indices, scratch))
        with contextlib.closing(made):  # its children are gone before scratch is
            for output in made:
                yield output
                if self._session in _ended or not is_still_wanted():
                    raise NotWantedError(f"{self._stage.name}: the run that asked for these shards is over")


class _Loaded:
    """The stage that this process works on, with its models: loaded once, whichever threads ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._job: ShardJob | None = None
        self._found: tuple[ObjectStore, Stage] | None = None

    def get(self, job: ShardJob) -> "tuple[ObjectStore, Stage]":
        """A job's store, and its stage for one task: a copy, for a stage notes things as it goes."""
        with self._lock:
            if self._found is None or self._job != job:
                self._job = self._found = None  # two would not fit into memory
                self._found, self._job = _load(job), job
            store, stage = self._found
            return store, copy.copy(stage)  # with the same models, the same ledger

    def forget(self, session: str) -> None:
        """Frees what a session has loaded."""
        with self._lock:
            if self._job is not None and self._job.session == session:
                self._job = self._found = None


_loaded = _Loaded()


def _load(job: ShardJob) -> "tuple[ObjectStore, Stage]":
    store = open_store(job.store_uri)
    parent = load_manifest(store, job.parent_prefix)
    if job.encode is None:
        from preprocessing.download.stage import DownloadStage

        assert job.download is not None
        stage = DownloadStage(store, parent, job.download)
        _check_digest(stage, job)
        return store, stage
    from preprocessing.base_weights import resolve_base
    from preprocessing.encode.stage import EncodeStage

    assert job.model is not None
    if job.model.find_directory() is None:
        resolve_base(job.model)  # this machine has not seen it yet
    device = f"cuda:{place_here() % job.num_gpus}" if job.num_gpus > 1 else None
    stage = EncodeStage(store, parent, job.encode, job.model, device)
    _check_digest(stage, job)
    _ = stage.encoders  # here, where one thread at a time is
    return store, stage


def _check_digest(stage: "Stage", job: ShardJob) -> None:
    if stage.digest != job.digest:
        raise ContractError(
            f"{job.stage}: the worker's code (version {stage.version} of the stage) would make dataset "
            f"{stage.digest[:16]}, the flow's makes {job.digest[:16]}; install the same version and the same model "
            "on all machines"
        )


# ------------------------------------------------------------------------------------------------------ in the parent


def map_shards(
    config: PipelineConfig, root: str, parent_prefix: str, stage: "Stage", tell: "Callable[[Progress], None]"
) -> None:
    """Makes those shards of a download or an encoding that are not there, in tasks of the engine that a config names.

    Args:
        config: Of the pipeline; ``operations.task_runner`` is set.
        root: Of the store.
        parent_prefix: Key of the folder of what the stage reads.
        stage: What is to be made.
        tell: Told of every shard that comes.

    Raises:
        ValueError: The engine is not installed, or its address is none.
        TransientError: The engine does not answer, lost a task, or a part failed for the outside world's sake; the
            other parts were made.
        GateError: As from the stage; parts that were not begun are not.
    """
    from preprocessing.stage import reported_shards

    store = open_store(root)
    operations = config.operations
    seen = _Seen(store, stage, tell, reported_shards(store, stage))
    todo = [index for index in range(stage.num_shards) if index not in seen.indices]
    parts = split_evenly(todo, num_parts(len(todo), operations.max_tasks))
    is_encoding = stage.name == "encode"
    if is_encoding and parts:
        _decide_copies(stage)
    with running_engine(operations, max(1, len(parts)), num_gpus_a_task=int(is_encoding)) as engine:
        job = _job_of(config, root, parent_prefix, stage, engine)
        signs = _Signs(store, job)

        def look() -> None:
            seen.look()
            signs.look()

        try:
            _Mapping(engine, job, operations.max_tasks).run(parts, look)
            if is_encoding:  # its constants are the models' work: done where they are
                _Mapping(engine, job, 1).run([[]], look)
        finally:
            _ended.add(job.session)
            _loaded.forget(job.session)
            signs.delete()
    seen.look()


def num_parts(num_shards: int, max_tasks: int) -> int:
    """Into how many parts shards go: several a worker, so that all end at about the same time, and not too many."""
    return min(num_shards, max(max_tasks, min(PARTS_A_WORKER * max_tasks, MAX_PARTS)))


def split_evenly(indices: Sequence[int], num: int) -> list[list[int]]:
    """Cuts a sequence into consecutive parts, of which none is longer than another by more than one."""
    return [list(indices[len(indices) * part // num : len(indices) * (part + 1) // num]) for part in range(num)]


def _decide_copies(stage: "Stage") -> None:
    """Which rows are copies of others is asked of the whole dataset: once, before the parts would each ask."""
    from preprocessing.encode.stage import EncodeStage

    if isinstance(stage, EncodeStage):
        with tempfile.TemporaryDirectory(prefix="lacuna-copies-") as scratch:
            stage.decide_copies(Path(scratch))


def _job_of(config: PipelineConfig, root: str, parent_prefix: str, stage: "Stage", engine: Engine) -> ShardJob:
    common: dict[str, Any] = {
        "store_uri": root,
        "parent_prefix": parent_prefix,
        "digest": stage.digest,
        "session": uuid.uuid4().hex,
        "sign_every_s": _sign_every_s(config.operations),
    }
    if stage.name == "download":
        return ShardJob(**common, download=config.download)
    encode, model = config.encode, config.model
    if engine.num_sharing is not None and encode.num_threads is None:
        encode = encode.model_copy(update={"num_threads": _share_of_cores(engine.num_sharing)})
    if model.base != TINY:
        model = model.model_copy(update={"base": _from_anywhere(model.base)})
    encode = encode.model_copy(update={"mask_files": tuple(map(_from_anywhere, encode.mask_files))})
    return ShardJob(**common, encode=encode, model=model, num_gpus=num_gpus() if engine.num_sharing else 0)


def _sign_every_s(operations: OperationsConfig) -> float | None:
    """Several times within what the watch waits for, and no oftener than a store takes lightly."""
    if operations.task_runner == "threads":
        return None
    return min(_LONGEST_SIGN_S, operations.stall_timeout_s / 4)


def _from_anywhere(path: str) -> str:
    """A path as a process in another folder may say it; a URL as it is."""
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _share_of_cores(num_workers: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // num_workers)


@dataclass
class _Seen:
    """The shards that stand in the store, as far as the listener has been told."""

    store: ObjectStore
    stage: "Stage"
    tell: "Callable[[Progress], None]"
    indices: set[int]
    _next_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._advance(was_done=bool(self.indices))

    def look(self) -> None:
        """Tells what has come since; in a store that takes long to list, less often than it is asked to."""
        from preprocessing.stage import find_report, reported_shards

        started = time.monotonic()
        if started < self._next_s:
            return
        for index in sorted(reported_shards(self.store, self.stage) - self.indices):
            report = find_report(self.store, self.stage, index)
            if report is not None:
                self.indices.add(index)
                self._advance(report=report)
        taken_s = time.monotonic() - started
        self._next_s = started + taken_s / _LOOKING_SHARE

    def _advance(self, **more: Any) -> None:
        from preprocessing.stage import Progress

        self.tell(Progress(self.stage.name, len(self.indices), self.stage.num_shards, **more))


class _Signs:
    """What tasks in other processes leave in the store while they get on."""

    def __init__(self, store: ObjectStore, job: ShardJob) -> None:
        self._store, self._prefix, self._every_s = store, f"{job.signs_prefix}/", job.sign_every_s
        self._known: dict[str, str] = {}
        self._next_s = 0.0

    def look(self) -> None:
        """Beats where there is a new sign; one listing, not oftener than there may be one."""
        now = time.monotonic()
        if self._every_s is None or now < self._next_s:
            return
        self._next_s = now + self._every_s
        found = {info.key: info.etag for info in self._store.list(self._prefix)}
        if not found.items() <= self._known.items():
            pulse.beat()
        self._known = found

    def delete(self) -> None:
        """Takes them away; one that a task leaves after that does no harm."""
        if self._every_s is None:
            return
        with contextlib.suppress(TransientError):
            for info in list(self._store.list(self._prefix)):
                self._store.delete(info.key)


class _Mapping:
    """Parts on their way through an engine."""

    def __init__(self, engine: Engine, job: ShardJob, max_tasks: int) -> None:
        self._engine, self._job, self._max_tasks = engine, job, max_tasks
        self._done: queue.SimpleQueue[PrefectFuture[int]] = queue.SimpleQueue()

    def run(self, parts: Sequence[list[int]], look: Callable[[], None]) -> None:
        """Makes the parts, and calls ``look`` now and then; raises what they raise, what may pass at the end."""
        waiting = deque(parts)
        running: list[PrefectFuture[int]] = []
        passing: list[TransientError] = []
        try:
            while waiting or running:
                while waiting and len(running) < self._max_tasks:
                    running.append(self._submit(waiting.popleft()))
                try:
                    done = self._done.get(timeout=_LOOK_EVERY_S)
                except queue.Empty:
                    look()
                    continue
                running = [future for future in running if future is not done]
                passing += self._settle(done)
                look()
        except BaseException:
            _ended.add(self._job.session)
            for future in running:
                _cancel(future)
            raise
        if passing:
            others = f" (and so did {len(passing) - 1} other parts)" if len(passing) > 1 else ""
            raise TransientError(f"{passing[0]}{others}") from passing[0]

    def _submit(self, indices: list[int]) -> PrefectFuture[int]:
        what = _named(indices) if indices else "manifest"
        parameters = {
            "name": f"{self._job.stage}: {what}",
            "job": self._job.model_dump_json(),
            "indices": indices,
        }
        future = self._engine.runner.submit(shards, parameters)
        future.add_done_callback(self._done.put)
        return future

    def _settle(self, future: PrefectFuture[int]) -> list[TransientError]:
        """What of a part that has ended may pass; raises anything else."""
        try:
            future.result()
        except TransientError as error:
            return [error]
        except self._engine.lost as error:
            return [TransientError(f"{self._job.stage}: the engine lost a task: {type(error).__name__}: {error}")]
        except RuntimeError as error:
            if not str(error).startswith(_NO_API):
                raise
            raise TransientError(
                f"{self._job.stage}: a worker cannot reach Prefect's API: {error}; see PREFECT_API_URL"
            ) from error
        return []


def _named(indices: Sequence[int]) -> str:
    first, last = indices[0], indices[-1]
    return f"shard {first}" if first == last else f"shards {first} to {last}"


def _cancel(future: PrefectFuture[int]) -> None:
    """Takes back a task that has not begun; what runs ends by itself, see `_Endable`."""
    wrapped = getattr(future, "wrapped_future", None)
    if wrapped is not None and hasattr(wrapped, "cancel"):
        wrapped.cancel()
