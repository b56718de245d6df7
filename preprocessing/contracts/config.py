"""What a user may say about the stages that prepare a dataset. No torch, no pyarrow: the flows import this at start-up.

Every field that changes a stage's result enters that stage's digest; fields that only change how fast it runs are
marked ``NOT_IN_DIGEST`` and do not.
"""

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from model.base_files import local_files
from model.specs import MASK_FAMILIES, USER_FAMILY, LatentSpec, TextSpec
from preprocessing.contracts.bases import (
    CACHE_VARIABLE,
    TINY,
    BaseSource,
    cache_folder,
    find_converted,
    is_in_place,
    parse_base,
)

NOT_IN_DIGEST: dict[str, Any] = {"in_digest": False}
IN_DIGEST_IF_SET: dict[str, Any] = {"in_digest": "if set"}
"""For a field that came later, and whose default is what was done before: at its default, older results stay valid."""


class Config(BaseModel):
    """Frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def digest_fields(self) -> dict[str, Any]:
        """The fields that change the result, as JSON values."""
        kept = {name for name, field in type(self).model_fields.items() if self._is_in_digest(name, field)}
        return self.model_dump(mode="json", include=kept)

    def _is_in_digest(self, name: str, field: FieldInfo) -> bool:
        extra = field.json_schema_extra
        rule = extra.get("in_digest", True) if isinstance(extra, dict) else True
        return getattr(self, name) != field.default if rule == "if set" else bool(rule)


def known_mask_family(name: str) -> str:
    """The name of a mask family, if there is one of that name.

    Raises:
        ValueError: There is none; says which there are.
    """
    if name not in MASK_FAMILIES:
        raise ValueError(f"no mask family {name!r}; choose one of {', '.join(MASK_FAMILIES)}")
    return name


def _known_or_user_mask_family(name: str) -> str:
    return name if name == USER_FAMILY else known_mask_family(name)


MaskFamily = Annotated[str, AfterValidator(known_mask_family)]
MaskFamilyOrUser = Annotated[str, AfterValidator(_known_or_user_mask_family)]


class DemoWorldConfig(Config):
    """The embedded demo world: pictures of coloured shapes, served on loopback."""

    seed: int = Field(default=7, ge=0, description="Which world; the tiny models were trained on another one.")
    num_pictures: int = Field(
        default=4000, ge=50, le=1_000_000, description="Well-behaved pictures; awkward rows come on top."
    )
    port: int = Field(
        default=8763, ge=1024, le=65535, description="Loopback port. It is part of every URL, hence of every uid."
    )


class SubsetConfig(Config):
    """One of several named sources."""

    metadata: tuple[str, ...] = Field(
        min_length=1, description="Parquet or CSV files in LAION's columns: paths, globs, s3:// URIs."
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        description="Relative to the heaviest subset: of this one, weight / heaviest of the rows stay, by uid.",
    )

    @field_validator("metadata", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class SourceConfig(Config):
    """Where the metadata comes from."""

    metadata: tuple[str, ...] = Field(
        default=(),
        description="Parquet or CSV files in LAION's columns: paths, globs, s3:// URIs. Empty: the demo world.",
    )
    subsets: dict[str, SubsetConfig] = Field(
        default_factory=dict, description="Several sources by name, instead of `metadata`; rows carry the name."
    )
    dataset: str | None = Field(
        default=None, description="What the metadata is, such as relaion2B-en-research-safe; where paths do not say it."
    )
    acknowledge_withdrawn: bool = Field(
        default=False, description="Use a set that LAION withdrew all the same; the manifest records it."
    )
    demo: DemoWorldConfig = DemoWorldConfig()
    rows_per_shard: int = Field(default=512, ge=1, le=1_000_000, description="Rows of metadata in each shard.")

    @field_validator("metadata", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_way_to_name_files(self) -> "SourceConfig":
        if self.metadata and self.subsets:
            raise ValueError(f"subsets: {', '.join(self.subsets)} beside metadata; leave one of the two out")
        return self

    @property
    def is_demo(self) -> bool:
        """Whether the rows come from the embedded demo world."""
        return not self.metadata and not self.subsets

    @property
    def patterns(self) -> tuple[str, ...]:
        """All paths, globs and URIs."""
        return self.metadata + tuple(path for subset in self.subsets.values() for path in subset.metadata)


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
    languages: tuple[str, ...] = Field(
        default=(), description="Kept, as the LANGUAGE column spells them, in any case; empty keeps all."
    )
    min_caption_chars: int = Field(default=1, ge=0)
    max_caption_chars: int = Field(default=2000, ge=1)
    drop_boilerplate: bool = Field(
        default=False, description="Refuse captions that say nothing; preprocessing/captions.py lists which."
    )
    block_hosts: str | None = Field(
        default=None, description="A private file: a host a line; its subdomains are refused, too."
    )
    block_urls: str | None = Field(default=None, description="A private file: a URL a line.")
    block_hashes: str | None = Field(
        default=None, description="A private file: md5, sha256 or uid a line, in hexadecimal digits."
    )
    subsample: float = Field(
        default=1.0, gt=0, le=1, description="Share of rows, by their uid; a smaller one is a part of a larger one."
    )
    drop_duplicates: bool = Field(
        default=True, description="Of rows with one URL, keep the one with the smallest uid; of equal ones the first."
    )
    max_rows_per_host: int | None = Field(default=None, ge=1, description="The rows with the smallest uids stay.")
    max_rows: int | None = Field(default=None, ge=1, description="In all; the rows with the smallest uids stay.")
    rejects: Literal["all", "counts"] = Field(
        default="all", description="Write each refused row, or only count them by reason: several times faster."
    )
    validation_fraction: float = Field(
        default=0.02, ge=0, lt=1, description="Held out of training, chosen by a hash of the uid."
    )
    min_rows: int = Field(
        default=1,
        ge=0,
        description="Gate: fewer rows than this stop the pipeline (exit code 3).",
        json_schema_extra=NOT_IN_DIGEST,
    )

    @field_validator("languages", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


Network = Annotated[str, Field(description="An address range, such as 127.0.0.0/8 or 10.1.0.0/16.")]


class DownloadConfig(Config):
    """How pictures are fetched: by img2dataset with our own client, in a process group of its own."""

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
        description="Gate on downloaded / selected rows (exit code 3); below it the dataset is not complete.",
        json_schema_extra=NOT_IN_DIGEST,
    )
    min_shard_success_rate: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Gate on arrived / asked rows of each shard; one below it is not kept, and the run ends (code 3).",
        json_schema_extra=NOT_IN_DIGEST,
    )
    permanent_retry_days: float = Field(
        default=30,
        ge=0,
        le=3650,
        description="What is gone, refused or broken is not asked again by later datasets for so long; opt-outs never.",
        json_schema_extra=NOT_IN_DIGEST,
    )
    allow_ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = Field(
        default=(80, 443), description="Ports of public addresses; those in allow_networks may be asked on any."
    )
    allow_downgrade: bool = Field(default=False, description="Follow redirects from https to http.")
    max_body_bytes: int = Field(default=32_000_000, ge=1, description="Longer answers are refused.")
    max_header_bytes: int = Field(default=65_536, ge=1024, json_schema_extra=NOT_IN_DIGEST)
    max_redirects: int = Field(default=5, ge=0, le=20)
    max_bodies_bytes: int = Field(
        default=192 * 2**20,
        ge=2**20,
        json_schema_extra=NOT_IN_DIGEST,
        description="What all answers that are being read, or decoded, may take in one process.",
    )
    timeout_s: float = Field(
        default=10, gt=0, json_schema_extra=NOT_IN_DIGEST, description="To resolve, to connect, and for each silence."
    )
    deadline_s: float = Field(
        default=30, gt=0, json_schema_extra=NOT_IN_DIGEST, description="For a picture in all, redirects included."
    )
    min_rate_bytes_per_s: int = Field(
        default=1000, ge=0, json_schema_extra=NOT_IN_DIGEST, description="Slower answers are given up, after 5 s."
    )
    retries: int = Field(default=1, ge=0, le=10, json_schema_extra=NOT_IN_DIGEST)
    num_processes: int = Field(default=1, ge=1, le=256, json_schema_extra=NOT_IN_DIGEST)
    num_threads: int = Field(default=32, ge=1, le=1024, json_schema_extra=NOT_IN_DIGEST)
    distributor: Literal["multiprocessing", "pyspark", "ray"] = Field(
        default="multiprocessing",
        json_schema_extra=NOT_IN_DIGEST,
        description="img2dataset's; the last two need that package, and scratch on a disk that all machines share.",
    )
    max_connections_per_host: int = Field(
        default=8, ge=1, json_schema_extra=NOT_IN_DIGEST, description="At once, from one process."
    )
    host_delay_s: float = Field(
        default=0, ge=0, le=60, json_schema_extra=NOT_IN_DIGEST, description="Between two requests to one host."
    )
    max_retry_after_s: float = Field(
        default=30,
        ge=0,
        le=120,
        json_schema_extra=NOT_IN_DIGEST,
        description="A host that asks (429, 503) for a longer pause is left alone for the rest of the run.",
    )
    max_host_failures: int = Field(
        default=32,
        ge=0,
        json_schema_extra=NOT_IN_DIGEST,
        description="A host that fails this often in a row is left alone for the rest of the run; 0: never.",
    )
    dns_ttl_s: float = Field(
        default=3600, gt=0, json_schema_extra=NOT_IN_DIGEST, description="How long a resolved host is believed."
    )
    stall_timeout_s: float = Field(
        default=300, gt=0, json_schema_extra=NOT_IN_DIGEST, description="No new bytes for this long: stop and retry."
    )
    robots_txt: bool = Field(default=False, description="Ask each host's robots.txt first.")
    user_agent_token: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_-]+$",
        description="Named to servers, and matched in opt-out headers and robots.txt; 'Lacuna' where none is given.",
    )
    user_agent_contact: str | None = Field(
        default=None,
        pattern=r"^[!-'*-~]+$",
        json_schema_extra=NOT_IN_DIGEST,
        description="A web page or mail address where whoever is asked for pictures finds out who asks.",
    )

    @field_validator("allow_networks", mode="before")
    @classmethod
    def _networks(cls, value: object) -> object:
        values = (value,) if isinstance(value, str) else value
        if isinstance(values, (list, tuple)):
            for network in values:
                ipaddress.ip_network(network)
        return values


class RetentionConfig(Config):
    """What is kept of other people's pictures. Nothing in it changes a result."""

    keep_pictures: bool = Field(
        default=False,
        json_schema_extra=NOT_IN_DIGEST,
        description="Keep the downloaded pictures. Otherwise they are deleted once the dataset is encoded; encoding "
        "them in another way then downloads them again.",
    )
    keep_pictures_days: float = Field(
        default=0,
        ge=0,
        le=3650,
        json_schema_extra=NOT_IN_DIGEST,
        description="Delete them only so long after they were downloaded: by the first run that ends then.",
    )


