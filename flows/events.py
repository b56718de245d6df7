"""What a run tells the world when something new stands in the store: events that automations can react to.

| event | resource | when |
| --- | --- | --- |
| ``lacuna.dataset.committed`` | ``lacuna.dataset.{stage}.{digest16}`` | a dataset is complete, its own gate passed |
| ``lacuna.dataset.accepted`` | as above | a refresh's encoded dataset has passed the gates of the refresh, too |
| ``lacuna.checkpoint.published`` | ``lacuna.channel.{name}`` | a channel has been moved to an export |

What stood there before is not told again, not even where its gate had refused it and is looser by now. An event has an
id of its own making, so that of two runs that did the same at once, or of a retry, one is heard. Prefect adds the flow
run and its deployment as related resources.

Both come with an asset event (``prefect.asset.materialization.succeeded``), whose resource is the URI of what was made
and whose related assets are what it was made from: lineage for Prefect's own page of assets. A server of one's own
keeps it among its events. `prefect.assets.materialize` is not used: it wants the asset's name before the task runs,
and ours carries the digest of what the task reads.

Each is sent once, after the fact: a run that is killed between the two sends none. Whoever must not miss one looks
into the store, which is the truth.
"""

import logging
import uuid
from collections.abc import Sequence
from typing import Any

from prefect.events import emit_event

from flows.results import PublishSummary, StageSummary, TrainSummary
from infra.channels import read_channel
from infra.storage import ObjectStore

LOGGER = logging.getLogger(__name__)

DATASET_COMMITTED = "lacuna.dataset.committed"
DATASET_ACCEPTED = "lacuna.dataset.accepted"
CHECKPOINT_PUBLISHED = "lacuna.checkpoint.published"
_MATERIALIZED = "prefect.asset.materialization.succeeded"
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "events.lacuna")


def dataset_resource(stage: str, digest: str) -> str:
    """The id of a dataset as a resource; the same wherever and whenever it is made."""
    return f"lacuna.dataset.{stage}.{digest[:16]}"


def dataset_committed(
    summary: StageSummary, created_at: str, parents: dict[str, str], parent_uris: Sequence[str]
) -> None:
    """Tells of a dataset; nothing if it was there before.

    Args:
        summary: What became of the stage.
        created_at: The manifest's, so that a dataset that is deleted and made again is told of again.
        parents: Stage → digest of what it was made from.
        parent_uris: Of their manifests.
    """
    if summary.was_done:
        return
    _emit_dataset(DATASET_COMMITTED, summary, parents, created_at)
    _emit_asset(summary.manifest_uri, f"{summary.stage} dataset", parent_uris, _payload(summary), created_at)


def dataset_accepted(summary: StageSummary, parents: dict[str, str], refreshed_at: str) -> None:
    """Tells of a dataset that a refresh has taken for good.

    Args:
        summary: Of its encoding.
        parents: Stage → digest of what it was made from.
        refreshed_at: When the refresh began: the same dataset may be the newest one a second time.
    """
    _emit_dataset(DATASET_ACCEPTED, summary, parents, refreshed_at)


def _payload(summary: StageSummary) -> dict[str, Any]:
    return {
        "stage": summary.stage,
        "digest": summary.digest,
        "manifest_uri": summary.manifest_uri,
        "num_in": summary.num_in,
        "num_out": summary.num_out,
    }


def _emit_dataset(event: str, summary: StageSummary, parents: dict[str, str], identity: str) -> None:
    resource = dataset_resource(summary.stage, summary.digest)
    _emit(
        event,
        {"prefect.resource.id": resource, "prefect.resource.name": f"{summary.stage} dataset {summary.digest[:16]}"},
        [
            {"prefect.resource.id": dataset_resource(stage, digest), "prefect.resource.role": "parent"}
            for stage, digest in parents.items()
        ],
        _payload(summary),
        f"{summary.manifest_uri} {identity}",
    )


def checkpoint_published(store: ObjectStore, summary: PublishSummary, trained: TrainSummary, dataset_uri: str) -> None:
    """Tells of each channel that was moved.

    Args:
        store: Where the channels are.
        summary: What was published, and what became of the channels.
        trained: The checkpoint.
        dataset_uri: Of the manifest that it was trained on.
    """
    moved = [name for name, became in summary.channel.items() if became.startswith("moved")]
    what = {"run_id": summary.run_id, "step": summary.step, "uri": summary.export, "checkpoint": trained.checkpoint}
    for name in moved:
        pointer = read_channel(store, name)
        _emit(
            CHECKPOINT_PUBLISHED,
            {
                "prefect.resource.id": f"lacuna.channel.{name}",
                "prefect.resource.name": f"channel {name}",
                "lacuna.run-id": summary.run_id,
            },
            [{"prefect.resource.id": f"lacuna.run.{summary.run_id}", "prefect.resource.role": "run"}],
            {"channel": name, **what},
            f"{summary.export} {name} {pointer and pointer.moved_at}",  # it may come back to what it pointed to
        )
    if not summary.was_done:
        _emit_asset(summary.export, f"export of {summary.run_id}", [dataset_uri], what, str(summary.step))


def _emit(
    event: str, resource: dict[str, str], related: list[dict[str, str]], payload: dict[str, Any], identity: str
) -> None:
    """Emits an event once: the server takes an id that it has seen for the same event."""
    # Prefect swallows and logs what goes wrong on the way: an event is news, and what it tells of stands already.
    emit_event(event, resource, related=related, payload=payload, id=uuid.uuid5(_NAMESPACE, f"{event} {identity}"))


def _emit_asset(uri: str, name: str, made_from: Sequence[str], metadata: dict[str, Any], identity: str) -> None:
    related = [{"prefect.resource.id": _key(parent), "prefect.resource.role": "asset"} for parent in made_from]
    resource = {"prefect.resource.id": _key(uri), "prefect.resource.name": name}
    _emit(_MATERIALIZED, resource, related, metadata, f"{uri} {identity}")


def _key(uri: str) -> str:
    """An asset's key, which is a URI also for a folder of this machine."""
    return uri if "://" in uri else f"file://{uri}"
