"""The object store in S3, or in a server that speaks S3, through boto3.

Endpoint, region and credentials are found as boto3 finds them (``AWS_ENDPOINT_URL``, ``AWS_PROFILE``, an instance's
role): there is no setting of our own for them, so none can end up in a config file, a manifest or a log.
"""

import base64
import contextlib
import functools
import hashlib
import logging
import os
import random
import re
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from botocore import exceptions as aws
from typing_extensions import override

from infra.errors import TransientError
from infra.s3_client import LOST, NOT_IMPLEMENTED, OUT_OF_RANGE, RACING, error_code, make_client, translated_errors
from infra.storage import (
    RESERVED_PREFIX,
    AlreadyExistsError,
    ConflictError,
    FileEntry,
    ObjectInfo,
    ObjectNotFoundError,
    ObjectStore,
    check_download,
    check_key,
    check_prefix,
    check_range,
    check_upload_hash,
    sha256_of_bytes,
    sha256_of_file,
)
from infra.storage_folder import local_scratch

ALLOW_UNCONDITIONAL = "LACUNA_ALLOW_UNCONDITIONAL_STORE"
MULTIPART_OVER_BYTES = 64 << 20
PATIENCE_S = 150.0
"""How long a server that has answered before is asked again: an outage is outlived."""
NUM_FIRST_TRIES = 5
"""How often one is asked that has not answered yet: its address may be mistyped."""
FIRST_DELAY_S = 0.1

_log = logging.getLogger(__name__)
_BUCKET = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,61}[a-zA-Z0-9]")
_PART_BYTES = 16 << 20
_MAX_NUM_PARTS = 10_000
_NUM_PARTS_IN_FLIGHT = 4
_COPY_BYTES = 1 << 20
_NUM_CONFLICT_RETRIES = 8
_NUM_FRESH_READS = 5
_LONGEST_DELAY_S = 10.0
_STALE_UPLOAD = timedelta(days=1)

_Part = dict[str, Any]
_T = TypeVar("_T")


class _ReplacedError(TransientError):
    """An object was replaced while it was read: what has arrived is of no use any more."""


@dataclass(frozen=True)
class _Version:
    """What is read: one version of an object.

    Attributes:
        etag: Its etag.
        total_bytes: Size of the whole object.
        sha256: The hash that its writer recorded, if it did.
    """

    etag: str
    total_bytes: int
    sha256: str | None


class _Patience:
    """Waits between attempts, longer each time, and gives up when nothing has come for too long."""

    def __init__(self) -> None:
        self.start_over()

    def start_over(self) -> None:
        """Something came."""
        self._num_failures = 0
        self._failing_since = 0.0
        self._delay_s = FIRST_DELAY_S

    def wait(self, error: TransientError, *, has_answered: bool) -> None:
        """Waits, or raises the error; `has_answered` says whether this server ever did."""
        now = time.monotonic()
        self._num_failures += 1
        self._failing_since = self._failing_since or now
        is_over = now - self._failing_since > PATIENCE_S if has_answered else self._num_failures >= NUM_FIRST_TRIES
        if is_over:
            raise error
        # Not all who were refused at the same time come back at the same time.
        delay_s = self._delay_s * random.uniform(0.5, 1)  # noqa: S311 - no secret
        _log.log(logging.INFO if self._delay_s > 1 else logging.DEBUG, "asked again in %.1f s: %s", delay_s, error)
        time.sleep(delay_s)
        self._delay_s = min(2 * self._delay_s, _LONGEST_DELAY_S)


