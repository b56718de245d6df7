"""Flows under a real Prefect server: what is tried again, what survives, what is looked at."""

import contextlib
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from infra.errors import ContractError, GateError, TransientError

pytestmark = [
    pytest.mark.usefixtures("prefect_api"),
    # Prefect leaves its clients' sockets to the garbage collector, which may come by during any test here.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


def _tries(error: Exception, num_failures: int) -> int:
    """How often a task with the stages' own settings, but no delays, runs until it is done or has failed for good."""
    from prefect import flow, task

    from flows.tasks import select

    settings: dict[str, Any] = {
        "retries": select.retries,
        "retry_condition_fn": select.retry_condition_fn,
        "retry_delay_seconds": 0,
        "cache_policy": select.cache_policy,
        "persist_result": select.persist_result,
    }
    tries = 0

    @task(**settings)
    def fails() -> None:
        nonlocal tries
        tries += 1
        if tries <= num_failures:
            raise error

    @flow
    def run() -> None:
        fails()

    with contextlib.suppress(type(error)):
        run()
    return tries


def test_the_outside_world_is_tried_again() -> None:
    assert _tries(TransientError("the store is away"), num_failures=1) == 2


def test_not_for_ever() -> None:
    from flows.tasks import select

    assert _tries(TransientError("the store is away"), num_failures=100) == 1 + select.retries


@pytest.mark.parametrize(
    "error", [ValueError("bad"), ContractError("two sides"), GateError("too few"), RuntimeError("a bug")]
)
def test_nothing_else_is_tried_again_and_its_type_survives(error: Exception) -> None:
    assert _tries(error, num_failures=1) == 1


def test_all_stages_are_set_alike() -> None:
    from flows import tasks

    stages = [tasks.select, tasks.download, tasks.encode, tasks.train, tasks.validate, tasks.publish]
    assert all(stage.retry_condition_fn is tasks.is_transient for stage in stages)
    assert all(2 <= stage.retries <= 3 for stage in stages)
    assert all(stage.persist_result is False for stage in stages)


def test_the_funnel_is_an_artifact() -> None:
    from prefect import flow
    from prefect.artifacts import Artifact

    from flows import artifacts
    from flows.results import StageSummary

    summary = StageSummary(
        stage="select", manifest_uri="/r/MANIFEST.json", prefix="p", digest="d", num_in=10, num_out=7,
        dropped={"punsafe_high": 2, "no_url": 1}, was_done=False, seconds=1.0,
    )  # fmt: skip

    @flow
    def run() -> None:
        artifacts.funnel(summary)

    run()
    artifact = cast("Artifact | None", Artifact.get("select-funnel"))  # typed for async callers, too
    assert artifact is not None
    assert "punsafe_high" in str(artifact.data)


def test_an_artifact_that_cannot_be_written_is_only_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    from flows import artifacts

    class Nobody:
        def advance(self, stage: str, num_done: int, num_total: int, text: str = "") -> None: ...
        def finish(self, stage: str, text: str) -> None: ...

    progress = artifacts.ProgressArtifact("Not A Legal Key", Nobody())
    progress.advance(1, 2)
    progress.finish("done")
    assert "was not written" in caplog.text


def test_a_base_that_does_not_come_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect import flow

    from flows import tasks
    from flows.config import load_config

    def hang(model: object, notify: Any) -> None:
        notify("fetch")
        while True:
            time.sleep(0.05)

    monkeypatch.setattr("preprocessing.base_weights.resolve_base", hang)
    config = load_config("demo", ["operations.stall_timeout_s=0.5"])

    @flow
    def run() -> None:
        tasks.base.with_options(retries=0)(config)

    with pytest.raises(TransientError, match="base: no progress"):
        run()


def test_a_dataset_that_its_gate_refuses_is_not_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from prefect import flow

    from flows import events, tasks
    from flows.config import PipelineConfig
    from tests.flows.in_one_process import small_config

    told: list[str] = []
    monkeypatch.setattr(events, "dataset_committed", lambda summary, *_: told.append(summary.stage))

    @flow
    def run(config: PipelineConfig, root: str) -> None:
        tasks.select(config, root)

    with pytest.raises(GateError, match=r"select\.min_rows"):
        run(small_config(8763, **{"select.min_rows": 1000}), str(tmp_path / "refused"))
    assert not told
    run(small_config(8763), str(tmp_path / "kept"))
    assert told == ["select"]


@pytest.mark.parametrize("error", [None, TransientError("away")])
def test_the_limit_of_a_training_goes_with_it(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    from prefect.client.orchestration import get_client

    from flows import train

    def limits() -> list[str]:
        with get_client(sync_client=True) as client:
            return [limit.name for limit in client.read_global_concurrency_limits()]

    monkeypatch.setattr(train, "deployment", SimpleNamespace(id="any"))
    run = cast(Any, SimpleNamespace(run_id="demo-0123456789abcdef"))
    with contextlib.suppress(TransientError), train._one_at_a_time(run):
        assert limits() == ["lacuna-train-demo-0123456789abcdef"]
        if error is not None:
            raise error
    assert limits() == []


def test_a_limit_that_cannot_be_deleted_fails_no_training(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from flows import train

    def away(**_: object) -> None:
        raise httpx.ConnectError("the server is away")

    monkeypatch.setattr(train, "get_client", away)
    train._delete_limit("lacuna-train-x")
    assert "the limit lacuna-train-x is not deleted: ConnectError: the server is away" in caplog.text
