"""The frozen encoders: pictures to latents and back (VAE), captions to embeddings (OpenCLIP).

A picture's posterior is kept as *moments*, mean | logvar, unscaled. `sample_latents` is the only place where the
scaling factor is applied, and it is applied once.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own convention
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from jaxtyping import Float, Float16, Int, Shaped, UInt8
from safetensors.torch import load_file
from torch import Tensor, nn

from model.fixed_shape import is_exact, map_micro_batches, text_micro_batch, vae_micro_batch

NULL_CAPTION: Final = ""
"""The caption of unconditional samples: an empty string, encoded, never zeros."""

NUM_TOKENS: Final = 77
PAD_TOKEN_ID: Final = 0
LOGVAR_RANGE: Final = (-30.0, 20.0)

CLIP_CONFIG_NAME: Final = "open_clip_config.json"
CLIP_WEIGHTS_NAME: Final = "open_clip_model.safetensors"
_CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)
_AWKWARD_CAPTIONS: Final = (NULL_CAPTION, "A  CAF\u00c3\u00a9 &amp;amp; 12 \U0001f600", "It's\nlong, " * 40)
_EMBEDDING_KEY: Final = "token_embedding.weight"
_IDS_KEY: Final = "token_embedding.ids"
_ROWS_KEY: Final = "token_embedding.rows"


# ----------------------------------------------------------------------------------------------------------------- VAE


def load_vae(
    directory: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> AutoencoderKL:
    """Reads a diffusers AutoencoderKL from a local folder; never asks a hub.

    Args:
        directory: holds `config.json` and `diffusion_pytorch_model.safetensors`.
        device: where to put it.
        dtype: of the parameters in memory, whatever the file's.

    Returns:
        the VAE, frozen, in eval mode.

    Raises:
        ValueError: the folder or its config is missing.
    """
    if not (Path(directory) / "config.json").is_file():
        raise ValueError(f"no VAE in {directory}: it must hold config.json and diffusion_pytorch_model.safetensors")
    vae = AutoencoderKL.from_pretrained(str(directory), local_files_only=True, use_safetensors=True, torch_dtype=dtype)
    assert isinstance(vae, AutoencoderKL)
    vae.requires_grad_(False)
    nn.Module.to(vae, device)  # diffusers' own `to` is typed wrongly
    return vae.eval()


def images_to_pixels(
    images: UInt8[Tensor, "batch height width 3"] | UInt8[np.ndarray, "batch height width 3"],
) -> Float[Tensor, "batch 3 height width"]:
    """8-bit RGB pictures, channels last, to float32 pixels in [-1, 1], channels first."""
    tensor = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    return tensor.permute(0, 3, 1, 2).float() / 127.5 - 1


def pixels_to_images(pixels: Float[Tensor, "batch 3 height width"]) -> UInt8[Tensor, "batch height width 3"]:
    """The inverse of `images_to_pixels`; values outside [-1, 1] are clipped."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@torch.no_grad()
