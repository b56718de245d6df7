import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from model.schedule import alphas_cumprod, betas, snr

# t, beta, alphas_cumprod, SNR: computed from the published schedule.
PUBLISHED = [
    (0, 8.500000e-4, 0.99915000, 1175.47),
    (1, 8.546987e-4, 0.99829603, 585.864),
    (100, 1.383973e-3, 0.89422348, 8.45389),
    (250, 2.427761e-3, 0.67379263, 2.06553),
    (500, 4.814954e-3, 0.27633268, 0.38185),
    (750, 8.011579e-3, 0.05616985, 0.0595127),
    (981, 1.168476e-2, 0.00577550, 0.0058090),
    (999, 1.200000e-2, 0.00466010, 0.0046819),
]


@pytest.mark.parametrize(("t", "beta", "alpha_bar", "ratio"), PUBLISHED)
def test_published_numbers(t, beta, alpha_bar, ratio):
    assert betas()[t].item() == pytest.approx(beta, rel=1e-6)
    assert alphas_cumprod()[t].item() == pytest.approx(alpha_bar, abs=5e-9)
    assert snr(alphas_cumprod())[t].item() == pytest.approx(ratio, rel=2e-5)


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
