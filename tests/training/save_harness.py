"""Ranks that do hardly anything but save: optimizer steps on made-up gradients, and a checkpoint after each.

The main of `tests.training.forked_ranks` for campaigns that kill a rank during a save.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from typing_extensions import override

from infra.child import emit
from infra.errors import TransientError
from infra.storage import FileEntry, open_store
from infra.storage_folder import FolderStore
from model.unet import build_unet
from tests.infra.s3_fault_proxy import waiting_less
from training.checkpoint import Checkpoints
from training.checkpoint_upload import Uploader
from training.config import TrainConfig
from training.ema import Ema
from training.engine import build_engine, init_distributed
from training.retention import Retention
from training.saved_state import TrainingState, load_state
from training.world import find_world

RUN = "harness"
UNET: dict[str, Any] = {
    "attention_head_dim": [2, 2],
    "block_out_channels": [16, 32],
    "cross_attention_dim": 16,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "in_channels": 9,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "use_linear_projection": True,
}


class _Failing(FolderStore):
    """A folder whose first uploads fail, as a network does."""

    def __init__(self, root: Path, num_failures: int) -> None:
        super().__init__(root)
        self._num_failures = num_failures

    @override
    def upload(self, key: str, path: Path, sha256: str | None = None) -> FileEntry:
        if self._num_failures > 0:
            self._num_failures -= 1
            raise TransientError(f"{key}: 503 Slow Down")
        return super().upload(key, path, sha256)


def main(spec: dict[str, Any], workdir: Path) -> dict[str, Any] | None:
    """Goes on from the newest checkpoint, and saves after every step.

    Args:
        spec: ``store``: its root; ``num_processes``; ``num_steps``; ``keep_last``; ``num_failures``: how many uploads
            fail before the store recovers, where it is tried three times; ``read_timeout_s``: of an S3 store.
        workdir: Scratch that the ranks share.
    """
    train = TrainConfig(
        prediction_type="v_prediction",
        mask_source="cached",
        seed=0,
        num_steps=spec["num_steps"],
        global_batch_size=spec["num_processes"],
        micro_batch_size=1,
        num_processes=spec["num_processes"],
        zero_stage=2,
    )
    if "read_timeout_s" in spec:
        waiting_less(spec["read_timeout_s"]).__enter__()  # to the end of this process
    world = find_world(train)
    init_distributed(world, 60)
    torch.manual_seed(0)
    unet = build_unet(UNET)
    ema = Ema(unet, 0.9) if world.is_first else None
    engine = build_engine(unet, train)
    store = _Failing(Path(spec["store"]), spec["num_failures"]) if "num_failures" in spec else open_store(spec["store"])
    retention, uploader = Retention(spec["keep_last"]), Uploader(delays_s=(0.01, 0.01))
    checkpoints = Checkpoints(store, RUN, workdir / "scratch", retention, uploader)
    found: list[str | None] = [None]
    if world.is_first:
        folder = checkpoints.fetch_newest()
        found = [None if folder is None else str(folder)]
    dist.broadcast_object_list(found, src=0)
    step = 0
    if found[0] is not None:
        step = load_state(Path(found[0]), engine, unet, ema, _state(0, ema, world.size)).step
    for now in range(step + 1, train.num_steps + 1):
        loss = sum((parameter * (now * (world.rank + 1))).cos().sum() for parameter in unet.parameters())
        engine.backward(loss)
        engine.step()
        if ema is not None:
            ema.update(unet)
            emit({"event": "saving", "step": now})
        checkpoints.save(engine, unet, ema, _state(now, ema, world.size))
    checkpoints.wait()
    dist.destroy_process_group()
    return {"step": train.num_steps} if world.is_first else None


def _state(step: int, ema: Ema | None, world_size: int) -> TrainingState:
    return TrainingState(
        step=step,
        position=step * world_size,
        ema_num_updates=0 if ema is None else ema.num_updates,
        world_size=world_size,
        run_digest="",
        dataset_digest="",
        config={},
    )
