"""The download stage: from selected rows to rows with pictures.

For each shard: set aside what the ledger says need not be asked, take over what an earlier dataset has
(`preprocessing.reuse`), let the engine fetch and normalize the rest, join what came with what was asked for, give every
row that did not make it a reason, and note that in the ledger.
"""

import io
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import ContractError, GateError, TransientError
from infra.storage import ObjectStore, sha256_of_bytes
from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.digests import digest_of
from preprocessing.contracts.manifest import Manifest, dataset_prefix, find_manifest
from preprocessing.contracts.reasons import Reason
from preprocessing.contracts.schemas import DOWNLOADED, SELECTED
from preprocessing.contracts.tombstones import Tombstones
from preprocessing.download.addresses import Verdict
from preprocessing.download.compaction import compact
from preprocessing.download.fetch import REQUESTS, fetch_shards
from preprocessing.download.images import NormalizedImage
from preprocessing.download.ledger import MEMORY, Ledger, Memory
from preprocessing.reuse import Previous, PreviousRows, PreviousShards, Waiting, find_previous, shard_digest
from preprocessing.stage import RowsFile, ShardOutput, ShardReference, Stage, find_report, forget_shards, rejects_table

LOGGER = logging.getLogger(__name__)

STAGE_VERSION = 4

_SHARDS_A_CHILD = 256  # bounds what waits on the local disk
_UNREACHABLE = frozenset({Reason.HOST_UNKNOWN, Reason.CONNECTION_FAILED, Reason.TIMED_OUT})
_NO_ANSWER = _UNREACHABLE | {Reason.URL_REFUSED}
_LOST: Verdict = Reason.LOST_BY_DOWNLOADER, "the engine says nothing about this row"
_DAMAGED: Verdict = Reason.LOST_BY_DOWNLOADER, "the file of the earlier dataset that has its picture is damaged"
FORGOTTEN: Verdict = Reason.FORGOTTEN, "a tombstone names it"
PARTIAL = "partial-"
"""Names of files begin so in which some pictures are empty, which were deleted once their rows were encoded."""
_EXPECTED = ("expected_md5", "expected_sha256")
_PICTURE = ("image", "image_width", "image_height", "original_width", "original_height", "sha256")


@dataclass(frozen=True)
class _Made:
    """A shard as it came.

    Attributes:
        output: All of its rows.
        outcomes: Of the rows that were asked for: a reason, or ``""`` for a picture, and how many.
    """

    output: ShardOutput | ShardReference
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


@dataclass(frozen=True)
class _Planned:
    """A shard before anything is asked.

    Attributes:
        table: Its selected rows.
        refused: uid → why, of the rows that are not to be asked for.
        held: uid → where its picture is, of the rows that the earlier dataset has.
        asked: The other rows.
    """

    table: pa.Table
    refused: dict[str, Verdict]
    held: dict[str, np.ndarray]
    asked: pa.Table


