"""The single file: all weights in one `.safetensors` with CompVis' keys, and the `.yaml` beside it.

Programs that read such a file recognise nine input channels and a text width of 1024 as "Stable Diffusion 2 inpainting"
and then *assume* that the UNet predicts the noise, as the released one does. What a file can do against that is done
here: the `.yaml` of the same name says `parameterization: "v"` (AUTOMATIC1111's program prefers it to its own guess),
and the file's header says `modelspec.prediction_type`. diffusers and ComfyUI read neither; they must be told.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file

from model.compvis import to_compvis
from model.encoders import CLIP_WEIGHTS_NAME, expand_vocabulary, load_vae
from model.safetensors_writer import save_safetensors
from model.specs import PREDICTION_TYPES, PredictionType, ScheduleSpec

_LDM_GROUPS: Final = 32  # of every GroupNorm in ldm's UNet and VAE
_LDM_TEXT_WIDTH: Final = 1024  # FrozenOpenCLIPEmbedder builds ViT-H-14


def export_single_file(
    path: Path | str,
    *,
    unet: UNet2DConditionModel,
    vae_dir: Path | str,
    text_dir: Path | str,
    prediction_type: PredictionType,
    schedule: ScheduleSpec | None = None,
    resolution_px: int | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes `path` and the `.yaml` of the same name.

    Args:
        path: ends with `.safetensors`.
        unet: the UNet to publish (its EMA weights, normally).
        vae_dir: the diffusers VAE that the latents came from.
        text_dir: the folder of the text encoder that the embeddings came from. Every text block of its file is written,
            with `text_projection` and `logit_scale` if they are there; an image tower is not.
        prediction_type: what the UNet predicts.
        schedule: the noise schedule it was trained on; None is Stable Diffusion's.
        resolution_px: side of the pictures that it was trained on; None is what the UNet config's `sample_size` means.
        metadata: strings for the file's header, beside those of `header_metadata`.
        dtype: of all floating-point tensors in the file, float32 or float16.

    Raises:
        ValueError: the name has another ending, an input is missing, or the UNet or VAE has parts that have no place
            in a single file.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} does not end with .safetensors")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction_type!r}: choose one of {', '.join(PREDICTION_TYPES)}")
    schedule = schedule or ScheduleSpec()
    text_path = Path(text_dir) / CLIP_WEIGHTS_NAME
    if not text_path.is_file():
        raise ValueError(f"no text encoder in {text_dir}: it must hold {CLIP_WEIGHTS_NAME}")
    vae, text = load_vae(vae_dir), load_file(text_path)
    text = expand_vocabulary(text, vocab_size=49408)
    unet_config, vae_config = dict(unet.config), dict(vae.config)
    factor: int = 2 ** (len(vae_config["block_out_channels"]) - 1)
    resolution_px = resolution_px or int(unet_config["sample_size"]) * factor
    state = to_compvis(
        unet=unet.state_dict(), unet_config=unet_config, vae=vae.state_dict(), vae_config=vae_config, text=text
    )
    gaps = ldm_gaps(unet_config, vae_config, text_width=text["ln_final.weight"].shape[0])
    header = header_metadata(prediction_type, schedule, resolution_px=resolution_px, gaps=gaps)
    save_safetensors(path, state, dtype=dtype, metadata={**header, **(metadata or {})})
    config = ldm_config(unet_config, vae_config, prediction_type, schedule, latent_px=resolution_px // factor)
    comment = _comment(path.name, prediction_type, schedule, gaps)
    path.with_suffix(".yaml").write_text(comment + yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def header_metadata(
    prediction_type: PredictionType, schedule: ScheduleSpec, *, resolution_px: int, gaps: list[str]
) -> dict[str, str]:
    """What the file's header says of the model.

    Args:
        prediction_type: what the UNet predicts.
        schedule: the noise schedule it was trained on.
        resolution_px: side of the pictures it was trained on.
        gaps: from `ldm_gaps`; a model that has some is not called by Stable Diffusion's name.

    Source: Stability-AI/ModelSpec, version 1.0.0.
    """
    said = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
        "modelspec.resolution": f"{resolution_px}x{resolution_px}",
        "modelspec.encoder_layer": "penultimate",
        "prediction_type": prediction_type,
        "zero_terminal_snr": str(schedule.zero_terminal_snr).lower(),
    }
    if not gaps:
        said["modelspec.architecture"] = "stable-diffusion-v2-inpainting"
        said["modelspec.implementation"] = "https://github.com/Stability-AI/stablediffusion"
    return said


# ---------------------------------------------------------------------------------------------------------------- yaml


def ldm_config(
    unet_config: Mapping[str, Any],
    vae_config: Mapping[str, Any],
    prediction_type: PredictionType,
    schedule: ScheduleSpec,
    *,
    latent_px: int,
) -> dict[str, Any]:
    """The model in the words of CompVis' configs: what `v2-inpainting-inference.yaml` is for the released one.

    Args:
        unet_config: diffusers'.
        vae_config: diffusers'.
        prediction_type: what the UNet predicts; `parameterization: "v"` is there only if it is the velocity.
        schedule: the noise schedule it was trained on. There is no word for a zero terminal SNR.
        latent_px: side of the latents that it was trained on.

    Source: Stability-AI/stablediffusion `configs/stable-diffusion/v2-inpainting-inference.yaml`.
    """
    says_v = {"parameterization": "v"} if prediction_type == "v_prediction" else {}
    return {
        "model": {
            "target": "ldm.models.diffusion.ddpm.LatentInpaintDiffusion",
            "params": {
                **says_v,
                "linear_start": schedule.beta_start,
                "linear_end": schedule.beta_end,
                "num_timesteps_cond": 1,
                "log_every_t": 200,
                "timesteps": schedule.num_train_timesteps,
                "first_stage_key": "jpg",
                "cond_stage_key": "txt",
                "image_size": latent_px,
                "channels": vae_config["latent_channels"],
                "cond_stage_trainable": False,
                "conditioning_key": "hybrid",
                "concat_keys": ["mask", "masked_image"],
                "scale_factor": vae_config["scaling_factor"],
                "monitor": "val/loss_simple_ema",
                "use_ema": False,
                "unet_config": _ldm_unet(unet_config),
                "first_stage_config": _ldm_vae(vae_config),
                "cond_stage_config": {
                    "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
                    "params": {"freeze": True, "layer": "penultimate"},
                },
            },
        }
    }


def ldm_gaps(unet_config: Mapping[str, Any], vae_config: Mapping[str, Any], *, text_width: int) -> list[str]:
    """Why CompVis' classes could not be built to hold this model's weights; empty for Stable Diffusion 2's own shape.

    Tiny models have such gaps. Their single files still load in diffusers, which takes shapes from its own config.

    Args:
        unet_config: diffusers', with all its fields.
        vae_config: diffusers', with all its fields.
        text_width: channels of the text tower.
    """
    widths, vae_widths = unet_config["block_out_channels"], vae_config["block_out_channels"]
    attends_down = ["CrossAttn" in kind for kind in unet_config["down_block_types"]]
    attends_up = ["CrossAttn" in kind for kind in unet_config["up_block_types"]]
    rules = {
        "block widths are no whole multiples of the first": all(width % widths[0] == 0 for width in widths)
        and all(width % vae_widths[0] == 0 for width in vae_widths),
        f"GroupNorm has not {_LDM_GROUPS} groups": unet_config["norm_num_groups"] == _LDM_GROUPS
        and vae_config["norm_num_groups"] == _LDM_GROUPS,
        "attention heads have neither one number nor one width": _heads(unet_config) is not None,
        "attention stands at other places on the way up": attends_up == attends_down[::-1],
        "blocks have transformers of several depths": isinstance(unet_config["transformer_layers_per_block"], int),
        f"the text tower is not {_LDM_TEXT_WIDTH} wide": text_width == _LDM_TEXT_WIDTH,
    }
    return [gap for gap, is_expressible in rules.items() if not is_expressible]


def _ldm_unet(config: Mapping[str, Any]) -> dict[str, Any]:
    widths = config["block_out_channels"]
    attends = ["CrossAttn" in kind for kind in config["down_block_types"]]
    return {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": {
            "use_checkpoint": True,
            "image_size": 32,  # which the class does not read
            "in_channels": config["in_channels"],
            "out_channels": config["out_channels"],
            "model_channels": widths[0],
            "attention_resolutions": [2**level for level, is_on in enumerate(attends) if is_on][::-1],
            "num_res_blocks": config["layers_per_block"],
            "channel_mult": [_ratio(width, widths[0]) for width in widths],
            **(_heads(config) or {}),
            "use_spatial_transformer": True,
            "use_linear_in_transformer": config["use_linear_projection"],
            "transformer_depth": config["transformer_layers_per_block"],
            "context_dim": config["cross_attention_dim"],
            "legacy": False,
        },
    }


def _ldm_vae(config: Mapping[str, Any]) -> dict[str, Any]:
    widths = config["block_out_channels"]
    return {
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {
            "embed_dim": config["latent_channels"],
            "monitor": "val/rec_loss",
            "ddconfig": {
                "double_z": True,
                "z_channels": config["latent_channels"],
                "resolution": 256,
                "in_channels": config["in_channels"],
                "out_ch": config["out_channels"],
                "ch": widths[0],
                "ch_mult": [_ratio(width, widths[0]) for width in widths],
                "num_res_blocks": config["layers_per_block"],
                "attn_resolutions": [],
                "dropout": 0.0,
            },
            "lossconfig": {"target": "torch.nn.Identity"},
        },
    }


def _heads(config: Mapping[str, Any]) -> dict[str, int] | None:
    """`num_head_channels` if all heads are as wide, `num_heads` if all blocks have as many, else None."""
    widths = config["block_out_channels"]
    given = config["num_attention_heads"] or config["attention_head_dim"]  # which is the number of heads, too
    numbers = [given] * len(widths) if isinstance(given, int) else list(given)
    attends = ["CrossAttn" in kind for kind in config["down_block_types"]]
    pairs = [(width, number) for width, number, is_on in zip(widths, numbers, attends, strict=True) if is_on]
    pairs.append((widths[-1], numbers[-1]))  # the middle block
    per_head = {width / number for width, number in pairs}
    if len(per_head) == 1 and (width := per_head.pop()).is_integer():
        return {"num_head_channels": int(width)}
    return {"num_heads": pairs[0][1]} if len({number for _, number in pairs}) == 1 else None


def _ratio(width: int, base: int) -> int | float:
    return width // base if width % base == 0 else width / base


def _comment(name: str, prediction_type: PredictionType, schedule: ScheduleSpec, gaps: list[str]) -> str:
    lines = [f"CompVis' config of {name}. It must keep the same name: programs look for it beside the weights."]
    if prediction_type == "v_prediction":
        lines.append(
            'parameterization "v": the UNet predicts the velocity. The released SD2 inpainting model does not.'
        )
    if schedule.zero_terminal_snr:
        lines += [
            "Zero terminal SNR: the schedule was rescaled so that the last timestep is pure noise (arXiv 2305.08891).",
            "CompVis' configs have no word for it: switch it on in the program that samples (in ComfyUI the node",
            "ModelSamplingDiscrete with v_prediction and zsnr), and sample at trailing timesteps.",
        ]
    if gaps:
        lines.append(f"CompVis' own classes cannot hold these weights ({'; '.join(gaps)}).")
        lines.append("diffusers can, with the folder diffusers/ as its config.")
    return "".join(f"# {line}\n" for line in lines)
