"""Which bundles hold forgotten rows, as `flows.forget` found: once files are cleaned, nothing else tells.

What a run is trained on stays in it: so of the weights of a run those of later steps hold the rows, too, whether they
are made before or after the record.
"""

import json
import logging
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from infra.storage import ObjectNotFoundError, ObjectStore
from training.runspec import EXPORTS_PREFIX, checkpoint_prefix, checkpoints_prefix, step_of

LOGGER = logging.getLogger(__name__)

RECORDS_PREFIX = "ledger/forgotten"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Coming:
    """A run that had not seen any of the rows yet, and does if it goes on with the tombstones that it began with.

    Attributes:
        step: The first one after which it has seen one.
        position: Of that row among the run's samples.
        tombstones: Digests of those that may be in force in it: none of them knows of the rows.
    """

    step: int
    position: int
    tombstones: tuple[str, ...]


@dataclass(frozen=True)
class ForgottenRows:
    """What is known of bundles.

    Attributes:
        bundles: Key of the folder of a bundle → how many forgotten rows it holds at least.
        coming: Run → what it is about to see.
    """

    bundles: dict[str, int] = field(default_factory=dict)
    coming: dict[str, list[Coming]] = field(default_factory=dict)

    def num_in(self, store: ObjectStore, prefix: str) -> int:
        """How many forgotten rows a bundle holds at least; 0 where none is known of.

        Args:
            store: Where it stands.
            prefix: Key of its folder.
        """
        found = self.bundles.get(prefix, 0)
        run_id = _run_of_weights(prefix)
        if run_id is None:
            return found
        step = step_of(prefix)
        of_run = {key: num for key, num in self.bundles.items() if _run_of_weights(key) == run_id}
        earlier = [num for key, num in of_run.items() if step_of(key) <= step]
        ahead = [item for item in self.coming.get(run_id, ()) if item.step <= step]
        is_seen = not earlier and ahead and _has_seen(store, run_id, step, ahead)
        return max([found, *earlier, int(bool(is_seen))])


def write_record(store: ObjectStore, bundles: Mapping[str, int], coming: Mapping[str, Coming] | None = None) -> None:
    """Remembers keys of the folders of bundles, and how many forgotten rows each was trained on.

    Args:
        store: Where it is kept.
        bundles: Prefix → number.
        coming: Runs that have seen none yet, and may be under way.
    """
    record = {
        "format_version": FORMAT_VERSION,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "bundles": dict(bundles),
        "coming": {run_id: asdict(item) for run_id, item in (coming or {}).items()},
    }
    store.put_if_absent(f"{RECORDS_PREFIX}/{uuid.uuid4().hex}.json", json.dumps(record, indent=1).encode())


def read_records(store: ObjectStore) -> ForgottenRows:
    """All that was remembered; a record of another version is named in the log."""
    found = ForgottenRows()
    for info in store.list(f"{RECORDS_PREFIX}/"):
        try:
            record = json.loads(store.read(info.key))
            bundles = {str(prefix): int(num) for prefix, num in record["bundles"].items()}
            coming = {
                run_id: Coming(item["step"], item["position"], tuple(item["tombstones"]))
                for run_id, item in record.get("coming", {}).items()
            }
        except (ObjectNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            LOGGER.warning("%s: no record of this version", store.uri_of(info.key))
            continue
        for prefix, num in bundles.items():
            found.bundles[prefix] = max(found.bundles.get(prefix, 0), num)
        for run_id, item in coming.items():
            found.coming.setdefault(run_id, []).append(item)
    return found


def _run_of_weights(prefix: str) -> str | None:
    """The run of a checkpoint or an export; None of anything else."""
    folder = prefix.rpartition("/")[0]
    match folder.split("/"):
        case ["runs", run_id, _] if folder == checkpoints_prefix(run_id):
            return run_id
        case [room, run_id] if room == EXPORTS_PREFIX:
            return run_id
    return None


def _has_seen(store: ObjectStore, run_id: str, step: int, ahead: list[Coming]) -> bool:
    """Whether a run went on as it had begun; where its checkpoint is gone, that is taken for certain."""
    try:
        state: dict[str, Any] = json.loads(store.read(f"{checkpoint_prefix(run_id, step)}/state.json"))
        changes = [(int(first), str(digest)) for first, digest in state.get("tombstones", ())]
    except (ObjectNotFoundError, ValueError, TypeError, AttributeError):
        return True
    return any(tombstones_at(changes, item.position) in item.tombstones for item in ahead)


def tombstones_at(changes: list[tuple[int, str]], position: int) -> str:
    """Digest of the tombstones that were in force at a position; empty where none was.

    Args:
        changes: From which position on which ones were, ascending: of a checkpoint's state.
        position: Of a sample.
    """
    return next((digest for first, digest in reversed(changes) if first <= position), "")
