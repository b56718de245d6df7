"""The download stage: from selected rows to rows with pictures.

For each shard: set aside what the ledger says need not be asked, let the engine fetch and normalize the rest, join what
came with what was asked for, give every row that did not make it a reason, and note that in the ledger.
"""

import io
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import ContractError, GateError, TransientError
from infra.storage import ObjectStore, sha256_of_bytes
from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.digests import digest_of
from preprocessing.contracts.manifest import Manifest, dataset_prefix
from preprocessing.contracts.reasons import Reason
from preprocessing.contracts.schemas import DOWNLOADED, SELECTED
from preprocessing.download.addresses import Verdict
from preprocessing.download.compaction import compact
from preprocessing.download.fetch import REQUESTS, fetch_shards
from preprocessing.download.images import NormalizedImage
from preprocessing.download.ledger import MEMORY, Ledger, Memory
from preprocessing.stage import RowsFile, ShardOutput, Stage, find_report, forget_shards, rejects_table

LOGGER = logging.getLogger(__name__)

STAGE_VERSION = 4

_SHARDS_A_CHILD = 256  # bounds what waits on the local disk
_UNREACHABLE = frozenset({Reason.HOST_UNKNOWN, Reason.CONNECTION_FAILED, Reason.TIMED_OUT})
_NO_ANSWER = _UNREACHABLE | {Reason.URL_REFUSED}
_LOST: Verdict = Reason.LOST_BY_DOWNLOADER, "the engine says nothing about this row"


@dataclass(frozen=True)
class _Made:
    """A shard as it came.

    Attributes:
        output: All of its rows.
        outcomes: Of the rows that were asked for: a reason, or ``""`` for a picture, and how many.
    """

    output: ShardOutput
    outcomes: Counter[str]

    @property
    def is_unreachable(self) -> bool:
        """Whether nobody answered: at least one row was asked for, and each such row's host could not be reached."""
        unreachable = sum(self.outcomes[reason] for reason in _UNREACHABLE)
        return 0 < unreachable == self._num_sent

    @property
    def has_answer(self) -> bool:
        """Whether any server has answered anything."""
        return self._num_sent > sum(self.outcomes[reason] for reason in _UNREACHABLE)

    @property
    def _num_sent(self) -> int:
        return self.outcomes.total() - self.outcomes[Reason.URL_REFUSED]


