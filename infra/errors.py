"""The errors that cross rooms, and the exit code that each one becomes.

| exit code | meaning | raised as |
| --- | --- | --- |
| 0 | done | |
| 2 | bad input: the message names the field, its value and what to change | ``ValueError`` (and ``ContractError``) |
| 3 | a gate refused | ``GateError`` |
| 4 | the outside world failed; a retry may help | ``TransientError`` |
| 5 | the time granted is nearly over: a checkpoint stands, the same command goes on | ``WalltimeError`` |
| 130 | interrupted | ``KeyboardInterrupt`` |
"""

from collections.abc import Mapping
from typing import Any

EXIT_DONE = 0
EXIT_BAD_INPUT = 2
EXIT_GATE_REFUSED = 3
EXIT_OUTSIDE_WORLD = 4
EXIT_WALLTIME = 5
EXIT_INTERRUPTED = 130


class ContractError(ValueError):
    """Two sides that must agree do not; the message names both sides and both values."""


class GateError(RuntimeError):
    """A gate refused to go on (too few rows left, too low a success rate): legal input, a result not good enough.

    Attributes:
        details: JSON values that say more, for programs.
    """

    def __init__(self, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.details = dict(details or {})


class TransientError(RuntimeError):
    """The outside world failed (network, object store, a child killed from outside): retries look for this one."""


class WalltimeError(RuntimeError):
    """The time that a run was granted is nearly over; what it has done is saved. A retry is for another grant."""
