"""One dataset of those that a training reads: its shards in the order of need, and those that are open."""

import functools
import resource
import threading
from collections import OrderedDict
from collections.abc import Container, Sequence

import numpy as np

from infra.errors import ContractError
from preprocessing.contracts.manifest import DatasetFile, Manifest
from preprocessing.contracts.tombstones import Tombstones
from training.order import ROWS_PER_WINDOW, SampleOrder
from training.rows import Shard
from training.shard_files import ShardFiles

_NUM_SEEDS_KEPT = 2
_FRESH_S = 0.05  # before rows are copied; afterwards every file is looked at again
_NUM_WINDOWS_AT_ONCE = 3
"""Of a cache: the one that slower ranks and threads still draw from, the one after it, which faster ones draw from, and
the one that these fetch ahead."""


class Part:
    """The training rows of one dataset.

    Args:
        manifest: Of the dataset.
        prefix: Key of its folder.
        files: Where its files are had from.
        wanted: Columns of fixed width, and their widths.
        num_parts: Datasets that are open at once, this one included.
        tombstones: Rows that must not be seen.

    Attributes:
        digest: The dataset's.
        num_rows: Rows of each shard that had any when it was made: the order counts those that were forgotten, so that
            it stays what it was for all others, and is the same before and after they are removed from the files.
    """

    def __init__(
        self,
        manifest: Manifest,
        prefix: str,
        files: ShardFiles,
        wanted: Sequence[tuple[str, int]],
        num_parts: int = 1,
        tombstones: Tombstones | None = None,
    ) -> None:
        self.digest = manifest.digest
        self._wanted = wanted
        self._entries = [file for file in manifest.files("rows", split="train") if file.num_places]
        self.num_rows = tuple(file.num_places for file in self._entries)
        self._tombstones = tombstones or Tombstones()
        self._is_anything_gone = bool(len(self._tombstones)) or any(file.removed for file in self._entries)
        self._rows_at = functools.cache(self._find_rows)
        self._prefix, self._files = prefix, files
        self.order = functools.lru_cache(_NUM_SEEDS_KEPT)(self._make_order)
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._lock = threading.Lock()
        shards_a_window = ROWS_PER_WINDOW * len(self.num_rows) // max(1, sum(self.num_rows)) + 1
        # An open shard holds two files, its own and the map's; half of what we may open is for all others.
        self._max_open = min(2 * shards_a_window + 8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // (4 * num_parts))

    def _make_order(self, seed: int) -> SampleOrder:
        return SampleOrder(seed, self.digest, self.num_rows)

    def locate(self, seed: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The samples at some own positions; in place of a forgotten one another of its window, always the same.

        Args:
            seed: The training's.
            positions: From 0 to any number.

        Returns:
            For each its epoch, its shard, and its row as it lies in the file: int64.

        Raises:
            ContractError: All rows are forgotten; or a file is missing or damaged.
        """
        order = self.order(seed)
        epochs, shards, places = order.locate(positions)
        if not self._is_anything_gone:
            return epochs, shards, places
        rows = np.array([self._rows_at(s)[p] for s, p in zip(shards.tolist(), places.tolist(), strict=True)], np.int64)
        for i in np.flatnonzero(rows < 0).tolist():
            shards[i], rows[i] = self._stand_in(order, int(positions[i]))
        return epochs, shards, rows

    def _stand_in(self, order: SampleOrder, position: int) -> tuple[int, int]:
        for shard, place in order.stand_ins(position):
            if (row := int(self._rows_at(shard)[place])) >= 0:
                return shard, row
        raise ContractError(
            f"dataset: all {sum(self.num_rows)} training rows of {self._prefix} are forgotten; prepare another dataset"
        )

    def _find_rows(self, index: int) -> np.ndarray:
        """(places,) int32: the row of a shard's file at each place of the order; -1 for those that must not be seen."""
        entry = self._entries[index]
        rows = np.full(entry.num_places, -1, np.int32)
        if not entry.num_rows:
            return rows
        is_there = np.ones(entry.num_places, dtype=bool)
        is_there[list(entry.removed)] = False
        numbers = np.arange(entry.num_rows, dtype=np.int32)
        if len(self._tombstones):
            numbers[self.shard(index).named_by(self._tombstones)] = -1
        rows[is_there] = numbers
        return rows

    def shard(self, index: int) -> Shard:
        """An open shard, of which the content was verified, and which did not change since.

        Raises:
            ContractError: Its file is missing or damaged, or is no such file of rows.
        """
        with self._lock:
            shard = self._open.pop(index, None)
            if shard is not None and shard.is_unchanged(_FRESH_S):
                self._open[index] = shard
                return shard
        entry = self._entries[index]
        shard = Shard(self._files.open(self._prefix, entry), self._wanted)
        if shard.num_rows != entry.num_rows:
            raise ContractError(f"{shard.path}: {shard.num_rows} rows, the manifest says {entry.num_rows}")
        with self._lock:
            self._open[index] = shard
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
        return shard

    def close_all_but(self, sha256s: Container[str]) -> None:
        """Closes the open files that are none of these; one whose rows are being copied, as soon as they are."""
        with self._lock:
            for index in [index for index in self._open if self._entries[index].sha256 not in sha256s]:
                del self._open[index]

    def due(self, seed: int, position: int) -> list[DatasetFile]:
        """The files of the window in which an own position lies, and of the next one: in the order of need."""
        windows = self.order(seed).windows_from(position)
        indices = dict.fromkeys(np.concatenate([next(windows), next(windows)]).tolist())
        return [self._entries[index] for index in indices]

    def needs(self, seed: int, position: int) -> dict[str, int]:
        """When each file is needed next, as seen from an own position, by its sha256."""
        needs = self.order(seed).next_needs(position)
        return {entry.sha256: int(need) for entry, need in zip(self._entries, needs, strict=True)}

    def prepare(self, file: DatasetFile) -> None:
        """Verifies a file, and fetches it if need be, unless someone is at it."""
        self._files.prepare(self._prefix, file)

    @property
    def bytes_at_once(self) -> int:
        """How many bytes of files are in use at once at most: of three windows, or all of the dataset."""
        total = sum(entry.num_bytes for entry in self._entries)
        largest_row = max(entry.num_bytes / max(1, entry.num_rows) for entry in self._entries)
        return min(total, int(_NUM_WINDOWS_AT_ONCE * largest_row * (ROWS_PER_WINDOW + max(self.num_rows))) + 1)
