"""Facts of Stable Diffusion inpainting that public code has got wrong, each as a test.

Others of that list are tested where they belong: [-1, 1] pixels and the scale that is applied once (test_encoders), the
channels' order (test_unet), the loss over the whole latent (test_objective_equality), schedules named "linear"
(test_schedule), the penultimate layer and the padding (test_encoders), a latent mask's format (test_masks), the
prediction type without default (tests/flows/test_config), the full mask's constant (tests/preprocessing/test_encode),
a punsafe filter that fires (tests/preprocessing/test_filters), compositing (test_sampler).
"""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own convention

from model.encoders import encode_moments, images_to_pixels, load_vae, mean_latents
from model.masks import to_latent_mask
from model.sampler import sample_inpainting
from model.schedule import alphas_cumprod
from model.specs import ScheduleSpec
from training.config import ValidationConfig
from training.inpainting import Inpainter
from training.step import draw


class _Recorder:
    """Stands for a UNet: remembers its arguments, and predicts nothing."""

    def __init__(self) -> None:
        self.samples: list[torch.Tensor] = []
        self.timesteps: list[int] = []
        self.texts: list[torch.Tensor] = []

    def __call__(self, sample: torch.Tensor, timestep: int, text: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor]:
        self.samples.append(sample)
        self.timesteps.append(timestep)
        self.texts.append(text)
        return (sample[:, :4] * 0.1,)


class _InpainterUnet(_Recorder):
    config = SimpleNamespace(in_channels=9, cross_attention_dim=6)

    def to(self, device: str) -> "_InpainterUnet":
        return self

    def eval(self) -> "_InpainterUnet":
        return self


class _NoText:
    width = 6

    def to(self, device: str) -> "_NoText":
        return self

    def embed_captions(self, captions: list[str]) -> torch.Tensor:
        return torch.zeros(len(captions), 77, 6)


@pytest.fixture
def sampled() -> tuple[_Recorder, dict[str, Any]]:
    recorder = _Recorder()
    arguments: dict[str, Any] = {
        "noise": torch.randn(2, 4, 8, 8),
        "mask": torch.rand(2, 1, 8, 8).round(),
        "masked_image_latents": torch.randn(2, 4, 8, 8),
        "text_embeddings": torch.randn(2, 77, 6),
        "null_embedding": torch.randn(77, 6),
    }
    sample_inpainting(
        recorder,
        **arguments,
        num_inference_steps=7,
        guidance_scale=7.5,
        prediction_type="v_prediction",
        alphas_cumprod=alphas_cumprod(),
    )
    assert len(recorder.samples) == 7
    return recorder, arguments


def test_only_the_noisy_latents_change_while_sampling(sampled):
    """Neither mask nor masked latents are noised or scaled by the sampler, at any step."""
    recorder, arguments = sampled
    for sample, following in itertools.pairwise(recorder.samples):
        assert torch.equal(sample[:, 4:], following[:, 4:])
        assert not torch.equal(sample[:, :4], following[:, :4])
    for branch in recorder.samples[0].chunk(2):
        assert torch.equal(branch, torch.cat([arguments[n] for n in ("noise", "mask", "masked_image_latents")], dim=1))


def test_guidance_drops_the_caption_and_nothing_else(sampled):
    """Both branches see the same mask and masked latents; the empty branch the empty caption's embedding, not zeros."""
    recorder, arguments = sampled
    for sample, text in zip(recorder.samples, recorder.texts, strict=True):
        without, captioned = sample.chunk(2)
        assert torch.equal(without, captioned)
        null, given = text.chunk(2)
        assert torch.equal(null, arguments["null_embedding"].expand(2, 77, 6))
        assert torch.equal(given, arguments["text_embeddings"])


