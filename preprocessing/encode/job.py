"""What the workers of an encoding are told, and how they are started on one machine. No torch."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra import pulse
from infra.launch import run_module
from preprocessing.contracts.config import EncodeConfig, ModelConfig
from preprocessing.contracts.manifest import Record, ShardReport


class EncodeJob(Record):
    """One dataset to be encoded.

    Attributes:
        store_uri: Where datasets stand.
        downloaded_prefix: Key of the ``download`` dataset's folder.
        encode: What to make.
        model: With which models.
        cpu: Whether to leave GPUs alone.
    """

    store_uri: str
    downloaded_prefix: str
    encode: EncodeConfig
    model: ModelConfig
    cpu: bool = False


def run_workers(
    job: EncodeJob, num_processes: int, *, workdir: Path, on_shard: Callable[[ShardReport], None] | None = None
) -> str:
    """Encodes a dataset in worker processes on this machine; none of them outlives us.

    Args:
        job: What to do.
        num_processes: How many.
        workdir: For their logs.
        on_shard: Called with the report of each shard that one of them commits.

    Returns:
        Key of the dataset's folder; its manifest is there.

    Raises:
        ValueError: As from `infra.launch.run_module`, and so are the other errors.
    """

    def on_event(event: dict[str, Any]) -> None:
        pulse.beat()
        if event.get("event") == "shard" and on_shard is not None:
            on_shard(ShardReport.model_validate(event["report"]))

    result = run_module(
        "preprocessing.encode.worker",
        job.model_dump(mode="json"),
        workdir=workdir,
        on_event=on_event,
        num_processes=num_processes,
        hears_every_rank=True,
    )
    return result["prefix"]


def num_gpus() -> int:
    """GPUs that are here for us; asked without CUDA, which a process that starts others had better not open."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
