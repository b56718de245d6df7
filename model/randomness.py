"""Counter-based randomness: a stream of its own for every name.

A draw depends on its name (seed, uid, …) and on nothing else: not on the process, the order, or what was drawn
before. So shards can be encoded anywhere, and a resumed run draws what the uninterrupted one would have drawn.
"""

import hashlib

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
