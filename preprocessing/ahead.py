"""Generators that run in threads, a few items ahead of who takes them."""

import collections
import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
U = TypeVar("U")


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


@contextlib.contextmanager
def map_ahead(function: Callable[[T], U], items: Iterable[T], num_threads: int) -> Iterator[Iterator[U]]:
    """Calls a function in threads, ahead of who takes its results; these come in the order of the items.

    Args:
        function: What to call.
        items: With what; taken as there is room, one more than threads ahead.
        num_threads: How many.
    """
    with ThreadPoolExecutor(num_threads, "map-ahead") as pool:
        waiting: collections.deque[Future[U]] = collections.deque()

        def take() -> Iterator[U]:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > num_threads + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        try:
            yield take()
        finally:
            for future in waiting:
                future.cancel()
