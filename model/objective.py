"""The training objective: what is predicted, and the algebra between the ways to say it.

Legend, for one timestep t:
    x0   latents, the clean picture             ε   noise, standard normal
    a    √ᾱ_t                                   s   √(1 − ᾱ_t), so a² + s² = 1
    x_t  noisy latents   = a·x0 + s·ε
    v    velocity        = a·ε − s·x0           (Salimans & Ho 2022, arXiv 2202.00512, appendix D)
    x0   = a·x_t − s·v   = (x_t − s·ε) / a
    ε    = s·x_t + a·v

(x_t, v) is (x0, ε) turned by an angle, which is why the inverses of v need no division and those of ε do: at the
last timestep 1/a is 14.6, and with a zero terminal SNR it does not exist.

The results are float32 (float64 for float64 input) whatever the precision of the input: a cancels against s.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from model.schedule import snr
from model.specs import PREDICTION_TYPES, PredictionType


def add_noise(
    latents: Float[Tensor, " batch *chw"],
    noise: Float[Tensor, " batch *chw"],
    timesteps: Int[Tensor, " batch"],
    alphas_cumprod: Float[Tensor, " T"],
) -> Float[Tensor, " batch *chw"]:
    """Noisy latents x_t = a·x0 + s·ε.

    Args:
        latents: x0, scaled.
        noise: ε, standard normal.
        timesteps: t of each sample, in [0, T).
        alphas_cumprod: ᾱ, float64, on the latents' device.

    Returns:
        x_t, at least float32.
    """
    a, s = _coefficients(timesteps, alphas_cumprod, latents)
    return a * latents + s * noise


def velocity(
    latents: Float[Tensor, " batch *chw"],
    noise: Float[Tensor, " batch *chw"],
    timesteps: Int[Tensor, " batch"],
    alphas_cumprod: Float[Tensor, " T"],
) -> Float[Tensor, " batch *chw"]:
    """Velocity v = a·ε − s·x0. Arguments as for `add_noise`."""
    a, s = _coefficients(timesteps, alphas_cumprod, latents)
    return a * noise - s * latents


def target(
    prediction_type: PredictionType,
    latents: Float[Tensor, " batch *chw"],
    noise: Float[Tensor, " batch *chw"],
    timesteps: Int[Tensor, " batch"],
    alphas_cumprod: Float[Tensor, " T"],
) -> Float[Tensor, " batch *chw"]:
    """What the UNet's output should be.

    Args:
        prediction_type: `epsilon` (the noise) or `v_prediction` (the velocity).
        latents: x0, scaled.
        noise: ε.
        timesteps: t of each sample, in [0, T).
        alphas_cumprod: ᾱ, float64, on the latents' device.

    Raises:
        ValueError: another prediction type.
    """
    if _is_velocity(prediction_type):
        return velocity(latents, noise, timesteps, alphas_cumprod)
    return noise.to(torch.promote_types(noise.dtype, torch.float32))


def predicted_latents(
    prediction_type: PredictionType,
    prediction: Float[Tensor, " batch *chw"],
    noisy_latents: Float[Tensor, " batch *chw"],
    timesteps: Int[Tensor, " batch"],
    alphas_cumprod: Float[Tensor, " T"],
) -> Float[Tensor, " batch *chw"]:
    """The clean latents x0 that a prediction implies: a·x_t − s·v, or (x_t − s·ε) / a.

    With `epsilon` and ᾱ_t = 0 the result is infinite: a zero terminal SNR goes with `v_prediction` only.
    """
    a, s = _coefficients(timesteps, alphas_cumprod, noisy_latents)
    if _is_velocity(prediction_type):
        return a * noisy_latents - s * prediction
    return (noisy_latents - s * prediction) / a


def predicted_noise(
    prediction_type: PredictionType,
    prediction: Float[Tensor, " batch *chw"],
    noisy_latents: Float[Tensor, " batch *chw"],
    timesteps: Int[Tensor, " batch"],
    alphas_cumprod: Float[Tensor, " T"],
) -> Float[Tensor, " batch *chw"]:
    """The noise ε that a prediction implies: s·x_t + a·v, or the prediction itself."""
    if not _is_velocity(prediction_type):
        return prediction.to(torch.promote_types(prediction.dtype, torch.float32))
    a, s = _coefficients(timesteps, alphas_cumprod, noisy_latents)
    return s * noisy_latents + a * prediction


def min_snr_weights(
    prediction_type: PredictionType,
    timesteps: Int[Tensor, " batch"],
    alphas_cumprod: Float[Tensor, " T"],
    gamma: float,
) -> Float[Tensor, " batch"]:
    """Min-SNR-γ loss weights: min(SNR, γ) / SNR for `epsilon`, min(SNR, γ) / (SNR + 1) for `v_prediction`.

    In x0 space both amount to min(SNR, γ). For v with γ = 5 the mean weight is 0.29 and the noisiest timesteps, which
    decide what fills a large hole, get almost none: this is an option, not the default.

    Args:
        prediction_type: what the loss is taken on.
        timesteps: t of each sample.
        alphas_cumprod: ᾱ, float64.
        gamma: the cap on the SNR, above 0 (the paper uses 5).

    Returns:
        float32 weights in (0, 1]; 0 for v at a timestep without signal.

    Source: Hang et al. 2023 (arXiv 2303.09556), eq. 8 and section 3.4.
    """
    if gamma <= 0:
        raise ValueError(f"gamma is {gamma}: it must be above 0")
    ratio = snr(alphas_cumprod[timesteps])
    if _is_velocity(prediction_type):
        return (ratio.clamp(max=gamma) / (ratio + 1)).float()
    return (gamma / ratio).clamp(max=1).float()  # in this form 1 at SNR = 0, where min(SNR, γ) / SNR would be 0 / 0


def per_sample_loss(
    prediction: Float[Tensor, " batch *chw"], target: Float[Tensor, " batch *chw"]
) -> Float[Tensor, " batch"]:
    """Mean squared error of each sample over its whole latent, in float32: the mask does not weight it.

    Args:
        prediction: the UNet's output.
        target: what `target` gave.

    Returns:
        one loss per sample; their mean (after weights, if any) is the training loss.
    """
    return (prediction.float() - target.float()).square().flatten(start_dim=1).mean(dim=1)


def _coefficients(
    timesteps: Int[Tensor, " batch"], alphas_cumprod: Float[Tensor, " T"], like: Float[Tensor, " batch *chw"]
) -> tuple[Tensor, Tensor]:
    """(a, s) of each sample, shaped to broadcast over `like` and at least float32."""
    alpha_bar = alphas_cumprod[timesteps].reshape(-1, *(1,) * (like.ndim - 1))
    dtype = torch.promote_types(like.dtype, torch.float32)
    return alpha_bar.sqrt().to(dtype), (1 - alpha_bar).sqrt().to(dtype)


def _is_velocity(prediction_type: str) -> bool:
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction_type!r}: choose one of {', '.join(PREDICTION_TYPES)}")
    return prediction_type == "v_prediction"
