"""Folders that appear whole, and the scratch in which they are put together: a fetch that was killed goes on there.

The scratch of a folder ``NAME`` is ``.NAME.lacuna-{what it becomes}`` beside it. It is locked by whoever fills it. One
that was left by a killed process, or by a network that failed, is taken over by the next fetch of the same; by one of
something else it is removed. Files lie under their final names once they are complete; until then in ``.lacuna-parts``
with the etag of the object that they are a part of.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import io
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from infra.errors import TransientError
from infra.storage import (
    RESERVED_PREFIX,
    ConflictError,
    DamagedObjectError,
    ObjectStore,
    sha256_of_bytes,
    sha256_of_file,
)

OnBytes = Callable[[int], None]

_PARTS_NAME = f"{RESERVED_PREFIX}parts"
_PIECE_BYTES = 8 << 20
_NUM_FRESH_READS = 5
_NUM_TAKEOVERS = 5
_ABANDONED_S = 60.0
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


# ------------------------------------------------------------------------------------------------------------- scratch


@contextlib.contextmanager
def scratch_folder(to: Path, becomes: str) -> Iterator[Path]:
    """Make, or take over, a locked folder beside a target.

    It is removed at the end, with those that killed fetches of something else left. Where the outside world failed, or
    the user interrupted, it stays for the next fetch of the same.

    Args:
        to: The target; its parent is there.
        becomes: Names what is put together, in few characters: the beginning of a hash.
    """
    start = f".{to.name}.lacuna-"
    own = to.parent / f"{start}{becomes}"
    for path in to.parent.glob(f"{start}*"):
        if path != own:
            _remove_if_abandoned(path)
    scratch, descriptor = _lock(own)
    is_kept = False
    try:
        yield scratch
    except (TransientError, KeyboardInterrupt) as error:
        is_kept = scratch == own and not isinstance(error, DamagedObjectError)
        raise
    finally:
        if not is_kept:
            shutil.rmtree(scratch, ignore_errors=True)
        os.close(descriptor)


def _lock(own: Path) -> tuple[Path, int]:
    """Make and lock a folder; another one, of no name that anybody would look for, while somebody else holds it."""
    for _ in range(_NUM_TAKEOVERS):
        own.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(own, os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.stat(own).st_ino == os.fstat(descriptor).st_ino:  # else it was removed before it was locked
                    return own, descriptor
            os.close(descriptor)
    other = own.with_name(f"{own.name}-{uuid.uuid4().hex}")
    other.mkdir()
    descriptor = os.open(other, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return other, descriptor


def _remove_if_abandoned(path: Path) -> None:
    """Remove a scratch folder that nobody holds. The age is for one that is not locked yet."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if time.time() - os.fstat(descriptor).st_mtime > _ABANDONED_S:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


def keep_only(scratch: Path, names: set[str]) -> None:
    """Remove from a scratch folder that was taken over what is neither wanted nor a part of something."""
    for path in scratch.rglob("*"):
        name = path.relative_to(scratch).as_posix()
        if path.is_file() and name not in names and not name.startswith(f"{_PARTS_NAME}/"):
            path.unlink()


# --------------------------------------------------------------------------------------------------------------- files


