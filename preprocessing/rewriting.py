"""Files of complete datasets written again with less in them, and what was in them deleted.

A dataset keeps its digest and its folder: its manifest is replaced, by compare-and-swap, by one that names the new
files, and that says what is missing (`DatasetFile.removed`, `DatasetFile.without`). The places of all other rows stay
what they were, so a training that is under way goes on afterwards as if nothing had been.

First the new files are written, under names that carry their hash, then every manifest that names an old one is
replaced, then reports, and then the old files are deleted: each that no manifest and no report names any more. Whoever
is killed in between has done no harm, and the next call ends what it began. One process does it at a time: another
waits, a minute or two where the first was killed.
"""

import logging
import re
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from infra.claims import Claim
from infra.errors import TransientError
from infra.storage import ConflictError, ObjectNotFoundError, ObjectStore, sha256_of_file
from preprocessing.contracts.manifest import (
    MANIFEST_NAME,
    CommittedShard,
    DatasetFile,
    Manifest,
    ShardReport,
    parse_manifest,
)
from preprocessing.forgotten import complete_datasets
from preprocessing.references import reports_of

LOGGER = logging.getLogger(__name__)

Rewrite = Callable[[str, ShardReport, Path], ShardReport | None]
"""Of a manifest's prefix, one of its shards and an empty folder: the shard with other files, uploaded already; None
where it is to stay as it is."""

CLAIM_PREFIX: Final = "ledger/rewriting"

_NUM_TRIES: Final = 8
_HASH: Final = re.compile(r"-[0-9a-f]{12}$")
_HASH_CHARS: Final = 12


@dataclass(frozen=True)
class Rewritten:
    """What came of it.

    Attributes:
        datasets: Keys of the folders of the datasets whose manifests were replaced.
        num_written: Files that were written.
        num_deleted: Files that were deleted.
    """

    datasets: tuple[str, ...]
    num_written: int
    num_deleted: int


def rewrite_shards(store: ObjectStore, rewrite: Rewrite, scratch: Path, only: Iterable[str] | None = None) -> Rewritten:
    """Replaces shards of complete datasets.

    Args:
        store: Where they stand.
        rewrite: Makes a shard's new files; asked once for shards that name the same files.
        scratch: A folder for files on their way.
        only: Keys of the folders of the datasets whose manifests may be replaced; None: of all.

    Raises:
        ContractError: A manifest or a file cannot be read; what is done is kept.
        TransientError: The store failed, or others were always quicker; what is done is kept.
    """
    claim = Claim(store, CLAIM_PREFIX, uuid.uuid4().hex, lambda: False)
    claim.hold(0)
    try:
        return _rewrite(store, rewrite, scratch, None if only is None else frozenset(only), claim)
    finally:
        claim.release()


def _rewrite(
    store: ObjectStore, rewrite: Rewrite, scratch: Path, only: frozenset[str] | None, claim: Claim
) -> Rewritten:
    made: dict[tuple[str, ...], ShardReport | None] = {}
    changed: list[str] = []
    old: set[str] = set()

    def rewrite_once(prefix: str, shard: ShardReport) -> ShardReport | None:
        keys = tuple(file.key(prefix) for file in shard.files)
        if keys not in made:
            claim.hold(sum(file.num_bytes for file in shard.files))
            made[keys] = rewrite(prefix, shard, scratch)
        return made[keys]

    for prefix, _ in list(complete_datasets(store)):
        if only is None or prefix in only:
            is_changed, replaced = _rewrite_dataset(store, prefix, rewrite_once)
            changed += [prefix] if is_changed else []
            old |= replaced
    num_written = sum(
        file.name not in {key.rpartition("/")[2] for key in keys}
        for keys, report in made.items()
        if report is not None
        for file in report.files
    )
    claim.hold(0)
    return Rewritten(tuple(changed), num_written, _delete_unnamed(store, old | _left_over(store, only)))


def _rewrite_dataset(
    store: ObjectStore, prefix: str, rewrite_once: Callable[[str, ShardReport], ShardReport | None]
) -> tuple[bool, set[str]]:
    """Replaces a manifest, if need be; says whether, and gives the keys of the files that it does not name any more."""
    key = f"{prefix}/{MANIFEST_NAME}"
    for _ in range(_NUM_TRIES):
        try:
            data, etag = store.read_with_etag(key)
        except ObjectNotFoundError:
            return False, set()
        manifest = parse_manifest(data, store.uri_of(key))
        shards = tuple(_as_named_by(prefix, shard, rewrite_once(prefix, shard)) for shard in manifest.shards)
        new_shards = [new for new, old in zip(shards, manifest.shards, strict=True) if new is not old]
        if not new_shards:
            return False, set()
        replaced = manifest.model_copy(update={"shards": shards})
        try:
            store.compare_and_swap(key, replaced.model_dump_json(indent=1).encode(), etag)
        except ConflictError:  # somebody else replaced it: look again
            continue
        for shard in new_shards:
            _replace_report(store, prefix, manifest, shard)
        return True, _named_by(prefix, manifest) - _named_by(prefix, replaced)
    raise TransientError(f"{store.uri_of(key)}: it was replaced {_NUM_TRIES} times while it was to be")


