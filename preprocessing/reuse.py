"""What a dataset can take over from an earlier one, so that a refresh downloads and encodes only the difference.

| what is the same | what is done |
| --- | --- |
| all that determines a shard | the new manifest names the shard's files where they stand (`ShardReport.standing_in`) |
| what determines a row of a shard that is another | the row's bytes are copied into the new shard |

Neither enters a digest: a dataset that took rows over is the one that would have been made without. Which dataset is
the earlier one is said in the store, by whoever starts (`say_previous`), before anything is made: so all processes and
machines that share the work, and whoever goes on after a crash, take over the same. Nobody has to say it: `prepare`
asks the world anew.

A round (`RoundStage`) is a selection of the same rows under another digest: a download of it is another dataset, in
which rows that are due are asked for again, and those that have opted out since are left out.
"""

import json
import logging
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import ContractError
from infra.storage import AlreadyExistsError, ObjectNotFoundError, ObjectStore, sha256_of_bytes, sha256_of_file
from preprocessing.contracts.digests import canonical_json, digest_of
from preprocessing.contracts.manifest import Manifest, ShardReport, dataset_prefix, find_manifest
from preprocessing.contracts.reasons import Reason
from preprocessing.contracts.schemas import DOWNLOADED
from preprocessing.download.addresses import Verdict
from preprocessing.download.ledger import ARRIVED, LEDGER_PREFIX, MEMORY, Memory, read_entries
from preprocessing.stage import ShardReference, missing_file
from preprocessing.stored_parquet import open_parquet
from preprocessing.uids import url_halves

LOGGER = logging.getLogger(__name__)

REUSE_PREFIX: Final = "ledger/reuse"
ROUND_VERSION: Final = 1

_URL: Final = ["url_high", "url_low"]
_MAX_FETCHED: Final = 3  # files of a store elsewhere that wait in scratch
_PLACE: Final = np.dtype([("high", "<u8"), ("low", "<u8"), ("file", "<i4"), ("row", "<i4")])


# ------------------------------------------------------------------------------------- which dataset is the earlier


@dataclass(frozen=True)
class Previous:
    """An earlier dataset.

    Attributes:
        prefix: Key of its folder.
        manifest: Its manifest.
        encoded: Of a download: key of the encoded dataset whose rows will be taken over. A picture that was deleted
            once it was encoded is needed no more then.
    """

    prefix: str
    manifest: Manifest
    encoded: str | None = None


def say_previous(
    store: ObjectStore, stage: str, digest: str, previous: str | None, *, encoded: str | None = None
) -> None:
    """Says from which dataset another one may take over what is the same; to be said before that one is begun.

    Args:
        store: Where both stand.
        stage: Name of their stage.
        digest: Of the dataset that is to be made.
        previous: Key of the earlier one's folder; None, or the dataset itself: there is none.
        encoded: As in `Previous`.
    """
    if previous is not None and previous != dataset_prefix(stage, digest):
        said = {"previous": previous, "encoded": encoded}
        store.put(_previous_key(stage, digest), json.dumps(said).encode())


def forget_previous(store: ObjectStore, stage: str, digest: str) -> None:
    """Takes it back, when the dataset is complete."""
    store.delete(_previous_key(stage, digest))


def find_previous(store: ObjectStore, stage: str, digest: str) -> Previous | None:
    """The dataset from which another one may take over what is the same.

    Returns:
        None where nobody said any, or it is not there any more.
    """
    key = _previous_key(stage, digest)
    try:
        said = json.loads(store.read(key))
        prefix, encoded = said["previous"], said["encoded"]
        manifest = find_manifest(store, prefix)
    except ObjectNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        LOGGER.warning("%s is of no use (%s); nothing is taken over", store.uri_of(key), error)
        return None
    if manifest is None or manifest.stage != stage:
        LOGGER.warning("%s: %s is not there; nothing is taken over", stage, store.uri_of(prefix))
        return None
    return Previous(prefix, manifest, encoded)


def _previous_key(stage: str, digest: str) -> str:
    return f"{REUSE_PREFIX}/{stage}-{digest[:16]}.json"