def land_file(
    store: ObjectStore, key: str, path: Path, num_bytes: int, sha256: str, scratch: Path, on_bytes: OnBytes
) -> None:
    """Copy an object to a file, which appears only once it is whole and verified, going on where an earlier copy ended.

    Args:
        store: Where from.
        key: The object.
        path: The file.
        num_bytes: Its size.
        sha256: Of its content.
        scratch: Where parts of files lie.
        on_bytes: Called with how many bytes more are there, also of those that were there before.

    Raises:
        ObjectNotFoundError: There is no such object.
        DamagedObjectError: It is not what it should be.
        TransientError: The store fails, or the object is replaced again and again.
    """
    if path.is_file() and path.stat().st_size == num_bytes and sha256_of_file(path) == sha256:
        on_bytes(num_bytes)
        return
    if num_bytes <= _PIECE_BYTES:
        store.download(key, path, sha256)
        on_bytes(num_bytes)
        return
    part = scratch / _PARTS_NAME / sha256_of_bytes(path.relative_to(scratch).as_posix().encode())
    part.parent.mkdir(exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(_NUM_FRESH_READS):
        with contextlib.suppress(ConflictError):
            was_begun = part.is_file()
            actual = _fill(store, key, part, num_bytes, on_bytes)
            if actual == sha256:
                os.replace(part, path)
                fsync_folder(path.parent)
                return
            part.unlink()
            on_bytes(-num_bytes)
            if not was_begun:  # else what an earlier process left may have been what is wrong
                raise DamagedObjectError(f"{store.uri_of(key)}: the content's sha256 is {actual}, expected {sha256}")
    raise TransientError(f"{store.uri_of(key)}: it was replaced {_NUM_FRESH_READS} times while it was read")


def _fill(store: ObjectStore, key: str, part: Path, num_bytes: int, on_bytes: OnBytes) -> str:
    """Append to a part until it is all; returns the sha256 of the whole.

    Raises:
        ConflictError: The object was replaced; the part is of no use any more.
    """
    info = store.head(key)
    if info.num_bytes != num_bytes:
        raise DamagedObjectError(f"{store.uri_of(key)}: has {info.num_bytes} bytes, expected {num_bytes}")
    with open(part, "a+b") as target:
        digest = _begun(target, part.with_suffix(".etag"), info.etag, num_bytes)
        on_bytes(have := target.tell())
        try:
            while have < num_bytes:
                piece = store.read_range(key, have, min(_PIECE_BYTES, num_bytes - have), info.etag)
                target.write(piece)
                target.flush()  # who comes after a kill finds it
                digest.update(piece)
                have += len(piece)
                on_bytes(len(piece))
        except ConflictError:
            target.truncate(0)
            on_bytes(-have)
            raise
        os.fsync(target.fileno())
    return digest.hexdigest()


def _begun(target: io.BufferedRandom, etag_path: Path, etag: str, num_bytes: int) -> "hashlib._Hash":
    """Hash what is there of a part, if it is of this very object; else empty it. It is left at its end."""
    target.seek(0)
    if etag_path.is_file() and etag_path.read_text("utf-8") == etag:
        digest = hashlib.file_digest(target, "sha256")
        if target.tell() <= num_bytes:
            return digest
    target.seek(0)
    target.truncate()
    etag_path.write_text(etag, "utf-8")
    return hashlib.sha256()


# --------------------------------------------------------------------------------------------------------- the target


def check_space(parent: Path, num_bytes: int) -> None:
    """Refuse to begin what cannot be finished.

    Raises:
        ValueError: There is less space than that.
    """
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise ValueError(
            f"to: {num_bytes / 1e9:.1f} GB are to be written, and {parent} has {free / 1e9:.1f} GB left; "
            "make room, or choose another folder"
        )


def move_into_place(scratch: Path, to: Path) -> None:
    """Give a scratch folder its name, in one step; what was there before is removed."""
    shutil.rmtree(scratch / _PARTS_NAME, ignore_errors=True)
    for path, _, _ in os.walk(scratch):
        fsync_folder(Path(path))
    # From here on nobody takes it over: its name in what follows may be that of what was there before.
    leaving = scratch.with_name(f"{scratch.name}-{uuid.uuid4().hex}")
    os.rename(scratch, leaving)
    try:
        _replace(leaving, to)
    finally:
        shutil.rmtree(leaving, ignore_errors=True)


def _replace(scratch: Path, to: Path) -> None:
    try:
        os.rename(scratch, to)  # replaces nothing, or an empty folder
    except OSError:
        if not to.is_dir():
            raise
        if not _exchange(scratch, to):
            # No exchange on this filesystem: there is a moment without the folder, never one with half of it.
            aside = scratch.with_name(f"{scratch.name}-old")
            os.rename(to, aside)
            os.rename(scratch, to)
            os.rename(aside, scratch)
    fsync_folder(to.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step, where the system can (Linux renameat2)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def fsync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
