"""What a user may say about training, validation and publishing. No torch: the flows import this at start-up."""

from typing import Literal

from pydantic import Field, model_validator

from preprocessing.contracts.config import NOT_IN_DIGEST, Config, MaskFamily


class TrainConfig(Config):
    """One training run of the 9-channel inpainting UNet."""

    prediction_type: Literal["epsilon", "v_prediction"] = Field(
        description="What the UNet learns to predict; no default on purpose."
    )
    mask_source: Literal["cached"] = Field(
        description="'cached': the K mask variants of the dataset; no default on purpose."
    )
    seed: int = Field(ge=0, description="Order, noise, timesteps, dropout; no default on purpose.")
    dataset: str | None = Field(
        default=None, description="URI of an encoded dataset to train on instead of the one that `prepare` makes."
    )
    num_steps: int = Field(ge=1, description="Optimizer steps.")
    global_batch_size: int = Field(default=64, ge=1)
    micro_batch_size: int = Field(default=32, ge=1, description="Samples a process takes through the UNet at once.")
    num_processes: int = Field(default=1, ge=1, le=64, description="Processes on this machine.")
    learning_rate: float = Field(default=5e-5, gt=0)
    warmup_steps: int = Field(default=2500, ge=0, description="Linear, then constant.")
    weight_decay: float = Field(default=0.01, ge=0)
    gradient_clipping: float = Field(default=1.0, ge=0, description="Norm; 0 turns it off.")
    text_dropout: float = Field(
        default=0.1, ge=0, le=1, description="Captions replaced by the empty one, drawn at train time."
    )
    full_mask: float = Field(default=0.25, ge=0, le=1, description="Masks replaced by all ones, drawn at train time.")
    ema_decay: float = Field(default=0.9999, ge=0, lt=1, description="With the warm-up min(decay, (1 + n) / (10 + n)).")
    zero_stage: int = Field(default=1, ge=0, le=2)
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint_every_steps: int = Field(default=1000, ge=1)
    keep_checkpoints: int = Field(
        default=3, ge=1, description="Newest checkpoints kept for resuming.", json_schema_extra=NOT_IN_DIGEST
    )
    stall_timeout_s: float = Field(default=1800, gt=0, json_schema_extra=NOT_IN_DIGEST)

    @model_validator(mode="after")
    def _batch_divides(self) -> "TrainConfig":
        share = self.micro_batch_size * self.num_processes
        if self.global_batch_size % share:
            raise ValueError(
                f"train.global_batch_size: {self.global_batch_size} is not a multiple of micro_batch_size × "
                f"num_processes = {self.micro_batch_size} × {self.num_processes} = {share}; change one of the three"
            )
        return self

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro batches a process takes before each optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.num_processes)


class ValidationConfig(Config):
    """Inpainting of held-out pictures from the EMA weights."""

    seed: int = Field(default=0, ge=0)
    mask_families: tuple[MaskFamily, ...] = Field(
        default=("lama_thin_512", "lama_medium_512", "lama_thick_512"), min_length=1
    )
    num_samples: int = Field(default=64, ge=1, description="Held-out pictures per mask family.")
    num_object_samples: int = Field(
        default=0, ge=0, description="Demo world only: pictures with one whole object hidden, for prompt-following."
    )
    num_inference_steps: int = Field(default=50, ge=1, le=1000)
    guidance_scale: float = Field(default=7.5, ge=1)
    batch_size: int = Field(default=32, ge=1)
    num_grid_rows: int = Field(default=8, ge=1, le=64)


class PublishConfig(Config):
    """What is published, and when a channel moves."""

    channels: tuple[Literal["latest", "best", "stable"], ...] = ("latest", "best", "stable")
    best_metric: Literal["masked_psnr_db", "masked_ssim", "image_text_similarity", "object_agreement"] = Field(
        default="masked_psnr_db", description="Of the report's `summary`; higher is better."
    )
    stable_min: dict[str, float] = Field(
        default_factory=dict,
        description="`stable` moves only if each named metric of the report's `summary` is at least this.",
    )
