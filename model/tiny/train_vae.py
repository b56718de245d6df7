"""Trains the tiny VAE: factor 8, 4 latent channels, the AutoencoderKL class of the full one."""

import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]  # diffusers exports lazily
from torch import Tensor
from torch.nn import functional

from model.tiny.corpus import TRAINING_SEED, Corpus, render

LOGGER = logging.getLogger(__name__)

VAE_CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 48, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 64,
}
KL_WEIGHT = 2e-6
LEARNING_RATE = 2e-3
BATCH_SIZE = 32


def train_vae(output: Path, *, num_steps: int, num_pictures: int, cache: Path) -> None:
    """Trains and writes ``output/config.json`` and ``output/diffusion_pytorch_model.safetensors`` (fp16).

    The scaling factor written to the config is 1 / the standard deviation of sampled latents over the corpus, as
    Stable Diffusion's 0.18215 was found.

    Args:
        output: The folder to write.
        num_steps: Optimizer steps.
        num_pictures: Size of the corpus.
        cache: Folder for drawn pictures.
    """
    torch.manual_seed(0)
    corpus = render(TRAINING_SEED, 0, num_pictures, cache=cache)
    vae = AutoencoderKL(**VAE_CONFIG).train()
    LOGGER.info("VAE: %d parameters", sum(p.numel() for p in vae.parameters()))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, num_steps, pct_start=0.05)
    draws = np.random.default_rng(0)
    for step in range(num_steps):
        pixels = _batch(corpus, draws)
        loss, mse = _loss(vae, pixels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == num_steps - 1:
            LOGGER.info("VAE step %d: loss %.4f, PSNR %.2f dB", step, loss.item(), 10 * np.log10(4 / mse.item()))
    vae.eval().register_to_config(scaling_factor=_scaling_factor(vae, corpus))
    vae.half().save_pretrained(output, safe_serialization=True)


def _batch(corpus: Corpus, draws: np.random.Generator) -> Tensor:
    images = torch.from_numpy(corpus.images[draws.integers(len(corpus.images), size=BATCH_SIZE)])
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def _loss(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(pixels).latent_dist  # pyright: ignore[reportAttributeAccessIssue]  # return type is a union with tuple
        decoded = vae.decode(posterior.sample()).sample  # pyright: ignore[reportAttributeAccessIssue]
    decoded = decoded.float()
    mse = functional.mse_loss(decoded, pixels)
    edges = functional.l1_loss(decoded.diff(dim=-1), pixels.diff(dim=-1)) + functional.l1_loss(
        decoded.diff(dim=-2), pixels.diff(dim=-2)
    )
    return functional.l1_loss(decoded, pixels) + mse + 0.5 * edges + KL_WEIGHT * posterior.kl().float().mean(), mse


@torch.no_grad()
def _scaling_factor(vae: AutoencoderKL, corpus: Corpus) -> float:
    torch.manual_seed(0)
    pixels = _batch(corpus, np.random.default_rng(1))
    latents = vae.encode(pixels).latent_dist.sample()  # pyright: ignore[reportAttributeAccessIssue]
    return round(1 / latents.std().item(), 5)
