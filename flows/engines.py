"""Which engine the shard tasks of download and encode run on: Prefect's task runners, on threads, processes, Dask, Ray.

| `operations.task_runner` | where tasks run | once nobody waits for them |
| --- | --- | --- |
| threads | here; models are loaded once, and compute for one task at a time | they end after a shard |
| processes | in processes of this machine, each with its own models and GPU | they are ended |
| dask, ray, with an address | on a cluster that runs already | Dask's end after a shard, Ray's are ended |
| dask, ray, with none | on a cluster of this machine, for as long as the stage | they are ended |

The scheduling is theirs. Here stand only how each is started, and which of its errors mean that it lost a task.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import socket
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from flows.config import OperationsConfig
from infra.errors import TransientError

if TYPE_CHECKING:
    from prefect.task_runners import TaskRunner

_EXTRAS: Final = {"dask": ("prefect_dask", "distributed"), "ray": ("prefect_ray", "ray")}
_CONNECT_S: Final = 10
_place = 0


@dataclass(frozen=True)
class Engine:
    """A task runner that has been started.

    Attributes:
        runner: Takes tasks.
        lost: The errors that say that it lost a task, and not that the task failed.
        num_sharing: How many of its workers share this machine's cores; None where others say how many they use.
    """

    runner: "TaskRunner[Any]"
    lost: tuple[type[BaseException], ...]
    num_sharing: int | None = None


def check_engine(config: OperationsConfig) -> None:
    """Checks that an engine is installed, and that its tasks can report from where they run.

    Raises:
        ValueError: It is not, and the message names the extra that brings it; or they cannot.
    """
    kind = config.task_runner
    for module in _EXTRAS.get(kind or "", ()):
        if importlib.util.find_spec(module) is None:
            raise ValueError(
                f"operations.task_runner: {kind!r} needs the extra: pip install 'lacuna-inpainting[{kind}]'"
            )
    if config.task_runner_address is not None and kind not in _EXTRAS:
        raise ValueError(
            f"operations.task_runner_address: {config.task_runner_address!r} is of no use with task_runner {kind!r}; "
            "it goes with 'dask' and 'ray'"
        )
    address, api = config.task_runner_address, os.environ.get("PREFECT_API_URL")
    if address is not None and not _is_here(address) and (api is None or _is_here(api)):
        raise ValueError(
            f"PREFECT_API_URL: {api or 'a server of this command alone'} cannot be reached from other machines, and "
            f"the tasks at {address!r} (operations.task_runner_address) report to it; start one that can be, with "
            "`prefect server start --host`, and set its address"
        )


def _is_here(address: str) -> bool:
    """Whether an address is one of this machine's; one that is not known is left to whoever connects to it."""
    try:
        host = urllib.parse.urlsplit(address if "://" in address else f"//{address}").hostname
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, ValueError):
        return True
    for family, kind, _, _, where in found:
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            probe.bind(where)  # to port 0
            return True
    return False


@contextlib.contextmanager
def running_engine(config: OperationsConfig, num_parts: int, num_gpus_a_task: int = 0) -> Iterator[Engine]:
    """Starts an engine, or connects to one, while the block lasts.

    Args:
        config: Which, where, and for how many tasks at a time.
        num_parts: Tasks that it will be given; more workers than that are not started.
        num_gpus_a_task: What Ray is told that a task needs: it hides the GPUs from one that asks for none.

    Raises:
        ValueError: It is not installed, or its address is none.
        TransientError: It does not answer.
    """
    check_engine(config)
    num_workers = min(config.max_tasks, num_parts)
    if config.task_runner == "threads":
        from prefect.task_runners import ThreadPoolTaskRunner

        with ThreadPoolTaskRunner(max_workers=num_workers) as runner:
            yield Engine(runner, ())
    elif config.task_runner == "processes":
        with _processes(num_workers) as engine:
            yield engine
    elif config.task_runner == "dask":
        with _dask(config.task_runner_address, num_workers) as engine:
            yield engine
    else:
        with _ray(config.task_runner_address, num_workers, num_gpus_a_task) as engine:
            yield engine


