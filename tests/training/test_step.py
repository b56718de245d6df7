"""What is drawn belongs to the sample; and the loss is the published formula."""

from typing import Any

import pytest
import torch

from model.schedule import alphas_cumprod
from training.data import Batch, Constants
from training.step import Draws, draw, training_loss, with_full_masks, with_text_dropout

SHAPE = (4, 4, 4)
UIDS = [f"{i:032x}" for i in range(16)]


def _draw(uids: list[str], **changes: Any) -> Draws:
    arguments: dict[str, Any] = {
        "seed": 1,
        "step": 7,
        "latent_shape": SHAPE,
        "num_timesteps": 1000,
        "text_dropout": 0.1,
        "full_mask": 0.25,
    }
    return draw(uids, **(arguments | changes))


def _fields(draws: Draws) -> dict[str, torch.Tensor]:
    return vars(draws)


def test_draws_do_not_depend_on_the_batch():
    whole = _fields(_draw(UIDS))
    parts = [_fields(_draw(UIDS[start : start + 4])) for start in range(0, 16, 4)]
    backwards = _fields(_draw(UIDS[::-1]))
    for name, values in whole.items():
        assert torch.equal(values, torch.cat([part[name] for part in parts])), name
        assert torch.equal(values, backwards[name].flip(0)), name


def test_draws_differ_between_samples_steps_and_seeds():
    all_noise = [_draw(UIDS), _draw(UIDS, step=8), _draw(UIDS, seed=2)]
    rows = torch.cat([draws.noise.flatten(1) for draws in all_noise])
    rows = torch.cat([rows, all_noise[0].posterior_noise.flatten(1), all_noise[0].masked_posterior_noise.flatten(1)])
    assert len({row.numpy().tobytes() for row in rows}) == len(rows)


def test_draws_have_the_right_distributions():
    draws = _draw([f"{i:032x}" for i in range(4000)])
    assert abs(draws.drops_text.double().mean().item() - 0.1) < 0.02
    assert abs(draws.is_full_mask.double().mean().item() - 0.25) < 0.03
    both = (draws.drops_text & draws.is_full_mask).double().mean().item()
    assert abs(both - 0.025) < 0.01, "the two coins must be independent"
    assert abs(draws.timesteps.double().mean().item() - 499.5) < 20
    assert (int(draws.timesteps.min()), int(draws.timesteps.max())) < (10, 999)
    assert int(draws.timesteps.max()) > 990
    assert abs(draws.noise.mean().item()) < 0.01
    assert abs(draws.noise.std().item() - 1) < 0.01


def test_replacements_touch_only_the_chosen_samples():
    where = torch.tensor([False, True])
    mask, moments = with_full_masks(torch.zeros(2, 1, 4, 4), torch.zeros(2, 8, 4, 4), where, torch.full((8, 4, 4), 5.0))
    assert mask.flatten(1).mean(1).tolist() == [0, 1]
    assert moments.flatten(1).mean(1).tolist() == [0, 5]
    text = with_text_dropout(torch.zeros(2, 77, 6), where, torch.full((77, 6), 3.0).half())
    assert text.flatten(1).mean(1).tolist() == [0, 3]


