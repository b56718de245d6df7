"""Fetch what a Lacuna channel points to: one file to copy into any project; needs Python 3.9 and, for s3://, boto3.

    from lacuna_pull import lacuna_pull
    folder = lacuna_pull("s3://bucket/prefix", "stable", "models/stable")

    python lacuna_pull.py s3://bucket/prefix stable --to models/stable
    python lacuna_pull.py presigned.json --to models/stable          # from `lacuna presign`: no boto3, no credentials

A channel names a bundle and the sha256 of its ``MANIFEST.json``, which names the sha256 of every file: all are checked.
The folder appears, or is replaced, in one step once it is whole. What was interrupted goes on, within a file too, with
``If-Match`` on the version that it began with. If the bundle is deleted meanwhile, it starts again from the channel.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import http.client
import json
import logging
import os
import random
import re
import shutil
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, Protocol

try:
    import fcntl
except ImportError:  # Windows: two pulls into one folder at once must be avoided by other means
    fcntl = None

_log = logging.getLogger("lacuna_pull")

FORMAT_VERSION = 1
MANIFEST_NAME = "MANIFEST.json"

OnProgress = Callable[[int, int], None]
"""Called with how many bytes are there, and how many there are in all."""

_RESERVED = ".lacuna-"
_PARTS_NAME = _RESERVED + "parts"
_NUM_DOWNLOADS = 4
_MAX_RESTARTS = 20
_NUM_FIRST_TRIES = 5
_NUM_TRIES_OF_A_FILE = 5
_ABANDONED_S = 60.0
_CHUNK_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


class OutsideWorldError(RuntimeError):
    """The network or the store failed for too long: the same call, later, goes on where this one was."""


class _Transient(Exception):  # noqa: N818 - never leaves this file
    """Asking again may help."""


class _Gone(Exception):  # noqa: N818
    """There is no such object."""


class _Replaced(Exception):  # noqa: N818
    """The object is another one than the one that a part was read of."""


class _Tampered(Exception):  # noqa: N818
    """A manifest is not the one that the pointer names."""


class _Refused(ValueError):  # noqa: N818
    """Access is denied, perhaps not any more: what was fetched until then is of use to the next call."""


class _File(NamedTuple):
    name: str
    num_bytes: int
    sha256: str


class _Target(NamedTuple):
    """What is to be fetched: ``manifest_sha256`` is unknown where a bundle was named, not a channel."""

    bundle: str
    manifest_sha256: str | None


class _Answer(NamedTuple):
    etag: str
    num_bytes: int  # of the whole object
    pieces: Iterator[bytes]


def lacuna_pull(
    uri: str,
    channel: str | None,
    to: str | os.PathLike[str],
    *,
    if_changed: bool = True,
    patience_s: float = 150.0,
    on_progress: OnProgress | None = None,
) -> Path:
    """Bring what a channel points to into a local folder.

    Args:
        uri: The store's root: ``s3://bucket/prefix`` (credentials and endpoint as boto3 finds them) or a folder; or
            the path of a file that ``lacuna presign`` wrote.
        channel: ``latest``, ``best``, ``stable``, or the key of a bundle's folder (which has a slash); not needed with
            a presigned file.
        to: The folder to make. One that an earlier pull made is replaced; anything else that is there is refused.
        if_changed: Be content with a folder whose manifest is the one that the channel names and whose files have
            their sizes, and fetch nothing. Otherwise all files that are there are hashed again.
        patience_s: How long a server that fails is asked again without any byte of progress.
        on_progress: Hears of the bytes.

    Returns:
        The folder, whole and verified.

    Raises:
        ValueError: The channel points to nothing, access is denied, the folder holds something else, or what is there
            is not what the pointer or the manifest says.
        OutsideWorldError: The network or the store failed for too long.
    """
    folder = Path(os.path.abspath(Path(to).expanduser()))
    store = _Store(_source_of(uri), patience_s)
    for _ in range(_MAX_RESTARTS):
        target = store.resolve(channel)
        if if_changed and target.manifest_sha256 is not None and _held(folder, target.manifest_sha256):
            _log.info("unchanged: %s", folder)
            return folder
        try:
            data = store.manifest(target)
            sha256 = hashlib.sha256(data).hexdigest()
            if not (if_changed and _held(folder, sha256)):
                _fetch(store, target.bundle, data, folder, on_progress)
            return folder
        except _Gone as gone:
            if target.manifest_sha256 is None or isinstance(store.source, _Presigned):
                raise ValueError(f"{gone} is not there: the bundle does not exist, or was deleted") from None
            _log.info("%s is gone: the pull starts again from the channel", gone)
        except _Tampered as error:
            if store.resolve(channel) == target:  # else it was deleted, made again, and is not pointed to any more
                raise ValueError(str(error)) from None
    raise OutsideWorldError(f"{channel}: what it points to was deleted {_MAX_RESTARTS} times while it was pulled")


# ------------------------------------------------------------------------------------------------- where objects are


class _Source(Protocol):
    uri: str

    def open(self, key: str, start: int, etag: str | None) -> contextlib.AbstractContextManager[_Answer]:
        """Begin to read an object at an offset, in the version that an etag names."""
        ...


class _S3:
    """Objects in a bucket, below a prefix."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._bucket, _, prefix = self.uri[len("s3://") :].partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._client = _s3_client()

    @contextlib.contextmanager
    def open(self, key: str, start: int, etag: str | None) -> Iterator[_Answer]:
        """As `_Source.open`."""
        from botocore import exceptions as aws

        name = {"Bucket": self._bucket, "Key": self._prefix + key}
        options = {"Range": f"bytes={start}-"} if start else {}
        options.update({"IfMatch": etag} if etag else {})
        try:
            answer = self._client.get_object(**name, **options)
            total = answer.get("ContentRange", "").rpartition("/")[2] if start else answer.get("ContentLength")
            if total is None:  # an answer that ends wherever the connection does: nobody would see it cut
                total = self._client.head_object(**name, IfMatch=answer["ETag"])["ContentLength"]
            if start and not answer.get("ContentRange", "").startswith(f"bytes {start}-"):
                raise _Transient(f"{self.uri}/{key}: bytes from {start} on were asked for, others came")
            with contextlib.closing(answer["Body"]) as body:
                yield _Answer(answer["ETag"], int(total), body.iter_chunks(_CHUNK_BYTES))
        except aws.ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            _raise_for(status, f"{self.uri}/{key}", error)
        except (aws.NoCredentialsError, aws.PartialCredentialsError) as error:
            raise ValueError(f"{self.uri}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from None
        except (aws.ConnectionError, aws.HTTPClientError, aws.IncompleteReadError, aws.ChecksumError, OSError) as error:
            raise _Transient(f"{self.uri} cannot be reached: {_one_line(error)}") from None


def _s3_client() -> Any:
    try:
        from boto3.session import Session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise ValueError("s3:// needs boto3: pip install boto3") from None
    # All retries are ours: they know whether anything came. Servers other than Amazon's may know no checksum trailers.
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=2 * _NUM_DOWNLOADS,
    )
    try:
        session = Session()
        client = session.client("s3", config=config)
        host = urllib.parse.urlsplit(client.meta.endpoint_url).hostname or ""
        if host.endswith((".amazonaws.com", ".amazonaws.com.cn")):
            return client
        config = config.merge(Config(s3={"addressing_style": "path"}))
        with contextlib.suppress(TypeError):  # a boto3 that knows no such checksums asks for none
            config = config.merge(Config(response_checksum_validation="when_required"))
        return session.client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise ValueError(f"s3://: {_one_line(error)}; correct the AWS settings") from None


