"""Bundles: all or nothing, on both backends, with real kills."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import ValidationError
from typing_extensions import override

from infra.bundles import (
    MANIFEST_NAME,
    BundleFile,
    commit_bundle,
    delete_bundle,
    fetch_bundle,
    list_bundles,
    load_bundle,
    verify_bundle,
)
from infra.errors import ContractError, TransientError
from infra.storage import ObjectNotFoundError, open_store
from infra.storage_folder import FolderStore

PREFIX = "runs/demo/checkpoints/step-00000100"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    (made / "ema").mkdir(parents=True)
    (made / "ema" / "weights.bin").write_bytes(bytes(range(256)) * 8000)
    (made / "state.json").write_text('{"step": 100}')
    (made / "empty").write_bytes(b"")
    return made


def commit(root: str, folder: Path, prefix: str = PREFIX):
    return commit_bundle(
        open_store(root), prefix, folder, kind="checkpoint", run_id="demo", step=100, metadata={"loss": 0.5}
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_committed_and_fetched_bundle_is_the_folder(any_root: str, folder: Path, tmp_path: Path):
    manifest = commit(any_root, folder)
    store = open_store(any_root)
    assert manifest == load_bundle(store, PREFIX)
    assert [file.name for file in manifest.files] == ["ema/weights.bin", "empty", "state.json"]
    assert manifest.files[0].sha256 == hashlib.sha256(bytes(range(256)) * 8000).hexdigest()
    assert manifest.num_bytes == 256 * 8000 + 13
    assert verify_bundle(store, PREFIX) == []
    fetched = tmp_path / "new" / "fetched"
    assert fetch_bundle(store, PREFIX, fetched) == manifest
    found = contents(fetched)
    assert found.pop(MANIFEST_NAME) == store.read(f"{PREFIX}/{MANIFEST_NAME}")
    assert found == contents(folder)
    assert [path.name for path in fetched.parent.iterdir()] == ["fetched"]


def test_second_commit_changes_nothing(any_root: str, folder: Path):
    first = commit(any_root, folder)
    (folder / "state.json").write_text('{"step": 101}')
    assert commit(any_root, folder) == first
    assert verify_bundle(open_store(any_root), PREFIX) == []


def test_only_complete_bundles_are_listed(any_root: str, folder: Path):
    parent = PREFIX.rpartition("/")[0]
    for step in (200, 100):
        commit(any_root, folder, f"{parent}/step-{step:08d}")
    store = open_store(any_root)
    store.put(f"{parent}/step-00000300/state.json", b"{}")
    assert list_bundles(store, parent) == [f"{parent}/step-00000100", f"{parent}/step-00000200"]
    assert list_bundles(store, "runs/dem") == []
    with pytest.raises(ObjectNotFoundError):
        load_bundle(store, f"{parent}/step-00000300")


@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
def test_damaged_file_is_found_and_never_fetched(any_root: str, folder: Path, tmp_path: Path, damage: str):
    commit(any_root, folder)
    store = open_store(any_root)
    key = f"{PREFIX}/ema/weights.bin"
    data = bytearray(store.read(key))
    data[1000] ^= 1
    store.delete(key)
    if damage != "lose":
        store.put(key, bytes(data if damage == "flip" else data[:-1]))
    (problem,) = verify_bundle(store, PREFIX)
    assert "ema/weights.bin" in problem
    with pytest.raises((TransientError, ObjectNotFoundError), match=r"ema/weights\.bin"):
        fetch_bundle(store, PREFIX, tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()
    assert not list(tmp_path.glob(".fetched*"))


def test_fetch_takes_only_wanted_files(tmp_path: Path, folder: Path):
    root = str(tmp_path / "store")
    commit(root, folder)
    fetch_bundle(open_store(root), PREFIX, tmp_path / "part", lambda name: name.startswith("ema/"))
    assert set(contents(tmp_path / "part")) == {"ema/weights.bin", MANIFEST_NAME}


def test_bundle_that_is_there_is_left_as_it_is(tmp_path: Path, folder: Path):
    root, to = str(tmp_path / "store"), tmp_path / "fetched"
    commit(root, folder)
    store = open_store(root)
    fetch_bundle(store, PREFIX, to)
    inode = to.stat().st_ino
    store.delete(f"{PREFIX}/ema/weights.bin")  # a download would fail
    fetch_bundle(store, PREFIX, to)
    assert to.stat().st_ino == inode


def test_earlier_fetch_is_replaced_and_nothing_else_is(tmp_path: Path, folder: Path):
    root, to = str(tmp_path / "store"), tmp_path / "fetched"
    commit(root, folder)
    (folder / "empty").unlink()
    commit(root, folder, "runs/demo/checkpoints/step-00000200")
    store = open_store(root)
    fetch_bundle(store, PREFIX, to)
    (to / "state.json").write_text("damaged")
    fetch_bundle(store, "runs/demo/checkpoints/step-00000200", to)
    assert set(contents(to)) == {"ema/weights.bin", "state.json", MANIFEST_NAME}
    (to / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"thesis\.txt"):
        fetch_bundle(store, PREFIX, to)
    assert (to / "thesis.txt").read_text() == "mine"
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "a").touch()
    with pytest.raises(ValueError, match="not an earlier pull"):
        fetch_bundle(store, PREFIX, stranger)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="not a folder"):
        fetch_bundle(store, PREFIX, tmp_path / "file")
    assert {path.name for path in tmp_path.iterdir()} == {"store", "made", "fetched", "stranger", "file"}


def test_replacing_works_where_folders_cannot_change_places(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("infra.landing._exchange", lambda one, other: False)
    test_earlier_fetch_is_replaced_and_nothing_else_is(tmp_path, folder)


def test_abandoned_scratch_is_removed_and_a_living_one_is_not(tmp_path: Path, folder: Path):
    root, to = str(tmp_path / "store"), tmp_path / "fetched"
    commit(root, folder)
    abandoned = tmp_path / ".fetched.lacuna-dead"
    abandoned.mkdir()
    os.utime(abandoned, (0, 0))
    fresh = tmp_path / ".fetched.lacuna-fresh"
    fresh.mkdir()
    fetch_bundle(open_store(root), PREFIX, to)
    assert fresh.exists()
    assert not abandoned.exists()


def test_folder_without_files_or_with_a_manifest_is_refused(tmp_path: Path):
    empty = tmp_path / "empty"
    empty.mkdir()
    root = str(tmp_path / "store")
    with pytest.raises(ValueError, match="must hold files"):
        commit(root, empty)
    (empty / MANIFEST_NAME).write_text("{}")
    with pytest.raises(ValueError, match="must hold files"):
        commit(root, empty)


@pytest.mark.parametrize(
    "name", ["..", "/etc", "a/../../b", "a//b", "", ".", "a\\b", "a\0b", MANIFEST_NAME, "./a", "a/.."]
)
def test_manifest_cannot_name_files_outside(name: str):
    with pytest.raises(ValidationError):
        BundleFile(name=name, num_bytes=0, sha256="0" * 64)


def test_manifest_of_another_format_is_refused(tmp_path: Path, folder: Path):
    root = str(tmp_path / "store")
    commit(root, folder)
    store = open_store(root)
    data = store.read(f"{PREFIX}/{MANIFEST_NAME}").replace(b'"format_version": 1', b'"format_version": 2')
    store.put(f"{PREFIX}/{MANIFEST_NAME}", data)
    with pytest.raises(ContractError, match="format_version"):
        load_bundle(store, PREFIX)


_COMMIT = """
import sys
from pathlib import Path
from infra.bundles import commit_bundle
from infra.storage import open_store
print("ready", flush=True)
sys.stdin.readline()
commit_bundle(open_store(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), kind="report", run_id=sys.argv[4], step=1)
"""

_FETCH = """
import sys
from pathlib import Path
from infra.bundles import fetch_bundle
from infra.storage import open_store
print("ready", flush=True)
sys.stdin.readline()
fetch_bundle(open_store(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def end(process: subprocess.Popen[str]) -> int:
    with process:  # closes the pipes
        return process.wait()


def test_commit_killed_anywhere_leaves_no_manifest_or_a_true_one(tmp_path: Path):
    folder, root = tmp_path / "made", str(tmp_path / "store")
    folder.mkdir()
    for index in range(120):
        (folder / f"{index:03d}").write_bytes(b"x" * index)
    store = open_store(root)
    num_killed_midway = 0
    for trial in range(5):
        prefix = f"reports/{trial}"
        process = start(_COMMIT, root, prefix, str(folder), "demo")
        go(process)
        while sum(1 for _ in store.list(f"{prefix}/")) < 1 + trial * 20 and process.poll() is None:
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        end(process)
        if not store.exists(f"{prefix}/{MANIFEST_NAME}"):
            num_killed_midway += 1
            assert list_bundles(store, "reports") == []
            commit_bundle(store, prefix, folder, kind="report", run_id="demo", step=1)
        assert verify_bundle(store, prefix) == []
        for info in list(store.list(f"{prefix}/")):
            store.delete(info.key)
    assert num_killed_midway >= 1


def test_fetch_killed_anywhere_leaves_nothing_or_all(tmp_path: Path):
    folder, root = tmp_path / "made", str(tmp_path / "store")
    folder.mkdir()
    for index in range(200):
        (folder / f"{index:03d}").write_bytes(b"x" * index)
    store = open_store(root)
    commit_bundle(store, "exports/a", folder, kind="export", run_id="demo", step=1)
    num_killed_midway = 0
    for trial in range(4):
        to = tmp_path / f"to-{trial}"
        process = start(_FETCH, root, "exports/a", str(to))
        go(process)
        while process.poll() is None and not any(
            len(list(scratch.iterdir())) > trial * 40 for scratch in tmp_path.glob(f".to-{trial}.*")
        ):
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        end(process)
        num_killed_midway += not to.exists()
        assert not to.exists() or len(list(to.iterdir())) == 201
        fetch_bundle(store, "exports/a", to)
        assert len(list(to.iterdir())) == 201
    assert num_killed_midway >= 1


def test_of_racing_writers_one_commits_and_its_files_are_there(any_root: str, tmp_path: Path):
    processes = []
    for writer in range(4):
        folder = tmp_path / f"writer-{writer}"
        folder.mkdir()
        for index in range(20):
            (folder / f"{index:03d}").write_bytes(f"{writer} wrote {index}".encode())
        processes.append(start(_COMMIT, any_root, "reports/race", str(folder), f"writer-{writer}"))
    for process in processes:
        go(process)
    assert [end(process) for process in processes] == [0] * 4
    store = open_store(any_root)
    winner = load_bundle(store, "reports/race").run_id.removeprefix("writer-")
    assert verify_bundle(store, "reports/race") == []
    assert store.read("reports/race/007").decode() == f"{winner} wrote 7"


def test_a_damaged_manifest_is_known_as_such(tmp_path: Path):
    """Even where what it says now would make sense."""
    store, folder = open_store(str(tmp_path / "store")), tmp_path / "made"
    folder.mkdir()
    (folder / "state.json").write_text("1")
    commit_bundle(
        store, PREFIX, folder, kind="report", run_id="demo", step=1, metadata={"psnr": 1.5, "nan": float("nan")}
    )
    key = f"{PREFIX}/{MANIFEST_NAME}"
    data = store.read(key)
    assert load_bundle(store, PREFIX).checksum is not None
    for old, new in ((b'"step": 1', b'"step": 3'), (b'"psnr": 1.5', b'"psnr": 1.7'), (b'"demo"', b'"demn"')):
        assert old in data
        store.put(key, data.replace(old, new))
        with pytest.raises(ContractError, match="it is damaged"):
            load_bundle(store, PREFIX)


class _ReaderComesWhileItIsDeleted(FolderStore):
    @override
    def delete(self, key: str) -> None:
        super().delete(key)
        if key.endswith(MANIFEST_NAME):
            self.put(f"{PREFIX}/READING-late.json", b'{"expires_at": 1e12}')


def test_a_bundle_that_a_reader_came_for_meanwhile_is_given_back(tmp_path: Path):
    store, folder = _ReaderComesWhileItIsDeleted(tmp_path / "store"), tmp_path / "made"
    folder.mkdir()
    (folder / "state.json").write_text("1")
    commit_bundle(store, PREFIX, folder, kind="checkpoint", run_id="demo", step=1)
    assert not delete_bundle(store, PREFIX)
    assert verify_bundle(store, PREFIX) == []
    store.delete(f"{PREFIX}/READING-late.json")
    assert delete_bundle(open_store(str(tmp_path / "store")), PREFIX)
    assert list(store.list(PREFIX)) == []
