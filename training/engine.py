"""DeepSpeed: the process group, the generated configuration, the engine."""

import contextlib
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from typing_extensions import override

from training.config import TrainConfig
from training.world import World

_MAX_BUCKET_ELEMENTS = 200_000_000
_NEVER = 2**31 - 1


def init_distributed(world: World, timeout_s: float) -> None:
    """Joins the process group; returns when all processes have."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    import deepspeed  # here: it takes seconds, and asks for its accelerator when it is imported
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(_is_news)
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


def _is_news(record: logging.LogRecord) -> bool:
    """DeepSpeed warns of every optimizer that is not of a class of its list; ours is torch's AdamW."""
    return "untested optimizer" not in record.getMessage()


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
        "zero_allow_untested_optimizer": True,  # it means: another class than torch's own AdamW
        "steps_per_print": _NEVER,
    }
    if train.optimizer_offload == "cpu":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if train.precision != "fp32":
        # Autocast, not DeepSpeed's modes: the parameters stay float32 on every rank, and so the average is exact.
        config["torch_autocast"] = {"enabled": True, "dtype": {"bf16": "bfloat16", "fp16": "float16"}[train.precision]}
    return config


class GatedAdamW(torch.optim.AdamW):
    """torch's AdamW behind a gate: while that is closed a step changes neither parameters nor state, bit by bit.

    DeepSpeed's own work around a step (gradients dropped, counters advanced, weights gathered again) goes on.

    Attributes:
        is_open: Whether steps count.
        num_calls: How often an open gate was passed; DeepSpeed passes over a step by itself where it does not like the
            gradients' norm.
    """

    is_open = True
    num_calls = 0

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # torch has overloads
        """AdamW's step, if the gate is open."""
        if not self.is_open:
            return None
        self.num_calls += 1
        return super().step(closure)

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Within, the gate is closed."""
        self.is_open = False
        try:
            yield
        finally:
            self.is_open = True


def build_engine(unet: UNet2DConditionModel, train: TrainConfig) -> Any:
    """The DeepSpeed engine around the UNet, with torch's AdamW, whose kernels need no compiler.

    Args:
        unet: On the device; it is changed as `train` says of attention, memory format, checkpointing, compilation.
        train: How to train.

    Returns:
        The engine (untyped: DeepSpeed has no types).
    """
    import deepspeed

    _prepare_unet(unet, train)
    on_gpu = next(unet.parameters()).is_cuda
    optimizer = GatedAdamW(
        unet.parameters(),
        lr=train.learning_rate,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=train.weight_decay,
        fused=(on_gpu and train.optimizer_offload == "none")
        if train.fused_optimizer is None
        else train.fused_optimizer,
    )
    num_parameters = sum(parameter.numel() for parameter in unet.parameters())
    engine: Any
    engine, *_ = deepspeed.initialize(
        model=unet,
        optimizer=optimizer,
        config=deepspeed_config(train, num_parameters),
        dist_init_required=False,
    )
    if train.channels_last and train.zero_stage == 0:
        # Not before: DeepSpeed broadcasts the weights as flat bytes. And not under ZeRO, which keeps them as views of
        # one flat tensor: there only what flows through the UNet is laid out so.
        torch.nn.Module.to(unet, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # torch's types
    # The loss is scaled by `training.loss_scale`: where DeepSpeed's own scale overflows under ZeRO, it never falls.
    engine.torch_autocast_z0_gradscaler = None
    if hasattr(engine.optimizer, "torch_autocast_gradscaler"):
        engine.optimizer.torch_autocast_gradscaler = None
    return engine


def _prepare_unet(unet: UNet2DConditionModel, train: TrainConfig) -> None:
    if train.attention == "plain":
        unet.set_attn_processor(AttnProcessor())
    if train.activation_checkpointing:
        unet.enable_gradient_checkpointing()
    if train.compile == "regional":
        unet.compile_repeated_blocks()
    elif train.compile == "whole":
        torch.nn.Module.compile(unet)


def optimizer_of(engine: Any) -> GatedAdamW:
    """The optimizer inside the engine, and inside ZeRO's."""
    optimizer = engine.optimizer
    while not isinstance(optimizer, GatedAdamW):
        optimizer = optimizer.optimizer
    return optimizer


def gradients_of(engine: Any) -> Sequence[Tensor]:
    """The averaged gradients that this rank holds after the last backward pass before a step; to be read or scaled.

    Under ZeRO 1 and 2 they are those of this rank's slice of the parameters; under ZeRO 0 each rank has all of them.
    """
    zero = engine.optimizer
    if not hasattr(zero, "averaged_gradients"):
        return [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    if zero.cpu_offload:
        return [partition.grad for partition in zero.single_partition_of_fp32_groups]
    return [gradient for group in zero.averaged_gradients.values() for gradient in group or () if gradient is not None]


def shares_gradients(engine: Any) -> bool:
    """Whether each gradient is held by one rank only."""
    return hasattr(engine.optimizer, "averaged_gradients")


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Sets the rate for the next step. A function of the step alone: no scheduler's state to save."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
