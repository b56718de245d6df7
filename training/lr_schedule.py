"""The learning rate of each step: a function of the step alone, so that a checkpoint need not hold it. No torch."""

import math

from training.config import TrainConfig


def learning_rate_at(train: TrainConfig, step: int) -> float:
    """The rate of one step.

    Args:
        train: ``learning_rate`` (the highest), ``warmup_steps``, ``num_steps``, ``lr_schedule``.
        step: From 0: steps taken before it; one that was tried in vain does not count.

    Returns:
        ``learning_rate`` times a factor. In the warm-up of W steps (step + 1) / W or, with a start factor s,
        s + (1 − s)·step / W. Then 1, or with u = (step − W) / (num_steps − W), f the final factor:
        linear 1 − (1 − f)·u, cosine f + (1 − f)·(1 + cos πu) / 2. u would be 1 at the step after the last.

    Source: CompVis `ldm/lr_scheduler.py` (`LambdaLinearScheduler`: start factor, constant end) and
        `LambdaWarmUpCosineScheduler`; Stable Diffusion's cards have a warm-up, then a constant rate.
    """
    schedule, warmup = train.lr_schedule, train.warmup_steps
    if step < warmup:
        start = schedule.warmup_start_factor
        factor = (step + 1) / warmup if start is None else start + (1 - start) * step / warmup
    elif schedule.kind == "constant":
        factor = 1.0
    else:
        done = min(1.0, (step - warmup) / (train.num_steps - warmup))
        falling = 1 - done if schedule.kind == "linear" else (1 + math.cos(math.pi * done)) / 2
        factor = schedule.final_factor + (1 - schedule.final_factor) * falling
    return train.learning_rate * factor
