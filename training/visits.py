"""Which rows of its datasets a training has seen by some position: computed from the order alone, nothing is read."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from preprocessing.contracts.manifest import Manifest
from training.mixture import Mixture, shares_of
from training.order import SampleOrder


@dataclass(frozen=True, order=True)
class Place:
    """A row of a dataset that is trained on.

    Attributes:
        dataset: Key of the dataset's folder.
        file: Name of its file.
        place: Its number in the file as that was made; see `DatasetFile.removed`.
    """

    dataset: str
    file: str
    place: int


@dataclass(frozen=True)
class Course:
    """How far a training has come.

    Attributes:
        position: Samples drawn.
        skipped: Samples that were drawn and not trained on: [first, end) of each range.
        gone: From which positions on which rows were in no batch; in ascending order.
    """

    position: int
    skipped: Sequence[tuple[int, int]] = ()
    gone: Sequence[tuple[int, Collection[Place]]] = ()

    def trains_on(self, position: int) -> bool:
        """Whether the sample at a position has been trained on."""
        return position < self.position and not any(first <= position < end for first, end in self.skipped)

    def gone_at(self, position: int) -> Collection[Place]:
        """The rows that were in no batch at a position."""
        return next((places for first, places in reversed(self.gone) if first <= position), ())


class Visits:
    """When the rows of a training's datasets are seen.

    Args:
        datasets: Manifests of the datasets, by the keys of their folders.
        weights: Theirs, by the same keys.
        seed: The training's.
    """

    def __init__(self, datasets: Mapping[str, Manifest], weights: Mapping[str, float], seed: int) -> None:
        self._prefixes = sorted(datasets, key=lambda prefix: datasets[prefix].digest)
        digests = [datasets[prefix].digest for prefix in self._prefixes]
        self._mixture = Mixture(shares_of([weights[prefix] for prefix in self._prefixes]), seed, digests)
        self._files, self._orders = [], []
        for prefix, digest in zip(self._prefixes, digests, strict=True):
            files = [file for file in datasets[prefix].files("rows", split="train") if file.num_places]
            self._files.append([file.name for file in files])
            self._orders.append(SampleOrder(seed, digest, [file.num_places for file in files]))

    def seen(self, rows: Collection[Place], course: Course) -> set[Place]:
        """Those of some rows that a training was trained on: in their own turn, or in place of a forgotten one."""
        found = {row for row in rows if self._is_seen(row, course)}
        left = set(rows) - found
        for first, places in course.gone if left else ():
            for gone in places:
                for position, part, own in self._visits(gone, course.position):
                    if position >= first and course.trains_on(position) and course.gone_at(position) is places:
                        stand_in = self._stand_in(part, own, places)
                        found |= {stand_in} & left if stand_in is not None else set()
        return found

    def _is_seen(self, row: Place, course: Course) -> bool:
        return any(
            course.trains_on(position) and row not in course.gone_at(position)
            for position, _, _ in self._visits(row, course.position)
        )

    def _visits(self, row: Place, end: int) -> Iterator[tuple[int, int, int]]:
        """Positions before an end, with the dataset's number and the position among its own."""
        part = self._prefixes.index(row.dataset)
        shard = self._files[part].index(row.file)
        epoch = 0
        while True:
            own = self._orders[part].position_of(epoch, shard, row.place)
            position = self._mixture.position_of(part, own)
            if position >= end:
                return
            yield position, part, own
            epoch += 1

    def _stand_in(self, part: int, own: int, gone: Collection[Place]) -> Place | None:
        for shard, place in self._orders[part].stand_ins(own):
            row = Place(self._prefixes[part], self._files[part][shard], place)
            if row not in gone:
                return row
        return None
