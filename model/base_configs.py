"""The configs of a base model: from diffusers' files, from a CompVis yaml, or from the shapes of the weights."""

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from model.specs import SD2_UNET_CONFIG, SD2_VAE_CONFIG, PredictionType
from model.weight_files import WeightFileError, read_json

HEAD_CHANNELS: Final = 64
"""Channels of an attention head in Stable Diffusion 2, in the UNet and in the text tower."""

VIT_H_14: Final[dict[str, Any]] = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}
"""open_clip's config of the model whose text tower Stable Diffusion 2 reads."""

_MAX_YAML_BYTES: Final = 1 << 20
_PARAMETERIZATIONS: Final[dict[str, PredictionType]] = {"eps": "epsilon", "v": "v_prediction"}

Shape = Callable[[str], tuple[int, ...]]


# ------------------------------------------------------------------------------------------------------ diffusers' own


def unet_config(declared: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A UNet's config in one form, whatever version of diffusers wrote it.

    Args:
        declared: diffusers' config; what it leaves out has diffusers' defaults.
        where: its file, for messages.

    Raises:
        ValueError: it has a key that this version of diffusers does not know.
    """
    config = _normal(UNet2DConditionModel, declared, SD2_UNET_CONFIG, where)
    if isinstance(config["attention_head_dim"], int):
        config["attention_head_dim"] = [config["attention_head_dim"]] * len(config["block_out_channels"])
    return config


def vae_config(declared: Mapping[str, Any], where: str) -> dict[str, Any]:
    """An AutoencoderKL's config in one form, whatever version of diffusers wrote it; raises as `unet_config` does."""
    return _normal(AutoencoderKL, declared, SD2_VAE_CONFIG, where)


def _normal(model: type, declared: Mapping[str, Any], always: Mapping[str, Any], where: str) -> dict[str, Any]:
    parameters = inspect.signature(model.__init__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
    given = {key: value for key, value in declared.items() if not key.startswith("_")}
    for key, value in given.items():
        if key not in defaults and value not in (None, False):  # off, in a version that knows it
            raise ValueError(f"{where}: {key} is {value!r}, which this version of diffusers does not know")
    full = {name: _plain(given.get(name, default)) for name, default in defaults.items()}
    kept = {name: value for name, value in full.items() if name in always or value != _plain(defaults[name])}
    return {"_class_name": model.__name__, **dict(sorted(kept.items()))}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def unet_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of the UNet of a config and its shape, without memory for it."""
    return _shapes(UNet2DConditionModel, config)


def vae_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of the VAE of a config and its shape, without memory for it."""
    return _shapes(AutoencoderKL, config)


def _shapes(model: Callable[..., torch.nn.Module], config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    try:
        with torch.device("meta"):
            built = model(**{key: value for key, value in config.items() if not key.startswith("_")})
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"the config makes no {model.__name__} ({said}); check its values") from error
    return {key: tuple(value.shape) for key, value in built.state_dict().items()}


# --------------------------------------------------------------------------------------------------------- from shapes


def infer_unet_config(keys: list[str], shape: Shape, *, head_channels: int = HEAD_CHANNELS) -> dict[str, Any]:
    """A UNet's config from the shapes of its weights.

    Args:
        keys: CompVis', without prefix.
        shape: of a key's tensor.
        head_channels: of each attention head, which no shape tells.

    Raises:
        ValueError: these are not the shapes of such a UNet.
    """
    places = _places(keys, r"input_blocks\.(\d+)\.")
    levels: list[tuple[int, int, bool]] = []  # channels, layers, attention
    channels = num_layers = 0
    has_attention = False
    for place in places[1:]:
        if f"input_blocks.{place}.0.op.weight" in keys:
            levels.append((channels, num_layers, has_attention))
            num_layers, has_attention = 0, False
            continue
        channels = _at(shape, keys, f"input_blocks.{place}.0.in_layers.2.weight", 0)
        num_layers += 1
        has_attention |= f"input_blocks.{place}.1.norm.weight" in keys
    levels.append((channels, num_layers, has_attention))
    widths = [level[0] for level in levels]
    _check_widths("UNet", widths, SD2_UNET_CONFIG["norm_num_groups"], head_channels)
    if len({level[1] for level in levels}) != 1:
        raise ValueError(f"the UNet's levels have {[level[1] for level in levels]} layers, and must have equally many")
    context = next((key for key in keys if key.endswith(".attn2.to_k.weight")), "")
    projection = next((key for key in keys if key.endswith(".1.proj_in.weight")), "")
    down = ["CrossAttnDownBlock2D" if level[2] else "DownBlock2D" for level in levels]
    up = ["CrossAttnUpBlock2D" if level[2] else "UpBlock2D" for level in reversed(levels)]
    declared = {
        **SD2_UNET_CONFIG,
        "attention_head_dim": [width // head_channels for width in widths],
        "block_out_channels": widths,
        "cross_attention_dim": _at(shape, keys, context, 1),
        "down_block_types": down,
        "in_channels": _at(shape, keys, "input_blocks.0.0.weight", 1),
        "layers_per_block": levels[0][1],
        "out_channels": _at(shape, keys, "out.2.weight", 0),
        "up_block_types": up,
        "use_linear_projection": len(shape(projection)) == 2 if projection else True,
    }
    return unet_config(declared, "the UNet")


def infer_vae_config(keys: list[str], shape: Shape, *, scaling_factor: float | None = None) -> dict[str, Any]:
    """An AutoencoderKL's config from the shapes of its weights; arguments and errors as in `infer_unet_config`."""
    levels = _places(keys, r"encoder\.down\.(\d+)\.")
    layers = _places(keys, r"encoder\.down\.0\.block\.(\d+)\.")
    widths = [_at(shape, keys, f"encoder.down.{level}.block.0.conv1.weight", 0) for level in levels]
    _check_widths("VAE", widths, SD2_VAE_CONFIG["norm_num_groups"], 1)
    declared = {
        **SD2_VAE_CONFIG,
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "in_channels": _at(shape, keys, "encoder.conv_in.weight", 1),
        "latent_channels": _at(shape, keys, "decoder.conv_in.weight", 1),
        "layers_per_block": len(layers),
        "out_channels": _at(shape, keys, "decoder.conv_out.weight", 0),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
    }
    if scaling_factor is not None:
        declared["scaling_factor"] = scaling_factor
    return vae_config(declared, "the VAE")


def text_config(num_blocks: int, shape: Shape, *, heads: int | None, quick_gelu: bool = False) -> dict[str, Any]:
    """open_clip's `model_cfg` of a text tower, from the shapes of its weights, in open_clip's names.

    Args:
        num_blocks: of the whole tower, the last one included, whether or not its weights are there.
        shape: of a key's tensor.
        heads: of attention; None for 64 channels each.
        quick_gelu: which activation.

    Raises:
        ValueError: the heads do not divide the width.
    """
    vocab_size, width = shape("token_embedding.weight")
    if heads is None and width % HEAD_CHANNELS:
        raise ValueError(f"the text tower is {width} wide, no multiple of {HEAD_CHANNELS}: put its config beside it")
    heads = heads or width // HEAD_CHANNELS
    if width % heads:
        raise ValueError(f"the text tower is {width} wide, which {heads} heads do not divide")
    mlp_ratio = shape("transformer.resblocks.0.mlp.c_fc.weight")[0] / width
    text_cfg: dict[str, Any] = {
        "context_length": shape("positional_embedding")[0],
        "vocab_size": vocab_size,
        "width": width,
        "heads": heads,
        "layers": num_blocks,
    }
    if mlp_ratio != 4:
        text_cfg["mlp_ratio"] = mlp_ratio
    config: dict[str, Any] = {"embed_dim": width, "text_cfg": text_cfg}
    return {**config, "quick_gelu": True} if quick_gelu else config


def _places(keys: list[str], pattern: str) -> list[int]:
    places = sorted({int(match[1]) for key in keys if (match := re.match(pattern, key))})
    if not places or places != list(range(len(places))):
        raise ValueError(f"the weights have blocks {places} where {pattern!r} is expected without a gap")
    return places


def _at(shape: Shape, keys: list[str], key: str, axis: int) -> int:
    if key not in keys or len(shape(key)) <= axis:
        raise ValueError(f"the weights have no {key or 'cross-attention'!r}")
    return shape(key)[axis]


def _check_widths(what: str, widths: list[int], num_groups: int, head_channels: int) -> None:
    if any(width % num_groups or width % head_channels for width in widths):
        raise ValueError(
            f"the {what} has {widths} channels, which {num_groups} groups and heads of {head_channels} do not divide: "
            f"put its diffusers config beside the file, as {what.lower()}/config.json"
        )


# ------------------------------------------------------------------------------------------------- what a file states


def read_compvis_yaml(path: Path) -> dict[str, Any]:
    """What the yaml beside a single file says.

    Returns:
        of `prediction_type`, `head_channels` and `scaling_factor` those that it states.

    Raises:
        WeightFileError: it is no such yaml.
    """
    if path.stat().st_size > _MAX_YAML_BYTES:
        raise WeightFileError(path, f"more than {_MAX_YAML_BYTES} bytes are too many for a config")
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["params"]
        unet = params.get("unet_config", {}).get("params", {})
        stated = {
            "head_channels": unet.get("num_head_channels"),
            "prediction_type": params.get("parameterization"),
            "scaling_factor": params.get("scale_factor"),
        }
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, LookupError, TypeError, AttributeError):
        raise WeightFileError(path, "this is no config of a single file: it has no model.params") from None
    found = {key: value for key, value in stated.items() if value is not None}
    if found.get("head_channels", 1) in (-1, 0):  # their way to say that the number of heads is given instead
        raise WeightFileError(path, "it gives num_heads, not num_head_channels, which Stable Diffusion 2's has")
    kinds = {"head_channels": int, "prediction_type": str, "scaling_factor": float}
    for key, value in found.items():
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise WeightFileError(path, f"its {key} is {value!r}, a {type(value).__name__}")
    if (name := found.get("prediction_type")) is not None:
        if name not in _PARAMETERIZATIONS:
            raise WeightFileError(
                path, f"its parameterization is {name!r}: {' or '.join(_PARAMETERIZATIONS)} are known"
            )
        found["prediction_type"] = _PARAMETERIZATIONS[name]
    return found


def stated_prediction_type(scheduler_config: Path) -> str | None:
    """What a diffusers scheduler's config says of the UNet's output; None if it leaves that to a default."""
    stated = read_json(scheduler_config).get("prediction_type")
    if stated is not None and stated not in _PARAMETERIZATIONS.values():
        raise WeightFileError(
            scheduler_config, f"its prediction_type is {stated!r}: epsilon and v_prediction are known"
        )
    return stated