class DownloadStage:
    """Fetches the pictures of a selected dataset.

    Every selected shard becomes one shard with the rows whose picture arrived whole, in the selected order. The digest
    names what was asked for; what the world answered at the time is kept by the manifest. Shards depend on nothing but
    their own rows: `preprocessing.stage.run_shards` makes some of them, in as many tasks or on as many machines as one
    likes.

    Args:
        store: Where datasets stand.
        selected: The manifest of the ``select`` stage.
        config: How to fetch, and what pictures are taken.
    """

    name = "download"
    version = STAGE_VERSION

    def __init__(self, store: ObjectStore, selected: Manifest, config: DownloadConfig) -> None:
        self._store = store
        self._selected = selected
        self._config = config
        self._ledger = Ledger(store, self.digest, config)

    @property
    def digest(self) -> str:
        """sha256 of what determines the result."""
        return digest_of(self.name, self.version, self.config, [self._selected.digest])

    @property
    def parents(self) -> dict[str, str]:
        """Stage → digest of what it reads."""
        return {self._selected.stage: self._selected.digest}

    @property
    def config(self) -> dict[str, Any]:
        """The config fields that change the result."""
        return self._config.digest_fields()

    @property
    def num_shards(self) -> int:
        """As many as were selected."""
        return len(self._selected.shards)

    def specs(self) -> dict[str, dict[str, Any]]:
        """No tensors are stored."""
        return {}

    def write_extra_files(self, folder: Path) -> Sequence[Path]:
        """There are none."""
        return ()

    def outputs(self, indices: Sequence[int], scratch: Path) -> Iterator[ShardOutput]:
        """Makes the given shards, in the order in which they arrive.

        Shards without any answer are held back until some server has answered anything, now or in an earlier run: if
        none does, the fault is rather with the network here, or with the one server that is down, than with every row,
        and no row is refused for it.

        Raises:
            TransientError: Nothing could be reached, or the engine failed twice.
            GateError: Less of a shard came than ``download.min_shard_success_rate``; it is not kept.
        """
        held: list[_Made] = []
        has_answer = False
        for made in self._make(indices, scratch):
            has_answer = has_answer or made.has_answer
            if made.is_unreachable and not has_answer:
                has_answer = not held and self._has_committed_answer(indices)
            if made.is_unreachable and not has_answer:
                held.append(made)
                continue
            yield self._checked(made)
            if has_answer:
                yield from map(self._checked, held)
                held.clear()
        if held:
            num_in = sum(made.output.num_in for made in held)
            dropped = sum((made.outcomes for made in held), Counter())
            raise TransientError(f"{_arrived(0, num_in, dropped)}; nothing of it is kept")
        try:
            compact(self._store)
        except TransientError as error:
            LOGGER.warning("the ledger's parts are merged another time: %s", error)

    def _make(self, indices: Sequence[int], scratch: Path) -> Iterator[_Made]:
        for start in range(0, len(indices), _SHARDS_A_CHILD):
            some = indices[start : start + _SHARDS_A_CHILD]
            tables = {index: read_selected(self._store, self._selected, index) for index in some}
            remembered = {index: self._ledger.remembered(table) for index, table in tables.items()}
            asked = {index: _without(table, remembered[index]) for index, table in tables.items()}
            for index, table in asked.items():
                if table.num_rows == 0:
                    yield _Made(shard_output(index, tables[index], remembered[index]), Counter())
            requests = {index: requests_of(table) for index, table in asked.items() if table.num_rows}
            for fetched in fetch_shards(requests, self._config, scratch):
                index = fetched.index
                found = {row.uid: row.result for batch in fetched.batches() for row in batch}
                found = {uid: found.get(uid, _LOST) for uid in asked[index].column("uid").to_pylist()}
                self._ledger.record(index, asked[index], found)
                outcomes = Counter(
                    "" if isinstance(result, NormalizedImage) else result[0] for result in found.values()
                )
                yield _Made(shard_output(index, tables[index], {**remembered[index], **found}), outcomes)

    def _has_committed_answer(self, but: Sequence[int]) -> bool:
        """Whether a shard that was committed earlier tells of an answer."""
        for index in sorted(set(range(self.num_shards)) - set(but)):
            report = find_report(self._store, self, index)
            if report is not None and report.num_in > sum(report.dropped.get(r, 0) for r in _NO_ANSWER):
                return True
        return False

    def _checked(self, made: _Made) -> ShardOutput:
        num_asked, least = made.outcomes.total(), self._config.min_shard_success_rate
        rate = made.outcomes[""] / num_asked if num_asked else 1.0
        if rate < least:
            said = _arrived(made.outcomes[""], num_asked, made.outcomes - Counter({"": num_asked}))
            raise GateError(
                f"{said} (shard {made.output.index}: {rate:.3f} is under download.min_shard_success_rate = {least:g}; "
                "it is not kept, and asked for again by the next run)"
            )
        return made.output


def _without(table: pa.Table, uids: Mapping[str, Verdict]) -> pa.Table:
    if not uids:
        return table
    return table.filter(pa.array([uid not in uids for uid in table.column("uid").to_pylist()]))


def requests_of(table: pa.Table) -> pa.Table:
    """What the engine is told of selected rows, in the ``REQUESTS`` schema."""
    columns = [table.column(name) if name in table.column_names else None for name in REQUESTS.names]
    nothing = pa.nulls(table.num_rows, pa.string())
    return pa.table([nothing if column is None else column for column in columns], names=REQUESTS.names).cast(REQUESTS)


