"""Batches in order, put together ahead of need by threads, in memory that is used again and again."""

import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from model.lone_threads import lone_threads
from preprocessing.contracts.manifest import DatasetFile
from training.batch import Batch
from training.part import Part

if TYPE_CHECKING:
    from training.data import TrainingDataset

LOGGER = logging.getLogger(__name__)

_NUM_KEPT = 2
"""A batch stays as it is until the next but one is asked for: a copy to the GPU may still be under way."""


@dataclass(frozen=True)
class Share:
    """Which samples one process takes.

    Attributes:
        seed: The training's.
        global_batch_size: Samples a step, over all processes; a multiple of `world_size`.
        rank: This process.
        world_size: Number of processes.
    """

    seed: int
    global_batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.global_batch_size < 1 or self.world_size < 1 or self.global_batch_size % self.world_size:
            raise ValueError(
                f"global_batch_size: {self.global_batch_size} is not a multiple of world_size {self.world_size}"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank: {self.rank} is not one of world_size {self.world_size}")

    @property
    def num_samples(self) -> int:
        """Samples that this process takes at a step."""
        return self.global_batch_size // self.world_size

    def positions(self, step: int) -> range:
        """The positions of those samples in the endless sequence of epochs."""
        start = step * self.global_batch_size + self.rank * self.num_samples
        return range(start, start + self.num_samples)


class Batches:
    """An iterator over one process's batches, without end or up to a step; made by `TrainingDataset.batches`.

    What it gives depends on `share` and the step only: not on the number of threads. A batch's tensors are views of
    memory that is used again: they stay as they are until the next but one batch is asked for.

    Args:
        dataset: The rows.
        share: Which of them.
        start_step: Step of the first batch.
        num_steps: How many batches; None: without end.
        num_workers: Threads that put batches together ahead of need; 0: each is made when it is asked for.
        num_fetchers: Threads that verify shards, and fetch them, ahead of need; 0: each when it is first needed.
        pin_memory: Whether the memory is pinned.
    """

    def __init__(
        self,
        dataset: "TrainingDataset",
        share: Share,
        *,
        start_step: int = 0,
        num_steps: int | None = None,
        num_workers: int = 1,
        num_fetchers: int = 2,
        pin_memory: bool = False,
    ) -> None:
        self._dataset, self._share = dataset, share
        self._step = self._next_to_make = start_step
        self._end = None if num_steps is None else start_step + num_steps
        self._workers = lone_threads(num_workers, "batch") if num_workers else None
        self._fetchers = ThreadPoolExecutor(num_fetchers, "shard") if num_fetchers else None
        self._num_ahead = 2 * num_workers
        self._made: deque[Future[Batch]] = deque()
        self._windows: tuple[tuple[int, int], ...] = ()
        self._asked_for: set[str] = set()
        self._buffers = [
            dataset.make_buffers(share.num_samples, pin_memory=pin_memory) for _ in range(self._num_ahead + _NUM_KEPT)
        ]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The batch of the next step.

        Raises:
            ContractError: A shard that it needs is missing or damaged; so again when it is asked for again.
            TransientError: The store could not be reached.
        """
        if self._step == self._end:
            raise StopIteration
        self._prepare_shards()
        if self._workers is None:
            batch = self._make(self._step)
        else:
            while self._next_to_make != self._end and self._next_to_make < self._step + self._num_ahead:
                self._made.append(self._workers.submit(self._make, self._next_to_make))
                self._next_to_make += 1
            try:
                batch = self._made[0].result()
            except BaseException:
                self._forget_made()
                raise
            self._made.popleft()
        self._step += 1
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads; what they are at is finished first."""
        for pool in (self._workers, self._fetchers):
            if pool is not None:
                pool.shutdown(cancel_futures=True)
        self._end = self._step

    def _make(self, step: int) -> Batch:
        return self._dataset.fill(
            self._buffers[step % len(self._buffers)], self._share.positions(step), self._share.seed
        )

    def _forget_made(self) -> None:
        """After an error: nothing of what was made ahead is handed out, and the next call makes this batch anew."""
        for made in self._made:
            made.cancel()
        for made in self._made:
            if not made.cancelled():
                made.exception()  # waits: its memory will be used again
        self._made.clear()
        self._next_to_make = self._step

    def _prepare_shards(self) -> None:
        if self._fetchers is None:
            return
        seed, position = self._share.seed, self._share.positions(self._step).start
        windows = self._dataset.windows_at(seed, position)
        if windows == self._windows:
            return
        due = self._dataset.due(seed, position)
        for sha256, (part, file) in due.items():
            if sha256 not in self._asked_for:
                self._fetchers.submit(_prepare, part, file)
        self._windows, self._asked_for = windows, set(due)


def _prepare(part: Part, file: DatasetFile) -> None:
    try:
        part.prepare(file)
    except (ValueError, RuntimeError, OSError) as error:  # whoever needs the shard meets it again, and raises it
        LOGGER.debug("a shard could not be made ready ahead of need: %s", error)
