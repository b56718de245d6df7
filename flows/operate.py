"""``lacuna operate``: what a Prefect server is told once, so that Lacuna's runs can be started and watched there."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
import yaml

from infra.errors import TransientError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse

Json = Annotated[bool, typer.Option("--json", help="Makes one JSON object the last line of stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Shows tracebacks and Prefect's own logging.")]

PoolType = Literal["process", "docker", "kubernetes"]
GPU_LIMIT = "tag:lacuna-gpu"
"""Prefect's limit for tasks of that tag, of which each holds one slot while it uses a GPU; without it none waits."""

IMAGES_CODE = "/opt/lacuna"
"""Where our images have this checkout (infra/docker/Dockerfile)."""

_ROOM = Path(__file__).resolve().parents[1]
_DEPLOYMENTS = _ROOM / "prefect.yaml"
_TEMPLATES = _ROOM / "infra" / "prefect"
_DEPLOY_S = 600

operate_app = typer.Typer(
    name="operate",
    help="Sets a Prefect server up for Lacuna: work pools, limits, deployments, automations.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@operate_app.command()
def setup(
    pool: Annotated[str, typer.Option("--pool", metavar="NAME", help="Work pool of all stages.")] = "lacuna",
    pool_type: Annotated[
        str, typer.Option("--type", metavar="TYPE", help="Of pools: process, docker or kubernetes.")
    ] = "process",
    gpu_pool: Annotated[
        str | None,
        typer.Option("--gpu-pool", metavar="NAME", help="Another pool for encode, train, validate, publish."),
    ] = None,
    gpu_slots: Annotated[
        int | None,
        typer.Option("--gpu-slots", metavar="N", min=1, help="Tasks that may use GPUs at once, over all runs."),
    ] = None,
    update_pools: Annotated[
        bool, typer.Option("--update-pools", help="Gives pools that are there our base job template; defaults stay.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Makes work pools and limits, and deploys all flows. Run again, it keeps what people have set.

    That is: parameters, schedules, job variables and pauses of deployments, and defaults of pools.

    PREFECT_API_URL names the server. Then start workers: prefect worker start --pool lacuna
    """
    from flows.cli import _exit_codes, _show

    with _exit_codes(as_json, debug):
        if pool_type not in ("process", "docker", "kubernetes"):
            raise ValueError(f"--type: {pool_type!r} is no type of pool; choose process, docker or kubernetes")
        done = set_up(pool, cast(PoolType, pool_type), gpu_pool, gpu_slots, update_pools=update_pools)
        _show(done, _screen(done), as_json)


@operate_app.command("install-automations")
def install_automations(
    heartbeat_s: Annotated[
        int | None,
        typer.Option("--heartbeat-s", metavar="S", help="How often runs say that they live [as the pools say]."),
    ] = None,
    notify: Annotated[
        str | None, typer.Option("--notify", metavar="TYPE/NAME", help="Block to tell of failed runs.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Installs the automations that mark dead runs Crashed, and tell of failed ones.

    A run that is silent for three heartbeats is Crashed. Run again, it changes nothing that is as it should be.
    """
    from flows.cli import _exit_codes, _show

    with _exit_codes(as_json, debug):
        from flows.automations import install  # imports prefect, which other verbs must not

        installed = install(heartbeat_s, notify)
        lines = [f"{name}: {what}" for name, what in installed.automations.items()]
        lines.append(f"a run without a heartbeat for {installed.crashed_after_s} s is marked Crashed")
        _show(installed.model_dump(mode="json"), "\n".join(lines), as_json)


def set_up(
    pool: str = "lacuna",
    pool_type: PoolType = "process",
    gpu_pool: str | None = None,
    gpu_slots: int | None = None,
    *,
    update_pools: bool = False,
) -> dict[str, Any]:
    """Makes pools, limits and deployments on the server that Prefect's settings name.

    Args:
        pool: Name of the pool of all stages.
        pool_type: Of pools; a GPU pool that is there may be of another type.
        gpu_pool: Name of another pool for the stages that use GPUs.
        gpu_slots: How many tasks may use GPUs at once; None leaves the limit as it is.
        update_pools: Whether pools that are there get our template, too, with the defaults that they have.

    Returns:
        ``server``, and what became of each of ``pools``, ``limits`` and ``deployments``, by name; ``workers``, the
        commands that start the workers.

    Raises:
        ValueError: No server is named, or it refuses us; a pool is of another type; there is no checkout to deploy
            from, or Prefect does not take what would be deployed.
        TransientError: The server does not answer.
    """
    from flows.api_client import server_client, server_url  # imports prefect, which other verbs must not

    server = server_url()
    if not _DEPLOYMENTS.is_file():
        raise ValueError(f"{_DEPLOYMENTS}: not there; deploy from a checkout, or in an image made from one")
    names = list(dict.fromkeys([pool, gpu_pool or pool]))
    with server_client() as client:
        pools = {name: _pool(client, name, pool_type, update_pools, is_gpu=name != pool) for name in names}
        limits = {} if gpu_slots is None else {GPU_LIMIT: _limit(client, GPU_LIMIT, gpu_slots)}
        standing = _deployed(client)
        types = {name: client.read_work_pool(name).type for name in names}
        _deploy(deployment_plan(types, pool, gpu_pool or pool, standing), server)
        after = _deployed(client)
        for name, one in standing.items():
            if name in after:
                _give_back(client, one, after[name])
    return {
        "server": server,
        "pools": pools,
        "limits": limits,
        "deployments": {name: "updated" if name in standing else "made" for name in sorted(after)},
        "workers": [f"prefect worker start --pool {name}" for name in names],
    }


def base_job_template(pool_type: PoolType, *, is_gpu: bool = False) -> dict[str, Any]:
    """Our base job template of a type of work pool.

    Args:
        pool_type: Which type.
        is_gpu: Whether its runs are to have GPUs: the image for them, one of them in Kubernetes, all of them in Docker.
            A process has those of its worker.
    """
    template = json.loads((_TEMPLATES / f"{pool_type}.json").read_text(encoding="utf-8"))
    if is_gpu and pool_type != "process":
        properties = template["variables"]["properties"]
        properties["image"]["default"] = properties["image"]["default"].removesuffix("-cpu") + "-gpu"
        if pool_type == "kubernetes":
            properties["gpus"]["default"] = 1
        else:
            all_of_them = [{"Driver": "nvidia", "Count": -1, "Capabilities": [["gpu"]]}]
            properties["container_create_kwargs"]["default"]["device_requests"] = all_of_them
    return template


def with_defaults_of(template: dict[str, Any], standing: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A template of ours with the defaults that a pool has: nothing tells which of them people have set.

    Args:
        template: Ours.
        standing: The pool's.

    Returns:
        Ours, where each variable that both have has the pool's default (of a mapping, each entry of the pool's), and
        the names of the variables whose defaults are not ours because of it.
    """
    merged, kept = json.loads(json.dumps(template)), []
    theirs = standing.get("variables", {}).get("properties", {})
    for name, field in merged["variables"]["properties"].items():
        if "default" not in theirs.get(name, {}):
            continue
        default, ours = theirs[name]["default"], field.get("default")
        if isinstance(default, dict) and isinstance(ours, dict):
            default = {**ours, **default}
        if default != ours:
            kept.append(name)
        field["default"] = default
    return merged, kept


def deployment_plan(
    types: dict[str, str], pool: str, gpu_pool: str, standing: dict[str, "DeploymentResponse"]
) -> dict[str, Any]:
    """``prefect.yaml`` with the pools' names in their places, and with what people have set on the server.

    Args:
        types: Name of each pool → its type.
        pool: Of all stages.
        gpu_pool: Of the stages that use GPUs.
        standing: ``flow/deployment`` → what the server has.

    Returns:
        What ``prefect deploy --all`` reads. Values with placeholders (``{{ prefect.blocks… }}``) are left out, for
        Prefect would put what they stand for in their place: a secret, in the database; `_give_back` puts them back.
    """
    plan = yaml.safe_load(_DEPLOYMENTS.read_text(encoding="utf-8"))
    for one in plan["deployments"]:
        name = gpu_pool if "gpu" in one["tags"] else pool
        one["work_pool"] = {**one["work_pool"], "name": name}
        if types[name] != "process":
            one["pull"] = [{"prefect.deployments.steps.set_working_directory": {"directory": IMAGES_CODE}}]
        there = standing.get(f"{Path(one['entrypoint'].partition(':')[0]).stem}/{one['name']}")
        if there is None:
            continue
        one["parameters"] = _without_placeholders({**one["parameters"], **there.parameters})
        one["work_pool"]["job_variables"] = _without_placeholders(
            {**one["work_pool"]["job_variables"], **there.job_variables}
        )
        one["paused"] = there.paused
        one["schedules"] = []  # none is told of, so that each stays as it is: changed, added or deleted
    return plan


def _without_placeholders(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if "{{" not in json.dumps(value)}


def _give_back(client: "SyncPrefectClient", before: "DeploymentResponse", after: "DeploymentResponse") -> None:
    """Gives a deployment the values back that could not go through the plan."""
    from prefect.client.schemas.actions import DeploymentUpdate

    parameters = {**after.parameters, **before.parameters}
    job_variables = {**after.job_variables, **before.job_variables}
    if (parameters, job_variables) != (after.parameters, after.job_variables):
        client.update_deployment(after.id, DeploymentUpdate(parameters=parameters, job_variables=job_variables))


def _pool(client: "SyncPrefectClient", name: str, pool_type: PoolType, update: bool, *, is_gpu: bool) -> str:
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound

    try:
        there = client.read_work_pool(name)
    except ObjectNotFound:
        template = base_job_template(pool_type, is_gpu=is_gpu)
        client.create_work_pool(
            WorkPoolCreate(name=name, type=pool_type, base_job_template=template, description="Lacuna's flow runs.")
        )
        return f"made, of type {pool_type}"
    if there.type != pool_type and not is_gpu:
        raise ValueError(f"--pool: {name} is of type {there.type}, not {pool_type}; set --type {there.type}, or a name")
    if there.type not in ("process", "docker", "kubernetes"):
        return f"as it was, of type {there.type}, for which we have no template"
    template = base_job_template(cast(PoolType, there.type), is_gpu=is_gpu)
    if there.base_job_template == template:
        return "as it was"
    merged, kept = with_defaults_of(template, there.base_job_template)
    its_own = f"; defaults of its own: {', '.join(kept)}" if kept else ""
    if there.base_job_template == merged:
        return f"as it was{its_own}"
    if not update:
        return "as it was, with a template of its own"
    client.update_work_pool(name, WorkPoolUpdate(base_job_template=merged))
    return f"given our template{its_own}"


def _limit(client: "SyncPrefectClient", name: str, slots: int) -> str:
    from prefect.exceptions import ObjectNotFound

    try:
        before = client.read_global_concurrency_limit_by_name(name).limit
    except ObjectNotFound:
        before = None
    if before == slots:
        return f"as it was: {slots}"
    client.upsert_global_concurrency_limit_by_name(name, slots)
    return f"made: {slots}" if before is None else f"set from {before} to {slots}"


def _deployed(client: "SyncPrefectClient") -> dict[str, "DeploymentResponse"]:
    """``flow/deployment`` → ours, which are those with the tag ``lacuna``."""
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags

    found = client.read_deployments(deployment_filter=DeploymentFilter(tags=DeploymentFilterTags(all_=["lacuna"])))
    flows = {flow_id: client.read_flow(flow_id).name for flow_id in {one.flow_id for one in found}}
    return {f"{flows[one.flow_id]}/{one.name}": one for one in found}


def _deploy(plan: dict[str, Any], server: str) -> None:
    """``prefect deploy --all`` of a plan."""
    with tempfile.TemporaryDirectory(prefix="lacuna-") as folder:
        file = Path(folder) / "prefect.yaml"
        file.write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")
        argv = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
        try:
            done = subprocess.run(
                argv, cwd=_ROOM, capture_output=True, text=True, timeout=_DEPLOY_S, check=False,
                stdin=subprocess.DEVNULL, env={**os.environ, "PREFECT_API_URL": server},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise TransientError(f"`prefect deploy --all` has not ended within {_DEPLOY_S} s") from None
    if done.returncode != 0:
        said = " ".join((done.stdout + done.stderr).split())
        raise ValueError(f"{_DEPLOYMENTS.name}: `prefect deploy --all` has failed: {said[-600:]}")


def _screen(done: dict[str, Any]) -> str:
    lines = [f"server       {done['server']}"]
    for kind in ("pools", "limits", "deployments"):
        lines += [f"{kind[:-1]:<12} {name:<20} {what}" for name, what in done[kind].items()]
    return "\n".join([*lines, *(f"{'next':<12} {command}" for command in done["workers"])])
