"""Several datasets as one: which of them each position of a training takes its sample from.

Positions are cut into blocks. Every block holds the same number of samples of each dataset, by its weight, in an order
of its own: a pure function of (seed, the datasets' digests and shares, block). Within a dataset samples follow its own
order, so that each dataset has epochs of its own, and a small one with a large weight is seen more often.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from model.randomness import stream
from preprocessing.contracts.digests import digest_of

SAMPLES_PER_BLOCK: Final = 10_000
"""Weights are kept exactly in every stretch of so many samples; a weight is rounded to this fraction of the whole."""

MIXTURE_VERSION: Final = 1
"""Raised by hand whenever the same datasets and shares give another order."""

_NUM_BLOCKS_KEPT = 4


class Mixture:
    """Positions of a training → datasets, and positions of their own.

    Args:
        shares: Samples of each dataset in a block, from `shares_of`.
        seed: The training's.
        digests: The datasets'.
    """

    def __init__(self, shares: Sequence[int], seed: int, digests: Sequence[str]) -> None:
        self._shares = np.asarray(shares, dtype=np.int64)
        self._name = ("mixture", seed, *digests, *map(int, shares))
        self._block_of = functools.lru_cache(_NUM_BLOCKS_KEPT)(self._compute_block)

    def locate(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The datasets and own positions of some positions.

        Returns:
            For each position the dataset's place among all, and the position in that dataset's sequence of epochs.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if len(self._shares) == 1:
            return np.zeros_like(positions), positions
        blocks, places = np.divmod(positions, SAMPLES_PER_BLOCK)
        parts, owns = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(blocks):
            chosen = blocks == block
            parts[chosen], owns[chosen] = self._block_of(int(block))[:, places[chosen]]
        return parts, owns + blocks * self._shares[parts]

    def before(self, position: int) -> np.ndarray:
        """How many samples of each dataset stand before a position: their own positions from there on."""
        if len(self._shares) == 1:
            return np.array([position])
        block, place = divmod(position, SAMPLES_PER_BLOCK)
        parts = self._block_of(block)[0, :place]
        return block * self._shares + np.bincount(parts, minlength=len(self._shares))

    def position_of(self, part: int, own: int) -> int:
        """The position at which a dataset's own one stands: the inverse of `locate`."""
        if len(self._shares) == 1:
            return own
        block, number = divmod(own, int(self._shares[part]))
        parts, _ = self._block_of(block)
        return block * SAMPLES_PER_BLOCK + int(np.flatnonzero(parts == part)[number])

    def _compute_block(self, block: int) -> np.ndarray:
        """(2, samples of a block): datasets, and how many samples of the same dataset stand before in the block."""
        keys = stream(*self._name, block).bit_generator.random_raw(SAMPLES_PER_BLOCK)
        order = np.argsort(np.asarray(keys, dtype=np.uint64), kind="stable")
        parts = np.repeat(np.arange(len(self._shares)), self._shares)[order]
        before = np.empty_like(parts)
        for part, share in enumerate(self._shares):
            before[parts == part] = np.arange(share)
        return np.stack([parts, before])


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """How many samples of each dataset a block holds: in proportion to the weights, by largest remainders.

    Args:
        weights: Greater than 0; relative to each other.

    Raises:
        ValueError: A weight is so small beside the others that its dataset would never be seen.
    """
    total = sum(weights)
    exact = [weight / total * SAMPLES_PER_BLOCK for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: SAMPLES_PER_BLOCK - sum(shares)]:
        shares[i] += 1
    if 0 in shares:
        least = total / SAMPLES_PER_BLOCK
        raise ValueError(
            f"train.datasets: the weight {weights[shares.index(0)]:g} of {total:g} in all is less than one sample in "
            f"{SAMPLES_PER_BLOCK}; raise it to at least {least:g}, or leave the dataset out"
        )
    return tuple(shares)


def mixture_digest(weights: Mapping[str, float]) -> str:
    """The digest of a mixture, from the datasets' digests and weights; of one dataset, that one's."""
    digests = sorted(weights)
    return digest_of_shares(digests, shares_of([weights[digest] for digest in digests]))


def digest_of_shares(digests: Sequence[str], shares: Sequence[int]) -> str:
    """As `mixture_digest`, from the shares in the order of the digests."""
    if len(digests) == 1:
        return digests[0]
    return digest_of("mixture", MIXTURE_VERSION, {"shares": list(shares)}, digests)