@pytest.mark.parametrize("min_snr_gamma", [None, 5.0])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_loss_is_the_formula(zero_terminal_snr: bool, min_snr_gamma: float | None):
    torch.manual_seed(0)
    alpha_bar = alphas_cumprod(zero_terminal_snr=zero_terminal_snr)
    batch = Batch(
        uids=tuple(UIDS[:6]),
        moments=torch.randn(6, 8, 4, 4).half(),
        masked_moments=torch.randn(6, 8, 4, 4).half(),
        mask=(torch.rand(6, 1, 4, 4) < 0.5).float(),
        text_embeddings=torch.randn(6, 77, 5).half(),
    )
    constants = Constants(torch.full((77, 5), 9.0).half(), torch.full((8, 4, 4), 2.0).half())
    draws = _draw(list(batch.uids), text_dropout=0.5, full_mask=0.5)
    seen: dict[str, torch.Tensor] = {}

    def unet(sample: torch.Tensor, timestep: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor]:
        seen.update(sample=sample, timestep=timestep, text=kwargs["encoder_hidden_states"])
        return (torch.zeros_like(sample[:, :4]),)

    result = training_loss(
        unet,
        batch,
        draws,
        constants,
        prediction_type="v_prediction",
        scaling_factor=0.18215,
        alphas_cumprod=alpha_bar,
        device=torch.device("cpu"),
        min_snr_gamma=min_snr_gamma,
    )
    expected, weights = [], []
    assert batch.moments is not None
    assert batch.mask is not None
    assert batch.masked_moments is not None
    assert batch.text_embeddings is not None
    for i in range(6):
        mean, logvar = batch.moments[i].double().chunk(2)
        x0 = 0.18215 * (mean + (logvar / 2).exp() * draws.posterior_noise[i].double())
        a, s = alpha_bar[draws.timesteps[i]].sqrt(), (1 - alpha_bar[draws.timesteps[i]]).sqrt()
        noise = draws.noise[i].double()
        expected.append(((a * noise - s * x0) ** 2).mean())
        ratio = (a / s) ** 2
        weights.append(torch.ones(()) if min_snr_gamma is None else ratio.clamp(max=min_snr_gamma) / (ratio + 1))
        assert torch.allclose(seen["sample"][i, :4].double(), a * x0 + s * noise, atol=1e-5)
        is_full, drops = bool(draws.is_full_mask[i]), bool(draws.drops_text[i])
        assert torch.equal(seen["sample"][i, 4:5], torch.ones(1, 4, 4) if is_full else batch.mask[i])
        masked = torch.full((8, 4, 4), 2.0) if is_full else batch.masked_moments[i].float()
        masked_mean, masked_logvar = masked.double().chunk(2)
        masked_x0 = 0.18215 * (masked_mean + (masked_logvar / 2).exp() * draws.masked_posterior_noise[i].double())
        assert torch.allclose(seen["sample"][i, 5:].double(), masked_x0, atol=1e-5)
        assert torch.equal(seen["text"][i], torch.full((77, 5), 9.0) if drops else batch.text_embeddings[i].float())
    assert 0 < int(draws.is_full_mask.sum()) < 6, "the test must see both kinds"
    assert 0 < int(draws.drops_text.sum()) < 6, "the test must see both kinds"
    assert torch.allclose(result.per_sample.double(), torch.stack(expected), rtol=1e-5)
    assert torch.allclose(result.weights.double(), torch.stack(weights).double(), rtol=1e-5)
    weighted = torch.stack(expected) * torch.stack(weights).double()
    assert torch.allclose(result.loss.double(), weighted.mean(), rtol=1e-5), (
        "a mean over the batch, not over the weights"
    )
    assert torch.equal(result.timesteps, draws.timesteps)
    assert torch.equal(result.is_full_mask, draws.is_full_mask)
    assert not result.per_sample.requires_grad


def test_a_stored_mask_of_all_ones_is_a_full_mask_too():
    torch.manual_seed(0)
    mask = torch.ones(2, 1, 4, 4)
    mask[1, 0, 3, 3] = 0
    moments = torch.zeros(2, 8, 4, 4)
    result = training_loss(
        lambda sample, timestep, **kwargs: (sample[:, :4],),
        Batch(tuple(UIDS[:2]), moments, moments, mask, torch.zeros(2, 77, 5)),
        _draw(UIDS[:2], full_mask=0.0),
        Constants(torch.zeros(77, 5), torch.zeros(8, 4, 4)),
        prediction_type="epsilon",
        scaling_factor=1.0,
        alphas_cumprod=alphas_cumprod(),
        device=torch.device("cpu"),
    )
    assert result.is_full_mask.tolist() == [True, False]
