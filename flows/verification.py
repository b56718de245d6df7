"""Whether a dataset or bundle is whole: every byte is read again and held against its manifest. No prefect, no torch.

A file that nothing names is a problem, too: readers that follow the manifest never open it, but a glob over the
folder (``train-*.parquet``) does.
"""

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

from flows.progress import listener
from flows.store import base_folder, locate, read_any
from infra.bundles import BundleFile, BundleManifest
from infra.channels import ChannelPointer, read_channel
from infra.claims import CLAIM_NAME
from infra.reading import LEASE_PREFIX, reading
from infra.storage import ObjectNotFoundError, ObjectStore, sha256_of_bytes
from preprocessing.contracts.config import ModelConfig
from preprocessing.contracts.display import bytes_text
from preprocessing.contracts.manifest import DRIFT_PREFIX, MANIFEST_NAME, DatasetFile, Manifest, dataset_prefix
from preprocessing.references import references_to

_CHUNK_BYTES = 8 << 20
_NUM_THREADS = 8

OnProgress = Callable[[int, int, int, int], None]
"""Told files done, files in all, bytes done, bytes in all."""


@dataclass(frozen=True)
class Problem:
    """One file that is not as it should be.

    Attributes:
        kind: ``missing``, ``bad`` (other bytes than the manifest says), ``foreign`` (nothing names it), ``manifest``
            (the manifest itself is not what names it says), ``differs`` (a row is not what encoding it gives).
        uri: Of the file.
        detail: What is wrong, in a few words.
    """

    kind: Literal["missing", "bad", "foreign", "manifest", "differs"]
    uri: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.uri}: {self.detail}"


@dataclass(frozen=True)
class Rows:
    """Rows that were encoded again.

    Attributes:
        num_compared: How many.
        num_identical: Those of which every byte was the same; others may be off by what another machine may be.
        columns: What was compared.
        not_compared: Columns that could not be, and why.
    """

    num_compared: int
    num_identical: int
    columns: tuple[str, ...]
    not_compared: dict[str, str]


@dataclass(frozen=True)
class Verification:
    """What was read, and what was wrong.

    Attributes:
        uri: Of the folder.
        num_files: That the manifest names.
        num_bytes: That were read.
        problems: The manifest's own first, then in the manifest's order, then what nothing names.
        rows: What came of encoding rows again; None if none were.
    """

    uri: str
    num_files: int
    num_bytes: int
    problems: tuple[Problem, ...]
    rows: Rows | None = None


def verify_uri(uri: str, root: str, *, num_rows: int | None = None, base: str | None = None) -> Verification:
    """Verifies what a user named, and tells whoever listens how far it is.

    Args:
        uri: As for `flows.store.locate`.
        root: The store's root, for keys and channels.
        num_rows: Rows of an encode dataset to encode again; only if its files are what they should be.
        base: Base weights, as ``model.base``, by which it was encoded; None to look for them on this machine.

    Raises:
        ValueError: It names nothing, or its rows cannot be encoded again here.
        TransientError: The store does not answer.
    """
    store, prefix = locate(uri, root)
    pointer = None if "/" in uri else read_channel(store, uri)
    manifest = read_any(store, prefix)
    num_bytes = sum(file.num_bytes for file in _files_of(manifest))

    def tell(num_done: int, num_files: int, num_read: int, num_bytes: int) -> None:
        listener().advance("verify", num_done, num_files, f"files, {bytes_text(num_read)} of {bytes_text(num_bytes)}")

    # A checkpoint may be deleted when there are newer ones: not while it is read. Datasets are never deleted so.
    lease = reading(store, prefix, num_bytes) if isinstance(manifest, BundleManifest) else contextlib.nullcontext()
    deep = None if num_rows is None else (num_rows, *_base_of(prefix, manifest, base))
    with lease:
        found = verify(store, prefix, read_any(store, prefix), pointer=pointer, on_progress=tell)
    if deep is None or found.problems:
        return found
    num_rows, dataset, model = deep
    return _verify_rows(store, found, dataset, model, num_rows)


