"""One training process: ``python -m training.main --run-file FILE``, as many times as ``train.num_processes`` says.

`training.launch` starts them on one machine. torchrun, ``deepspeed``, ``accelerate launch``, Slurm and Kubernetes start
them on one or many: the variables that these set (`training.world`) and FILE, which ``lacuna plan --write-run FILE``
writes, are all that a process needs.
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
        workdir: Scratch that the ranks on this machine share.

    Returns:
        On rank 0, where it ended.
    """
    run = RunSpec.model_validate(spec)
    import torch.distributed as dist  # torch only once the spec is known to be good

    from training.loop import run_training
    from training.peers import Peers
    from training.world import find_world, share_cores

    world = find_world(run.train)
    share_cores(world.local_size)
    with Peers(world):
        result = run_training(run, workdir, world)
    dist.destroy_process_group()
    return result


if __name__ == "__main__":
    # DeepSpeed's calls of collectives that torch has renamed: nothing a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed.*")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.exit(run_as_child(main))
