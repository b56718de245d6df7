"""The deployments: every entrypoint imports, every parameter fits its flow, refreshes do not pile up."""

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

_FILE = Path(__file__).parents[2] / "prefect.yaml"
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load(_FILE.read_text())["deployments"]


def _flow(deployment: dict[str, Any]) -> Any:
    path, _, name = deployment["entrypoint"].partition(":")
    assert (_FILE.parent / path).is_file()
    return getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)


def test_both_flows_are_deployed() -> None:
    assert {item["entrypoint"] for item in DEPLOYMENTS} == {"flows/pipeline.py:pipeline", "flows/refresh.py:refresh"}


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda item: item["name"])
def test_parameters_fit_the_flow(deployment: dict[str, Any]) -> None:
    from prefect.utilities.callables import parameter_schema
    from prefect.utilities.schema_tools import validate
    from prefect.utilities.schema_tools.validation import ValidationError

    flow = _flow(deployment)
    parameters = deployment["parameters"]
    inspect.signature(flow.fn).bind(**parameters)
    schema = parameter_schema(flow.fn).model_dump_for_openapi()
    validate(parameters, schema, raise_on_error=True)
    with pytest.raises(ValidationError, match="config"):
        validate({**parameters, "config": 3}, schema, raise_on_error=True)


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda item: item["name"])
def test_prefect_reads_schedules_and_limits(deployment: dict[str, Any]) -> None:
    from prefect.client.schemas.objects import ConcurrencyLimitConfig
    from prefect.client.schemas.schedules import construct_schedule

    ConcurrencyLimitConfig.model_validate(deployment["concurrency_limit"])
    for schedule in deployment["schedules"]:
        construct_schedule(cron=schedule["cron"], timezone=schedule["timezone"])
        assert schedule["active"] is False


def test_a_refresh_that_finds_another_running_is_cancelled() -> None:
    refresh = next(item for item in DEPLOYMENTS if item["entrypoint"].endswith(":refresh"))
    assert refresh["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
    assert refresh["schedules"]
    assert refresh["work_pool"]["name"]