def read_selected(store: ObjectStore, selected: Manifest, index: int) -> pa.Table:
    """A shard of the selected dataset, in the ``SELECTED`` schema, verified.

    Raises:
        ContractError: Its bytes are not those that the manifest names, or its columns are not ``SELECTED``.
    """
    prefix = dataset_prefix(selected.stage, selected.digest)
    tables = []
    for file in selected.shards[index].files:
        if file.kind != "rows":
            continue
        data = store.read(f"{prefix}/{file.name}")
        if (found := sha256_of_bytes(data)) != file.sha256:
            raise ContractError(
                f"{store.uri_of(f'{prefix}/{file.name}')}: sha256 is {found}, its manifest says {file.sha256}; "
                "delete the dataset's folder and select again"
            )
        tables.append(pq.read_table(io.BytesIO(data)))
    table = pa.concat_tables(tables) if tables else SELECTED.empty_table()
    if table.column_names != SELECTED.names:
        raise ContractError(
            f"download: the selected rows have the columns {table.column_names}, expected {SELECTED.names}"
        )
    return table.cast(SELECTED).combine_chunks()


def shard_output(index: int, table: pa.Table, results: Mapping[str, NormalizedImage | Verdict]) -> ShardOutput:
    """Joins selected rows with what came of them; a row of which nothing is known is ``LOST_BY_DOWNLOADER``.

    Args:
        index: Of the shard.
        table: Selected rows.
        results: uid → picture, or reason and detail.

    Returns:
        The shard, kept rows in the order of ``table``.
    """
    kept: list[int] = []
    pictures: list[NormalizedImage] = []
    rejects: list[tuple[str, str, str, str]] = []
    for position, (uid, url) in enumerate(
        zip(table.column("uid").to_pylist(), table.column("url").to_pylist(), strict=True)
    ):
        result = results.get(uid, _LOST)
        if isinstance(result, NormalizedImage):
            kept.append(position)
            pictures.append(result)
        else:
            rejects.append((uid, url, result[0].value, result[1]))
    rows = RowsFile(f"shard-{index:05d}.parquet", _with_pictures(table.take(pa.array(kept, pa.int64())), pictures))
    columns = [list(column) for column in zip(*rejects, strict=True)] or [[], [], [], []]
    return ShardOutput(index, table.num_rows, (rows,), rejects_table(*columns), is_repeatable=False)


def _with_pictures(table: pa.Table, pictures: Sequence[NormalizedImage]) -> pa.Table:
    added = {
        "image": [picture.image for picture in pictures],
        "image_width": [picture.width for picture in pictures],
        "image_height": [picture.height for picture in pictures],
        "original_width": [picture.original_width for picture in pictures],
        "original_height": [picture.original_height for picture in pictures],
        "sha256": [picture.sha256 for picture in pictures],
    }
    columns = [table.column(name) for name in SELECTED.names]
    return pa.table(
        [*columns, *(pa.array(values, DOWNLOADED.field(name).type) for name, values in added.items())],
        schema=DOWNLOADED,
    )


def ask_again(store: ObjectStore, stage: Stage, refused: Manifest) -> None:
    """Lets the next run ask again for the shards of a refused dataset of which most failed for what may pass.

    So an outage that is over leaves nothing behind; what came of other shards is kept.
    """
    passing = [reason for reason, memory in MEMORY.items() if memory is Memory.PASSING]
    outages = [
        shard.index for shard in refused.shards if 2 * sum(shard.dropped.get(r, 0) for r in passing) > shard.num_in
    ]
    forget_shards(store, stage, outages)
    if outages:
        LOGGER.warning("download: %d shards mostly failed for what may pass; the next run asks again", len(outages))


def check_gate(manifest: Manifest, config: DownloadConfig) -> None:
    """Refuses a dataset of which too little arrived.

    Raises:
        GateError: Nothing arrived, or less than ``download.min_success_rate``.
    """
    said = _arrived(manifest.num_out, manifest.num_in, manifest.dropped)
    if manifest.num_out == 0:
        raise GateError(said)
    rate = manifest.num_out / manifest.num_in
    if rate < config.min_success_rate:
        raise GateError(
            f"{said} ({rate:.3f} is under download.min_success_rate = {config.min_success_rate:g}; what arrived is "
            "kept: with a lower one the same command goes on from here)"
        )


def _arrived(num_out: int, num_in: int, dropped: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in Counter(dropped).most_common())
    return (
        f"download: {num_out:,} of {num_in:,} pictures arrived ({reasons or 'none was asked for'}): "
        "is the server up, are the networks allowed? see download.allow_networks"
    )
