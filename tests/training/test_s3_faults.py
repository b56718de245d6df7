"""A store that fails as S3 does, and a network that fails as networks do: what comes out is what comes out without.

Ranks save checkpoints and go on from them, an export is published, channels move, a consumer pulls: all of it through a
proxy that breaks a quarter of the requests. Meanwhile an onlooker, who asks the real server, must never see an object
that is not whole.
"""

import json
import os
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infra import storage_s3
from infra.bundles import commit_bundle, list_bundles, verify_bundle
from infra.channels import move_channel, pointer_to, pull
from infra.s3_client import make_client
from infra.s3_server import S3Server
from infra.storage import AlreadyExistsError, ConflictError, ObjectStore, open_store, sha256_of_bytes
from tests.infra.s3_fault_proxy import RATES, FaultPlan, FaultProxy, running_proxy, waiting_less
from tests.training import save_harness
from tests.training.forked_ranks import Ranks
from training.runspec import checkpoints_prefix, export_prefix

READ_TIMEOUT_S = 2.0
MAX_RATIO = 1.6
OF_EACH_TIME = ("created_at", "checksum", "moved_at", "manifest_sha256")
Said = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What a sequence left in the store, and what it took."""

    objects: dict[str, str]
    num_requests: int
    faults: Counter[str]
    seconds: float


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as ranks:
        yield ranks


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Said:
    def say(line: str) -> None:
        with capsys.disabled():
            print(f"\n{line}", flush=True)  # noqa: T201 - what the campaigns are for

    return say


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """What is published: one file goes up in parts."""
    folder = tmp_path / "files"
    draws = random.Random(0)
    for name, num_bytes in {"unet/config.json": 300, "unet/weights.bin": 200_000, "all.safetensors": 11 << 20}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draws.randbytes(num_bytes))
    return folder


@dataclass
class Scene:
    """A real server, ranks, and what is done with them, again and again, each time in another bucket."""

    server: S3Server
    ranks: Ranks
    files: Path
    scratch: Path
    monkeypatch: pytest.MonkeyPatch
    number: int = 0

    def play(self, plan: FaultPlan, outage_s: float = 0.0) -> Outcome:
        """The whole sequence through a proxy; with an outage while the ranks save."""
        self.number += 1
        bucket, scratch = f"faults-{uuid.uuid4().hex[:12]}", self.scratch / str(self.number)
        self.server.make_bucket(bucket)
        root = f"s3://{bucket}/root"
        for name, value in self.server.environment.items():
            self.monkeypatch.setenv(name, value)
        real = open_store(root)
        began = time.monotonic()
        with Onlooker(real) as onlooker, running_proxy(self.server.endpoint_url, plan) as proxy:
            self.monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
            self._save_and_resume(root, proxy, scratch, outage_s)
            _publish(open_store(root), self.files, scratch)
        assert onlooker.num_looked_at > 10
        self.monkeypatch.setenv("AWS_ENDPOINT_URL", self.server.endpoint_url)
        return Outcome(_objects(real), proxy.num_requests, proxy.done, time.monotonic() - began)

    def _save_and_resume(self, root: str, proxy: FaultProxy, scratch: Path, outage_s: float) -> None:
        environment = self.server.environment | {"AWS_ENDPOINT_URL": proxy.endpoint_url}
        spec = {"store": root, "num_processes": 1, "keep_last": 2, "read_timeout_s": READ_TIMEOUT_S}
        for num_steps in (2, 4):
            folder = scratch / f"to-{num_steps}"
            main = "tests.training.save_harness:main"
            started = self.ranks.start({**spec, "num_steps": num_steps}, folder, 1, main, environment)
            if outage_s and num_steps == 2:
                while not any(event["event"] == "saving" for event in started.events()):
                    time.sleep(0.01)
                proxy.go_out(outage_s)
            assert self.ranks.wait(started) == [0], started.log()


@pytest.fixture
def scene(
    s3_server: S3Server, ranks: Ranks, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Scene]:
    with waiting_less(READ_TIMEOUT_S):
        yield Scene(s3_server, ranks, files, tmp_path, monkeypatch)


class Onlooker:
    """Looks at every object as soon as it sees it, directly at the server."""

    def __init__(self, store: ObjectStore) -> None:
        assert isinstance(store, storage_s3.S3Store)
        self.num_looked_at = 0
        self._client, self._bucket = make_client(attempts=5), store.bucket
        self._seen: set[tuple[str, str]] = set()
        self._bad: list[str] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look_on)

    def __enter__(self) -> "Onlooker":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._client.close()
        if kind is None:
            assert not self._bad

    def _look_on(self) -> None:
        while not self._is_over.wait(0.01):
            for entry in self._client.list_objects_v2(Bucket=self._bucket).get("Contents", ()):
                version = (entry["Key"], entry["ETag"])
                if version not in self._seen:
                    self._seen.add(version)
                    self._look_at(entry["Key"])

    def _look_at(self, key: str) -> None:
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=key)
            content = answer["Body"].read()
        except self._client.exceptions.NoSuchKey:
            return
        self.num_looked_at += 1
        if sha256_of_bytes(content) != answer["Metadata"]["sha256"]:
            self._bad.append(f"{key}: {len(content)} bytes, not what was put")


def _publish(store: ObjectStore, files: Path, scratch: Path) -> None:
    """An export and its channels, a consumer, and races that are decided by the store."""
    prefix = export_prefix(save_harness.RUN, 4)
    commit_bundle(store, prefix, files, kind="export", run_id=save_harness.RUN, step=4)
    for channel in ("latest", "best"):
        moved = move_channel(store, channel, pointer_to(store, channel, prefix), lambda _: True)
        assert moved is not None
    pull(store, "latest", scratch / "pulled")
    assert _contents(scratch / "pulled").items() >= _contents(files).items()
    for bundle in (prefix, *list_bundles(store, checkpoints_prefix(save_harness.RUN))):
        assert verify_bundle(store, bundle) == []

    content = (files / "all.safetensors").read_bytes()
    for start in range(0, len(content), 1 << 20):
        assert store.read_range(f"{prefix}/all.safetensors", start, 12_345) == content[start : start + 12_345]
    store.put_if_absent("race", b"first")
    with pytest.raises(AlreadyExistsError):
        store.put_if_absent("race", b"second")
    _count(store)
    for number in range(5):
        store.put(f"many/{number}/x", b"")
    assert store.list_folders("many/") == [str(number) for number in range(5)]
    store.delete("many/3/x")
    assert [info.key for info in store.list("many/")] == [f"many/{number}/x" for number in (0, 1, 2, 4)]


def _count(store: ObjectStore, num_writers: int = 2, num_each: int = 4) -> None:
    """Writers that add to one number by compare-and-swap: none is lost, none counts twice."""
    store.put("counter", b'{"count": 0}')

    def add(writer: int) -> None:
        for number in range(num_each):
            while True:
                data, etag = store.read_with_etag("counter")
                value = {"count": json.loads(data)["count"] + 1, "by": [writer, number]}
                try:
                    store.compare_and_swap("counter", json.dumps(value).encode(), etag)
                except ConflictError:
                    # An own write whose answer was lost, and that was overwritten since, is beyond telling apart.
                    if [writer, number] in _seen_by(store):
                        break
                    continue
                break

    for writer in range(num_writers):
        add(writer)
    assert json.loads(store.read("counter"))["count"] == num_writers * num_each
    store.put("counter", b"")


def _seen_by(store: ObjectStore) -> list[Any]:
    return [json.loads(store.read("counter")).get("by")]


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _objects(store: ObjectStore) -> dict[str, str]:
    """Key → sha256 of the content, without what differs from one time to the next."""
    found = {}
    for info in store.list():
        content = store.read(info.key)
        if info.key.endswith("MANIFEST.json") or "channels/" in info.key:
            record = {name: value for name, value in json.loads(content).items() if name not in OF_EACH_TIME}
            content = json.dumps(record, sort_keys=True).encode()
        found[info.key] = sha256_of_bytes(content)
    return found


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_a_bad_network_changes_nothing(scene: Scene, say: Said):
    first = int(os.environ.get("LACUNA_SEED", "1"))
    _campaign(scene, range(first, first + int(os.environ.get("LACUNA_S3_SEEDS", "50"))), say)


def _campaign(scene: Scene, seeds: range, say: Said) -> None:
    calm = scene.play(FaultPlan(None))
    assert not calm.faults
    num_requests, faults = 0, Counter[str]()
    for seed in seeds:
        found = scene.play(FaultPlan(seed, stall_s=1.25 * READ_TIMEOUT_S))
        assert found.objects == calm.objects, f"seed {seed}: {found.faults}"
        num_requests += found.num_requests
        faults += found.faults
    ratio = num_requests / len(seeds) / calm.num_requests
    say(
        f"S3 faults: {len(seeds)} seeds, {faults.total()} faults in {num_requests} requests {dict(faults)}, 0 ended "
        f"differently, {ratio:.2f} × the requests; 95 % bound {min(1, 3 / len(seeds)):.3f}"
    )
    assert len(faults) >= min(len(RATES), 3 * len(seeds)), faults
    assert ratio <= MAX_RATIO


@pytest.mark.soak
def test_an_outage_is_outlived(scene: Scene, say: Said):
    _outlive(scene, 2.0, say)


@pytest.mark.soak
def test_a_long_outage_is_outlived(scene: Scene, say: Said):
    _outlive(scene, float(os.environ.get("LACUNA_OUTAGE_S", "60")), say)


def _outlive(scene: Scene, outage_s: float, say: Said) -> None:
    calm = scene.play(FaultPlan(None))
    found = scene.play(FaultPlan(None), outage_s)
    assert found.faults["outage"] > 0
    assert found.objects == calm.objects
    say(
        f"an outage of {outage_s:g} s: {found.faults['outage']} requests went into it, {found.num_requests} in all; "
        f"without {calm.num_requests}; took {found.seconds:.0f} s, without {calm.seconds:.0f} s"
    )
    assert found.num_requests <= MAX_RATIO * calm.num_requests
    assert found.seconds >= outage_s
