"""A stage in this process, or as a run of its own deployment, on another work pool: ``operations.stages`` says which.

A run that was handed over gives no result back: the parent asks the store, as a rerun would, and the store's answer is
the same however a stage was made. So both ways end in the same objects, digests and summaries.
"""

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast
from uuid import UUID

import httpx
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import CancelledRun, ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelling

from flows.config import PipelineConfig, as_settings
from flows.results import StageSummary, TrainSummary, ValidationSummary
from infra.errors import ContractError, GateError, TransientError, WalltimeError

LOGGER = logging.getLogger(__name__)

DEPLOYMENTS = {
    "select": "stage/select",
    "download": "stage/download",
    "encode": "stage/encode",
    "train": "train/train",
    "validate": "validate/validate",
    "publish": "publish/publish",
}
"""Stage → the deployment that makes it; see prefect.yaml."""

_POLL_S = 2.0
_SERVER_AWAY_S = 600.0
_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ValueError, ContractError, GateError, TransientError, WalltimeError)
}
_RAISED = re.compile(r"encountered an exception: (?:\w+\.)*(\w+): (.*)", re.DOTALL)

_Summary = TypeVar("_Summary", bound="StageSummary | TrainSummary | ValidationSummary | Any")


def staged(
    stage: str,
    config: PipelineConfig,
    here: Callable[[], _Summary],
    is_done: Callable[[], bool],
    parameters: dict[str, Any],
    look: Callable[[], _Summary | None] | None = None,
) -> _Summary:
    """Makes one stage, in the way that the config says.

    Args:
        stage: A key of `DEPLOYMENTS`.
        config: Of the pipeline.
        here: Makes the stage in this process, or says at once what stands there.
        is_done: Whether it stands in the store.
        parameters: What the deployment's flow takes beside ``config``: references only.
        look: Says what the deployment has made, where ``here`` would do more than to find it; None where it has made
            nothing.

    Returns:
        What ``here`` returns, or ``look``.

    Raises:
        ContractError: The deployment says that it is done, and the store does not.
    """
    if config.operations.stages == "inline" or is_done():
        return here()
    started = time.monotonic()
    operations = config.operations.model_copy(update={"stages": "inline"})
    settings = as_settings(config.model_copy(update={"operations": operations}))
    run_elsewhere(DEPLOYMENTS[stage], {"config": settings, **parameters})
    summary = look() if look is not None else here() if is_done() else None
    if summary is None:
        raise ContractError(
            f"operations.stages: deployment {DEPLOYMENTS[stage]} has completed, and what it should have made is not in "
            f"{parameters['root']}; do its workers see this root, and run this version?"
        )
    update = {"was_done": False, "seconds": time.monotonic() - started}
    return cast(_Summary, summary.model_copy(update=update))


def run_elsewhere(deployment: str, parameters: dict[str, Any]) -> None:
    """Runs a deployment as a part of this flow run, and waits for its end; where this run ends first, so does that one.

    Raises:
        ValueError: There is no such deployment, or what the run itself raised; so do the others.
        GateError: As above.
        WalltimeError: As above.
        TransientError: As above, or it crashed, or Prefect's server was away for long.
        CancelledRun: Somebody cancelled it.
    """
    try:
        # Typed for async callers, too; called from a flow that is not async it returns the run.
        child = cast(FlowRun, run_deployment(deployment, parameters=parameters, timeout=0))
    except ObjectNotFound:
        raise ValueError(
            f"operations.stages: there is no deployment {deployment}; make it with `lacuna operate setup`, or set "
            "operations.stages to inline"
        ) from None
    LOGGER.info("%s runs as flow run %s", deployment, child.name)
    try:
        state = _await_end(child.id)
    except BaseException:  # a signal, or a cancellation, as well: the child must not outlive this
        with contextlib.suppress(httpx.HTTPError, PrefectHTTPStatusError), get_client(sync_client=True) as client:
            _cancel(client, child)
        raise
    if not state.is_completed():
        raise _error_of(f"{deployment} (flow run {child.name})", state)


def cancel_children(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A hook: cancels runs of deployments that a flow run has started and that have not ended.

    For the parent that had no time to do so itself: it was killed.
    """
    with get_client(sync_client=True) as client:
        for child in _descendants(client, flow_run.id):
            if child.deployment_id is not None and not (child.state and child.state.is_final()):
                LOGGER.warning("cancels flow run %s, whose parent has ended", child.name)
                _cancel(client, child)


def _descendants(client: SyncPrefectClient, flow_run_id: UUID) -> Iterator[FlowRun]:
    children = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[flow_run_id]))
    )
    for child in children:
        yield child
        yield from _descendants(client, child.id)


def _cancel(client: SyncPrefectClient, run: FlowRun) -> None:
    client.set_flow_run_state(run.id, Cancelling(message="The flow run that started it has ended."))


def _await_end(flow_run_id: UUID) -> State[Any]:
    last_answer = time.monotonic()
    while True:
        try:
            with get_client(sync_client=True) as client:
                state = client.read_flow_run(flow_run_id).state
            last_answer = time.monotonic()
        except (httpx.TransportError, PrefectHTTPStatusError) as error:  # it may be restarted meanwhile
            state = None
            if time.monotonic() - last_answer > _SERVER_AWAY_S:
                raise TransientError(f"Prefect's server has not answered for {_SERVER_AWAY_S:g} s: {error}") from None
        if state is not None and state.is_final():
            return state
        time.sleep(_POLL_S)


def _error_of(what: str, state: State[Any]) -> Exception:
    """What a run that did not complete has raised, as far as its state tells."""
    message = state.message or f"it has ended as {state.name}"
    if state.type == StateType.CANCELLED:
        return CancelledRun(f"{what} was cancelled")
    if state.type == StateType.CRASHED:
        return TransientError(f"{what} has crashed: {message}")
    raised = _RAISED.search(message)
    if raised is not None and raised[1] in _ERRORS:
        return _ERRORS[raised[1]](raised[2])
    return RuntimeError(f"{what} has failed: {message}")
