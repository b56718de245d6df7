"""The objective's algebra at every one of the 1000 timesteps: an independent float64 formula, and diffusers.

diffusers' own schedule is float32. As it is, its results differ from ours by that rounding (3e-7 on √ᾱ; 7e-5 of the
SNR at timestep 0, where 1 − ᾱ cancels). Given a float64 schedule, it is compared to 1e-6 of each value.
"""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import compute_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from model import objective
from model.schedule import alphas_cumprod, snr

T = torch.arange(1000)
SHAPE = (1000, 4, 3, 5)
KINDS = [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
both_types = pytest.mark.parametrize(("prediction_type", "zero_terminal_snr"), KINDS)
both_schedules = pytest.mark.parametrize("zero_terminal_snr", [False, True])


def numpy_alphas_cumprod(*, zero_terminal_snr: bool) -> np.ndarray:
    """ᾱ in float64, from the papers' formulas alone."""
    betas = (np.sqrt(0.00085) + (np.sqrt(0.012) - np.sqrt(0.00085)) * np.arange(1000) / 999) ** 2
    alpha_bar = np.exp(np.log1p(-betas).cumsum())
    if zero_terminal_snr:
        root = np.sqrt(alpha_bar)
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alpha_bar


def scheduler(kind: Any, *, zero_terminal_snr: bool, is_float64: bool = False) -> Any:
    made = kind(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=zero_terminal_snr,
        clip_sample=False,
    )
    if is_float64:
        made.alphas_cumprod = torch.from_numpy(numpy_alphas_cumprod(zero_terminal_snr=zero_terminal_snr))
    return made


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.rand(SHAPE) * 2 - 1


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.rand(SHAPE) * 2 - 1


def close(ours: torch.Tensor, theirs: torch.Tensor | np.ndarray) -> None:
    theirs = torch.as_tensor(theirs)
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-6, atol=1e-6)


@both_schedules
def test_the_schedule(zero_terminal_snr):
    ours = alphas_cumprod(zero_terminal_snr=zero_terminal_snr)
    expected = numpy_alphas_cumprod(zero_terminal_snr=zero_terminal_snr)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-10, atol=1e-15)
    for kind in (DDPMScheduler, DDIMScheduler):
        close(ours, scheduler(kind, zero_terminal_snr=zero_terminal_snr).alphas_cumprod)


@both_schedules
@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
def test_add_noise_and_velocity(latents, noise, kind, zero_terminal_snr):
    ours = alphas_cumprod(zero_terminal_snr=zero_terminal_snr)
    a, s = (
        np.sqrt(x).reshape(-1, 1, 1, 1)
        for x in (numpy_alphas_cumprod(zero_terminal_snr=zero_terminal_snr), 1 - ours.numpy())
    )
    x0, eps = latents.double().numpy(), noise.double().numpy()
    noisy, velocity = (f(latents, noise, T, ours) for f in (objective.add_noise, objective.velocity))
    theirs = scheduler(kind, zero_terminal_snr=zero_terminal_snr)
    close(noisy, a * x0 + s * eps)
    close(noisy, theirs.add_noise(latents, noise, T))
    close(velocity, a * eps - s * x0)
    close(velocity, theirs.get_velocity(latents, noise, T))
    assert noisy.dtype == velocity.dtype == torch.float32


