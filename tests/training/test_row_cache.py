"""The cache of rows from a distant store: bounded, shared, and never the giver of something that was not verified."""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.errors import ContractError
from infra.storage import ObjectStore, open_store
from preprocessing.contracts.manifest import DatasetFile
from tests.training.corruption import DistantStore
from training import part
from training.data import open_dataset
from training.order import SampleOrder
from training.row_cache import RowCache
from training.shard_files import LocalFiles, Notes

NUM_BYTES = 1000


@pytest.fixture
def files(tmp_path: Path) -> list[DatasetFile]:
    """Six files of a distant store, of which three fit into the cache."""
    folder = tmp_path / "store" / "dataset"
    folder.mkdir(parents=True)
    found = []
    for i in range(6):
        content = bytes([i]) * NUM_BYTES
        (folder / f"{i}").write_bytes(content)
        found.append(DatasetFile(name=f"{i}", num_bytes=NUM_BYTES, sha256=hashlib.sha256(content).hexdigest()))
    return found


def _cache(tmp_path: Path, session: str | None = None) -> RowCache:
    folder = tmp_path / "cache"
    return RowCache(DistantStore(tmp_path / "store"), folder, 3 * NUM_BYTES, Notes(folder, session))


def _read(cache: RowCache, file: DatasetFile) -> bytes:
    with (opened := cache.open("dataset", file)).file:
        return opened.file.read()


def _kept(tmp_path: Path, files: list[DatasetFile]) -> set[int]:
    return {i for i, file in enumerate(files) if (tmp_path / "cache" / "shards" / f"{file.sha256}.parquet").exists()}


def test_what_is_needed_last_goes_first(tmp_path: Path, files: list[DatasetFile]):
    cache = _cache(tmp_path)
    due = [9, 2, 5, 0, 1, 1]
    cache.needs = lambda: {file.sha256: when for file, when in zip(files, due, strict=True)}
    for i in (0, 1, 2, 3, 4):
        assert _read(cache, files[i]) == bytes([i]) * NUM_BYTES
    assert _kept(tmp_path, files) == {1, 3, 4}
    assert cache.num_fetched == 5
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.parquet")) == 3 * NUM_BYTES


def test_too_small_a_cache_says_what_to_raise(tmp_path: Path, files: list[DatasetFile]):
    cache = _cache(tmp_path)
    cache.needs = lambda: {file.sha256: 1 for file in files}
    for file in files[:3]:
        _read(cache, file)
    with pytest.raises(ValueError, match=r"train.cache_bytes: 3000 is 1000 bytes too few .* raise it to at least 4000"):
        _read(cache, files[3])
    with pytest.raises(ValueError, match=r"train.cache_bytes: 3000 is too little .* up to 5000 bytes"):
        cache.check_size(5000)


def test_a_file_counts_once_while_it_takes_its_name(
    tmp_path: Path, files: list[DatasetFile], monkeypatch: pytest.MonkeyPatch
):
    """Room for three, of which none may go: whoever counted one of them twice would find none for the third."""
    ours, theirs = _cache(tmp_path), _cache(tmp_path)
    ours.needs = theirs.needs = lambda: {file.sha256: 1 for file in files}
    _read(ours, files[0])
    replace = os.replace

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        begun: list[concurrent.futures.Future[bytes]] = []

        def replace_and_let_another_look(source: Path, target: Path) -> None:
            replace(source, target)
            if target == tmp_path / "cache" / "shards" / f"{files[1].sha256}.parquet":
                begun.append(pool.submit(_read, theirs, files[2]))
                concurrent.futures.wait(begun, timeout=0.5)  # it may have to wait for us

        monkeypatch.setattr(os, "replace", replace_and_let_another_look)
        _read(ours, files[1])
        assert begun[0].result() == bytes([2]) * NUM_BYTES


def test_an_open_file_takes_room_and_stays_what_it_was(tmp_path: Path, files: list[DatasetFile]):
    ours, theirs = _cache(tmp_path), _cache(tmp_path)  # as two ranks have them
    opened = ours.open("dataset", files[0])
    held = mmap.mmap(opened.file.fileno(), 0, access=mmap.ACCESS_READ)
    opened.file.close()  # the map alone holds it
    with (other := ours.open("dataset", files[1])).file:
        for i in (2, 3, 4):
            _read(theirs, files[i])
        assert _kept(tmp_path, files) == {0, 1, 4}
        assert other.is_unchanged()  # of its attributes, too
        with (
            ours.open("dataset", files[4]).file,
            pytest.raises(ValueError, match=r"train.cache_bytes: .* at least 4000"),
        ):
            _read(theirs, files[5])
    held.close()
    theirs.needs = lambda: {files[i].sha256: 1 for i in (1, 4)}
    _read(theirs, files[5])
    assert _kept(tmp_path, files) == {1, 4, 5}


def _bytes_taken(folder: Path) -> int:
    """By all files in a folder, and by deleted ones that this process has open or mapped, at one moment."""
    with open(folder / "locks" / "room", "ab") as room:  # else a file could be counted, and then the one in its place
        fcntl.flock(room, fcntl.LOCK_EX)
        return sum(_sizes(folder).values())


def _sizes(folder: Path) -> dict[int, int]:
    sizes = {}
    for path in folder.rglob("*.parquet"):
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            sizes[stat.st_ino] = stat.st_size
    for kind in ("fd", "map_files"):
        for link in Path("/proc/self", kind).iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if str(link.readlink()).startswith(str(folder / "shards")):
                    stat = os.stat(link)
                    sizes[stat.st_ino] = stat.st_size
    return sizes


