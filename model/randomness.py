"""Counter-based randomness: a stream of its own for every name.

A draw depends on its name (seed, uid, …) and on nothing else: not on the process, the order, or what was drawn
before. So shards can be encoded anywhere, and a resumed run draws what the uninterrupted one would have drawn.
"""

import hashlib
import struct
from collections.abc import Callable

import numpy as np


def stream(*name: int | str) -> np.random.Generator:
    """The random stream of a name.

    Args:
        name: what identifies the draw, such as ("mask", seed, uid, variant). Integers and strings differ: 1 is not "1".

    Returns:
        a generator at its beginning; equal names give equal streams on every machine.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox), keyed by BLAKE2b of the name.
    """
    key = hashlib.blake2b(repr(name).encode("utf-8"), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype="<u8")))


def integers(num: int, *name: int | str) -> Callable[[int], int]:
    """The integers of a name: few and cheap, where a generator would cost 20 µs to make.

    They are the output of a hash, brought into range by one multiplication, so they are the same in every release of
    numpy, whose generators' methods may change theirs. The range must be small beside 2^32, or all of it.

    Args:
        num: how many there are at most.
        name: what identifies them. The last part may be any string; the others hold no colon.

    Returns:
        a function: n → the next integer in [0, n).

    Raises:
        StopIteration: from that function, when there are no more.
    """
    text = ":".join(map(str, name)).encode("utf-8", "surrogatepass")
    next_word = iter(struct.unpack(f"<{num}I", hashlib.shake_128(text).digest(4 * num))).__next__

    def below(n: int) -> int:
        return next_word() * n >> 32

    return below
