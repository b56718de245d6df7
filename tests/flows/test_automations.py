"""The automations, put onto a real Prefect server."""

from typing import Any

import pytest

pytestmark = [
    pytest.mark.usefixtures("prefect_api"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


def standing(name: str) -> list[Any]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.read_automations_by_name(name)


def test_installed_again_nothing_is_added_and_what_differs_is_mended() -> None:
    from prefect.client.orchestration import get_client

    from flows.automations import LOST_HEARTBEATS, install

    first = install(heartbeat_s=30)
    assert first.automations == {LOST_HEARTBEATS: "made"}
    assert first.crashed_after_s == 90
    assert install(heartbeat_s=30).automations == {LOST_HEARTBEATS: "left as it was"}
    assert install(heartbeat_s=60).automations == {LOST_HEARTBEATS: "changed"}
    (automation,) = standing(LOST_HEARTBEATS)
    assert automation.trigger.within.total_seconds() == 180
    with get_client(sync_client=True) as client:
        client.pause_automation(automation.id)
    install(heartbeat_s=30)
    (automation,) = standing(LOST_HEARTBEATS)
    assert automation.trigger.within.total_seconds() == 90
    assert not automation.enabled  # that is the operator's


def test_the_window_is_that_of_the_pool_that_beats_most_seldom() -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate

    from flows.automations import HEARTBEAT_VARIABLE, TRAIN_ON_NEW_DATA, install

    @flow(name="train")
    def train() -> None: ...

    template = {
        "job_configuration": {"env": "{{ env }}"},
        "variables": {"properties": {"env": {"default": {HEARTBEAT_VARIABLE: "30"}}}},
    }
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="quick", type="process", base_job_template=template))
        client.create_work_pool(WorkPoolCreate(name="plain", type="process"))
        flow_id = client.create_flow(train)
        client.create_deployment(flow_id=flow_id, name="train", work_pool_name="quick", tags=["lacuna"])
        client.create_deployment(flow_id=flow_id, name="somebody-elses", work_pool_name="plain")
        assert install().heartbeat_s == 30
        client.create_deployment(flow_id=flow_id, name="another", work_pool_name="plain", tags=["lacuna"])
        assert install().heartbeat_s == 180
        wrong = client.create_deployment(
            flow_id=flow_id, name="wrong", work_pool_name="quick", tags=["lacuna"],
            job_variables={"env": {HEARTBEAT_VARIABLE: "30s"}},
        )  # fmt: skip
        with pytest.raises(ValueError, match=rf"{HEARTBEAT_VARIABLE}: '30s' of .*wrong"):
            install()
        client.delete_deployment(wrong)
    (example,) = standing(TRAIN_ON_NEW_DATA)
    assert not example.enabled


@pytest.mark.parametrize(("name", "run_tags", "is_ours"), [
    ("train", {"lacuna", "gpu"}, True), ("train", set(), False), ("train", {"other"}, False),
    ("another", {"lacuna"}, False),
])  # fmt: skip
def test_only_runs_of_ours_are_watched(name: str, run_tags: set[str], is_ours: bool) -> None:
    """As the server decides it, for events that bear what an engine's heartbeat bears."""
    from prefect import flow, tags
    from prefect.context import FlowRunContext
    from prefect.flow_engine import FlowRunEngine
    from prefect.server.events.schemas.automations import EventTrigger
    from prefect.server.events.schemas.events import RelatedResource, Resource

    from flows.automations import LOST_HEARTBEATS, install

    @flow(name=name)
    def run() -> Any:
        context = FlowRunContext.get()
        assert context is not None
        assert context.flow is not None
        engine = FlowRunEngine(flow=context.flow, flow_run=context.flow_run)
        return engine._build_heartbeat_event_template()  # pyright: ignore[reportPrivateUsage]  # what it sends

    with tags(*run_tags):
        resource, related = run()
    install(heartbeat_s=30)
    (automation,) = standing(LOST_HEARTBEATS)
    trigger = EventTrigger.model_validate(automation.trigger.model_dump(mode="json"))
    assert trigger.covers_resources(
        Resource.model_validate(resource), [RelatedResource.model_validate(one.model_dump()) for one in related]
    ) is is_ours  # fmt: skip


def test_pools_and_values_that_people_have_set_stay() -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolUpdate

    from flows.operate import _give_back, _pool, base_job_template  # pyright: ignore[reportPrivateUsage]

    @flow(name="pipeline")
    def pipeline() -> None: ...

    with get_client(sync_client=True) as client:
        assert _pool(client, "ours", "docker", update=False, is_gpu=True) == "made, of type docker"
        assert client.read_work_pool("ours").base_job_template == base_job_template("docker", is_gpu=True)
        assert _pool(client, "ours", "docker", update=True, is_gpu=True) == "as it was"
        edited = base_job_template("docker", is_gpu=True)
        edited["variables"]["properties"]["image"]["default"] = "registry.example.org/lacuna:2"
        client.update_work_pool("ours", WorkPoolUpdate(base_job_template=edited))
        assert _pool(client, "ours", "kubernetes", update=True, is_gpu=True) == "as it was; defaults of its own: image"
        edited["job_configuration"]["privileged"] = "false"
        client.update_work_pool("ours", WorkPoolUpdate(base_job_template=edited))
        said = _pool(client, "ours", "docker", update=False, is_gpu=False)
        assert said == "as it was, with a template of its own"
        assert client.read_work_pool("ours").base_job_template == edited
        said = _pool(client, "ours", "docker", update=True, is_gpu=True)
        assert said == "given our template; defaults of its own: image"
        updated = client.read_work_pool("ours").base_job_template
        assert updated["variables"]["properties"]["image"]["default"] == "registry.example.org/lacuna:2"
        assert updated["job_configuration"]["privileged"] == "{{ privileged }}"
        with pytest.raises(ValueError, match="--pool: ours is of type docker"):
            _pool(client, "ours", "kubernetes", update=True, is_gpu=False)

        flow_id = client.create_flow(pipeline)
        secret = {"env": {"TOKEN": "{{ prefect.blocks.secret.token }}"}}
        made = client.create_deployment(flow_id=flow_id, name="kept", job_variables=secret, parameters={"root": "a"})
        before = client.read_deployment(made)
        client.create_deployment(flow_id=flow_id, name="kept", job_variables={}, parameters={"root": "a"})
        _give_back(client, before, client.read_deployment(made))
        assert client.read_deployment(made).job_variables == secret
        client.delete_deployment(made)


def test_what_cannot_be_is_said_in_one_line() -> None:
    from flows.automations import install

    with pytest.raises(ValueError, match=r"--heartbeat-s: 5 is below 30"):
        install(heartbeat_s=5)
    with pytest.raises(ValueError, match=r"--notify: there is no block 'slack-webhook/nobody'"):
        install(heartbeat_s=30, notify="slack-webhook/nobody")
