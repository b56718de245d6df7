"""Raw pictures deleted once they are encoded; what is known of each row stays.

The rows of a download dataset are written again without the column ``image``: uid, address, caption, sizes and sha256
remain, so a refresh still knows which rows it has, and an encoded dataset keeps its lineage. The manifest says what is
missing (`DatasetFile.without`). Who needs the pictures again asks `check_pictures`, or has them downloaded anew:
`reopen` makes the dataset incomplete, and the download stage does the rest.
"""

import logging
import tempfile
from collections.abc import Container, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.errors import ContractError
from infra.reading import is_being_read
from infra.storage import ObjectNotFoundError, ObjectStore, sha256_of_file
from preprocessing.contracts.config import RetentionConfig
from preprocessing.contracts.manifest import (
    MANIFEST_NAME,
    DatasetFile,
    Manifest,
    ShardReport,
    dataset_prefix,
    find_manifest,
)
from preprocessing.download.stage import PARTIAL
from preprocessing.forgotten import complete_datasets
from preprocessing.references import committed_shards
from preprocessing.reuse import Previous, PreviousRows, have_same_rows
from preprocessing.rewriting import Rewritten, rewrite_shards, upload_smaller
from preprocessing.stage import PARQUET_WRITER
from preprocessing.stored_parquet import open_parquet

LOGGER = logging.getLogger(__name__)

PICTURES: Final = "image"

_UNFINISHED: Final = timedelta(days=30)


def has_pictures(manifest: Manifest) -> bool:
    """Whether a download dataset has its pictures, all of them."""
    return not any(PICTURES in file.without for file in manifest.files("rows"))


def check_pictures(manifest: Manifest) -> None:
    """Makes sure that a download dataset still has its pictures.

    Raises:
        ContractError: It has not; says how to get them.
    """
    if not has_pictures(manifest):
        prefix = dataset_prefix(manifest.stage, manifest.digest)
        raise ContractError(
            f"{prefix}: its pictures were deleted once they were encoded; `lacuna prepare` downloads them again, and "
            "retention.keep_pictures=true keeps them"
        )


def are_pictures_needed(store: ObjectStore, downloaded: Manifest, previous: Previous | None) -> bool:
    """Whether a download has to get pictures again that were deleted, so that it can be encoded.

    Args:
        store: Where it stands.
        downloaded: Its manifest; it is not encoded yet.
        previous: The earlier download of which it took rows over, where a refresh is under way: what stands in that
            one's encoded dataset needs no picture.
    """
    prefix = dataset_prefix(downloaded.stage, downloaded.digest)
    bare = [file for file in downloaded.files("rows") if PICTURES in file.without]
    if not bare:
        return False
    encoded = None if previous is None or previous.encoded is None else find_manifest(store, previous.encoded)
    if previous is None or previous.encoded is None or encoded is None:
        return True
    if have_same_rows(store, (previous.prefix, previous.manifest), (prefix, downloaded)):
        return False  # then the earlier one's encoded dataset is this one's
    its, ours = previous.manifest, downloaded
    if (its.stage_version, its.config) != (ours.stage_version, ours.config):
        return True
    rows = PreviousRows(store, previous.encoded, encoded, "uid")
    return any(_has_bare_row(store, file.key(prefix), rows) for file in bare)


def _has_bare_row(store: ObjectStore, key: str, encoded: PreviousRows) -> bool:
    """Whether a file has a row without a picture that is not encoded."""
    with open_parquet(store, key) as parquet:
        is_missing = encoded.find(parquet.read(["uid"]).column("uid"))[:, 0] < 0
        if not is_missing.any() or PICTURES not in parquet.schema_arrow.names:
            return bool(is_missing.any())
        sizes = pc.call_function("binary_length", [parquet.read([PICTURES]).column(PICTURES)])
        return bool((is_missing & (sizes.to_numpy() == 0)).any())


def delete_pictures(
    store: ObjectStore, downloaded: Manifest, config: RetentionConfig, now: datetime | None = None
) -> Rewritten:
    """Deletes the pictures of a download dataset, and of older ones of the same config, that are encoded.

    Those of a dataset that is being encoded in another way stay: whoever encodes holds a lease, and what an encoding
    has committed tells of it even where it was killed. One that was left unfinished holds them for a month at most.

    Args:
        store: Where the datasets stand.
        downloaded: The manifest of the dataset.
        config: Whether, and after how many days.
        now: The time; UTC.

    Raises:
        TransientError: The store failed; the next call goes on.
    """
    if config.keep_pictures:
        return Rewritten((), 0, 0)
    complete = dict(complete_datasets(store))
    encoded = {found.parents.get("download") for found in complete.values() if found.stage == "encode"}
    now = now or datetime.now(UTC)
    made_before = now - timedelta(days=config.keep_pictures_days)
    due = [
        prefix
        for prefix, found in complete.items()
        if found.stage == "download"
        and found.config == downloaded.config
        and found.digest in encoded
        and datetime.fromisoformat(found.created_at) <= made_before
        and any(_may_hold_pictures(file) for file in found.files("rows"))
    ]
    unfinished = _being_encoded(store, complete) if due else {}
    left = [prefix for prefix in due if not _is_held(store, prefix, complete[prefix], unfinished, now)]
    return _delete(store, left) if left else Rewritten((), 0, 0)


