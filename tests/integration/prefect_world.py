"""A real Prefect server and real process workers, on loopback, as processes of their own under guards."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from infra.processes import GuardedProcess

ROOM = Path(__file__).resolve().parents[2]
POOL = "lacuna"
END_STATES = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
_START_S = 240.0
_POLL_S = 0.25
_MARK = "LACUNA_TEST_WORKER"
# A worker's parent, which stays when the worker is killed: a guard kills what a command leaves behind when it ends, and
# what a killed worker leaves behind is what a test may want to see.
_STAYS = """
import pathlib, signal, subprocess, sys, time
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(True))
worker = subprocess.Popen(sys.argv[2:])
pathlib.Path(sys.argv[1]).write_text(str(worker.pid))
worker.wait()
while not told:
    time.sleep(0.1)
"""
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback: no proxy


class PrefectServer:
    """``prefect server start`` on a port that it keeps, so that it can be restarted under its clients.

    Attributes:
        folder: Its ``PREFECT_HOME``: the database, unless another one is named, and the logs.
        port: Where it listens.

    Args:
        folder: As above; made if need be.
        database_url: SQLAlchemy's; None for SQLite in ``folder``.
        settings: More of Prefect's environment.
    """

    def __init__(
        self, folder: Path, database_url: str | None = None, settings: Mapping[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port = folder, _free_port()
        self._settings = dict(settings or {})
        if database_url is not None:
            self._settings["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database_url
        self._process: GuardedProcess | None = None

    @property
    def api_url(self) -> str:
        """What clients put into ``PREFECT_API_URL``."""
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def ui_url(self) -> str:
        """Where people look."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The whole environment of a process that uses this server, and this checkout."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        return {
            **inherited,
            "PREFECT_HOME": str(self.folder),
            "PREFECT_API_URL": self.api_url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_API_URL": self.api_url,
            "PREFECT_CLI_COLORS": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_WORKER_PREFETCH_SECONDS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOM), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
            **self._settings,
        }

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        argv = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        env = {name: value for name, value in self.environment.items() if name != "PREFECT_API_URL"}
        self._process = GuardedProcess(argv, env=env, cwd=ROOM, log_path=self.folder / "server.log", grace_s=10).start()
        deadline = time.monotonic() + _START_S
        while not self.is_healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Prefect's server did not come up:\n{self._process.last_lines()}")
            time.sleep(0.2)

    def stop(self, *, grace_s: float = 10.0) -> None:
        """Ends it and all its processes; ``grace_s=0`` kills it."""
        if self._process is not None:
            self._process.terminate(grace_s)
            self._process = None

    def restart(self) -> None:
        """Kills it, and starts it with the same database on the same port."""
        self.stop(grace_s=0)
        self.start()

    def is_healthy(self) -> bool:
        """Whether it answers."""
        with contextlib.suppress(OSError, ValueError):
            return self.get("/health") is True
        return False

    def get(self, path: str) -> Any:
        """What the API answers to a GET of ``/path``."""
        return self._call("GET", path, None)

    def post(self, path: str, body: Any = None) -> Any:
        """What the API answers to a POST."""
        return self._call("POST", path, {} if body is None else body)

    def patch(self, path: str, body: Any) -> Any:
        """What the API answers to a PATCH."""
        return self._call("PATCH", path, body)

    def cli(self, *words: str, timeout_s: float = 180) -> str:
        """Runs ``prefect WORDS`` in the checkout; returns its output, and fails if it does."""
        argv = [sys.executable, "-m", "prefect", "--no-prompt", *words]
        return _succeed(argv, self.environment, timeout_s)

    def lacuna(self, *words: str, timeout_s: float = 180) -> str:
        """Runs ``lacuna WORDS`` in the checkout against this server."""
        return _succeed([sys.executable, "-m", "flows.cli", *words], self.environment, timeout_s)

    # ------------------------------------------------------------------------------------------------------- flow runs

    def deployment_id(self, name: str) -> str:
        """The id of deployment ``flow/name``; of the flow's first one if no name is given."""
        flow, _, deployment = name.partition("/")
        found = self.post("/deployments/filter", {"flows": {"name": {"any_": [flow]}}, "sort": "NAME_ASC"})
        ids = [one["id"] for one in found if deployment in ("", one["name"])]
        assert ids, f"no deployment {name}"
        return ids[0]

    def create_run(self, deployment: str, parameters: Mapping[str, Any] | None = None) -> str:
        """Asks for a run of a deployment, as the UI does; returns the flow run's id."""
        path = f"/deployments/{self.deployment_id(deployment)}/create_flow_run"
        return self.post(path, {"state": {"type": "SCHEDULED"}, "parameters": dict(parameters or {})})["id"]

    def cancel(self, flow_run_id: str) -> None:
        """What the UI's button does."""
        state = {"type": "CANCELLING", "name": "Cancelling", "message": "cancelled by a test"}
        self.post(f"/flow_runs/{flow_run_id}/set_state", {"state": state, "force": False})

    def state(self, flow_run_id: str) -> dict[str, Any]:
        """A flow run's state: ``type``, ``name``, ``message`` and so on; an empty one if the server is away."""
        with contextlib.suppress(OSError):
            return self.get(f"/flow_runs/{flow_run_id}")["state"] or {}
        return {}

    def wait_for_end(self, flow_run_id: str, timeout_s: float = 300) -> dict[str, Any]:
        """Waits until a flow run has ended in whatever way; returns its state."""
        await_true(lambda: self.state(flow_run_id).get("type") in END_STATES, f"end of {flow_run_id}", timeout_s)
        return self.state(flow_run_id)

    def artifacts(self, flow_run_id: str) -> dict[str, dict[str, Any]]:
        """Key → newest artifact of a flow run."""
        body = {"artifacts": {"flow_run_id": {"any_": [flow_run_id]}}, "sort": "ID_DESC", "limit": 200}
        found = self.post("/artifacts/filter", body)
        return {one["key"]: one for one in sorted(found, key=lambda one: one["created"])}

    def logs(self, flow_run_id: str) -> list[dict[str, Any]]:
        """What a flow run has logged, oldest first."""
        body = {"logs": {"flow_run_id": {"any_": [flow_run_id]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
        found: list[dict[str, Any]] = []
        while page := self.post("/logs/filter", {**body, "offset": len(found)}):
            found += page
        return found

    def events(self, name_prefix: str) -> list[dict[str, Any]]:
        """Events whose names begin so, oldest first."""
        body = {"filter": {"event": {"prefix": [name_prefix]}, "order": "ASC"}, "limit": 50}
        return self.post("/events/filter", body)["events"]

    def _call(self, method: str, path: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310 - loopback
            f"{self.api_url}{path}", data=data, method=method, headers={"content-type": "application/json"}
        )
        try:
            with _OPENER.open(request, timeout=30) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            with error:
                raise RuntimeError(f"{method} {path}: {error.code} {error.read()[:1000]!r}") from None
        return json.loads(text) if text else None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop(grace_s=0)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start_server(
    folder: Path, database_url: str | None = None, settings: Mapping[str, str] | None = None
) -> PrefectServer:
    """A Prefect server; a context manager that ends it, and that yields it once it answers."""
    return PrefectServer(folder, database_url, settings)


@contextlib.contextmanager
def start_worker(
    server: PrefectServer, pool: str = POOL, name: str | None = None, settings: Mapping[str, str] | None = None
) -> Iterator[GuardedProcess]:
    """A process worker of a pool, at the checkout; whatever it runs ends with it.

    Args:
        server: Which it asks for work.
        pool: Whose work.
        name: Of the worker; also of its log, ``worker-NAME.log`` in the server's folder.
        settings: More environment, for the worker and what it runs.
    """
    name = name or f"worker-{_free_port()}"
    pid_file = server.folder / f"worker-{name}.pid"
    argv = [sys.executable, "-c", _STAYS, str(pid_file)]
    argv += [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process", "--name", name]
    env = {**server.environment, **(settings or {}), _MARK: name}
    with GuardedProcess(argv, env=env, cwd=ROOM, log_path=server.folder / f"worker-{name}.log", grace_s=15) as worker:
        await_true(pid_file.exists, "the worker's start", _START_S)
        yield worker


def kill_worker(server: PrefectServer, worker: GuardedProcess) -> None:
    """Kills a worker itself, and nothing that it has started."""
    os.kill(int((server.folder / f"worker-{worker.argv[-1]}.pid").read_text()), signal.SIGKILL)


def started_by(worker: GuardedProcess) -> dict[int, str]:
    """Process id → command of whatever a worker has started, down to the last descendant, and that is not dead.

    They are known by a variable of the environment that all of them inherit.
    """
    mark = f"\0{_MARK}={worker.argv[-1]}\0".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if mark in b"\0" + (folder / "environ").read_bytes() and "prefect worker start" not in command:
                found[int(folder.name)] = command
    return found


def make_pool(server: PrefectServer, pool: str = POOL) -> None:
    """Makes a process pool if it is not there."""
    try:
        server.get(f"/work_pools/{pool}")
    except RuntimeError:
        server.cli("work-pool", "create", "--type", "process", pool)


def deploy_all(server: PrefectServer, pool: str = POOL) -> str:
    """What ``prefect.yaml`` says at its top: makes the pool, deploys everything as shipped; returns what it printed."""
    make_pool(server, pool)
    return server.cli("deploy", "--all")


def await_true(is_so: Callable[[], bool], what: str, timeout_s: float) -> float:
    """Waits for something that must come true; returns how many seconds it took."""
    started = time.monotonic()
    while not is_so():
        if time.monotonic() - started > timeout_s:
            raise AssertionError(f"{what}: not within {timeout_s:g} s")
        time.sleep(_POLL_S)
    return time.monotonic() - started


def _succeed(argv: list[str], env: dict[str, str], timeout_s: float) -> str:
    done = subprocess.run(
        argv,
        env=env,
        cwd=ROOM,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{argv[2:]}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
