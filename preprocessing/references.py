"""Which datasets name a file that stands in another's folder: whoever deletes one looks for them first."""

from collections.abc import Iterator

from pydantic import ValidationError

from infra.storage import ObjectNotFoundError, ObjectStore
from preprocessing.contracts.manifest import CommittedShard, ShardReport, find_manifest


def references_to(store: ObjectStore, prefix: str) -> dict[str, list[str]]:
    """Which files of a dataset other ones name, be they complete or in the making.

    Args:
        store: Where it stands.
        prefix: Key of its folder.

    Returns:
        Key of a file → keys of the folders of the datasets that name it, itself not among them.
    """
    found: dict[str, list[str]] = {}
    for stage in store.list_folders("datasets/"):
        for name in store.list_folders(f"datasets/{stage}/"):
            other = f"datasets/{stage}/{name}"
            manifest = None if other == prefix else find_manifest(store, other)
            shards = manifest.shards if manifest is not None else () if other == prefix else reports_of(store, other)
            for shard in shards:
                for file in shard.files:
                    if file.folder == prefix:
                        found.setdefault(file.key(other), []).append(other)
    return found


def reports_of(store: ObjectStore, prefix: str) -> list[ShardReport]:
    """The shards of a dataset in the making, as far as they are committed; a report that cannot be read counts as none.

    Args:
        store: Where it stands.
        prefix: Key of its folder.
    """
    return [committed.report for committed in committed_shards(store, prefix)]


def committed_shards(store: ObjectStore, prefix: str) -> Iterator[CommittedShard]:
    """As `reports_of`, one by one, with what they say of their dataset."""
    for info in store.list(f"{prefix}/reports/shard-"):
        try:
            yield CommittedShard.model_validate_json(store.read(info.key))
        except (ObjectNotFoundError, ValidationError):  # then its shard is made again
            continue
