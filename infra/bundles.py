"""Bundles: immutable folders of files (checkpoints, exports, reports), true once their manifest is there.

A bundle is committed in one order only: every file uploaded and looked up again, then ``MANIFEST.json`` by
put-if-absent. So a writer may be killed anywhere and nothing half made is ever believed; and a reader, who checks every
file's sha256 against the manifest, takes no damaged one either.
"""

import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from infra.claims import CLAIM_NAME, Claim
from infra.errors import ContractError, TransientError
from infra.landing import check_space, keep_only, land_file, move_into_place, scratch_folder
from infra.reading import is_being_read, reading
from infra.storage import (
    AlreadyExistsError,
    ObjectNotFoundError,
    ObjectStore,
    check_key,
    sha256_of_bytes,
    sha256_of_file,
)

_log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST_NAME = "MANIFEST.json"

BundleKind = Literal["checkpoint", "export", "report"]
NameFilter = Callable[[str], bool]
OnProgress = Callable[[int, int], None]
"""Called with how many bytes are there, and how many there are in all."""

_DELETING_NAME = f"{MANIFEST_NAME}.deleting"
"""The manifest of a bundle that is being deleted, or was given back while it was."""

_OWN_NAMES = (MANIFEST_NAME, CLAIM_NAME, _DELETING_NAME)
_CHUNK_BYTES = 8 << 20
_NUM_DOWNLOADS = 4
_MAX_UPLOAD_ROUNDS = 5


