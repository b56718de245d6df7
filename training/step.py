"""One training step, as pure functions: what is drawn, and the loss of it.

Every random number is drawn per sample from a stream named (seed, batch's number, uid). So a sample's draws depend
neither on what else is in its batch, nor on the process that takes it, nor on how often the run was resumed.

Legend: x_t noisy latents; t timestep; c latent channels (4); T number of timesteps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from model.encoders import sample_latents
from model.objective import add_noise, min_snr_weights, per_sample_loss, target
from model.randomness import stream
from model.specs import PredictionType
from model.unet import unet_input
from training.batch import Batch, Constants


@dataclass(frozen=True)
class Draws:
    """All that is random about a batch at one step.

    Attributes:
        posterior_noise: (batch, c, h, w), for the latents' draw from the VAE's posterior.
        masked_posterior_noise: (batch, c, h, w), likewise for the masked picture.
        noise: (batch, c, h, w), of the diffusion.
        timesteps: (batch,) in [0, T).
        drops_text: (batch,), where the caption is replaced by the empty one.
        is_full_mask: (batch,), where the mask is replaced by all ones.
    """

    posterior_noise: Float[Tensor, "batch c h w"]
    masked_posterior_noise: Float[Tensor, "batch c h w"]
    noise: Float[Tensor, "batch c h w"]
    timesteps: Int[Tensor, " batch"]
    drops_text: Bool[Tensor, " batch"]
    is_full_mask: Bool[Tensor, " batch"]


@dataclass(frozen=True)
class StepLoss:
    """What a batch cost.

    Attributes:
        loss: Mean over the batch of weight × loss; what is differentiated.
        per_sample: (batch,), mean squared errors over the whole latents, unweighted, detached.
        weights: (batch,), all ones without min-SNR-γ.
        timesteps: (batch,).
        is_full_mask: (batch,), where the UNet saw a mask of all ones, drawn now or stored.
    """

    loss: Float[Tensor, ""]
    per_sample: Float[Tensor, " batch"]
    weights: Float[Tensor, " batch"]
    timesteps: Int[Tensor, " batch"]
    is_full_mask: Bool[Tensor, " batch"]


@runtime_checkable
class Denoiser(Protocol):
    """A diffusers UNet, or the DeepSpeed engine around one."""

    def __call__(
        self, sample: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor, return_dict: bool
    ) -> tuple[Tensor, ...]:
        """Returns the prediction, alone in a tuple."""
        ...


def draw(
    uids: Sequence[str],
    *,
    seed: int,
    step: int,
    latent_shape: tuple[int, int, int],
    num_timesteps: int,
    text_dropout: float,
    full_mask: float,
) -> Draws:
    """Draws the random numbers of a batch: sample by sample, from streams of their own.

    Args:
        uids: The samples.
        seed: The training's.
        step: From 0; one that was tried in vain has had its number.
        latent_shape: (c, h, w).
        num_timesteps: T; timesteps are uniform.
        text_dropout: Probability that a caption is replaced, in [0, 1].
        full_mask: Probability that a mask is replaced, in [0, 1]; independent of the caption's.

    Returns:
        The draws, on the CPU; noise in float32.
    """
    normals = torch.empty(len(uids), 3, *latent_shape)
    timesteps = torch.empty(len(uids), dtype=torch.int64)
    coins = torch.empty(len(uids), 2, dtype=torch.float64)
    for i, uid in enumerate(uids):
        rng = stream("step", seed, step, uid)
        timesteps[i] = int(rng.integers(num_timesteps))
        coins[i] = torch.from_numpy(rng.random(2))
        rng.standard_normal(dtype="float32", out=normals[i].numpy())
    return Draws(
        posterior_noise=normals[:, 0],
        masked_posterior_noise=normals[:, 1],
        noise=normals[:, 2],
        timesteps=timesteps,
        drops_text=coins[:, 0] < text_dropout,
        is_full_mask=coins[:, 1] < full_mask,
    )


def with_full_masks(
    mask: Float[Tensor, "batch 1 h w"],
    masked_moments: Float[Tensor, "batch c2 h w"],
    is_full_mask: Bool[Tensor, " batch"],
    full_mask_moments: Float[Tensor, "c2 h w"],
) -> tuple[Float[Tensor, "batch 1 h w"], Float[Tensor, "batch c2 h w"]]:
    """Replaces some masks by all ones, and their masked moments by those of a picture that is all hole."""
    where = is_full_mask[:, None, None, None]
    return torch.where(where, 1.0, mask), torch.where(where, full_mask_moments.to(masked_moments.dtype), masked_moments)


def with_text_dropout(
    text_embeddings: Float[Tensor, "batch tokens width"],
    drops_text: Bool[Tensor, " batch"],
    null_text_embedding: Float[Tensor, "tokens width"],
) -> Float[Tensor, "batch tokens width"]:
    """Replaces some captions' embeddings by the empty caption's."""
    return torch.where(drops_text[:, None, None], null_text_embedding.to(text_embeddings.dtype), text_embeddings)


def training_loss(
    unet: Denoiser,
    batch: Batch,
    draws: Draws,
    constants: Constants,
    *,
    prediction_type: PredictionType,
    scaling_factor: float,
    alphas_cumprod: Float[Tensor, " T"],
    device: torch.device,
    min_snr_gamma: float | None = None,
    channels_last: bool = False,
) -> StepLoss:
    """The loss of a batch: mean squared error of the prediction, over the whole latent: the mask does not weight it.

    The mask and the masked latents are conditioning: they are neither noised nor dropped.

    Args:
        unet: Reads 2c + 1 channels.
        batch: The samples, complete: what the dataset does not store, `training.online` has made.
        draws: What is random about them.
        constants: The dataset's.
        prediction_type: What the UNet predicts.
        scaling_factor: The VAE's.
        alphas_cumprod: ᾱ, float64, on `device`.
        device: Where the UNet is.
        min_snr_gamma: γ of the loss weights by timestep; None weighs every timestep alike.
        channels_last: Whether the UNet's input is laid out with its channels innermost.

    Returns:
        The mean, with gradient; and, sample by sample, what it was made of.
    """
    assert batch.mask is not None
    assert batch.masked_moments is not None
    assert batch.moments is not None
    assert batch.text_embeddings is not None
    mask, masked_moments = with_full_masks(
        batch.mask.to(device),
        batch.masked_moments.to(device),
        draws.is_full_mask.to(device),
        constants.full_mask_moments.to(device),
    )
    text_embeddings = with_text_dropout(
        batch.text_embeddings.to(device), draws.drops_text.to(device), constants.null_text_embedding.to(device)
    ).float()
    latents = sample_latents(batch.moments.to(device), draws.posterior_noise.to(device), scaling_factor)
    masked_latents = sample_latents(masked_moments, draws.masked_posterior_noise.to(device), scaling_factor)
    noise, timesteps = draws.noise.to(device), draws.timesteps.to(device)
    noisy_latents = add_noise(latents, noise, timesteps, alphas_cumprod)
    sample = unet_input(noisy_latents, mask, masked_latents)
    if channels_last:
        sample = sample.contiguous(memory_format=torch.channels_last)
    prediction = unet(
        sample,
        timesteps,
        encoder_hidden_states=text_embeddings,
        return_dict=False,
    )[0]
    losses = per_sample_loss(prediction, target(prediction_type, latents, noise, timesteps, alphas_cumprod))
    weights = torch.ones_like(losses)
    if min_snr_gamma is not None:
        weights = min_snr_weights(prediction_type, timesteps, alphas_cumprod, min_snr_gamma)
    is_full_mask = (mask > 0.5).flatten(start_dim=1).all(dim=1)
    return StepLoss((weights * losses).mean(), losses.detach(), weights, timesteps, is_full_mask)