class _Folder:
    """Objects as files."""

    def __init__(self, uri: str) -> None:
        self.uri = os.path.abspath(os.path.expanduser(uri))

    @contextlib.contextmanager
    def open(self, key: str, start: int, etag: str | None) -> Iterator[_Answer]:
        """As `_Source.open`."""
        try:
            with open(os.path.join(self.uri, *key.split("/")), "rb") as file:
                stat = os.fstat(file.fileno())
                found = f"{stat.st_ino}-{stat.st_mtime_ns}-{stat.st_size}"
                if etag not in (None, found):
                    raise _Replaced(key)
                file.seek(start)
                yield _Answer(found, stat.st_size, iter(lambda: file.read(_CHUNK_BYTES), b""))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise _Gone(f"{self.uri}/{key}") from None


class _Presigned:
    """Objects behind addresses that are valid for a while."""

    def __init__(self, path: str) -> None:
        self.uri = path
        try:
            with open(path, encoding="utf-8") as file:
                told = json.load(file)
            _check_version(told, path)
            sha256 = told["manifest"]["sha256"]
            self.target = _Target(_check_key(told["bundle"]), _check_sha256(sha256))
            self._urls = {f"{told['bundle']}/{file['name']}": file["url"] for file in told["files"]}
            self._urls[f"{told['bundle']}/{MANIFEST_NAME}"] = told["manifest"]["url"]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a file that `lacuna presign` wrote ({_one_line(error)})") from None
        for url in self._urls.values():
            if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
                raise ValueError(f"{path}: {url[:40]!r} is no http(s) address")

    @contextlib.contextmanager
    def open(self, key: str, start: int, etag: str | None) -> Iterator[_Answer]:
        """As `_Source.open`."""
        if key not in self._urls:
            raise ValueError(f"{self.uri}: has no address for {key}")
        headers = {"Range": f"bytes={start}-"} if start else {}
        headers.update({"If-Match": etag} if etag else {})
        request = urllib.request.Request(self._urls[key], headers=headers)  # noqa: S310 - the scheme was looked at
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                if start and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                    raise _Replaced(key)
                total = answer.headers.get("Content-Range", "").rpartition("/")[2] or answer.headers["Content-Length"]
                if total is None:
                    raise _Transient(f"{key}: the answer does not say how long it is")
                yield _Answer(answer.headers.get("ETag", ""), int(total), iter(lambda: answer.read(_CHUNK_BYTES), b""))
        except urllib.error.HTTPError as error:
            error.close()
            _raise_for(error.code, key, f"HTTP {error.code}; the address may have expired: ask for a new file")
        except (OSError, http.client.HTTPException) as error:
            raise _Transient(f"{key}: {_one_line(error)}") from None