def _being_encoded(store: ObjectStore, complete: Container[str]) -> dict[str, str]:
    """Digest of a download → key of the folder of an encoding of it that is begun and not complete."""
    found: dict[str, str] = {}
    for name in store.list_folders("datasets/encode/"):
        prefix = f"datasets/encode/{name}"
        first = None if prefix in complete else next(committed_shards(store, prefix), None)
        if first is not None:
            found[first.parents.get("download", "")] = prefix
    return found


def _is_held(
    store: ObjectStore, prefix: str, downloaded: Manifest, unfinished: Mapping[str, str], now: datetime
) -> bool:
    if is_being_read(store, prefix):
        LOGGER.info("%s: it is being encoded; its pictures are deleted another time", store.uri_of(prefix))
        return True
    holder = unfinished.get(downloaded.digest)
    if holder is None or datetime.fromisoformat(downloaded.created_at) <= now - _UNFINISHED:
        return False
    LOGGER.info(
        "%s: its pictures stay, for %s is not complete; end that encoding, or delete its folder",
        store.uri_of(prefix), store.uri_of(holder),
    )  # fmt: skip
    return True


def _delete(store: ObjectStore, prefixes: Iterable[str]) -> Rewritten:
    def rewrite(prefix: str, shard: ShardReport, scratch: Path) -> ShardReport | None:
        files = tuple(_without_pictures(store, prefix, file, scratch) for file in shard.files)
        return None if files == shard.files else shard.model_copy(update={"files": files})

    with tempfile.TemporaryDirectory(prefix="lacuna-retention-") as folder:
        return rewrite_shards(store, rewrite, Path(folder), only=prefixes)


def _without_pictures(store: ObjectStore, prefix: str, file: DatasetFile, scratch: Path) -> DatasetFile:
    if file.kind != "rows" or not _may_hold_pictures(file):
        return file
    try:
        table = _other_columns(store, file.key(prefix), file, scratch)
    except (ContractError, ObjectNotFoundError) as error:  # what is written anew would look whole
        LOGGER.warning("%s: %s; it stays as it is", store.uri_of(file.key(prefix)), error)
        return file
    path = scratch / "rows.parquet"
    pq.write_table(table, path, **PARQUET_WRITER)
    whole = file.model_copy(update={"name": file.name.replace(PARTIAL, "shard-", 1)})
    without = file.without if PICTURES in file.without else (*file.without, PICTURES)
    return upload_smaller(store, prefix, whole, path, {"without": without})


def _may_hold_pictures(file: DatasetFile) -> bool:
    return PICTURES not in file.without or file.name.startswith(PARTIAL)


def _other_columns(store: ObjectStore, key: str, file: DatasetFile, scratch: Path) -> pa.Table:
    """All columns but the pictures.

    Raises:
        ContractError: The file is damaged.
        ObjectNotFoundError: It is gone.
    """
    local = store.local_path(key)
    path = local or scratch / "old.parquet"
    try:
        if local is None:
            store.download(key, path, file.sha256)
        elif (found := sha256_of_file(path)) != file.sha256:
            raise ContractError(f"its sha256 is {found}, its manifest says {file.sha256}")
        names = pq.read_schema(path).names
        return pq.read_table(path, columns=[name for name in names if name != PICTURES], memory_map=local is not None)
    except FileNotFoundError as error:
        raise ObjectNotFoundError("it is gone") from error
    finally:
        if local is None:
            path.unlink(missing_ok=True)


def reopen(store: ObjectStore, downloaded: Manifest) -> None:
    """Makes a download dataset incomplete, so that the next run downloads all of it again.

    Files of it that other datasets name stay.
    """
    prefix = dataset_prefix(downloaded.stage, downloaded.digest)
    LOGGER.info("%s: its pictures were deleted, and are needed again", store.uri_of(prefix))
    for index in range(len(downloaded.shards)):
        store.delete(f"{prefix}/reports/shard-{index:05d}.json")
    store.delete(f"{prefix}/{MANIFEST_NAME}")
