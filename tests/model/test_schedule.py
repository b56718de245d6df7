import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler, rescale_zero_terminal_snr

from model.objective import min_snr_weights
from model.schedule import alphas_cumprod, alphas_cumprod_of, betas, snr
from model.specs import ScheduleSpec

# t, β, ᾱ, √ᾱ, √(1 − ᾱ), SNR, min-SNR-5 weight for v: computed from the published schedule, to the digits given.
PUBLISHED = [
    (0, 8.500000e-4, 0.99915000, 0.999575, 0.029155, 1175.47, 0.00425),
    (1, 8.546987e-4, 0.99829603, 0.999148, 0.041279, 585.864, 0.00852),
    (100, 1.383973e-3, 0.89422348, 0.945634, 0.325233, 8.45389, 0.52888),
    (250, 2.427761e-3, 0.67379263, 0.820849, 0.571146, 2.06553, 0.67379),
    (500, 4.814954e-3, 0.27633268, 0.525674, 0.850686, 0.38185, 0.27633),
    (750, 8.011579e-3, 0.05616985, 0.237002, 0.971509, 0.0595127, 0.05617),
    (981, 1.168476e-2, 0.00577550, 0.075997, 0.997108, 0.0058090, 0.00578),
    (999, 1.200000e-2, 0.00466010, 0.068265, 0.997667, 0.0046819, 0.00466),
]


@pytest.mark.parametrize(("t", "beta", "alpha_bar", "a", "s", "ratio", "weight"), PUBLISHED)
def test_published_numbers(t, beta, alpha_bar, a, s, ratio, weight):
    schedule = alphas_cumprod()
    assert betas()[t].item() == pytest.approx(beta, rel=5e-7)
    assert schedule[t].item() == pytest.approx(alpha_bar, abs=5e-9)
    assert schedule[t].sqrt().item() == pytest.approx(a, abs=5e-7)
    assert (1 - schedule[t]).sqrt().item() == pytest.approx(s, abs=5e-7)
    assert snr(schedule)[t].item() == pytest.approx(ratio, rel=2e-5)
    weights = min_snr_weights("v_prediction", torch.tensor([t]), schedule, gamma=5.0)
    assert weights.item() == pytest.approx(weight, abs=5.1e-6)


def test_where_signal_and_noise_are_equal_and_where_min_snr_5_begins():
    ratio = snr(alphas_cumprod())
    assert (ratio - 1).abs().argmin() == 354
    assert (ratio - 5).abs().argmin() == 146
    weights = min_snr_weights("v_prediction", torch.arange(1000), alphas_cumprod(), gamma=5.0)
    assert weights.mean().item() == pytest.approx(0.294, abs=5e-4)
    assert weights.max().item() == pytest.approx(0.833, abs=5e-4)
    assert abs(int(weights.argmax()) - 146) <= 1


def test_linear_here_and_linear_there_are_two_schedules():
    """CompVis calls "linear" what is linear in √β; diffusers says "scaled_linear", and its "linear" is another."""
    scaled, linear = (
        DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=name) for name in ("scaled_linear", "linear")
    )
    torch.testing.assert_close(alphas_cumprod().float(), scaled.alphas_cumprod, rtol=1e-5, atol=1e-6)
    assert betas()[[0, -1]].tolist() == pytest.approx(linear.betas[[0, -1]].tolist()), "the ends do not tell them apart"
    assert (alphas_cumprod() - linear.alphas_cumprod).abs().max() > 0.1
    assert alphas_cumprod()[500] / linear.alphas_cumprod[500] > 1.3


def test_a_spec_is_a_schedule():
    assert torch.equal(alphas_cumprod_of(ScheduleSpec()), alphas_cumprod())
    spec = ScheduleSpec(num_train_timesteps=10, beta_start=0.1, beta_end=0.2, zero_terminal_snr=True)
    expected = alphas_cumprod(num_train_timesteps=10, beta_start=0.1, beta_end=0.2, zero_terminal_snr=True)
    assert torch.equal(alphas_cumprod_of(spec), expected)
    assert (ScheduleSpec().timestep_spacing, spec.timestep_spacing) == ("leading", "trailing")


def test_schedule_is_decreasing_float64():
    schedule = alphas_cumprod()
    assert schedule.dtype == torch.float64
    assert (schedule.diff() < 0).all()


def test_zero_terminal_snr_equals_diffusers():
    ours = alphas_cumprod(zero_terminal_snr=True)
    assert ours[-1] == 0
    assert ours[0].item() == pytest.approx(alphas_cumprod()[0].item(), abs=1e-15)
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(betas()), dim=0)
    torch.testing.assert_close(ours, theirs)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="beta_start"):
        alphas_cumprod(beta_start=0.5, beta_end=0.1)
    with pytest.raises(ValueError, match="num_train_timesteps"):
        alphas_cumprod(num_train_timesteps=0)
