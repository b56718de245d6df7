"""The frozen models of the encode stage, and the tensors that belong to a whole dataset."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors.torch import save_file

from model.encoders import (
    NULL_CAPTION,
    encode_stored_moments,
    encode_stored_text,
    load_text_encoder,
    load_vae,
)
from model.specs import LatentSpec, MaskSpec, TextSpec
from preprocessing.contracts.config import EncodeConfig
from preprocessing.encode.kernel import Encoders

if TYPE_CHECKING:
    from model.mask_bank import MaskBank

DTYPES: Final[dict[str, torch.dtype]] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_encoders(
    directory: Path,
    config: EncodeConfig,
    weights: dict[str, str],
    mask_bank: "MaskBank | None" = None,
    device: torch.device | str | None = None,
) -> Encoders:
    """Loads the models.

    Args:
        directory: Holds ``vae/`` and ``open_clip/``.
        config: What they are to make.
        weights: sha256 of each of the two.
        mask_bank: The user's masks, where the config says so.
        device: Where they compute; by default a GPU if there is one.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    vae = load_vae(directory / "vae", device, DTYPES[config.precision])
    text = load_text_encoder(directory / "open_clip", load_image_tower=False).to(device, DTYPES[config.precision])
    if config.compile:
        compiled: list[Any] = [vae.encoder, *text.clip.transformer.resblocks]
        for module in compiled:
            module.compile(dynamic=False)  # in place; the shape is fixed
    return Encoders(
        vae,
        text,
        LatentSpec(
            channels=vae.config["latent_channels"],
            resolution_px=config.resolution_px,
            factor=2 ** (len(vae.config["block_out_channels"]) - 1),
            scaling_factor=float(vae.config["scaling_factor"]),
            precision=config.precision,
            weights_sha256=weights["vae"],
        ),
        TextSpec(
            width=text.width,
            tokenizer_sha256=text.tokenizer_sha256,
            precision=config.precision,
            weights_sha256=weights["open_clip"],
        ),
        MaskSpec(
            family=config.mask_family,
            resolution_px=config.resolution_px,
            num_variants=config.num_mask_variants,
            seed=config.mask_seed,
            files_sha256=() if mask_bank is None else mask_bank.files_sha256,
        ),
        config,
        mask_bank,
    )


def write_constants(encoders: Encoders, path: Path) -> Path:
    """Writes the empty caption's tokens and embedding, and the moments of a picture that is all hole."""
    side = encoders.latent_spec.resolution_px
    token_ids = encoders.text.tokenize([NULL_CAPTION])
    constants = {
        "null_text_embedding": encode_stored_text(encoders.text, token_ids)[0],
        "null_token_ids": token_ids[0].int(),
        "full_mask_moments": encode_stored_moments(encoders.vae, torch.zeros(1, 3, side, side))[0],
    }
    save_file({name: value.contiguous().cpu() for name, value in constants.items()}, path)
    return path
