"""The training forward and the sampler are those of diffusers, on a small UNet of SD2's shape.

The tolerance is 1e-5 of the largest value (of 1, where that is larger). What there is comes from diffusers' schedule,
which is float32, where ours is float64: √ᾱ differs by up to 3e-7.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

sys.path.insert(0, str(Path(__file__).parent))

from diffusers_reference import SamplingCase, compare_pipeline, compare_sampling, compare_training, ddim_cases

from model.specs import SD2_UNET_CONFIG
from model.unet import build_unet

SMALL: dict[str, Any] = SD2_UNET_CONFIG | {
    "attention_head_dim": [1, 2, 2, 2],
    "block_out_channels": [32, 64, 64, 64],
    "cross_attention_dim": 48,
}
LATENT_PX = 16
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(5)
    return build_unet(SMALL).eval()


@pytest.mark.parametrize("min_snr_gamma", [None, 5.0])
@pytest.mark.parametrize(
    ("prediction_type", "zero_terminal_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_unet_input_target_loss_and_gradient_are_those_of_a_diffusers_script(
    unet, prediction_type, zero_terminal_snr, min_snr_gamma
):
    differences = compare_training(
        unet,
        timesteps=[0, 144, 500, 999],
        prediction_type=prediction_type,
        latent_px=LATENT_PX,
        zero_terminal_snr=zero_terminal_snr,
        min_snr_gamma=min_snr_gamma,
    )
    assert max(vars(differences).values()) < TOLERANCE, differences


@pytest.mark.parametrize("case", ddim_cases(num_inference_steps=6), ids=str)
def test_latents_after_every_step_are_those_of_diffusers(unet, case):
    differences = compare_sampling(unet, case, latent_px=LATENT_PX)
    assert len(differences) == 6
    assert max(differences) < TOLERANCE, differences


@pytest.mark.parametrize("case", ddim_cases(num_inference_steps=4), ids=str)
def test_latents_are_those_of_diffusers_inpainting_pipeline(unet, vae_dir, case):
    vae = AutoencoderKL.from_pretrained(vae_dir)
    assert compare_pipeline(unet, vae, case, latent_px=LATENT_PX) < TOLERANCE


@pytest.mark.parametrize("num_inference_steps", [3, 7])
def test_numbers_of_steps_that_do_not_divide_the_schedule(unet, num_inference_steps):
    for zero_terminal_snr in (False, True):
        case = SamplingCase("v_prediction", zero_terminal_snr, 0.7, 1.0, num_inference_steps)
        assert max(compare_sampling(unet, case, latent_px=LATENT_PX)) < TOLERANCE


def test_the_comparison_can_fail(unet):
    """An error of the kind that it is meant to find: the sampler is told another schedule than diffusers."""

    class Misled(SamplingCase):
        def scheduler(self) -> Any:
            return SamplingCase("v_prediction", True, 0.0, 1.0, 2).scheduler()

    assert max(compare_sampling(unet, Misled("v_prediction", False, 0.0, 1.0, 2), latent_px=LATENT_PX)) > 1e-3
