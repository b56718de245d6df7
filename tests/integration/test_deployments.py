"""The deployments as a user runs them: a real Prefect server, a real process worker, everything deployed as shipped.

Once on SQLite, and in the campaigns on a Postgres server, too.
"""

import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infra.processes import GuardedProcess
from tests.integration.conftest import free_port, shard_hashes
from tests.integration.prefect_world import (
    PrefectServer,
    await_true,
    deploy_all,
    start_server,
    start_worker,
    started_by,
)
from tests.integration.screenshots import CHROMIUM, shoot_all
from tests.integration.test_cancel import await_download, await_nothing_left

pytestmark = pytest.mark.timeout(900)
RUN_S = 500.0
FLOWS = ("pipeline", "prepare", "train", "validate", "publish", "refresh")
ALL = {*(f"{flow}/{flow}" for flow in FLOWS), *(f"stage/{stage}" for stage in ("select", "download", "encode"))}

# The demo, as small as it goes with every stage and a report in it.
SETTINGS: dict[str, Any] = {
    "recipe": "demo",
    "source": {"demo": {"num_pictures": 60}, "rows_per_shard": 64},
    "select": {"validation_fraction": 0.2},
    "download": {"timeout_s": 3},
    "encode": {"num_mask_variants": 1},
    "train": {
        "num_steps": 4, "num_processes": 1, "global_batch_size": 16, "micro_batch_size": 16, "warmup_steps": 1,
        "checkpoint_every_steps": 2,
    },
    "validation": {
        "mask_families": ["lama_medium_512"], "num_samples": 4, "num_object_samples": 4, "num_inference_steps": 2,
        "num_grid_rows": 2,
    },
}  # fmt: skip


