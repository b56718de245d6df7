"""Events about what has been committed, as a real Prefect server keeps them."""

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.progress import training_warning
from flows.results import PublishSummary, StageSummary, TrainSummary
from infra.bundles import commit_bundle
from infra.channels import move_channel, pointer_to
from infra.storage import open_store
from tests.integration.prefect_world import await_true

pytestmark = [
    pytest.mark.usefixtures("prefect_api"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

DIGEST = "0123456789abcdef" * 4


def stage_summary(uri: str, *, was_done: bool) -> StageSummary:
    return StageSummary(
        stage="encode", manifest_uri=uri, prefix="datasets/encode/0123456789abcdef", digest=DIGEST, num_in=10,
        num_out=7, dropped={}, was_done=was_done, seconds=1.0,
    )  # fmt: skip


def in_a_flow(function: Callable[[], Any]) -> str:
    """Runs something as a flow; returns the flow run's id."""
    from prefect import flow
    from prefect.context import FlowRunContext

    @flow
    def run() -> str:
        function()
        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        return str(context.flow_run.id)

    return run()


def events(name: str, resource: str) -> list[dict[str, Any]]:
    from prefect.client.orchestration import get_client

    body = {"filter": {"event": {"name": [name]}, "resource": {"id": [resource]}}, "limit": 50}
    with get_client(sync_client=True) as client:
        return json.loads(client._client.post("/events/filter", json=body).text)["events"]


def test_a_dataset_that_was_made_is_told_of_once(tmp_path: Path) -> None:
    from flows.events import DATASET_COMMITTED, dataset_committed

    uri = f"/{uuid.uuid4()}/MANIFEST.json"
    stage = f"lacuna.dataset.encode.{DIGEST[:16]}"
    parents = {"download": "f" * 64}

    def tell(created_at: str, was_done: bool) -> None:
        dataset_committed(stage_summary(uri, was_done=was_done), created_at, parents, ["/p/MANIFEST.json"])

    def told() -> list[dict[str, Any]]:
        return [event for event in events(DATASET_COMMITTED, stage) if event["payload"]["manifest_uri"] == uri]

    run = in_a_flow(lambda: (tell("monday", False), tell("monday", False), tell("monday", True)))
    await_true(lambda: len(told()) > 0, "the event", 60)
    in_a_flow(lambda: tell("tuesday", False))  # deleted, and made again
    await_true(lambda: len(told()) > 1, "the other event", 60)
    assert len(told()) == 2
    event = told()[-1]
    assert {key: event["payload"][key] for key in ("stage", "digest", "num_out")} == {
        "stage": "encode", "digest": DIGEST, "num_out": 7,
    }  # fmt: skip
    related = {one["prefect.resource.role"]: one["prefect.resource.id"] for one in event["related"]}
    assert related["flow-run"] == f"prefect.flow-run.{run}"
    assert related["parent"] == f"lacuna.dataset.download.{'f' * 16}"
    assets = events("prefect.asset.materialization.succeeded", f"file://{uri}")
    assert {"prefect.resource.id": "file:///p/MANIFEST.json", "prefect.resource.role": "asset"} in assets[0]["related"]


def test_a_dataset_that_a_refresh_accepts_is_told_of_each_time() -> None:
    from flows.events import DATASET_ACCEPTED, dataset_accepted

    uri = f"/{uuid.uuid4()}/MANIFEST.json"
    summary = stage_summary(uri, was_done=True)  # it may have been made by one that was killed, or refused
    in_a_flow(
        lambda: [dataset_accepted(summary, {"download": "f" * 64}, day) for day in ("monday", "monday", "sunday")]
    )

    def told() -> list[dict[str, Any]]:
        found = events(DATASET_ACCEPTED, f"lacuna.dataset.encode.{DIGEST[:16]}")
        return [event for event in found if event["payload"]["manifest_uri"] == uri]

    await_true(lambda: len(told()) > 1, "the events", 60)
    assert len(told()) == 2
    assert (told()[0]["payload"]["stage"], told()[0]["payload"]["digest"]) == ("encode", DIGEST)


def test_only_channels_that_were_moved_are_told_of(tmp_path: Path) -> None:
    from flows.events import CHECKPOINT_PUBLISHED, checkpoint_published

    store = open_store(str(tmp_path / "store"))
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "w.safetensors").write_bytes(b"w")
    run_id = f"demo-{uuid.uuid4().hex[:8]}"
    commit_bundle(store, "exports/e", tmp_path / "export", kind="export", run_id=run_id, step=20)
    move_channel(store, "latest", pointer_to(store, "latest", "exports/e"), lambda current: True)
    trained = TrainSummary(
        run_id=run_id, step=20, prefix="p", checkpoint="/c", dataset_prefix="d", was_done=False, seconds=1.0
    )
    summary = PublishSummary(
        run_id=run_id, step=20, prefix="exports/e", export=store.uri_of("exports/e"), was_done=False, seconds=1.0,
        channel={"latest": "moved to exports/e", "stable": "kept: below publish.stable_min: x 1 < 2"},
    )  # fmt: skip
    in_a_flow(lambda: checkpoint_published(store, summary, trained, "/d/MANIFEST.json"))

    def told(channel: str) -> list[dict[str, Any]]:
        found = events(CHECKPOINT_PUBLISHED, f"lacuna.channel.{channel}")
        return [event for event in found if event["payload"]["run_id"] == run_id]

    await_true(lambda: len(told("latest")) > 0, "the event", 60)
    assert told("latest")[0]["payload"] == {
        "channel": "latest", "run_id": run_id, "step": 20, "uri": store.uri_of("exports/e"), "checkpoint": "/c",
    }  # fmt: skip
    assert told("stable") == []


def test_bad_steps_and_steps_taken_back_are_warnings() -> None:
    skipped = {
        "event": "skipped", "step": 7, "reason": "loss", "num_samples": 2, "uids": ["a", "b"], "num_skipped": 3,
    }  # fmt: skip
    assert training_warning(skipped) == (
        "train: the step after 7 is skipped, its loss is not finite; 2 samples: a, b; 3 steps skipped so far"
    )
    back = {"event": "rolled_back", "step": 5, "from_step": 9, "reason": "gradient", "num_samples": 128}
    assert training_warning(back) == (
        "train: rolled back from step 9 to 5, gradient not finite; 128 samples are not seen again"
    )
    assert training_warning({"event": "step", "step": 1}) is None
