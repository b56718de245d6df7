"""Files of rows, opened only when their sha256 was found to be the manifest's, since this start.

A file is read once from end to end when it is first needed, or a little before. What was found is noted beside the
file's identity (device, inode, size, times), in a folder that the processes of one start share: each file is read by
one of them, and the others wait. A file whose identity is another one is read again.

What this cannot see: bytes that rot on the disk after they were read, without the file system's knowledge, once the
page cache has dropped them; and a file that is cut short in the very moment in which its rows are copied, which kills
the process (SIGBUS). Files of datasets are never written to, so neither happens by our own doing.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from infra.errors import ContractError, TransientError
from infra.storage import ObjectStore
from preprocessing.contracts.manifest import DatasetFile, find_manifest

LOGGER = logging.getLogger(__name__)

Identity = tuple[int, int, int, int, int]
"""Device, inode, size, and the times of the last change of content and of attributes: equal ones are one content."""

_SESSION_DAYS = 7.0


@dataclass(frozen=True)
class OpenFile:
    """A file whose content is what the manifest says.

    Attributes:
        path: Its name; the content is that of `file`, whatever becomes of the name.
        file: Open for reading.
        identity: What it was when its content was read.
    """

    path: Path
    file: io.BufferedReader
    identity: Identity

    def is_unchanged(self) -> bool:
        """Whether it is still the file that was read: to be asked before and after its rows are copied."""
        return identity_of(self.file) == self.identity


class ShardFiles(Protocol):
    """Where the files of datasets are had from."""

    def open(self, prefix: str, file: DatasetFile) -> OpenFile:
        """Opens a file of the dataset at `prefix`, once it is there and its content is known to be right.

        Raises:
            ContractError: It is missing or damaged; names it.
            TransientError: Its dataset was written again meanwhile, and names it no more.
        """
        ...

    def prepare(self, prefix: str, file: DatasetFile) -> None:
        """Does what `open` would have to do first; nothing, where another thread or process is doing it."""
        ...


class LocalFiles:
    """The files of a store that is a local folder, read where they lie.

    Args:
        store: The store.
        notes: What is known since this start.
    """

    def __init__(self, store: ObjectStore, notes: "Notes") -> None:
        self._store = store
        self._notes = notes

    def open(self, prefix: str, file: DatasetFile) -> OpenFile:
        """See `ShardFiles`."""
        path = self._path(prefix, file)
        try:
            opened = open_at(path, file)
        except ContractError:
            if not path.exists():
                check_named(self._store, prefix, file)
            raise
        if self._notes.know(file.sha256, opened.identity):
            return opened
        with opened.file, self._notes.locked(file.sha256):
            return self._open_checked(path, file)

    def prepare(self, prefix: str, file: DatasetFile) -> None:
        """See `ShardFiles`."""
        with self._notes.locked_if_free(file.sha256) as is_ours:
            if is_ours:
                self._open_checked(self._path(prefix, file), file).file.close()

    def _open_checked(self, path: Path, file: DatasetFile) -> OpenFile:
        opened = open_at(path, file)
        if not self._notes.know(file.sha256, opened.identity):
            check_content(opened, file)
            self._notes.note(file.sha256, opened.identity)
        return opened

    def _path(self, prefix: str, file: DatasetFile) -> Path:
        path = self._store.local_path(file.key(prefix))
        assert path is not None, "a store without local paths goes through the cache"
        return path


class Notes:
    """What the processes of one start know of files; and their locks.

    Args:
        folder: Local to the machine, and common to them.
        session: Names the start, such as a random word that one process told the others; None: this object alone.
    """

    def __init__(self, folder: Path, session: str | None = None) -> None:
        self._locks = folder / "locks"
        self._locks.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, Identity] = {}
        self._folder = None if session is None else folder / "sessions" / session
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            _remove_old(self._folder.parent)

    def know(self, sha256: str, identity: Identity) -> bool:
        """Whether the file of this identity was found to have this sha256."""
        if self._known.get(sha256) == identity:
            return True
        if self._folder is not None:
            with contextlib.suppress(OSError, ValueError):
                if tuple(json.loads((self._folder / sha256).read_bytes())) == identity:
                    self._known[sha256] = identity
                    return True
        return False

    def note(self, sha256: str, identity: Identity) -> None:
        """Remembers that the file of this identity has this sha256."""
        self._known[sha256] = identity
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)  # another run may have taken us for over
            scratch = self._folder / f"{uuid.uuid4().hex}.new"
            scratch.write_text(json.dumps(identity))
            os.replace(scratch, self._folder / sha256)

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Keeps other threads and processes from doing the same; waits for them."""
        with open(self._locks / name, "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def locked_if_free(self, name: str) -> Iterator[bool]:
        """As `locked`, but does not wait: gives whether nobody else is at it."""
        with open(self._locks / name, "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


def check_named(store: ObjectStore, prefix: str, file: DatasetFile) -> None:
    """Makes sure that a file that is not there is missed: a dataset is written again when rows of it are forgotten.

    Raises:
        TransientError: The dataset's manifest does not name it any more; who reads the dataset anew goes on.
    """
    manifest = find_manifest(store, prefix)
    if manifest is None:
        return
    names = {other.key(prefix) for shard in manifest.shards for other in shard.files}
    if file.key(prefix) not in names:
        raise TransientError(
            f"{store.uri_of(file.key(prefix))}: it went while it was in use, since rows of its dataset were forgotten; "
            "the same call goes on with the files that are there"
        )


def open_at(path: Path, file: DatasetFile) -> OpenFile:
    """Opens a file of the right size; its content is not looked at.

    Raises:
        ContractError: There is none, or it has another size.
    """
    try:
        handle = open(path, "rb")  # noqa: SIM115 - handed on
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise ContractError(f"{path}: missing, and the manifest names it") from None
    identity = identity_of(handle)
    if identity[2] != file.num_bytes:
        handle.close()
        raise ContractError(f"{path}: {identity[2]} bytes, the manifest says {file.num_bytes}; the file is damaged")
    return OpenFile(path, handle, identity)


def check_content(opened: OpenFile, file: DatasetFile) -> None:
    """Reads a file from end to end; closes it where it is not what the manifest says.

    Raises:
        ContractError: Its sha256 is another one, or it changed meanwhile.
    """
    opened.file.seek(0)
    found = hashlib.file_digest(opened.file, "sha256").hexdigest()
    if found == file.sha256 and opened.is_unchanged():
        return
    opened.file.close()
    if found == file.sha256:
        raise ContractError(f"{opened.path}: it was written to while it was read; nothing may change a dataset's files")
    raise ContractError(f"{opened.path}: sha256 {found}, the manifest says {file.sha256}; the file is damaged")


def identity_of(file: io.BufferedReader) -> Identity:
    """The identity of an open file."""
    found = os.fstat(file.fileno())
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _remove_old(sessions: Path) -> None:
    for folder in sessions.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _SESSION_DAYS * 24 * 3600:
                shutil.rmtree(folder)
