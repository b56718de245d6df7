"""How a run ended: what is compared where two runs must be the same."""

import hashlib
import json
from typing import Any

from infra.storage import ObjectStore
from training.runspec import RunSpec, checkpoint_prefix, run_prefix
from training.saved_state import TrainingState


def losses(store: ObjectStore, run: RunSpec) -> list[float]:
    """Of each step."""
    return [line["loss"] for line in _lines(store, run) if "loss" in line]


def hex_losses(store: ObjectStore, run: RunSpec) -> list[str]:
    """Of each step, to the last bit."""
    return [loss.hex() for loss in losses(store, run)]


def state_sha256(store: ObjectStore, run: RunSpec, step: int) -> str:
    """Of everything that is trained: parameters, optimizer, average, generators, and the counts."""
    prefix = checkpoint_prefix(run.run_id, step)
    digest = hashlib.sha256()
    for info in store.list(f"{prefix}/"):
        name = info.key.removeprefix(f"{prefix}/")
        if name.endswith(".safetensors"):
            digest.update(name.encode() + store.read(info.key))
    state = TrainingState.model_validate_json(store.read(f"{prefix}/state.json"))
    digest.update(state.model_dump_json(exclude={"config"}).encode())
    return digest.hexdigest()


def clear(store: ObjectStore, run: RunSpec) -> None:
    """Forgets a run."""
    for info in list(store.list(f"{run_prefix(run.run_id)}/")):
        store.delete(info.key)


def _lines(store: ObjectStore, run: RunSpec) -> list[dict[str, Any]]:
    return [json.loads(line) for line in store.read(f"{run_prefix(run.run_id)}/metrics.jsonl").splitlines()]
