"""Files of rows from a store that is not a local folder: fetched into a folder of bounded size.

```
{folder}/shards/{sha256}.parquet      whole files, under the hash that they must have
         filling/{sha256}-{bytes}/    being fetched, by whoever holds the lock; what a killed process left is removed
         quarantine/                  what was found damaged here, for people to look at; it is the first to go
         locks/  sessions/            of `training.shard_files.Notes`
```

Several processes share the folder: one fetches a file, the others wait for it. A file takes its name by a rename, after
its sha256 was found right while it arrived; it is read again when it is first opened after a start.

Whoever has a file open, or mapped, holds a shared lock on it, and only a file that nobody holds is evicted: so what the
folder shows is what the disk gives, and a change of an open file, be it of its attributes only, is never our own doing.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from infra.errors import ContractError
from infra.storage import DamagedObjectError, ObjectNotFoundError, ObjectStore
from preprocessing.contracts.manifest import DatasetFile
from training.shard_files import LocalFiles, Notes, OpenFile, ShardFiles, check_content, check_named, open_at

LOGGER = logging.getLogger(__name__)

Needs = Callable[[], Mapping[str, int]]
"""For each sha256 that will be wanted again, when: 0 and 1 are now, and greater numbers are later. Before it says so,
it lets go of open files that are not wanted now."""

WANTED_NOW = 1
"""What is due in so many windows is not evicted."""

_NUM_FETCHES = 2
_ROOM_S = 5.0
_ROOM_POLL_S = 0.1
_FREE_SHARE = 0.8
_NEVER = 1 << 62


class RowCache:
    """The files of a distant store, through a folder.

    Args:
        store: The store.
        folder: Local to the machine; processes that train together share it.
        max_bytes: How many bytes all files in it may take.
        notes: What is known since this start; in the same folder.

    Attributes:
        needs: Tells what will be wanted when: what is wanted last goes first when room is needed.
        num_fetched: Files fetched by this object.
    """

    def __init__(self, store: ObjectStore, folder: Path, max_bytes: int, notes: Notes) -> None:
        self._store = store
        self._shards, self._filling = folder / "shards", folder / "filling"
        self._quarantine = folder / "quarantine"
        for path in (self._shards, self._filling, self._quarantine):
            path.mkdir(parents=True, exist_ok=True)
        self._max_bytes = max_bytes
        self._notes = notes
        self.needs: Needs = dict
        self.num_fetched = 0

    def check_size(self, bytes_at_once: int) -> None:
        """Makes sure beforehand that what is in use at once has room.

        Raises:
            ValueError: It has not.
        """
        if self._max_bytes < bytes_at_once:
            raise ValueError(
                f"train.cache_bytes: {self._max_bytes} is too little for {self._shards.parent}: up to {bytes_at_once} "
                f"bytes of shards are in use at once; raise it to at least that, or free some of the disk"
            )

    def open(self, prefix: str, file: DatasetFile) -> OpenFile:
        """See `training.shard_files.ShardFiles`.

        Raises:
            ContractError: Twice in a row, what the store gave was damaged or missing; or the cache is too small.
            TransientError: The store could not be reached; or the dataset names the file no more.
        """
        with contextlib.suppress(ContractError):
            opened = self._open_held(file)
            if opened is not None and self._notes.know(file.sha256, opened.identity):
                return opened
            if opened is not None:
                opened.file.close()
        with self._notes.locked(file.sha256):
            return self._open_locked(prefix, file)

    def prepare(self, prefix: str, file: DatasetFile) -> None:
        """See `training.shard_files.ShardFiles`."""
        with self._notes.locked_if_free(file.sha256) as is_ours:
            if is_ours:
                self._open_locked(prefix, file).file.close()

    def _path(self, file: DatasetFile) -> Path:
        return self._shards / f"{file.sha256}.parquet"

    def _open_locked(self, prefix: str, file: DatasetFile) -> OpenFile:
        key = file.key(prefix)
        problem: Exception | None = None
        for num_fetched in range(_NUM_FETCHES + 1):
            if (opened := self._open_cached(file)) is not None:
                return opened
            if num_fetched < _NUM_FETCHES:
                try:
                    return self._fetch(prefix, file)
                except (DamagedObjectError, ContractError) as error:
                    problem = error
                    LOGGER.warning("%s: what arrived is not used: %s", self._store.uri_of(key), error)
        raise ContractError(
            f"{self._store.uri_of(key)}: damaged in the store, fetched {_NUM_FETCHES} times ({problem}); "
            "encode its dataset again, or put a good copy there"
        )

    def _open_held(self, file: DatasetFile) -> OpenFile | None:
        """Opens a cached file, which nobody evicts then until it is closed and no map of it is left.

        Raises:
            ContractError: It has another size.
        """
        path = self._path(file)
        if not path.is_file():
            return None
        opened = open_at(path, file)
        fcntl.flock(opened.file, fcntl.LOCK_SH)
        if os.fstat(opened.file.fileno()).st_nlink:
            return opened
        opened.file.close()  # evicted before it was held
        return None

    def _open_cached(self, file: DatasetFile) -> OpenFile | None:
        try:
            opened = self._open_held(file)
            if opened is not None and not self._notes.know(file.sha256, opened.identity):
                check_content(opened, file)
                self._notes.note(file.sha256, opened.identity)
        except ContractError as error:
            with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
                path = self._path(file)
                aside = self._quarantine / f"{file.sha256}-{os.stat(path).st_mtime_ns}.parquet"
                os.replace(path, aside)
                LOGGER.warning("%s; moved to %s, and fetched again", error, aside)
            return None
        return opened

    def _fetch(self, prefix: str, file: DatasetFile) -> OpenFile:
        """Fetches a file under the hash that the manifest gives it; what has another one never takes its name."""
        key = file.key(prefix)
        with self._room_for(file) as folder:
            scratch = folder / "shard.parquet"
            try:
                entry = self._store.download(key, scratch, file.sha256)
            except ObjectNotFoundError as error:
                check_named(self._store, prefix, file)
                raise ContractError(f"{error}, and the manifest names it") from None
            if entry.num_bytes != file.num_bytes:
                raise ContractError(f"{entry.num_bytes} bytes, the manifest says {file.num_bytes}")
            with self._notes.locked("room"):  # nobody counts it twice, or not at all, or evicts it before it is held
                os.replace(scratch, self._path(file))
                shutil.rmtree(folder)
                opened = self._open_held(file)
        self.num_fetched += 1
        if opened is None:
            raise ContractError(f"{self._path(file)} was deleted as soon as it was there")
        self._notes.note(file.sha256, opened.identity)
        return opened

    # ------------------------------------------------------------------------------------------------------------ room

    @contextlib.contextmanager
    def _room_for(self, file: DatasetFile) -> Iterator[Path]:
        """A folder to fetch into, once there is room; the caller holds the file's lock."""
        folder = self._filling / f"{file.sha256}-{file.num_bytes}"
        deadline = time.monotonic() + _ROOM_S
        while True:
            with self._notes.locked("room"):
                shutil.rmtree(folder, ignore_errors=True)  # of a killed process: we hold its lock now
                excess = self._make_room(file)
                if excess <= 0:
                    folder.mkdir()
                    break
            if time.monotonic() > deadline:
                raise ValueError(
                    f"train.cache_bytes: {self._max_bytes} is {excess} bytes too few for the shards that are in use at "
                    f"once (in {self._shards.parent}); raise it to at least {self._max_bytes + excess}"
                )
            time.sleep(_ROOM_POLL_S)  # others may be about to close what they hold
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _make_room(self, file: DatasetFile) -> int:
        """Evicts what is needed last and held by nobody; returns how many bytes are still missing."""
        kept = list(self._kept())
        excess = sum(entry.num_bytes for entry in kept) + self._filling_bytes() + file.num_bytes - self._max_bytes
        if excess <= 0:
            return excess
        needs = self.needs()
        kept.sort(key=lambda entry: -entry.due(needs))
        for entry in kept:
            if excess <= 0 or entry.due(needs) <= WANTED_NOW:
                break
            if _evict(entry.path):
                excess -= entry.num_bytes
        return excess

    def _kept(self) -> Iterator["_Kept"]:
        for folder in (self._shards, self._quarantine):
            with os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        sha256 = entry.name.partition(".")[0] if folder is self._shards else ""
                        yield _Kept(Path(entry.path), sha256, entry.stat().st_size)

    def _filling_bytes(self) -> int:
        total = 0
        for folder in self._filling.iterdir():
            sha256, _, num_bytes = folder.name.partition("-")
            with self._notes.locked_if_free(sha256) as is_abandoned:
                if is_abandoned:
                    shutil.rmtree(folder, ignore_errors=True)
                else:
                    total += int(num_bytes)
        return total


def _evict(path: Path) -> bool:
    """Deletes a file unless somebody has it open: it would take its room all the same. Whether it is gone."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink()
    return True


@dataclass(frozen=True)
class _Kept:
    path: Path
    sha256: str
    num_bytes: int

    def due(self, needs: Mapping[str, int]) -> int:
        return needs.get(self.sha256, _NEVER)


def shard_files_of(store: ObjectStore, folder: Path, max_bytes: int | None, notes: Notes) -> ShardFiles:
    """The way to a store's files of rows: in place where it is a local folder, else through a cache.

    Args:
        store: The store.
        folder: Of the cache.
        max_bytes: Of the cache; None: four fifths of what is free on its disk or taken by it already.
        notes: What is known since this start; in the same folder.
    """
    if store.local_path("any") is not None:
        return LocalFiles(store, notes)
    if max_bytes is None:
        cached = sum(path.stat().st_size for path in folder.glob("*/*.parquet"))
        max_bytes = int((shutil.disk_usage(folder).free + cached) * _FREE_SHARE)
    return RowCache(store, folder, max_bytes, notes)