class EncodeConfig(Config):
    """From pictures to training rows."""

    resolution_px: int = Field(default=512, ge=64, multiple_of=64)
    mask_family: MaskFamilyOrUser = Field(
        default="sd_512train_large", description="See model/masks.py; 'user' takes the masks in mask_files."
    )
    mask_files: tuple[str, ...] = Field(
        default=(),
        json_schema_extra=NOT_IN_DIGEST,  # what they hold is, by the stage
        description="Your own masks, bright = repaint: files, folders, globs. For mask_family 'user', and only for it.",
    )
    num_mask_variants: int = Field(
        default=4,
        ge=0,
        le=64,
        description="Masks a row; as many as epochs gives each epoch a fresh one. 0: masks are drawn while training.",
    )
    mask_seed: int = Field(default=0, ge=0)
    image: Literal["png", "jpeg", "none"] = Field(
        default="png",
        description="The crop, as it is kept. 'jpeg': what decodes from it is the crop, for the models as well.",
    )
    image_quality: int = Field(default=90, ge=1, le=100, description="Of image 'jpeg'.")
    moments: bool = Field(
        default=True, description="Store the crop's moments; without them training encodes the kept image."
    )
    text: Literal["embeddings", "token_ids", "both"] = Field(
        default="embeddings", description="77 x width fp16, or 77 token ids of which training makes them, or both."
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="Of the models while they encode; what they give is stored as fp16."
    )
    compile: bool = Field(default=False, description="torch.compile the models: other kernels, so other last bits.")
    batch_size: int = Field(
        default=32,
        ge=1,
        json_schema_extra=NOT_IN_DIGEST,
        description="Pictures at once, at most; halved where memory does not suffice. Changes no stored byte.",
    )
    num_threads: int | None = Field(
        default=None,
        ge=1,
        json_schema_extra=NOT_IN_DIGEST,
        description="Of each process; default: its share of the cores.",
    )
    num_processes: int | None = Field(
        default=None,
        ge=1,
        le=256,
        json_schema_extra=NOT_IN_DIGEST,
        description="Processes that share the shards; default: one a GPU, or one.",
    )

    @field_validator("mask_files", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _files_go_with_the_user_family(self) -> "EncodeConfig":
        if (self.mask_family == USER_FAMILY) != bool(self.mask_files):
            raise ValueError(
                f"mask_files: {len(self.mask_files)} given, and mask_family is {self.mask_family!r}; "
                f"mask_family {USER_FAMILY!r} needs files, and no other takes any"
            )
        return self

    @model_validator(mode="after")
    def _latents_can_be_had(self) -> "EncodeConfig":
        if self.image == "none" and not self.moments:
            raise ValueError("moments: false, and image is 'none'; keep the moments, or the picture they are made of")
        if self.image == "none" and self.num_mask_variants == 0:
            raise ValueError(
                "num_mask_variants: 0, and image is 'none'; store masks, or the picture on which training draws them"
            )
        return self

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Which of ``text_embeddings`` and ``token_ids`` are stored."""
        return {"embeddings": ("text_embeddings",), "token_ids": ("token_ids",)}.get(
            self.text, ("text_embeddings", "token_ids")
        )

    def tensor_columns(self, latents: LatentSpec, text: TextSpec) -> dict[str, int]:
        """The fixed-width columns that are stored, in their order, with the bytes of one value."""
        text_num_bytes = {"text_embeddings": text.embeddings_num_bytes, "token_ids": text.token_ids_num_bytes}
        columns = {"moments": latents.moments_num_bytes} if self.moments else {}
        columns |= {name: text_num_bytes[name] for name in self.text_columns}
        for k in range(self.num_mask_variants):
            columns |= {f"mask_{k}": latents.mask_num_bytes, f"masked_moments_{k}": latents.moments_num_bytes}
        return columns


class RefreshConfig(Config):
    """What a refresh looks at, and when it refuses what it made. Nothing in it changes a dataset."""

    max_lost_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Gate: where a larger share of the last dataset's rows is gone, that one stands (exit code 3).",
        json_schema_extra=NOT_IN_DIGEST,
    )
    min_success_rate: float = Field(
        default=0.0, ge=0, le=1, description="Gate on downloaded / selected rows.", json_schema_extra=NOT_IN_DIGEST
    )
    max_drift: float | None = Field(
        default=1.0,
        gt=0,
        description="Gate on the stability index (PSI) of each score against the last dataset: 0.25 is a clear shift; "
        "not asked below 100 rows. None: no gate.",
        json_schema_extra=NOT_IN_DIGEST,
    )
    recheck_days: float | None = Field(
        default=30,
        ge=0,
        description="Servers of pictures that we hold are asked once in so many days whether they have opted out; 0: "
        "all at each refresh; None: never.",
        json_schema_extra=NOT_IN_DIGEST,
    )
    forget_withdrawn: bool = Field(
        default=True,
        description="Rows of which URL and caption have both gone from the metadata are forgotten for good, in earlier "
        "datasets, too.",
        json_schema_extra=NOT_IN_DIGEST,
    )
    max_withdrawn_share: float = Field(
        default=0.02,
        ge=0,
        le=1,
        description="Where a larger share of the last dataset's rows has gone from the metadata, it is taken for "
        "incomplete: a warning, and none is forgotten until this allows it. One row may always go.",
        json_schema_extra=NOT_IN_DIGEST,
    )


class ModelConfig(Config):
    """The weights to start from, in any published form."""

    base: str = Field(
        default=TINY,
        description="'tiny' (shipped, for the demo world); a diffusers folder; a .safetensors or .ckpt file; or an "
        "s3:// or file:// URI of one.",
    )
    base_sha256: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="What the base must be: a file's sha256; of a folder what `lacuna plan` says once it is converted. "
        "Required for s3:// URIs.",
    )
    base_prediction_type: Literal["epsilon", "v_prediction"] = Field(
        description="What the base UNet predicts; no default on purpose."
    )

    @property
    def source(self) -> BaseSource:
        """What ``base`` names."""
        return parse_base(self.base, self.base_sha256)

    @property
    def directory(self) -> Path:
        """The folder that holds the weights as everything here reads them: see `model.base_weights`.

        Raises:
            ValueError: The base has not been converted yet; `preprocessing.base_weights.resolve_base` does it.
        """
        found = self.find_directory()
        if found is None:
            raise ValueError(
                f"model.base: {self.base!r} has not been converted on this machine; `lacuna run`, `prepare` and "
                f"`train` do it (into {cache_folder()}; ${CACHE_VARIABLE} changes that)"
            )
        return found

    def find_directory(self) -> Path | None:
        """As `directory`; None where the base has not been converted yet."""
        source = self.source
        if is_in_place(source):
            return source.path
        return find_converted(source)

    @model_validator(mode="after")
    def _exists(self) -> "ModelConfig":
        source = self.source
        if source.path is not None:
            local_files(source.path)
        return self
