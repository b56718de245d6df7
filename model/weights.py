"""Weight files: hashing, writing, and the diffusers folder that other programs load.

The exported folder is complete: `diffusers.StableDiffusionInpaintPipeline.from_pretrained(directory)` needs nothing
else, and nothing from a hub. Its scheduler's config states the prediction type, which single-file consumers would
guess wrong for a v-prediction inpainting model.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import diffusers
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from model.compvis import clip_text_to_transformers
from model.encoders import NUM_TOKENS, PAD_TOKEN_ID, TextEncoder
from model.safetensors_writer import save_safetensors
from model.specs import PREDICTION_TYPES, PredictionType, ScheduleSpec

if TYPE_CHECKING:
    from transformers import CLIPTextConfig

WEIGHTS_NAME: Final = "diffusion_pytorch_model.safetensors"
START_TOKEN: Final = "<|startoftext|>"  # noqa: S105  # a word of the vocabulary
END_TOKEN: Final = "<|endoftext|>"  # noqa: S105  # as above
PAD_TOKEN: Final = "!"  # noqa: S105  # as above
"""The word with id 0, as in the published SD2 tokenizer. That one reads a caption's "!" as padding; ours does not."""


def export_diffusers(
    directory: Path | str,
    *,
    unet: UNet2DConditionModel,
    vae_dir: Path | str,
    text_encoder: TextEncoder,
    prediction_type: PredictionType,
    schedule: ScheduleSpec | None = None,
    license_path: Path | str,
    model_card: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a complete diffusers inpainting pipeline.

    Args:
        directory: absent or empty.
        unet: the UNet to publish (its EMA weights, normally).
        vae_dir: the diffusers VAE that the latents came from; copied.
        text_encoder: the one that the embeddings came from.
        prediction_type: what the UNet predicts.
        schedule: the noise schedule it was trained on; None is Stable Diffusion's.
        license_path: the base model's licence, copied to `LICENSE`.
        model_card: text of `README.md`.
        dtype: of the UNet and the text encoder in the files, float32 or float16.

    Raises:
        ValueError: the folder is not empty, an input is missing, or the text tower has parts that transformers' CLIP
            has not.
    """
    target = Path(directory)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty: export to a new folder")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction_type!r}: choose one of {', '.join(PREDICTION_TYPES)}")
    if not Path(license_path).is_file():
        raise ValueError(f"license_path {license_path} is not a file: the base model's licence must travel with it")
    unet.save_config(target / "unet")
    save_safetensors(target / "unet" / WEIGHTS_NAME, unet.state_dict(), dtype=dtype)
    _copy_vae(Path(vae_dir), target / "vae")
    _write_text_encoder(target / "text_encoder", text_encoder, dtype)
    write_tokenizer(target / "tokenizer", text_encoder)
    write_json(target / "scheduler" / "scheduler_config.json", _scheduler_config(prediction_type, schedule))
    shutil.copyfile(license_path, target / "LICENSE")
    (target / "README.md").write_text(model_card, encoding="utf-8")
    write_json(target / "model_index.json", _model_index())  # last: without it the folder is no pipeline


def clip_text_state_dict(text_encoder: TextEncoder) -> dict[str, Tensor]:
    """The text tower in the names of transformers' CLIPTextModel, without its last block.

    So `last_hidden_state` of the converted model is `TextEncoder.embed_text`: penultimate block, final layer norm.

    Raises:
        ValueError: a block has parameters that transformers' CLIP has not (layer scale, query norms, …).
    """
    clip = text_encoder.clip
    return clip_text_to_transformers(clip.state_dict(), len(clip.transformer.resblocks) - 1)


def _copy_vae(source: Path, target: Path) -> None:
    files = [file for file in source.glob("*") if file.suffix in (".safetensors", ".json")]
    if not (source / "config.json").is_file() or not any(file.suffix == ".safetensors" for file in files):
        raise ValueError(f"no VAE in {source}: it must hold config.json and {WEIGHTS_NAME}")
    target.mkdir(parents=True)
    for file in files:
        shutil.copyfile(file, target / file.name)


def text_encoder_config(text_encoder: TextEncoder) -> "CLIPTextConfig":
    """The config of the transformers CLIPTextModel that holds `clip_text_state_dict`."""
    from transformers import CLIPTextConfig  # here, not above: it costs seconds

    clip, model_cfg = text_encoder.clip, text_encoder.model_cfg
    block = clip.transformer.resblocks[0]
    return CLIPTextConfig(
        architectures=["CLIPTextModel"],
        vocab_size=clip.vocab_size,
        hidden_size=text_encoder.width,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=len(clip.transformer.resblocks) - 1,
        num_attention_heads=block.attn.num_heads,
        max_position_embeddings=NUM_TOKENS,
        hidden_act="quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
        layer_norm_eps=clip.ln_final.eps,
        projection_dim=model_cfg["embed_dim"],
        bos_token_id=clip.vocab_size - 2,
        eos_token_id=clip.vocab_size - 1,
        pad_token_id=PAD_TOKEN_ID,
        # Not the file's dtype: transformers would follow it, while diffusers loads the UNet in float32 unless told.
        dtype="float32",
    )


def _write_text_encoder(target: Path, text_encoder: TextEncoder, dtype: torch.dtype) -> None:
    target.mkdir(parents=True)
    text_encoder_config(text_encoder).save_pretrained(target)
    save_safetensors(target / "model.safetensors", clip_text_state_dict(text_encoder), dtype=dtype)


def write_tokenizer(target: Path, text_encoder: TextEncoder) -> None:
    """Writes open_clip's byte pairs as a CLIPTokenizer that gives the same ids to a clean caption.

    `split_special_tokens` keeps the names of special tokens in a caption ordinary text, as open_clip does: an
    exclamation mark is no padding, `<|endoftext|>` no end.

    transformers' CLIPTokenizer brings its own cleaning in code (lower case, single spaces) and ignores what a
    `tokenizer.json` says of it. So it cannot be told to straighten quotes and to mend mojibake, ligatures, full-width
    letters and HTML entities, as open_clip does first; the model card says how to do that before.
    """
    ids, merges = text_encoder.vocabulary()
    *_, start, end = sorted(ids, key=ids.__getitem__)
    vocabulary = {word: i for word, i in ids.items() if word not in (start, end)}
    vocabulary |= {START_TOKEN: ids[start], END_TOKEN: ids[end]}
    special = {"bos_token": START_TOKEN, "eos_token": END_TOKEN, "unk_token": END_TOKEN, "pad_token": PAD_TOKEN}
    write_json(target / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (target / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(target / "special_tokens_map.json", special)
    # Both files name the same pad token: the published SD2 tokenizer's disagree, and versions chose differently.
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": NUM_TOKENS,
        "do_lower_case": True,
        "split_special_tokens": True,
    }
    write_json(target / "tokenizer_config.json", config | special)


def _scheduler_config(prediction_type: PredictionType, schedule: ScheduleSpec | None) -> dict[str, Any]:
    schedule = schedule or ScheduleSpec()
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": diffusers.__version__,
        "beta_end": schedule.beta_end,
        "beta_schedule": "scaled_linear",
        "beta_start": schedule.beta_start,
        "clip_sample": False,
        "num_train_timesteps": schedule.num_train_timesteps,
        "prediction_type": prediction_type,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "trailing" if schedule.zero_terminal_snr else "leading",
        "trained_betas": None,
    }


def _model_index() -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionInpaintPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes indented JSON; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