@dataclass
class World:
    """A server with a worker, where everything is deployed.

    Attributes:
        server: The server.
        folder: For the stores.
        port: Of the demo world's pictures.
        setup: What ``lacuna operate setup --json`` has said.
        worker: The worker.
    """

    server: PrefectServer
    folder: Path
    port: int
    setup: dict[str, Any]
    worker: GuardedProcess

    def parameters(self, store: str, **sections: Any) -> dict[str, Any]:
        """A small demo's parameters, with whole sections replaced."""
        config = {**SETTINGS, **sections}
        source = config["source"]
        config["source"] = {**source, "demo": {**source["demo"], "port": self.port}}
        return {"config": config, "root": str(self.folder / store)}

    def run(self, deployment: str, parameters: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Runs a deployment to its end; the run's id, and its state."""
        run = self.server.create_run(deployment, parameters)
        return run, self.server.wait_for_end(run, RUN_S)

    def family(self, run: str) -> list[dict[str, Any]]:
        """A flow run and all that it has started, directly or not."""
        runs, parents = [self.server.get(f"/flow_runs/{run}")], [run]
        while parents:
            query = {"flow_runs": {"parent_flow_run_id": {"any_": parents}}, "limit": 200}
            children = self.server.post("/flow_runs/filter", query)
            runs, parents = runs + children, [child["id"] for child in children]
        return runs

    def artifacts(self, run: str) -> dict[str, dict[str, Any]]:
        """Key → artifact of a flow run and of all below it."""
        return {key: one for member in self.family(run) for key, one in self.server.artifacts(member["id"]).items()}


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Postgres server of our own; its URL for SQLAlchemy."""
    found = shutil.which("initdb")
    if found is None:
        pytest.skip("no Postgres here: initdb is not on PATH")
    binaries = Path(found).resolve().parent
    # Postgres refuses to run as root, and another user cannot look into the test's own folder.
    prefix = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.geteuid() == 0 else []
    folder, port = Path(tempfile.mkdtemp(prefix="lacuna-postgres-")), free_port()
    if prefix:
        shutil.chown(folder, "nobody", "nogroup")
    options = ["-h", "127.0.0.1", "-p", str(port), "-k", str(folder), "-c", "fsync=off"]
    log = tmp_path_factory.mktemp("postgres")
    argv = [*prefix, str(binaries / "initdb"), "-D", str(folder / "data"), "-A", "trust", "-U", "lacuna", "-E", "UTF8"]
    try:
        with GuardedProcess(argv, cwd=folder, log_path=log / "initdb.log") as making:
            await_true(lambda: making.poll() is not None, "initdb", 120)
            assert making.poll() == 0, making.last_lines()
        argv = [*prefix, str(binaries / "postgres"), "-D", str(folder / "data"), *options]
        with GuardedProcess(argv, cwd=folder, log_path=log / "postgres.log", grace_s=10) as serving:
            await_true(lambda: "ready to accept connections" in serving.last_lines(), "Postgres", 60)
            yield f"postgresql+asyncpg://lacuna@127.0.0.1:{port}/postgres"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.soak)])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    database = None if request.param == "sqlite" else request.getfixturevalue("postgres")
    folder = tmp_path_factory.mktemp("deployments")
    # Other tests may keep the machine, and so SQLite's lock, busy for longer than Prefect is used to wait.
    with start_server(folder / "prefect", database, {"PREFECT_SERVER_DATABASE_TIMEOUT": "60"}) as server:
        setup = json.loads(server.lacuna("operate", "setup", "--json").strip().splitlines()[-1])
        with start_worker(server) as worker:
            yield World(server, folder, free_port(), setup, worker)


@pytest.fixture(scope="module")
def completed(world: World) -> str:
    """A run of the whole pipeline, in one process."""
    run, state = world.run("pipeline/pipeline", world.parameters("inline"))
    assert state["type"] == "COMPLETED", (state["message"], world.server.logs(run)[-5:])
    return run


def test_everything_is_deployed(world: World) -> None:
    assert world.setup["pools"] == {"lacuna": "made, of type process"}
    assert world.setup["deployments"] == dict.fromkeys(ALL, "made")
    deployed = {one["name"]: one for one in world.server.post("/deployments/filter", {})}
    assert {name.split("/")[1] for name in ALL} == set(deployed)
    assert all(one["enforce_parameter_schema"] and one["description"] for one in deployed.values())
    (schedule,) = deployed["refresh"]["schedules"]
    assert schedule["active"] is False
    assert schedule["schedule"]["timezone"] == "UTC"
    assert deployed["refresh"]["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"


def test_the_pipeline_completes_with_its_artifacts(world: World, completed: str) -> None:
    """What a person looks at after a run, through the API that the page asks."""
    assert {run["state_type"] for run in world.family(completed)} == {"COMPLETED"}
    artifacts = world.artifacts(completed)
    stages = ("select", "download", "encode")
    expected = {f"{stage}-funnel" for stage in stages} | {"validation-report", "publish-channels", "train-checkpoint"}
    assert expected <= set(artifacts)
    rows = {row["row"]: row["count"] for row in json.loads(artifacts["encode-funnel"]["data"])}
    assert rows["in"] == sum(count for row, count in rows.items() if row != "in")
    store = world.folder / "inline"
    assert {name.split("/")[0] for name in shard_hashes(store)} == set(stages)
    assert {file.name for file in (store / "channels").glob("*.json")} == {"latest.json", "best.json", "stable.json"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"recipe": "demmo"}, "demmo"),
        ({"recipe": "demo", "select": {"max_punsafe": 2}}, "max_punsafe"),
        ({"recipe": "demo", "tranin": {}}, "tranin"),
    ],
)
def test_a_value_that_the_form_does_not_allow_starts_nothing(world: World, config: dict[str, Any], said: str) -> None:
    with pytest.raises(RuntimeError, match=r"409|422") as caught:
        world.server.create_run("pipeline/pipeline", {"config": config, "root": "nowhere"})
    assert said in str(caught.value)


def test_values_that_do_not_fit_together_are_one_line_of_the_runs_state(world: World) -> None:
    parameters = world.parameters("bad", train={"global_batch_size": 7})
    run, state = world.run("stage/select", parameters)
    assert state["type"] == "FAILED"
    assert "train.global_batch_size: 7 is not a multiple" in state["message"]
    assert "\n" not in state["message"]
    assert not (world.folder / "bad" / "datasets").exists()
    assert world.server.get(f"/flow_runs/{run}")["parameters"]["config"]["train"] == {"global_batch_size": 7}


def test_cancelling_ends_the_run_and_all_that_it_started(world: World) -> None:
    """In the middle of a download; ``test_cancel.py`` does it elsewhere, too, and runs it again."""
    source = {**SETTINGS["source"], "demo": {"num_pictures": 1500}}
    parameters = world.parameters("cancelled", source=source)
    run = world.server.create_run("prepare", parameters)
    await_download(world.worker)
    assert len(started_by(world.worker)) > 3  # the flow, guards, the engine, its own
    world.server.cancel(run)
    assert world.server.wait_for_end(run, 60)["type"] == "CANCELLED"
    root = Path(parameters["root"])
    await_nothing_left(world.worker, root)
    assert not list(root.glob("datasets/download/*/MANIFEST.json"))
    assert list(root.glob("datasets/select/*/MANIFEST.json"))


@pytest.mark.soak
def test_stages_as_deployments_make_the_same(world: World, completed: str) -> None:
    before = {run["id"] for run in world.family(completed)}
    run, state = world.run("pipeline/pipeline", world.parameters("spread", operations={"stages": "deployments"}))
    assert state["type"] == "COMPLETED", (state["message"], world.server.logs(run)[-5:])
    family = world.family(run)
    handed_over = [member for member in family if member["deployment_id"] is not None and member["id"] != run]
    assert not before & {member["id"] for member in family}
    assert len(handed_over) == 6
    assert shard_hashes(world.folder / "spread") == shard_hashes(world.folder / "inline")
    runs = [sorted(path.name for path in (world.folder / name / "runs").iterdir()) for name in ("spread", "inline")]
    assert runs[0] == runs[1]
    for key in ("select-funnel", "encode-funnel"):
        assert world.artifacts(run)[key]["data"] == world.artifacts(completed)[key]["data"]


@pytest.mark.soak
def test_cancelling_the_parent_cancels_what_it_handed_over(world: World) -> None:
    config = world.parameters("cancelled", operations={"stages": "deployments"}, train={"num_steps": 100_000})
    run = world.server.create_run("pipeline/pipeline", config)

    def training() -> list[dict[str, Any]]:
        return [one for one in world.family(run) if one["tags"] == ["lacuna", "gpu"] or "gpu" in one["tags"]]

    await_true(lambda: any(one["state_type"] == "RUNNING" for one in training()), "a child", RUN_S)
    world.server.cancel(run)
    assert world.server.wait_for_end(run, 120)["type"] == "CANCELLED"
    ended = {"CANCELLED", "COMPLETED"}
    await_true(lambda: all(one["state_type"] in ended for one in world.family(run)), "end of the children", 120)
    assert any(one["state_type"] == "CANCELLED" for one in training())


@pytest.mark.soak
def test_two_trainings_of_one_run_wait_for_each_other(world: World, completed: str) -> None:
    parameters = world.parameters("inline", train={**SETTINGS["train"], "seed": 1, "num_steps": 20})
    runs = [world.server.create_run("train/train", parameters) for _ in range(2)]
    assert [world.server.wait_for_end(run, RUN_S)["type"] for run in runs] == ["COMPLETED", "COMPLETED"]
    spans = sorted(
        (one["start_time"], one["end_time"])
        for run in runs
        for one in world.server.post("/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
        if one["name"].startswith("train")
    )
    assert spans[0][1] <= spans[1][0]
    limits = world.server.post("/v2/concurrency_limits/filter", {})
    assert not [one["name"] for one in limits if one["name"].startswith("lacuna-train-")]


@pytest.mark.soak
def test_setting_up_again_changes_nothing(world: World) -> None:
    again = json.loads(world.server.lacuna("operate", "setup", "--gpu-slots", "1", "--json").strip().splitlines()[-1])
    assert again["pools"] == {"lacuna": "as it was"}
    assert again["deployments"] == dict.fromkeys(ALL, "updated")
    assert again["limits"] == {"tag:lacuna-gpu": "made: 1"}
    deployments = {one["name"]: one["id"] for one in world.server.post("/deployments/filter", {})}
    deploy_all(world.server)  # by hand, as prefect.yaml says
    assert {one["name"]: one["id"] for one in world.server.post("/deployments/filter", {})} == deployments


@pytest.mark.soak
def test_setting_up_again_keeps_what_people_have_set(world: World) -> None:
    def refresh() -> dict[str, Any]:
        return next(one for one in world.server.post("/deployments/filter", {}) if one["name"] == "refresh")

    shipped = refresh()
    (schedule,) = shipped["schedules"]
    edited = {
        "parameters": {"config": {"recipe": "sd2-inpaint-256"}, "root": "s3://ours/main", "train": True},
        "job_variables": {"env": {"OURS": "1", "TOKEN": "{{ prefect.variables.token }}"}},
        "paused": True,
    }
    when = {"cron": "5 4 * * *", "timezone": "Europe/Berlin", "day_or": True}
    own = {"schedule": {"cron": "0 0 1 1 *", "timezone": "UTC"}, "active": False}
    world.server.patch(f"/deployments/{shipped['id']}", edited)
    change = {"active": True, "schedule": when}
    world.server.patch(f"/deployments/{shipped['id']}/schedules/{schedule['id']}", change)
    world.server.post(f"/deployments/{shipped['id']}/schedules", [own])
    before = refresh()
    world.server.lacuna("operate", "setup")
    after = refresh()
    assert {name: after[name] for name in edited} == edited
    assert sorted(after["schedules"], key=str) == sorted(before["schedules"], key=str)
    assert {one["schedule"]["cron"] for one in after["schedules"]} == {"5 4 * * *", "0 0 1 1 *"}
    assert after["pull_steps"] == before["pull_steps"] == shipped["pull_steps"]


@pytest.mark.soak
@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM} here")
def test_people_see_a_form_and_a_story(world: World, completed: str, tmp_path: Path) -> None:
    started = time.time()
    files = asyncio.run(shoot_all(world.server.api_url, tmp_path, completed))
    assert [file.name for file in files] == ["form.png", "flow-run.png", "artifacts.png"]
    for file in files:
        assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert file.stat().st_size > 20_000
        assert file.stat().st_mtime >= started - 1
