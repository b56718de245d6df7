"""Names of weights in single files: diffusers', open_clip's and transformers' keys ↔ CompVis' keys, both ways.

A single file is one flat state dict: `model.diffusion_model.` UNet, `first_stage_model.` VAE, `cond_stage_model.model.`
text tower in open_clip's own names. All functions are strict and copy nothing that they need not: values may be mapped
files or meta tensors.

Only two tensors are more than renamed: the matrices of the VAE's mid-block attention are (C, C) in diffusers and
1 × 1 convolutions, (C, C, 1, 1), in CompVis; and open_clip keeps query, key and value in one matrix, transformers in
three.

Source: Stability-AI/stablediffusion `ldm/modules/diffusionmodules/{openaimodel,model}.py`, `ldm/modules/ema.py`.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, Final

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from model.unet import build_unet

UNET_PREFIX: Final = "model.diffusion_model."
VAE_PREFIX: Final = "first_stage_model."
TEXT_PREFIX: Final = "cond_stage_model.model."
EMA_PREFIX: Final = "model_ema."

NAMED_EXTRAS: Final[dict[str, str]] = {
    r"(alphas_cumprod(_prev)?|betas|logvar|lvlb_weights|log_one_minus_alphas_cumprod)"
    r"|sqrt_(alphas_cumprod|one_minus_alphas_cumprod|recip_alphas_cumprod|recipm1_alphas_cumprod)"
    r"|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)": "the noise schedule, made from its betas",
    r"scale_factor|cond_ids": "constants of the training program",
    r"model_ema\.(decay|num_updates)": "state of the moving average",
    r"model_ema\..+": "the moving average of the UNet's weights",
    r"first_stage_model\.loss\..+": "the VAE's training loss: discriminator and perceptual network",
    r"cond_stage_model\.model\.(attn_mask|logit_scale|text_projection)": "open_clip's, which conditioning does not use",
    r"cond_stage_model\.model\.transformer\.resblocks\.23\..+": "the last block, which the penultimate layer skips",
    r"cond_stage_model\.model\.visual\..+": "the image tower",
    r"cond_stage_model\.transformer\.text_model\.embeddings\.position_ids": "a constant: 0, 1, 2, …",
    r"(global_step|epoch|pytorch-lightning_version)": "how far the training program had come",
}
"""What a published single file may hold besides the UNet, the VAE and the text blocks in use: pattern → why."""

_NUM_NAMED: Final = 3  # keys that an error quotes


def named_extra(key: str) -> str | None:
    """Why a key of a single file may be left alone, or None if it is not among `NAMED_EXTRAS`."""
    return next((why for pattern, why in NAMED_EXTRAS.items() if re.fullmatch(pattern, key)), None)


def ema_name(compvis_key: str) -> str:
    """The key of a weight's moving average: `model.` becomes `model_ema.`, and the other dots go.

    Args:
        compvis_key: with its prefix, such as `model.diffusion_model.time_embed.0.weight`.

    Returns:
        such as `model_ema.diffusion_modeltime_embed0weight`.

    Raises:
        ValueError: the key does not begin with `model.`; only the UNet is averaged.
    """
    owner, _, rest = compvis_key.partition(".")
    if owner != "model" or not rest:
        raise ValueError(f"{compvis_key!r} has no moving average: only keys that begin with {UNET_PREFIX} have one")
    return EMA_PREFIX + rest.replace(".", "")


# ---------------------------------------------------------------------------------------------------------------- UNet

_UNET_ENDS: Final = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}
_UNET_RESNET: Final = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "time_emb_proj": "emb_layers.1",
}
_UNET_BLOCK: Final = re.compile(
    r"(?P<side>down|mid|up)_blocks?\.((?P<block>\d+)\.)?"
    r"(?P<part>resnets|attentions|downsamplers|upsamplers)\.(?P<layer>\d+)\.(?P<rest>.+)"
)
_UNET_BLOCK_TYPES: Final = {
    "down_block_types": {"DownBlock2D", "CrossAttnDownBlock2D"},
    "mid_block_type": {"UNetMidBlock2DCrossAttn"},
    "up_block_types": {"UpBlock2D", "CrossAttnUpBlock2D"},
}


def unet_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Names of every parameter, diffusers key → CompVis key (without prefix), of a UNet.

    Args:
        config: diffusers'; what it leaves out has diffusers' defaults.

    Raises:
        ValueError: a part of this UNet has no place in CompVis' UNet.
    """
    return dict(_unet(_frozen(config))[0])


