import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from model import objective
from model.schedule import alphas_cumprod

SCHEDULE = alphas_cumprod()
TIMESTEPS = torch.tensor([0, 1, 500, 998, 999])


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(5, 4, 8, 8, generator=generator), torch.randn(5, 4, 8, 8, generator=generator)


def test_equals_diffusers(pair):
    latents, noise = pair
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    theirs = scheduler.add_noise(latents, noise, TIMESTEPS)  # pyright: ignore[reportArgumentType]  # IntTensor
    torch.testing.assert_close(objective.add_noise(latents, noise, TIMESTEPS, SCHEDULE), theirs, rtol=1e-5, atol=1e-5)
    theirs = scheduler.get_velocity(latents, noise, TIMESTEPS)  # pyright: ignore[reportArgumentType]  # IntTensor
    torch.testing.assert_close(objective.velocity(latents, noise, TIMESTEPS, SCHEDULE), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_gives_back_latents_and_noise(pair, prediction_type):
    latents, noise = (x.double() for x in pair)
    noisy = objective.add_noise(latents, noise, TIMESTEPS, SCHEDULE)
    perfect = objective.target(prediction_type, latents, noise, TIMESTEPS, SCHEDULE)
    args = (prediction_type, perfect, noisy, TIMESTEPS, SCHEDULE)
    torch.testing.assert_close(objective.predicted_latents(*args), latents)
    torch.testing.assert_close(objective.predicted_noise(*args), noise)


def test_noisy_latents_and_velocity_are_a_rotation(pair):
    latents, noise = (x.double() for x in pair)
    noisy = objective.add_noise(latents, noise, TIMESTEPS, SCHEDULE)
    velocity = objective.velocity(latents, noise, TIMESTEPS, SCHEDULE)
    torch.testing.assert_close(noisy**2 + velocity**2, latents**2 + noise**2)


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


@pytest.mark.parametrize(
    ("t", "weight"), [(0, 0.00425), (1, 0.00852), (100, 0.52888), (250, 0.67379), (500, 0.27633), (999, 0.00466)]
)
def test_min_snr_weights_for_v(t, weight):
    ours = objective.min_snr_weights("v_prediction", torch.tensor([t]), SCHEDULE, gamma=5.0)
    assert ours.item() == pytest.approx(weight, abs=6e-6)


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