def verify(
    store: ObjectStore,
    prefix: str,
    manifest: Manifest | BundleManifest,
    *,
    pointer: ChannelPointer | None = None,
    on_progress: OnProgress | None = None,
) -> Verification:
    """Reads every file that a manifest names, several at once, and compares its size and sha256.

    Args:
        store: Where it is.
        prefix: Key of its folder.
        manifest: As it stands there.
        pointer: Of the channel by which it was named; its sha256 of the manifest is compared, too.
        on_progress: Called after each piece, from several threads, one at a time.

    Raises:
        TransientError: The store does not answer; nothing is said of the files then.
    """
    files = _files_of(manifest)
    problems = [*_manifest_problems(store, prefix, manifest, pointer)]
    counter = _Counter(len(files), sum(file.num_bytes for file in files), on_progress)
    with ThreadPoolExecutor(min(_NUM_THREADS, 2 * (os.cpu_count() or 1))) as pool:
        tasks = [pool.submit(_check, store, _key(prefix, file), file, counter) for file in files]
        try:
            found = [task.result() for task in tasks]
        except BaseException:  # Ctrl-C, or a store that is gone: the other files are for nothing
            counter.stop()
            pool.shutdown(cancel_futures=True)
            raise
    problems += [problem for problem in found if problem is not None]
    own = {_key(prefix, file).removeprefix(f"{prefix}/") for file in files}
    problems += _foreign(store, prefix, manifest, own)
    return Verification(store.uri_of(prefix), len(files), counter.num_bytes, tuple(problems))


def _base_of(prefix: str, manifest: Manifest | BundleManifest, base: str | None) -> tuple[Manifest, ModelConfig]:
    """An encode dataset, and the base weights by which it was encoded.

    Raises:
        ValueError: It is no such dataset, or they are not here; asked before everything is read.
    """
    if not isinstance(manifest, Manifest) or manifest.stage != "encode":
        kind = f"a {manifest.stage} dataset" if isinstance(manifest, Manifest) else f"a bundle ({manifest.kind})"
        raise ValueError(f"--deep: {prefix} is {kind}; give an encode dataset, or leave --deep out")
    from preprocessing.known_bases import find_base

    try:
        parts = {"vae": "latents", "open_clip": "text"}
        sha256s = {part: str(manifest.specs[spec]["weights_sha256"]) for part, spec in parts.items()}
    except KeyError as error:
        raise ValueError(f"--deep: {prefix} has no {error} in its specs; encode it again with this version") from None
    folder = find_base(sha256s, [] if base is None else [base_folder(base)])
    if folder is None:
        raise ValueError(
            f"--base: no base weights with VAE sha256 {sha256s['vae'][:16]}… and text encoder sha256 "
            f"{sha256s['open_clip'][:16]}… are on this machine; name those that {prefix} was encoded with"
        )
    return manifest, ModelConfig(base=str(folder), base_prediction_type="epsilon")  # the UNet is not asked


def _verify_rows(
    store: ObjectStore, found: Verification, manifest: Manifest, model: ModelConfig, num_rows: int
) -> Verification:
    from preprocessing.verify_rows import check_rows

    listener().advance("encode", 0, 1, f"{num_rows} rows again")
    check = check_rows(store, manifest, model, num_rows, seed=time.time_ns())
    listener().finish("encode", f"{check.num_rows} rows again")
    problems = [
        Problem(
            "differs",
            f"{found.uri}/{item.file}",
            f"row {item.uid}: {item.column} is off by {item.distance:.3g} of what encoding it again gives",
        )
        for item in check.differences
        if not item.is_within_tolerance
    ]
    rows = Rows(
        num_compared=check.num_rows,
        num_identical=check.num_rows - len({item.uid for item in check.differences}),
        columns=check.columns,
        not_compared=dict(check.not_compared),
    )
    return replace(found, problems=tuple(problems), rows=rows)


