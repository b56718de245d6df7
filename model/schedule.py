"""The noise schedule: how much of the picture is left at each timestep.

Legend: T number of timesteps; β_t variance added at step t; ᾱ_t = Π (1 − β_i), `alphas_cumprod`;
SNR_t = ᾱ_t / (1 − ᾱ_t).

Everything here is float64: ᾱ is a product of a thousand factors and its complement is needed to full precision.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from model.specs import ScheduleSpec


def betas(
    *, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> Float[Tensor, " T"]:
    """The scaled-linear betas: equally spaced in √β.

    Args:
        num_train_timesteps: T.
        beta_start: β_0, in (0, 1).
        beta_end: β_{T−1}, in (0, 1).

    Returns:
        β in float64, increasing.

    Source: CompVis `ldm/modules/diffusionmodules/util.py` ("linear"), diffusers' `scaled_linear`.
    """
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps is {num_train_timesteps}: it must be at least 1")
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"beta_start {beta_start} and beta_end {beta_end} must satisfy 0 < start <= end < 1")
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2


def alphas_cumprod(
    *,
    num_train_timesteps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    zero_terminal_snr: bool = False,
) -> Float[Tensor, " T"]:
    """The share of the signal's power that is left at each timestep.

    Args:
        num_train_timesteps: T.
        beta_start: β_0.
        beta_end: β_{T−1}.
        zero_terminal_snr: shift and scale √ᾱ so that the first value stays and the last becomes 0.

    Returns:
        ᾱ in float64, strictly decreasing, in (0, 1) — or [0, 1) with `zero_terminal_snr`.

    Source: Ho et al. 2020, eq. 4; Lin et al. 2023 (arXiv 2305.08891), algorithm 1.
    """
    alpha_bar = torch.cumprod(
        1 - betas(num_train_timesteps=num_train_timesteps, beta_start=beta_start, beta_end=beta_end), dim=0
    )
    if not zero_terminal_snr:
        return alpha_bar
    if num_train_timesteps < 2:
        raise ValueError("zero_terminal_snr needs num_train_timesteps of at least 2")
    root = alpha_bar.sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    return root**2


def alphas_cumprod_of(schedule: ScheduleSpec) -> Float[Tensor, " T"]:
    """ᾱ of a schedule, by `alphas_cumprod`."""
    return alphas_cumprod(
        num_train_timesteps=schedule.num_train_timesteps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        zero_terminal_snr=schedule.zero_terminal_snr,
    )


def snr(alphas_cumprod: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Signal-to-noise ratio ᾱ / (1 − ᾱ), element by element."""
    return alphas_cumprod / (1 - alphas_cumprod)
