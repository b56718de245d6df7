"""Several trainings in one process, one after the other: a main of `tests.training.forked_ranks`."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from training.loop import run_training
from training.runspec import RunSpec
from training.world import find_world


def main(spec: dict[str, Any], workdir: Path) -> dict[str, Any] | None:
    """Trains once for each of ``spec["runs"]``, all with the same number of processes."""
    for i, fields in enumerate(spec["runs"]):
        run = RunSpec.model_validate(fields)
        world = find_world(run.train)
        run_training(run, workdir / str(i), world)
    dist.destroy_process_group()
    return {}
