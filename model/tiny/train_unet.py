"""Trains the tiny base: a 4-channel text-to-image UNet with the v-objective, as SD2's `768-v-ema` is."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]  # diffusers exports lazily
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from model.encoders import encode_moments, images_to_pixels, load_text_encoder, load_vae, sample_latents
from model.objective import add_noise, per_sample_loss, target
from model.schedule import alphas_cumprod
from model.tiny.corpus import TRAINING_SEED, Corpus, render
from model.unet import build_unet

LOGGER = logging.getLogger(__name__)

UNET_CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [80, 96],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": [5, 6],  # the number of heads, as in SD2's config: 16 channels each
    "norm_num_groups": 16,
    "use_linear_projection": True,
}
BATCH_SIZE = 64
LEARNING_RATE = 1.5e-3
TEXT_DROPOUT = 0.1
EMA_DECAY = 0.999
MAX_SHARD_SIZE = "3MB"
CHECKPOINT_EVERY = 1000


def train_unet(output: Path, weights: Path, *, num_steps: int, num_pictures: int, cache: Path) -> None:
    """Trains and writes a diffusers UNet (fp16, EMA weights, in shards) and ``scheduler_config.json`` beside it.

    Args:
        output: The folder to write: ``unet/`` and ``scheduler/`` under it.
        weights: Where the trained ``vae/`` and ``open_clip/`` stand.
        num_steps: Optimizer steps.
        num_pictures: Size of the corpus.
        cache: Folder for drawn pictures.
    """
    torch.manual_seed(0)
    corpus = render(TRAINING_SEED, 0, num_pictures, cache=cache)
    moments, embeddings, scaling_factor = _encoded(corpus, weights)
    unet = build_unet(UNET_CONFIG).train()
    # The fused attention's backward is slow on a CPU for heads this small: 0.70 s a step against 0.39 s.
    unet.set_attn_processor(AttnProcessor())
    LOGGER.info("UNet: %d parameters", sum(p.numel() for p in unet.parameters()))
    ema = build_unet(UNET_CONFIG).requires_grad_(False)
    ema.load_state_dict(unet.state_dict())
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, num_steps, pct_start=0.05)
    alphas = alphas_cumprod()
    draws = np.random.default_rng(0)
    running = 1.0
    for step in range(num_steps):
        rows = torch.from_numpy(draws.integers(len(moments), size=BATCH_SIZE))
        drop = torch.rand(BATCH_SIZE) < TEXT_DROPOUT
        text = embeddings[torch.where(drop, len(embeddings) - 1, rows)].float()
        latents = sample_latents(moments[rows], torch.randn(BATCH_SIZE, 4, *moments.shape[2:]), scaling_factor)
        loss = _loss(unet, latents, text, alphas)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        _update(ema, unet, min(EMA_DECAY, (1 + step) / (10 + step)))
        running += (loss.item() - running) * 0.02
        if step % 200 == 0 or step == num_steps - 1:
            LOGGER.info("UNet step %d: loss %.4f (running)", step, running)
        if step % CHECKPOINT_EVERY == CHECKPOINT_EVERY - 1 or step == num_steps - 1:
            _write(output, ema)


def _encoded(corpus: Corpus, weights: Path) -> tuple[Tensor, Tensor, float]:
    """Moments of all pictures; fp16 embeddings of all captions and, last, of the empty one; the scaling factor."""
    vae, encoder = load_vae(weights / "vae"), load_text_encoder(weights / "open_clip", load_image_tower=False)
    captions = [*corpus.captions, ""]
    starts = range(0, len(captions), 128)
    moments = [
        encode_moments(vae, images_to_pixels(corpus.images[i : i + 128])) for i in starts if i < len(corpus.images)
    ]
    embeddings = [encoder.embed_captions(captions[i : i + 128]).half() for i in starts]
    return torch.cat(moments), torch.cat(embeddings), float(vae.config["scaling_factor"])


def _loss(unet: UNet2DConditionModel, latents: Tensor, text: Tensor, alphas: Tensor) -> Tensor:
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, len(alphas), (len(latents),))
    noisy = add_noise(latents, noise, timesteps, alphas)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = unet(noisy, timesteps, text).sample
    return per_sample_loss(prediction, target("v_prediction", latents, noise, timesteps, alphas)).mean()


@torch.no_grad()
def _update(ema: torch.nn.Module, unet: torch.nn.Module, decay: float) -> None:
    for average, weight in zip(ema.parameters(), unet.parameters(), strict=True):
        average.lerp_(weight, 1 - decay)


def _write(output: Path, ema: UNet2DConditionModel) -> None:
    half = build_unet(UNET_CONFIG)
    half.load_state_dict(ema.state_dict())
    half.half().save_pretrained(output / "unet", safe_serialization=True, max_shard_size=MAX_SHARD_SIZE)
    scheduler = {
        "_class_name": "DDIMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "v_prediction",
    }
    (output / "scheduler").mkdir(parents=True, exist_ok=True)
    (output / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
