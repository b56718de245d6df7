"""What a training step costs in floating-point operations, and what a device could do at most: together, the MFU.

MFU, the model FLOPs' utilization, is the share of the devices' peak that goes into the multiplications of the UNet's
forward and backward pass. Nothing else is counted: neither what activation checkpointing computes again, nor frozen
encoders that run in the step.
"""

import re
from typing import Final

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

_HALF_PRECISION_PEAKS: Final = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
)
"""Words of the device's name → dense bf16 and fp16 FLOP/s; the first that fits. Source: NVIDIA's data sheets."""

_SLICED: Final = "MIG"
"""In the name of a part of a device, whose peak is not the device's."""


def training_flops_per_image(unet: UNet2DConditionModel, latent_px: int, text_shape: tuple[int, int]) -> int:
    """Counts the multiplications and additions of one image's forward and backward pass.

    The convolutions, linear layers and both matmuls of each attention of the UNet as it is built, by their shapes, on
    the meta device: nothing is computed, and no weights are made. The backward pass is twice the forward pass.

    Args:
        unet: For its configuration.
        latent_px: Side of the latents.
        text_shape: (tokens, width).

    Returns:
        FLOPs; 2.413e12 for Stable Diffusion 2 with nine channels at 64 px.
    """
    with torch.device("meta"), torch.no_grad():
        copy = UNet2DConditionModel.from_config(unet.config)
        assert isinstance(copy, UNet2DConditionModel)
        sample = torch.empty(1, unet.config["in_channels"], latent_px, latent_px)
        with FlopCounterMode(display=False) as counter:
            copy(sample, torch.zeros(1), encoder_hidden_states=torch.empty(1, *text_shape), return_dict=False)
    return 3 * counter.get_total_flops()


def peak_flops_per_s(device_name: str, precision: str) -> float | None:
    """A device's peak, without sparsity.

    Args:
        device_name: As ``torch.cuda.get_device_name`` gives it.
        precision: Of the training.

    Returns:
        FLOP/s; None for a device that is not known, and in fp32, where it depends on settings of the matrix units.
    """
    if precision not in ("bf16", "fp16") or _SLICED in device_name:
        return None
    return next((peak for name, peak in _HALF_PRECISION_PEAKS if re.search(rf"\b{name}\b", device_name)), None)


def peak_images_per_s(
    unet: UNet2DConditionModel,
    latent_px: int,
    text_shape: tuple[int, int],
    *,
    device: torch.device,
    precision: str,
    num_devices: int,
) -> float | None:
    """Images a second at the devices' peak, all of them like this one.

    Returns:
        None on a CPU, and where the peak is not known; nothing is counted then.
    """
    if device.type != "cuda":
        return None
    peak = peak_flops_per_s(torch.cuda.get_device_name(device), precision)
    return None if peak is None else num_devices * peak / training_flops_per_image(unet, latent_px, text_shape)