# ------------------------------------------------------------------------------------------------------------ by shard


def shard_digest(stage: str, version: int, config: Mapping[str, Any], inputs: Sequence[str], **others: object) -> str:
    """The digest of what determines one shard, whatever dataset it is in, and at whatever place.

    Args:
        stage: Name of its stage.
        version: ``STAGE_VERSION``.
        config: The config fields that change the result.
        inputs: Digests of the rows that it is made from.
        others: What else it depends on, as JSON values.
    """
    return digest_of(f"{stage}-shard", version, config, inputs, {"others": canonical_json(others)})


def rows_digest(rows: pa.Table) -> str:
    """sha256 of the values of some rows, however they are stored."""
    columns = [
        # NaN is no JSON, and a score may be one.
        [name, [repr(value) if isinstance(value, float) else value for value in rows.column(name).to_pylist()]]
        for name in sorted(rows.column_names)
    ]
    return sha256_of_bytes(canonical_json(columns).encode("utf-8", "surrogatepass"))


class PreviousShards:
    """The shards of an earlier dataset by their digest.

    Args:
        store: Where it stands.
        prefix: Key of its folder.
        manifest: Its manifest.
    """

    def __init__(self, store: ObjectStore, prefix: str, manifest: Manifest) -> None:
        self._store, self._prefix = store, prefix
        self._shards = {shard.digest: shard for shard in manifest.shards if shard.digest is not None}

    def __len__(self) -> int:
        """How many have one."""
        return len(self._shards)

    def find(self, digest: str, index: int) -> ShardReference | None:
        """The shard of a digest, as the shard of this index of another dataset; None where its files do not stand."""
        report = self._shards.get(digest)
        if report is None:
            return None
        problem = missing_file(self._store, self._prefix, report)
        if problem is not None:
            LOGGER.info("%s: %s; its rows are made again", self._store.uri_of(self._prefix), problem)
            return None
        return ShardReference(report.standing_in(self._prefix, index))

    def refused(self, reference: ShardReference) -> pl.DataFrame:
        """``uid, url, reason`` of the rows that a shard refused."""
        return _columns(self._store, self._prefix, reference.report, "rejects", ["uid", "url", "reason"])


def have_same_rows(store: ObjectStore, one: tuple[str, Manifest], other: tuple[str, Manifest]) -> bool:
    """Whether two downloads, each with the key of its folder, have the same rows in the same shards, in order."""
    if [shard.num_out for shard in one[1].shards] != [shard.num_out for shard in other[1].shards]:
        return False
    columns = [name for name in DOWNLOADED.names if name != "image"]

    def rows(prefix: str, shard: ShardReport) -> pa.Table:
        tables = []
        for file in shard.files:
            if file.kind == "rows":
                with open_parquet(store, file.key(prefix)) as stored:
                    tables.append(stored.read(columns))
        return pa.concat_tables(tables)

    def keys(prefix: str, shard: ShardReport) -> list[str]:
        return [file.key(prefix) for file in shard.files if file.kind == "rows"]

    return all(
        keys(one[0], its) == keys(other[0], ours) or rows(one[0], its).equals(rows(other[0], ours))
        for its, ours in zip(one[1].shards, other[1].shards, strict=True)
    )


# -------------------------------------------------------------------------------------------------------------- by row


