"""One contract for both object stores, held against a real folder and a real S3 server."""

import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra import storage_s3
from infra.errors import ContractError, TransientError
from infra.s3_client import make_client
from infra.s3_server import REGION, S3Server
from infra.storage import (
    AlreadyExistsError,
    ConflictError,
    FileEntry,
    ObjectNotFoundError,
    ObjectStore,
    open_store,
    sha256_of_bytes,
    sha256_of_file,
)
from infra.storage_s3 import S3Store

MIB = 1 << 20
OTHER_SHA256 = "0" * 64


@pytest.fixture
def store(any_root: str) -> ObjectStore:
    return open_store(any_root)


def content(num_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(num_bytes)


def keys_of(store: ObjectStore, prefix: str = "") -> list[str]:
    return [info.key for info in store.list(prefix)]


# Names


NO_KEYS = ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "a/.", "a\\b", "a\0b", ".lacuna-locks/a", "a/.lacuna-x"]


def test_what_is_no_key_is_refused_by_every_operation(store: ObjectStore, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1")
    operations: list[Callable[[str], object]] = [
        lambda key: store.head(key),
        lambda key: store.exists(key),
        lambda key: store.read(key),
        lambda key: store.read_range(key, 0, 1),
        lambda key: store.put(key, b""),
        lambda key: store.put_if_absent(key, b""),
        lambda key: store.compare_and_swap(key, b"", "x"),
        lambda key: store.upload(key, file),
        lambda key: store.download(key, tmp_path / "out"),
        lambda key: store.delete(key),
        lambda key: store.local_path(key),
        lambda key: store.uri_of(key),
    ]
    for key in NO_KEYS:
        for operation in operations:
            with pytest.raises(ValueError, match="key"):
                operation(key)
    assert keys_of(store) == []


@pytest.mark.parametrize(
    "uri", ["", "  ", "gs://bucket/x", "s3://", "s3://ab/x", "s3://bucket/../x", "file://host/x", "/"]
)
def test_what_is_no_root_is_refused_in_one_line(uri: str) -> None:
    with pytest.raises(ValueError, match=r"root|key") as caught:
        open_store(uri)
    assert "\n" not in str(caught.value)


def test_the_root_is_written_without_a_trailing_slash(tmp_path: Path) -> None:
    for uri in (f"{tmp_path}/a b/", f"{tmp_path}/a b", f"file://{tmp_path}/a%20b"):
        assert open_store(uri).uri == f"{tmp_path}/a b"
    assert open_store("s3://bucket/p/q/").uri_of("x/y") == "s3://bucket/p/q/x/y"
    assert open_store("s3://bucket").uri == "s3://bucket"


def test_a_store_travels_to_other_processes(store: ObjectStore) -> None:
    store.put("a", b"1")
    assert pickle.loads(pickle.dumps(store)).read("a") == b"1"  # noqa: S301 - our own bytes
    error = pickle.loads(pickle.dumps(ObjectNotFoundError("a", "uri/a")))  # noqa: S301
    assert (error.key, str(error)) == ("a", "uri/a: no such object")


# Reading and writing


def test_what_is_put_is_read(store: ObjectStore) -> None:
    for data in (b"", b"1", content(3 * MIB)):
        info = store.put("a/b.bin", data)
        assert (info.key, info.num_bytes) == ("a/b.bin", len(data))
        assert store.head("a/b.bin") == info
        assert store.read_with_etag("a/b.bin") == (data, info.etag)
        assert store.read("a/b.bin") == data
        assert list(store.list()) == [info]
        assert store.exists("a/b.bin")


def test_an_etag_changes_with_the_content(store: ObjectStore) -> None:
    for num_bytes in (10, 2 * MIB):
        etags = {store.put("a", content(num_bytes, seed)).etag for seed in range(3)}
        assert len(etags) == 3


def test_absence_is_an_error_that_names_the_key(store: ObjectStore, tmp_path: Path) -> None:
    store.put("folder/object", b"1")
    for key in ("absent", "folder", "folder/object/below"):
        assert not store.exists(key)
        for operation in (store.head, store.read, store.read_with_etag, lambda key: store.read_range(key, 0, 0)):
            with pytest.raises(ObjectNotFoundError) as caught:
                operation(key)
            assert caught.value.key == key
            assert store.uri_of(key) in str(caught.value)
        with pytest.raises(ObjectNotFoundError):
            store.download(key, tmp_path / "out")
        store.delete(key)
    assert not (tmp_path / "out").exists()
    assert keys_of(store) == ["folder/object"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(start=st.integers(0, 40), num_bytes=st.integers(0, 40))
def test_a_range_is_a_slice(store: ObjectStore, start: int, num_bytes: int) -> None:
    data = bytes(range(30))
    if not store.exists("a"):
        store.put("a", data)
    assert store.read_range("a", start, num_bytes) == data[start : start + num_bytes]


def test_a_negative_range_is_refused(store: ObjectStore) -> None:
    store.put("a", b"123")
    for start, num_bytes in ((-1, 1), (0, -1)):
        with pytest.raises(ValueError, match="range"):
            store.read_range("a", start, num_bytes)


def test_listing_is_sorted_and_filtered(store: ObjectStore) -> None:
    keys = ["a-b/x", "a/x", "a/y/z", "a.x", "ab", "b", "a/y.z", "é", "a b"]
    for key in keys:
        store.put(key, key.encode())
    assert keys_of(store) == sorted(keys)
    for prefix in ("a", "a/", "a/y", "a/y/", "a-", "c", "b", "a/y/z", "a/y/z/"):
        assert keys_of(store, prefix) == sorted(key for key in keys if key.startswith(prefix)), prefix
    assert [info.num_bytes for info in store.list()] == [len(key.encode()) for key in sorted(keys)]


def test_a_long_listing_is_whole(store: ObjectStore) -> None:
    keys = [f"many/{i:05d}" for i in range(1100)]  # S3 gives 1000 at a time
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: store.put(key, b""), keys))
    assert keys_of(store, "many/") == keys


