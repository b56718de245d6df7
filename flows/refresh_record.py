"""What the last refresh of a recipe made: one object in the store, moved by compare-and-swap. No prefect."""

import contextlib
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from infra.errors import ContractError
from infra.storage import ConflictError, ObjectNotFoundError, ObjectStore

FORMAT_VERSION = 1


class RefreshRecord(BaseModel):
    """The last refresh whose dataset passed its gates.

    Attributes:
        format_version: Of this record.
        digest: Of the encoded dataset.
        prefix: Key of its folder.
        num_out: Its rows.
        base: Digest of the selection that was made of the metadata.
        selection: Key of the folder of the selection that was downloaded: that one, or a round of it.
        started_at: When the refresh began: of two at once the later one counts.
        rechecked_at: Until when servers of pictures were asked whether they have opted out.
        source: Where the metadata was; only of the same place can it be said that rows were withdrawn.
        forget_from: Key of the folder of the earlier dataset of which withdrawn rows are not forgotten yet.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format_version: Literal[1] = FORMAT_VERSION
    digest: str
    prefix: str
    num_out: int = 0
    base: str | None = None
    selection: str | None = None
    started_at: datetime | None = None
    rechecked_at: datetime | None = None
    source: tuple[str, ...] | None = None
    forget_from: str | None = None


def record_key(recipe: str) -> str:
    """Key of a recipe's record: two recipes on one root have nothing to compare."""
    return f"ledger/refresh/{recipe}.json"


def read_record(store: ObjectStore, recipe: str) -> tuple[RefreshRecord | None, str | None]:
    """The record and its etag; None twice where there is none.

    Args:
        store: Where it stands.
        recipe: The name in the config.

    Raises:
        ContractError: What stands there is no record.
    """
    try:
        data, etag = store.read_with_etag(record_key(recipe))
    except ObjectNotFoundError:
        return None, None
    try:
        return RefreshRecord.model_validate_json(data), etag
    except ValidationError:
        raise ContractError(
            f"{store.uri_of(record_key(recipe))}: not a refresh ledger of format {FORMAT_VERSION}; move it away and "
            "refresh again"
        ) from None


def write_record(store: ObjectStore, recipe: str, record: RefreshRecord, etag: str | None) -> bool:
    """Replaces the record that was read at the start.

    Where another refresh has come to its end meanwhile, the one that began later counts, for it saw the newer metadata.

    Args:
        store: Where it stands.
        recipe: The name in the config.
        record: What to write.
        etag: Of what was read; None where there was none.

    Returns:
        Whether this one stands.
    """
    while True:
        try:
            store.compare_and_swap(record_key(recipe), record.model_dump_json(indent=1).encode(), etag)
            return True
        except ConflictError:
            other, etag = read_record(store, recipe)
            earliest = datetime.min.replace(tzinfo=UTC)
            if other is not None and (other.started_at or earliest) >= (record.started_at or earliest):
                return False


def end_forgetting(store: ObjectStore, recipe: str, record: RefreshRecord) -> None:
    """Notes that the rows that a record's dataset lacks are forgotten, unless another record stands meanwhile."""
    found, etag = read_record(store, recipe)
    if found == record:
        done = record.model_copy(update={"forget_from": None})
        with contextlib.suppress(ConflictError):
            store.compare_and_swap(record_key(recipe), done.model_dump_json(indent=1).encode(), etag)
