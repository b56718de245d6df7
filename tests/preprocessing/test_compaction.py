"""Merging the ledger's parts: no entry is lost, wherever it is killed and whoever does what meanwhile."""

import io
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.errors import ContractError
from infra.storage import ObjectInfo, ObjectStore
from infra.storage_folder import FolderStore
from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.reasons import Reason
from preprocessing.download.addresses import Verdict
from preprocessing.download.compaction import compact
from preprocessing.download.ledger import LEDGER, LEDGER_PREFIX, Ledger, due, read_entries
from tests.preprocessing.given import rows_of

START = datetime(2026, 3, 1, tzinfo=UTC)
ONE, TWO = DATASETS = ("1" * 64, "2" * 64)
NUM_SHARDS = 4
VERDICTS: tuple[Verdict, ...] = ((Reason.HTTP_CLIENT_ERROR, "404"), (Reason.TIMED_OUT, "é"), (Reason.OPTED_OUT, "noai"))


class KilledError(BaseException):
    """Stands for SIGKILL: nobody catches it, and nothing is done after it."""


class Watched(FolderStore):
    """Lets something happen at one of its operations, before or after it."""

    def __init__(self, root: Path, at: int = 0, happens: Callable[[], object] = lambda: None) -> None:
        super().__init__(root)
        self.num_moments = 0
        self._at, self._happens = at, happens

    def _do(self, operation: Callable[[], Any]) -> Any:
        self._moment()
        result = operation()
        self._moment()
        return result

    def _moment(self) -> None:
        self.num_moments += 1
        if self.num_moments == self._at:
            self._happens()

    def read_with_etag(self, key: str) -> tuple[bytes, str]:
        return self._do(lambda: super(Watched, self).read_with_etag(key))

    def put_if_absent(self, key: str, data: bytes) -> ObjectInfo:
        return self._do(lambda: super(Watched, self).put_if_absent(key, data))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return self._do(lambda: super(Watched, self).list(prefix))

    def delete(self, key: str) -> None:
        return self._do(lambda: super(Watched, self).delete(key))


def note(store: ObjectStore, dataset: str, index: int) -> None:
    """What one shard's run adds: some rows that did not come."""
    table = rows_of([f"http://a.example/{index}/{number}" for number in range(len(VERDICTS))])
    results = dict(zip(table.column("uid").to_pylist(), VERDICTS, strict=True))
    now = START + timedelta(hours=index)
    Ledger(store, dataset, DownloadConfig(), now=lambda: now).record(index, table, results)


def written(root: Path) -> FolderStore:
    store = FolderStore(root)
    for dataset in DATASETS:
        for index in range(NUM_SHARDS):
            note(store, dataset, index)
    return store


def entries(store: ObjectStore) -> set[tuple[Any, ...]]:
    """All entries, each with its dataset's folder."""
    found = read_entries(store)
    folders = [part.rpartition("/")[0] for part in found["part"]]
    return set(zip(folders, *(found[name].to_list() for name in LEDGER.names), strict=True))


def parts(store: ObjectStore) -> list[str]:
    return [info.key for info in store.list(f"{LEDGER_PREFIX}/")]


def test_many_parts_become_one_a_dataset(tmp_path: Path) -> None:
    store = written(tmp_path)
    before, waiting = entries(store), due(store, START + timedelta(days=99))
    assert compact(store, max_parts=NUM_SHARDS) == 0
    assert compact(store, max_parts=NUM_SHARDS - 1) == 2 * NUM_SHARDS
    assert [key.rpartition("/")[0] for key in parts(store)] == [f"{LEDGER_PREFIX}/{d[:16]}" for d in DATASETS]
    assert entries(store) == before
    assert due(store, START + timedelta(days=99)).equals(waiting)
    note(store, ONE, 77)
    before = entries(store)
    assert compact(store, max_parts=1) == 2
    assert entries(store) == before
    table = rows_of(["http://a.example/0/0", "http://a.example/77/0"])
    own, other = (Ledger(store, d, DownloadConfig(), now=lambda: START + timedelta(days=5)) for d in (ONE, "3" * 64))
    assert len(other.remembered(table)) == 2
    assert list(own.remembered(table)) == table.column("uid")[:1].to_pylist()  # of the other dataset, not its own


MEANWHILE: dict[str, Callable[[Path], object]] = {
    "a run adds a part": lambda root: note(FolderStore(root), ONE, 50),
    "another merges": lambda root: compact(FolderStore(root), max_parts=1),
    "a run adds a part, and another merges": lambda root: (
        note(FolderStore(root), TWO, 50),
        compact(FolderStore(root), max_parts=1),
    ),
}


@pytest.mark.parametrize("what", ["killed", *(pytest.param(what, marks=pytest.mark.soak) for what in MEANWHILE)])
def test_no_entry_is_lost_at_any_moment(tmp_path: Path, what: str) -> None:
    whole = Watched(written(tmp_path / "whole").root)
    compact(whole, max_parts=1)
    assert whole.num_moments > 4 * NUM_SHARDS
    for moment in range(1, whole.num_moments + 1):
        root = tmp_path / f"{moment}"
        before = entries(written(root))

        def happens(root: Path = root) -> None:
            if what == "killed":
                raise KilledError
            MEANWHILE[what](root)

        try:
            compact(Watched(root, moment, happens), max_parts=1)
        except KilledError:
            assert what == "killed"
        store = FolderStore(root)
        added = entries(store) - before
        assert entries(store) >= before, moment
        assert len(added) == (len(VERDICTS) if "adds" in what else 0), moment
        compact(store, max_parts=1)
        assert len(parts(store)) == len(DATASETS)
        assert entries(store) == before | added


@pytest.mark.parametrize("moment", range(1, 9))
def test_a_reader_sees_all_entries_while_they_are_merged(tmp_path: Path, moment: int) -> None:
    store = written(tmp_path)
    before = entries(store)
    reader = Watched(tmp_path, moment, lambda: compact(FolderStore(tmp_path), max_parts=1))
    assert entries(reader) == before


def test_other_bytes_with_the_same_entries_are_one_part(tmp_path: Path) -> None:
    """As of a machine with another version of the writer: neither deletes the other's part for its own."""
    store = written(tmp_path)
    before, single = entries(store), {key: store.read(key) for key in parts(store)}
    compact(store, max_parts=1)
    merged = parts(store)
    for key in merged:
        buffer = io.BytesIO()
        pq.write_table(pq.read_table(io.BytesIO(store.read(key))), buffer, compression="none")
        store.put(key, buffer.getvalue())
    for key, data in single.items():
        store.put(key, data)
    assert compact(store, max_parts=1) == 2 * NUM_SHARDS
    assert parts(store) == merged
    assert entries(store) == before


def test_what_is_no_part_is_refused_and_nothing_is_deleted(tmp_path: Path) -> None:
    store = written(tmp_path)
    buffer = io.BytesIO()
    pq.write_table(pa.table({"uid": ["x"]}), buffer)
    store.put(f"{LEDGER_PREFIX}/{ONE[:16]}/x.parquet", buffer.getvalue())
    before = parts(store)
    with pytest.raises(ContractError, match=r"x\.parquet: not a part of the ledger"):
        compact(store, max_parts=1)
    assert parts(store) == before
