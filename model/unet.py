"""The UNet: loading it, and turning a text-to-image base into an inpainting model.

The inpainting UNet reads nine channels where its base reads four:

    0–3  noisy latents | 4  mask, 1 = repaint | 5–8  latents of the picture with the hole painted grey

Only the first four are noised and scaled by a sampler; the other five are conditioning and never dropped.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

NUM_INPAINTING_CHANNELS = 9


def load_unet(directory: Path | str, *, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """Reads a diffusers UNet from a local folder, whole or sharded; never asks a hub.

    Args:
        directory: holds `config.json` and `diffusion_pytorch_model.safetensors`, or its index and shards.
        dtype: of the parameters in memory, whatever the file's.

    Returns:
        the UNet on the CPU, in eval mode.

    Raises:
        ValueError: the folder or its config is missing.
    """
    if not (Path(directory) / "config.json").is_file():
        raise ValueError(f"no UNet in {directory}: it must hold config.json and safetensors weights")
    unet = UNet2DConditionModel.from_pretrained(
        str(directory), local_files_only=True, use_safetensors=True, torch_dtype=dtype
    )
    assert isinstance(unet, UNet2DConditionModel)
    return unet.eval()


def build_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """A UNet with random weights from a diffusers config, such as `model.specs.SD2_UNET_CONFIG`.

    Keys that begin with an underscore (diffusers' own notes) are ignored.
    """
    return UNet2DConditionModel(**{key: value for key, value in config.items() if not key.startswith("_")})


def widen_conv_in(unet: UNet2DConditionModel, in_channels: int = NUM_INPAINTING_CHANNELS) -> UNet2DConditionModel:
    """Gives the UNet more input channels without changing what it computes.

    The weights of the channels it had are copied, those of the new ones are zero, so at step 0 the widened UNet gives
    the base's output for any mask and masked latents. The same initialization as Stable Diffusion's.

    Args:
        unet: changed in place: its `conv_in` and `config.in_channels`.
        in_channels: the new number of channels.

    Returns:
        the same UNet.

    Raises:
        ValueError: the UNet already has as many channels or more.

    Source: Stability-AI/stablediffusion `ldm/models/diffusion/ddpm.py`, `finetune_keys`.
    """
    narrow = unet.conv_in
    if narrow.in_channels >= in_channels:
        raise ValueError(f"the UNet has {narrow.in_channels} input channels: it cannot be widened to {in_channels}")
    wide = nn.Conv2d(
        in_channels,
        narrow.out_channels,
        kernel_size=narrow.kernel_size,  # pyright: ignore[reportArgumentType]  # torch types it tuple[int, ...]
        padding=narrow.padding,  # pyright: ignore[reportArgumentType]  # as above
        device=narrow.weight.device,
        dtype=narrow.weight.dtype,
    )
    assert narrow.bias is not None
    assert wide.bias is not None
    with torch.no_grad():
        wide.weight.copy_(widened(narrow.weight, in_channels))
        wide.bias.copy_(narrow.bias)
    unet.conv_in = wide
    unet.register_to_config(in_channels=in_channels)
    return unet


def widened(
    weight: Float[Tensor, "out narrow height width"], in_channels: int
) -> Float[Tensor, "out wide height width"]:
    """A convolution's weight for more input channels: copied for those that it had, zero for the new ones."""
    wide = weight.new_zeros(weight.shape[0], in_channels, *weight.shape[2:])
    wide[:, : weight.shape[1]] = weight
    return wide


def unet_input(
    noisy_latents: Float[Tensor, "batch channels h w"],
    mask: Float[Tensor, "batch 1 h w"],
    masked_image_latents: Float[Tensor, "batch channels h w"],
) -> Float[Tensor, "batch wide h w"]:
    """The UNet's input: noisy latents | mask | masked image latents, in that order.

    Args:
        noisy_latents: x_t.
        mask: {0, 1} on the latent grid, 1 = repaint.
        masked_image_latents: latents of the picture whose hole is grey, scaled as the latents are.

    Returns:
        2 × channels + 1 channels.

    Source: Stability-AI/stablediffusion `ldm/models/diffusion/ddpm.py`, `concat_keys`; diffusers' inpainting pipeline.
    """
    return torch.cat([noisy_latents, mask, masked_image_latents], dim=1)
