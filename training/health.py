"""What to do when numbers are not finite: skip the step, roll back, or end the run. And when nothing is learned.

The policy, the same on every rank, decided from numbers that all ranks have agreed upon:

| what is seen | what follows |
| --- | --- |
| loss or gradient not finite at a step | the step changes nothing; its samples are passed over for good |
| so often in a row: `MAX_BAD_IN_A_ROW` | back to the last committed checkpoint, and on behind the bad samples |
| parameters or average not finite when they are to be saved | nothing is saved; back to the last committed checkpoint |
| the same again, with no good step beyond where it was before | the run ends |
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from infra.errors import GateError
from training.config import TrainConfig

LOGGER = logging.getLogger(__name__)

MAX_BAD_IN_A_ROW: Final = 3
"""So many bad steps one after the other are no accident of single samples."""

MAX_ROLLBACKS: Final = 5
"""So many rollbacks to one and the same checkpoint, and the run ends even if each got a little further."""

MAX_UIDS_TOLD: Final = 20
WATCHED_STEPS: Final = 50
"""Most of the weights must have changed after so many steps."""

_DECAYED_TO = 1e-4

Kind = Literal["loss", "gradient", "parameters", "average"]
_SUBJECTS: Final[dict[str, str]] = {
    "loss": "the loss of step {step} is",
    "gradient": "the gradient of step {step} is",
    "parameters": "after step {step}, the UNet's parameters are",
    "average": "after step {step}, the average of the weights is",
}


class Skips(BaseModel):
    """What a run did not train on; it is part of a checkpoint, so that a resumed run goes on alike.

    Attributes:
        num_steps: Steps that were tried and changed nothing.
        num_rollbacks: How often the run went back to a checkpoint.
        num_bad_in_a_row: How many bad steps came last, with no good one after them.
        positions: Samples that were passed over: [first, end) of each range, in order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_steps: int = Field(default=0, ge=0)
    num_rollbacks: int = Field(default=0, ge=0)
    num_bad_in_a_row: int = Field(default=0, ge=0)
    positions: tuple[tuple[int, int], ...] = ()

    def with_bad_step(self, first: int, end: int) -> "Skips":
        """One bad step more."""
        return self.model_copy(
            update={
                "num_steps": self.num_steps + 1,
                "num_bad_in_a_row": self.num_bad_in_a_row + 1,
                "positions": _joined(self.positions, first, end),
            }
        )

    def with_good_step(self) -> "Skips":
        """A good step ends what was in a row."""
        return self.model_copy(update={"num_bad_in_a_row": 0}) if self.num_bad_in_a_row else self

    def with_rollback(self, first: int, end: int) -> "Skips":
        """One rollback more, to where `first` was the next sample; the samples up to `end` are not seen again."""
        return self.model_copy(
            update={
                "num_rollbacks": self.num_rollbacks + 1,
                "num_bad_in_a_row": 0,
                "positions": _joined(self.positions, first, end),
            }
        )


def _joined(ranges: Sequence[tuple[int, int]], first: int, end: int) -> tuple[tuple[int, int], ...]:
    """The ranges and one more, which none of them begins behind, in as few as say the same."""
    if first == end:
        return tuple(ranges)
    kept = [found for found in ranges if found[1] < first]
    touched = [found for found in ranges if found[1] >= first]
    first = min([first, *(begin for begin, _ in touched)])
    return (*kept, (first, max([end, *(stop for _, stop in touched)])))


