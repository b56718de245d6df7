"""The scale of the loss in fp16: as high as goes, so that small gradients do not vanish."""

from dataclasses import dataclass
from typing import Final

INITIAL: Final = 2.0**16
GROWTH_STEPS: Final = 2000
LOWEST: Final = 1.0
HIGHEST: Final = 2.0**24


@dataclass
class LossScale:
    """Halved when gradients overflow, doubled after many steps without. A part of each checkpoint.

    Attributes:
        value: The loss is multiplied by it, the gradients are divided by it: powers of two, which round nothing.
        num_good_steps: Since it last changed.
    """

    value: float = INITIAL
    num_good_steps: int = 0

    def note_good(self) -> None:
        """A step whose gradients were finite."""
        self.num_good_steps += 1
        if self.num_good_steps == GROWTH_STEPS:
            self.value, self.num_good_steps = min(2 * self.value, HIGHEST), 0

    def lower(self) -> bool:
        """The gradients overflowed; returns whether the scale can be blamed, which then is lower."""
        if self.value <= LOWEST:
            return False
        self.value, self.num_good_steps = self.value / 2, 0
        return True
