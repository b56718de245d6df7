"""The order in which the rows of a dataset are seen: a pure function of (seed, epoch, dataset digest, position).

Shards are permuted every epoch and cut, in that order, into windows; the rows of a window are permuted. To know the
samples at some positions only their windows are computed, so that going on anywhere costs the same as starting.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from model.randomness import stream

ROWS_PER_WINDOW: Final = 1 << 14
"""Rows are shuffled within windows of about so many. All shards of a window are in use at once: at 282 KiB a row they
are 4.6 GB, which must be read, and from S3 fetched, before the window can be drawn from."""

_NUM_EPOCHS_KEPT = 4
_NUM_WINDOWS_KEPT = 8


@dataclass(frozen=True)
class EpochPlan:
    """How one epoch is cut into windows.

    Attributes:
        shards: The shards in the order of this epoch.
        starts: (num_windows + 1,) positions within the epoch at which windows begin, and the epoch's end.
        first_shards: (num_windows + 1,) for each window, where in `shards` it begins; and their number.
    """

    shards: np.ndarray
    starts: np.ndarray
    first_shards: np.ndarray

    @property
    def num_windows(self) -> int:
        """How many there are."""
        return len(self.starts) - 1

    def window_of(self, place: np.ndarray | int) -> np.ndarray:
        """The windows in which some positions within the epoch lie."""
        return np.searchsorted(self.starts, place, side="right") - 1

    def shards_of(self, window: int) -> np.ndarray:
        """The shards of a window."""
        return self.shards[self.first_shards[window] : self.first_shards[window + 1]]


class SampleOrder:
    """The endless sequence of epochs over one dataset.

    Args:
        seed: The training's.
        dataset_digest: The dataset's.
        num_rows: Rows of each shard, none of them 0.
        rows_per_window: About how many rows are mixed.

    Attributes:
        num_windows_computed: How often a window was permuted; for tests and measurements.
    """

    def __init__(
        self, seed: int, dataset_digest: str, num_rows: Sequence[int], rows_per_window: int = ROWS_PER_WINDOW
    ) -> None:
        self._name = (seed, dataset_digest)
        self._num_rows = np.asarray(num_rows, dtype=np.int64)
        self._total = int(self._num_rows.sum())
        self._rows_per_window = rows_per_window
        self.num_windows_computed = 0
        # Bound to the object, not to the class: the caches go when it goes.
        self.plan_of = functools.lru_cache(_NUM_EPOCHS_KEPT)(self._plan_of)
        self._rows_of = functools.lru_cache(_NUM_WINDOWS_KEPT)(self._compute_window)

    def locate(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The samples at some positions.

        Args:
            positions: From 0 to any number, in any order.

        Returns:
            For each its epoch, its shard, and its row within the shard: int64.
        """
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self._total)
        shards, rows = np.empty_like(epochs), np.empty_like(epochs)
        for epoch in np.unique(epochs):
            plan = self.plan_of(int(epoch))
            windows = plan.window_of(places)
            for window in np.unique(windows[epochs == epoch]):
                chosen = (epochs == epoch) & (windows == window)
                shards[chosen], rows[chosen] = self._rows_of(int(epoch), int(window))[
                    :, places[chosen] - plan.starts[window]
                ]
        return epochs, shards, rows

    def window_at(self, position: int) -> tuple[int, int]:
        """The epoch of a position, and its window in that epoch."""
        epoch, place = divmod(position, self._total)
        return epoch, int(self.plan_of(epoch).window_of(place))

    def windows_from(self, position: int) -> Iterator[np.ndarray]:
        """The shards of the window in which a position lies, of the one after it, and so on without end."""
        epoch, window = self.window_at(position)
        while True:
            plan = self.plan_of(epoch)
            yield plan.shards_of(window)
            epoch, window = (epoch, window + 1) if window + 1 < plan.num_windows else (epoch + 1, 0)

    def position_of(self, epoch: int, shard: int, row: int) -> int:
        """Where a row is seen in an epoch: the inverse of `locate`."""
        plan = self.plan_of(epoch)
        at = int(np.flatnonzero(plan.shards == shard)[0])
        window = int(np.searchsorted(plan.first_shards, at, side="right")) - 1
        shards, rows = self._rows_of(epoch, window)
        place = int(np.flatnonzero((shards == shard) & (rows == row))[0])
        return epoch * self._total + int(plan.starts[window]) + place

    def stand_ins(self, position: int) -> Iterator[tuple[int, int]]:
        """Who may be seen in place of the sample at a position, the first choice first: a pure function, too.

        They are the other rows of its window, in their order, from half a window away on, so that a batch rarely holds
        one twice; then those of the epoch's next windows, so that the files that are in use suffice if any does.

        Args:
            position: Of the sample that must not be seen.

        Yields:
            Shard, and row within the shard; in the end each row of the epoch, once.
        """
        epoch, place = divmod(position, self._total)
        plan = self.plan_of(epoch)
        own = int(plan.window_of(place))
        for window in (*range(own, plan.num_windows), *range(own)):
            rows = self._rows_of(epoch, window)
            size = rows.shape[1]
            first = place - int(plan.starts[window]) + (size + 1) // 2 if window == own else 0
            for i in range(first, first + size):
                shard, row = rows[:, i % size].tolist()
                yield shard, row

    def next_needs(self, position: int) -> np.ndarray:
        """When each shard is needed next, as seen from a position: 0 is now, and the greatest number last.

        Args:
            position: Of the sample that is due.

        Returns:
            One number a shard: windows until then; shards of this epoch's past count from the next epoch's plan.
        """
        epoch, now = self.window_at(position)
        plan, following = self.plan_of(epoch), self.plan_of(epoch + 1)
        needs = np.empty(len(self._num_rows), dtype=np.int64)
        needs[following.shards] = np.repeat(np.arange(following.num_windows), np.diff(following.first_shards))
        needs += plan.num_windows - now
        ahead = plan.shards[plan.first_shards[now] :]
        needs[ahead] = np.repeat(np.arange(plan.num_windows - now), np.diff(plan.first_shards[now:]))
        return needs

    def _plan_of(self, epoch: int) -> EpochPlan:
        shards = _permutation(len(self._num_rows), "shards", *self._name, epoch)
        ends = np.cumsum(self._num_rows[shards])
        begins = ends - self._num_rows[shards]
        # A shard belongs to the window in whose stretch of positions it begins, so no window is many rows too long.
        first_shards = np.unique(begins // self._rows_per_window, return_index=True)[1]
        return EpochPlan(shards, np.append(begins[first_shards], ends[-1]), np.append(first_shards, len(shards)))

    def _compute_window(self, epoch: int, window: int) -> np.ndarray:
        """(2, rows of the window): shards, and rows in them, in order."""
        self.num_windows_computed += 1
        shards = self.plan_of(epoch).shards_of(window)
        sizes = self._num_rows[shards]
        order = _permutation(int(sizes.sum()), "rows", *self._name, epoch, window)
        firsts = np.cumsum(sizes) - sizes
        rows = np.arange(len(order)) - np.repeat(firsts, sizes)
        return np.stack([np.repeat(shards, sizes), rows])[:, order]


def _permutation(num: int, *name: int | str) -> np.ndarray:
    """A uniform permutation of ``0 … num - 1``: the places of random keys when they are sorted.

    Not ``Generator.permutation``, whose stream may change with a release of numpy; a bit generator's never does.
    """
    keys = stream("order", *name).bit_generator.random_raw(num)
    return np.argsort(np.asarray(keys, dtype=np.uint64), kind="stable")