class _Record(BaseModel):
    """Frozen, and a key that it does not know is an error: a newer format is refused, not half understood."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BundleFile(_Record):
    """One file of a bundle.

    Attributes:
        name: Relative to the bundle's prefix, with forward slashes; it cannot lead out of it.
        num_bytes: Size.
        sha256: Of the content, 64 hexadecimal digits.
    """

    name: str
    num_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("name")
    @classmethod
    def _stays_inside(cls, name: str) -> str:
        if name in _OWN_NAMES:
            raise ValueError(f"{name} is no file of a bundle")
        return check_key(name)


class BundleManifest(_Record):
    """A complete bundle.

    Attributes:
        format_version: Of this record.
        kind: What the bundle is.
        run_id: The training run that it belongs to.
        step: Optimizer step of that run.
        files: All of its files, sorted by name.
        metadata: What its maker had to say.
        created_at: ISO 8601, UTC.
        conditional_writes: Whether the store enforced put-if-absent when this was written.
        checksum: sha256 of this record without its checksum, so that a damaged manifest is known as such; None in those
            of older versions.
    """

    format_version: Literal[1] = FORMAT_VERSION
    kind: BundleKind
    run_id: str
    step: int = Field(ge=0)
    files: tuple[BundleFile, ...]
    metadata: dict[str, Any] = Field(default_factory=dict)
    created_at: str
    conditional_writes: bool = True
    checksum: str | None = None

    def sealed(self) -> "BundleManifest":
        """This record with its checksum."""
        return self.model_copy(update={"checksum": self._own_checksum()})

    def _own_checksum(self) -> str:
        return sha256_of_bytes(self.model_dump_json(exclude={"checksum"}).encode())

    @model_validator(mode="after")
    def _is_as_written(self) -> "BundleManifest":
        if self.checksum is not None and self.checksum != self._own_checksum():
            raise ValueError(f"its checksum is {self.checksum}, its content's {self._own_checksum()}: it is damaged")
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> "BundleManifest":
        names = [file.name for file in self.files]
        if len(set(names)) != len(names):
            raise ValueError("a file is listed twice")
        return self

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(file.num_bytes for file in self.files)


# ----------------------------------------------------------------------------------------------------------- writing


def commit_bundle(
    store: ObjectStore,
    prefix: str,
    folder: Path,
    *,
    kind: BundleKind,
    run_id: str,
    step: int,
    metadata: Mapping[str, Any] | None = None,
) -> BundleManifest:
    """Upload a folder's files, make sure that they arrived, and commit them by writing the manifest last.

    Doing it again has no effect: a bundle that is complete stays as it is. Of two writers at once one commits, and its
    manifest is returned to both.

    Args:
        store: Where to.
        prefix: The bundle's folder in the store.
        folder: Local files, at any depth; they must not change meanwhile.
        kind: What it is.
        run_id: The run that it belongs to.
        step: Of that run.
        metadata: JSON values to keep in the manifest.

    Returns:
        The manifest that stands in the store.

    Raises:
        ValueError: The folder has no files, or one named like the manifest.
        TransientError: The store did not keep the files.
    """
    done = find_bundle(store, prefix)
    if done is not None:
        return done
    paths = _files_of(folder)
    if not paths or paths.keys() & set(_OWN_NAMES):
        raise ValueError(f"bundle: {folder} must hold files, and none named {' or '.join(_OWN_NAMES)}")
    files = tuple(
        BundleFile(name=name, num_bytes=path.stat().st_size, sha256=sha256_of_file(path))
        for name, path in paths.items()
    )
    manifest = BundleManifest(
        kind=kind,
        run_id=run_id,
        step=step,
        files=files,
        metadata=dict(metadata or {}),
        created_at=datetime.now(UTC).isoformat(timespec="microseconds"),
        conditional_writes=store.conditional_writes,
    ).sealed()
    manifest_key = f"{prefix}/{MANIFEST_NAME}"
    # Writers of the same bytes may well upload them at once; others take turns.
    holder = sha256_of_bytes("".join(file.model_dump_json() for file in files).encode())
    claim = Claim(store, prefix, holder, lambda: store.exists(manifest_key))
    if not _upload(store, prefix, folder, files, claim):
        _log.info("%s: another writer committed first; its manifest stands", prefix)
        return load_bundle(store, prefix)
    with contextlib.suppress(AlreadyExistsError):
        store.put_if_absent(manifest_key, manifest.model_dump_json(indent=1).encode())
    claim.release()
    return load_bundle(store, prefix)


def _upload(store: ObjectStore, prefix: str, folder: Path, files: tuple[BundleFile, ...], claim: Claim) -> bool:
    """Upload files until a whole look finds every one as we left it.

    Args:
        store: Where to.
        prefix: The bundle's.
        folder: The local files.
        files: What to upload.
        claim: Held while we upload.

    Returns:
        False if somebody else committed the bundle: its files must not be touched.

    Raises:
        TransientError: The store does not keep them.
    """
    etags: dict[str, str] = {}
    for _ in range(_MAX_UPLOAD_ROUNDS):
        changed = [file for file in files if not _is_there(store, f"{prefix}/{file.name}", file, etags)]
        if not changed:
            return claim.hold(0)
        for file in changed:
            key = f"{prefix}/{file.name}"
            if not claim.hold(file.num_bytes):
                return False
            store.upload(key, folder / file.name, file.sha256)
            info = store.head(key)
            if info.num_bytes == file.num_bytes:
                etags[file.name] = info.etag
    raise TransientError(f"{store.uri_of(prefix)}: other writers keep replacing its files, or the store loses them")


def _is_there(store: ObjectStore, key: str, file: BundleFile, etags: dict[str, str]) -> bool:
    if file.name not in etags:
        return False
    try:
        info = store.head(key)
    except ObjectNotFoundError:
        return False
    if info.etag != etags[file.name] and hash_object(store, key) == (file.num_bytes, file.sha256):
        etags[file.name] = info.etag  # another writer of the same bytes
    return info.num_bytes == file.num_bytes and info.etag == etags[file.name]


def delete_bundle(store: ObjectStore, prefix: str, is_wanted: Callable[[], bool] = lambda: False) -> bool:
    """Delete a bundle, its manifest first: what is left, if we are killed, is no bundle; doing it again finishes it.

    Args:
        store: Where it is.
        prefix: The bundle's.
        is_wanted: Asked before, and again when the manifest is gone: whoever found the bundle complete may have begun
            to point to it meanwhile.

    Returns:
        False if somebody is reading it, or wants it, and it was left alone.
    """
    if is_being_read(store, prefix):
        return False
    if is_wanted():
        _restore(store, prefix)  # a deletion may have been killed before it could
        return False
    with contextlib.suppress(ObjectNotFoundError):
        store.put(f"{prefix}/{_DELETING_NAME}", store.read(f"{prefix}/{MANIFEST_NAME}"))
    store.delete(f"{prefix}/{MANIFEST_NAME}")
    may_go = False
    try:
        may_go = not (is_being_read(store, prefix) or is_wanted())  # who came meanwhile may have seen the manifest
    finally:
        if not may_go:  # also where nobody can say
            _restore(store, prefix)
    if not may_go:
        return False
    aside, claim = f"{prefix}/{_DELETING_NAME}", f"{prefix}/{CLAIM_NAME}"
    # Last the claim: it keeps others from making the bundle again meanwhile.
    for info in sorted(store.list(f"{prefix}/"), key=lambda info: (info.key == claim, info.key != aside)):
        store.delete(info.key)
    return True


def _restore(store: ObjectStore, prefix: str) -> None:
    """Makes a bundle complete again of which a deletion took no more than the manifest."""
    aside = f"{prefix}/{_DELETING_NAME}"
    try:
        data = store.read(aside)
    except ObjectNotFoundError:
        return
    sizes = {info.key: info.num_bytes for info in store.list(f"{prefix}/")}
    files = parse_manifest(data, store.uri_of(aside)).files
    if all(sizes.get(f"{prefix}/{file.name}") == file.num_bytes for file in files):
        with contextlib.suppress(AlreadyExistsError):
            store.put_if_absent(f"{prefix}/{MANIFEST_NAME}", data)
    store.delete(aside)


def _files_of(folder: Path) -> dict[str, Path]:
    """Name → path of every file below a folder, sorted by name."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return dict(sorted(found.items()))


