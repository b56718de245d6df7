"""What the objective does at its edges; its algebra at every timestep is in test_objective_equality.py."""

import pytest
import torch

from model import objective
from model.schedule import alphas_cumprod

SCHEDULE = alphas_cumprod()
TIMESTEPS = torch.tensor([0, 1, 500, 998, 999])


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(5, 4, 8, 8, generator=generator), torch.randn(5, 4, 8, 8, generator=generator)


def test_velocity_is_defined_without_signal(pair):
    latents, noise = pair
    schedule = alphas_cumprod(zero_terminal_snr=True)
    t = torch.full((5,), 999)
    torch.testing.assert_close(objective.add_noise(latents, noise, t, schedule), noise)
    torch.testing.assert_close(objective.velocity(latents, noise, t, schedule), -latents)


def test_low_precision_latents_are_noised_in_float32(pair):
    latents, noise = (x.bfloat16() for x in pair)
    ours = objective.add_noise(latents, noise, TIMESTEPS, SCHEDULE)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, objective.add_noise(latents.float(), noise.float(), TIMESTEPS, SCHEDULE))


def test_min_snr_weights_mean_the_same_in_x0_space():
    t = torch.arange(1000)
    ratio = SCHEDULE / (1 - SCHEDULE)
    expected = ratio.clamp(max=5)
    epsilon = objective.min_snr_weights("epsilon", t, SCHEDULE, gamma=5.0).double() * ratio
    velocity = objective.min_snr_weights("v_prediction", t, SCHEDULE, gamma=5.0).double() * (ratio + 1)
    torch.testing.assert_close(epsilon, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(velocity, expected, rtol=1e-6, atol=0)
    last = torch.tensor([999])
    schedule = alphas_cumprod(zero_terminal_snr=True)
    assert objective.min_snr_weights("epsilon", last, schedule, gamma=5.0) == 1
    assert objective.min_snr_weights("v_prediction", last, schedule, gamma=5.0) == 0


def test_loss_is_the_mean_over_each_whole_latent(pair):
    prediction, target = pair
    loss = objective.per_sample_loss(prediction, target)
    assert loss.shape == (5,)
    torch.testing.assert_close(loss.mean(), torch.nn.functional.mse_loss(prediction, target))
    torch.testing.assert_close(loss[2], torch.nn.functional.mse_loss(prediction[2], target[2]))
    assert objective.per_sample_loss(prediction.half(), target.half()).dtype == torch.float32


def test_unknown_prediction_type_and_gamma_are_refused(pair):
    latents, noise = pair
    with pytest.raises(ValueError, match="gamma is 0"):
        objective.min_snr_weights("epsilon", TIMESTEPS, SCHEDULE, gamma=0.0)
    with pytest.raises(Exception, match="sample"):  # beartype refuses the literal under pytest, ValueError without it
        objective.target("sample", latents, noise, TIMESTEPS, SCHEDULE)  # pyright: ignore[reportArgumentType]  # on purpose
