"""A small download to be disturbed: the run as a process of its own, a store that fails or dies at a given operation,
and what must come out of it.

    python -m tests.integration.download_world ROOT SELECT_DIGEST CONFIG [ACTION OPERATION]
"""

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from infra.errors import EXIT_DONE, EXIT_GATE_REFUSED, EXIT_OUTSIDE_WORLD, GateError, TransientError
from infra.storage import FileEntry, ObjectInfo, ObjectStore, sha256_of_bytes
from infra.storage_folder import FolderStore
from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.manifest import Manifest, dataset_prefix
from preprocessing.demo.server import awkward_path, picture_path, running_server
from preprocessing.download.stage import DownloadStage
from preprocessing.stage import load_manifest, run_stage
from tests.preprocessing.given import Given

ROOT = Path(__file__).resolve().parents[2]
SEED = 5
NUM_SHARDS = 3
CONFIG = DownloadConfig.model_validate(
    {
        "allow_networks": ["127.0.0.0/8"],
        "image_size_px": 48,
        "max_image_area_px": 16_000_000,
        "timeout_s": 20,  # a busy machine must not fail rows
        "retries": 0,
        "num_threads": 8,
        "stall_timeout_s": 40,
    }
)
HANG_S = 60 * float(os.environ.get("LACUNA_BUSY_FACTOR", "1"))  # a machine shared with others is no hang
_AWKWARD = ("missing", "html", "truncated", "opted_out")
_BEFORE, _AFTER, _FAIL, _NEVER = "die-before", "die-after", "fail", "never"
ACTIONS = (_BEFORE, _AFTER)
NEVER = _NEVER, 0
Disturbance = tuple[str, int]


def fail_at(operation: int) -> Disturbance:
    return _FAIL, operation


def select_rows(root: Path, port: int, pictures_a_shard: int = 6) -> Manifest:
    """Three shards of good and awkward rows, as `select` would have left them in a store."""
    site = f"http://127.0.0.1:{port}"
    shards = []
    for shard in range(NUM_SHARDS):
        first = shard * pictures_a_shard
        good = [f"{site}{picture_path(SEED, first + number)}" for number in range(pictures_a_shard)]
        bad = [f"{site}{awkward_path(SEED, kind, 1000 + shard)}" for kind in _AWKWARD]
        shards.append([*good, *bad, f"http://10.0.0.{shard + 1}/refused.jpg"])
    return run_stage(FolderStore(root), Given(shards))


class DisturbedStore(FolderStore):
    """Counts its operations, those that others are made of included; dies or fails at one of them."""

    def __init__(self, root: Path, disturbance: Disturbance = NEVER) -> None:
        super().__init__(root)
        self.num_operations = 0
        self._action, self._at = disturbance

    def _do(self, operation: Callable[[], Any]) -> Any:
        self.num_operations += 1
        is_now = self.num_operations == self._at
        if is_now and self._action == _FAIL:
            raise TransientError("injected") from OSError(errno.EIO, os.strerror(errno.EIO))
        if is_now and self._action == _BEFORE:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return operation()
        finally:  # also where the answer is that there is no such object
            if is_now and self._action == _AFTER:
                os.kill(os.getpid(), signal.SIGKILL)

    def head(self, key: str) -> ObjectInfo:
        return self._do(lambda: super(DisturbedStore, self).head(key))

    def read_with_etag(self, key: str) -> tuple[bytes, str]:
        return self._do(lambda: super(DisturbedStore, self).read_with_etag(key))

    def put(self, key: str, data: bytes) -> ObjectInfo:
        return self._do(lambda: super(DisturbedStore, self).put(key, data))

    def put_if_absent(self, key: str, data: bytes) -> ObjectInfo:
        return self._do(lambda: super(DisturbedStore, self).put_if_absent(key, data))

    def compare_and_swap(self, key: str, data: bytes, expected_etag: str | None) -> ObjectInfo:
        return self._do(lambda: super(DisturbedStore, self).compare_and_swap(key, data, expected_etag))

    def upload(self, key: str, path: Path, sha256: str | None = None) -> FileEntry:
        return self._do(lambda: super(DisturbedStore, self).upload(key, path, sha256))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return self._do(lambda: super(DisturbedStore, self).list(prefix))

    def delete(self, key: str) -> None:
        return self._do(lambda: super(DisturbedStore, self).delete(key))


@dataclass(frozen=True)
class Found:
    """What stands in a store after a download."""

    arrived: frozenset[tuple[str, str]]  # uid, sha256
    refused: frozenset[tuple[str, str]]  # uid, reason
    hashes: tuple[str, ...]  # of the files of rows, shard by shard


