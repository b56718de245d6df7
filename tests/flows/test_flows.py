"""Flows under a real Prefect server: what is tried again, what survives, what is looked at."""

import contextlib
from typing import Any, cast

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