class DownloadStage:
    """Fetches the pictures of a selected dataset.

    Every selected shard becomes one shard with the rows whose picture arrived whole, in the selected order. The digest
    names what was asked for; what the world answered at the time is kept by the manifest. Shards depend on nothing but
    their own rows: `preprocessing.stage.run_shards` makes some of them, in as many tasks or on as many machines as one
    likes.

    Where an earlier dataset was named (`preprocessing.reuse.say_previous`), of the same config, its pictures are taken
    over, by URL: shards of the same rows as they stand, the rest row by row. Rows that failed for what may pass are
    not asked for before they are due then.

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
        self._rows: PreviousRows | None = None
        self._encoded: PreviousRows | None = None

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

    def outputs(self, indices: Sequence[int], scratch: Path) -> Iterator[ShardOutput | ShardReference]:
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
            planned: dict[int, _Planned] = {}
            for index in some:
                plan = self._plan(index)
                if isinstance(plan, ShardReference):
                    yield _Made(plan, Counter())
                elif plan.asked.num_rows == 0:
                    yield _Made(self._output(index, plan, {}), Counter())
                else:
                    planned[index] = plan
            requests = {index: requests_of(plan.asked) for index, plan in planned.items()}
            for fetched in fetch_shards(requests, self._config, scratch) if requests else ():
                plan = planned.pop(fetched.index)
                found = {row.uid: row.result for batch in fetched.batches() for row in batch}
                found = {uid: found.get(uid, _LOST) for uid in plan.asked.column("uid").to_pylist()}
                self._ledger.record(fetched.index, plan.asked, found)
                outcomes = Counter(
                    "" if isinstance(result, NormalizedImage) else result[0] for result in found.values()
                )
                yield _Made(self._output(fetched.index, plan, found), outcomes)

    @cached_property
    def _previous(self) -> Previous | None:
        """The dataset of which rows may be taken over: pictures that this config would have made of the same bytes."""
        found = find_previous(self._store, self.name, self.digest)
        if found is None:
            return None
        is_alike = (found.manifest.stage_version, found.manifest.config) == (self.version, self.config)
        return found if is_alike else None

    def _plan(self, index: int) -> _Planned | ShardReference:
        """What is to be asked of a shard; or where it stands already."""
        table = read_selected(self._store, self._selected, index)
        refused = self._ledger.remembered(table) | self._forgotten(table)
        if self._previous is None:
            return _Planned(table, refused, {}, _without(table, refused))
        waiting = self._waiting.verdicts(table)
        reference = self._standing(index, table, refused, waiting)
        if reference is not None:
            return reference
        held = self._held(_without(table, refused))
        refused |= {uid: verdict for uid, verdict in waiting.items() if uid not in refused and uid not in held}
        return _Planned(table, refused, held, _without(table, {**refused, **held}))

    @cached_property
    def _waiting(self) -> Waiting:
        return Waiting(self._store, self.digest, datetime.now(UTC))

    @cached_property
    def _previous_shards(self) -> PreviousShards:
        assert self._previous is not None
        return PreviousShards(self._store, self._previous.prefix, self._previous.manifest)

    @cached_property
    def _tombstones(self) -> Tombstones:
        return Tombstones.load(self._store)

    def _forgotten(self, table: pa.Table) -> dict[str, Verdict]:
        """Why rows are refused that a tombstone names, by uid."""
        if not len(self._tombstones):
            return {}
        uids = table.column("uid").to_pylist()
        named = self._tombstones.matches(uids, table.column("url").to_pylist())
        return {uid: FORGOTTEN for uid, is_named in zip(uids, named, strict=True) if is_named}

    def _shard_digest(self, index: int) -> str:
        files = self._selected.shards[index].files
        inputs = [file.sha256 for file in files if file.kind == "rows"]
        return shard_digest(self.name, self.version, self.config, inputs)

    def _standing(
        self, index: int, table: pa.Table, refused: Mapping[str, Verdict], waiting: Mapping[str, Verdict]
    ) -> ShardReference | None:
        """The shard as it stands, if each of its rows would come out the same: none to refuse now, none to ask for."""
        reference = self._previous_shards.find(self._shard_digest(index), index)
        if reference is None:
            return None
        not_to_ask = refused.keys() | waiting.keys()
        before = set(self._previous_shards.refused(reference)["uid"].to_list())
        kept = set(table.column("uid").to_pylist()) - before
        if not before <= not_to_ask or not kept.isdisjoint(refused):
            return None
        if any("image" in file.without for file in reference.report.files):
            uids = pa.array(sorted(kept), pa.string())
            if not self._is_encoded(uids).all():
                return None  # a picture that was deleted is needed
        return reference

    def _held(self, table: pa.Table) -> dict[str, np.ndarray]:
        """Where the earlier dataset has the rows' pictures: of the same URL, and of the bytes that are expected now.

        A picture that was deleted counts where its row is encoded, and that will be taken over.
        """
        assert self._previous is not None
        if self._rows is None:
            self._rows = PreviousRows(self._store, self._previous.prefix, self._previous.manifest, "url")
        places = self._rows.find(table.column("url"))
        numbers, stored = self._rows.peek(places, ["uid", "sha256", *_EXPECTED])
        if stored is None:
            return {}
        wanted = table.select(["uid", *_EXPECTED]).take(pa.array(numbers)).to_pylist()
        before = stored.to_pylist()
        has_picture = self._rows.has_pictures(places[numbers])
        is_encoded = np.zeros(len(has_picture), bool) if has_picture.all() else self._is_encoded(stored.column("uid"))
        return {
            row["uid"]: places[number]
            for number, row, its, has, is_done in zip(
                numbers.tolist(), wanted, before, has_picture, is_encoded, strict=True
            )
            # Null says nothing of the bytes: then those that came are as good as any.
            if all(row[name] is None or row[name] == its[name] for name in _EXPECTED)
            and (has or (is_done and row["uid"] == its["uid"]))
        }

    def _is_encoded(self, uids: pa.ChunkedArray | pa.Array) -> np.ndarray:
        """Whether rows of the earlier dataset stand in the encoded one."""
        assert self._previous is not None
        if self._encoded is None and self._previous.encoded is not None:
            manifest = find_manifest(self._store, self._previous.encoded)
            if manifest is not None:
                self._encoded = PreviousRows(self._store, self._previous.encoded, manifest, "uid")
        if self._encoded is None:
            return np.zeros(len(uids), bool)
        return self._encoded.find(uids)[:, 0] >= 0

    def _output(self, index: int, plan: _Planned, found: Mapping[str, NormalizedImage | Verdict]) -> ShardOutput:
        """A shard of what was refused, taken over, and found."""
        pictures = {} if not plan.held or self._rows is None else _read_pictures(self._rows, plan.held)
        lost = {uid: _DAMAGED for uid in plan.held if uid not in pictures}
        if lost:  # they are due later, like any row that failed for what may pass
            uids = plan.table.column("uid").to_pylist()
            self._ledger.record(index, plan.table.filter(pa.array([uid in lost for uid in uids])), lost)
        output = shard_output(index, plan.table, {**plan.refused, **found, **pictures, **lost})
        return replace(output, digest=self._shard_digest(index))

    def _has_committed_answer(self, but: Sequence[int]) -> bool:
        """Whether a shard that was committed earlier tells of an answer."""
        for index in sorted(set(range(self.num_shards)) - set(but)):
            report = find_report(self._store, self, index)
            if report is not None and report.num_in > sum(report.dropped.get(r, 0) for r in _NO_ANSWER):
                return True
        return False

    def _checked(self, made: _Made) -> ShardOutput | ShardReference:
        num_asked, least = made.outcomes.total(), self._config.min_shard_success_rate
        rate = made.outcomes[""] / num_asked if num_asked else 1.0
        if rate < least:
            said = _arrived(made.outcomes[""], num_asked, made.outcomes - Counter({"": num_asked}))
            raise GateError(
                f"{said} (shard {made.output.index}: {rate:.3f} is under download.min_shard_success_rate = {least:g}; "
                "it is not kept, and asked for again by the next run)"
            )
        return made.output


def _read_pictures(rows: PreviousRows, held: Mapping[str, np.ndarray]) -> dict[str, NormalizedImage]:
    """The pictures by uid, of those whose files are whole."""
    uids = list(held)
    numbers, stored = rows.read(np.stack([held[uid] for uid in uids]), _PICTURE)
    if stored is None:
        return {}
    return {
        uids[number]: NormalizedImage(
            image=row["image"],
            width=row["image_width"],
            height=row["image_height"],
            original_width=row["original_width"],
            original_height=row["original_height"],
            sha256=row["sha256"],
        )
        for number, row in zip(numbers.tolist(), stored.to_pylist(), strict=True)
    }


def _without(table: pa.Table, uids: Mapping[str, Any]) -> pa.Table:
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
        data = store.read(file.key(prefix))
        if (found := sha256_of_bytes(data)) != file.sha256:
            raise ContractError(
                f"{store.uri_of(file.key(prefix))}: sha256 is {found}, its manifest says {file.sha256}; "
                "delete that file and MANIFEST.json of its dataset, and select again"
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
    if not all(picture.image for picture in pictures):  # taken over of rows that are encoded; their pictures are gone
        rows = replace(rows, name=f"{PARTIAL}{index:05d}.parquet", without=("image",))
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