def download(store: ObjectStore, selected: Manifest, config: DownloadConfig = CONFIG) -> Manifest:
    return run_stage(store, DownloadStage(store, selected, config))


def look_at(root: Path, digest: str) -> Found:
    """Reads a dataset and checks that it is whole: every file with its hash, no row twice, none missing, none over."""
    store = FolderStore(root)
    prefix = dataset_prefix("download", digest)
    manifest = load_manifest(store, prefix)
    assert manifest.digest == digest
    arrived: list[tuple[str, str]] = []
    refused: list[tuple[str, str]] = []
    for shard in manifest.shards:
        num_rows = {"rows": 0, "rejects": 0}
        for file in shard.files:
            data = store.read(f"{prefix}/{file.name}")
            assert sha256_of_bytes(data) == file.sha256
            table = pq.read_table(io.BytesIO(data))
            num_rows[file.kind] += table.num_rows
            to, second = (arrived, "sha256") if file.kind == "rows" else (refused, "reason")
            to += zip(table.column("uid").to_pylist(), table.column(second).to_pylist(), strict=True)
        assert num_rows == {"rows": shard.num_out, "rejects": shard.num_in - shard.num_out}
    assert len({uid for uid, _ in arrived + refused}) == len(arrived) + len(refused) == manifest.num_in
    named = {f"{prefix}/{file.name}" for shard in manifest.shards for file in shard.files}
    assert {info.key for info in store.list(f"{prefix}/") if info.key.endswith(".parquet")} == named
    hashes = tuple(file.sha256 for file in manifest.files())
    return Found(frozenset(arrived), frozenset(refused), hashes)


@dataclass(frozen=True)
class World:
    """A server that runs, and what an undisturbed run makes of it."""

    folder: Path
    port: int
    digest: str
    whole: Found
    num_operations: int

    def fresh(self, name: str) -> tuple[Path, Manifest]:
        """A store of its own for another run, and what stands in it to be downloaded."""
        root = self.folder / name
        return root, select_rows(root, self.port)


@contextlib.contextmanager
def undisturbed(folder: Path) -> Iterator[World]:
    """A server, as long as this lasts, and one run in this process."""
    with running_server() as port:
        store = DisturbedStore(folder / "whole")
        digest = download(store, select_rows(store.root, port)).digest
        yield World(folder, port, digest, look_at(store.root, digest), store.num_operations)


def start(
    root: Path,
    selected: Manifest,
    disturbance: Disturbance = NEVER,
    config: DownloadConfig = CONFIG,
    scratch: Path | None = None,
) -> subprocess.Popen[str]:
    """Starts a download in a process, and a process group, of its own; it ends with the command line's exit codes."""
    scratch = scratch or scratch_of(root)
    scratch.mkdir(exist_ok=True)
    argv = [sys.executable, "-m", "tests.integration.download_world", str(root), selected.digest]
    return subprocess.Popen(
        [*argv, config.model_dump_json(), *map(str, disturbance)],
        cwd=ROOT,
        # Compiled modules are not for it to write: where its files cannot grow, Python leaves them cut off, for all.
        env={**os.environ, "TMPDIR": str(scratch), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def scratch_of(root: Path) -> Path:
    """Where the processes of a run keep their files: their arguments name it, so they can be told by it."""
    return root.with_name(f"{root.name}-scratch")


def processes_of(root: Path) -> dict[int, int]:
    """Process → its parent, of what names a run's scratch folder in its arguments, and of what that has started."""
    parents, found = {}, set()
    for process in Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes()
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if str(scratch_of(root)).encode() in words:
            found.add(int(process.name))
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: parents[pid] for pid in found}


def wait_until_none_is_left(root: Path) -> None:
    deadline = time.monotonic() + HANG_S
    while left := processes_of(root):
        assert time.monotonic() < deadline, f"{left} outlive their run"
        time.sleep(0.05)


def main(root: str, digest: str, config: str, action: str, operation: str) -> int:
    store = DisturbedStore(Path(root), (action, int(operation)))
    selected = load_manifest(FolderStore(Path(root)), dataset_prefix("select", digest))
    try:
        manifest = download(store, selected, DownloadConfig.model_validate_json(config))
    except TransientError as error:
        print(error, file=sys.stderr)  # noqa: T201 - for whoever started this
        return EXIT_OUTSIDE_WORLD
    except GateError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return EXIT_GATE_REFUSED
    print(json.dumps({"digest": manifest.digest, "num_operations": store.num_operations}))  # noqa: T201
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
