"""Signs that work goes on, from wherever it is done to whoever watches it, in one process.

What is counted (shards, steps) may take longer than a watch is patient. Below, whoever does something new says `beat`;
above, whoever watches hears it.
"""

import contextlib
from collections.abc import Callable, Iterator

_listeners: list[Callable[[], None]] = []


def beat() -> None:
    """Something new was done: a batch encoded, bytes that arrived. From any thread; it costs next to nothing."""
    for listener in tuple(_listeners):
        listener()


@contextlib.contextmanager
def listening(listener: Callable[[], None]) -> Iterator[None]:
    """Within, a listener is called for each beat of this process.

    Args:
        listener: Called in the thread that does the work.
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
