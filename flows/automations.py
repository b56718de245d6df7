"""The automations that a server of one's own needs: ``lacuna operate install-automations``.

* **Lost heartbeats.** A flow run says every ``PREFECT_FLOWS_HEARTBEAT_FREQUENCY`` seconds that it lives (180 as Prefect
  comes, 30 in our work pools, which is the least). Nobody says that it has died if its machine did: the run stays
  Running for ever, and takes a place in its deployment's limit. The automation marks it Crashed once three beats in a
  row are missed; a rerun goes on from what stands in the store.
* **A failed run's notification**, where a block says whom to tell.
* **Train on new data**, an example, installed switched off: each dataset that a refresh accepts starts ``train``.

Installing them again changes what is there to what is said here, and adds nothing twice.
"""

import logging
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, Final

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags, FlowFilter, FlowFilterName
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events.actions import ChangeFlowRunState, RunDeployment, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from pydantic import BaseModel

from flows.api_client import server_client
from flows.events import DATASET_ACCEPTED

LOGGER = logging.getLogger(__name__)

TAG: Final = "lacuna"
"""Of each flow run of ours: a deployment hands it on, `flows.cli` and flows that call others set it."""
FLOWS: Final = ("pipeline", "prepare", "stage", "train", "validate", "publish", "refresh")
HEARTBEAT_VARIABLE: Final = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"
LOST_HEARTBEATS: Final = "lacuna: lost heartbeats"
FAILED_RUN: Final = "lacuna: a run has failed"
TRAIN_ON_NEW_DATA: Final = "lacuna: train on new data (example)"

_PREFECTS_HEARTBEAT_S: Final = 180
_LEAST_HEARTBEAT_S: Final = 30
_BEATS_MISSED: Final = 3
_PAGE: Final = 200


class Installed(BaseModel):
    """What `install` did.

    Attributes:
        heartbeat_s: How often flow runs are taken to beat.
        crashed_after_s: How long after its last beat a run is marked Crashed.
        automations: Name → ``made``, ``changed`` or ``left as it was``.
    """

    heartbeat_s: int
    crashed_after_s: int
    automations: dict[str, str]


def lost_heartbeats(heartbeat_s: int) -> AutomationCore:
    """Marks a flow run of ours Crashed that has beaten, and then is silent.

    Args:
        heartbeat_s: How often it should beat.
    """
    return AutomationCore(
        name=LOST_HEARTBEATS,
        description=f"A flow run that has been silent for {_BEATS_MISSED} heartbeats of {heartbeat_s} s is Crashed.",
        tags=[TAG],
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            # Whatever else is told of the run means that it is not dead, or has ended in its own way.
            expect={"prefect.flow-run.*"},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=_our_flows(),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=_BEATS_MISSED * heartbeat_s),
        ),
        actions=[
            ChangeFlowRunState(
                name="Crashed",
                force=False,
                state=StateType.CRASHED,
                message=f"No heartbeat for {_BEATS_MISSED * heartbeat_s} s: the process or its machine is gone. "
                "Run again to go on from what stands in the store.",
            )
        ],
    )