def encode_moments(
    vae: AutoencoderKL, pixels: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch channels2 h w"]:
    """The VAE's posterior: mean | logvar along the channels, unscaled.

    Args:
        vae: from `load_vae`.
        pixels: in [-1, 1]; moved to the VAE's device and dtype.

    Returns:
        float32 moments (8 channels for 4 latent ones), logvar clamped to [-30, 20] so that it survives float16.

    Source: CompVis `ldm/modules/distributions/distributions.py`.
    """
    posterior = vae.encode(pixels.to(device=vae.device, dtype=vae.dtype), return_dict=False)[0]
    mean, logvar = posterior.parameters.float().chunk(2, dim=1)
    return torch.cat([mean, logvar.clamp(*LOGVAR_RANGE)], dim=1)


def masked_pixels(
    pixels: Float[Tensor, "batch 3 height width"], masks: Float[Tensor, "batch 1 height width"]
) -> Float[Tensor, "batch 3 height width"]:
    """The pictures with their holes: 0, which is grey, where the mask is 1.

    The sum turns -0 into 0: a hole has no sign, and a picture that is all hole is `torch.zeros`, bit for bit.
    """
    return pixels * (1 - masks) + 0.0


def encode_stored_moments(
    vae: AutoencoderKL,
    pixels: Float[Tensor, "batch 3 height width"],
    masks: Shaped[Tensor, "rows *one height width"] | None = None,
    *,
    batch_size: int | None = None,
    num_lanes: int | None = None,
) -> Float16[Tensor, "rows channels2 h w"]:
    """The moments as datasets store them, of the pictures or of the pictures with holes.

    In the fixed shape of `model.fixed_shape`: a picture's moments are the same bytes in every batch, at every place and
    with any number of threads, on one kind of machine; so what is encoded while training equals what was stored.

    Args:
        vae: from `load_vae`; its weights are put into the channels_last layout, which changes no value.
        pixels: in [-1, 1].
        masks: 1 = hole, any dtype, with or without a channel of 1; None for no holes. Where there are more masks than
            pictures, the pictures take turns: all of them with their first mask, then with their second one.
        batch_size: pictures at once where the shape is not fixed, which is in less than float32 on a GPU.
        num_lanes: see `model.fixed_shape.map_micro_batches`.

    Returns:
        float16 on the VAE's device, a row for each mask. What float16 cannot hold is infinite: who stores it looks.
    """
    _use_channels_last(vae)
    pixels = pixels.to(vae.device)
    holes = None if masks is None else masks.to(vae.device).reshape(len(masks), 1, *pixels.shape[2:])

    def run(rows: Int[Tensor, " rows"]) -> Tensor:
        rows = rows.to(vae.device)
        part = pixels[rows % len(pixels)]
        if holes is not None:
            part = masked_pixels(part, holes[rows].to(part.dtype))
        return encode_moments(vae, part.contiguous(memory_format=torch.channels_last)).half()

    num_rows = len(pixels if masks is None else masks)
    is_fixed = is_exact(vae.device, vae.dtype)
    micro_batch = vae_micro_batch(pixels.shape[-1], vae.device) if is_fixed else min(batch_size or 32, num_rows)
    return map_micro_batches(run, num_rows, micro_batch=micro_batch, device=vae.device, num_lanes=num_lanes)


def encode_stored_text(
    text: "TextEncoder",
    token_ids: Int[Tensor, "batch 77"],
    *,
    batch_size: int | None = None,
    num_lanes: int | None = None,
) -> Float16[Tensor, "batch 77 width"]:
    """The text embeddings as datasets store them; everything else as in `encode_stored_moments`."""

    def run(rows: Int[Tensor, " rows"]) -> Tensor:
        return text.embed_text(token_ids[rows.to(token_ids.device)]).half()

    is_fixed = is_exact(text.device, text.dtype)
    micro_batch = text_micro_batch(text.device) if is_fixed else min(batch_size or 64, len(token_ids))
    return map_micro_batches(run, len(token_ids), micro_batch=micro_batch, device=text.device, num_lanes=num_lanes)


def _use_channels_last(vae: AutoencoderKL) -> None:
    """Half as fast again on a CPU, and what a GPU's convolutions want; the last bits depend on it."""
    first = vae.encoder.conv_in.weight
    if not first.is_contiguous(memory_format=torch.channels_last):
        nn.Module.to(vae, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # typed without it


def sample_latents(
    moments: Float[Tensor, "batch channels2 h w"], noise: Float[Tensor, "batch channels h w"], scaling_factor: float
) -> Float[Tensor, "batch channels h w"]:
    """Latents (mean + exp(½ logvar) · noise) × scaling_factor: a draw from the posterior.

    Args:
        moments: from `encode_moments`, in any float precision; logvar is clamped to [-30, 20].
        noise: standard normal, float32.
        scaling_factor: the VAE's.

    Returns:
        latents in the noise's dtype.
    """
    mean, logvar = moments.to(noise.dtype).chunk(2, dim=1)
    return (mean + torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE)) * noise) * scaling_factor


def mean_latents(
    moments: Float[Tensor, "batch channels2 h w"], scaling_factor: float
) -> Float[Tensor, "batch channels h w"]:
    """The posterior's mean × scaling_factor, float32: latents without the draw."""
    return moments.float().chunk(2, dim=1)[0] * scaling_factor