@both_types
def test_what_a_prediction_implies(latents, noise, prediction_type, zero_terminal_snr):
    """For any prediction, not only the right one. ε is divided by √ᾱ, so that its x0 is compared relative to 1 / √ᾱ."""
    schedule = alphas_cumprod(zero_terminal_snr=zero_terminal_snr)
    numpy_schedule = numpy_alphas_cumprod(zero_terminal_snr=zero_terminal_snr)
    a, s = (np.sqrt(x).reshape(-1, 1, 1, 1) for x in (numpy_schedule, 1 - numpy_schedule))
    prediction, noisy = latents, noise
    wide_prediction, wide_noisy = prediction.double().numpy(), noisy.double().numpy()
    x0 = objective.predicted_latents(prediction_type, prediction, noisy, T, schedule)
    eps = objective.predicted_noise(prediction_type, prediction, noisy, T, schedule)
    if prediction_type == "epsilon":
        close(x0 * torch.from_numpy(a), wide_noisy - s * wide_prediction)
        close(eps, wide_prediction)
    else:
        close(x0, a * wide_noisy - s * wide_prediction)
        close(eps, s * wide_noisy + a * wide_prediction)
    theirs = scheduler(DDIMScheduler, zero_terminal_snr=zero_terminal_snr, is_float64=True)
    theirs.register_to_config(prediction_type=prediction_type)
    theirs.set_timesteps(1000)
    for t in T.tolist():
        x0_there = theirs.step(prediction[t : t + 1].double(), t, noisy[t : t + 1].double()).pred_original_sample
        scale = float(a[t].item()) if prediction_type == "epsilon" else 1.0
        close(x0[t : t + 1] * scale, x0_there * scale)


@both_schedules
@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_snr_and_min_snr_weights(zero_terminal_snr, gamma):
    ours = alphas_cumprod(zero_terminal_snr=zero_terminal_snr)
    alpha_bar = numpy_alphas_cumprod(zero_terminal_snr=zero_terminal_snr)
    ratio = alpha_bar / (1 - alpha_bar)
    theirs = compute_snr(scheduler(DDPMScheduler, zero_terminal_snr=zero_terminal_snr, is_float64=True), T)
    torch.testing.assert_close(snr(ours), torch.from_numpy(ratio), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(snr(ours), theirs.double(), rtol=1e-6, atol=1e-9)

    of_v = objective.min_snr_weights("v_prediction", T, ours, gamma)
    close(of_v, np.minimum(ratio, gamma) / (ratio + 1))
    close(of_v, torch.minimum(theirs, torch.tensor(gamma)) / (theirs + 1))
    of_epsilon = objective.min_snr_weights("epsilon", T, ours, gamma)
    has_signal = ratio > 0
    expected = np.minimum(ratio[has_signal], gamma) / ratio[has_signal]
    close(of_epsilon[torch.from_numpy(has_signal)], expected)
    assert has_signal.sum() == 1000 - int(zero_terminal_snr)


@settings(deadline=None, max_examples=40)  # a busy machine is no failure
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31 - 1),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    timesteps=st.lists(st.integers(0, 999), min_size=1, max_size=5),
    scale=st.floats(1e-3, 1e3),
)
def test_a_perfect_prediction_gives_back_latents_and_noise_for_any_shape(kind, seed, shape, timesteps, scale):
    """In float64 the ways to say it are one: what is noised comes back, and (x_t, v) keeps the length of (x0, ε)."""
    prediction_type, zero_terminal_snr = kind
    generator = torch.Generator().manual_seed(seed)
    size = (len(timesteps), *shape)
    x0, eps = (scale * torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
    t, schedule = torch.tensor(timesteps), alphas_cumprod(zero_terminal_snr=zero_terminal_snr)
    noisy = objective.add_noise(x0, eps, t, schedule)
    velocity = objective.velocity(x0, eps, t, schedule)
    perfect = objective.target(prediction_type, x0, eps, t, schedule)
    arguments = (prediction_type, perfect, noisy, t, schedule)
    tolerance = {"rtol": 1e-9, "atol": 1e-11 * scale}
    torch.testing.assert_close(objective.predicted_latents(*arguments), x0, **tolerance)
    torch.testing.assert_close(objective.predicted_noise(*arguments), eps, **tolerance)
    torch.testing.assert_close(noisy**2 + velocity**2, x0**2 + eps**2, rtol=1e-9, atol=1e-11 * scale**2)
    together = objective.add_noise(x0.float(), eps.float(), t, schedule)
    alone = [
        objective.add_noise(x0[i : i + 1].float(), eps[i : i + 1].float(), t[i : i + 1], schedule)
        for i in range(len(t))
    ]
    assert torch.equal(together, torch.cat(alone)), "a sample's noisy latents do not depend on its batch"
