"""Generators that run in threads, a few items ahead of who takes them."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


@contextlib.contextmanager
def read_ahead(make: Callable[[], Iterable[T]], num_items: int = 1) -> Iterator[Iterator[T]]:
    """Runs a generator in a thread of its own; leaving the context ends it.

    Args:
        make: Called in the thread.
        num_items: How many may wait to be taken.
    """
    made: queue.Queue[Any] = queue.Queue(num_items)
    is_over = threading.Event()
    end = object()

    def put(item: object) -> bool:
        while not is_over.is_set():
            try:
                made.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def produce() -> None:
        last: object = end
        try:
            for item in make():
                if not put(item):
                    return
        except BaseException as error:  # raised again where the items are taken
            last = _Failure(error)
        put(last)

    def take() -> Iterator[T]:
        while (item := made.get()) is not end:
            if isinstance(item, _Failure):
                raise item.error
            yield item

    thread = threading.Thread(target=produce, name="read-ahead", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        is_over.set()
        thread.join()
