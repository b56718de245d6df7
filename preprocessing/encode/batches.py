"""How many pictures at once: as configured, and fewer once memory did not suffice."""

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from infra import pulse

LOGGER = logging.getLogger(__name__)
T = TypeVar("T")


class BatchSize:
    """Tries a batch, with half of it where memory does not suffice, and remembers what did.

    One batch at a time, whichever threads ask: there is one device, and its memory is measured.

    Attributes:
        value: Pictures at once, now.

    Args:
        start: Pictures at once, at first.
        advice: What to change where not even one fits; the end of the message.
    """

    def __init__(self, start: int, advice: str) -> None:
        self.value = start
        self._advice = advice
        self._lock = threading.Lock()

    def run(self, encode: Callable[[int], T]) -> T:
        """Calls ``encode`` with a number of pictures for which memory suffices.

        Raises:
            ValueError: It does not suffice for one.
        """
        from accelerate.utils.memory import should_reduce_batch_size

        with self._lock:
            try:
                made = encode(self.value)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
            else:
                pulse.beat()
                return made
            return self._run_smaller(encode)  # out here, where the failed attempt's tensors are gone

    def _run_smaller(self, encode: Callable[[int], T]) -> T:
        from accelerate.utils.memory import find_executable_batch_size

        tried = self.value

        def halve() -> int:
            self.value //= 2
            return self.value

        def attempt(batch_size: int) -> T:
            return encode(batch_size)

        self.value = max(1, self.value // 2)
        find = find_executable_batch_size(attempt, starting_batch_size=self.value, reduce_batch_size_fn=halve)
        try:
            made = find()
        except RuntimeError as error:
            if "No executable batch size" not in str(error):
                raise
            self.value = 1
            raise ValueError(
                f"encode.batch_size: memory does not suffice for one picture at a time; {self._advice}"
            ) from error
        LOGGER.warning("encode.batch_size: memory does not suffice for %d pictures at once; %d do", tried, self.value)
        return made
