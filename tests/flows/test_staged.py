"""Stages that are handed over to deployments: when they are, what comes back, what a failure there becomes here."""

from typing import Any

import pytest
from prefect.exceptions import CancelledRun
from prefect.states import Cancelled, Completed, Crashed, Failed

from flows import deployments
from flows.config import PipelineConfig, load_config, load_settings
from flows.results import StageSummary
from infra.errors import ContractError, GateError, TransientError

INLINE = load_config("demo")
SPREAD = load_config("demo", ["operations.stages=deployments"])
SUMMARY = StageSummary(
    stage="select", manifest_uri="/r/MANIFEST.json", prefix="p", digest="d", num_in=3, num_out=3, dropped={},
    was_done=True, seconds=0.0,
)  # fmt: skip


class Elsewhere:
    """Stands for a worker: remembers what it was asked for, and makes it or not."""

    def __init__(self, *, makes: bool) -> None:
        self.makes, self.is_done, self.asked = makes, False, list[tuple[str, dict[str, Any]]]()

    def __call__(self, deployment: str, parameters: dict[str, Any]) -> None:
        self.asked.append((deployment, parameters))
        self.is_done = self.makes

    def stage(self, config: PipelineConfig) -> StageSummary:
        return deployments.staged(
            "select", config, lambda: SUMMARY, lambda: self.is_done, {"root": "/r", "stage": "select"}
        )


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    found = Elsewhere(makes=True)
    monkeypatch.setattr(deployments, "run_elsewhere", found)
    return found


def test_inline_asks_nobody(elsewhere: Elsewhere) -> None:
    assert elsewhere.stage(INLINE) == SUMMARY
    assert not elsewhere.asked


def test_what_stands_is_not_handed_over(elsewhere: Elsewhere) -> None:
    elsewhere.is_done = True
    assert elsewhere.stage(SPREAD) == SUMMARY
    assert not elsewhere.asked


def test_a_stage_is_handed_over_with_its_whole_config_once(elsewhere: Elsewhere) -> None:
    summary = elsewhere.stage(SPREAD)
    ((deployment, parameters),) = elsewhere.asked
    assert deployment == "stage/select"
    assert parameters["stage"] == "select"
    assert load_settings(parameters["config"]) == INLINE  # it must not hand over again
    assert summary.was_done is False
    assert summary.model_copy(update={"was_done": True, "seconds": 0.0}) == SUMMARY


def test_a_deployment_that_made_nothing_here_is_an_error(elsewhere: Elsewhere) -> None:
    elsewhere.makes = False
    with pytest.raises(ContractError, match="not in /r; do its workers see this root"):
        elsewhere.stage(SPREAD)


def test_what_a_deployment_has_done_may_be_looked_at_without_doing_it_again(elsewhere: Elsewhere) -> None:
    asked: list[str] = []

    def stage(found: StageSummary | None) -> StageSummary:
        def here() -> StageSummary:
            asked.append("here")
            return SUMMARY

        return deployments.staged("publish", SPREAD, here, lambda: False, {"root": "/r"}, lambda: found)

    made = SUMMARY.model_copy(update={"digest": "made there"})
    assert stage(made).digest == "made there"
    with pytest.raises(ContractError, match="not in /r"):
        stage(None)
    assert not asked


@pytest.mark.parametrize(
    ("state", "kind", "said"),
    [
        (Failed(message="Flow run encountered an exception: GateError: too few rows: 3 of 9"), GateError, "too few"),
        (
            Failed(message="Flow run encountered an exception: TransientError: the store is away"),
            TransientError,
            "away",
        ),
        (Failed(message="Flow run encountered an exception: ValueError: train.seed: bad"), ValueError, "train.seed"),
        (Failed(message="Flow run encountered an exception: infra.errors.ContractError: a, b"), ContractError, "a, b"),
        (Failed(message="Flow run encountered an exception: KeyError: 'x'"), RuntimeError, "stage/select has failed"),
        (Crashed(message="Flow run process exited with code -9"), TransientError, "code -9"),
        (Cancelled(), CancelledRun, "stage/select was cancelled"),
        (Failed(), RuntimeError, "Failed"),
    ],
)
def test_what_failed_there_fails_here_in_the_same_way(state: Any, kind: type[Exception], said: str) -> None:
    error = deployments._error_of("stage/select", state)
    assert type(error) is kind
    assert said in str(error)


def test_prefect_words_a_failure_as_it_is_read_here() -> None:
    """The message of a run's state is all that comes back of an error."""
    import asyncio

    from prefect.states import exception_to_failed_state

    state = asyncio.run(
        exception_to_failed_state(GateError("too few rows"), message="Flow run encountered an exception:")
    )
    error = deployments._error_of("x", state)
    assert (type(error), str(error)) == (GateError, "too few rows")
    assert Completed().is_completed()