class _Counter:
    """Counts what several threads have read, and tells."""

    def __init__(self, num_files: int, total_bytes: int, tell: OnProgress | None) -> None:
        self._lock = threading.Lock()
        self._num_done, self._num_files, self._total_bytes = 0, num_files, total_bytes
        self._tell = tell
        self.num_bytes = 0
        self.stopped = False

    def add(self, num_bytes: int, *, is_done: bool) -> None:
        with self._lock:
            self.num_bytes += num_bytes
            self._num_done += is_done
            if self._tell is not None:
                self._tell(self._num_done, self._num_files, self.num_bytes, self._total_bytes)

    def stop(self) -> None:
        self.stopped = True


def _files_of(manifest: Manifest | BundleManifest) -> Sequence[DatasetFile | BundleFile]:
    if isinstance(manifest, BundleManifest):
        return manifest.files
    return [*(file for shard in manifest.shards for file in shard.files), *manifest.extra_files]


def _key(prefix: str, file: DatasetFile | BundleFile) -> str:
    """Where a file stands: that of a dataset perhaps in another one's folder."""
    return file.key(prefix) if isinstance(file, DatasetFile) else f"{prefix}/{file.name}"


def _manifest_problems(
    store: ObjectStore, prefix: str, manifest: Manifest | BundleManifest, pointer: ChannelPointer | None
) -> Iterator[Problem]:
    uri = store.uri_of(f"{prefix}/{MANIFEST_NAME}")
    if isinstance(manifest, Manifest):
        own = dataset_prefix(manifest.stage, manifest.digest)
        if own != prefix:
            yield Problem("manifest", uri, f"it is of {own}, not of this folder")
    if pointer is not None:
        found = sha256_of_bytes(store.read(f"{prefix}/{MANIFEST_NAME}"))
        if found != pointer.manifest_sha256:
            yield Problem(
                "manifest", uri, f"its sha256 is {found}; channel {pointer.channel} says {pointer.manifest_sha256}"
            )


def _check(store: ObjectStore, key: str, file: DatasetFile | BundleFile, counter: _Counter) -> Problem | None:
    digest = hashlib.sha256()
    num_bytes = 0
    try:
        while not counter.stopped and (chunk := store.read_range(key, num_bytes, _CHUNK_BYTES)):
            digest.update(chunk)
            num_bytes += len(chunk)
            counter.add(len(chunk), is_done=False)
            if len(chunk) < _CHUNK_BYTES:
                break
    except ObjectNotFoundError:
        counter.add(0, is_done=True)
        return Problem("missing", store.uri_of(key), "the manifest names it, and it is not there")
    counter.add(0, is_done=True)
    if num_bytes != file.num_bytes:
        return Problem("bad", store.uri_of(key), f"has {num_bytes} bytes, the manifest says {file.num_bytes}")
    if digest.hexdigest() != file.sha256:
        return Problem("bad", store.uri_of(key), f"has sha256 {digest.hexdigest()}, the manifest says {file.sha256}")
    return None


def _foreign(
    store: ObjectStore, prefix: str, manifest: Manifest | BundleManifest, named: set[str]
) -> Iterator[Problem]:
    known = {MANIFEST_NAME, CLAIM_NAME, *named}
    if isinstance(manifest, Manifest):
        known |= {f"reports/shard-{shard.index:05d}.json" for shard in manifest.shards}
    strange = [
        info
        for info in store.list(f"{prefix}/")
        if (name := info.key.removeprefix(f"{prefix}/")) not in known
        and not name.startswith((LEASE_PREFIX, DRIFT_PREFIX))
    ]
    others = references_to(store, prefix) if strange and isinstance(manifest, Manifest) else {}
    for info in strange:
        if info.key not in others:
            detail = f"{info.num_bytes} bytes that nothing names; no reader of ours opens it: delete it"
            yield Problem("foreign", store.uri_of(info.key), detail)
