"""What a user may say about the stages that prepare a dataset. No torch, no pyarrow: the flows import this at start-up.

Every field that changes a stage's result enters that stage's digest; fields that only change how fast it runs are
marked ``NOT_IN_DIGEST`` and do not.
"""

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from model.specs import MASK_FAMILIES

NOT_IN_DIGEST: dict[str, Any] = {"in_digest": False}


class Config(BaseModel):
    """Frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def digest_fields(self) -> dict[str, Any]:
        """The fields that change the result, as JSON values."""
        kept = {
            name
            for name, field in type(self).model_fields.items()
            if not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("in_digest") is False)
        }
        return self.model_dump(mode="json", include=kept)


def known_mask_family(name: str) -> str:
    """The name of a mask family, if there is one of that name.

    Raises:
        ValueError: There is none; says which there are.
    """
    if name not in MASK_FAMILIES:
        raise ValueError(f"no mask family {name!r}; choose one of {', '.join(MASK_FAMILIES)}")
    return name


MaskFamily = Annotated[str, AfterValidator(known_mask_family)]


class DemoWorldConfig(Config):
    """The embedded demo world: pictures of coloured shapes, served on loopback."""

    seed: int = Field(default=7, ge=0, description="Which world; the tiny models were trained on another one.")
    num_pictures: int = Field(
        default=4000, ge=50, le=1_000_000, description="Well-behaved pictures; awkward rows come on top."
    )
    port: int = Field(
        default=8763, ge=1024, le=65535, description="Loopback port. It is part of every URL, hence of every uid."
    )


class SourceConfig(Config):
    """Where the metadata comes from."""

    metadata: tuple[str, ...] = Field(
        default=(),
        description="Parquet or CSV files in LAION's columns: paths, globs, s3:// URIs. Empty: the demo world.",
    )
    demo: DemoWorldConfig = DemoWorldConfig()
    rows_per_shard: int = Field(default=512, ge=1, le=1_000_000, description="Rows of metadata in each shard.")

    @field_validator("metadata", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @property
    def is_demo(self) -> bool:
        """Whether the rows come from the embedded demo world."""
        return not self.metadata


class SelectConfig(Config):
    """Which rows are kept. Every refusal has a drop reason; a missing score is a refusal, never a pass."""

    max_punsafe: float = Field(
        default=0.1, gt=0, le=1, description="Rows with punsafe < this are kept, strictly; null and NaN are not."
    )
    max_pwatermark: float | None = Field(default=0.8, gt=0, le=1, description="Strictly below; None keeps all.")
    min_similarity: float | None = Field(default=None, ge=-1, le=1)
    min_aesthetic: float | None = Field(default=None, ge=0, le=10)
    min_side_px: int = Field(default=512, ge=1, description="Shorter side, by the metadata.")
    max_aspect: float = Field(default=3.0, ge=1, description="Longer side / shorter side, by the metadata.")
    min_caption_chars: int = Field(default=1, ge=0)
    max_caption_chars: int = Field(default=2000, ge=1)
    validation_fraction: float = Field(
        default=0.02, ge=0, lt=1, description="Held out of training, chosen by a hash of the uid."
    )
    min_rows: int = Field(
        default=1,
        ge=0,
        description="Gate: fewer rows than this stop the pipeline (exit code 3).",
        json_schema_extra=NOT_IN_DIGEST,
    )


Network = Annotated[str, Field(description="An address range, such as 127.0.0.0/8 or 10.1.0.0/16.")]


class DownloadConfig(Config):
    """How pictures are fetched (by img2dataset, in a process group of its own)."""

    allow_networks: tuple[Network, ...] = Field(
        default=(),
        description="Address ranges allowed although not public; loopback and private ones are refused otherwise.",
    )
    image_size_px: int = Field(
        default=512, ge=8, description="Pictures whose shorter side is larger are reduced to it."
    )
    encode_quality: int = Field(default=95, ge=1, le=100, description="JPEG quality of the stored pictures.")
    max_image_area_px: int = Field(default=64_000_000, ge=1, description="Larger pictures are refused.")
    min_image_side_px: int = Field(
        default=16, ge=1, description="Pictures with a shorter side are refused: placeholders."
    )
    max_aspect: float = Field(default=20.0, ge=1)
    min_success_rate: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Gate on downloaded / selected rows (exit code 3).",
        json_schema_extra=NOT_IN_DIGEST,
    )
    timeout_s: float = Field(default=10, gt=0, json_schema_extra=NOT_IN_DIGEST)
    retries: int = Field(default=1, ge=0, le=10, json_schema_extra=NOT_IN_DIGEST)
    num_processes: int = Field(default=1, ge=1, le=256, json_schema_extra=NOT_IN_DIGEST)
    num_threads: int = Field(default=32, ge=1, le=1024, json_schema_extra=NOT_IN_DIGEST)
    stall_timeout_s: float = Field(
        default=300, gt=0, json_schema_extra=NOT_IN_DIGEST, description="No new bytes for this long: stop and retry."
    )
    user_agent_token: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9_-]+$", description="Named to servers and matched in opt-out headers."
    )

    @field_validator("allow_networks", mode="before")
    @classmethod
    def _networks(cls, value: object) -> object:
        values = (value,) if isinstance(value, str) else value
        if isinstance(values, (list, tuple)):
            for network in values:
                ipaddress.ip_network(network)
        return values


class EncodeConfig(Config):
    """From pictures to training rows."""

    resolution_px: int = Field(default=512, ge=64, multiple_of=64)
    mask_family: MaskFamily = Field(default="sd_512train_large", description="See model/masks.py.")
    num_mask_variants: int = Field(
        default=4, ge=1, le=64, description="Masks a row; as many as epochs gives each epoch a fresh one."
    )
    mask_seed: int = Field(default=0, ge=0)
    batch_size: int = Field(default=32, ge=1, json_schema_extra=NOT_IN_DIGEST)
    num_threads: int | None = Field(
        default=None, ge=1, json_schema_extra=NOT_IN_DIGEST, description="Default: all cores."
    )


class ModelConfig(Config):
    """The weights to start from: a folder with ``unet/``, ``vae/``, ``open_clip/``, ``scheduler/`` and ``LICENSE``."""

    base: str = Field(default="tiny", description="'tiny' (shipped, for the demo world) or a folder.")
    base_prediction_type: Literal["epsilon", "v_prediction"] = Field(
        description="What the base UNet predicts; no default on purpose."
    )

    @property
    def directory(self) -> Path:
        """The folder that holds the weights."""
        if self.base == "tiny":
            return Path(__file__).resolve().parents[2] / "model" / "tiny" / "weights"
        return Path(self.base).expanduser()

    @model_validator(mode="after")
    def _exists(self) -> "ModelConfig":
        missing = [
            name for name in ("unet", "vae", "open_clip") if not (self.directory / name / _MAIN_FILE[name]).is_file()
        ]
        if missing:
            raise ValueError(
                f"model.base: {self.base!r} has no {', '.join(f'{n}/{_MAIN_FILE[n]}' for n in missing)}; "
                "give a folder with unet/, vae/ and open_clip/, or 'tiny'"
            )
        return self


_MAIN_FILE = {"unet": "config.json", "vae": "config.json", "open_clip": "open_clip_config.json"}
