"""One of any number of processes that encode the same dataset: ``python -m preprocessing.encode.worker --run FILE``.

FILE holds what `EncodeJob` says. The process finds its place in the environment (RANK, LOCAL_RANK, WORLD_SIZE,
MASTER_ADDR, MASTER_PORT), as ``accelerate launch``, torchrun, or `preprocessing.encode.launch` set it, and under Slurm
with what that sets; with none of these it is alone, as far as it knows, and may still share the work with others.

Each takes its stride of the shards, and then what others have left, in an order of its own. Whether a shard is done is
asked in the store when its turn comes, so that little is made twice, and what is made twice counts once. Nobody waits
for anybody: whoever is left finishes, and rank 0 writes the manifest.
"""

import os
import random
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch

from infra import pulse
from infra.child import emit, run_as_child
from infra.storage import open_store
from preprocessing.contracts.manifest import find_manifest, load_manifest
from preprocessing.encode.job import EncodeJob
from preprocessing.encode.stage import EncodeStage
from preprocessing.stage import Progress, reported_shards, run_shards, run_stage

_RENDEZVOUS_S: Final = 300.0
_PULSE_S: Final = 10.0
_SLURM: Final = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def main(spec: dict[str, Any], scratch: Path) -> dict[str, Any] | None:
    """Encodes this process's part of the shards, and what others leave."""
    job = EncodeJob.model_validate(spec)
    store = open_store(job.store_uri)
    downloaded = load_manifest(store, job.downloaded_prefix)
    rank, num_workers, device = _place(job)
    stage = EncodeStage(store, downloaded, job.encode, job.model, device)
    if find_manifest(store, stage.prefix) is not None:
        return {"prefix": stage.prefix} if rank == 0 else None
    own, others = shares(stage.num_shards, rank, num_workers, seed=time.time_ns() ^ os.getpid())
    with pulse.listening(_Pulse().tell):
        run_shards(store, stage, own, _tell)
        made = reported_shards(store, stage)
        run_shards(store, stage, [index for index in others if index not in made], _tell)
    if rank != 0:
        return None
    run_stage(store, stage)
    return {"prefix": stage.prefix}


def shares(num_shards: int, rank: int, num_workers: int, *, seed: int) -> tuple[list[int], list[int]]:
    """Which shards a worker makes, and then which of the others it looks at.

    Args:
        num_shards: Of all workers.
        rank: Of this one.
        num_workers: That know of each other.
        seed: Of this worker's own order: thieves that walk alike would all make the same shards. A worker alone walks
            so through all of them, for it may be one of several.
    """
    own = list(range(rank, num_shards, num_workers))
    others = [index for index in range(num_shards) if index % num_workers != rank]
    rng = random.Random(seed)  # noqa: S311 - no secret
    rng.shuffle(others)
    if num_workers == 1:
        rng.shuffle(own)
    return own, others


def _place(job: EncodeJob) -> tuple[int, int, torch.device]:
    """This process's rank, how many there are, and its device."""
    from accelerate import PartialState

    for name, value in _slurm(os.environ).items():
        os.environ.setdefault(name, value)
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    num_threads = job.encode.num_threads or max(1, len(os.sched_getaffinity(0)) // num_local)
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))  # accelerate warns where it is not set
    torch.set_num_threads(num_threads)
    if "RANK" not in os.environ:
        return 0, 1, torch.device(PartialState(cpu=job.cpu).device or "cpu")
    arguments: dict[str, Any] = {"timeout": timedelta(seconds=_RENDEZVOUS_S)}
    if job.cpu or not torch.cuda.is_available():
        arguments["backend"] = "gloo"
    state = PartialState(cpu=job.cpu, **arguments)
    place = (state.process_index, state.num_processes, torch.device(state.device or "cpu"))
    state.destroy_process_group()  # they have met, which was all: who dies later holds nobody up
    return place


def _slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """The launchers' variables out of those of ``srun``, where only these are set."""
    if "RANK" in environment or "SLURM_PROCID" not in environment or "MASTER_ADDR" not in environment:
        return {}
    found = {name: environment[theirs] for name, theirs in _SLURM.items() if theirs in environment}
    return found | {"MASTER_PORT": environment.get("MASTER_PORT", "29500")}


class _Pulse:
    """Tells the launcher now and then that this worker gets on within a shard."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def tell(self) -> None:
        now = time.monotonic()
        if now - self._told >= _PULSE_S:
            self._told = now
            emit({"event": "alive"})


def _tell(at: Progress) -> None:
    if at.report is not None:
        emit({"event": "shard", "report": at.report.model_dump(mode="json")})


if __name__ == "__main__":
    sys.exit(run_as_child(main))