class Rollbacks:
    """Decides whether one more rollback may help. Each rank has one, and all decide alike."""

    def __init__(self) -> None:
        self._since_commit: list[tuple[Kind, int]] = []

    def forget(self) -> None:
        """A newer checkpoint is committed: what comes is another story."""
        self._since_commit.clear()

    def check(self, kind: Kind, step: int, saved_step: int, uids: Sequence[str]) -> None:
        """Notes a rollback that is about to be made.

        Args:
            kind: What is not finite.
            step: Steps taken until then.
            saved_step: Of the last checkpoint, 0 if there is none.
            uids: Of the samples at fault, if that is known.

        Raises:
            GateError: It was tried, and did not help.
        """
        before = [its_step for its_kind, its_step in self._since_commit if its_kind == kind]
        self._since_commit.append((kind, step))
        if (not before or step > max(before)) and len(self._since_commit) <= MAX_ROLLBACKS:
            return
        samples = f"; {len(uids)} samples: {shown(uids)}" if uids else ""
        raise GateError(
            f"{subject(kind, step)} not finite{samples}. It was so before, and going back to the last checkpoint, of "
            f"step {saved_step}, did not help; lower train.learning_rate, or forget the rows if they are at fault"
        )


def subject(kind: Kind, step: int) -> str:
    """``the loss of step 7 is``."""
    return _SUBJECTS[kind].format(step=step)


def shown(uids: Sequence[str]) -> str:
    """The first few."""
    return ", ".join(uids[:MAX_UIDS_TOLD]) + (" …" if len(uids) > MAX_UIDS_TOLD else "")


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether every number is."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    # A norm is not finite if a number is not; it may also be too large for float32, which then is looked at closely.
    return all(
        bool(torch.stack(torch._foreach_norm(group)).isfinite().all()) or all(t.isfinite().all() for t in group)  # pyright: ignore[reportPrivateImportUsage]  # what torch's own clipping calls
        for group in by_device.values()
    )


# ---------------------------------------------------------------------------------------------- nothing that is learned


@dataclass
class WeightsWatch:
    """Sees to it that training changes the weights. Each rank has one; under ZeRO 0 to 2 all see the same.

    Attributes:
        module: What is trained.
        train: How.
    """

    module: nn.Module
    train: TrainConfig

    def __post_init__(self) -> None:
        self.start_over()

    def start_over(self) -> None:
        """The weights were set from outside."""
        self._before = self._fingerprints()
        self._num_steps = 0
        self._largest_rate = 0.0

    def note(self, step: int, learning_rate: float) -> str | None:
        """Takes note of a step that the optimizer took.

        Returns:
            What is wrong, if most weights are what they were many steps ago; the same on all ranks.
        """
        self._num_steps += 1
        self._largest_rate = max(self._largest_rate, learning_rate)
        if self._num_steps < WATCHED_STEPS:
            return None
        before, num_steps, largest_rate = self._before, self._num_steps, self._largest_rate
        self.start_over()
        same = (before == self._before).tolist()
        is_decayed = step > self.train.warmup_steps and 0 < largest_rate < _DECAYED_TO * self.train.learning_rate
        # Zeros change by the smallest of steps, where all others stay what they are.
        if 2 * sum(same) > len(same) and not is_decayed:
            return (
                f"steps {step - num_steps + 1} to {step} changed {len(same) - sum(same)} of the UNet's {len(same)} "
                f"parameters, with a learning rate of at most {largest_rate:g}; look at train.learning_rate "
                f"({self.train.learning_rate:g}), lr_schedule and what is frozen"
            )
        if any(same) and not is_decayed:
            names = [name for (name, _), is_same in zip(self.module.named_parameters(), same, strict=True) if is_same]
            LOGGER.warning(
                "steps %d to %d did not change %d of the UNet's %d parameters: %s",
                *(step - num_steps + 1, step, len(names), len(same), shown(names)),
            )
        return None

    @torch.no_grad()
    def _fingerprints(self) -> Tensor:
        """(num_parameters,) int64: of each parameter the sum of its bits. A norm would round small changes away."""
        return torch.stack([parameter.view(torch.int32).sum() for parameter in self.module.parameters()])


def check_trainable(module: nn.Module) -> None:
    """Refuses a module of which a part would never change.

    Raises:
        GateError: It has a frozen parameter.
    """
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    if frozen:
        raise GateError(f"{len(frozen)} of the UNet's parameters are frozen and would never change: {shown(frozen)}")
