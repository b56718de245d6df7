"""Several writers of one encoded dataset: two at once, one that is killed, one that sleeps through the other's commit.

Each is a real process that runs the encode stage with the tiny models; the store is a folder, or a real S3 server.
Whatever happens, there is one manifest, every file that it names holds the bytes of an undisturbed run, and nothing
else is there that a reader could take for rows.
"""

import contextlib
import itertools
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from infra.s3_server import S3Server
from infra.storage import ObjectStore, open_store, sha256_of_bytes
from preprocessing.contracts.config import EncodeConfig, ModelConfig
from preprocessing.contracts.manifest import MANIFEST_NAME, Manifest, dataset_prefix
from preprocessing.encode.stage import EncodeStage
from preprocessing.stage import RowsFile, ShardOutput, load_manifest, rejects_table, run_stage
from tests.preprocessing.pictures import Downloaded, picture_row, picture_table

ROOT = Path(__file__).resolve().parents[2]
CONFIG = EncodeConfig(resolution_px=64, mask_family="lama_train_256", num_mask_variants=1, batch_size=4, num_threads=1)
MODEL = ModelConfig(base="tiny", base_prediction_type="v_prediction")
NUM_SHARDS, ROWS_PER_SHARD = 3, 4
LONGEST_DELAY_S = 0.004  # after a point of the store at which a writer is hit: long enough to be within an upload
PATIENCE_S = 300.0  # for a writer on a busy machine
PARENT = dataset_prefix(Downloaded.name, Downloaded.digest)


