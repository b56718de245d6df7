"""Sampling: DDIM with classifier-free guidance, for inpainting.

Legend as in `objective`: x_t noisy latents, x0 predicted latents, ε predicted noise, ᾱ alphas_cumprod; further
    ᾱ_prev   ᾱ at the next, less noisy timestep
    σ        η · √((1 − ᾱ_prev) / (1 − ᾱ_t)) · √(1 − ᾱ_t / ᾱ_prev)
    x_prev   = √ᾱ_prev · x0 + √(1 − ᾱ_prev − σ²) · ε + σ · fresh noise        (Song et al. 2021, eq. 12 and 16)
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from model.objective import predicted_latents, predicted_noise
from model.randomness import stream
from model.specs import PredictionType, TimestepSpacing
from model.unet import unet_input


def noise_for(
    seed: int, uids: Sequence[str], shape: tuple[int, ...], *, name: str = "noise", step: int = 0
) -> Float[Tensor, " batch *shape"]:
    """Standard normal noise, a stream per sample: a sample's noise does not depend on its batch.

    Args:
        seed: root of the randomness.
        uids: one per sample.
        shape: of one sample, such as (4, 64, 64).
        name: tells apart draws for different purposes.
        step: tells apart draws at different steps.

    Returns:
        float32, on the CPU.
    """
    draws = [stream(name, seed, uid, step).standard_normal(shape, dtype=np.float32) for uid in uids]
    return torch.from_numpy(np.stack(draws))


def timesteps_for(
    num_inference_steps: int,
    *,
    num_train_timesteps: int = 1000,
    timestep_spacing: TimestepSpacing = "leading",
    steps_offset: int = 1,
) -> list[int]:
    """The timesteps of a sampling, from noise to picture.

    Args:
        num_inference_steps: how many, in [1, num_train_timesteps].
        num_train_timesteps: T.
        timestep_spacing: `leading`: 0, T//n, 2 T//n, … plus the offset, so the noisiest timestep is skipped (Stable
            Diffusion); `trailing`: T/n apart from T − 1 down, which a zero terminal SNR needs.
        steps_offset: added to `leading` timesteps; 1 in Stable Diffusion.

    Returns:
        exactly `num_inference_steps` strictly decreasing timesteps in [0, T). (For some numbers, 61 is the least,
        diffusers' `trailing` has one more by a rounding error: timestep −1.)

    Raises:
        ValueError: there are not so many timesteps.

    Source: Lin et al. 2023 (arXiv 2305.08891), table 2; diffusers `DDIMScheduler.set_timesteps`.
    """
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(f"num_inference_steps is {num_inference_steps}: it must be from 1 to {num_train_timesteps}")
    if timestep_spacing == "trailing":
        spaced = np.round(np.arange(num_train_timesteps, 0, -num_train_timesteps / num_inference_steps)) - 1
        spaced = spaced[:num_inference_steps]  # arange's rounding may give one more
        return [int(t) for t in spaced]
    stride = num_train_timesteps // num_inference_steps
    spaced = np.arange(num_inference_steps)[::-1] * stride + steps_offset
    if spaced[0] >= num_train_timesteps:  # only when every timestep is asked for: the offset would leave the schedule
        raise ValueError(
            f"num_inference_steps {num_inference_steps} with steps_offset {steps_offset} passes the last timestep:"
            " lower either"
        )
    return [int(t) for t in spaced]


def ddim_step(
    prediction: Float[Tensor, "batch c h w"],
    noisy_latents: Float[Tensor, "batch c h w"],
    *,
    timestep: int,
    previous_timestep: int,
    prediction_type: PredictionType,
    alphas_cumprod: Float[Tensor, " T"],
    eta: float = 0.0,
    fresh_noise: Float[Tensor, "batch c h w"] | None = None,
) -> Float[Tensor, "batch c h w"]:
    """One step from `timestep` to `previous_timestep`.

    Args:
        prediction: the UNet's output, after guidance.
        noisy_latents: x_t.
        timestep: t.
        previous_timestep: the less noisy timestep; below 0 it means ᾱ_prev = ᾱ_0 (diffusers'
            `set_alpha_to_one=False`), not 1: the latents keep the noise of timestep 0.
        prediction_type: what `prediction` means.
        alphas_cumprod: ᾱ, float64.
        eta: in [0, 1]: 0 is deterministic, 1 has DDPM's variance.
        fresh_noise: standard normal, needed when eta is above 0.

    Returns:
        x_prev, at least float32.

    Raises:
        ValueError: eta out of range, or above 0 without fresh noise; `epsilon` at a timestep without signal.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: it must be from 0 to 1")
    t = torch.full((len(noisy_latents),), timestep, device=noisy_latents.device)
    alphas_cumprod = alphas_cumprod.to(noisy_latents.device)
    alpha, alpha_prev = float(alphas_cumprod[timestep]), float(alphas_cumprod[max(previous_timestep, 0)])
    if alpha == 0 and prediction_type == "epsilon":
        raise ValueError(f"prediction_type is 'epsilon', and timestep {timestep} has no signal: use 'v_prediction'")
    x0 = predicted_latents(prediction_type, prediction, noisy_latents, t, alphas_cumprod)
    noise = predicted_noise(prediction_type, prediction, noisy_latents, t, alphas_cumprod)
    variance = eta**2 * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev))  # σ²; squaring σ would round
    latents = alpha_prev**0.5 * x0 + max(0.0, 1 - alpha_prev - variance) ** 0.5 * noise
    if eta == 0:
        return latents
    if fresh_noise is None:
        raise ValueError(f"eta is {eta}: above 0 each step needs fresh noise")
    return latents + variance**0.5 * fresh_noise


