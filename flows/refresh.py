"""The flow that a schedule runs: prepare from the current metadata, and say what is new."""

import json
from typing import Any

from prefect import flow

from flows.config import PipelineConfig, resolve
from flows.prepare import prepare
from flows.results import RefreshResult
from flows.store import absolute_root, read_manifest, uids_of
from flows.train import train as train_flow
from infra.errors import ContractError
from infra.storage import ConflictError, ObjectNotFoundError, ObjectStore, open_store

LEDGER_KEY = "ledger/refresh.json"
FORMAT_VERSION = 1


@flow(name="refresh")
def refresh(config: PipelineConfig | str, root: str = "var/store", train: bool = False) -> RefreshResult:
    """Prepares from the current metadata and compares the dataset with the last refresh's.

    Args:
        config: What to make, or a recipe's name.
        root: The object store's root.
        train: Whether to train on the dataset; a training that stands there is not done again.
    """
    config, root = resolve(config), absolute_root(root)
    store = open_store(root)
    previous, etag = _read_ledger(store)
    prepared = prepare(config, root)
    encoded = prepared.stages["encode"]
    changed = previous is None or previous["digest"] != encoded.digest
    num_new, num_gone, num_kept = 0, 0, encoded.num_out
    if changed:
        num_new, num_gone, num_kept = _compare(store, None if previous is None else previous["prefix"], encoded.prefix)
        _write_ledger(store, {"digest": encoded.digest, "prefix": encoded.prefix, "num_out": encoded.num_out}, etag)
    return RefreshResult(
        datasets=prepared.datasets,
        stages=prepared.stages,
        changed=changed,
        previous_digest=None if previous is None else previous["digest"],
        num_new=num_new,
        num_gone=num_gone,
        num_kept=num_kept,
        train=train_flow(config, root, encoded.prefix) if train else None,
    )


def _compare(store: ObjectStore, previous: str | None, current: str) -> tuple[int, int, int]:
    """Counts of rows that are new, gone and in both, by uid; a previous dataset that is not there any more is empty."""
    now = uids_of(store, current, read_manifest(store, current))
    try:
        before = set() if previous is None else uids_of(store, previous, read_manifest(store, previous))
    except ValueError:
        before = set()
    return len(now - before), len(before - now), len(now & before)


def _read_ledger(store: ObjectStore) -> tuple[dict[str, Any] | None, str | None]:
    try:
        data, etag = store.read_with_etag(LEDGER_KEY)
    except ObjectNotFoundError:
        return None, None
    try:
        record = json.loads(data)
        if (
            record["format_version"] == FORMAT_VERSION
            and isinstance(record["digest"], str)
            and isinstance(record["prefix"], str)
        ):
            return record, etag
    except (ValueError, KeyError, TypeError):
        pass
    raise ContractError(
        f"{store.uri_of(LEDGER_KEY)}: not a refresh ledger of format {FORMAT_VERSION}; move it away and refresh again"
    )


def _write_ledger(store: ObjectStore, record: dict[str, Any], etag: str | None) -> None:
    data = json.dumps({"format_version": FORMAT_VERSION, **record}, indent=1).encode()
    try:
        store.compare_and_swap(LEDGER_KEY, data, etag)
    except ConflictError:
        return  # another refresh came to its end meanwhile: its record stands, and the next one compares with that
