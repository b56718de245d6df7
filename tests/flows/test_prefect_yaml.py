"""The deployments as shipped: entrypoints import, parameters fit, the form is one that people can fill in."""

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flows.config import PipelineConfig, as_settings, load_config, load_settings, recipe_names

_FILE = Path(__file__).parents[2] / "prefect.yaml"
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load(_FILE.read_text())["deployments"]
_BY_NAME = {item["name"]: item for item in DEPLOYMENTS}
_TEMPLATES = sorted((_FILE.parent / "infra" / "prefect").glob("*.json"))

_HERE = ["model.base=tiny"]  # the others are not on this machine

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


def _flow(deployment: dict[str, Any]) -> Any:
    path, _, name = deployment["entrypoint"].partition(":")
    assert (_FILE.parent / path).is_file()
    return getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)


def _schema(deployment: dict[str, Any]) -> dict[str, Any]:
    from prefect.utilities.callables import parameter_schema

    return parameter_schema(_flow(deployment).fn).model_dump_for_openapi()


def test_every_verb_and_every_stage_is_deployed() -> None:
    flows = {"pipeline", "prepare", "train", "validate", "publish", "refresh"}
    assert set(_BY_NAME) == flows | {"select", "download", "encode"}
    assert {_flow(item).name for item in DEPLOYMENTS} == flows | {"stage"}


def test_what_stages_are_handed_over_to_is_deployed() -> None:
    from flows.deployments import DEPLOYMENTS as TARGETS

    assert set(TARGETS.values()) <= {f"{_flow(item).name}/{item['name']}" for item in DEPLOYMENTS}


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda item: item["name"])
def test_parameters_fit_the_flow(deployment: dict[str, Any]) -> None:
    from prefect.utilities.schema_tools import validate
    from prefect.utilities.schema_tools.validation import ValidationError

    parameters = deployment["parameters"]
    inspect.signature(_flow(deployment).fn).bind(**parameters)
    schema = _schema(deployment)
    assert deployment["enforce_parameter_schema"] is True
    validate(parameters, schema, raise_on_error=True)
    for wrong in (3, {"recipe": "demmo"}, {"recipe": "demo", "train": 3}, {"recipe": "demo", "tranin": {}}):
        with pytest.raises(ValidationError, match="config"):
            validate({**parameters, "config": wrong}, schema, raise_on_error=True)


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda item: item["name"])
def test_a_whole_config_fits_every_deployment(deployment: dict[str, Any]) -> None:
    """A parent hands its config over as such; any recipe must go through."""
    from prefect.utilities.schema_tools import validate

    schema = _schema(deployment)
    for recipe in recipe_names():
        settings = json.loads(json.dumps(as_settings(load_config(recipe, [*_HERE, "select.max_pwatermark=null"]))))
        validate({**deployment["parameters"], "config": settings}, schema, raise_on_error=True)


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda item: item["name"])
def test_the_form_asks_plain_questions(deployment: dict[str, Any]) -> None:
    """No field is a choice between forms, none is required or has a value of its own, each bound and choice is kept."""
    config = _schema(deployment)["properties"]["config"]
    text = json.dumps(config)
    assert not any(word in text for word in ('"anyOf"', '"$ref"', '"default"', '"required"'))
    assert config["properties"]["recipe"]["enum"] == recipe_names()
    fields = list(_fields("", config))
    assert len(fields) > 10
    for path, field in fields:
        assert "position" in field, path
        assert "type" in field, path
    for parameter, schema in _schema(deployment)["properties"].items():
        assert schema.get("description"), parameter


def test_bounds_choices_and_descriptions_are_the_configs() -> None:
    form = dict(_fields("", _schema(_BY_NAME["pipeline"])["properties"]["config"]))
    assert form["select.max_punsafe"] | {"exclusiveMinimum": 0, "maximum": 1} == form["select.max_punsafe"]
    assert form["train.prediction_type"]["enum"] == ["epsilon", "v_prediction"]
    assert "sd_512train_large" in form["encode.mask_family"]["enum"]
    assert form["train.num_steps"]["minimum"] == 1
    assert form["operations.stages"]["enum"] == ["inline", "deployments"]
    for section, field in PipelineConfig.model_fields.items():
        if section != "recipe":
            inner: Any = field.annotation
            for name, of_config in inner.model_fields.items():
                assert (of_config.description or "").split("\n")[0] in form[f"{section}.{name}"].get("description", "")


def _fields(path: str, schema: dict[str, Any]) -> Any:
    for name, field in schema.get("properties", {}).items():
        yield f"{path}{name}", field
        yield from _fields(f"{path}{name}.", field)