def failed_run(block_document_id: Any) -> AutomationCore:
    """Tells somebody of a run that has failed or crashed.

    Args:
        block_document_id: Of the notification block that knows whom to tell.
    """
    return AutomationCore(
        name=FAILED_RUN,
        description="Tells of a flow run that has failed or crashed.",
        tags=[TAG],
        trigger=EventTrigger(
            expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=_our_flows(),
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[
            SendNotification(
                block_document_id=block_document_id,
                subject="Lacuna: {{ flow.name }} {{ flow_run.state.name }}",
                body="{{ flow_run.name }}: {{ flow_run.state.message }}\n{{ flow_run|ui_url }}",
            )
        ],
    )


def train_on_new_data(deployment: DeploymentResponse) -> AutomationCore:
    """Starts a training for each dataset that a refresh accepts; switched off until somebody wants it.

    Args:
        deployment: Of the training.
    """
    return AutomationCore(
        name=TRAIN_ON_NEW_DATA,
        description="Starts the deployment `train`, with its own parameters, when a refresh accepts a dataset.",
        enabled=False,
        tags=[TAG],
        trigger=EventTrigger(
            expect={DATASET_ACCEPTED},
            match=ResourceSpecification({"prefect.resource.id": ["lacuna.dataset.encode.*"]}),
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[RunDeployment(source="selected", deployment_id=deployment.id, parameters=None, job_variables=None)],
    )


def install(heartbeat_s: int | None = None, notify: str | None = None) -> Installed:
    """Makes the server's automations what this module says.

    Args:
        heartbeat_s: How often flow runs beat; None to read it from the work pools of the deployments.
        notify: ``type/name`` of a notification block, such as ``slack-webhook/ops``; None for no notification.

    Raises:
        ValueError: No server is named, or it refuses us; the heartbeat is too short or no number, or there is no such
            block.
        TransientError: The server does not answer.
    """
    if heartbeat_s is not None and heartbeat_s < _LEAST_HEARTBEAT_S:
        raise ValueError(f"--heartbeat-s: {heartbeat_s} is below {_LEAST_HEARTBEAT_S}, the least that Prefect knows")
    with server_client() as client:
        deployments = _deployments(client)
        heartbeat_s = heartbeat_s or _heartbeat_of(client, deployments)
        wanted = [lost_heartbeats(heartbeat_s)]
        if notify is not None:
            wanted.append(failed_run(_block(client, notify)))
        wanted += [train_on_new_data(one) for one in deployments if one.name == "train"][:1]
        done = {automation.name: _put(client, automation) for automation in wanted}
    return Installed(heartbeat_s=heartbeat_s, crashed_after_s=_BEATS_MISSED * heartbeat_s, automations=done)


# --------------------------------------------------------------------------------------------------------- the server


def _our_flows() -> list[ResourceSpecification | dict[str, str | list[str]]]:
    """By name and by tag, both: other projects on the server have flows that are called `train`, too."""
    return [
        ResourceSpecification({"prefect.resource.role": "flow", "prefect.resource.name": list(FLOWS)}),
        ResourceSpecification({"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"}),
    ]


def _deployments(client: SyncPrefectClient) -> list[DeploymentResponse]:
    return client.read_deployments(
        flow_filter=FlowFilter(name=FlowFilterName(any_=list(FLOWS))),
        deployment_filter=DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG])),
        limit=_PAGE,
    )


def _heartbeat_of(client: SyncPrefectClient, deployments: Iterable[DeploymentResponse]) -> int:
    """The longest that any of the deployments beats at: a run that beats more seldom must not count as dead."""
    found: list[int] = []
    pools: dict[str, Mapping[str, Any]] = {}
    for deployment in deployments:
        name = deployment.work_pool_name
        if name is None:
            continue
        if name not in pools:
            pools[name] = _pool_environment(client, name)
        environment = {**pools[name], **(deployment.job_variables.get("env") or {})}
        found.append(_seconds(environment.get(HEARTBEAT_VARIABLE), f"work pool {name} or deployment {deployment.name}"))
    return max(found, default=_PREFECTS_HEARTBEAT_S)


def _seconds(value: Any, where: str) -> int:
    if value is None or value == "":
        return _PREFECTS_HEARTBEAT_S
    if not str(value).strip().isdecimal():
        raise ValueError(
            f"{HEARTBEAT_VARIABLE}: {value!r} of {where} is no number of seconds; set it to one, such as 30"
        )
    return int(value)


def _pool_environment(client: SyncPrefectClient, name: str) -> Mapping[str, Any]:
    template = client.read_work_pool(name).base_job_template
    return template.get("variables", {}).get("properties", {}).get("env", {}).get("default") or {}


def _block(client: SyncPrefectClient, notify: str) -> Any:
    kind, _, name = notify.partition("/")
    try:
        return client.read_block_document_by_name(name, kind).id
    except ObjectNotFound:
        raise ValueError(
            f"--notify: there is no block {notify!r}; make one in the UI, such as slack-webhook/ops"
        ) from None


def _put(client: SyncPrefectClient, wanted: AutomationCore) -> str:
    """Makes an automation, or changes the one of its name; whether it is switched on is the operator's."""
    standing = client.read_automations_by_name(wanted.name)
    if not standing:
        client.create_automation(wanted)
        return "made"
    for surplus in standing[1:]:
        client.delete_automation(surplus.id)
    wanted = wanted.model_copy(update={"enabled": standing[0].enabled})
    if _told(standing[0]) == _told(wanted):
        return "left as it was"
    client.update_automation(standing[0].id, wanted)
    return "changed"


def _told(automation: AutomationCore) -> dict[str, Any]:
    """What is compared: the server adds ids of its own."""
    fields = set(AutomationCore.model_fields) - {"owner_resource"}
    return _without_ids(automation.model_dump(mode="json", include=fields))


def _without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_ids(inner) for key, inner in sorted(value.items()) if key != "id"}
    if isinstance(value, list):
        return sorted((_without_ids(inner) for inner in value), key=repr)
    return value