# ----------------------------------------------------------------------------------------------------------- reading


def parse_manifest(data: bytes, uri: str) -> BundleManifest:
    """Read a manifest's bytes.

    Args:
        data: The content of a ``MANIFEST.json``.
        uri: Where it was found, for the message.

    Raises:
        ContractError: It is not a bundle's manifest of a format that this version reads.
    """
    try:
        return BundleManifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise ContractError(
            f"{uri}: not a bundle's manifest of format {FORMAT_VERSION} "
            f"({'.'.join(map(str, first['loc'])) or 'whole'}: {first['msg']})"
        ) from error


def load_bundle(store: ObjectStore, prefix: str) -> BundleManifest:
    """Read a bundle's manifest.

    Raises:
        ObjectNotFoundError: There is none: the bundle is not complete.
        ContractError: It cannot be read.
    """
    key = f"{prefix}/{MANIFEST_NAME}"
    return parse_manifest(store.read(key), store.uri_of(key))


def find_bundle(store: ObjectStore, prefix: str) -> BundleManifest | None:
    """Return the bundle's manifest, or None where there is no complete bundle."""
    try:
        return load_bundle(store, prefix)
    except ObjectNotFoundError:
        return None


def list_bundles(store: ObjectStore, parent_prefix: str) -> list[str]:
    """Return the prefixes of the complete bundles below a prefix, sorted (steps are zero-padded: oldest first)."""
    end = f"/{MANIFEST_NAME}"
    keys = (info.key for info in store.list(f"{parent_prefix.rstrip('/')}/"))
    return sorted(key.removesuffix(end) for key in keys if key.endswith(end))


def verify_bundle(store: ObjectStore, prefix: str) -> list[str]:
    """Read every file of a bundle again and hold it against the manifest.

    Returns:
        One line for each problem; empty if there is none.

    Raises:
        ObjectNotFoundError: There is no complete bundle.
    """
    problems = []
    for file in load_bundle(store, prefix).files:
        key = f"{prefix}/{file.name}"
        try:
            num_bytes, sha256 = hash_object(store, key)
        except ObjectNotFoundError:
            problems.append(f"{store.uri_of(key)}: is missing")
            continue
        if num_bytes != file.num_bytes:
            problems.append(f"{store.uri_of(key)}: has {num_bytes} bytes, the manifest says {file.num_bytes}")
        elif sha256 != file.sha256:
            problems.append(f"{store.uri_of(key)}: has sha256 {sha256}, the manifest says {file.sha256}")
    return problems


def hash_object(store: ObjectStore, key: str) -> tuple[int, str]:
    """Size and sha256 of an object, read piece by piece."""
    digest = hashlib.sha256()
    num_bytes = 0
    while chunk := store.read_range(key, num_bytes, _CHUNK_BYTES):
        digest.update(chunk)
        num_bytes += len(chunk)
        if len(chunk) < _CHUNK_BYTES:  # a range beyond the end is an error on some servers
            break
    return num_bytes, digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------- fetching


def fetch_bundle(store: ObjectStore, prefix: str, to: Path, names: NameFilter | None = None) -> BundleManifest:
    """Bring a bundle to a local folder, which appears only once it is whole and verified.

    A folder that holds the bundle already, by every sha256, is left as it is. One that an earlier fetch made is
    replaced in one step; anything else that is there is not touched. A fetch that was killed, or that the network
    ended, is gone on with by the next one: files that are complete stay, large ones go on from their bytes.

    Args:
        store: Where from.
        prefix: The bundle's.
        to: The folder to make; its parent is made if need be.
        names: Which files are wanted, by name; None for all. ``MANIFEST.json`` is always written.

    Returns:
        The manifest, of all files.

    Raises:
        ObjectNotFoundError: There is no complete bundle, or one of its files is gone.
        ValueError: ``to`` holds something else, or there is no room.
        TransientError: A file is not what the manifest says.
    """
    key = f"{prefix}/{MANIFEST_NAME}"
    data = store.read(key)
    manifest = parse_manifest(data, store.uri_of(key))
    if manifest.kind == "report":  # these are never deleted
        return fetch_files(store, prefix, data, to, names)
    with reading(store, prefix, manifest.num_bytes):
        return fetch_files(store, prefix, store.read(key), to, names)