def _source_of(uri: str) -> _Source:
    scheme, separator, rest = uri.partition("://")
    if separator and scheme == "s3":
        return _S3(uri)
    if separator and scheme == "file":
        return _Folder(urllib.parse.unquote(rest))
    if separator:
        raise ValueError(f"uri: {uri!r} has the unknown scheme {scheme!r}; use s3://bucket/prefix or a folder's path")
    return _Presigned(uri) if os.path.isfile(uri) else _Folder(uri)


def _raise_for(status: int, what: str, error: object) -> NoReturn:
    """Say what an HTTP status means to us."""
    if status == 404:
        raise _Gone(what) from None
    if status in (412, 416):
        raise _Replaced(what) from None
    if 400 <= status < 500 and status not in (408, 409, 429):
        raise _Refused(f"{what}: {_one_line(error)}") from None
    raise _Transient(f"{what}: {_one_line(error)}") from None


# ------------------------------------------------------------------------------------------------------------ reading


class _Patience:
    """Waits between attempts, longer each time, and gives up when nothing has come for too long."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.start_over()

    def start_over(self) -> None:
        """Something came."""
        self._failing_since: float | None = None
        self._delay_s = 0.1

    def wait(self, error: _Transient, num_failures: int, has_answered: bool) -> None:
        """Wait, or give up; a server that never answered is not waited for as long as one that did."""
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        if now - self._failing_since > self._seconds or (not has_answered and num_failures >= _NUM_FIRST_TRIES):
            raise OutsideWorldError(str(error)) from None
        time.sleep(self._delay_s * random.uniform(0.5, 1))  # noqa: S311 - no secret
        self._delay_s = min(10.0, 2 * self._delay_s)


class _Store:
    """Whole objects, however often the network fails."""

    def __init__(self, source: _Source, patience_s: float) -> None:
        self.source = source
        self._patience_s = patience_s
        self._has_answered = False

    def resolve(self, channel: str | None) -> _Target:
        """Find what a channel points to."""
        if isinstance(self.source, _Presigned):
            return self.source.target
        if channel is None:
            raise ValueError(
                f"channel: name one of {self.source.uri}, such as stable; it is no file of `lacuna presign`"
            )
        if "/" in channel:
            return _Target(_check_key(channel.rstrip("/")), None)
        key = f"channels/{_check_key(channel)}.json"
        try:
            pointer = json.loads(self.read(key))
            _check_version(pointer, f"{self.source.uri}/{key}")
            return _Target(_check_key(pointer["bundle"]), _check_sha256(pointer["manifest_sha256"]))
        except _Gone:
            raise ValueError(f"channel: {channel!r} points to nothing in {self.source.uri}") from None
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.source.uri}/{key}: not a channel's pointer ({_one_line(error)})") from None

    def manifest(self, target: _Target) -> bytes:
        """Read a manifest, and hold it against the pointer."""
        key = f"{target.bundle}/{MANIFEST_NAME}"
        sha256 = ""
        for _ in range(2):  # bytes that were changed on the way do not come again
            data = self.read(key)
            sha256 = hashlib.sha256(data).hexdigest()
            if target.manifest_sha256 in (None, sha256):
                return data
        raise _Tampered(
            f"{self.source.uri}/{key}: its sha256 is {sha256}, the pointer says {target.manifest_sha256}; the bundle "
            "was tampered with"
        )

    def read(self, key: str) -> bytes:
        """Read a small object."""
        while True:
            pieces: list[bytes] = []
            with contextlib.suppress(_Replaced):
                self._receive(key, pieces.append, 0, None, lambda etag: None)
                return b"".join(pieces)

    def copy(self, key: str, target: BinaryIO, etag_path: Path, on_bytes: Callable[[int], None]) -> None:
        """Append to a file what is missing of an object, in the version that it is a part of.

        Raises:
            _Replaced: There is another version; the part is of no use any more.
        """
        etag = etag_path.read_text("utf-8") if etag_path.is_file() else None
        start = target.seek(0, os.SEEK_END)
        if start and not etag:
            raise _Replaced(key)

        def take(piece: bytes) -> None:
            try:
                target.write(piece)
                target.flush()  # who comes after a kill finds it
            except OSError as error:
                raise ValueError(f"to: cannot be written: {error.strerror}") from None
            on_bytes(len(piece))

        self._receive(key, take, start, etag, lambda found: etag_path.write_text(found, "utf-8"))

    def _receive(
        self,
        key: str,
        sink: Callable[[bytes], object],
        have: int,
        etag: str | None,
        on_etag: Callable[[str], object],
    ) -> None:
        patience = _Patience(self._patience_s)
        num_failures = 0
        while True:
            try:
                with self.source.open(key, have, etag) as answer:
                    self._has_answered = True
                    if etag is None:
                        etag = answer.etag or None
                        on_etag(answer.etag)
                    for piece in answer.pieces:
                        patience.start_over()
                        sink(piece)
                        have += len(piece)
                    if have >= answer.num_bytes:
                        return
                    raise _Transient(f"{key}: a body ended after {have} of {answer.num_bytes} bytes")
            except _Transient as error:
                num_failures += 1
                patience.wait(error, num_failures, self._has_answered)


# ----------------------------------------------------------------------------------------------------------- fetching


def _fetch(store: _Store, bundle: str, data: bytes, to: Path, on_progress: OnProgress | None) -> None:
    files = _files_of(data, f"{store.source.uri}/{bundle}/{MANIFEST_NAME}")
    if _holds(to, data, files):
        _log.info("already there: %s", to)
        return
    _check_replaceable(to)
    to.parent.mkdir(parents=True, exist_ok=True)
    tally = _Tally(sum(file.num_bytes for file in files), on_progress)
    with _scratch_folder(to, hashlib.sha256(data).hexdigest()[:32]) as scratch:
        _clean(scratch, files)
        _check_space(scratch, tally.num_total)
        with ThreadPoolExecutor(_NUM_DOWNLOADS) as pool:
            tasks = [pool.submit(_land, store, f"{bundle}/{file.name}", file, scratch, tally.add) for file in files]
            try:
                for task in tasks:
                    task.result()
            except BaseException:
                tally.is_over = True
                for task in tasks:
                    task.cancel()
                raise
        with open(scratch / MANIFEST_NAME, "wb") as file:
            file.write(data)
            _sync(file)
        _check_replaceable(to)
        _move_into_place(scratch, to)


def _land(store: _Store, key: str, file: _File, scratch: Path, on_bytes: Callable[[int], None]) -> None:
    """Copy an object to a file, which appears only once it is whole and verified."""
    path = scratch / file.name
    if _is_file(path, file, rehash=True):
        on_bytes(file.num_bytes)
        return
    part = scratch / _PARTS_NAME / hashlib.sha256(file.name.encode()).hexdigest()
    part.parent.mkdir(exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    etag_path = part.with_suffix(".etag")
    wrong = ""
    for _ in range(_NUM_TRIES_OF_A_FILE):
        with open(part, "a+b") as target:
            had = target.seek(0, os.SEEK_END)
            on_bytes(had)
            is_replaced = False
            try:
                if had != file.num_bytes or not etag_path.is_file():
                    store.copy(key, target, etag_path, on_bytes)
            except _Replaced:
                is_replaced = True
            have = target.seek(0, os.SEEK_END)
            target.seek(0)
            digest = hashlib.sha256()
            for piece in iter(lambda: target.read(_CHUNK_BYTES), b""):
                digest.update(piece)
            _sync(target)
        if digest.hexdigest() == file.sha256 and have == file.num_bytes:
            os.replace(part, path)
            return
        part.unlink()
        etag_path.unlink(missing_ok=True)
        on_bytes(-have)
        if had == 0 and not is_replaced and wrong:  # asked for in one go, and wrong again
            break
        if not is_replaced:
            wrong = (
                f"{key}: {have} bytes with sha256 {digest.hexdigest()}, expected {file.num_bytes} with {file.sha256}"
            )
    raise ValueError(wrong or f"{key}: it was replaced again and again while it was read")


class _Tally:
    """Adds up what several threads have fetched, and tells it."""

    def __init__(self, num_total: int, on_progress: OnProgress | None) -> None:
        self.num_total = num_total
        self.is_over = False
        self._num_done = 0
        self._on_progress = on_progress
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        if self.is_over:
            raise OutsideWorldError("another file could not be fetched, or the pull was interrupted")
        with self._lock:
            self._num_done += num_bytes
            if self._on_progress is not None:
                self._on_progress(self._num_done, self.num_total)


# ------------------------------------------------------------------------------------------------------- local folders


@contextlib.contextmanager
def _scratch_folder(to: Path, becomes: str) -> Iterator[Path]:
    """Make, or take over, a locked folder beside the target; where the outside world failed it stays for the next."""
    start = f".{to.name}{_RESERVED}"
    own = to.parent / f"{start}{becomes}"
    for path in to.parent.iterdir():
        if path.name.startswith(start) and path != own:
            _remove_if_abandoned(path)
    scratch, descriptor = _lock(own)
    is_kept = False
    try:
        yield scratch
    except (OutsideWorldError, _Refused, KeyboardInterrupt):
        is_kept = scratch == own
        raise
    finally:
        if not is_kept:
            shutil.rmtree(scratch, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _lock(own: Path) -> tuple[Path, int | None]:
    if fcntl is None:
        own.mkdir(exist_ok=True)
        return own, None
    for _ in range(5):
        own.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(own, os.O_RDONLY)
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.stat(own).st_ino == os.fstat(descriptor).st_ino:  # else it was removed before it was locked
                    return own, descriptor
            os.close(descriptor)
    other = own.with_name(f"{own.name}-{uuid.uuid4().hex}")  # another process fetches the same
    other.mkdir()
    descriptor = os.open(other, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return other, descriptor


def _remove_if_abandoned(path: Path) -> None:
    if fcntl is None:
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if time.time() - os.fstat(descriptor).st_mtime > _ABANDONED_S:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


def _clean(scratch: Path, files: list[_File]) -> None:
    """Remove what an earlier pull of the same left and nobody wants."""
    names = {file.name for file in files}
    for path in list(scratch.rglob("*")):
        name = path.relative_to(scratch).as_posix()
        if path.is_file() and name not in names and not name.startswith(f"{_PARTS_NAME}/"):
            path.unlink()


def _check_space(scratch: Path, num_bytes: int) -> None:
    missing = num_bytes - sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
    free = shutil.disk_usage(scratch).free
    if free < missing:
        raise ValueError(
            f"to: {missing / 1e9:.1f} GB are to be written, and {scratch.parent} has {free / 1e9:.1f} GB left; "
            "make room, or choose another folder"
        )


def _check_replaceable(folder: Path) -> None:
    """Refuse to replace anything but an earlier pull."""
    advice = "choose another folder, or move this one away"
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError(f"to: '{folder}' is not a folder; {advice}")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    if not found and not any(folder.iterdir()):
        return
    if MANIFEST_NAME not in found:
        raise ValueError(f"to: '{folder}' exists and is not an earlier pull; {advice}")
    files = _files_of((folder / MANIFEST_NAME).read_bytes(), str(folder / MANIFEST_NAME))
    strange = sorted(found - {MANIFEST_NAME} - {file.name for file in files})
    if strange:
        raise ValueError(f"to: '{folder}' is an earlier pull, but '{strange[0]}' is not of it; {advice}")


def _move_into_place(scratch: Path, to: Path) -> None:
    """Give the scratch folder its name in one step; what was there before is removed."""
    shutil.rmtree(scratch / _PARTS_NAME, ignore_errors=True)
    # From here on nobody takes it over: its name in what follows may be that of what was there before.
    leaving = scratch.with_name(f"{scratch.name}-{uuid.uuid4().hex}")
    os.rename(scratch, leaving)
    try:
        if to.is_dir() and any(to.iterdir()):
            if not _exchange(leaving, to):
                # There is a moment without the folder, never one with half of it.
                aside = leaving.with_name(f"{leaving.name}-old")
                os.rename(to, aside)
                os.rename(leaving, to)
                os.rename(aside, leaving)
        else:
            if to.is_dir():
                to.rmdir()
            os.rename(leaving, to)
    finally:
        shutil.rmtree(leaving, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step, where the system can (Linux)."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return renameat2 is not None and renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2) == 0


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _held(folder: Path, sha256: str) -> bool:
    """Whether a folder holds the bundle of a manifest, by its sha256 and the sizes of the files."""
    try:
        data = (folder / MANIFEST_NAME).read_bytes()
    except OSError:
        return False
    if hashlib.sha256(data).hexdigest() != sha256:
        return False
    return all(_is_file(folder / file.name, file, rehash=False) for file in _files_of(data, str(folder)))


def _holds(folder: Path, data: bytes, files: list[_File]) -> bool:
    path = folder / MANIFEST_NAME
    if not path.is_file() or path.read_bytes() != data:
        return False
    return all(_is_file(folder / file.name, file, rehash=True) for file in files)


def _is_file(path: Path, file: _File, *, rehash: bool) -> bool:
    if not path.is_file() or path.stat().st_size != file.num_bytes:
        return False
    if not rehash:
        return True
    digest = hashlib.sha256()
    with open(path, "rb") as opened:
        for piece in iter(lambda: opened.read(_CHUNK_BYTES), b""):
            digest.update(piece)
    return digest.hexdigest() == file.sha256


# ------------------------------------------------------------------------------------------------ what strangers wrote


def _files_of(data: bytes, where: str) -> list[_File]:
    try:
        told = json.loads(data)
        _check_version(told, where)
        files = [_File(_check_key(f["name"]), int(f["num_bytes"]), _check_sha256(f["sha256"])) for f in told["files"]]
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: not a bundle's manifest ({_one_line(error)})") from None
    if len({file.name for file in files} | {MANIFEST_NAME}) != len(files) + 1:
        raise ValueError(f"{where}: lists a file twice, or itself")
    return files


def _check_version(told: Any, where: str) -> None:
    version = told.get("format_version", FORMAT_VERSION) if isinstance(told, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{where}: is of format {version}, this program reads {FORMAT_VERSION}; get a newer one")


def _check_key(name: str) -> str:
    r"""Refuse a name that leads out of its folder."""
    if not isinstance(name, str) or "\\" in name or "\0" in name or ":" in name.partition("/")[0]:
        raise ValueError(f"{name!r} is no name of an object")
    if any(part in ("", ".", "..") or part.startswith(_RESERVED) for part in name.split("/")):
        raise ValueError(f"{name!r} is no name of an object")
    return name


def _check_sha256(value: str) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"{value!r} is no sha256")
    return value


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


# -------------------------------------------------------------------------------------------------------- command line


def main() -> int:
    """The command: prints the folder's path; exit code 2 for bad input, 4 where the outside world failed."""
    parser = argparse.ArgumentParser(description="Fetch what a Lacuna channel points to.")
    parser.add_argument("uri", help="s3://bucket/prefix, a folder, or a file that `lacuna presign` wrote")
    parser.add_argument("channel", nargs="?", help="latest, best, stable, or the key of a bundle's folder")
    parser.add_argument("--to", required=True, metavar="DIR", help="the folder to make")
    parser.add_argument("--rehash", action="store_true", help="hash the files that are there, too")
    parser.add_argument("--quiet", action="store_true", help="say nothing but the path and errors")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING if arguments.quiet else logging.INFO, format="%(message)s")
    try:
        folder = lacuna_pull(
            arguments.uri,
            arguments.channel,
            arguments.to,
            if_changed=not arguments.rehash,
            on_progress=_show if sys.stderr.isatty() and not arguments.quiet else None,
        )
    except (ValueError, OutsideWorldError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 4 if isinstance(error, OutsideWorldError) else 2
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; the same command goes on where this one was\n")
        return 130
    sys.stdout.write(f"{folder}\n")
    return 0


def _show(num_done: int, num_total: int) -> None:
    end = "\n" if num_done >= num_total else ""
    sys.stderr.write(f"\r{num_done / 1e6:.0f} of {num_total / 1e6:.0f} MB{end}")


if __name__ == "__main__":
    sys.exit(main())
