"""Which of the training processes this one is: whoever started it says so in the environment.

torchrun, ``accelerate launch`` and `training.launch` say RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR
and MASTER_PORT; ``deepspeed`` says LOCAL_SIZE instead of LOCAL_WORLD_SIZE; a Kubernetes PyTorchJob with one process a
pod says nothing local; Slurm's ``srun`` says all of it in words of its own. Without any of them a process is alone.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from infra.errors import ContractError
from training.config import TrainConfig

_PORT: Final = 29500
_SLURM_PORTS: Final = range(20000, 32000)  # below those that Linux gives away by itself


@dataclass(frozen=True)
class World:
    """This process among its peers.

    Attributes:
        rank: From 0.
        local_rank: Rank on this machine.
        size: Number of processes, on all machines.
        device: What it computes on.
        local_size: Number of processes on this machine.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes."""
        return self.rank == 0


def find_world(train: TrainConfig) -> World:
    """Reads this process's place from the environment, and completes that for torch and DeepSpeed, which read it, too.

    Raises:
        ContractError: The launcher started another number of processes than the configuration says, or more processes
            on this machine than it has GPUs.
    """
    place = place_of(os.environ)
    size = int(place["WORLD_SIZE"])
    if size != train.num_processes:
        raise ContractError(
            f"train.num_processes: {train.num_processes}, but the launcher started WORLD_SIZE={size} processes; "
            "make the two equal"
        )
    os.environ.update(place)
    local_rank, local_size = int(place["LOCAL_RANK"]), int(place["LOCAL_WORLD_SIZE"])
    device = torch.device("cpu")
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        device = torch.device("cuda", _gpu_of(local_rank, local_size))
        torch.cuda.set_device(device)
    return World(int(place["RANK"]), local_rank, size, device, local_size)


def place_of(environment: Mapping[str, str]) -> dict[str, str]:
    """This process's place in torch's words: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT.

    Args:
        environment: What there is; torch's own words count before Slurm's.

    Raises:
        ContractError: Several processes, but nothing says where the first one listens.
    """
    if "RANK" not in environment and "SLURM_PROCID" in environment:
        environment = {**_place_in_slurm(environment), **environment}
    size = environment.get("WORLD_SIZE", "1")
    if size != "1" and "MASTER_ADDR" not in environment:
        raise ContractError(
            f"WORLD_SIZE is {size}, but MASTER_ADDR is not set; set it to the address of the machine with rank 0"
        )
    alone_here = "1" if "LOCAL_RANK" not in environment else size
    return {
        "RANK": environment.get("RANK", "0"),
        "LOCAL_RANK": environment.get("LOCAL_RANK", "0"),
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", alone_here)),
        "MASTER_ADDR": environment.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": environment.get("MASTER_PORT", "0" if size == "1" else str(_PORT)),  # alone: any free one
    }


def _place_in_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """What ``srun`` says of a task; what concerns the step counts before what concerns the whole job."""

    def said(name: str, default: str) -> str:
        return environment.get(f"SLURM_STEP_{name}", environment.get(f"SLURM_{name}", default))

    size = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    job = int(environment.get("SLURM_JOB_ID", "0"))
    place = {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "WORLD_SIZE": size,
        "MASTER_PORT": str(_SLURM_PORTS[job % len(_SLURM_PORTS)]),  # two jobs may share a machine
    }
    if tasks := said("TASKS_PER_NODE", ""):
        place["LOCAL_WORLD_SIZE"] = str(tasks_on_node(tasks, int(environment.get("SLURM_NODEID", "0"))))
    if hosts := said("NODELIST", ""):
        place["MASTER_ADDR"] = first_host(hosts)
    return place


def first_host(nodelist: str) -> str:
    """The first of Slurm's short list of hosts: ``gpu[007-010,12],login1`` → ``gpu007``. Task 0 runs there."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodelist)[0])


def tasks_on_node(tasks_per_node: str, node: int) -> int:
    """The entry of one node in Slurm's short list of numbers: ``4(x2),3`` is 4, 4, 3."""
    counts: list[int] = []
    for entry in tasks_per_node.split(","):
        count, _, repeats = entry.partition("(x")
        counts += [int(count)] * int(repeats.rstrip(")") or 1)
    return counts[node]


def _gpu_of(local_rank: int, local_size: int) -> int:
    """Which of the GPUs that this process sees is its own."""
    num_gpus = torch.cuda.device_count()
    if num_gpus == 1 and local_size > 1:
        return 0  # a launcher that shows each process its own GPU alone; NCCL refuses two processes on one
    if local_rank >= num_gpus:
        raise ContractError(
            f"{local_size} processes were started on this machine, which has {num_gpus} GPUs; start one for each"
        )
    return local_rank


def share_cores(local_size: int) -> int:
    """Gives each process its share of this machine's cores.

    Args:
        local_size: Processes on this machine.

    Returns:
        Threads that torch uses now.
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_threads = share_of_cores(os.environ, num_cores, local_size)
    torch.set_num_threads(num_threads)
    return num_threads


def share_of_cores(environment: Mapping[str, str], num_cores: int, local_size: int) -> int:
    """One process's share of the cores that it may run on, or of OMP_NUM_THREADS where that is less.

    Slurm binds each task to cores of its own: where it says how many, they are not shared.
    """
    num_cores = min(num_cores, _number(environment, "OMP_NUM_THREADS") or num_cores)
    own = _number(environment, "SLURM_CPUS_PER_TASK") if "SLURM_PROCID" in environment else None
    return max(1, num_cores // local_size if own is None else min(num_cores, own))


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    return int(text) if text.isdigit() and int(text) > 0 else None
