"""What a run that does not fit into memory is told: what to lower. No torch at import time."""

import contextlib
from collections.abc import Iterator

from training.config import TrainConfig

_CPU_SIGN = "can't allocate memory"
"""What torch's allocator on the CPU says, in a RuntimeError like any other."""


@contextlib.contextmanager
def shortage_told(train: TrainConfig) -> Iterator[None]:
    """Within, memory that cannot be had is an error that says what to change.

    Raises:
        ValueError: There is not enough; a retry would meet the same.
    """
    import torch  # here: the launcher, which has none, asks only what to lower

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(f"the GPU's memory is too small: {what_to_lower(train)} ({_first_line(error)})") from error
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and _CPU_SIGN not in str(error):
            raise
        raise ValueError(f"the memory is too small: {what_to_lower(train)} ({_first_line(error)})") from error


def what_to_lower(train: TrainConfig) -> str:
    """The fields that decide how much memory a training takes, and what else they may be."""
    advice = []
    if train.micro_batch_size > 1:
        advice.append(f"lower train.micro_batch_size ({train.micro_batch_size}), which changes no result")
    if not train.activation_checkpointing:
        advice.append("set train.activation_checkpointing to true")
    if train.precision == "fp32":
        advice.append("set train.precision to bf16, which makes it another run, from step 0")
    if train.num_processes > 1 and train.zero_stage < 2:
        advice.append(f"raise train.zero_stage ({train.zero_stage}) to 2")
    if train.optimizer_offload == "none" and train.zero_stage >= 1 and train.precision != "fp16":
        advice.append("set train.optimizer_offload to cpu, where it is the GPU's memory that is short")
    return "; or ".join(advice) if advice else "train.resolution or the model is too large for this machine"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