def fetch_files(
    store: ObjectStore,
    prefix: str,
    manifest_data: bytes,
    to: Path,
    names: NameFilter | None = None,
    on_progress: OnProgress | None = None,
) -> BundleManifest:
    """`fetch_bundle` with a manifest that was read, and perhaps checked, before; ``on_progress`` hears of the bytes."""
    manifest = parse_manifest(manifest_data, store.uri_of(f"{prefix}/{MANIFEST_NAME}"))
    to = Path(os.path.abspath(to.expanduser()))
    wanted = [file for file in manifest.files if names is None or names(file.name)]
    if holds_files(to, manifest_data, wanted):
        _log.info("%s: already there", to)
        return manifest
    _check_replaceable(to)
    to.parent.mkdir(parents=True, exist_ok=True)
    tally = _Tally(sum(file.num_bytes for file in wanted), on_progress)
    with scratch_folder(to, sha256_of_bytes(manifest_data)[:32]) as scratch:
        keep_only(scratch, {file.name for file in wanted})
        check_space(scratch, tally.num_total - sum(p.stat().st_size for p in scratch.rglob("*") if p.is_file()))
        with ThreadPoolExecutor(_NUM_DOWNLOADS) as pool:
            tasks = [
                pool.submit(
                    land_file,
                    store,
                    f"{prefix}/{file.name}",
                    scratch / file.name,
                    file.num_bytes,
                    file.sha256,
                    scratch,
                    tally.add,
                )
                for file in wanted
            ]
            try:
                for task in tasks:
                    task.result()
            except BaseException:
                tally.is_over = True
                pool.shutdown(cancel_futures=True)  # one bad file, or Ctrl-C: the others are for nothing
                raise
        with open(scratch / MANIFEST_NAME, "wb") as file:  # the others were made durable when they came
            file.write(manifest_data)
            file.flush()
            os.fsync(file.fileno())
        _check_replaceable(to)
        move_into_place(scratch, to)
    return manifest


class _Tally:
    """Adds up what several threads have fetched, and tells it."""

    def __init__(self, num_total: int, on_progress: OnProgress | None) -> None:
        self.num_total = num_total
        self.is_over = False
        self._num_done = 0
        self._on_progress = on_progress
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        """So many more are there.

        Raises:
            TransientError: It was given up meanwhile, and there is no use in going on.
        """
        if self.is_over:
            raise TransientError("another file could not be fetched, or the fetch was interrupted")
        with self._lock:
            self._num_done += num_bytes
            if self._on_progress is not None:
                self._on_progress(self._num_done, self.num_total)


def holds_files(folder: Path, manifest_data: bytes, files: list[BundleFile]) -> bool:
    """Return whether a folder was made from exactly this manifest and holds these files, by their sha256."""
    path = folder / MANIFEST_NAME
    if not path.is_file() or path.read_bytes() != manifest_data:
        return False
    return all(
        (folder / file.name).is_file()
        and (folder / file.name).stat().st_size == file.num_bytes
        and sha256_of_file(folder / file.name) == file.sha256
        for file in files
    )


def _check_replaceable(folder: Path) -> None:
    """Refuse to replace anything but an earlier fetch: a manifest of ours, and no file that it does not name.

    Raises:
        ValueError: There is something else.
    """
    advice = "choose another folder, or move this one away"
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError(f"to: '{folder}' is not a folder; {advice}")
    if not any(folder.iterdir()):
        return
    try:
        manifest = parse_manifest((folder / MANIFEST_NAME).read_bytes(), str(folder))
    except (FileNotFoundError, ContractError):
        raise ValueError(f"to: '{folder}' exists and is not an earlier pull; {advice}") from None
    strange = sorted(set(_files_of(folder)) - {MANIFEST_NAME, *(file.name for file in manifest.files)})
    if strange:
        raise ValueError(f"to: '{folder}' is an earlier pull, but '{strange[0]}' is not of it; {advice}")


def manifest_sha256(store: ObjectStore, prefix: str) -> str:
    """Return the sha256 of a bundle's manifest, which by the hashes in it identifies the whole bundle.

    Raises:
        ObjectNotFoundError: There is no complete bundle.
    """
    return sha256_of_bytes(store.read(f"{prefix}/{MANIFEST_NAME}"))