@contextlib.contextmanager
def _processes(num_workers: int) -> Iterator[Engine]:
    from prefect.task_runners import ProcessPoolTaskRunner

    before = set(multiprocessing.active_children())
    places = multiprocessing.get_context("spawn").Value("i", 0)
    with ProcessPoolTaskRunner(max_workers=num_workers, initializer=_take_place, initargs=(places,)) as runner:
        try:
            yield Engine(runner, (BrokenExecutor,), num_workers)
        except BaseException:
            # What they have committed stands, and the runner would wait for the rest of what they are at.
            for child in set(multiprocessing.active_children()) - before:
                child.kill()
            raise


def _take_place(places: Any) -> None:
    """Numbers the processes of a pool, and ends each with the one that started it, however that ends."""
    global _place
    with places.get_lock():
        _place = places.value
        places.value += 1
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)  # children of ours have guards, which see it

    threading.Thread(target=follow, name="follow the parent", daemon=True).start()


@contextlib.contextmanager
def _dask(address: str | None, num_workers: int) -> Iterator[Engine]:
    from distributed import KilledWorker
    from distributed.client import FutureCancelledError
    from distributed.comm.core import CommClosedError
    from prefect_dask.task_runners import DaskTaskRunner

    if address is not None:
        runner = DaskTaskRunner(address=address, client_kwargs={"timeout": _CONNECT_S})
    else:
        cluster = {
            "n_workers": num_workers,
            "threads_per_worker": 1,
            "processes": True,
            "memory_limit": 0,  # else it would end a worker for the size of the models
            "dashboard_address": None,
        }
        runner = DaskTaskRunner(cluster_kwargs=cluster)
    with runner:
        with _answering("Dask scheduler", address):
            _ = runner.client  # connects
        yield Engine(runner, (KilledWorker, FutureCancelledError, CommClosedError), None if address else num_workers)


@contextlib.contextmanager
def _ray(address: str | None, num_workers: int, num_gpus_a_task: int) -> Iterator[Engine]:
    import ray.exceptions  # pyright: ignore[reportMissingImports]  # an extra
    from prefect_ray import RayTaskRunner  # pyright: ignore[reportMissingImports]  # an extra
    from prefect_ray.context import remote_options  # pyright: ignore[reportMissingImports]  # an extra

    options = {} if address else {"num_cpus": num_workers, "include_dashboard": False}
    with contextlib.ExitStack() as stack:
        with _answering("Ray head", address):
            runner = stack.enter_context(RayTaskRunner(address=address, init_kwargs=options))
        if num_gpus_a_task and ray.cluster_resources().get("GPU"):
            stack.enter_context(remote_options(num_gpus=num_gpus_a_task))
        yield Engine(runner, (ray.exceptions.RayError,), None if address else num_workers)


@contextlib.contextmanager
def _answering(what: str, address: str | None) -> Iterator[None]:
    """Says in one line that a cluster does not answer."""
    try:
        yield
    except OSError as error:
        if address is None:
            raise TransientError(f"operations.task_runner: no {what} could be started here: {error}") from error
        raise TransientError(
            f"operations.task_runner_address: no {what} answers at {address!r} within {_CONNECT_S} s "
            f"({' '.join(str(error).split())[:200]})"
        ) from error
    except ValueError as error:
        raise ValueError(f"operations.task_runner_address: {address!r} is none of a {what}: {error}") from error


def place_here() -> int:
    """The number of this process among those of its machine that an engine of ours started; 0 for any other."""
    if "distributed" in sys.modules:  # as in any worker of it
        from distributed import get_worker

        with contextlib.suppress(ValueError):  # we are in none
            name = get_worker().name
            return name if isinstance(name, int) else 0
    return _place


def is_still_wanted() -> bool:
    """Whether the Dask task in which this is called is waited for; True in any other engine's.

    Dask does not end a task that runs: not when it is cancelled, nor when who asked for it is gone.
    """
    if "distributed" not in sys.modules:
        return True
    from distributed import get_worker

    try:
        worker = get_worker()
        task = worker.state.tasks.get(worker.get_current_task())
    except (ValueError, AttributeError):  # we are in none, or in no task of one
        return True
    return task is not None and task.state == "executing"
