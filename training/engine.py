"""DeepSpeed: the process group, the generated configuration, the engine."""

import logging
import os
from collections import defaultdict
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from infra.errors import ContractError
from training.config import TrainConfig

_MAX_BUCKET_ELEMENTS = 200_000_000
_NEVER = 2**31 - 1


@dataclass(frozen=True)
class World:
    """This process among its peers, as torchrun, the deepspeed launcher and `training.launch` tell it.

    Attributes:
        rank: From 0.
        local_rank: Rank on this machine.
        size: Number of processes.
        device: What it computes on.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes."""
        return self.rank == 0


def find_world(train: TrainConfig) -> World:
    """Reads this process's place from the environment; a process without one is alone.

    Raises:
        ContractError: The launcher started another number of processes than the configuration says.
    """
    size = int(os.environ.setdefault("WORLD_SIZE", "1"))
    if size != train.num_processes:
        raise ContractError(
            f"train.num_processes: {train.num_processes}, but the launcher started WORLD_SIZE={size} processes; "
            "make the two equal"
        )
    rank = int(os.environ.setdefault("RANK", "0"))
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    device = torch.device("cpu")
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    return World(rank, local_rank, size, device)


def share_cores(num_processes: int) -> int:
    """Gives each process its share of this machine's cores (or of OMP_NUM_THREADS, where that is less).

    Returns:
        Threads that torch uses now.
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdigit() and int(limit) > 0:
        num_cores = min(num_cores, int(limit))
    num_threads = max(1, num_cores // num_processes)
    torch.set_num_threads(num_threads)
    return num_threads


def init_distributed(world: World, timeout_s: float) -> None:
    """Joins the process group; returns when all processes have."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    import deepspeed  # here: it takes seconds, and asks for its accelerator when it is imported
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if world.device.type == "cpu":
        # DeepSpeed's init_distributed otherwise probes every one of its C++ extensions and compiles one for
        # shared-memory reductions, which needs a compiler and takes tens of seconds. It asks this dict, made at the
        # first look, whether it may; with an empty one it neither probes nor compiles, and goes through gloo.
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)  # pyright: ignore[reportAttributeAccessIssue]  # made lazily
    deepspeed.init_distributed(
        dist_backend="gloo" if world.device.type == "cpu" else "nccl",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_s),
    )


def deepspeed_config(train: TrainConfig, num_parameters: int) -> dict[str, Any]:
    """DeepSpeed's JSON, generated: what it says twice cannot disagree.

    Args:
        train: How to train.
        num_parameters: Of the model; the communication buckets need not be larger.
    """
    bucket = min(num_parameters, _MAX_BUCKET_ELEMENTS)
    config: dict[str, Any] = {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": train.gradient_clipping,
        "zero_optimization": {
            "stage": train.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": _NEVER,
    }
    if train.precision == "bf16":
        # Autocast, not DeepSpeed's bf16 mode: the parameters stay float32 on every rank, and so the average is exact.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return config


def build_engine(unet: UNet2DConditionModel, train: TrainConfig) -> Any:
    """The DeepSpeed engine around the UNet, with torch's AdamW, whose kernels need no compiler.

    Args:
        unet: On the device.
        train: How to train.

    Returns:
        The engine (untyped: DeepSpeed has no types).
    """
    import deepspeed

    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=train.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=train.weight_decay
    )
    num_parameters = sum(parameter.numel() for parameter in unet.parameters())
    engine, *_ = deepspeed.initialize(
        model=unet,
        optimizer=optimizer,
        config=deepspeed_config(train, num_parameters),
        dist_init_required=False,
    )
    return engine


def learning_rate_at(train: TrainConfig, step: int) -> float:
    """Linear warm-up, then constant.

    Args:
        train: How to train.
        step: From 0; the first step has 1 / warmup_steps of the rate already.
    """
    return train.learning_rate * min(1.0, (step + 1) / max(1, train.warmup_steps))


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Sets the rate for the next step. A function of the step alone: no scheduler's state to save."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