@torch.no_grad()
def sample_inpainting(
    unet: Any,
    *,
    noise: Float[Tensor, "batch c h w"],
    mask: Float[Tensor, "batch 1 h w"],
    masked_image_latents: Float[Tensor, "batch c h w"],
    text_embeddings: Float[Tensor, "batch 77 width"],
    null_embedding: Float[Tensor, "77 width"],
    num_inference_steps: int,
    guidance_scale: float,
    prediction_type: PredictionType,
    alphas_cumprod: Float[Tensor, " T"],
    eta: float = 0.0,
    timestep_spacing: TimestepSpacing = "leading",
    fresh_noise: Callable[[int], Tensor] | None = None,
) -> Float[Tensor, "batch c h w"]:
    """Repaints: from pure noise to latents, conditioned on the rest of the picture and the caption.

    Each step goes T // n timesteps down, as diffusers' do: to the next timestep of the list, or, with `trailing` and an
    n that does not divide T, to its neighbor.

    Guidance moves the prediction away from that of the empty caption; mask and masked image are the same on both
    branches and are never dropped. Latents outside the mask are not copied from the original: see `composite`.

    Args:
        unet: a nine-channel UNet2DConditionModel, or anything called the same way: `unet(sample, timestep,
            encoder_hidden_states, return_dict=False)[0]`.
        noise: standard normal, the starting point; all tensors on the UNet's device.
        mask: {0, 1} on the latent grid, 1 = repaint.
        masked_image_latents: latents of the picture with the hole painted grey, scaled.
        text_embeddings: of the captions.
        null_embedding: of the empty caption.
        num_inference_steps: how many steps.
        guidance_scale: 1 follows the caption without guidance and costs half.
        prediction_type: what the UNet predicts.
        alphas_cumprod: ᾱ, float64, of the schedule that the UNet was trained on.
        eta: 0 is deterministic.
        timestep_spacing: see `timesteps_for`.
        fresh_noise: gives standard normal noise of the latents' shape for a step's index; needed when eta is above 0.

    Returns:
        scaled latents, float32.
    """
    num_train_timesteps = len(alphas_cumprod)
    stride = num_train_timesteps // num_inference_steps
    embeddings = text_embeddings
    if guidance_scale != 1:
        embeddings = torch.cat([null_embedding.to(text_embeddings).expand_as(text_embeddings), text_embeddings])
    latents = noise
    for index, timestep in enumerate(
        timesteps_for(num_inference_steps, num_train_timesteps=num_train_timesteps, timestep_spacing=timestep_spacing)
    ):
        sample = unet_input(latents, mask, masked_image_latents).to(embeddings.dtype)
        if guidance_scale == 1:
            prediction = unet(sample, timestep, embeddings, return_dict=False)[0].float()
        else:
            null, captioned = (
                unet(torch.cat([sample, sample]), timestep, embeddings, return_dict=False)[0].float().chunk(2)
            )
            prediction = null + guidance_scale * (captioned - null)
        latents = ddim_step(
            prediction,
            latents,
            timestep=timestep,
            previous_timestep=timestep - stride,
            prediction_type=prediction_type,
            alphas_cumprod=alphas_cumprod,
            eta=eta,
            fresh_noise=None if fresh_noise is None else fresh_noise(index).to(latents),
        )
    return latents


def composite(
    mask: Float[Tensor, "batch 1 height width"],
    generated: Float[Tensor, "batch 3 height width"],
    original: Float[Tensor, "batch 3 height width"],
) -> Float[Tensor, "batch 3 height width"]:
    """The generated pixels inside the mask, the original ones outside, which the VAE would otherwise have changed.

    Args:
        mask: {0, 1} at full resolution, 1 = repaint.
        generated: pixels from the decoder.
        original: pixels of the picture, in the same range.
    """
    return torch.where(mask > 0.5, generated, original)
