"""What a dataset promises about its tensors, and the published numbers of Stable Diffusion 2.

These records travel in manifests from the stage that wrote a tensor to the one that reads it, so they are plain:
no torch, only numbers and strings. Two sides that hold equal specs mean the same thing by the same bytes.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, Self, get_args

PredictionType = Literal["epsilon", "v_prediction"]
"""What the UNet's output means: the noise, or the velocity (Salimans & Ho 2022)."""

PREDICTION_TYPES: Final[tuple[str, ...]] = get_args(PredictionType)

TimestepSpacing = Literal["leading", "trailing"]
"""Which timesteps a sampler visits (Lin et al. 2023, table 2): see `model.sampler.timesteps_for`."""

MASK_FAMILIES: Final[tuple[str, ...]] = (
    "full",
    "lama_medium_256",
    "lama_medium_512",
    "lama_thick_256",
    "lama_thick_512",
    "lama_thin_256",
    "lama_thin_512",
    "lama_train_256",
    "sd_256narrow",
    "sd_256train",
    "sd_512train",
    "sd_512train_large",
)
"""The mask generators that `model.masks.draw_mask` knows."""

FULL_FAMILY: Final = "full"
"""All ones."""

USER_FAMILY: Final = "user"
"""Masks that the user gives, as files: no generator, and not among `MASK_FAMILIES`."""

LATENT_FACTOR: Final = 8
"""Pixels per latent cell, along one side, of every Stable Diffusion VAE."""

DTYPE_NUM_BYTES: Final[dict[str, int]] = {"float16": 2, "float32": 4}
"""Dtypes in which tensors are stored. bfloat16 is absent on purpose: 8 bits of mantissa cost 0.4 % on means."""

PRECISIONS: Final[tuple[str, ...]] = ("fp32", "bf16", "fp16")
"""In which the frozen models may compute."""

PIXEL_RANGE: Final = (-1.0, 1.0)
"""Of the VAE's input. The mistake of [0, 1] is a silent one: the latents still look like latents."""

CROP_RULE: Final = "bicubic_center"
"""The shorter side to the resolution, by PIL's bicubic, then the central square: `model.crop.central_square`."""

TEXT_LAYER: Final = "penultimate+ln_final"
"""The hidden states that Stable Diffusion 2 reads."""

SD2_SCALING_FACTOR: Final = 0.18215
"""Latents are posterior samples times this, so that they have about unit variance."""

SD2_UNET_CONFIG: Final[dict[str, Any]] = {
    "act_fn": "silu",
    "attention_head_dim": [5, 10, 20, 20],  # historical misnomer: the number of heads, 64 channels each
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 9,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "upcast_attention": False,
    "use_linear_projection": True,
}
"""diffusers' config of the 9-channel UNet (865.93 M parameters). The 4-channel base differs in `in_channels` only."""

SD2_VAE_CONFIG: Final[dict[str, Any]] = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "scaling_factor": SD2_SCALING_FACTOR,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
"""diffusers' config of the AutoencoderKL (83.65 M parameters)."""


class _Spec:
    """JSON for the frozen dataclasses below: exact keys, so that a spec of another version is refused, not guessed."""

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as a plain dict of JSON values."""
        return asdict(self)  # pyright: ignore[reportArgumentType]  # every subclass is a dataclass

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Builds the spec from what `to_json` gave.

        Raises:
            ValueError: a field is missing or unknown, or a value is out of range.
        """
        names = {field.name for field in fields(cls)}  # pyright: ignore[reportArgumentType]  # as above
        if set(data) != names:
            missing, unknown = sorted(names - set(data)), sorted(set(data) - names)
            raise ValueError(f"{cls.__name__}: missing fields {missing}, unknown fields {unknown}")
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class LatentSpec(_Spec):
    """The stored VAE moments: channels × 2 (mean | logvar), unscaled, little-endian, C order.

    Attributes:
        channels: latent channels (moments have twice as many).
        resolution_px: side of the square picture that was encoded.
        factor: pixels per latent cell, along one side.
        scaling_factor: what a posterior sample is multiplied by when latents are made; not applied to what is stored.
        pixel_range: what black and white are to the VAE.
        crop: how the square was cut: `bicubic_center` is `model.crop.central_square`.
        precision: in which the VAE computed: `fp32`, `bf16` or `fp16`.
        dtype: `float16` or `float32`.
        weights_sha256: `preprocessing.contracts.digests.weights_sha256` of the VAE's folder.
    """

    channels: int = 4
    resolution_px: int
    factor: int = 8
    scaling_factor: float
    pixel_range: tuple[float, float] = PIXEL_RANGE
    crop: str = CROP_RULE
    precision: str = "fp32"
    dtype: str = "float16"
    weights_sha256: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "pixel_range", tuple(self.pixel_range))  # JSON has lists only
        _check_dtype("LatentSpec", self.dtype)
        _check_known("LatentSpec", "precision", self.precision, PRECISIONS)
        _check_known("LatentSpec", "crop", self.crop, (CROP_RULE,))
        _check_known("LatentSpec", "pixel_range", self.pixel_range, (PIXEL_RANGE,))
        if self.factor < 1 or self.resolution_px < 1 or self.resolution_px % self.factor:
            raise ValueError(
                f"LatentSpec.resolution_px is {self.resolution_px}: make it a positive multiple of factor {self.factor}"
            )

    @property
    def latent_px(self) -> int:
        """Side of the latent grid, in cells."""
        return self.resolution_px // self.factor

    @property
    def moments_shape(self) -> tuple[int, int, int]:
        """(2 × channels, h, w)."""
        return (2 * self.channels, self.latent_px, self.latent_px)

    @property
    def moments_num_bytes(self) -> int:
        """Bytes of one sample's moments."""
        return 2 * self.channels * self.latent_px**2 * DTYPE_NUM_BYTES[self.dtype]

    @property
    def mask_num_bytes(self) -> int:
        """Bytes of one latent mask, a bit per cell, padded to whole bytes."""
        return (self.latent_px**2 + 7) // 8


