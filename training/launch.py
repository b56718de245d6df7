"""Trains in processes of their own: see `infra.launch`. No torch here."""

import logging
from dataclasses import dataclass
from pathlib import Path

from infra.bundles import load_bundle
from infra.errors import ContractError, TransientError
from infra.launch import EventCallback, KilledError, run_module
from infra.storage import ObjectNotFoundError, ObjectStore, open_store
from training.memory import what_to_lower
from training.runspec import RunSpec, checkpoint_prefix

LOGGER = logging.getLogger(__name__)

_CHECKPOINT_GRACE_S = 300.0  # an interrupted training writes a checkpoint before it ends


@dataclass(frozen=True)
class TrainResult:
    """Where a training ended.

    Attributes:
        checkpoint_prefix: Key of its last checkpoint.
        step: The step of that checkpoint.
        was_done: Whether it was there before.
    """

    checkpoint_prefix: str
    step: int
    was_done: bool


def train(run: RunSpec, *, workdir: Path, on_event: EventCallback) -> TrainResult:
    """Trains to the last step, going on from the newest checkpoint that stands.

    Args:
        run: What to train.
        workdir: Scratch and logs (``rank-0.log`` …); nothing in it is needed by the next call.
        on_event: Called with each event of rank 0: ``step``, ``resumed``, ``checkpoint``, ``done`` …

    Returns:
        The last checkpoint; at once if it is committed already.

    Raises:
        ValueError: Bad input, found by a training process; `ContractError` where two sides do not fit.
        TransientError: A process was killed, hung, or could not reach the store; the same call goes on from the last
            checkpoint.
        WalltimeError: ``train.walltime_s`` is nearly over; a checkpoint stands.
        RuntimeError: A process failed; the message holds the end of its log.
    """
    store = open_store(run.store_uri)
    prefix = checkpoint_prefix(run.run_id, run.train.num_steps)
    if _is_committed(store, prefix):
        return TrainResult(prefix, run.train.num_steps, was_done=True)
    try:
        result = run_module(
            "training.main",
            run.model_dump(mode="json"),
            workdir=workdir,
            on_event=on_event,
            num_processes=run.train.num_processes,
            stall_timeout_s=run.train.stall_timeout_s,
            grace_s=_CHECKPOINT_GRACE_S,
        )
    except KilledError as error:
        if not error.may_be_memory:
            raise
        raise TransientError(
            f"{error.cause}; the same command goes on from the last checkpoint. If memory is short: "
            f"{what_to_lower(run.train)}; {error.log}"
        ) from error
    return TrainResult(result["checkpoint_prefix"], result["step"], was_done=False)


def _is_committed(store: ObjectStore, prefix: str) -> bool:
    try:
        load_bundle(store, prefix)
    except ObjectNotFoundError:
        return False
    except ContractError as error:  # damaged: the training falls back to the one before, and makes it again
        LOGGER.error("CHECKPOINT DAMAGED: %s", error)
        return False
    return True
