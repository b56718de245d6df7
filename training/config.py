"""What a user may say about training, validation and publishing. No torch: the flows import this at start-up."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from model.specs import ScheduleSpec
from preprocessing.contracts.config import IN_DIGEST_IF_SET, NOT_IN_DIGEST, Config, MaskFamily


class LrScheduleConfig(Config):
    """The course of the learning rate, as factors of ``train.learning_rate``; `training.lr_schedule` computes it."""

    kind: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="After the warm-up; the last two fall to final_factor at the last step."
    )
    warmup_start_factor: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Factor of the first step, from which the warm-up rises to 1 (CompVis' f_start, 1e-6 in the first "
        "inpainting model); null: 1 / warmup_steps, so that the last step of the warm-up has the whole rate.",
    )
    final_factor: float = Field(default=0.0, ge=0, le=1, description="Factor at the end of cosine and linear.")


class TrainConfig(Config):
    """One training run of the 9-channel inpainting UNet."""

    prediction_type: Literal["epsilon", "v_prediction"] = Field(
        description="What the UNet learns to predict; no default on purpose."
    )
    zero_terminal_snr: bool = Field(
        default=False,
        description="Rescale the noise schedule so that its last timestep is pure noise (Lin et al. 2023). Stable "
        "Diffusion 2 did not; with v_prediction only; sampling then takes 'trailing' timesteps, which the exported "
        "scheduler says, and programs that read a single file do not know.",
        json_schema_extra=IN_DIGEST_IF_SET,
    )
    min_snr_gamma: float | None = Field(
        default=None,
        gt=0,
        description="Weigh the loss by min-SNR-gamma (Hang et al. 2023, with 5); null: every timestep alike, as Stable "
        "Diffusion 2. With v_prediction and 5 the mean weight is 0.29, and the noisiest timesteps, which decide what "
        "fills a big hole, get almost none: 0.005 at the last.",
        json_schema_extra=IN_DIGEST_IF_SET,
    )
    mask_source: Literal["cached", "online"] = Field(
        description="'cached': the K mask variants of the dataset, in turn. 'online': a fresh mask at each visit, and "
        "the VAE in every step, on the dataset's crops. No default on purpose."
    )
    mask_family: MaskFamily | None = Field(
        default=None,
        description="Masks of another family than the dataset's; with mask_source 'online' only.",
        json_schema_extra=IN_DIGEST_IF_SET,
    )
    text_source: Literal["embeddings", "token_ids"] = Field(
        default="embeddings",
        description="'embeddings': the dataset's. 'token_ids': the text tower in every step, on the dataset's token "
        "ids.",
        json_schema_extra=IN_DIGEST_IF_SET,
    )
    moments_source: Literal["cached", "online"] = Field(
        default="cached",
        description="'cached': the dataset's moments, of which latents are drawn. 'online': the VAE in every step, on "
        "the dataset's crops.",
        json_schema_extra=IN_DIGEST_IF_SET,
    )
    encoder_precision: Literal["fp32", "bf16", "fp16"] | None = Field(
        default=None,
        description="Of the frozen models where something is online; default: in which the dataset was encoded, so "
        "that online gives what is stored.",
        json_schema_extra=IN_DIGEST_IF_SET,
    )
    seed: int = Field(ge=0, description="Order, noise, timesteps, dropout; no default on purpose.")
    dataset: str | None = Field(
        default=None, description="URI of an encoded dataset to train on instead of the one that `prepare` makes."
    )
    datasets: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="Several encoded datasets of one store instead: URI → weight, relative to the others'. Of every "
        "10,000 samples each gives its share; each has epochs of its own. Held-out pictures are the first's.",
    )
    cache_bytes: int | None = Field(
        default=None,
        ge=1,
        description="How much of the local disk shards from S3 may take; default: four fifths of what is free.",
        json_schema_extra=NOT_IN_DIGEST,
    )
    num_steps: int = Field(ge=1, description="Optimizer steps.")
    global_batch_size: int = Field(default=64, ge=1)
    micro_batch_size: int = Field(
        default=32,
        ge=1,
        description="Samples a process takes through the UNet at once. May change when a run is resumed.",
        json_schema_extra=NOT_IN_DIGEST,
    )
    num_processes: int = Field(
        default=1,
        ge=1,
        le=4096,
        description="Processes, on all machines together; `lacuna train` starts all of them on this one. May change "
        "when a run is resumed: sums then differ in the last digits.",
        json_schema_extra=NOT_IN_DIGEST,
    )
    learning_rate: float = Field(default=5e-5, gt=0)
    warmup_steps: int = Field(default=2500, ge=0, description="Linear, then as lr_schedule says.")
    lr_schedule: LrScheduleConfig = Field(
        default=LrScheduleConfig(),
        description="After the warm-up: constant, as Stable Diffusion; or cosine or linear. A kind alone will do.",
        json_schema_extra=IN_DIGEST_IF_SET,
    )
    weight_decay: float = Field(default=0.01, ge=0)
    gradient_clipping: float = Field(default=1.0, ge=0, description="Norm; 0 turns it off.")
    text_dropout: float = Field(
        default=0.1, ge=0, le=1, description="Captions replaced by the empty one, drawn at train time."
    )
    full_mask: float = Field(default=0.25, ge=0, le=1, description="Masks replaced by all ones, drawn at train time.")
    ema_decay: float = Field(default=0.9999, ge=0, lt=1, description="With the warm-up min(decay, (1 + n) / (10 + n)).")
    ema_start_step: int = Field(
        default=0,
        ge=0,
        description="Until so many steps are taken the average is the weights themselves, and n counts from there; the "
        "base's own average, if it has one, is then not used.",
        json_schema_extra=IN_DIGEST_IF_SET,
    )
    zero_stage: int = Field(
        default=1,
        ge=0,
        le=3,
        description="What the processes divide among them: 0 nothing, 1 the optimizer's state, 2 the gradients, too. "
        "May change when a run is resumed.",
        json_schema_extra=NOT_IN_DIGEST,
    )
    optimizer_offload: Literal["none", "cpu"] = Field(
        default="none",
        description="'cpu': AdamW's state and its step are the CPU's; for a GPU too small for both, with zero_stage 1 "
        "or 2. May change when a run is resumed.",
        json_schema_extra=NOT_IN_DIGEST,
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32",
        description="Of the UNet's arithmetic; the parameters stay float32. 'fp16' scales the loss, as high as goes "
        "without overflow.",
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="Compute the UNet's activations twice instead of keeping them: a third more work, far less memory.",
        json_schema_extra=NOT_IN_DIGEST,
    )
    channels_last: bool = Field(
        default=False,
        description="Keep what the UNet's convolutions read as they like it on a GPU. The same sums, in another order.",
        json_schema_extra=NOT_IN_DIGEST,
    )
    attention: Literal["sdpa", "plain"] = Field(
        default="sdpa",
        description="'sdpa': torch's fused attention; 'plain': the formula, to compare with.",
        json_schema_extra=NOT_IN_DIGEST,
    )
    compile: Literal["off", "regional", "whole"] = Field(
        default="off",
        description="torch.compile the UNet's repeated blocks, or all of it; the first step then takes minutes. Needs "
        "a C++ compiler.",
        json_schema_extra=NOT_IN_DIGEST,
    )
    fused_optimizer: bool | None = Field(
        default=None,
        description="AdamW's step as one kernel; null: on a GPU.",
        json_schema_extra=NOT_IN_DIGEST,
    )
    checkpoint_every_steps: int = Field(default=1000, ge=1, json_schema_extra=NOT_IN_DIGEST)
    keep_last: int = Field(
        default=3, ge=1, description="Newest checkpoints that are kept.", json_schema_extra=NOT_IN_DIGEST
    )
    keep_every_steps: int | None = Field(
        default=None,
        ge=1,
        description="Checkpoints of steps that are a multiple of it are kept, too.",
        json_schema_extra=NOT_IN_DIGEST,
    )
    keep_best: int = Field(
        default=1,
        ge=0,
        description="So many of the best are kept, too, among those that have a validation report.",
        json_schema_extra=NOT_IN_DIGEST,
    )
    keep_best_metric: Literal["masked_psnr_db", "masked_ssim", "image_text_similarity", "object_agreement"] = Field(
        default="masked_psnr_db",
        description="Of the report's `summary`; higher is better.",
        json_schema_extra=NOT_IN_DIGEST,
    )
    walltime_s: float | None = Field(
        default=None,
        gt=0,
        description="Time that a call of the training may take, such as a cluster grants; near its end a checkpoint is "
        "written, and the exit code is 5. The same command goes on.",
        json_schema_extra=NOT_IN_DIGEST,
    )
    walltime_margin_s: float = Field(
        default=120,
        ge=0,
        description="How long before the end to stop, at least; more where steps and saves were seen to take longer.",
        json_schema_extra=NOT_IN_DIGEST,
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        default=("tensorboard",),
        description="Where curves are shown, beside metrics.jsonl, which is always written. Weights & Biases and "
        "MLflow find their server and account in the environment, as they do elsewhere.",
        json_schema_extra=NOT_IN_DIGEST,
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

    @field_validator("lr_schedule", mode="before")
    @classmethod
    def _kind_alone(cls, value: object) -> object:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _decay_fits(self) -> "TrainConfig":
        if self.lr_schedule.kind != "constant" and self.warmup_steps >= self.num_steps:
            raise ValueError(
                f"train.lr_schedule: {self.lr_schedule.kind} falls from step warmup_steps = {self.warmup_steps} to "
                f"step num_steps = {self.num_steps}; make warmup_steps smaller"
            )
        return self

    @model_validator(mode="after")
    def _zero_fits(self) -> "TrainConfig":
        if self.zero_stage == 3:
            raise ValueError(
                "train.zero_stage: 3 divides the parameters themselves, and the moving average of every step reads "
                "them whole; set it to 2, and where memory is short train.optimizer_offload to 'cpu'"
            )
        if self.zero_stage == 0 and self.optimizer_offload != "none":
            raise ValueError(
                f"train.optimizer_offload: {self.optimizer_offload!r} goes with train.zero_stage 1 or 2, not with 0"
            )
        if self.precision == "fp16" and self.optimizer_offload != "none":
            raise ValueError(
                "train.precision: 'fp16' does not go with train.optimizer_offload, which clips by norms of the scaled "
                "gradients; set train.precision to 'bf16' or train.optimizer_offload to 'none'"
            )
        return self

    @model_validator(mode="after")
    def _margin_fits(self) -> "TrainConfig":
        if self.walltime_s is not None and self.walltime_margin_s >= self.walltime_s:
            raise ValueError(
                f"train.walltime_margin_s: {self.walltime_margin_s:g} leaves nothing of walltime_s = "
                f"{self.walltime_s:g}; make it smaller"
            )
        return self

    @model_validator(mode="after")
    def _one_way_to_name_datasets(self) -> "TrainConfig":
        if self.dataset is not None and self.datasets:
            raise ValueError(
                f"train.datasets: {', '.join(self.datasets)} beside train.dataset {self.dataset}; "
                "leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _has_signal(self) -> "TrainConfig":
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "train.zero_terminal_snr: true does not go with prediction_type 'epsilon', which says nothing of the "
                "picture at a timestep without signal; set train.prediction_type to 'v_prediction', or this to false"
            )
        return self

    @model_validator(mode="after")
    def _masks_are_drawn(self) -> "TrainConfig":
        if self.mask_family is not None and self.mask_source == "cached":
            raise ValueError(
                f"train.mask_family: {self.mask_family!r}, but mask_source is 'cached', and the masks are the "
                "dataset's; set train.mask_source to 'online', or leave this out"
            )
        return self

    @property
    def names_datasets(self) -> bool:
        """Whether it says on which datasets to train, instead of on what `prepare` makes."""
        return self.dataset is not None or bool(self.datasets)

    @property
    def schedule(self) -> ScheduleSpec:
        """The noise schedule: Stable Diffusion's, with a zero terminal SNR if so configured."""
        return ScheduleSpec(zero_terminal_snr=self.zero_terminal_snr)

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
    num_inference_steps: int = Field(default=50, ge=1, le=999)
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
    single_file: bool = Field(
        default=True,
        description="Beside diffusers/, all weights in one .safetensors with CompVis' keys, and its .yaml.",
    )
    dtype: Literal["float32", "float16"] = Field(
        default="float32", description="Of the weights in the files; float16 halves them."
    )
    keep_exports: int | None = Field(
        default=None,
        ge=1,
        description="Keep so many of the exports of this recipe's runs, the last published. What a channel points to, "
        "or pointed to before, and what somebody reads, is never deleted. Unset: all stay.",
    )
    base_model: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$",
        description="For the model card: the base's name on the Hugging Face hub, stabilityai/stable-diffusion-2-base.",
    )
