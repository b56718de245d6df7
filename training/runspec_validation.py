"""What a validation and an export are told. No torch: the flows import this at start-up."""

from typing import Any, Literal

from infra.bundles import find_bundle
from infra.storage import ObjectStore
from model.specs import ScheduleSpec
from preprocessing.contracts.config import Config, ModelConfig
from preprocessing.contracts.digests import digest_of
from training.config import PublishConfig, TrainConfig, ValidationConfig
from training.runspec import export_prefix, validation_prefix

VALIDATION_VERSION = 2
"""Raised by hand whenever the code's result changes."""


class ValidationSpec(Config):
    """One validation: ``python -m training.validation --run FILE``.

    Attributes:
        store_uri: The object store's root.
        run_id: The training run.
        step: Of the checkpoint.
        checkpoint_prefix: Key of the checkpoint's folder; its ``ema/`` is what is validated.
        dataset_prefix: Key of the encoded dataset's folder; only rows of its validation split are read.
        model: Where the VAE and the text encoder are.
        prediction_type: What the UNet predicts.
        schedule: The noise schedule that it was trained on.
        config: How to validate.
    """

    store_uri: str
    run_id: str
    step: int
    checkpoint_prefix: str
    dataset_prefix: str
    model: ModelConfig
    prediction_type: Literal["epsilon", "v_prediction"]
    schedule: ScheduleSpec
    config: ValidationConfig

    @property
    def digest(self) -> str:
        """The digest of what determines the report; prefixes name immutable content, the encoders' weights included."""
        determined_by: dict[str, Any] = {
            "config": self.config.digest_fields(),
            "prediction_type": self.prediction_type,
            "schedule": self.schedule.to_json(),
            "base": self.model.base,
        }
        return digest_of("validation", VALIDATION_VERSION, determined_by, [self.checkpoint_prefix, self.dataset_prefix])

    def report_prefix(self, store: ObjectStore) -> str:
        """The key of the report's folder: ``runs/…/validation/step-…``.

        Reports are immutable: if one of another validation of this checkpoint stands there, this one's folder has its
        own digest in its name.
        """
        prefix = validation_prefix(self.run_id, self.step)
        done = find_bundle(store, prefix)
        if done is None or done.metadata.get("digest") == self.digest:
            return prefix
        return f"{prefix}-{self.digest[:8]}"


class ExportSpec(Config):
    """One export: ``python -m training.export --run FILE``.

    Attributes:
        store_uri: The object store's root.
        run_id: The training run.
        step: Of the checkpoint.
        checkpoint_prefix: Key of the checkpoint's folder; its ``ema/`` is published.
        report_prefix: Key of the validation report's folder, whose ``summary`` the channels' rules read.
        dataset_prefixes: Keys of the datasets' folders, in the order in which they were made: select, download, encode.
        model: The weights that the training started from.
        train: How it was trained.
        config: What is published, and when a channel moves.
    """

    store_uri: str
    run_id: str
    step: int
    checkpoint_prefix: str
    report_prefix: str
    dataset_prefixes: tuple[str, ...]
    model: ModelConfig
    train: TrainConfig
    config: PublishConfig

    @property
    def export_prefix(self) -> str:
        """The key of the export's folder."""
        return export_prefix(self.run_id, self.step)
