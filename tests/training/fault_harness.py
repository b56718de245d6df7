"""Ranks that train with faults injected, one run after the other: the main of `tests.training.forked_ranks` for them.

A fault is a number that is not finite, in one of four places, at some moments of a run. `FaultyTrainer` puts it there;
everything else is the product's. Each rank also sees to it that a step that was passed over changed nothing, not a bit.
"""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from infra.errors import GateError
from training.batch import Batch
from training.loop import Trainer, run_training
from training.runspec import RunSpec
from training.step import StepLoss
from training.stopping import Stop
from training.world import find_world

VALUES: Final = ("nan", "inf", "-inf")
PLACES: Final = ("loss", "gradient", "latents", "average")
PATTERNS: Final[dict[str, frozenset[int]]] = {
    "first": frozenset({0}),
    "single": frozenset({4}),
    "burst": frozenset({4, 5}),
    "stretch": frozenset({4, 5, 6}),
    "permanent": frozenset(range(4, 1000)),
}
"""At which moments: batches of the run's order, so that a batch is bad whenever it is seen; for the average, updates
in the course of the process, so that what is replayed is not bad again."""

RESULTS_NAME: Final = "results.json"


class FaultyTrainer(Trainer):
    """A training with one fault; the class's attributes say which."""

    value: ClassVar[float] = 0.0
    place: ClassVar[str] = ""
    moments: ClassVar[frozenset[int]] = frozenset()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_averaged = 0
        self.num_unchanged = 0
        if self.place == "gradient" and self.world.rank == self.world.size - 1:
            self.unet.conv_out.weight.register_hook(self._gradient)

    @property
    def is_now(self) -> bool:
        return self.position // self.run.train.global_batch_size in self.moments

    def _gradient(self, gradient: Tensor) -> Tensor:
        if not self.is_now:
            return gradient
        bad = gradient.clone()
        bad.view(-1)[-1] = self.value
        return bad

    @override
    def _loss_of(self, start: int, stop: int, batch: Batch) -> StepLoss:
        is_here = self.is_now and start == 0 and self.world.is_first
        if is_here and self.place == "latents":
            assert batch.moments is not None
            moments = batch.moments.clone()
            moments[0, 0, 0, 0] = self.value
            batch = dataclasses.replace(batch, moments=moments)
        result = super()._loss_of(start, stop, batch)
        if is_here and self.place == "loss":
            per_sample = result.per_sample.clone()
            per_sample[0] = self.value
            result = dataclasses.replace(result, loss=result.loss * self.value, per_sample=per_sample)
        return result

    @override
    def _average(self) -> None:
        super()._average()
        if self.place == "average" and self.num_averaged in self.moments and self.ema is not None:
            self.ema.state_dict()["conv_out.bias"][0] = self.value
        self.num_averaged += 1

    @override
    def _take_step(self, batch: Batch, stop: Stop) -> Any:
        step, before = self.step, self.fingerprint()
        answer = super()._take_step(batch, stop)
        if self.step == step:
            assert self.fingerprint() == before, f"a step that was passed over changed something: {self.skips}"
            self.num_unchanged += 1
        return answer

    def fingerprint(self) -> str:
        """Of all that is trained, as this rank holds it."""
        digest = hashlib.sha256()
        held = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        states = [value for parameter in held for _, value in sorted(self.optimizer.state.get(parameter, {}).items())]
        average = [] if self.ema is None else list(self.ema.state_dict().values())
        for tensor in (*self.unet.parameters(), *held, *states, *average):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def name_of(place: str, value: str, pattern: str) -> str:
    return f"{place}-{value.replace('-', 'minus-')}-{pattern}"


def main(spec: dict[str, Any], workdir: Path) -> dict[str, Any] | None:
    """Trains once for each case.

    Args:
        spec: ``run``: a `RunSpec`; ``cases``: lists of place, value and pattern; "none" is no place, and no fault.
        workdir: Where ``results.json`` goes, case → how it ended.
    """
    results: dict[str, Any] = {}
    world = None
    for place, value, pattern in spec["cases"]:
        name = name_of(place, value, pattern)
        run = RunSpec.model_validate(spec["run"] | {"run_id": name})
        world = find_world(run.train)
        made: list[FaultyTrainer] = []

        class Case(FaultyTrainer):
            def __post_init__(self, made: list[FaultyTrainer] = made) -> None:
                super().__post_init__()
                made.append(self)

        Case.place, Case.value, Case.moments = place, float(value), PATTERNS[pattern]
        folder = workdir / name
        folder.mkdir(exist_ok=True)
        try:
            run_training(run, folder, world, Case)
            error = None
        except GateError as caught:
            error = str(caught)
        trainer = made[0]
        results[name] = {
            "error": error,
            "step": trainer.step,
            "position": trainer.position,
            "skips": trainer.skips.model_dump(mode="json"),
            "num_unchanged": trainer.num_unchanged,
            "is_loss_finite": trainer.loss is None or math.isfinite(trainer.loss),
        }
        if world.is_first:
            (workdir / RESULTS_NAME).write_text(json.dumps(results))
        dist.barrier()
    dist.destroy_process_group()
    torch.set_grad_enabled(True)
    return {} if world is None or world.is_first else None