def test_delete_is_idempotent(store: ObjectStore) -> None:
    store.delete("a")
    store.put("a", b"1")
    store.delete("a")
    store.delete("a")
    assert not store.exists("a")
    store.put_if_absent("a", b"2")


def test_local_path_is_the_file_or_nothing(store: ObjectStore) -> None:
    store.put("a/b", b"1")
    path = store.local_path("a/b")
    assert path is None if isinstance(store, S3Store) else path is not None and path.read_bytes() == b"1"


def test_folders_are_named_without_what_lies_in_them(store: ObjectStore) -> None:
    for key in ("top", "a/x", "a/y/z", "b-c/1/2/3", "b/1", "b/2/1"):
        store.put(key, b"")
    store.compare_and_swap("a/x", b"1", store.head("a/x").etag)  # a folder store has files of its own now
    assert store.list_folders() == ["a", "b", "b-c"]
    assert store.list_folders("b/") == ["2"]
    assert store.list_folders("a/y/") == []
    assert store.list_folders("nothing/") == []
    assert store.list_folders("top/") == []
    with pytest.raises(ValueError, match="key"):
        store.list_folders("../")


# Conditional writes


def test_put_if_absent(store: ObjectStore) -> None:
    info = store.put_if_absent("a/MANIFEST.json", b"1")
    assert store.put_if_absent("a/MANIFEST.json", b"1") == info  # a write whose answer was lost, sent again
    with pytest.raises(AlreadyExistsError, match="MANIFEST"):
        store.put_if_absent("a/MANIFEST.json", b"2")
    assert store.read("a/MANIFEST.json") == b"1"


def test_compare_and_swap(store: ObjectStore) -> None:
    with pytest.raises(ConflictError):
        store.compare_and_swap("a", b"1", "no such etag")
    first = store.compare_and_swap("a", b"1", None)
    with pytest.raises(ConflictError):
        store.compare_and_swap("a", b"2", None)
    second = store.compare_and_swap("a", b"2", first.etag)
    with pytest.raises(ConflictError):
        store.compare_and_swap("a", b"3", first.etag)
    assert store.compare_and_swap("a", b"2", first.etag) == second  # a write whose answer was lost, sent again
    assert store.read_with_etag("a") == (b"2", second.etag)


