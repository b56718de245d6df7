"""Curves for people: TensorBoard, Weights & Biases, MLflow. All are views of ``metrics.jsonl``, which is the truth.

A tracker's package is imported when a run that names it starts, never before. From then on no tracker can end a
training: one that fails is dropped with a warning. A resumed run goes on in the same curves: what they already hold of
the steps that are taken again is hidden, or not written twice.
"""

import importlib.util
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

LOGGER = logging.getLogger(__name__)

PROJECT: Final = "lacuna"
"""The project, or experiment, that runs are listed under."""

_MAX_EVENT_FILE_BYTES: Final = 4 << 20
_CLOSE_TIMEOUT_S: Final = 60.0
_MAX_PARAM_CHARS: Final = 500


class Tracker(Protocol):
    """One place where curves are shown. Made for a run's name, local scratch, and the run's configuration."""

    def start(self, step: int) -> None:
        """What follows comes after ``step``; 0 for a new run. Called again where a run goes back."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The values of one step."""
        ...

    def files(self) -> Sequence[Path]:
        """Local files that have changed and are to be kept with the run."""
        ...

    def close(self, *, is_done: bool) -> None:
        """The process ends."""
        ...


# -------------------------------------------------------------------------------------------------------- which to use


def check_trackers(names: Sequence[str]) -> tuple[str, ...]:
    """Looks whether the packages are there, without importing them.

    Args:
        names: `TrainConfig.trackers`.

    Returns:
        Those that can be used. TensorBoard, which nobody had to ask for, is left out with one line in the log.

    Raises:
        ValueError: Another one is not installed; says how to.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    for name in missing:
        install = f"pip install {name}"
        if name != "tensorboard":
            raise ValueError(f"train.trackers: {name} is not installed; {install}, or take it out of the list")
        LOGGER.warning("train.trackers: tensorboard is not installed, so no event files are written; %s", install)
    return tuple(name for name in names if name not in missing)


def flatten(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of ``metrics.jsonl``, by names with slashes; what is no number is left out.

    A group becomes its mean: ``{"loss_by_mask": {"full": {"mean": 0.5, "num_samples": 3}}}`` is
    ``{"loss_by_mask/full": 0.5}``.
    """
    return dict(_numbers(line))


def _numbers(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, Mapping):
            inner = {"": value["mean"]} if "mean" in value else value
            yield from ((f"{name}/{rest}".rstrip("/"), number) for rest, number in _numbers(inner))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)


class Trackers:
    """All trackers of a run, on rank 0. Whatever a tracker does, none of these methods raises.

    Args:
        names: From `check_trackers`.
        run_id: What a resumed run finds its curves by.
        folder: Local scratch, for these alone.
        config: The run's configuration, for those that show it.
    """

    def __init__(self, names: Sequence[str], run_id: str, folder: Path, config: Mapping[str, Any]) -> None:
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            self._try(
                name, lambda name=name: self._trackers.update({name: _KINDS[name](run_id, folder / name, config)})
            )

    def start(self, step: int) -> None:
        """The run goes on after a step; what was logged beyond it is taken again."""
        self._each(lambda tracker: tracker.start(step))

    def log(self, step: int, line: Mapping[str, Any]) -> None:
        """Tells a line of ``metrics.jsonl``."""
        if self._trackers:
            values = flatten(line)
            self._each(lambda tracker: tracker.log(step, values))

    def objects(self) -> dict[str, bytes]:
        """What is to be kept beside ``metrics.jsonl`` and has changed: name below the run's folder → content."""
        objects: dict[str, bytes] = {}

        def read(name: str, tracker: Tracker) -> None:
            objects.update({f"{name}/{path.name}": path.read_bytes() for path in tracker.files()})

        for name, tracker in list(self._trackers.items()):
            self._try(name, lambda name=name, tracker=tracker: read(name, tracker))
        return objects

    def close(self, *, is_done: bool) -> None:
        """Ends all; gives up on one that takes longer than a minute.

        Args:
            is_done: Whether the run is done, and not merely over for now.
        """
        for name, tracker in list(self._trackers.items()):
            # A thread: the network may be gone, and the exit code of a finished training must not wait for it.
            closing = threading.Thread(
                target=self._try, args=(name, lambda tracker=tracker: tracker.close(is_done=is_done)), daemon=True
            )
            closing.start()
            closing.join(_CLOSE_TIMEOUT_S)
            if closing.is_alive():
                LOGGER.warning("%s did not take its last values within %.0f s", name, _CLOSE_TIMEOUT_S)
        self._trackers.clear()

    def _each(self, do: Callable[[Tracker], object]) -> None:
        for name, tracker in list(self._trackers.items()):
            self._try(name, lambda tracker=tracker: do(tracker))

    def _try(self, name: str, do: Callable[[], object]) -> None:
        try:
            do()
        except Exception as error:  # a foreign package and a foreign server: what they raise cannot be listed
            self._trackers.pop(name, None)
            LOGGER.warning("%s failed and is told no more; the training goes on: %r", name, error)