@pytest.mark.skipif(not Path("/proc/self/map_files").is_dir(), reason="looks at open files through /proc")
def test_two_ranks_stay_within_the_bound(
    store: ObjectStore, make_dataset: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Windows of one shard of ten; the bound is the smallest legal `cache_bytes`."""
    monkeypatch.setattr(part, "ROWS_PER_WINDOW", 4)
    monkeypatch.setattr(SampleOrder.__init__, "__defaults__", (4,))
    prefix = make_dataset(store, (4,) * 10)
    distant, folder = DistantStore(Path(store.uri)), tmp_path / "cache"
    with pytest.raises(ValueError, match=r"train\.cache_bytes: 1 is too little") as refused:
        open_dataset(distant, prefix, folder, cache_bytes=1)
    bound = int(str(refused.value).partition("up to ")[2].split()[0])
    ranks = [open_dataset(distant, prefix, folder, cache_bytes=bound, session="session") for _ in range(2)]
    both = [
        dataset.batches(seed=1, global_batch_size=2, num_steps=50, rank=rank, world_size=2)
        for rank, dataset in enumerate(ranks)
    ]
    most = 0
    with both[0] as first, both[1] as second:
        for _ in zip(first, second, strict=True):
            most = max(most, _bytes_taken(folder))
    assert 0 < most <= bound < sum(path.stat().st_size for path in Path(store.uri, prefix).glob("train-*"))


def test_many_threads_fetch_each_file_once(tmp_path: Path, files: list[DatasetFile]):
    caches = [_cache(tmp_path, "session") for _ in range(4)]  # as many processes would have them
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: _read(caches[i % 4], files[i % 3]), range(48)))
    assert found == [bytes([i % 3]) * NUM_BYTES for i in range(48)]
    assert sum(cache.num_fetched for cache in caches) == 3


def test_who_finds_a_file_locked_does_not_prepare_it(tmp_path: Path, files: list[DatasetFile]):
    cache = _cache(tmp_path)
    with open(tmp_path / "cache" / "locks" / files[0].sha256, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache.prepare("dataset", files[0])
        assert cache.num_fetched == 0
    cache.prepare("dataset", files[0])
    assert cache.num_fetched == 1


def test_what_a_killed_process_left_is_removed_and_counts_no_more(tmp_path: Path, files: list[DatasetFile]):
    cache = _cache(tmp_path)
    left = tmp_path / "cache" / "filling" / f"{files[5].sha256}-{NUM_BYTES}"
    left.mkdir()
    (left / "shard.parquet").write_bytes(b"half")
    for file in files[:3]:
        _read(cache, file)
    assert not left.exists()
    assert _kept(tmp_path, files) == {0, 1, 2}


def test_a_damaged_file_is_put_aside_and_fetched_again(
    tmp_path: Path, files: list[DatasetFile], caplog: pytest.LogCaptureFixture
):
    _read(_cache(tmp_path), files[0])
    path = tmp_path / "cache" / "shards" / f"{files[0].sha256}.parquet"
    path.write_bytes(b"x" * NUM_BYTES)
    assert _read(_cache(tmp_path), files[0]) == bytes(NUM_BYTES)
    [aside] = (tmp_path / "cache" / "quarantine").iterdir()
    assert aside.read_bytes() == b"x" * NUM_BYTES
    assert f"{files[0].sha256}.parquet: sha256" in caplog.text
    assert str(aside) in caplog.text


def test_damaged_in_the_store_is_an_error_that_names_it(tmp_path: Path, files: list[DatasetFile]):
    (tmp_path / "store" / "dataset" / "0").write_bytes(b"x" * NUM_BYTES)
    cache = _cache(tmp_path)
    for _ in range(2):
        with pytest.raises(ContractError, match=r"store/dataset/0: damaged in the store, fetched 2 times"):
            _read(cache, files[0])
    assert _kept(tmp_path, files) == set()


def test_a_session_reads_each_local_file_once(tmp_path: Path, files: list[DatasetFile]):
    store = open_store(str(tmp_path / "store"))
    first, second = (LocalFiles(store, Notes(tmp_path / "cache", "session")) for _ in range(2))
    first.open("dataset", files[0]).file.close()
    path = tmp_path / "store" / "dataset" / "0"
    note = tmp_path / "cache" / "sessions" / "session" / files[0].sha256
    assert note.exists()
    before = note.stat().st_mtime_ns
    second.open("dataset", files[0]).file.close()
    assert note.stat().st_mtime_ns == before
    path.write_bytes(b"x" * NUM_BYTES)
    for again in (first, second, LocalFiles(store, Notes(tmp_path / "cache", "another"))):
        with pytest.raises(ContractError, match=r"dataset/0: sha256 \w+, the manifest says"):
            again.open("dataset", files[0])


def test_from_a_real_s3_server(s3_root: str, make_dataset: Callable[..., str], tmp_path: Path):
    store = open_store(s3_root)
    prefix = make_dataset(store)
    first = open_dataset(store, prefix, tmp_path)
    with first.batches(seed=0, global_batch_size=4, num_steps=10) as batches:
        uids = [batch.uids for batch in batches]
    for path in (tmp_path / "shards").iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    again = open_dataset(store, prefix, tmp_path)
    with again.batches(seed=0, global_batch_size=4, num_steps=10, num_workers=0) as batches:
        assert [batch.uids for batch in batches] == uids
    for info in list(store.list(f"{prefix}/train-")):
        store.put(info.key, store.read(info.key)[:-1] + b"x")
    with pytest.raises(ContractError, match=r"s3://.*train-0000\d.parquet: damaged in the store"):
        open_dataset(store, prefix, tmp_path / "elsewhere").batch_at(0, seed=0, global_batch_size=4)
