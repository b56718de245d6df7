"""The object store: where everything that outlives a process is kept, in a folder or in S3.

Both backends keep the same promises, and one contract test-suite holds them to it:

* a reader sees a whole object or none: never a part of one, never a mixture of two;
* `put_if_absent` and `compare_and_swap` have exactly one winner among any number of processes;
* a write is retried by doing it again: writing the bytes that are already there succeeds.

Objects are named by keys, POSIX relative paths (``datasets/select/0123abcd/MANIFEST.json``), below the store's root.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from infra.errors import ContractError, TransientError

RESERVED_PREFIX = ".lacuna-"  # the stores' own scratch and lock files; such names are no keys and are never listed


@dataclass(frozen=True)
class ObjectInfo:
    """What the store says of one object.

    Attributes:
        key: Name below the store's root.
        num_bytes: Size.
        etag: Changes whenever the content does; opaque, to be handed back to `ObjectStore.compare_and_swap`.
    """

    key: str
    num_bytes: int
    etag: str


@dataclass(frozen=True)
class FileEntry:
    """One transferred file, as manifests list them.

    Attributes:
        name: The object's key below the store's root.
        num_bytes: Size.
        sha256: Hash of the content, 64 hexadecimal digits.
    """

    name: str
    num_bytes: int
    sha256: str


class ObjectNotFoundError(ValueError):
    """No object has this key.

    Attributes:
        key: The key that was asked for.
        uri: Where it was looked for.
    """

    def __init__(self, key: str, uri: str = "") -> None:
        super().__init__(key, uri)  # both in args: the error survives pickling between processes
        self.key = key
        self.uri = uri

    def __str__(self) -> str:
        return f"{self.uri or self.key}: no such object"


class AlreadyExistsError(RuntimeError):
    """`ObjectStore.put_if_absent` lost: another content has this key already."""


class DamagedObjectError(TransientError):
    """What arrived whole is not what was asked for: its sha256 is another one. Asking again may help, once."""


class ConflictError(RuntimeError):
    """`ObjectStore.compare_and_swap` lost: the object is not, or no longer, the one that was expected."""


class ObjectStore(ABC):
    """One root under which objects are read and written; safe to share between threads, and picklable.

    Attributes:
        uri: The root, without a trailing slash.
        conditional_writes: Whether the store itself decides races between writers. False only on an S3-compatible store
            that ignores conditional requests and that the user allowed all the same; writers record it in manifests.
    """

    uri: str
    conditional_writes: bool = True

    def uri_of(self, key: str) -> str:
        """Return the full name of an object, for people and for references between stages."""
        return f"{self.uri}/{check_key(key)}"

    def exists(self, key: str) -> bool:
        """Return whether an object has this key."""
        try:
            self.head(key)
        except ObjectNotFoundError:
            return False
        return True

    def read(self, key: str) -> bytes:
        """Return an object's content.

        Raises:
            ObjectNotFoundError: There is no such object.
        """
        return self.read_with_etag(key)[0]

    @abstractmethod
    def head(self, key: str) -> ObjectInfo:
        """Return an object's size and etag.

        Raises:
            ObjectNotFoundError: There is no such object.
        """

    @abstractmethod
    def read_with_etag(self, key: str) -> tuple[bytes, str]:
        """Return an object's content and the etag of exactly that content.

        Raises:
            ObjectNotFoundError: There is no such object.
        """

    @abstractmethod
    def read_range(self, key: str, start: int, num_bytes: int, etag: str | None = None) -> bytes:
        """Return a part of an object.

        Args:
            key: The object.
            start: Offset of the first byte, >= 0.
            num_bytes: How many to read, >= 0.
            etag: Of the content that a part is wanted of; the range then lies within it.

        Returns:
            The bytes [start, start + num_bytes), fewer only where the object ends.

        Raises:
            ObjectNotFoundError: There is no such object.
            ConflictError: It is another one than ``etag`` says.
        """

    @abstractmethod
    def put(self, key: str, data: bytes) -> ObjectInfo:
        """Write an object, replacing atomically what was there.

        For data whose name determines its content and for reports of progress; anything that writers may race for goes
        through `put_if_absent` or `compare_and_swap`.
        """

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> ObjectInfo:
        """Write an object that must not exist yet: among racing writers of different bytes exactly one succeeds.

        Identical bytes already there count as success: they are our own write whose answer was lost, or an equal one.

        Raises:
            AlreadyExistsError: Other bytes are there.
        """

    @abstractmethod
    def compare_and_swap(self, key: str, data: bytes, expected_etag: str | None) -> ObjectInfo:
        """Replace an object only if it is still the one that the caller read.

        Identical bytes already there count as success, as in `put_if_absent`: where two writers' equal bytes must not
        both count, let the bytes name the writer.

        Args:
            key: The object.
            data: Its new content.
            expected_etag: Etag of the content to be replaced; None if the object must not exist.

        Raises:
            ConflictError: The object has changed, has appeared, or is gone.
        """

    @abstractmethod
    def upload(self, key: str, path: Path, sha256: str | None = None) -> FileEntry:
        """Write a file's content as an object, streaming, and replace atomically what was there.

        Args:
            key: The object.
            path: A local file; it must not change meanwhile.
            sha256: The hash that the file is known to have.

        Raises:
            ContractError: The file's content does not have this hash; nothing becomes visible.
            TransientError: The store did not take or keep all of it; nothing truncated becomes visible.
        """

    @abstractmethod
    def download(self, key: str, path: Path, sha256: str | None = None) -> FileEntry:
        """Copy an object to a local file, which appears only once it is whole and verified.

        Args:
            key: The object.
            path: The file to write; its folder is made if need be.
            sha256: The hash that the content must have. Without it the one recorded at upload is used, if any.

        Raises:
            ObjectNotFoundError: There is no such object.
            TransientError: Size or hash do not agree; names the object and both values.
        """

    @abstractmethod
    def list_folders(self, prefix: str = "") -> list[str]:
        """Return the names of the folders directly below a folder, sorted; what lies in them is not listed.

        A folder may be empty: a local one that was emptied stays.

        Args:
            prefix: The folder's key with a slash at its end; empty for the root.
        """

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects whose key starts with a string, sorted by key.

        Args:
            prefix: Any beginning of a key; end it with ``/`` for what lies in a folder.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete an object; one that is absent is fine."""

    @abstractmethod
    def local_path(self, key: str) -> Path | None:
        """Return the file that holds an object, for memory maps; never write to it. None if it is elsewhere."""

    @abstractmethod
    def check_writable(self) -> None:
        """Try the store before anything is spent: writing, deleting, and that it decides races between writers.

        Raises:
            ValueError: One line that names the root, what is wrong, and what to change.
        """

    def __reduce__(self) -> tuple[object, ...]:
        # Clients and locks stay behind: a process that receives a store opens it anew.
        return open_store, (self.uri,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"


def open_store(uri: str) -> ObjectStore:
    """Open an object store; nothing is touched until it is used.

    Args:
        uri: A folder's path, ``file:///folder``, or ``s3://bucket/prefix``. S3's endpoint, region and credentials are
            found as boto3 finds them: environment, profile, instance role.

    Raises:
        ValueError: The URI is none of these.
    """
    # The backends import this module, and boto3 takes a while: each is imported when it is asked for.
    scheme, separator, rest = uri.partition("://")
    if separator and scheme == "s3":
        from infra.storage_s3 import S3Store

        bucket, _, prefix = rest.partition("/")
        return S3Store(bucket, prefix.strip("/"))
    if separator and scheme == "file":
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise ValueError(f"root: {uri!r} names another host; write file:///absolute/path")
        uri = unquote(parts.path)
    elif separator:
        raise ValueError(
            f"root: {uri!r} has the unknown scheme {scheme!r}; use a folder's path, file:///… or s3://bucket/prefix"
        )
    if not uri.strip():
        raise ValueError("root: '' is empty; give a folder's path, file:///… or s3://bucket/prefix")
    from infra.storage_folder import FolderStore

    return FolderStore(Path(uri))


def check_key(key: str) -> str:
    r"""Return a key unchanged if it is one.

    Raises:
        ValueError: It is empty or absolute, has an empty, ``.`` or ``..`` part, a backslash, a NUL, or a reserved name.
    """
    if not key or "\\" in key or "\0" in key:
        raise ValueError(f"key: {key!r} is no key; use a relative path with forward slashes")
    for part in key.split("/"):
        if part in ("", ".", ".."):
            raise ValueError(f"key: {key!r} has a part {part!r}; use a relative path without empty parts, '.' and '..'")
        if part.startswith(RESERVED_PREFIX):
            raise ValueError(f"key: {key!r} has a part {part!r}; names with {RESERVED_PREFIX!r} are the store's own")
    return key


def check_prefix(prefix: str) -> str:
    """Return the beginning of a key unchanged if some key can start with it; may be empty or end with a slash.

    Raises:
        ValueError: As in `check_key`.
    """
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix


def check_range(start: int, num_bytes: int) -> None:
    """Refuse negative ranges, which the backends would take in different ways.

    Raises:
        ValueError: One of them is negative.
    """
    if start < 0 or num_bytes < 0:
        raise ValueError(f"range: start={start}, num_bytes={num_bytes} must both be >= 0")


def check_upload_hash(path: Path, expected: str | None, actual: str) -> None:
    """Hold a file about to be uploaded against the hash that its maker gave it.

    Raises:
        ContractError: They differ.
    """
    if expected is not None and expected != actual:
        raise ContractError(
            f"{path}: its sha256 is {actual}, but {expected} was declared; was the file changed meanwhile?"
        )


def check_download(uri: str, expected: str | None, actual: str, expected_bytes: int, num_bytes: int) -> None:
    """Hold downloaded content against what it should be.

    Raises:
        TransientError: The size differs.
        DamagedObjectError: The hash differs.
    """
    if num_bytes != expected_bytes:
        raise TransientError(f"{uri}: {num_bytes} bytes arrived, expected {expected_bytes}")
    if expected is not None and expected != actual:
        raise DamagedObjectError(f"{uri}: the content's sha256 is {actual}, expected {expected}")


def sha256_of_bytes(data: bytes) -> str:
    """Return the sha256 of bytes as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path | str) -> str:
    """Return the sha256 of a file's content as 64 hexadecimal digits, reading it in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
