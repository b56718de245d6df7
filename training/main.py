"""One training process: ``python -m training.main --run FILE``, as many times as ``train.num_processes`` says.

`training.launch` starts them; so can torchrun or the deepspeed launcher, which set the same variables.
"""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from infra.child import run_as_child
from training.runspec import RunSpec


def main(spec: dict[str, Any], workdir: Path) -> dict[str, Any] | None:
    """Trains on this rank.

    Args:
        spec: A `RunSpec` as JSON.
        workdir: Scratch that all ranks share.

    Returns:
        On rank 0, where it ended.
    """
    run = RunSpec.model_validate(spec)
    import torch.distributed as dist  # torch only once the spec is known to be good

    from training.engine import find_world, share_cores
    from training.loop import run_training

    world = find_world(run.train)
    share_cores(run.train.num_processes)
    result = run_training(run, workdir, world)
    dist.destroy_process_group()
    return result


if __name__ == "__main__":
    # DeepSpeed's calls of collectives that torch has renamed: nothing a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed.*")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.exit(run_as_child(main))