def _as_named_by(prefix: str, shard: ShardReport, made: ShardReport | None) -> ShardReport:
    """The new files as a dataset's manifest names them: they stand where the old ones do."""
    if made is None:
        return shard
    places = [file.folder for file in shard.files]
    folder = next((place for place in places if place is not None), None)
    files = tuple(file.model_copy(update={"folder": None if folder == prefix else folder}) for file in made.files)
    return made.model_copy(update={"files": files, "index": shard.index, "digest": shard.digest})


def _replace_report(store: ObjectStore, prefix: str, manifest: Manifest, shard: ShardReport) -> None:
    committed = CommittedShard(
        stage=manifest.stage,
        stage_version=manifest.stage_version,
        digest=manifest.digest,
        parents=manifest.parents,
        report=shard,
    )
    key = f"{prefix}/reports/shard-{shard.index:05d}.json"
    if store.exists(key):  # of a dataset that came from elsewhere there may be none
        store.put(key, committed.model_dump_json(indent=1).encode())


def upload_smaller(
    store: ObjectStore, prefix: str, file: DatasetFile, path: Path, changes: dict[str, object]
) -> DatasetFile:
    """Uploads what takes a file's place, beside it, under a name that carries its hash; removes it from scratch.

    Args:
        store: Where to.
        prefix: Of the dataset whose manifest names the file.
        file: The old one.
        path: The new one.
        changes: What the manifest is to say of it beside its name, size and hash.
    """
    sha256 = sha256_of_file(path)
    name = f"{_HASH.sub('', file.name.removesuffix('.parquet'))}-{sha256[:_HASH_CHARS]}.parquet"
    entry = file.model_copy(update={"name": name, **changes})
    uploaded = store.upload(entry.key(prefix), path, sha256)
    path.unlink()
    return entry.model_copy(update={"num_bytes": uploaded.num_bytes, "sha256": uploaded.sha256})


def _left_over(store: ObjectStore, only: frozenset[str] | None) -> set[str]:
    """Files of rewritten datasets that their manifests do not name: of calls that were killed before they deleted."""
    found: set[str] = set()
    for prefix, manifest in complete_datasets(store):
        files = [file for shard in manifest.shards for file in shard.files]
        if (only is None or prefix in only) and any(file.removed or file.without for file in files):
            folders = {prefix, *(file.folder for file in files if file.folder is not None)}
            found |= {key for folder in folders for key in _row_files(store, folder)} - _named_by(prefix, manifest)
    return found


def _row_files(store: ObjectStore, folder: str) -> set[str]:
    names = (info.key for info in store.list(f"{folder}/"))
    return {key for key in names if key.endswith(".parquet") and "/" not in key.removeprefix(f"{folder}/")}


def _delete_unnamed(store: ObjectStore, keys: set[str]) -> int:
    """Deletes those of some files that neither a manifest nor a report of a dataset in progress names."""
    if not keys:
        return 0
    complete = dict(complete_datasets(store))
    named: set[str] = set()
    for prefix, manifest in complete.items():
        named |= _named_by(prefix, manifest)
    for stage in store.list_folders("datasets/"):
        for name in store.list_folders(f"datasets/{stage}/"):
            prefix = f"datasets/{stage}/{name}"
            if prefix not in complete:
                named = named.union(*(_keys(prefix, report) for report in reports_of(store, prefix)))
                keys = {key for key in keys if not key.startswith(f"{prefix}/")}  # its own run sweeps it
    deleted = keys - named
    for key in sorted(deleted):
        LOGGER.info("%s: deleted", store.uri_of(key))
        store.delete(key)
    return len(deleted)


def _named_by(prefix: str, manifest: Manifest) -> set[str]:
    own = {f"{prefix}/{file.name}" for file in manifest.extra_files}
    return own.union(*(_keys(prefix, shard) for shard in manifest.shards))


def _keys(prefix: str, report: ShardReport) -> set[str]:
    return {file.key(prefix) for file in report.files}
