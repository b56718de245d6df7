import itertools
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from model.sampler import composite, ddim_step, noise_for, sample_inpainting, timesteps_for
from model.schedule import alphas_cumprod
from model.unet import widen_conv_in

SHAPE = (2, 4, 8, 8)


def diffusers_scheduler(prediction_type: Any, spacing: Any, *, zero_terminal_snr: bool = False) -> Any:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        rescale_betas_zero_snr=zero_terminal_snr,
    )


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_timesteps_are_those_of_diffusers_for_any_number_of_steps(spacing):
    scheduler = diffusers_scheduler("epsilon", spacing)
    for num_steps in range(1, 1000):
        ours = timesteps_for(num_steps, timestep_spacing=spacing)
        scheduler.set_timesteps(num_steps)
        theirs = scheduler.timesteps.tolist()
        assert ours == theirs[:num_steps], num_steps
        assert theirs[num_steps:] in ([], [-1]), (
            "61 and others: a rounding error of diffusers, which wraps to timestep 999"
        )
        assert len(ours) == num_steps
        assert spacing == "leading" or ours[0] == 999


@pytest.mark.parametrize("num_steps", [3, 7, 30, 61, 600])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_each_step_leads_to_the_next_timestep_or_its_neighbor(spacing, num_steps):
    timesteps = timesteps_for(num_steps, timestep_spacing=spacing)
    gaps = [t - 1000 // num_steps - following for t, following in itertools.pairwise(timesteps)]
    assert set(gaps) <= ({0} if spacing == "leading" else {-1, 0, 1})


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_impossible_numbers_of_steps_are_refused(num_steps):
    with pytest.raises(ValueError, match="num_inference_steps"):
        timesteps_for(num_steps)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_step_is_that_of_diffusers(prediction_type, spacing, eta):
    scheduler = diffusers_scheduler(prediction_type, spacing)
    scheduler.set_timesteps(10)
    ours = theirs = torch.randn(SHAPE)
    for t in timesteps_for(10, timestep_spacing=spacing):
        prediction, fresh = torch.randn(SHAPE), torch.randn(SHAPE)
        ours = ddim_step(
            prediction,
            ours,
            timestep=t,
            previous_timestep=t - 100,
            prediction_type=prediction_type,
            alphas_cumprod=alphas_cumprod(),
            eta=eta,
            fresh_noise=fresh,
        )
        theirs = scheduler.step(
            prediction, t, theirs, eta=eta, variance_noise=fresh if eta else None, return_dict=False
        )[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        ours = theirs  # else an early rounding error grows by 1 / a, and hides what a later step does


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_eta_is_from_0_to_1(eta):
    with pytest.raises(ValueError, match=f"eta is {eta}"):
        sample_inpainting(lambda sample, *args, **kwargs: (sample[:, :4],), **inputs(eta=eta))


def test_a_zero_terminal_snr_at_full_eta_is_all_fresh_noise():
    """At ᾱ = 0 and η = 1 nothing of x_t may stay: σ² = 1 − ᾱ_prev, which a rounding error would take beyond."""
    schedule = alphas_cumprod(zero_terminal_snr=True)
    prediction, noisy, fresh = torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(SHAPE)
    for previous in range(999):
        result = ddim_step(
            prediction,
            noisy,
            timestep=999,
            previous_timestep=previous,
            prediction_type="v_prediction",
            alphas_cumprod=schedule,
            eta=1.0,
            fresh_noise=fresh,
        )
        a, s = schedule[previous].sqrt().float(), (1 - schedule[previous]).sqrt().float()
        torch.testing.assert_close(result, -a * prediction + s * fresh)


def test_epsilon_says_nothing_where_there_is_no_signal():
    schedule = alphas_cumprod(zero_terminal_snr=True)
    with pytest.raises(ValueError, match="timestep 999 has no signal"):
        sample_inpainting(
            lambda sample, *args, **kwargs: (sample[:, :4],),
            **inputs(prediction_type="epsilon", alphas_cumprod=schedule, timestep_spacing="trailing"),
        )


def inputs(**changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    return {
        "noise": torch.randn(SHAPE, generator=generator),
        "mask": torch.rand(2, 1, 8, 8, generator=generator).round(),
        "masked_image_latents": torch.randn(SHAPE, generator=generator),
        "text_embeddings": torch.randn(2, 77, 32, generator=generator),
        "null_embedding": torch.randn(77, 32, generator=generator),
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "prediction_type": "v_prediction",
        "alphas_cumprod": alphas_cumprod(),
    } | changes


@pytest.fixture
def unet(tiny_unet):
    wide = widen_conv_in(tiny_unet)
    torch.nn.init.normal_(wide.conv_in.weight, std=0.2)
    return wide


def test_without_guidance_the_null_embedding_is_not_used(unet):
    one = sample_inpainting(unet, **inputs(guidance_scale=1.0))
    other = sample_inpainting(unet, **inputs(guidance_scale=1.0, null_embedding=torch.zeros(77, 32)))
    assert torch.equal(one, other)
    assert not torch.allclose(one, sample_inpainting(unet, **inputs()), atol=1e-3)


@pytest.mark.parametrize("name", ["mask", "masked_image_latents", "text_embeddings", "noise"])
def test_every_condition_matters(unet, name):
    plain = sample_inpainting(unet, **inputs())
    changed = sample_inpainting(unet, **inputs(**{name: 1 - inputs()[name]}))
    assert not torch.allclose(plain, changed, atol=1e-3)


def test_eta_needs_and_uses_fresh_noise(unet):
    with pytest.raises(ValueError, match="fresh noise"):
        sample_inpainting(unet, **inputs(eta=1.0))

    def fresh_noise(step: int) -> torch.Tensor:
        return noise_for(0, ["a", "b"], (4, 8, 8), name="fresh", step=step)

    one, two = (sample_inpainting(unet, **inputs(eta=1.0, fresh_noise=fresh_noise)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.allclose(one, sample_inpainting(unet, **inputs()), atol=1e-3)


def test_the_last_result_keeps_the_noise_of_timestep_zero():
    """With ᾱ_prev = ᾱ_0 and a perfect model the last step returns √ᾱ_0 x0 + √(1 − ᾱ_0) ε, not x0."""
    x0, noise, schedule = torch.randn(SHAPE), torch.randn(SHAPE), alphas_cumprod()
    a, s = schedule[1].sqrt().float(), (1 - schedule[1]).sqrt().float()
    result = ddim_step(
        noise,
        a * x0 + s * noise,
        timestep=1,
        previous_timestep=-1,
        prediction_type="epsilon",
        alphas_cumprod=schedule,
    )
    torch.testing.assert_close(result, schedule[0].sqrt().float() * x0 + (1 - schedule[0]).sqrt().float() * noise)


def test_noise_belongs_to_the_sample():
    batch = noise_for(0, ["a", "b", "c"], (4, 8, 8))
    assert torch.equal(batch[1:], noise_for(0, ["b", "c"], (4, 8, 8)))
    assert not torch.equal(batch, noise_for(1, ["a", "b", "c"], (4, 8, 8)))
    assert not torch.equal(batch, noise_for(0, ["a", "b", "c"], (4, 8, 8), step=1))
    assert not torch.equal(batch[0], batch[1])
    assert batch.dtype == torch.float32
    large = noise_for(0, ["a"], (4, 64, 64))
    assert abs(large.mean()) < 0.05
    assert abs(large.std() - 1) < 0.05


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_sample_does_not_depend_on_its_batch(unet, eta):
    """To 1e-5: kernels for larger batches round differently. Order, companions and place do not matter otherwise."""
    uids = ["a", "b", "c"]
    conditions = {
        "mask": torch.rand(3, 1, 8, 8).round(),
        "masked_image_latents": torch.randn(3, 4, 8, 8),
        "text_embeddings": torch.randn(3, 77, 32),
    }

    def paint(order: list[int]) -> torch.Tensor:
        names = [uids[i] for i in order]
        return sample_inpainting(
            unet,
            **inputs(
                noise=noise_for(5, names, (4, 8, 8)),
                eta=eta,
                fresh_noise=lambda step: noise_for(5, names, (4, 8, 8), name="fresh", step=step),
                **{name: values[order] for name, values in conditions.items()},
            ),
        )

    together = paint([0, 1, 2])
    for order in ([0], [1], [2], [2, 0]):
        torch.testing.assert_close(paint(order), together[order], rtol=1e-5, atol=1e-5)
    assert torch.equal(paint([0, 1, 2]), together)


def test_composite_keeps_the_original_outside_the_mask():
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    generated, original = torch.full((1, 3, 4, 4), float("nan")), torch.rand(1, 3, 4, 4)
    result = composite(mask, generated, original)
    assert torch.equal(result[..., 2:], original[..., 2:])
    assert result[..., :2].isnan().all()