# ---------------------------------------------------------------------------------------------------------- the places


class _TensorBoard:
    """Event files, kept in the store with the run: ``tensorboard --logdir`` reads a folder of them as one curve.

    Each session writes files of its own. They begin with the step that they go on from, by which TensorBoard hides what
    files before them hold of it and later ones.
    """

    def __init__(self, run_id: str, folder: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make_writer = SummaryWriter
        self._folder = folder
        self._writer: Any = None
        self._kept: dict[Path, int] = {}
        shutil.rmtree(folder, ignore_errors=True)  # of a session that was killed: what counts of it is in the store

    def start(self, step: int) -> None:
        self.close(is_done=False)
        self._writer = self._make_writer(str(self._folder), purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def files(self) -> list[Path]:
        self._writer.flush()
        sizes = {path: path.stat().st_size for path in sorted(self._folder.iterdir())}
        changed = [path for path, size in sizes.items() if self._kept.get(path) != size]
        self._kept = sizes
        if sizes and sizes[max(sizes)] > _MAX_EVENT_FILE_BYTES:  # not to be put again at every checkpoint
            self.close(is_done=False)
            self._writer = self._make_writer(str(self._folder))
        return changed

    def close(self, *, is_done: bool) -> None:
        if self._writer is not None:
            self._writer.close()


class _WandB:
    """A run of Weights & Biases with our run's id. It takes no step twice: the first value stays."""

    def __init__(self, run_id: str, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=PROJECT, id=run_id, name=run_id, resume="allow", dir=str(folder), config=dict(config)
        )
        self._next = self._run.step

    def start(self, step: int) -> None:
        pass

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._next:
            self._run.log(dict(values), step=step)
            self._next = step + 1

    def files(self) -> list[Path]:
        return []

    def close(self, *, is_done: bool) -> None:
        self._run.finish(exit_code=0 if is_done else 1)


class _MLflow:
    """A run of MLflow that carries our run's id as a tag. It keeps every value of a step, so each is told once."""

    def __init__(self, run_id: str, folder: Path, config: Mapping[str, Any]) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]  # an extra
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]  # likewise

        self._mlflow, self._metric = mlflow, Metric
        self._client = mlflow.MlflowClient()
        experiment = self._client.get_experiment_by_name(PROJECT)
        experiment_id = self._client.create_experiment(PROJECT) if experiment is None else experiment.experiment_id
        found = self._client.search_runs([experiment_id], f"tags.`lacuna.run_id` = '{run_id}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            history = self._client.get_metric_history(self._id, "loss")
            self._next = max((point.step for point in history), default=-1) + 1
        else:
            self._id = self._client.create_run(
                experiment_id, tags={"lacuna.run_id": run_id}, run_name=run_id
            ).info.run_id
            self._next = 0
            params = [Param(name, str(value)[:_MAX_PARAM_CHARS]) for name, value in config.items()]
            self._client.log_batch(self._id, params=params)

    def start(self, step: int) -> None:
        pass

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._next:
            now_ms = time.time_ns() // 1_000_000
            metrics = [self._metric(name, value, now_ms, step) for name, value in values.items()]
            self._client.log_batch(self._id, metrics=metrics, synchronous=False)  # the step does not wait for a server
            self._next = step + 1

    def files(self) -> list[Path]:
        return []

    def close(self, *, is_done: bool) -> None:
        self._mlflow.flush_async_logging()
        self._client.set_terminated(self._id, status="FINISHED" if is_done else "KILLED")


_KINDS: Final[Mapping[str, Callable[[str, Path, Mapping[str, Any]], Tracker]]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}