def unet_from_compvis(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A UNet's state dict in diffusers' names.

    Args:
        state: CompVis keys without prefix.
        config: diffusers' config of the UNet that the weights are for.

    Raises:
        ValueError: keys are missing or left over, or a shape is another than the config's.
    """
    names, shapes = _unet(_frozen(config))
    _check("the UNet", state, {names[key]: shape for key, shape in shapes.items()})
    return {key: state[name] for key, name in names.items()}


@lru_cache(maxsize=8)
def _unet(config: str) -> tuple[dict[str, str], dict[str, torch.Size]]:
    """Names and shapes, from the UNet itself, built without memory."""
    with torch.device("meta"):
        unet = build_unet(json.loads(config))
    full = dict(unet.config)
    for field, known in _UNET_BLOCK_TYPES.items():
        types = full[field] if isinstance(full[field], (list, tuple)) else [full[field]]
        for unknown in (kind for kind in types if kind not in known):
            raise ValueError(f"{field} has {unknown!r}: a single file knows only {', '.join(sorted(known))}")
    shapes = {key: value.shape for key, value in unet.state_dict().items()}
    return _renamed("the UNet", shapes, lambda key: _unet_name(key, full)), shapes


def _unet_name(key: str, config: Mapping[str, Any]) -> str | None:
    module, _, kind = key.rpartition(".")
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{kind}"
    if (match := _UNET_BLOCK.fullmatch(key)) is None:
        return None
    side, part, layer, rest = match["side"], match["part"], int(match["layer"]), match["rest"]
    if part == "resnets":
        module, _, kind = rest.rpartition(".")
        if module not in _UNET_RESNET:
            return None
        rest = f"{_UNET_RESNET[module]}.{kind}"
    if side == "mid":
        return f"middle_block.{2 * layer if part == 'resnets' else 1}.{rest}"
    block, num_layers = int(match["block"]), _layers_per_block(config)
    if side == "down":
        first = 1 + block * (num_layers + 1)  # 0 is conv_in; a downsampler stands at the end of its block, by itself
        if part == "downsamplers":
            return f"input_blocks.{first + num_layers}.0.{rest.replace('conv.', 'op.', 1)}"
        return f"input_blocks.{first + layer}.{0 if part == 'resnets' else 1}.{rest}"
    first = block * (num_layers + 1)  # one layer more than on the way down; an upsampler shares the last one's place
    if part == "upsamplers":
        has_attention = config["up_block_types"][block] == "CrossAttnUpBlock2D"
        return f"output_blocks.{first + num_layers}.{2 if has_attention else 1}.{rest}"
    return f"output_blocks.{first + layer}.{0 if part == 'resnets' else 1}.{rest}"


def _layers_per_block(config: Mapping[str, Any]) -> int:
    layers = config["layers_per_block"]
    distinct = {layers} if isinstance(layers, int) else set(layers)
    if len(distinct) != 1:
        raise ValueError(f"layers_per_block is {layers}: a single file's UNet has the same number in every block")
    return distinct.pop()


# ----------------------------------------------------------------------------------------------------------------- VAE

_VAE_ATTENTION: Final = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_MATRIX: Final = re.compile(r"(encoder|decoder)\.mid\.attn_1\.(q|k|v|proj_out)\.weight")
_VAE_BLOCK: Final = re.compile(r"(?P<half>encoder|decoder)\.(down|up)_blocks\.(?P<block>\d+)\.(?P<rest>.+)")
_VAE_MID: Final = re.compile(
    r"(?P<half>encoder|decoder)\.mid_block\.(?P<part>resnets|attentions)\.(?P<layer>\d+)\.(?P<rest>.+)"
)


def vae_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Names of every parameter, diffusers key → CompVis key (without prefix), of an AutoencoderKL.

    Args:
        config: diffusers'; what it leaves out has diffusers' defaults.

    Raises:
        ValueError: a part of this VAE has no place in CompVis' VAE.
    """
    return dict(_vae(_frozen(config))[0])


def vae_from_compvis(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A VAE's state dict in diffusers' names.

    Args:
        state: CompVis keys without prefix; the attention's matrices may be 1 × 1 convolutions or plain.
        config: diffusers' config of the VAE that the weights are for.

    Raises:
        ValueError: keys are missing or left over, or a shape is another than the config's.
    """
    names, shapes = _vae(_frozen(config))
    wanted = {names[key]: _as_convolution(names[key], shape) for key, shape in shapes.items()}
    for key, shape in wanted.items():
        if key in state and state[key].ndim == 2 and len(shape) == 4:  # written by a careless converter
            wanted[key] = shape[:2]
    _check("the VAE", state, wanted)
    return {key: state[name].reshape(shapes[key]) for key, name in names.items()}


@lru_cache(maxsize=8)
def _vae(config: str) -> tuple[dict[str, str], dict[str, torch.Size]]:
    values = {key: value for key, value in json.loads(config).items() if not key.startswith("_")}
    with torch.device("meta"):
        vae = AutoencoderKL(**values)
    shapes = {key: value.shape for key, value in vae.state_dict().items()}
    num_blocks = len(vae.config["block_out_channels"])
    return _renamed("the VAE", shapes, lambda key: _vae_name(key, num_blocks)), shapes


def _vae_name(key: str, num_blocks: int) -> str | None:
    if match := _VAE_MID.fullmatch(key):
        half, layer, rest = match["half"], int(match["layer"]), match["rest"]
        if match["part"] == "resnets":
            return f"{half}.mid.block_{layer + 1}.{rest}"
        module, _, kind = rest.rpartition(".")
        return f"{half}.mid.attn_{layer + 1}.{_VAE_ATTENTION[module]}.{kind}" if module in _VAE_ATTENTION else None
    if match := _VAE_BLOCK.fullmatch(key):
        half, block, rest = match["half"], int(match["block"]), match["rest"]
        # CompVis counts the decoder's blocks by their resolution, from the largest, diffusers in order of use.
        place = f"down.{block}" if half == "encoder" else f"up.{num_blocks - 1 - block}"
        rest = re.sub(r"^resnets\.(\d+)\.conv_shortcut\.", r"block.\1.nin_shortcut.", rest)
        rest = re.sub(r"^resnets\.(\d+)\.(norm1|norm2|conv1|conv2)\.", r"block.\1.\2.", rest)
        rest = re.sub(r"^(down|up)samplers\.0\.conv\.", r"\1sample.conv.", rest)
        return f"{half}.{place}.{rest}" if re.match(r"block\.|(down|up)sample\.", rest) else None
    if match := re.fullmatch(r"(encoder|decoder)\.(conv_in|conv_out|conv_norm_out)\.(weight|bias)", key):
        return f"{match[1]}.{match[2].replace('conv_norm_out', 'norm_out')}.{match[3]}"
    return key if re.fullmatch(r"(post_)?quant_conv\.(weight|bias)", key) else None


def _as_convolution(name: str, shape: torch.Size) -> torch.Size:
    return torch.Size((*shape, 1, 1)) if _VAE_MATRIX.fullmatch(name) else shape


# ---------------------------------------------------------------------------------------------------------------- text

_TEXT_BLOCK: Final = re.compile(r"transformer\.resblocks\.(?P<layer>\d+)\.(?P<rest>.+)")
_TEXT_OUTSIDE: Final = {
    "ln_final.bias": "final_layer_norm.bias",
    "ln_final.weight": "final_layer_norm.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
}
_TEXT_IN_BLOCK: Final = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TEXT_UNUSED: Final = {"attn_mask", "logit_scale", "text_projection"}
_TEXT_WRAPPER: Final = "text_model."


def num_text_blocks(state: Mapping[str, Any]) -> int:
    """How many blocks a text tower in open_clip's names has.

    Raises:
        ValueError: none, or a block is missing between others.
    """
    layers = {int(match["layer"]) for key in state if (match := _TEXT_BLOCK.fullmatch(key))}
    if not layers or layers != set(range(len(layers))):
        raise ValueError(f"the text tower has blocks {sorted(layers)}: they must be 0, 1, 2, … without a gap")
    return len(layers)


def clip_text_to_transformers(state: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """The first blocks of an open_clip text tower in the names of transformers' CLIPTextModel.

    Args:
        state: open_clip's keys. Blocks after the first `num_layers`, an image tower (`visual.…`), `attn_mask`,
            `logit_scale` and `text_projection` are left out.
        num_layers: blocks to take: one less than the tower has gives the penultimate layer.

    Returns:
        keys that begin with `text_model.`; queries, keys and values are views of open_clip's one matrix.

    Raises:
        ValueError: a parameter has no counterpart in transformers' CLIP (layer scale, query norms, …), or one is
            missing.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        match = _TEXT_BLOCK.fullmatch(key)
        if key.startswith("visual.") or key in _TEXT_UNUSED or (match and int(match["layer"]) >= num_layers):
            continue
        if match and match["rest"] in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = match["rest"].rpartition("_")[2]
            for name, piece in zip("qkv", value.chunk(3), strict=True):
                converted[f"{_TEXT_WRAPPER}encoder.layers.{match['layer']}.self_attn.{name}_proj.{kind}"] = piece
        elif match:
            module, _, kind = match["rest"].rpartition(".")
            if module not in _TEXT_IN_BLOCK:
                raise ValueError(f"the text tower's {match['rest']} has no counterpart in transformers' CLIPTextModel")
            converted[f"{_TEXT_WRAPPER}encoder.layers.{match['layer']}.{_TEXT_IN_BLOCK[module]}.{kind}"] = value
        elif key in _TEXT_OUTSIDE:
            converted[_TEXT_WRAPPER + _TEXT_OUTSIDE[key]] = value
        else:
            raise ValueError(f"the text tower's {key} has no counterpart in transformers' CLIPTextModel")
    _check_keys("the text tower", converted, _transformers_keys(num_layers))
    return converted


def clip_text_from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text tower of a transformers CLIPTextModel in open_clip's names.

    Args:
        state: with or without the leading `text_model.`, which versions of transformers disagree about;
            `embeddings.position_ids` is a constant and ignored, `text_projection.weight` is kept, transposed.

    Returns:
        as many blocks as there were (Stable Diffusion 2's text encoder has 23 of 24, so its last one is the one to
        use). Queries, keys and values are copied into one matrix, other tensors are not copied.

    Raises:
        ValueError: keys are missing or left over.
    """
    plain = {
        key.removeprefix(_TEXT_WRAPPER): value for key, value in state.items() if not key.endswith(".position_ids")
    }
    projection = plain.pop("text_projection.weight", None)
    layers = {int(match[1]) for key in plain if (match := re.match(r"encoder\.layers\.(\d+)\.", key))}
    num_layers = max(layers, default=0) + 1
    _check_keys("the text encoder", plain, [key.removeprefix(_TEXT_WRAPPER) for key in _transformers_keys(num_layers)])
    converted = {ours: plain[theirs] for ours, theirs in _TEXT_OUTSIDE.items()}
    for layer in range(num_layers):
        theirs, ours = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            pieces = [plain[f"{theirs}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            converted[f"{ours}.attn.in_proj_{kind}"] = torch.cat(pieces)
            for name, counterpart in _TEXT_IN_BLOCK.items():
                converted[f"{ours}.{name}.{kind}"] = plain[f"{theirs}.{counterpart}.{kind}"]
    if projection is not None:
        converted["text_projection"] = projection.T
    return converted


def _transformers_keys(num_layers: int) -> list[str]:
    """Every key of a CLIPTextModel with so many layers."""
    modules = [f"self_attn.{name}_proj" for name in "qkv"] + list(_TEXT_IN_BLOCK.values())
    return [_TEXT_WRAPPER + name for name in _TEXT_OUTSIDE.values()] + [
        f"{_TEXT_WRAPPER}encoder.layers.{layer}.{module}.{kind}"
        for layer in range(num_layers)
        for module in modules
        for kind in ("weight", "bias")
    ]


def _open_clip_keys(num_blocks: int) -> list[str]:
    """Every key of an open_clip text tower with so many blocks that conditioning reads."""
    inside = [f"{module}.{kind}" for module in _TEXT_IN_BLOCK for kind in ("weight", "bias")]
    inside += ["attn.in_proj_weight", "attn.in_proj_bias"]
    return [*_TEXT_OUTSIDE, *(f"transformer.resblocks.{n}.{key}" for n in range(num_blocks) for key in inside)]


# ----------------------------------------------------------------------------------------------------------- all three


def to_compvis(
    *,
    unet: Mapping[str, Tensor],
    unet_config: Mapping[str, Any],
    vae: Mapping[str, Tensor],
    vae_config: Mapping[str, Any],
    text: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """One flat state dict with CompVis' keys.

    Args:
        unet: diffusers' state dict.
        unet_config: its config.
        vae: diffusers' state dict.
        vae_config: its config.
        text: open_clip's state dict; an image tower and `attn_mask` are left out, all blocks that it has, its
            `text_projection` and its `logit_scale` stay.

    Returns:
        the same tensors, reshaped at most.

    Raises:
        ValueError: keys are missing or left over, a shape is another than the config's, or a part has no place in a
            single file.
    """
    unet_map, unet_shapes = _unet(_frozen(unet_config))
    vae_map, vae_shapes = _vae(_frozen(vae_config))
    text = {key: value for key, value in text.items() if not key.startswith("visual.") and key != "attn_mask"}
    _check("the UNet", unet, unet_shapes)
    _check("the VAE", vae, vae_shapes)
    _check_keys(
        "the text tower", [key for key in text if key not in _TEXT_UNUSED], _open_clip_keys(num_text_blocks(text))
    )
    return (
        {UNET_PREFIX + name: unet[key] for key, name in unet_map.items()}
        | {VAE_PREFIX + name: vae[key].reshape(_as_convolution(name, vae[key].shape)) for key, name in vae_map.items()}
        | {TEXT_PREFIX + key: value for key, value in text.items()}
    )


# -------------------------------------------------------------------------------------------------------------- checks


def _frozen(config: Mapping[str, Any]) -> str:
    return json.dumps(dict(config), sort_keys=True)


def _renamed(what: str, keys: Iterable[str], rename: Callable[[str], str | None]) -> dict[str, str]:
    names: dict[str, str] = {}
    for key in keys:
        name = rename(key)
        if name is None:
            raise ValueError(f"{what} has {key!r}, which has no place in a single file of Stable Diffusion's")
        names[key] = name
    assert len(set(names.values())) == len(names), "two parameters have one name"
    return names


def _check(what: str, state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    _check_keys(what, state, shapes)
    wrong = [
        f"{key} is {list(state[key].shape)} and must be {list(shape)}"
        for key, shape in shapes.items()
        if state[key].shape != shape
    ]
    if wrong:
        raise ValueError(f"{what} does not fit its config: {some_of(wrong, 'tensors have other shapes')}")


def _check_keys(what: str, keys: Iterable[str], wanted: Iterable[str]) -> None:
    keys, wanted = dict.fromkeys(keys), dict.fromkeys(wanted)  # sets that keep their order
    missing = [key for key in wanted if key not in keys]
    unexpected = [key for key in keys if key not in wanted]
    found = [some_of(missing, "keys are missing")] * bool(missing) + [
        some_of(unexpected, "keys are unexpected")
    ] * bool(unexpected)
    if found:
        raise ValueError(f"{what} does not fit its config: {'; '.join(found)}")


def some_of(items: list[str], what: str) -> str:
    """How many there are, what of them, and the first few: for errors."""
    shown = ", ".join(items[:_NUM_NAMED])
    return f"{len(items)} {what}: {shown}{', …' if len(items) > _NUM_NAMED else ''}"
