"""Where the loss comes from: sums and counts by timestep and by kind of mask, which add up over batches and ranks.

One mean loss hides that v-prediction at the noisiest timesteps, which decide what fills a large hole, is learned at
another pace than the rest; and that a full mask, where nothing is known but the caption, is another task.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NUM_LOSS_BUCKETS: Final = 10
"""Buckets of equally many timesteps each."""

MASK_KINDS: Final = ("partial", "full")
"""``full``: all ones, as the UNet saw it."""


def tally(
    per_sample: Float[Tensor, " batch"],
    timesteps: Int[Tensor, " batch"],
    is_full_mask: Bool[Tensor, " batch"],
    num_timesteps: int,
) -> Float[Tensor, "2 groups"]:
    """Adds the losses up by group: the buckets of timesteps, then the kinds of mask.

    Args:
        per_sample: One unweighted loss a sample.
        timesteps: In [0, num_timesteps).
        is_full_mask: Where the mask is all ones.
        num_timesteps: T.

    Returns:
        Sums and counts, float64. Float32 losses add up exactly but for the last bits of a double, so tallies may be
        added in any order.
    """
    losses = per_sample.double()
    sums = losses.new_zeros(2, NUM_LOSS_BUCKETS + len(MASK_KINDS))
    both = torch.stack([losses, torch.ones_like(losses)])
    sums.index_add_(1, timesteps * NUM_LOSS_BUCKETS // num_timesteps, both)
    sums.index_add_(1, NUM_LOSS_BUCKETS + is_full_mask.long(), both)
    return sums


def bucket_names(num_timesteps: int) -> list[str]:
    """The buckets' names: ``t_0000`` begins at timestep 0, ``t_0100`` at 100, and so on."""
    return [f"t_{-(-bucket * num_timesteps // NUM_LOSS_BUCKETS):04d}" for bucket in range(NUM_LOSS_BUCKETS)]


def describe(sums: Float[Tensor, "2 groups"], num_timesteps: int) -> Mapping[str, Any]:
    """A tally in the words of ``metrics.jsonl``.

    Args:
        sums: What `tally` gave, added up over whatever is to be averaged.
        num_timesteps: T.

    Returns:
        ``loss_by_timestep`` and ``loss_by_mask``: group → ``mean``, the mean loss, None where there was no sample, and
        ``num_samples``. By the counts, means of several lines can be taken together.
    """
    totals, counts = sums.tolist()
    names = [*bucket_names(num_timesteps), *MASK_KINDS]
    groups = {
        name: {"mean": total / count if count else None, "num_samples": int(count)}
        for name, total, count in zip(names, totals, counts, strict=True)
    }
    return {
        "loss_by_timestep": {name: groups[name] for name in names[:NUM_LOSS_BUCKETS]},
        "loss_by_mask": {name: groups[name] for name in MASK_KINDS},
    }