def test_every_recipe_goes_through_the_form_unchanged() -> None:
    for recipe in recipe_names():
        config = load_config(recipe, [*_HERE, "select.max_pwatermark=null", "operations.stages=deployments"])
        assert load_settings(json.loads(json.dumps(as_settings(config)))) == config
        assert load_settings({"recipe": recipe, "model": {"base": "tiny"}}) == load_config(recipe, _HERE)


@given(st.integers(1, 10_000), st.floats(0.01, 1), st.sampled_from(["inline", "deployments"]))
def test_settings_are_laid_over_the_recipe(steps: int, punsafe: float, stages: str) -> None:
    config = load_settings(
        {
            "recipe": "demo", "name": "mine", "source": None, "train": {"num_steps": steps},
            "select": {"max_punsafe": punsafe}, "operations": {"stages": stages},
        }
    )  # fmt: skip
    sets = [f"train.num_steps={steps}", f"select.max_punsafe={punsafe!r}", f"operations.stages={stages}", "recipe=mine"]
    assert config == load_config("demo", sets)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "demmo"}, "did you mean demo"),
        ({"recipe": "demo", "train": {"num_step": 3}}, "train.num_step: unknown key; did you mean train.num_steps"),
        ({"recipe": "demo", "train": {"num_steps": 0}}, "train.num_steps: input should be greater than or equal to 1"),
        ({"recipe": "demo", "train": {"global_batch_size": 7}}, "train.global_batch_size: 7 is not a multiple"),
        ({"recipe": 3}, "recipe: 3 is no recipe's name"),
        ({}, "missing"),
        ({"recipe": "demo", "train": "fast"}, "train: "),
    ],
)
def test_a_wrong_value_is_one_clear_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is looked at below
        load_settings(settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda item: item["name"])
def test_prefect_reads_schedules_and_limits(deployment: dict[str, Any]) -> None:
    from prefect.client.schemas.objects import ConcurrencyLimitConfig
    from prefect.client.schemas.schedules import construct_schedule

    if "concurrency_limit" in deployment:
        ConcurrencyLimitConfig.model_validate(deployment["concurrency_limit"])
    for schedule in deployment["schedules"]:
        construct_schedule(cron=schedule["cron"], timezone=schedule["timezone"])
        assert schedule["active"] is False
    assert "lacuna" in deployment["tags"]


def test_a_refresh_that_finds_another_running_is_cancelled() -> None:
    refresh = _BY_NAME["refresh"]
    assert refresh["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
    assert refresh["schedules"]
    assert refresh["work_pool"]["name"]


def test_trainings_of_different_runs_do_not_wait_for_each_other() -> None:
    assert "concurrency_limit" not in _BY_NAME["train"]


def test_tasks_that_use_a_gpu_bear_the_limits_tag() -> None:
    from flows import tasks
    from flows.operate import GPU_LIMIT

    tag = GPU_LIMIT.removeprefix("tag:")
    stages = (tasks.select, tasks.download, tasks.encode, tasks.train, tasks.validate)
    using = {task.name for task in stages if tag in task.tags}
    assert using == {"encode", "train", "validate"}


@pytest.mark.parametrize("file", _TEMPLATES, ids=lambda file: file.stem)
def test_base_job_templates_fill_in(file: Path) -> None:
    """Each placeholder is a variable, each variable is used, and the defaults make a job that Prefect takes."""
    import re

    from prefect.utilities.schema_tools.validation import is_valid_schema, validate
    from prefect.utilities.templating import apply_values

    template = json.loads(file.read_text())
    variables = template["variables"]
    is_valid_schema(variables)
    placeholders = set(re.findall(r"{{\s*(\w+)\s*}}", json.dumps(template["job_configuration"])))
    assert placeholders == set(variables["properties"])
    defaults = {name: field["default"] for name, field in variables["properties"].items() if "default" in field}
    validate(defaults, variables, raise_on_error=True, allow_none_with_default=True)
    filled = json.dumps(apply_values(template["job_configuration"], defaults))
    assert "{{" not in filled
    assert defaults["env"]["PREFECT_LOGGING_EXTRA_LOGGERS"]


def test_there_is_a_template_for_each_type_of_pool() -> None:
    from flows.operate import base_job_template

    assert [file.stem for file in _TEMPLATES] == ["docker", "kubernetes", "process"]
    for pool_type in ("process", "docker", "kubernetes"):
        assert base_job_template(pool_type)["job_configuration"]


def test_the_process_template_is_prefects_own_but_for_its_environment() -> None:
    from prefect.workers.process import ProcessWorker

    ours, theirs = json.loads(_TEMPLATES[2].read_text()), ProcessWorker.get_default_base_job_template()
    assert ours["job_configuration"] == theirs["job_configuration"]
    assert set(ours["variables"]["properties"]) == set(theirs["variables"]["properties"])


def test_kubernetes_jobs_have_no_more_rights_than_they_need() -> None:
    template = json.loads(_TEMPLATES[1].read_text())
    pod = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}
