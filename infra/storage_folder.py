"""The object store in a folder: atomic through rename and link, durable through fsync.

Layout besides the objects: ``.lacuna-scratch/`` holds files that are being written, ``.lacuna-locks/`` the lock files.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

from typing_extensions import override

from infra.errors import TransientError
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
)

_COPY_BYTES = 4 << 20
_HASHED_BYTES = 1 << 20
_STALE_SCRATCH_S = 24 * 3600.0
_USERS_FAULT = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOTEMPTY,
}
_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class FolderStore(ObjectStore):
    """Objects as files below one folder, on a filesystem that has hard links and locks (local ones and NFS do).

    The etag of an object up to 1 MiB is its sha256; beyond that its inode, time and size, since everything that is
    compared and swapped is small, and no listing should have to read terabytes.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root.expanduser()))
        self.uri = str(self.root)
        if self.uri == "/":
            raise ValueError("root: '/' is the whole filesystem; choose another --root")

    @override
    def head(self, key: str) -> ObjectInfo:
        with self._open(key) as file:
            return _info(key, file)

    @override
    def exists(self, key: str) -> bool:
        try:
            return stat.S_ISREG(os.stat(self._path(key)).st_mode)
        except _NOT_THERE:
            return False
        except OSError as error:
            self._raise_named(key, error)

    @override
    def read_with_etag(self, key: str) -> tuple[bytes, str]:
        with self._open(key) as file:
            info = _info(key, file)
            file.seek(0)
            return file.read(), info.etag

    @override
    def read_range(self, key: str, start: int, num_bytes: int, etag: str | None = None) -> bytes:
        check_range(start, num_bytes)
        with self._open(key) as file:
            if etag is not None and _etag(file, None) != etag:
                raise ConflictError(f"{self.uri_of(key)} is no longer the object with etag {etag}")
            file.seek(start)
            return file.read(num_bytes)

    @override
    def put(self, key: str, data: bytes) -> ObjectInfo:
        with self._scratch(key, data) as (scratch, info), self._lock(key):
            self._commit(scratch, key)
        return info

    @override
    def put_if_absent(self, key: str, data: bytes) -> ObjectInfo:
        with self._scratch(key, data) as (scratch, info):
            try:
                os.link(scratch, self._path(key))  # unlike rename, refuses atomically where the name is taken
            except FileExistsError:
                return self._same_or_raise(
                    key, data, AlreadyExistsError(f"{self.uri_of(key)} exists with other content")
                )
            _fsync_folder(self._path(key).parent)
        return info

    @override
    def compare_and_swap(self, key: str, data: bytes, expected_etag: str | None) -> ObjectInfo:
        if expected_etag is None:
            try:
                return self.put_if_absent(key, data)
            except AlreadyExistsError as error:
                raise ConflictError(f"{error}, and it should have been absent") from None
        with self._scratch(key, data) as (scratch, info), self._lock(key):
            lost = ConflictError(f"{self.uri_of(key)} is no longer the object with etag {expected_etag}")
            try:
                etag = self.head(key).etag
            except ObjectNotFoundError:
                raise lost from None
            if etag != expected_etag:
                return self._same_or_raise(key, data, lost)
            self._commit(scratch, key)
        return info

    @override
    def upload(self, key: str, path: Path, sha256: str | None = None) -> FileEntry:
        with open(path, "rb") as source, self._scratch_file(key) as (scratch, target):
            actual, num_bytes = _copy(source, target)
            check_upload_hash(path, sha256, actual)
            _fsync(target)
            if os.fstat(target.fileno()).st_size != num_bytes:
                raise TransientError(f"{self.uri_of(key)}: the filesystem did not keep all of its {num_bytes} bytes")
            with self._lock(key):
                self._commit(scratch, key)
        return FileEntry(key, num_bytes, actual)

    @override
    def download(self, key: str, path: Path, sha256: str | None = None) -> FileEntry:
        with self._open(key) as source, local_scratch(path) as target:
            actual, num_bytes = _copy(source, target)
            expected_bytes = os.fstat(source.fileno()).st_size
            check_download(self.uri_of(key), sha256, actual, expected_bytes, num_bytes)
        return FileEntry(key, num_bytes, actual)

    @override
    def list_folders(self, prefix: str = "") -> list[str]:
        try:
            with os.scandir(self.root / check_prefix(prefix)) as entries:
                names = [entry.name for entry in entries if entry.is_dir()]
        except _NOT_THERE:
            return []
        return sorted(name for name in names if not name.startswith(RESERVED_PREFIX))

    @override
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder = check_prefix(prefix).rpartition("/")[0]
        return self._walk(self.root / folder, f"{folder}/" if folder else "", prefix)

    @override
    def delete(self, key: str) -> None:
        path = self._path(key)
        if path.is_file():
            with self._lock(key), contextlib.suppress(*_NOT_THERE):
                path.unlink()
                _fsync_folder(path.parent)

    @override
    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    @override
    def check_writable(self) -> None:
        advice = "choose another --root"
        probe = f"writable-{uuid.uuid4().hex}"
        try:
            with self._lock(probe), self._scratch_file(probe) as (scratch, _):
                linked = scratch.with_name(f"{scratch.name}-link")
                try:
                    os.link(scratch, linked)
                finally:
                    linked.unlink(missing_ok=True)
            self._clear_stale_scratch()
        except (ValueError, TransientError, OSError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            reason = cause.strerror if isinstance(cause, OSError) else str(error)
            blocker = next((p for p in (self.root, *self.root.parents) if p.exists() and not p.is_dir()), None)
            if blocker is not None:
                reason = "it is a file" if blocker == self.root else f"'{blocker}' is a file"
            raise ValueError(f"root: '{self.root}' is not writable ({reason}); {advice}") from None

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _open(self, key: str) -> BinaryIO:
        path = self._path(key)
        try:
            return open(path, "rb")
        except _NOT_THERE:
            raise ObjectNotFoundError(key, self.uri_of(key)) from None
        except OSError as error:
            self._raise_named(key, error)

    def _same_or_raise(self, key: str, data: bytes, lost: Exception) -> ObjectInfo:
        """Take a lost race as won if the bytes there are ours."""
        with contextlib.suppress(ObjectNotFoundError), self._open(key) as file:
            if os.fstat(file.fileno()).st_size == len(data) and file.read() == data:
                return _info(key, file)
        raise lost

    @contextlib.contextmanager
    def _scratch(self, key: str, data: bytes) -> Iterator[tuple[Path, ObjectInfo]]:
        """Write bytes where nobody looks, durably, for the caller to rename or link."""
        with self._scratch_file(key) as (scratch, file):
            file.write(data)
            _fsync(file)
            yield scratch, ObjectInfo(key, len(data), _etag(file, data))

    @contextlib.contextmanager
    def _scratch_file(self, key: str) -> Iterator[tuple[Path, BinaryIO]]:
        with self._naming_failures(key):
            folder = self._path(key).parent
            self._make_folder(folder)
            scratch_folder = self.root / f"{RESERVED_PREFIX}scratch"
            self._make_folder(scratch_folder)
            if folder.stat().st_dev != scratch_folder.stat().st_dev:
                scratch_folder = (
                    folder  # a link or mount within the root leads to another disk: rename works only there
                )
            scratch = scratch_folder / f"{RESERVED_PREFIX}{uuid.uuid4().hex}"
            try:
                with open(scratch, "xb") as file:
                    yield scratch, file
            finally:
                scratch.unlink(missing_ok=True)

    def _make_folder(self, folder: Path) -> None:
        missing = []
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                path.mkdir()
            _fsync_folder(path.parent)

    def _commit(self, scratch: Path, key: str) -> None:
        path = self._path(key)
        os.replace(scratch, path)
        _fsync_folder(path.parent)

    @contextlib.contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        """Keep other threads and processes from changing an object.

        There are 256 lock files, shared by all keys: one per key could never be removed without a race. flock, because
        locks of the POSIX kind do not exclude threads of the same process.
        """
        folder = self.root / f"{RESERVED_PREFIX}locks"
        with self._naming_failures(key):
            self._make_folder(folder)
            with open(folder / sha256_of_bytes(key.encode())[:2], "ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield

    @contextlib.contextmanager
    def _naming_failures(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, FileExistsError):
                raise
            self._raise_named(key, error)

    def _raise_named(self, key: str, error: OSError) -> NoReturn:
        """Sort an error of the filesystem into the user's (rights, names) and the world's (full, failing, stale)."""
        line = f"{self.uri_of(key)}: {error.strerror}"
        if error.errno in _USERS_FAULT:
            raise ValueError(f"{line}; choose another --root or correct its permissions") from error
        raise TransientError(line) from error

    def _walk(self, folder: Path, base: str, prefix: str) -> Iterator[ObjectInfo]:
        try:
            with os.scandir(folder) as entries:
                # A folder sorts as its keys will: with the slash that follows its name ('a-b' < 'a/b').
                named = sorted((e.name + "/" if e.is_dir() else e.name, e.path) for e in entries)
        except _NOT_THERE:
            return
        for name, path in named:
            key = base + name
            if name.startswith(RESERVED_PREFIX):
                continue
            if name.endswith("/"):
                if key.startswith(prefix) or prefix.startswith(key):
                    yield from self._walk(Path(path), key, prefix)
            elif key.startswith(prefix):
                with contextlib.suppress(ObjectNotFoundError):  # deleted since the folder was read
                    yield self.head(key)

    def _clear_stale_scratch(self) -> None:
        """Remove what killed writers left behind; living ones touch their files more often than daily."""
        for path in (self.root / f"{RESERVED_PREFIX}scratch").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _STALE_SCRATCH_S:
                    path.unlink()


@contextlib.contextmanager
def local_scratch(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name, durably, only when the block ends without an error.

    Args:
        path: The final name; its folder is made if need be, and the scratch file lies beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{RESERVED_PREFIX}{uuid.uuid4().hex}")
    try:
        with open(scratch, "xb") as file:
            yield file
            _fsync(file)
        os.replace(scratch, path)
        _fsync_folder(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def _info(key: str, file: BinaryIO) -> ObjectInfo:
    """Describe an open object; the position in the file is left anywhere."""
    return ObjectInfo(key, os.fstat(file.fileno()).st_size, _etag(file, None))


def _etag(file: BinaryIO, data: bytes | None) -> str:
    stat = os.fstat(file.fileno())
    if stat.st_size > _HASHED_BYTES:
        return f"{stat.st_ino:x}-{stat.st_mtime_ns:x}-{stat.st_size:x}"
    if data is None:
        file.seek(0)
        data = file.read()
    return sha256_of_bytes(data)


def _copy(source: BinaryIO, target: BinaryIO) -> tuple[str, int]:
    digest = hashlib.sha256()
    num_bytes = 0
    while chunk := source.read(_COPY_BYTES):
        digest.update(chunk)
        target.write(chunk)
        num_bytes += len(chunk)
    return digest.hexdigest(), num_bytes


def _fsync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable: without it a rename may be forgotten by a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