class S3Store(ObjectStore):
    """Objects in one bucket, below a prefix.

    Args:
        bucket: Name of an existing bucket.
        prefix: Where the store's root lies in it, without slashes at its ends; may be empty.

    Raises:
        ValueError: These are no names that S3 knows.
    """

    def __init__(self, bucket: str, prefix: str = "") -> None:
        if not _BUCKET.fullmatch(bucket):
            raise ValueError(
                f"root: 's3://{bucket}' has no legal bucket name (3 to 63 letters, digits, dots and hyphens)"
            )
        self.bucket = bucket
        self.prefix = f"{check_key(prefix)}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        # Where the user allows a store without conditional writes, none are assumed before the probe has seen them.
        self.conditional_writes = not _unconditional_allowed()
        self._lock = threading.Lock()
        self._client_of_process: tuple[int, Any] | None = None
        self._has_answered = False  # whoever mistypes an endpoint should not wait for an outage to end

    @property
    def client(self) -> Any:  # boto3 makes its classes at run time
        """The process's own boto3 client: connections must not be shared with forked children."""
        with self._lock:
            if self._client_of_process is None or self._client_of_process[0] != os.getpid():
                self._client_of_process = (os.getpid(), make_client())
            return self._client_of_process[1]

    @override
    def head(self, key: str) -> ObjectInfo:
        answer = self._head(key)
        return ObjectInfo(key, answer["ContentLength"], answer["ETag"])

    @override
    def read_with_etag(self, key: str) -> tuple[bytes, str]:
        for attempt in range(_NUM_FRESH_READS):
            pieces: list[bytes] = []
            try:
                version = self._receive(key, pieces.append)
            except _ReplacedError:
                continue
            data = b"".join(pieces)
            # Bytes that were changed on the way are asked for again. If they come again they are what is there, and
            # whoever reads them decides what to think of it.
            if attempt >= 1 or version.sha256 in (None, sha256_of_bytes(data)):
                return data, version.etag
        raise TransientError(f"{self.uri_of(key)}: it was replaced {_NUM_FRESH_READS} times while it was read")

    @override
    def read_range(self, key: str, start: int, num_bytes: int, etag: str | None = None) -> bytes:
        check_range(start, num_bytes)
        if num_bytes == 0:
            self.head(key)
            return b""
        version = None if etag is None else _Version(etag, start + num_bytes, None)
        for _ in range(_NUM_FRESH_READS):
            pieces: list[bytes] = []
            try:
                self._receive(key, pieces.append, start, num_bytes, version)
            except _ReplacedError as error:
                if version is None:
                    continue
                raise ConflictError(str(error)) from None
            return b"".join(pieces)
        raise TransientError(f"{self.uri_of(key)}: it was replaced {_NUM_FRESH_READS} times while it was read")

    @override
    def put(self, key: str, data: bytes) -> ObjectInfo:
        return self._ask(key, lambda: self._put(key, data))

    @override
    def put_if_absent(self, key: str, data: bytes) -> ObjectInfo:
        try:
            return self._put_if(key, data, None)
        except ConflictError:
            raise AlreadyExistsError(f"{self.uri_of(key)} exists with other content") from None

    @override
    def compare_and_swap(self, key: str, data: bytes, expected_etag: str | None) -> ObjectInfo:
        return self._put_if(key, data, expected_etag)

    @override
    def upload(self, key: str, path: Path, sha256: str | None = None) -> FileEntry:
        num_bytes = path.stat().st_size
        if num_bytes <= MULTIPART_OVER_BYTES:
            data = path.read_bytes()
            actual = sha256_of_bytes(data)
            check_upload_hash(path, sha256, actual)
            num_bytes = len(data)
            self.put(key, data)
        else:
            # The hash is part of the object's metadata, which S3 wants before the content.
            actual = sha256 or sha256_of_file(path)
            self._upload_parts(key, path, actual, num_bytes)
        kept = self._head(key)
        if kept["ContentLength"] != num_bytes or kept["Metadata"].get("sha256", actual) != actual:
            raise TransientError(
                f"{self.uri_of(key)}: {kept['ContentLength']} bytes are kept of {num_bytes} that were sent"
            )
        return FileEntry(key, num_bytes, actual)

    @override
    def download(self, key: str, path: Path, sha256: str | None = None) -> FileEntry:
        with local_scratch(path) as target:
            version, actual, num_bytes = self._copy_to(target, key)
            check_download(self.uri_of(key), sha256 or version.sha256, actual, version.total_bytes, num_bytes)
        return FileEntry(key, num_bytes, actual)

    @override
    def list_folders(self, prefix: str = "") -> list[str]:
        start = self.prefix + check_prefix(prefix)
        names: set[str] = set()
        for page in self._pages(prefix, Delimiter="/"):
            names |= {entry["Prefix"][len(start) : -1] for entry in page.get("CommonPrefixes", ())}
        return sorted(name for name in names if name and not name.startswith(RESERVED_PREFIX))

    @override
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        found = []
        for page in self._pages(prefix):
            for entry in page.get("Contents", ()):
                key = entry["Key"].removeprefix(self.prefix)
                # Keys that end with a slash are folders that some tools and consoles make.
                if key and not key.endswith("/") and f"/{RESERVED_PREFIX}" not in f"/{key}":
                    found.append(ObjectInfo(key, entry["Size"], entry["ETag"]))
        found.sort(key=lambda info: info.key)  # not every server sorts as S3 does
        return iter(found)

    @override
    def delete(self, key: str) -> None:
        name = self._name(key)
        with contextlib.suppress(ObjectNotFoundError):
            self._ask(key, lambda: self.client.delete_object(**name))

    @override
    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    @override
    def check_writable(self) -> None:
        # A client of its own: whoever mistypes an endpoint should not wait for the patience that a long run needs.
        client = make_client(connect_timeout_s=3, read_timeout_s=10, attempts=3)
        try:
            with self._translated(""):
                enforced = self._probe(client, f"{self.prefix}{RESERVED_PREFIX}probe-{uuid.uuid4().hex}")
                self._clear_stale_uploads(client)
        except TransientError as error:
            raise ValueError(
                f"root: {error}; correct AWS_ENDPOINT_URL or start the server, or choose another --root"
            ) from None
        except ValueError as error:
            raise ValueError(f"root: {error}") from None
        finally:
            client.close()
        if not enforced and not _unconditional_allowed():
            raise ValueError(
                f"root: {self.uri} is on a store that ignores conditional writes (If-None-Match, If-Match), so writers "
                f"could overwrite each other; use a store that has them or, with one writer only, "
                f"set {ALLOW_UNCONDITIONAL}=1"
            )
        if not enforced:
            _log.warning(
                "%s ignores conditional writes; allowed by %s: have one writer only", self.uri, ALLOW_UNCONDITIONAL
            )
        self.conditional_writes = enforced

    def _probe(self, client: Any, full_key: str) -> bool:
        """Return whether a conditional write of a key that exists is refused, and a swap of a wrong etag as well."""
        name = {"Bucket": self.bucket, "Key": full_key}
        refused = 0
        try:
            client.put_object(**name, Body=b"1")
            for condition in ({"IfNoneMatch": "*"}, {"IfMatch": '"00000000000000000000000000000000"'}):
                try:
                    client.put_object(**name, Body=b"2", **condition)
                except aws.ClientError as error:
                    if error_code(error) in LOST:
                        refused += 1
                    elif error_code(error) not in NOT_IMPLEMENTED:
                        raise
        finally:
            try:
                client.delete_object(**name)
            except (aws.ClientError, aws.BotoCoreError) as error:
                _log.debug("the probe %s/%s was not deleted: %s", self.bucket, full_key, error)
        return refused == 2

    def _clear_stale_uploads(self, client: Any) -> None:
        """Remove the parts that killed writers left behind: nobody sees them, and they are paid for."""
        name = {"Bucket": self.bucket}
        try:
            uploads = client.list_multipart_uploads(**name, Prefix=self.prefix).get("Uploads", ())
            for upload in uploads:
                if datetime.now(UTC) - upload["Initiated"] > _STALE_UPLOAD:
                    client.abort_multipart_upload(**name, Key=upload["Key"], UploadId=upload["UploadId"])
        except aws.ClientError as error:  # no right to list them, or a server that does not know how
            _log.info("parts that killed writers may have left in %s are not looked for: %s", self.uri, error)

    def _name(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + check_key(key)}

    def _ask(self, key: str, request: Callable[[], _T], passed: Collection[str] = ()) -> _T:
        """Send a request, and where the server fails, again: all retries are here, boto3 does none.

        Args:
            key: What it is about.
            request: Called until it returns; sending it twice must have the effect of sending it once.
            passed: Codes that the caller handles.
        """
        patience = _Patience()
        while True:
            try:
                with self._translated(key, passed):
                    result = request()
                self._has_answered = True
                return result
            except TransientError as error:
                self._wait(patience, error)

    def _wait(self, patience: _Patience, error: TransientError) -> None:
        if isinstance(error.__cause__, aws.ClientError):  # a refusal is an answer, too
            self._has_answered = True
        patience.wait(error, has_answered=self._has_answered)

    def _pages(self, prefix: str, **options: str) -> Iterator[Any]:
        """The answers of a listing, one after the other."""
        options |= {"Bucket": self.bucket, "Prefix": self.prefix + check_prefix(prefix)}
        while True:
            page = self._ask(prefix, functools.partial(self.client.list_objects_v2, **options))
            yield page
            if not page.get("IsTruncated"):
                return
            options["ContinuationToken"] = page["NextContinuationToken"]

    def _head(self, key: str) -> Any:
        name = self._name(key)
        return self._ask(key, lambda: self.client.head_object(**name))

    def _receive(
        self,
        key: str,
        sink: Callable[[bytes], object],
        start: int = 0,
        num_bytes: int | None = None,
        version: _Version | None = None,
    ) -> _Version:
        """Stream an object, or a part of it, going on where a connection broke, and always with the same version.

        Args:
            key: The object.
            sink: Called with each piece, in order.
            start: Offset of the first byte.
            num_bytes: How many; None for all.
            version: Which one; None for the one that is there.

        Returns:
            What was read.

        Raises:
            _ReplacedError: Another version took its place.
        """
        have = 0
        patience = _Patience()

        def take(piece: bytes) -> None:
            nonlocal have
            sink(piece)
            have += len(piece)

        while True:
            before = have
            try:
                left = None if num_bytes is None else num_bytes - have
                version = self._receive_some(key, take, start + have, left, version)
                wanted = max(0, version.total_bytes - start)
                if have >= (wanted if num_bytes is None else min(num_bytes, wanted)):
                    return version
                raise TransientError(f"{self.uri_of(key)}: a body ended after {have} of {wanted} bytes")
            except _ReplacedError:
                raise
            except TransientError as error:
                if have > before:
                    patience.start_over()
                self._wait(patience, error)

    def _receive_some(
        self, key: str, sink: Callable[[bytes], object], start: int, num_bytes: int | None, version: _Version | None
    ) -> _Version:
        """Send one request of `_receive`; returns whether or not all of it has arrived."""
        options = {} if version is None else {"IfMatch": version.etag}
        if start or num_bytes is not None:
            options["Range"] = f"bytes={start}-{'' if num_bytes is None else start + num_bytes - 1}"
        try:
            with self._translated(key, passed=LOST | OUT_OF_RANGE):
                answer = self.client.get_object(**self._name(key), **options)
                self._has_answered = True
                with contextlib.closing(answer["Body"]) as body:
                    version = version or self._version_of(key, answer)
                    if start and not answer.get("ContentRange", "").startswith(f"bytes {start}-"):
                        raise TransientError(f"{self.uri_of(key)}: bytes from {start} on were asked for, others came")
                    for piece in body.iter_chunks(_COPY_BYTES):
                        sink(piece)
            return version
        except aws.ClientError as error:
            if error_code(error) in LOST:
                raise _ReplacedError(f"{self.uri_of(key)}: it was replaced while it was read") from None
            return version or _Version("", 0, None)  # the range begins at or behind the end

    def _version_of(self, key: str, answer: Any) -> _Version:
        total = answer.get("ContentRange", "").rpartition("/")[2]
        num_bytes = int(total) if total.isdigit() else answer.get("ContentLength")
        if num_bytes is None:  # an answer that ends wherever the connection does: nobody would see it cut
            info = self._head(key)
            if info["ETag"] != answer["ETag"]:
                raise _ReplacedError(f"{self.uri_of(key)}: it was replaced while it was read")
            num_bytes = info["ContentLength"]
        return _Version(answer["ETag"], num_bytes, answer["Metadata"].get("sha256"))

    def _put(self, key: str, data: bytes, **condition: str) -> ObjectInfo:
        answer = self.client.put_object(
            **self._name(key), Body=data, ContentMD5=_md5(data), Metadata={"sha256": sha256_of_bytes(data)}, **condition
        )
        return ObjectInfo(key, len(data), answer["ETag"])

    def _put_if(self, key: str, data: bytes, expected_etag: str | None) -> ObjectInfo:
        """Write if the object is absent (None) or has an etag; identical bytes already there are a success.

        Raises:
            ConflictError: Neither.
        """
        condition = {"IfNoneMatch": "*"} if expected_etag is None else {"IfMatch": expected_etag}
        if not self.conditional_writes and not self._holds(key, expected_etag):
            return self._same_or_conflict(key, data, expected_etag)
        for attempt in range(_NUM_CONFLICT_RETRIES):
            try:
                put = functools.partial(self._put, key, data, **condition)
                return self._ask(key, put, passed=LOST | RACING | NOT_IMPLEMENTED)
            except ObjectNotFoundError:  # S3's answer to If-Match where there is nothing
                return self._same_or_conflict(key, data, expected_etag)
            except aws.ClientError as error:
                if error_code(error) in LOST:
                    return self._same_or_conflict(key, data, expected_etag)
                if error_code(error) in RACING:
                    time.sleep(0.05 * 2**attempt)  # another conditional write of this key is under way
                elif not self.conditional_writes:
                    condition = {}
                else:
                    raise ValueError(
                        f"{self.uri_of(key)}: the store has no conditional writes; use one that has"
                    ) from error
        raise TransientError(f"{self.uri_of(key)}: other writers kept it busy")

    def _holds(self, key: str, expected_etag: str | None) -> bool:
        try:
            return self.head(key).etag == expected_etag
        except ObjectNotFoundError:
            return expected_etag is None

    def _same_or_conflict(self, key: str, data: bytes, expected_etag: str | None) -> ObjectInfo:
        """Take a lost race as won if the bytes there are ours: a write whose answer was lost meets itself."""
        with contextlib.suppress(ObjectNotFoundError):
            kept, etag = self.read_with_etag(key)
            if kept == data:
                return ObjectInfo(key, len(data), etag)
        expected = "absent" if expected_etag is None else f"the object with etag {expected_etag}"
        raise ConflictError(f"{self.uri_of(key)} is not, or no longer, {expected}")

    def _upload_parts(self, key: str, path: Path, sha256: str, num_bytes: int) -> None:
        """Upload in parts, which S3 shows as one object only when all are there and the upload is completed."""
        name = self._name(key)
        create = functools.partial(self.client.create_multipart_upload, **name, Metadata={"sha256": sha256})
        name["UploadId"] = self._ask(key, create)["UploadId"]
        completed = False
        try:
            parts, actual = self._send_parts(key, name, path, num_bytes)
            check_upload_hash(path, sha256, actual)
            self._ask(key, lambda: self._complete(key, name, parts, sha256, num_bytes))
            completed = True
        finally:
            if not completed:
                self._abort(name)

    def _send_parts(self, key: str, name: dict[str, str], path: Path, num_bytes: int) -> tuple[Sequence[_Part], str]:
        part_bytes = max(_PART_BYTES, -(-num_bytes // _MAX_NUM_PARTS))
        digest = hashlib.sha256()

        def send(number: int, data: bytes) -> _Part:
            part = {**name, "PartNumber": number, "Body": data, "ContentMD5": _md5(data)}
            answer = self._ask(key, lambda: self.client.upload_part(**part))
            return {"PartNumber": number, "ETag": answer["ETag"]}

        parts: deque[_Part] = deque()
        in_flight: deque[Future[_Part]] = deque()
        with open(path, "rb") as file, ThreadPoolExecutor(_NUM_PARTS_IN_FLIGHT) as pool:
            number = 0
            while data := file.read(part_bytes):
                digest.update(data)
                number += 1
                if len(in_flight) == _NUM_PARTS_IN_FLIGHT:  # bounds the memory: the pool's own queue does not
                    parts.append(in_flight.popleft().result())
                in_flight.append(pool.submit(send, number, data))
            parts.extend(future.result() for future in in_flight)
        return tuple(parts), digest.hexdigest()

    def _complete(self, key: str, name: dict[str, str], parts: Sequence[_Part], sha256: str, num_bytes: int) -> None:
        try:
            self.client.complete_multipart_upload(**name, MultipartUpload={"Parts": [*parts]})
        except aws.ClientError as error:
            # A completion whose answer was lost is sent again, and the upload then unknown: see what is there.
            if error_code(error) != "NoSuchUpload":
                raise
            kept = self._head(key)
            if kept["ContentLength"] != num_bytes or kept["Metadata"].get("sha256") != sha256:
                raise

    def _abort(self, name: dict[str, str]) -> None:
        try:
            self.client.abort_multipart_upload(**name)
        except (aws.ClientError, aws.BotoCoreError) as error:
            _log.warning("unfinished parts of s3://%s/%s remain: %s", name["Bucket"], name["Key"], error)

    def _copy_to(self, target: BinaryIO, key: str) -> tuple[_Version, str, int]:
        """Copy an object to a file; returns what was read, the sha256 of what arrived, and its size."""
        for _ in range(_NUM_FRESH_READS):
            target.seek(0)
            target.truncate()
            digest = hashlib.sha256()

            def take(piece: bytes, digest: Any = digest) -> None:
                digest.update(piece)
                target.write(piece)

            with contextlib.suppress(_ReplacedError):
                version = self._receive(key, take)
                return version, digest.hexdigest(), target.tell()
        raise TransientError(f"{self.uri_of(key)}: it was replaced {_NUM_FRESH_READS} times while it was read")

    def _translated(self, key: str, passed: Collection[str] = ()) -> contextlib.AbstractContextManager[None]:
        return translated_errors(self.client.meta.endpoint_url, self.bucket, key, f"{self.uri}/{key}", passed)


def _unconditional_allowed() -> bool:
    return os.environ.get(ALLOW_UNCONDITIONAL) == "1"


def _md5(data: bytes) -> str:
    """Return the checksum against corruption on the way that every S3 server verifies."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