@torch.no_grad()
def decode_latents(
    vae: AutoencoderKL, latents: Float[Tensor, "batch channels h w"], scaling_factor: float
) -> Float[Tensor, "batch 3 height width"]:
    """Pixels, float32, about [-1, 1] but not clipped, from scaled latents."""
    unscaled = (latents / scaling_factor).to(device=vae.device, dtype=vae.dtype)
    return vae.decode(unscaled, return_dict=False)[0].float()  # pyright: ignore[reportArgumentType]  # typed FloatTensor


# ---------------------------------------------------------------------------------------------------------------- text


@final
class TextEncoder:
    """An OpenCLIP model, frozen: captions to cross-attention embeddings, and pictures beside captions.

    Attributes:
        clip: the `open_clip.model.CLIP`; `clip.visual` is an identity without the image tower.
        model_cfg: what open_clip builds it from.
        width: channels of `embed_text`.
        image_size: side of the image tower's input, in pixels; 0 without it.
        compares: whether `embed_caption` and `embed_image` work: not without the image tower, nor without the last
            block and the projection, which text encoders out of Stable Diffusion's own files lack.
    """

    def __init__(
        self,
        clip: nn.Module,
        model_cfg: Mapping[str, Any],
        *,
        has_image_tower: bool = True,
        mean: Sequence[float] = _CLIP_MEAN,
        std: Sequence[float] = _CLIP_STD,
    ):
        from open_clip.tokenizer import SimpleTokenizer  # here, not above: it costs seconds, which a trainer saves

        self.clip: Any = clip.float().eval().requires_grad_(False)
        self.model_cfg = dict(model_cfg)
        num_blocks = len(self.clip.transformer.resblocks)
        if num_blocks < 2:
            raise ValueError(f"the text tower has {num_blocks} layers: a penultimate one needs at least 2")
        if self.clip.context_length != NUM_TOKENS:
            raise ValueError(f"the text tower reads {self.clip.context_length} tokens: it must read {NUM_TOKENS}")
        self.width: int = self.clip.token_embedding.weight.shape[1]
        self.image_size = int(self.model_cfg["vision_cfg"]["image_size"]) if has_image_tower else 0
        is_whole = not isinstance(self.clip.transformer.resblocks[-1], nn.Identity)
        self._embeds_captions = is_whole and self.clip.text_projection is not None
        self.compares = bool(self.image_size) and self._embeds_captions
        self._mean, self._std = tuple(mean), tuple(std)
        self._tokenizer = SimpleTokenizer(context_length=NUM_TOKENS)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.clip.token_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights: float32, unless `to` was told otherwise."""
        return self.clip.token_embedding.weight.dtype

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "TextEncoder":
        """Moves the weights, and casts them where a dtype is given; returns self."""
        self.clip.to(device, dtype)
        return self

    def tokenize(self, captions: Sequence[str]) -> Int[Tensor, "batch 77"]:
        """Token ids on the CPU: start, byte pairs, end, then zeros; a long caption is cut so that the end stays last.

        The caption is cleaned as open_clip does it (mojibake and HTML entities mended, lower case, single spaces).

        Raises:
            ValueError: a single string, which would be read as one caption per letter.
        """
        if isinstance(captions, str):
            raise ValueError("captions is a string: pass a list of them")
        return self._tokenizer(list(captions))

    def vocabulary(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """The tokenizer's words with their ids, and its merges in order of rank: all that another tokenizer needs."""
        ranks = self._tokenizer.bpe_ranks
        merges = [(left, right) for left, right in sorted(ranks, key=ranks.__getitem__)]
        return dict(self._tokenizer.encoder), merges

    @functools.cached_property
    def tokenizer_sha256(self) -> str:
        """What makes two tokenizers the same: words, merges, and the ids of captions that want some mending."""
        facts = [*self.vocabulary(), self.tokenize(_AWKWARD_CAPTIONS).tolist()]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @torch.no_grad()
    def embed_text(self, token_ids: Int[Tensor, "batch 77"]) -> Float[Tensor, "batch 77 width"]:
        """Hidden states of every position after the last block but one, then the final layer norm.

        Args:
            token_ids: from `tokenize`; moved to the weights' device.

        Returns:
            float32, all 77 positions, no pooling and no projection: the UNet's cross-attention reads these.

        Source: Stability-AI/stablediffusion `ldm/modules/encoders/modules.py`, `FrozenOpenCLIPEmbedder`.
        """
        hidden = self.clip.token_embedding(token_ids.to(self.device)) + self.clip.positional_embedding
        penultimate = len(self.clip.transformer.resblocks) - 2
        _, (hidden,) = self.clip.transformer.forward_intermediates(
            hidden, attn_mask=self.clip.attn_mask, indices=[penultimate], stop_early=True
        )
        return self.clip.ln_final(hidden).float()

    def embed_captions(self, captions: Sequence[str]) -> Float[Tensor, "batch 77 width"]:
        """`embed_text` of `tokenize`."""
        return self.embed_text(self.tokenize(captions))

    @torch.no_grad()
    def embed_caption(self, captions: Sequence[str]) -> Float[Tensor, "batch features"]:
        """One unit vector per caption, in the space that it shares with pictures.

        Raises:
            ValueError: the weights came without the last block or the projection.
        """
        if not self._embeds_captions:
            raise ValueError(
                "this TextEncoder came without its last block and projection, as out of a Stable Diffusion file: "
                "captions cannot be compared with pictures; use open_clip's own weights"
            )
        return self.clip.encode_text(self.tokenize(captions).to(self.device), normalize=True)

    @torch.no_grad()
    def embed_image(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        """One unit vector per picture.

        Args:
            pixels: RGB in [0, 1]. The shorter side is resized (bicubic, antialiased) and the center square is taken.

        Returns:
            float32 features; their product with `embed_caption`'s is the cosine similarity.

        Raises:
            ValueError: the image tower was not loaded, or the weights came without it.
        """
        if not self.image_size:
            raise ValueError(
                "this TextEncoder has no image tower: load it with load_image_tower=True, from open_clip's own weights"
            )
        pixels = _center_square(pixels.to(self.device).float(), self.image_size)
        mean, std = (torch.tensor(x, device=self.device).reshape(1, 3, 1, 1) for x in (self._mean, self._std))
        return self.clip.encode_image((pixels - mean) / std, normalize=True)


def load_text_encoder(
    directory: Path | str, *, load_image_tower: bool = True, device: torch.device | str = "cpu"
) -> TextEncoder:
    """Reads an OpenCLIP model from a local folder; never asks a hub.

    Args:
        directory: holds `open_clip_config.json` ({"model_cfg": …, "preprocess_cfg": … if not CLIP's}) and
            `open_clip_model.safetensors`, whose vocabulary may be compact (see `compact_vocabulary`). Weights out of a
            Stable Diffusion file may lack the image tower, and then also the last block with `text_projection` and
            `logit_scale`, all of them or none; conditioning reads none of these, and `compares` is false.
        load_image_tower: without it only the text tower is built, which is all that encoding a dataset needs.
        device: where to put it.

    Returns:
        the encoder: float32, eval mode, frozen. Weights that are float32 in the file are mapped, not copied.

    Raises:
        ValueError: a file is missing, the text tower is not open_clip's own, or the weights do not fit the config.
    """
    config_path, weights_path = Path(directory) / CLIP_CONFIG_NAME, Path(directory) / CLIP_WEIGHTS_NAME
    if not config_path.is_file() or not weights_path.is_file():
        raise ValueError(f"no text encoder in {directory}: it must hold {CLIP_CONFIG_NAME} and {CLIP_WEIGHTS_NAME}")
    config = json.loads(config_path.read_text(encoding="utf-8"))
    model_cfg, preprocess_cfg = config["model_cfg"], config.get("preprocess_cfg", {})
    state_dict = load_file(weights_path)
    has_image_tower = load_image_tower and any(key.startswith("visual.") for key in state_dict)
    clip = _build_clip(model_cfg, with_image_tower=has_image_tower)
    state_dict = expand_vocabulary(state_dict, clip.vocab_size)
    if not has_image_tower:
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith("visual.")}
    _drop_unused(clip, state_dict)
    try:
        clip.load_state_dict(state_dict, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{weights_path} does not fit {config_path}: {error}") from error
    encoder = TextEncoder(
        clip,
        model_cfg,
        has_image_tower=has_image_tower,
        mean=preprocess_cfg.get("mean", _CLIP_MEAN),
        std=preprocess_cfg.get("std", _CLIP_STD),
    )
    return encoder.to(device)


def _drop_unused(clip: Any, state_dict: Mapping[str, Tensor]) -> None:
    """Takes out of the model what a text tower for conditioning may lack, if the weights lack all of it."""
    last = len(clip.transformer.resblocks) - 1
    beginnings = (f"transformer.resblocks.{last}.", "text_projection", "logit_scale", "visual.")
    if any(key.startswith(beginnings) for key in state_dict):
        return  # whole, or damaged: then loading says what is missing
    clip.transformer.resblocks[last] = nn.Identity()
    clip.text_projection = clip.logit_scale = None


def compact_vocabulary(state_dict: Mapping[str, Tensor], used_ids: Iterable[int]) -> dict[str, Tensor]:
    """Keeps only the token embeddings that were trained: most of a tiny CLIP's bytes are rows that nothing ever read.

    Args:
        state_dict: holds `token_embedding.weight`, [vocab, width].
        used_ids: token ids whose rows are kept.

    Returns:
        a copy with `token_embedding.ids` (int32 [n], sorted) and `token_embedding.rows` (float16 [n + 1, width])
        instead; the last row stands for every other token and is the mean of theirs.
    """
    weight = state_dict[_EMBEDDING_KEY]
    ids = torch.tensor(sorted(set(used_ids)), dtype=torch.int64)
    is_used = torch.zeros(len(weight), dtype=torch.bool)
    is_used[ids] = True
    others = weight[~is_used].float()
    rest = others.mean(dim=0, keepdim=True) if len(others) else torch.zeros(1, weight.shape[1])
    compact = {key: value for key, value in state_dict.items() if key != _EMBEDDING_KEY}
    return compact | {_IDS_KEY: ids.to(torch.int32), _ROWS_KEY: torch.cat([weight[ids].float(), rest]).half()}


def expand_vocabulary(state_dict: Mapping[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """The inverse of `compact_vocabulary`; a state dict that is not compact comes back as it is.

    Args:
        state_dict: with `token_embedding.ids` and `token_embedding.rows`, or with `token_embedding.weight`.
        vocab_size: rows of the full table.

    Raises:
        ValueError: an id lies outside the vocabulary, or the numbers of ids and rows disagree.
    """
    full = dict(state_dict)
    if _IDS_KEY not in full:
        return full
    ids, rows = full.pop(_IDS_KEY).long(), full.pop(_ROWS_KEY)
    if len(rows) != len(ids) + 1:
        raise ValueError(f"{_ROWS_KEY} has {len(rows)} rows for {len(ids)} ids: it must have one more than ids")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"{_IDS_KEY} reaches from {ids.min()} to {ids.max()}: the vocabulary has {vocab_size} tokens")
    weight = rows[-1:].repeat(vocab_size, 1)
    weight[ids] = rows[:-1]
    return full | {_EMBEDDING_KEY: weight}


def _build_clip(model_cfg: Mapping[str, Any], *, with_image_tower: bool) -> Any:
    """An `open_clip.model.CLIP` whose parameters are still on no device; an identity takes a missing tower's place."""
    from accelerate import init_empty_weights
    from open_clip.model import CLIP

    config = {key: value for key, value in model_cfg.items() if key != "custom_text"}
    if "hf_model_name" in config["text_cfg"] or model_cfg.get("custom_text"):
        raise ValueError("model_cfg asks for a custom text tower: only open_clip's own CLIP class is supported")
    if not with_image_tower:  # CLIP insists on building one: let it be the smallest, and drop it
        config["vision_cfg"] = {"image_size": 8, "patch_size": 8, "layers": 1, "width": 64, "head_width": 64}
    with init_empty_weights(include_buffers=False):  # nothing is drawn that the weights would replace
        clip = CLIP(**config)
    if not with_image_tower:
        clip.visual = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]  # deliberately nothing
    return clip


def _center_square(pixels: Float[Tensor, "batch 3 height width"], side: int) -> Float[Tensor, "batch 3 side side"]:
    """CLIP's preprocessing: the shorter side to `side`, then the center square."""
    height, width = pixels.shape[-2:]
    scale = side / min(height, width)
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    if size != (height, width):
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return pixels[..., top : top + side, left : left + side]