def test_twenty_threads_race_and_one_wins(store: ObjectStore) -> None:
    start = threading.Barrier(20)

    def race(writer: int) -> str | None:
        start.wait()
        try:
            return store.put_if_absent("race", f"writer {writer}".encode()).etag
        except AlreadyExistsError:
            return None

    with ThreadPoolExecutor(20) as pool:
        etags = [etag for etag in pool.map(race, range(20)) if etag is not None]
    assert etags == [store.head("race").etag]


RACER = """
import json, sys
from infra.errors import TransientError
from infra.storage import AlreadyExistsError, ConflictError, open_store
store, writer, num_increments = open_store(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
store.exists("counter")  # connected
print("ready", flush=True)
sys.stdin.readline()
try:
    store.put_if_absent("race", f"writer {writer}".encode())
    print("won", flush=True)
except AlreadyExistsError:
    print("lost", flush=True)
done = 0
while done < num_increments:
    data, etag = store.read_with_etag("counter")
    # The bytes name the writer and its step: identical bytes of two writers must not both count.
    data = json.dumps({"count": json.loads(data)["count"] + 1, "by": [writer, done]}).encode()
    try:
        store.compare_and_swap("counter", data, etag)
        done += 1
    except (ConflictError, TransientError):
        pass
"""


def test_eight_processes_race_one_wins_and_no_increment_is_lost(any_root: str) -> None:
    num_processes, num_increments = 8, 3
    open_store(any_root).put("counter", b'{"count": 0}')
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, any_root, str(writer), str(num_increments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for writer in range(num_processes)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    outcomes = [racer.communicate(timeout=120)[0].strip() for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * num_processes
    assert sorted(outcomes) == ["lost"] * (num_processes - 1) + ["won"]
    assert json.loads(open_store(any_root).read("counter"))["count"] == num_processes * num_increments


def test_readers_never_see_a_part_or_a_mixture(store: ObjectStore) -> None:
    versions = [bytes([value]) * (2 * MIB) for value in range(4)]
    store.put("a", versions[0])
    done = threading.Event()

    def write() -> None:
        for turn in range(40):
            store.put("a", versions[turn % 4])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    num_reads = 0
    while not done.is_set():
        assert store.read("a") in versions
        num_reads += 1
    writer.join()
    assert num_reads > 3


# Files


@pytest.mark.parametrize("num_bytes", [0, 1000, 5 * MIB + 1])
def test_files_go_there_and_back(store: ObjectStore, tmp_path: Path, num_bytes: int) -> None:
    source, target = tmp_path / "source", tmp_path / "new" / "folder" / "target"
    source.write_bytes(content(num_bytes))
    sha256 = sha256_of_file(source)
    assert sha256 == sha256_of_bytes(content(num_bytes))
    assert store.upload("a/file", source) == FileEntry("a/file", num_bytes, sha256)
    assert store.upload("a/file", source, sha256) == FileEntry("a/file", num_bytes, sha256)
    for expected in (None, sha256):
        assert store.download("a/file", target, expected) == FileEntry("a/file", num_bytes, sha256)
        assert target.read_bytes() == source.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_large_file_goes_in_parts(
    s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(storage_s3, "MULTIPART_OVER_BYTES", 6 * MIB)
    monkeypatch.setattr(storage_s3, "_PART_BYTES", 5 * MIB)
    store = open_store(s3_root)
    assert isinstance(store, S3Store)
    source = tmp_path / "source"
    source.write_bytes(content(31 * MIB))
    entry = store.upload("large", source)
    assert store.head("large").etag.strip('"').endswith("-7")  # seven parts
    assert store.download("large", tmp_path / "target").sha256 == entry.sha256 == sha256_of_file(source)
    # What went wrong leaves neither an object nor parts that cost money for ever.
    with pytest.raises(ContractError, match=OTHER_SHA256):
        store.upload("wrong", source, OTHER_SHA256)
    assert keys_of(store) == ["large"]
    assert not store.client.list_multipart_uploads(Bucket=store.bucket).get("Uploads")


def test_an_upload_with_another_hash_than_declared_is_refused(store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"1")
    with pytest.raises(ContractError, match=rf"{sha256_of_bytes(b'1')}.*{OTHER_SHA256}"):
        store.upload("a", source, OTHER_SHA256)
    assert keys_of(store) == []


def test_a_download_with_another_hash_than_expected_leaves_the_target_alone(store: ObjectStore, tmp_path: Path) -> None:
    store.put("a", b"new")
    target = tmp_path / "target"
    target.write_bytes(b"old")
    with pytest.raises(TransientError, match=rf"/a: .*{sha256_of_bytes(b'new')}.*{OTHER_SHA256}"):
        store.download("a", target, OTHER_SHA256)
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["target"]


UPLOADER = """
import sys
from pathlib import Path
from infra import storage_s3
from infra.storage import open_store
storage_s3.MULTIPART_OVER_BYTES = storage_s3._PART_BYTES = 5 << 20
open_store(sys.argv[1]).upload("victim", Path(sys.argv[2]), "0" * 64)
"""


def test_an_upload_that_is_killed_leaves_nothing_visible(any_root: str, tmp_path: Path) -> None:
    store = open_store(any_root)
    store.put("other", b"1")
    large = tmp_path / "large"
    with open(large, "wb") as file:
        file.truncate(16 << 30)  # sparse, and too long to be done before the kill
    uploader = subprocess.Popen([sys.executable, "-c", UPLOADER, any_root, str(large)])
    try:
        deadline = time.monotonic() + 60
        while not _upload_has_begun(store):
            assert uploader.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert uploader.poll() is None
        uploader.send_signal(signal.SIGKILL)
    finally:
        uploader.kill()
        assert uploader.wait() == -signal.SIGKILL
    assert keys_of(store) == ["other"]
    assert not store.exists("victim")
    for scratch in Path(any_root).glob(".lacuna-scratch/*"):
        scratch.unlink()  # may be large
    small = tmp_path / "small"
    small.write_bytes(b"again")
    store.upload("victim", small)
    assert store.read("victim") == b"again"


def _upload_has_begun(store: ObjectStore) -> bool:
    if isinstance(store, S3Store):
        uploads = store.client.list_multipart_uploads(Bucket=store.bucket).get("Uploads", ())
        return any(
            store.client.list_parts(Bucket=store.bucket, Key=each["Key"], UploadId=each["UploadId"]).get("Parts")
            for each in uploads
        )
    return any(path.stat().st_size > 0 for path in Path(store.uri).glob(".lacuna-scratch/*"))


def test_what_killed_writers_left_is_cleared_after_a_day(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.check_writable()
    old, young = (tmp_path / ".lacuna-scratch" / name for name in ("old", "young"))
    old.write_bytes(b"1")
    young.write_bytes(b"1")
    day_ago = time.time() - 25 * 3600
    os.utime(old, (day_ago, day_ago))
    store.check_writable()
    assert not old.exists()
    assert young.exists()
    assert keys_of(store) == []


# The probe at the start


def test_a_good_root_is_writable_and_stays_empty(store: ObjectStore) -> None:
    store.check_writable()
    assert store.conditional_writes
    assert keys_of(store) == []


@pytest.mark.parametrize("below", ["", "/a/b"])
def test_a_root_that_is_or_lies_below_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(ValueError, match=r"^root: '.*' is not writable \(.* is a file\); choose another --root$"):
        open_store(f"{tmp_path}/file{below}").check_writable()


def test_a_root_that_the_system_does_not_let_us_write_is_refused() -> None:
    # /proc refuses everybody, root included, who may run these tests.
    with pytest.raises(ValueError, match=r"^root: '/proc/lacuna' is not writable \(.+\); choose another --root$"):
        open_store("/proc/lacuna").check_writable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_root_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ValueError, match=r"not writable \(Permission denied\)"):
        open_store(str(tmp_path / "closed" / "root")).check_writable()


def test_a_bucket_that_does_not_exist_is_refused(s3_root: str) -> None:
    with pytest.raises(ValueError, match=r"^root: bucket 'no-such-bucket' at http://.* does not exist; create it"):
        open_store("s3://no-such-bucket/x").check_writable()


def test_wrong_credentials_are_refused(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(ValueError, match=r"^root: bucket .* access denied .* check the credentials"):
        open_store(s3_root).check_writable()


def test_missing_credentials_are_refused(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(ValueError, match=r"^root: bucket .* set AWS_ACCESS_KEY_ID"):
        open_store(s3_root).check_writable()


@pytest.fixture
def dead_endpoint(monkeypatch: pytest.MonkeyPatch, s3_root: str) -> Iterator[str]:
    """An address on which nobody listens, and nobody else can start to."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{held.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield endpoint


def test_an_unreachable_endpoint_is_refused_soon_and_named(dead_endpoint: str) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"^root: bucket 'bucket' at {dead_endpoint} cannot be reached") as caught:
        open_store("s3://bucket/x").check_writable()
    assert time.monotonic() - started < 10
    assert "\n" not in str(caught.value)
    assert "AWS_ENDPOINT_URL" in str(caught.value)


def test_an_endpoint_lost_later_is_worth_a_retry(dead_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_s3, "make_client", lambda: make_client(attempts=2))  # as many as it takes to see it
    with pytest.raises(TransientError, match=rf"bucket 'bucket' at {dead_endpoint} cannot be reached"):
        open_store("s3://bucket/x").read("a")


def test_an_endpoint_that_is_no_url_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:8333")
    with pytest.raises(ValueError, match=r"^root: .*localhost:8333.*AWS_ENDPOINT_URL"):
        open_store("s3://bucket/x").check_writable()


class _Forwarder(BaseHTTPRequestHandler):
    """A store as some are: it takes conditional writes and ignores the condition. All else is the real server.

    The condition is part of what a client signs, so the request goes on signed anew.
    """

    protocol_version = "HTTP/1.1"
    server_behind: S3Server

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        behind = self.server_behind
        kept = ("content-", "x-amz-meta-", "range")
        headers = {name: value for name, value in self.headers.items() if name.lower().startswith(kept)}
        request = AWSRequest(self.command, behind.endpoint_url + self.path, headers, body)
        S3SigV4Auth(Credentials(behind.access_key, behind.secret_key), "s3", REGION).add_auth(request)
        connection = HTTPConnection(behind.endpoint_url.removeprefix("http://"))
        connection.request(self.command, self.path, body, dict(request.headers.items()))
        answer = connection.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        length = answer.headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(data)
        connection.close()

    def do_GET(self) -> None:
        self._forward()

    def do_PUT(self) -> None:
        self._forward()

    def do_HEAD(self) -> None:
        self._forward()

    def do_DELETE(self) -> None:
        self._forward()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        pass


@pytest.fixture
def careless_root(s3_root: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    handler = type("Handler", (_Forwarder,), {"server_behind": s3_server})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_address[1]}")
        yield s3_root
        proxy.shutdown()
        thread.join()


def test_a_store_that_ignores_conditions_is_refused(careless_root: str) -> None:
    with pytest.raises(ValueError, match=rf"^root: {careless_root} .*If-None-Match.*LACUNA_ALLOW_UNCONDITIONAL_STORE"):
        open_store(careless_root).check_writable()


def test_a_store_that_ignores_conditions_is_used_with_care_if_allowed(
    careless_root: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LACUNA_ALLOW_UNCONDITIONAL_STORE", "1")
    probed, unprobed = open_store(careless_root), open_store(careless_root)
    probed.check_writable()
    assert not probed.conditional_writes
    assert "one writer only" in caplog.text
    for name, store in (("probed", probed), ("unprobed", unprobed)):
        first = store.put_if_absent(f"{name}/a", b"1")
        assert store.put_if_absent(f"{name}/a", b"1") == first
        with pytest.raises(AlreadyExistsError):
            store.put_if_absent(f"{name}/a", b"2")
        store.compare_and_swap(f"{name}/a", b"3", first.etag)
        with pytest.raises(ConflictError):
            store.compare_and_swap(f"{name}/a", b"4", first.etag)
        assert store.read(f"{name}/a") == b"3"


def test_the_allowance_changes_nothing_on_a_good_store(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LACUNA_ALLOW_UNCONDITIONAL_STORE", "1")
    store = open_store(s3_root)
    store.check_writable()
    assert store.conditional_writes
