"""The download when the world around it fails: full disks, failing writes, killed decoders. Every row is accounted for.

After each fault the same command, in a world that is well again, makes what an undisturbed run makes.
"""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.errors import TransientError
from infra.storage_folder import FolderStore
from preprocessing.contracts.manifest import Manifest, dataset_prefix
from preprocessing.download.stage import DownloadStage
from preprocessing.stage import find_manifest, find_report
from tests.integration.download_world import (
    CONFIG,
    NUM_SHARDS,
    DisturbedStore,
    World,
    download,
    fail_at,
    look_at,
    processes_of,
    select_rows,
    start,
    undisturbed,
    wait_until_none_is_left,
)

_LONGEST_S = 240.0
_FAILING_STEP = 11


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with undisturbed(tmp_path_factory.mktemp("faults")) as found:
        yield found


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A small filesystem of its own, where we may make one."""
    folder.mkdir(parents=True)
    argv = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if not sys.platform.startswith("linux") or subprocess.run(argv, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a filesystem here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def fill(folder: Path, leave_bytes: int) -> Path:
    """Takes all room but a little."""
    stand = os.statvfs(folder)
    filler = folder / ".lacuna-filler"
    filler.write_bytes(bytes(max(0, stand.f_bavail * stand.f_frsize - leave_bytes)))
    return filler


def check_that_all_is_accounted_for(root: Path, selected: Manifest) -> int:
    """Every shard that counts as done has all of its rows; returns how many do."""
    store = FolderStore(root)
    stage = DownloadStage(store, selected, CONFIG)
    reports = [find_report(store, stage, index) for index in range(NUM_SHARDS)]
    for report, given in zip(reports, selected.shards, strict=True):
        if report is not None:
            assert report.num_in == given.num_out == report.num_out + sum(report.dropped.values())
    return sum(report is not None for report in reports)


def fails_and_goes_on(world: World, store: FolderStore, selected: Manifest, what: str) -> None:
    with pytest.raises(TransientError, match=what):
        download(store, selected)
    assert check_that_all_is_accounted_for(store.root, selected) < NUM_SHARDS
    assert find_manifest(store, dataset_prefix("download", world.digest)) is None


def test_a_full_store(world: World) -> None:
    with mounted(world.folder / "small", "4m") as disk:
        for leave_bytes in (0, 40 << 10):
            root = disk / f"left-{leave_bytes}"
            selected = select_rows(root, world.port)
            filler = fill(disk, leave_bytes)
            fails_and_goes_on(world, FolderStore(root), selected, "No space left on device")
            filler.unlink()
            download(FolderStore(root), selected)
            assert look_at(root, world.digest) == world.whole


def test_a_full_scratch_disk(world: World) -> None:
    with mounted(world.folder / "small-scratch", "1m") as disk:
        root, selected = world.fresh("scratch-is-full")
        for leave_bytes in (8 << 10, 40 << 10):  # with no room at all, Python takes another folder
            filler = fill(disk, leave_bytes)
            child = start(root, selected, scratch=disk)
            _, said = child.communicate(timeout=_LONGEST_S)
            assert child.returncode == 4, said
            assert check_that_all_is_accounted_for(root, selected) < NUM_SHARDS
            filler.unlink()
        child = start(root, selected, scratch=disk)
        _, said = child.communicate(timeout=_LONGEST_S)
        assert child.returncode == 0, said
        assert look_at(root, world.digest) == world.whole
        assert [path.name for path in disk.iterdir() if path.name.startswith("lacuna-")] == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits another process")
@pytest.mark.parametrize("longest_file_bytes", [512, 4096])
def test_files_that_cannot_grow(world: World, longest_file_bytes: int) -> None:
    """As a quota would have it: each write beyond a length is an error, in the run and in all that it starts."""
    root, selected = world.fresh(f"limited-{longest_file_bytes}")
    child = start(root, selected)
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (longest_file_bytes, longest_file_bytes))
    _, said = child.communicate(timeout=_LONGEST_S)
    assert child.returncode == 4, said
    assert check_that_all_is_accounted_for(root, selected) == 0
    download(FolderStore(root), selected)
    assert look_at(root, world.digest) == world.whole


def test_a_store_that_becomes_read_only(world: World) -> None:
    with mounted(world.folder / "read-only", "4m") as disk:
        selected = select_rows(disk / "store", world.port)
        remount(disk, "ro")
        with pytest.raises(ValueError, match=r"Read-only file system; choose another --root"):
            download(FolderStore(disk / "store"), selected)
        remount(disk, "rw")
        download(FolderStore(disk / "store"), selected)
        assert look_at(disk / "store", world.digest) == world.whole


def fail_and_go_on(world: World, operations: Iterator[int]) -> int:
    num_failed = 0
    for operation in operations:
        root, selected = world.fresh(f"fails-{operation}")
        store = DisturbedStore(root, fail_at(operation))
        with pytest.raises(TransientError, match="injected"):
            download(store, selected)
        check_that_all_is_accounted_for(root, selected)
        download(FolderStore(root), selected)
        assert look_at(root, world.digest) == world.whole
        num_failed += 1
    return num_failed


@pytest.mark.timeout(600)
def test_some_operations_of_the_store_fail(world: World) -> None:
    assert fail_and_go_on(world, iter(range(4, world.num_operations + 1, _FAILING_STEP))) >= 4


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_operation_of_the_store_fails(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    num_failed = fail_and_go_on(world, iter(range(1, world.num_operations + 1)))
    with capsys.disabled():
        print(f"\nfailures at an operation of the store: {num_failed} trials, 0 failures")  # noqa: T201


def decoders_of(root: Path) -> list[int]:
    """The processes that decode: those of the decoders' module whose parent, the nursery, is of it, too."""
    found = {}
    for pid, parent in processes_of(root).items():
        with contextlib.suppress(OSError):
            if b"preprocessing.download.decoder" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found[pid] = parent
    return [pid for pid, parent in found.items() if parent in found]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes through /proc")
def test_decoders_are_killed_all_the_time(world: World) -> None:
    root = world.folder / "decoders"
    selected = select_rows(root, world.port, pictures_a_shard=60)
    child = start(root, selected)
    killed: set[int] = set()
    has_ended = threading.Event()

    def kill() -> None:
        while not has_ended.is_set():
            for pid in decoders_of(root):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
            time.sleep(0.02)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        _, said = child.communicate(timeout=_LONGEST_S)
    finally:
        has_ended.set()
        killer.join()
    assert child.returncode == 0, said
    assert len(killed) >= 3
    wait_until_none_is_left(root)
    store = FolderStore(root)
    manifest = find_manifest(store, dataset_prefix("download", DownloadStage(store, selected, CONFIG).digest))
    assert manifest is not None
    found = look_at(root, manifest.digest)
    num_died = manifest.dropped.get("decoder_died", 0)
    assert len(found.arrived) + num_died == NUM_SHARDS * 60
    assert len(found.refused) - num_died == NUM_SHARDS * 5