class Writers:
    """Starts writers in a store, and hits them.

    Args:
        process: ``writer_process.py``, running.
        new_root: Gives the URI of an empty store.
        folder: For named pipes.
        parent: Key → content of the download dataset.
    """

    def __init__(
        self, process: subprocess.Popen[str], new_root: Callable[[], str], folder: Path, parent: dict[str, bytes]
    ) -> None:
        self._process, self._new_root, self._folder, self._parent = process, new_root, folder, parent

    def new_store(self) -> ObjectStore:
        """An empty store but for the download dataset."""
        store = open_store(self._new_root())
        for key, data in self._parent.items():
            store.put(key, data)
        return store

    def ask(self, *words: object) -> dict[str, Any]:
        """One line to the process, and its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    @contextlib.contextmanager
    def start(self, store: ObjectStore, *, announced: bool = False) -> Iterator["Writer"]:
        """A writer, which is waited for if nobody did."""
        events = self._folder / "events"
        if not announced:
            writer = Writer(self, self.ask("start", store.uri, "-")["pid"], None)
        else:
            os.mkfifo(events)
            descriptor = os.open(events, os.O_RDONLY | os.O_NONBLOCK)
            writer = Writer(self, self.ask("start", store.uri, events)["pid"], descriptor)
        try:
            yield writer
        finally:
            if writer.ended is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(writer.pid, signal.SIGKILL)
                writer.wait()
            if writer.events is not None:
                os.close(writer.events)
                events.unlink()


@dataclass
class Writer:
    """One process.

    Attributes:
        writers: Its starter.
        pid: Its id.
        events: Where it tells what it does.
        ended: How, once it was waited for.
    """

    writers: Writers
    pid: int
    events: int | None
    ended: dict[str, Any] | None = None

    def wait(self) -> dict[str, Any]:
        """How it ended."""
        if self.ended is None:
            self.ended = self.writers.ask("wait", self.pid)
        return self.ended

    def finish(self) -> str:
        """Waits for its success; the sha256 of the manifest that it found in the end."""
        ended = self.wait()
        assert ended["code"] == 0, ended
        return ended["manifest"]

    def reach(self, num_points: int) -> bool:
        """Waits until it has touched the store so often; False where it ends before."""
        assert self.events is not None
        seen, deadline = 0, time.monotonic() + PATIENCE_S
        while seen < num_points:
            assert time.monotonic() < deadline, "the writer stands still"
            is_over = self._is_over()  # before its last words are read
            ready, _, _ = select.select([self.events], [], [], 0.2)
            data = os.read(self.events, num_points - seen) if ready else b""
            if not data and is_over:
                return False
            if ready and not data:  # it has opened the pipe no more, or not yet
                time.sleep(0.001)
            seen += len(data)
        return True

    def _is_over(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The download dataset's files: a picture comes twice, and one is broken."""
    store = open_store(str(tmp_path_factory.mktemp("parent")))
    rows = [picture_row(index) for index in range(NUM_SHARDS * ROWS_PER_SHARD)]
    rows[-1] = rows[1] | {"uid": "f" * 32, "url": "http://pictures.test/copy.png"}
    rows[-2] |= {"image": b"not a picture"}
    shards = [rows[start : start + ROWS_PER_SHARD] for start in range(0, len(rows), ROWS_PER_SHARD)]
    run_stage(store, Downloaded([picture_table(shard) for shard in shards]))
    return {info.key: store.read(info.key) for info in store.list()}


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[subprocess.Popen[str]]:
    """``writer_process.py``: one for both kinds of store, since it takes its time to start."""
    command = [sys.executable, "-m", "tests.preprocessing.writer_process"]
    folder = tmp_path_factory.mktemp("writers")
    with subprocess.Popen(
        [*command, CONFIG.model_dump_json(), MODEL.model_dump_json(), str(folder)],
        cwd=ROOT,
        env={**os.environ, **s3_server.environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="module", params=["folder", "s3"])
def writers(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    s3_server: S3Server,
    process: subprocess.Popen[str],
    parent: dict[str, bytes],
) -> Iterator[Writers]:
    folder = tmp_path_factory.mktemp("stores")
    numbers = itertools.count()
    s3_server.make_bucket("writers")

    def new_root() -> str:
        return f"s3://writers/{next(numbers)}" if request.param == "s3" else str(folder / str(next(numbers)))

    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        yield Writers(process, new_root, folder, parent)


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody disturbed.

    Attributes:
        manifest: What it made.
        num_points: How often its writer touched the store, before and after.
        seconds: How long it took.
    """

    manifest: Manifest
    num_points: int
    seconds: float

    @property
    def prefix(self) -> str:
        """The dataset's folder."""
        return dataset_prefix("encode", self.manifest.digest)


@pytest.fixture(scope="module")
def undisturbed(writers: Writers) -> Undisturbed:
    with writers.start(writers.new_store()) as first:  # loads the models
        first.finish()
    store = writers.new_store()
    started = time.monotonic()
    with writers.start(store, announced=True) as writer:
        num_points = 0
        while writer.reach(1):
            num_points += 1
        writer.finish()
    seconds = time.monotonic() - started
    prefix = dataset_prefix("encode", EncodeStage(store, load_manifest(store, PARENT), CONFIG, MODEL).digest)
    found = Undisturbed(load_manifest(store, prefix), num_points, seconds)
    assert found.manifest.dropped == {"duplicate_image": 1, "image_unreadable": 1}
    check(store, found, set())
    return found


def check(store: ObjectStore, undisturbed: Undisturbed, seen: set[str]) -> None:
    """One manifest, which all writers found; every file that it names as in the undisturbed run; and nothing else."""
    prefix, expected = undisturbed.prefix, undisturbed.manifest
    found = {info.key: store.read(info.key) for info in store.list("datasets/encode/")}
    manifests = [key for key in found if key.rpartition("/")[2] == MANIFEST_NAME]
    assert manifests == [f"{prefix}/{MANIFEST_NAME}"]
    assert seen <= {sha256_of_bytes(found[manifests[0]])}
    manifest = load_manifest(store, prefix)
    assert manifest.model_copy(update={"created_at": expected.created_at}) == expected
    files = [*expected.extra_files, *(file for shard in expected.shards for file in shard.files)]
    named = {f"{prefix}/{file.name}": file.sha256 for file in files}
    reports = {f"{prefix}/reports/shard-{index:05d}.json" for index in range(NUM_SHARDS)}
    assert {key: sha256_of_bytes(data) for key, data in found.items() if key in named} == named
    assert set(found) - set(named) == {*manifests, *reports}


def two_at_once(writers: Writers, undisturbed: Undisturbed, draws: random.Random) -> bool:
    """The second starts somewhen while the first is at it."""
    store = writers.new_store()
    with writers.start(store) as one:
        time.sleep(draws.uniform(0, undisturbed.seconds / 2))
        with writers.start(store) as other:
            seen = {other.finish(), one.finish()}
    check(store, undisturbed, seen)
    return True


@contextlib.contextmanager
def hit(
    writers: Writers, store: ObjectStore, undisturbed: Undisturbed, draws: random.Random
) -> Iterator[Writer | None]:
    """A writer at a random moment: of all its time, or shortly after it turned to the store; None if it was over."""
    at_store = draws.random() < 0.7
    with writers.start(store, announced=at_store) as writer:
        is_running = True
        if at_store:
            is_running = writer.reach(draws.randrange(undisturbed.num_points) + 1)
            time.sleep(draws.uniform(0, LONGEST_DELAY_S))
        else:
            time.sleep(draws.uniform(0, undisturbed.seconds))
        yield writer if is_running and not writer._is_over() else None


def one_is_killed(writers: Writers, undisturbed: Undisturbed, draws: random.Random) -> bool:
    """Another one, which starts afterwards or is at it already, does the rest."""
    store = writers.new_store()
    with contextlib.ExitStack() as stack:
        at_once = stack.enter_context(writers.start(store)) if draws.random() < 0.3 else None
        with hit(writers, store, undisturbed, draws) as writer:
            if writer is None:
                return False
            os.kill(writer.pid, signal.SIGKILL)
            was_killed = writer.wait()["code"] == -signal.SIGKILL
        other = at_once or stack.enter_context(writers.start(store))
        check(store, undisturbed, {other.finish()})
    return was_killed


def one_sleeps(writers: Writers, undisturbed: Undisturbed, draws: random.Random) -> bool:
    """It wakes after another one has committed everything."""
    store = writers.new_store()
    with hit(writers, store, undisturbed, draws) as sleeper:
        if sleeper is None:
            return False
        os.kill(sleeper.pid, signal.SIGSTOP)
        with writers.start(store) as other:
            seen = {other.finish()}
        check_is_readable(store, undisturbed)
        was_asleep = not sleeper._is_over()
        os.kill(sleeper.pid, signal.SIGCONT)
        seen.add(sleeper.finish())
    check(store, undisturbed, seen)
    return was_asleep


def check_is_readable(store: ObjectStore, undisturbed: Undisturbed) -> None:
    """While one sleeps: what stands is whole, whatever else lies beside it."""
    manifest = load_manifest(store, undisturbed.prefix)
    for file in [*manifest.extra_files, *(file for shard in manifest.shards for file in shard.files)]:
        assert sha256_of_bytes(store.read(f"{undisturbed.prefix}/{file.name}")) == file.sha256


DISTURBANCES = {"two at once": two_at_once, "one is killed": one_is_killed, "one sleeps": one_sleeps}


def _campaign(name: str, writers: Writers, undisturbed: Undisturbed, num_rounds: int, seed: int) -> tuple[int, int]:
    """Rounds until so many have met their writer at work; how many did, and how many there were."""
    draws = random.Random(seed)
    done = tried = 0
    while done < num_rounds and tried < 5 * num_rounds:
        tried += 1
        done += DISTURBANCES[name](writers, undisturbed, draws)
    return done, tried


@pytest.mark.parametrize("name", DISTURBANCES)
def test_writers_disturb_each_other(name: str, writers: Writers, undisturbed: Undisturbed) -> None:
    assert _campaign(name, writers, undisturbed, num_rounds=1, seed=1)[0] == 1


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", DISTURBANCES)
def test_a_hundred_rounds(name: str, writers: Writers, undisturbed: Undisturbed, record_property: Any) -> None:
    seed = int(time.time())
    done, tried = _campaign(name, writers, undisturbed, num_rounds=100, seed=seed)
    record_property("seed", seed)
    record_property("rounds", tried)
    record_property("rounds_that_met_a_writer_at_work", done)
    assert done == 100


class OtherBytesEachTime:
    """A stage as on machines that round differently: neither rows nor constants come out alike."""

    name, version, digest = "encode", 1, "e" * 64
    num_shards = 2

    def __init__(self, before_extra_files: Callable[[], object] = lambda: None) -> None:
        self.parents = {"download": "d" * 64}
        self.config: dict[str, Any] = {}
        self._before_extra_files = before_extra_files

    def specs(self) -> dict[str, dict[str, Any]]:
        return {}

    def write_extra_files(self, folder: Path) -> Sequence[Path]:
        (folder / "constants.safetensors").write_bytes(os.urandom(16))
        self._before_extra_files()
        return [folder / "constants.safetensors"]

    def outputs(self, indices: Sequence[int], scratch: Path) -> Iterator[ShardOutput]:
        for index in indices:
            rows = RowsFile(f"train-{index:05d}.parquet", pa.table({"value": [os.urandom(16)]}), "train")
            yield ShardOutput(index, 1, (rows,), rejects_table([], [], [], []), is_repeatable=False)


def test_who_comes_second_with_other_bytes_replaces_nothing_that_is_committed(any_root: str) -> None:
    store = open_store(any_root)
    prefix = dataset_prefix(OtherBytesEachTime.name, OtherBytesEachTime.digest)
    first: list[Manifest] = []
    second = OtherBytesEachTime(lambda: first.append(run_stage(store, OtherBytesEachTime())))
    manifest = run_stage(store, second)
    assert first == [manifest]
    files = [*manifest.extra_files, *(file for shard in manifest.shards for file in shard.files)]
    for file in files:
        assert sha256_of_bytes(store.read(f"{prefix}/{file.name}")) == file.sha256, file.name
    found = {info.key for info in store.list(f"{prefix}/") if info.key.endswith((".parquet", ".safetensors"))}
    assert found == {f"{prefix}/{file.name}" for file in files}
