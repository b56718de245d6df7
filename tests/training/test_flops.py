"""What a step costs, by shapes alone; and against a count by hand."""

import pytest
import torch

from model.specs import SD2_UNET_CONFIG
from model.unet import build_unet
from tests.training.conftest import TINY_UNET, WIDTH
from training.flops import peak_flops_per_s, peak_images_per_s, training_flops_per_image

WIDE_UNET = TINY_UNET | {"in_channels": 9}


def test_stable_diffusion_2_at_512_px():
    """2.413 TFLOP an image; 0.02 % more than with four channels."""
    with torch.device("meta"):
        unet = build_unet(SD2_UNET_CONFIG | {"in_channels": 9})
    assert training_flops_per_image(unet, 64, (77, 1024)) == pytest.approx(2.413e12, rel=2e-4)


def test_a_tiny_unet_counted_by_hand():
    """Hooks on every convolution and linear layer, and the attentions' two matmuls."""
    unet, latent_px, flops = build_unet(WIDE_UNET), 4, 0

    def count(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal flops
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        num_outputs = output[:, 0].numel() if weight.dim() == 4 else output.numel() // output.shape[-1]
        flops += 2 * num_outputs * weight.numel()

    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    num_attentions = {name: module for name, module in unet.named_modules() if name.endswith(("attn1", "attn2"))}
    for name, module in num_attentions.items():

        def attend(_: object, args: tuple[torch.Tensor, ...], output: torch.Tensor, name: str = name) -> None:
            nonlocal flops
            num_queries, width = output.shape[-2:]
            flops += 2 * 2 * num_queries * (num_queries if name.endswith("attn1") else 77) * width

        module.register_forward_hook(attend)
    with torch.no_grad():
        unet(torch.zeros(1, 9, latent_px, latent_px), torch.zeros(1), encoder_hidden_states=torch.zeros(1, 77, WIDTH))
    assert num_attentions
    assert training_flops_per_image(unet, latent_px, (77, WIDTH)) == 3 * flops


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA L40", "bf16", None),
        ("Some other device", "bf16", None),
    ],
)
def test_peaks_are_those_of_known_devices(name: str, precision: str, peak: float | None):
    assert peak_flops_per_s(name, precision) == peak


def test_a_cpu_has_no_peak():
    unet = build_unet(WIDE_UNET)
    found = peak_images_per_s(unet, 4, (77, WIDTH), device=torch.device("cpu"), precision="bf16", num_devices=2)
    assert found is None


def test_a_known_device_has_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    unet, cuda = build_unet(WIDE_UNET), torch.device("cuda", 0)
    found = peak_images_per_s(unet, 4, (77, WIDTH), device=cuda, precision="bf16", num_devices=2)
    assert found == pytest.approx(2 * 989e12 / training_flops_per_image(unet, 4, (77, WIDTH)))
