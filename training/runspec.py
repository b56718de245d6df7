"""What one training run is: its name, its inputs, and where its results stand in the store. No torch."""

from typing import Any, Final

from pydantic import Field

from preprocessing.contracts.config import Config, ModelConfig
from preprocessing.contracts.digests import digest_of, weights_sha256
from training.config import TrainConfig

TRAIN_VERSION = 2
"""Raised by hand whenever the code's result changes: a run of another version is another run."""


EXPORTS_PREFIX: Final = "exports"
"""Below it lie the exports, by run."""


class RunSpec(Config):
    """All that the training processes are told.

    Attributes:
        run_id: Name of the run, from `run_id_of`; its results stand below `run_prefix`.
        store_uri: The object store's root.
        dataset_prefix: Key of the encoded dataset's folder in the store; of a mixture, the first one's.
        mixture: Keys of the folders of several datasets, and their weights; empty for one.
        model: The weights to start from.
        train: How to train.
    """

    run_id: str
    store_uri: str
    dataset_prefix: str
    mixture: dict[str, float] = Field(default_factory=dict)
    model: ModelConfig
    train: TrainConfig

    @property
    def datasets(self) -> dict[str, float]:
        """Keys of the folders of all datasets that are trained on, and their weights."""
        return self.mixture or {self.dataset_prefix: 1.0}


def run_digest(train: TrainConfig, model: ModelConfig, dataset_digest: str) -> str:
    """The digest of what determines a training's result.

    Args:
        train: How to train.
        model: The weights to start from; only the UNet's and its average's count here, the encoders' are in the
            dataset's digest.
        dataset_digest: The encoded dataset's; for several, `mixture_digest`.

    Returns:
        64 hexadecimal digits.
    """
    config: dict[str, Any] = train.digest_fields()
    for name in ("dataset", "datasets"):  # where they lie does not matter, and what they hold is in the digest
        config.pop(name, None)
    weights = {"unet": weights_sha256(model.directory / "unet")}
    if (model.directory / "unet_ema").is_dir():
        weights["unet_ema"] = weights_sha256(model.directory / "unet_ema")
    return digest_of("train", TRAIN_VERSION, config, [dataset_digest], weights)


def run_id_of(recipe: str, digest: str) -> str:
    """The name of a run: the recipe's name, and enough of the digest to tell runs apart."""
    return f"{recipe}-{digest[:12]}"


def recipe_of(run_id: str) -> str:
    """The recipe's name in that of a run; the inverse of `run_id_of`."""
    return run_id.rpartition("-")[0]


def step_name(step: int) -> str:
    """``step-00000100``: sorts as the numbers do."""
    return f"step-{step:08d}"


def step_of(prefix: str) -> int:
    """The step that the last part of a key names; the inverse of `step_name`.

    Raises:
        ValueError: The key names none.
    """
    name = prefix.rstrip("/").rpartition("/")[2]
    digits = name.removeprefix("step-")
    if digits == name or not digits.isdigit():
        raise ValueError(f"{prefix!r} names no step; it should end like {step_name(100)}")
    return int(digits)


def run_prefix(run_id: str) -> str:
    """The key of a run's folder."""
    return f"runs/{run_id}"


def checkpoints_prefix(run_id: str) -> str:
    """The key of the folder of all checkpoints of a run."""
    return f"{run_prefix(run_id)}/checkpoints"


def checkpoint_prefix(run_id: str, step: int) -> str:
    """The key of one checkpoint's folder."""
    return f"{checkpoints_prefix(run_id)}/{step_name(step)}"


def validation_prefix(run_id: str, step: int) -> str:
    """The key of the folder with one checkpoint's validation report."""
    return f"{run_prefix(run_id)}/validation/{step_name(step)}"


def export_prefix(run_id: str, step: int) -> str:
    """The key of the folder with what was published from one checkpoint."""
    return f"{EXPORTS_PREFIX}/{run_id}/{step_name(step)}"
