"""Checkpoints: committed so that a half-written one is never believed, and believed only after every hash is checked.

Order of a commit: all ranks write into a scratch folder → all agree that they have → sizes and sha256 → upload →
``MANIFEST.json`` last. DeepSpeed's own ``latest`` file is neither written nor read: it is written before it is known
that the other ranks have finished, and its loader unpickles whatever it finds. Here nothing is unpickled before its
sha256 is checked.

```
runs/{run_id}/checkpoints/step-00000100/
    deepspeed/state/…       optimizer and parameters, in DeepSpeed's layout: to go on from
    unet/ ema/              diffusers folders, float32 safetensors: for everybody else
    state.json              step, position, digests, config
    MANIFEST.json
```
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file

from infra.bundles import (
    MANIFEST_NAME,
    commit_bundle,
    fetch_bundle,
    list_bundles,
    verify_bundle,
)
from infra.channels import read_channel
from infra.errors import ContractError, TransientError
from infra.storage import ObjectNotFoundError, ObjectStore
from model.safetensors_writer import save_safetensors
from model.weights import WEIGHTS_NAME
from training.ema import Ema
from training.runspec import checkpoint_prefix, checkpoints_prefix, step_of

LOGGER = logging.getLogger(__name__)

DAMAGED_NAME: Final = "DAMAGED.json"
"""What the manifest of a damaged checkpoint is renamed to, so that the step can be committed again."""

_DEEPSPEED_FOLDER = "deepspeed"
_TAG = "state"


class TrainingState(BaseModel):
    """What a resumed run must know besides tensors.

    Attributes:
        step: Optimizer steps taken; the next one draws with this number.
        position: Samples seen: where the order goes on.
        ema_num_updates: How often the average was updated.
        world_size: Processes that wrote; DeepSpeed's optimizer state is divided among as many.
        run_digest: Of what determines the run.
        dataset_digest: Of the dataset.
        config: The `TrainConfig`, for people.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    position: int
    ema_num_updates: int
    world_size: int
    run_digest: str
    dataset_digest: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        store: Where they are.
        run_id: The run.
        scratch: A local folder that all ranks share and nobody else uses.
        keep: How many of the newest are kept.
    """

    store: ObjectStore
    run_id: str
    scratch: Path
    keep: int

    # -------------------------------------------------------------------------------------------------------- saving

    def save(self, engine: Any, unet: UNet2DConditionModel, ema: Ema | None, state: TrainingState) -> str:
        """Writes and commits a checkpoint. All ranks call it; it returns when it is committed.

        Args:
            engine: The DeepSpeed engine.
            unet: The module inside it; its parameters are whole on every rank.
            ema: On rank 0.
            state: Where the run is; rank 0's is written.

        Returns:
            The checkpoint's key.

        Raises:
            TransientError: The store did not take it, or a rank's file is missing.
        """
        folder = self.scratch / "checkpoint"
        if _is_first():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        dist.barrier()
        engine.save_checkpoint(str(folder / _DEEPSPEED_FOLDER), tag=_TAG, save_latest=False)
        dist.barrier()  # every rank has written; one that could not has raised, and the launcher stops the others
        prefix = checkpoint_prefix(self.run_id, state.step)
        if _is_first():
            assert ema is not None
            _check_all_ranks_wrote(folder, engine, state)
            _write_weights(folder, unet, ema)
            (folder / "state.json").write_text(state.model_dump_json(indent=1), encoding="utf-8")
            commit_bundle(
                self.store,
                prefix,
                folder,
                kind="checkpoint",
                run_id=self.run_id,
                step=state.step,
                metadata={
                    "run_digest": state.run_digest,
                    "dataset_digest": state.dataset_digest,
                    "config": state.config,
                },
            )
            shutil.rmtree(folder)
            self.rotate()
        dist.barrier()
        return prefix

    def rotate(self) -> list[str]:
        """Deletes old checkpoints: neither the newest ones nor those of steps that a channel names.

        Returns:
            What was deleted.
        """
        prefixes = list_bundles(self.store, checkpoints_prefix(self.run_id))
        named = self._steps_named_by_channels()
        old = [prefix for prefix in prefixes[: -self.keep] if step_of(prefix) not in named]
        for prefix in old:
            self.store.delete(f"{prefix}/{MANIFEST_NAME}")  # first: what is left is no checkpoint any more
            for info in list(self.store.list(f"{prefix}/")):
                self.store.delete(info.key)
        return old

    def _steps_named_by_channels(self) -> set[int]:
        """A channel may name the checkpoint, or what was exported from it: both keep it."""
        keys = [info.key for info in self.store.list("channels/")]
        names = [key.removeprefix("channels/").removesuffix(".json") for key in keys if key.endswith(".json")]
        pointers = [read_channel(self.store, name) for name in names]
        return {pointer.step for pointer in pointers if pointer is not None and pointer.run_id == self.run_id}

    # ------------------------------------------------------------------------------------------------------- loading

    def fetch_newest(self) -> Path | None:
        """Brings the newest checkpoint that is whole to the scratch folder, with every sha256 verified.

        A damaged one is passed over, loudly; and once an older one proved good it is marked, so that its step can be
        committed again.

        Returns:
            Its folder; None if the run has no checkpoint at all.

        Raises:
            ContractError: There are checkpoints, and all are damaged: starting over would silently throw work away.
            TransientError: The store cannot be read.
        """
        folder = self.scratch / "resume"
        damaged: dict[str, str] = {}
        for prefix in reversed(list_bundles(self.store, checkpoints_prefix(self.run_id))):
            shutil.rmtree(folder, ignore_errors=True)
            problem = self._fetch(prefix, folder)
            if problem is None:
                for bad in damaged:
                    self._mark_damaged(bad)
                return folder
            LOGGER.error("CHECKPOINT DAMAGED, falling back to the one before: %s", problem)
            damaged[prefix] = problem
        if damaged:
            raise ContractError(
                f"run {self.run_id}: none of its {len(damaged)} checkpoints is whole ({next(iter(damaged.values()))}); "
                f"restore one, or delete {self.store.uri_of(checkpoints_prefix(self.run_id))} to start over from step 0"
            )
        return None

    def _fetch(self, prefix: str, folder: Path) -> str | None:
        """Fetches one checkpoint; returns what is wrong with it, if anything is."""
        try:
            fetch_bundle(self.store, prefix, folder)
        except ContractError as error:
            return str(error)
        except (TransientError, ObjectNotFoundError):
            # A damaged object, or a store that had a bad moment? Only the first is a reason to go back in time.
            problems = verify_bundle(self.store, prefix)
            if not problems:
                raise
            return problems[0]
        return None

    def _mark_damaged(self, prefix: str) -> None:
        manifest_key = f"{prefix}/{MANIFEST_NAME}"
        self.store.put(f"{prefix}/{DAMAGED_NAME}", self.store.read(manifest_key))
        self.store.delete(manifest_key)


def read_state(folder: Path) -> TrainingState:
    """The state of a fetched checkpoint."""
    return TrainingState.model_validate_json((folder / "state.json").read_bytes())


def load_checkpoint(folder: Path, engine: Any, ema: Ema | None, expected: TrainingState) -> int:
    """Loads a fetched and verified checkpoint into the engine and the average. All ranks call it.

    Args:
        folder: From `Checkpoints.fetch_newest`.
        engine: The DeepSpeed engine.
        ema: On rank 0.
        expected: The state of this run at step 0.

    Returns:
        Steps taken.

    Raises:
        ContractError: It is the checkpoint of another run.
    """
    state = read_state(folder)
    for name in ("run_digest", "dataset_digest", "world_size"):
        ours, theirs = getattr(expected, name), getattr(state, name)
        if ours != theirs:
            raise ContractError(
                f"checkpoint at step {state.step}: its {name} is {theirs}, this run's is {ours}; "
                "give the run another id"
            )
    loaded, _ = engine.load_checkpoint(str(folder / _DEEPSPEED_FOLDER), tag=_TAG)
    if loaded is None:
        raise ContractError(f"checkpoint at step {state.step}: DeepSpeed found nothing to load in {folder}")
    if ema is not None:
        ema.load_state_dict(load_file(folder / "ema" / WEIGHTS_NAME), state.ema_num_updates)
    return state.step


def _write_weights(folder: Path, unet: UNet2DConditionModel, ema: Ema) -> None:
    for name, averaged in (("unet", {}), ("ema", ema.state_dict())):
        unet.save_config(folder / name)
        weights = {**unet.state_dict(), **averaged}
        save_safetensors(folder / name / WEIGHTS_NAME, weights, dtype=torch.float32)


def _check_all_ranks_wrote(folder: Path, engine: Any, state: TrainingState) -> None:
    written = list((folder / _DEEPSPEED_FOLDER / _TAG).glob("*_optim_states.pt"))
    wanted = state.world_size if engine.zero_optimization_stage() else 0
    if len(written) != wanted:
        raise TransientError(
            f"checkpoint at step {state.step}: {len(written)} of {wanted} ranks wrote their part to {folder}; run again"
        )
    # A program that DeepSpeed puts beside its files; unet/ holds what it would make.
    (folder / _DEEPSPEED_FOLDER / "zero_to_fp32.py").unlink(missing_ok=True)


def _is_first() -> bool:
    return dist.get_rank() == 0
