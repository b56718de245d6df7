"""Prefect's server for one command, and the environment that Prefect reads when it is imported.

Prefect can start a temporary server by itself. It is done here instead because

* that imports the whole server into the flow's process too, some seconds of work, while this one comes up beside it;
* this one is under a guard: it does not outlive us, however we end.
"""

import contextlib
import fcntl
import os
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from infra.errors import TransientError
from infra.processes import GuardedProcess

_ROOM = Path(__file__).resolve().parents[1]
_START_S = 300.0  # ten seconds as a rule; a laden machine may take long, and a server that dies is noticed at once
_POLL_S = 0.1


def is_local(root: str) -> bool:
    """Whether a store's root is a folder of this machine."""
    return "://" not in root or root.startswith("file://")


def beside(root: str, name: str) -> Path:
    """A local folder of our own: beside a local root (``var/store`` → ``var/{name}``), else ``./var/{name}``.

    Where that cannot be written, as beside a mounted root, it lies in the folder for temporary files.
    """
    folder = (
        Path(root.removeprefix("file://")).expanduser().absolute().parent if is_local(root) else Path("var").absolute()
    )
    for place in (folder, Path(tempfile.gettempdir()) / f"lacuna-{os.getuid()}"):
        if _is_ours(place / name):
            return place / name
    return folder / name


def _is_ours(folder: Path) -> bool:
    """Whether we can write there: into the folder, or else into the nearest one above it that exists."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def prefect_home(root: str) -> Path:
    """Where Prefect keeps its history: ``PREFECT_HOME`` if the user has set it, else ``prefect`` beside the root."""
    chosen = os.environ.get("PREFECT_HOME")
    return Path(chosen).expanduser().absolute() if chosen else beside(root, "prefect")


@contextlib.contextmanager
def prefect_server(root: str, *, debug: bool = False) -> Iterator[None]:
    """Runs Prefect's API while the block lasts, unless ``PREFECT_API_URL`` names one.

    Must be entered before prefect is imported: Prefect reads its environment then.

    Args:
        root: The store's root; the history is kept beside it.
        debug: Whether Prefect logs.

    Raises:
        ValueError: The folder for the history cannot be made.
        TransientError: The server did not come up.
    """
    # Prefect's log goes into its history. On the console it would say what we say ourselves, and show every failure as
    # a traceback, even where one line tells the user what to change.
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "DEBUG" if debug else "INFO")
    if not debug:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    # As our work pools say it: three beats missed, and the automation of `flows.automations` takes a run for dead. With
    # Prefect's own 180 s it would take any run for that.
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")
    if os.environ.get("PREFECT_API_URL"):
        yield
        return
    home = prefect_home(root)
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"PREFECT_HOME: {str(home)!r} cannot be made ({error.strerror}); choose another folder"
        ) from None
    os.environ["PREFECT_HOME"] = str(home)
    os.environ.setdefault("PREFECT_LOGGING_SERVER_LEVEL", "WARNING")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", f"{_START_S:.0f}")
    # Blocks are credentials and the like, kept in Prefect's database: we have none, and registering their kinds takes
    # seconds.
    os.environ.setdefault("PREFECT_SERVER_REGISTER_BLOCKS_ON_START", "false")
    os.environ.setdefault("PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION", "false")
    with contextlib.ExitStack() as stack:
        with _alone(home):
            process, port = stack.enter_context(_serving(home / f"server-{os.getpid()}.log"))
            os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
            stack.callback(_forget_server)
            import prefect.flow_engine  # noqa: F401 - while the server comes up

            _await_health(process, port)
        yield


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """One start at a time: two servers that make the same new database at once get into each other's way."""
    with (home / ".starting").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _forget_server() -> None:
    _drain()
    del os.environ["PREFECT_API_URL"]


@contextlib.contextmanager
def _serving(log_path: Path) -> Iterator[tuple[GuardedProcess, int]]:
    port = 0
    told = threading.Event()

    def listen(line: str) -> None:
        nonlocal port
        word, _, number = line.partition(" ")
        if word == "port" and number.isdigit():
            port = int(number)
            told.set()

    # -P: the current folder may have a `model/` or a `flows/` of its own.
    argv = [sys.executable, "-P", "-m", "flows.api_server"]
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOM), env.get("PYTHONPATH")]))
    with GuardedProcess(argv, env=env, log_path=log_path, on_line=listen, grace_s=5) as process:
        deadline = time.monotonic() + _START_S
        while not told.wait(_POLL_S):
            _check_alive(process, deadline)
        yield process, port
    log_path.unlink(missing_ok=True)  # kept only where something went wrong


def _await_health(process: GuardedProcess, port: int) -> None:
    deadline = time.monotonic() + _START_S
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this is loopback: no proxy
    while True:
        try:
            with opener.open(f"http://127.0.0.1:{port}/api/health", timeout=10) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            _check_alive(process, deadline)
        time.sleep(_POLL_S)


def _check_alive(process: GuardedProcess, deadline: float) -> None:
    code = process.poll()
    if code is None and time.monotonic() < deadline:
        return
    what = f"did not come up within {_START_S:.0f} s" if code is None else f"ended with {code}"
    process.terminate()
    raise TransientError(
        f"Prefect's server {what}; see {process.log_path}: {' '.join(process.last_lines().split())[-400:]}"
    )


def _drain() -> None:
    """Sends what is still queued, so that the history is whole: task runs travel as events."""
    if "prefect.events.worker" in sys.modules:
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        EventsWorker.drain_all(timeout=10)
        APILogWorker.drain_all(timeout=10)