def test_the_mask_is_zero_and_one_and_the_hole_is_mid_grey(vae_dir):
    """Not {-1, 1} and not black, as in the older inpainting model; in validation as in preparation."""
    vae, unet, text = load_vae(vae_dir), _InpainterUnet(), _NoText()
    inpainter = Inpainter(
        unet,
        vae,
        text,  # pyright: ignore[reportArgumentType]  # what it needs of a text encoder
        prediction_type="v_prediction",
        schedule=ScheduleSpec(zero_terminal_snr=True),
        config=ValidationConfig(num_inference_steps=1, guidance_scale=1),
    )
    image = np.full((1, 64, 64, 3), 250, np.uint8)
    mask = np.zeros((1, 64, 64), np.uint8)
    mask[:, 8:40, 16:] = 1
    inpainter.repaint(image, mask, ["x"], ["u"], "test")
    (sample,) = unet.samples
    assert unet.timesteps == [999], "a zero terminal SNR is sampled from its last timestep"
    assert torch.equal(sample[0, 4], torch.from_numpy(mask[0, ::8, ::8]).float())
    painted = images_to_pixels(image)
    painted[:, :, 8:40, 16:] = 0
    torch.testing.assert_close(sample[:, 5:], mean_latents(encode_moments(vae, painted), 0.18215))
    painted[:, :, 8:40, 16:] = -1
    black = mean_latents(encode_moments(vae, painted), 0.18215)
    assert (sample[:, 5:] - black).abs().max() > 1e-2, "grey and black must differ for this to mean anything"


@pytest.mark.parametrize("side", [64, 256, 512])
def test_the_latent_mask_is_every_eighth_pixel(side):
    """F.interpolate's default, which is neither area nor maximum: a thin stroke may be missed."""
    mask = (np.random.default_rng(side).random((side, side)) < 0.3).astype(np.uint8)
    mask[3, :] = 1
    tensor = torch.from_numpy(mask)[None, None].float()
    nearest = F.interpolate(tensor, size=(side // 8, side // 8))[0, 0].numpy()
    assert np.array_equal(to_latent_mask(mask), nearest)
    assert np.array_equal(nearest, mask[::8, ::8])
    assert not np.array_equal(nearest, F.max_pool2d(tensor, 8)[0, 0].numpy())
    assert not np.array_equal(
        nearest, F.interpolate(tensor, size=(side // 8, side // 8), mode="area")[0, 0].round().numpy()
    )
    stroke = np.zeros((side, side), np.uint8)
    stroke[3, :] = 1
    assert not stroke[::8, ::8].any(), "the stroke is seen in the masked picture only"


def test_masked_latents_are_not_the_latents_masked(vae_dir):
    """A hole changes the latents far from it, too: the VAE normalizes over, and attends to, the whole picture."""
    vae = load_vae(vae_dir)
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    hole = torch.ones(1, 1, 64, 64)
    hole[..., :32, :32] = 0
    latents, masked = encode_moments(vae, pixels)[:, :4], encode_moments(vae, pixels * hole)[:, :4]
    far = (..., slice(7, None), slice(7, None))
    assert (latents[far] - masked[far]).abs().max() > 1e-3 * latents[far].abs().max()


def test_caption_dropout_is_not_frozen_in():
    """A sample's caption is dropped at some steps and kept at others, a tenth of the time."""
    drops = torch.stack([_draw([f"{i:032x}" for i in range(40)], step).drops_text for step in range(250)])
    assert drops.double().mean().item() == pytest.approx(0.1, abs=0.01)
    of_each = drops.double().mean(dim=0)
    assert of_each.min() > 0.02
    assert of_each.max() < 0.2


def test_full_masks_and_dropped_captions_are_independent():
    """So a fortieth of the samples is generated from nothing at all: neither tied together nor exclusive."""
    draws = _draw([f"{i:032x}" for i in range(10_000)], 3)
    full, dropped = draws.is_full_mask, draws.drops_text
    assert full.double().mean().item() == pytest.approx(0.25, abs=0.015)
    assert (full & dropped).double().mean().item() == pytest.approx(0.025, abs=0.006)
    assert dropped[full].double().mean().item() == pytest.approx(dropped[~full].double().mean().item(), abs=0.025)


def test_the_posterior_is_sampled_anew_at_every_visit():
    """Moments are stored, not samples: the same picture has other latents at every step, and other masked latents."""
    noises = [_draw(["a" * 32], step) for step in range(3)]
    drawn = [draws.posterior_noise for draws in noises] + [draws.masked_posterior_noise for draws in noises]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(drawn, 2))


def _draw(uids: list[str], step: int) -> Any:
    return draw(
        uids,
        seed=0,
        step=step,
        latent_shape=(4, 1, 1),
        num_timesteps=1000,
        text_dropout=0.1,
        full_mask=0.25,
    )