class PreviousRows:
    """The rows of an earlier dataset, found by a column; of its files one is read at a time.

    It holds 24 bytes a row in memory.

    Args:
        store: Where the dataset stands.
        prefix: Key of its folder.
        manifest: Its manifest.
        column: Texts that name rows, such as ``uid``. Of rows with one text the first counts.
    """

    def __init__(self, store: ObjectStore, prefix: str, manifest: Manifest, column: str) -> None:
        self._store, self._prefix, self._column = store, prefix, column
        self._files = manifest.files("rows")
        self._lock = threading.RLock()  # several tasks may share a stage
        self._paths: dict[int, Path] = {}  # of files whose content was found to be what the manifest says
        self._fetched: list[int] = []
        self._damaged: set[int] = set()

    def find(self, names: pa.ChunkedArray | pa.Array) -> np.ndarray:
        """Where rows stand.

        Args:
            names: Values of the column, n.

        Returns:
            (n, 2) int32: number of the file, and of the row in it; -1 where there is none.
        """
        with self._lock:
            places = self._places
        wanted = _halves(names)
        found = np.full((len(wanted), 2), -1, np.int32)
        if len(places):
            at = np.minimum(np.searchsorted(places["high"], wanted["high"]), len(places) - 1)
            is_there = (places["high"][at] == wanted["high"]) & (places["low"][at] == wanted["low"])
            found[is_there, 0] = places["file"][at][is_there]
            found[is_there, 1] = places["row"][at][is_there]
        return found

    def read(self, places: np.ndarray, columns: Sequence[str]) -> tuple[np.ndarray, pa.Table | None]:
        """Reads rows, of files whose content is what the manifest says.

        Args:
            places: From `find`.
            columns: Of which columns.

        Returns:
            Which places could be read, ascending, and the rows in that order; None where none could be. Pictures
            that were deleted are empty.
        """
        return self._gather(places, lambda file: self._read_whole(file, list(columns)))

    def peek(self, places: np.ndarray, columns: Sequence[str]) -> tuple[np.ndarray, pa.Table | None]:
        """As `read`, of small columns, and without a look at the rest of the files."""

        def read(file: int) -> pa.Table:
            with open_parquet(self._store, self._files[file].key(self._prefix)) as stored:
                return stored.read(list(columns))

        return self._gather(places, read)

    def has_pictures(self, places: np.ndarray) -> np.ndarray:
        """Whether the pictures of places, all of them found, are still there; False where some of their file's are."""
        has = np.array(["image" not in file.without for file in self._files], bool)
        return has[places[:, 0]]

    def _gather(self, places: np.ndarray, read: Callable[[int], pa.Table | None]) -> tuple[np.ndarray, pa.Table | None]:
        numbers, tables = [], []
        for file in np.unique(places[:, 0][places[:, 0] >= 0]).tolist():
            here = np.flatnonzero(places[:, 0] == file)
            with self._lock:
                table = read(file)
                taken = None if table is None else table.take(pa.array(places[here, 1]))
            if taken is not None:
                tables.append(taken)
                numbers.append(here)
        if not tables:
            return np.empty(0, np.int64), None
        order = np.argsort(np.concatenate(numbers))
        return np.concatenate(numbers)[order], pa.concat_tables(tables).take(pa.array(order))

    def _read_whole(self, file: int, columns: list[str]) -> pa.Table | None:
        path = self._path(file)
        if path is None:
            return None
        there = pq.read_schema(path, memory_map=True).names
        without = [name for name in columns if name in self._files[file].without and name not in there]
        table = pq.read_table(path, columns=[name for name in columns if name not in without], memory_map=True)
        for name in without:
            table = table.append_column(name, pa.array([b""] * table.num_rows, pa.binary()))
        return table.select(columns)

    @cached_property
    def _places(self) -> np.ndarray:
        parts = [np.empty(0, _PLACE)]
        for number, file in enumerate(self._files):
            try:
                with open_parquet(self._store, file.key(self._prefix)) as stored:
                    names = stored.read([self._column]).column(self._column)
            except (ObjectNotFoundError, FileNotFoundError):
                LOGGER.info("%s is gone; its rows are made again", self._store.uri_of(file.key(self._prefix)))
                continue
            except (pa.ArrowInvalid, OSError) as error:
                LOGGER.warning("%s: %s; its rows are made again", self._store.uri_of(file.key(self._prefix)), error)
                continue
            part = np.empty(len(names), _PLACE)
            halves = _halves(names)
            part["high"], part["low"] = halves["high"], halves["low"]
            part["file"], part["row"] = number, np.arange(len(names))
            parts.append(part)
        places = np.concatenate(parts)
        places = places[np.lexsort((places["row"], places["file"], places["low"], places["high"]))]
        is_first = np.ones(len(places), bool)
        is_first[1:] = (places["high"][1:] != places["high"][:-1]) | (places["low"][1:] != places["low"][:-1])
        return places[is_first]

    @cached_property
    def _scratch(self) -> Path:
        """A folder for files that come from elsewhere; it lives as long as this object."""
        folder = tempfile.mkdtemp(prefix="lacuna-previous-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)

    def _path(self, number: int) -> Path | None:
        """A file that is whole: in place, or fetched; None where it is damaged."""
        if number in self._paths:
            return self._paths[number]
        if number in self._damaged:
            return None
        file = self._files[number]
        key = file.key(self._prefix)
        path = self._store.local_path(key)
        try:
            if path is None:
                path = self._scratch / f"previous-{file.sha256}.parquet"
                self._store.download(key, path, file.sha256)
            elif (found := sha256_of_file(path)) != file.sha256:
                raise ContractError(f"its sha256 is {found}, its manifest says {file.sha256}")
        except (ContractError, ObjectNotFoundError, FileNotFoundError) as error:
            LOGGER.warning("%s: %s; nothing is taken over from it", self._store.uri_of(key), error)
            self._damaged.add(number)
            return None
        self._paths[number] = path
        if self._store.local_path(key) is None:
            self._fetched.append(number)
            if len(self._fetched) > _MAX_FETCHED:
                self._paths.pop(self._fetched.pop(0)).unlink(missing_ok=True)
        return path


def _halves(names: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """XXH3-128 of texts."""
    column = pl.from_arrow(names)
    assert isinstance(column, pl.Series)
    hashed = column.alias("name").to_frame().select(url_halves(pl.col("name")))
    halves = np.empty(hashed.height, _PLACE)
    halves["high"], halves["low"] = hashed["url_high"].to_numpy(), hashed["url_low"].to_numpy()
    return halves


# ------------------------------------------------------------------------------------------------------------- rounds


class Waiting:
    """The rows that failed for what may pass, and whose time has not come: a refresh does not ask for them yet.

    Args:
        store: Where the ledger stands.
        dataset: Digest of the dataset that is being made; what it noted itself does not count, so that it ends, where
            it is interrupted, as if it had not been.
        now: The time, in UTC.
    """

    def __init__(self, store: ObjectStore, dataset: str, now: datetime) -> None:
        own = f"{LEDGER_PREFIX}/{dataset[:16]}/"
        passing = [reason.value for reason, memory in MEMORY.items() if memory is Memory.PASSING]
        newest = newest_entries(store, but=own)
        self._entries = newest.filter(pl.col("outcome").is_in(passing) & (pl.col("due_at") > now))

    def verdicts(self, table: pa.Table) -> dict[str, Verdict]:
        """Why rows of a table (``uid``, ``url``) did not come, by uid; of those that wait."""
        if self._entries.is_empty():
            return {}
        rows = pl.from_arrow(table.select(["uid", "url"]))
        assert isinstance(rows, pl.DataFrame)
        found = rows.select("uid", *url_halves(pl.col("url"))).join(self._entries, on=_URL)
        return {
            uid: (Reason(outcome), f"not asked again before {due_at:%Y-%m-%d %H:%M}: {detail}")
            for uid, outcome, detail, due_at in found.select("uid", "outcome", "detail", "due_at").iter_rows()
        }


def newest_entries(store: ObjectStore, *, but: str | None = None) -> pl.DataFrame:
    """What became last of each URL in the ledger; a no to training stays, whatever came after it.

    Args:
        store: Where the ledger stands.
        but: Parts whose keys begin so are left out.
    """
    entries = read_entries(store)
    if but is not None:
        entries = entries.filter(~pl.col("part").str.starts_with(but))
    is_no = pl.col("outcome") == Reason.OPTED_OUT.value
    return entries.sort(is_no, "at", "part").unique(_URL, keep="last", maintain_order=True)


def outdated_rows(store: ObjectStore, prefix: str, manifest: Manifest, now: datetime | None = None) -> list[str]:
    """The rows of a download that would come out otherwise by now, as far as the ledger tells.

    These are the rows that did not come and are due, or have come to another dataset since; and the pictures whose
    servers have said no to training since.

    Args:
        store: Where the dataset and the ledger stand.
        prefix: Key of the dataset's folder.
        manifest: Its manifest.
        now: As of when; UTC.

    Returns:
        Their uids, sorted.
    """
    newest = newest_entries(store).select(*_URL, "outcome", "due_at")
    if newest.is_empty():
        return []
    is_due = (pl.col("due_at") <= (now or datetime.now(UTC))) | (pl.col("outcome") == ARRIVED)
    is_no = pl.col("outcome") == Reason.OPTED_OUT.value
    asked = [reason.value for reason in MEMORY if reason is not Reason.OPTED_OUT]
    found: list[str] = []
    for shard in manifest.shards:
        kept = _columns(store, prefix, shard, "rows", ["uid", "url"])
        refused = _columns(store, prefix, shard, "rejects", ["uid", "url", "reason"])
        refused = refused.filter(pl.col("reason").is_in(asked))
        for rows, is_other in ((kept, is_no), (refused, is_due & ~is_no)):
            known = rows.select("uid", *url_halves(pl.col("url"))).join(newest, on=_URL)
            found += known.filter(is_other)["uid"].to_list()
    return sorted(found)


def _columns(store: ObjectStore, prefix: str, shard: ShardReport, kind: str, columns: Sequence[str]) -> pl.DataFrame:
    """Some text columns of a shard's files of one kind."""
    parts = [pl.DataFrame(schema=dict.fromkeys(columns, pl.String))]
    for file in shard.files:
        if file.kind == kind and file.num_rows:
            with open_parquet(store, file.key(prefix)) as stored:
                part = pl.from_arrow(stored.read(list(columns)))
            assert isinstance(part, pl.DataFrame)
            parts.append(part.cast(pl.String))
    return pl.concat(parts)


def agreed_round(store: ObjectStore, downloaded: str, uids: Sequence[str]) -> list[str]:
    """The rows of the round that follows a download: those of whoever first began one.

    So a refresh that is killed goes on with the round that it was at, and two at once are at the same one.

    Args:
        store: Where datasets stand.
        downloaded: Digest of the download.
        uids: Of the rows that are outdated.
    """
    key = f"{REUSE_PREFIX}/round-{downloaded[:16]}.json"
    try:
        store.put_if_absent(key, json.dumps({"uids": list(uids)}).encode())
    except AlreadyExistsError:
        return json.loads(store.read(key))["uids"]
    return list(uids)


class RoundStage:
    """A selection once more: the same files, named where they stand, under a digest of its own.

    Args:
        prefix: Key of the selection's folder.
        selected: Its manifest; it may be a round itself.
        uids: Of the rows for which there is the round; see `outdated_rows`.
    """

    name = "select"

    def __init__(self, prefix: str, selected: Manifest, uids: Collection[str]) -> None:
        self._prefix, self._selected, self._uids = prefix, selected, sorted(uids)
        self.version = selected.stage_version

    @property
    def digest(self) -> str:
        """sha256 of what determines the result."""
        return digest_of(f"{self.name}-round", ROUND_VERSION, self.config, [self._selected.digest])

    @property
    def parents(self) -> dict[str, str]:
        """The selection."""
        return {self._selected.stage: self._selected.digest}

    @property
    def config(self) -> dict[str, Any]:
        """The selection's, and which rows are asked for again."""
        uids_sha256 = sha256_of_bytes(canonical_json(self._uids).encode())
        return {**self._selected.config, "round": {"num_rows": len(self._uids), "uids_sha256": uids_sha256}}

    @property
    def num_shards(self) -> int:
        """As many as were selected."""
        return len(self._selected.shards)

    def specs(self) -> dict[str, dict[str, Any]]:
        """No tensors are stored."""
        return {}

    def write_extra_files(self, folder: Path) -> Sequence[Path]:
        """There are none: the report is the selection's."""
        return ()

    def outputs(self, indices: Sequence[int], scratch: Path) -> Iterator[ShardReference]:
        """Names the given shards."""
        for index in indices:
            yield ShardReference(self._selected.shards[index].standing_in(self._prefix, index))
