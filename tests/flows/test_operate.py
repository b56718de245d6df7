"""What ``lacuna operate setup`` would tell a server; with a server: test_automations.py, test_deployments.py."""

import copy
import json
import re
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import pytest

from flows.operate import IMAGES_CODE, base_job_template, deployment_plan, set_up, with_defaults_of

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


def planned(types: dict[str, str], gpu_pool: str = "cpu", standing: Any = None) -> dict[str, dict[str, Any]]:
    plan = deployment_plan(types, "cpu", gpu_pool, standing or {})
    return {one["name"]: one for one in plan["deployments"]}


def deployed(**fields: Any) -> Any:
    from prefect.client.schemas.responses import DeploymentResponse

    return DeploymentResponse.model_validate({"name": "refresh", "flow_id": uuid4(), **fields})


def test_what_people_have_set_on_a_deployment_goes_into_the_plan() -> None:
    config, secret = {"recipe_file": "/weights/ours.yaml"}, "{{ prefect.blocks.secret.token }}"
    standing = deployed(
        parameters={"config": config, "root": "s3://ours/main"},
        job_variables={"memory_limit": "64Gi", "env": {"TOKEN": secret}},
        paused=True,
    )
    one = planned({"cpu": "process"}, standing={"refresh/refresh": standing})["refresh"]
    assert one["parameters"] == {"config": config, "root": "s3://ours/main", "train": False}
    assert one["work_pool"]["job_variables"] == {"memory_limit": "64Gi"}  # the secret would be put in its place
    assert one["paused"] is True
    assert one["schedules"] == []  # which leaves them all
    shipped = planned({"cpu": "process"})["refresh"]
    assert shipped["parameters"]["config"] == {"recipe": "demo"}
    assert len(shipped["schedules"]) == 1


def test_a_stage_is_found_by_its_flow_and_its_own_name() -> None:
    standing = deployed(name="encode", parameters={"root": "s3://ours/main"})
    plan = planned({"cpu": "process"}, standing={"stage/encode": standing})
    assert [name for name, one in plan.items() if one["parameters"]["root"] == "s3://ours/main"] == ["encode"]
    assert plan["encode"]["parameters"]["stage"] == "encode"


def test_code_is_where_the_pools_runs_have_it() -> None:
    plan = planned({"cpu": "process", "gpu": "kubernetes"}, "gpu")
    (pull,) = plan["train"]["pull"]
    assert pull == {"prefect.deployments.steps.set_working_directory": {"directory": IMAGES_CODE}}
    assert plan["encode"]["pull"] == [pull]
    assert "pull" not in plan["download"]  # where it was deployed from
    assert plan["download"]["work_pool"]["name"] == "cpu"
    dockerfile = (Path(__file__).parents[2] / "infra" / "docker" / "Dockerfile").read_text()
    assert set(re.findall(r"^WORKDIR (.+)$", dockerfile, re.MULTILINE)) == {IMAGES_CODE}


@pytest.mark.parametrize("pool_type", ["process", "docker", "kubernetes"])
def test_a_gpu_pools_template_asks_for_gpus(pool_type: Literal["process", "docker", "kubernetes"]) -> None:
    plain = base_job_template(pool_type)["variables"]["properties"]
    properties = base_job_template(pool_type, is_gpu=True)["variables"]["properties"]
    if pool_type == "process":
        assert properties == plain
        return
    assert properties["image"]["default"] == plain["image"]["default"].replace("-cpu", "-gpu")
    if pool_type == "kubernetes":
        assert (properties["gpus"]["default"], "default" in plain["gpus"]) == (1, False)
    else:
        asked = properties["container_create_kwargs"]["default"]
        assert asked["device_requests"][0]["Capabilities"] == [["gpu"]]
        assert "device_requests" not in plain["container_create_kwargs"]["default"]


def test_a_template_that_is_updated_keeps_the_pools_defaults() -> None:
    ours = base_job_template("kubernetes")
    standing = copy.deepcopy(ours)
    standing["job_configuration"]["job_manifest"]["spec"]["backoffLimit"] = 7
    properties = standing["variables"]["properties"]
    properties["image"]["default"] = "registry.example.org/lacuna:2"
    properties["gpus"]["default"] = 8
    properties["env"]["default"] = {"MINE": "1", "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60"}
    properties["gone"] = {"type": "string", "default": "old"}
    merged, kept = with_defaults_of(ours, standing)
    assert sorted(kept) == ["env", "gpus", "image"]
    assert merged["job_configuration"] == ours["job_configuration"]
    assert "gone" not in merged["variables"]["properties"]
    defaults = {name: field.get("default") for name, field in merged["variables"]["properties"].items()}
    assert (defaults["image"], defaults["gpus"]) == ("registry.example.org/lacuna:2", 8)
    assert defaults["env"] == {
        "MINE": "1", "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60", "PREFECT_LOGGING_EXTRA_LOGGERS":
        "flows,training,preprocessing,infra",
    }  # fmt: skip
    assert with_defaults_of(ours, ours) == (ours, [])
    assert ours == base_job_template("kubernetes")


def test_docker_runs_do_without_credentials_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that the pool's environment names may be missing: the machine's role does then."""
    from infra.s3_client import make_client

    template = base_job_template("docker")["variables"]["properties"]
    files = {name: path for name, path in template["env"]["default"].items() if name.startswith("AWS_")}
    assert any(volume.endswith(":/etc/lacuna:ro") for volume in template["volumes"]["default"])
    assert all(path.startswith("/etc/lacuna/") for path in files.values())
    for name, path in files.items():
        monkeypatch.setenv(name, str(tmp_path / Path(path).name))
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ENDPOINT_URL_S3",
        "AWS_ENDPOINT_URL",
        "AWS_PROFILE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    make_client().close()
    (tmp_path / "config").write_text("[default]\nendpoint_url = http://127.0.0.1:9\nregion = us-east-1\n")
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    client = make_client()
    assert client.meta.endpoint_url == "http://127.0.0.1:9"
    client.close()


def test_without_a_server_both_verbs_say_so() -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.automations import install

    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        for verb in (set_up, install):
            with pytest.raises(ValueError, match="PREFECT_API_URL: not set"):
                verb()


@pytest.mark.parametrize("status", [401, 403, 500])
def test_what_a_server_refuses_is_one_line(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    from flows.automations import install
    from infra.errors import TransientError

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"detail": "no"}).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 - http.server asks for this name

        def log_message(self, format: str, *args: Any) -> None: ...  # noqa: A002 - the base's name

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/api"
        kind, said = (ValueError, "PREFECT_API_AUTH_STRING: the server at") if status < 500 else (TransientError, url)
        with temporary_settings({PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}):
            for verb in (set_up, lambda: install(heartbeat_s=30)):
                with pytest.raises(kind, match=re.escape(said)) as caught:
                    verb()
                assert "\n" not in str(caught.value)
        server.shutdown()
    with (
        temporary_settings({PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}),
        pytest.raises(TransientError, match="does not answer"),
    ):
        set_up()
