"""Ranks that only wait for a long upload: the main of `tests.training.forked_ranks` for what the waiting is about."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from infra.child import emit
from infra.storage import open_store
from training.checkpoint import Checkpoints

TIMEOUT_S = 6.0


def main(spec: dict[str, Any], workdir: Path) -> dict[str, Any] | None:
    """Waits for an upload.

    Args:
        spec: ``store``: its root; ``upload_s``: how long the upload takes.
        workdir: Scratch that the ranks share.
    """
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    checkpoints = Checkpoints(open_store(spec["store"]), "run", workdir / "scratch", tell_every_s=1.0)
    is_first = dist.get_rank() == 0
    if is_first:
        checkpoints.uploader.start("checkpoint", lambda: time.sleep(spec["upload_s"]))
        emit({"event": "waiting"})
    started = time.monotonic()
    checkpoints.wait()
    seconds = time.monotonic() - started
    dist.destroy_process_group()
    return {"seconds": seconds} if is_first else None