@dataclass(frozen=True, kw_only=True)
class TextSpec(_Spec):
    """The stored text embeddings: num_tokens × width, little-endian, C order, no pooling and no projection.

    Attributes:
        num_tokens: all positions of the context; padding goes to cross-attention too.
        width: channels of the text tower.
        layer: which hidden states. `penultimate+ln_final`: without the last block, then the final layer norm.
        pad_token_id: what fills the context after the end token (0 in open_clip, not the end token).
        tokenizer_sha256: `model.encoders.TextEncoder.tokenizer_sha256`: over its vocabulary, its merges, and what it
            makes of some awkward captions; empty where nothing was tokenized.
        precision: in which the text tower computed: `fp32`, `bf16` or `fp16`.
        dtype: `float16` or `float32`.
        weights_sha256: `preprocessing.contracts.digests.weights_sha256` of the text encoder's folder.
    """

    num_tokens: int = 77
    width: int
    layer: str = TEXT_LAYER
    pad_token_id: int = 0
    tokenizer_sha256: str = ""
    precision: str = "fp32"
    dtype: str = "float16"
    weights_sha256: str

    def __post_init__(self) -> None:
        _check_dtype("TextSpec", self.dtype)
        _check_known("TextSpec", "precision", self.precision, PRECISIONS)
        _check_known("TextSpec", "layer", self.layer, (TEXT_LAYER,))
        _check_known("TextSpec", "pad_token_id", self.pad_token_id, (0,))
        _check_known("TextSpec", "num_tokens", self.num_tokens, (77,))

    @property
    def embeddings_shape(self) -> tuple[int, int]:
        """(num_tokens, width)."""
        return (self.num_tokens, self.width)

    @property
    def embeddings_num_bytes(self) -> int:
        """Bytes of one caption's embeddings."""
        return self.num_tokens * self.width * DTYPE_NUM_BYTES[self.dtype]

    @property
    def token_ids_num_bytes(self) -> int:
        """Bytes of one caption's token ids, uint16."""
        return self.num_tokens * 2


@dataclass(frozen=True, kw_only=True)
class MaskSpec(_Spec):
    """Which masks were drawn: mask k of a sample is `draw_mask(family, resolution_px, seed, uid, k, p_full=p_full)`.

    Attributes:
        family: one of `MASK_FAMILIES`, or `user`.
        resolution_px: side of the mask before it is taken to the latent grid.
        num_variants: masks per sample.
        seed: root of the randomness.
        p_full: probability of an all-ones mask. Datasets hold 0, because the trainer draws those anew at each visit;
            `sd_512train_large` with 0.25 is what Stable Diffusion's inpainting models were trained on.
        files_sha256: of the user's masks, sorted; empty for all other families.
    """

    family: str
    resolution_px: int
    num_variants: int
    seed: int
    p_full: float = 0.0
    files_sha256: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "files_sha256", tuple(self.files_sha256))  # JSON has lists only
        if self.family not in MASK_FAMILIES and self.family != USER_FAMILY:
            known = ", ".join((*MASK_FAMILIES, USER_FAMILY))
            raise ValueError(f"MaskSpec.family is {self.family!r}: choose one of {known}")
        if self.num_variants < 0:
            raise ValueError(f"MaskSpec.num_variants is {self.num_variants}: it cannot be negative")
        if not 0 <= self.p_full <= 1:
            raise ValueError(f"MaskSpec.p_full is {self.p_full}: a probability is in [0, 1]")
        if (self.family == USER_FAMILY) != bool(self.files_sha256):
            raise ValueError(
                f"MaskSpec.files_sha256 has {len(self.files_sha256)} entries, and family is {self.family!r}: "
                f"{USER_FAMILY!r} has one for each mask, the others have none"
            )


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec(_Spec):
    """The noise schedule; the defaults are Stable Diffusion's.

    Attributes:
        num_train_timesteps: number of noise levels.
        beta_start: first beta of the scaled-linear schedule.
        beta_end: last beta.
        zero_terminal_snr: rescale so that the last level is pure noise (Lin et al. 2023); then only
            `v_prediction` is defined at the last level, and sampling wants `trailing` timesteps.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_terminal_snr: bool = False

    @property
    def timestep_spacing(self) -> TimestepSpacing:
        """How to sample a model of this schedule: `trailing` visits the last timestep, `leading` does not."""
        return "trailing" if self.zero_terminal_snr else "leading"


def _check_dtype(owner: str, dtype: str) -> None:
    if dtype not in DTYPE_NUM_BYTES:
        raise ValueError(f"{owner}.dtype is {dtype!r}: choose one of {', '.join(DTYPE_NUM_BYTES)}")


def _check_known(owner: str, field: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        choices = " or ".join(map(repr, known))
        raise ValueError(f"{owner}.{field} is {value!r}: this version knows {choices}")
