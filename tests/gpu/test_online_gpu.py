"""On a GPU, too, what is made while training is what the encode stage stores there: float32, bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from model.encoders import (
    TextEncoder,
    encode_stored_moments,
    encode_stored_text,
    images_to_pixels,
    load_text_encoder,
    load_vae,
)
from model.masks import draw_masks_of
from model.specs import LatentSpec, MaskSpec, TextSpec
from training.batch import Batch, Constants
from training.compatibility import DatasetSpecs
from training.fields import Fields
from training.online import OnlineConditioner
from training.step import Draws

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WEIGHTS = Path(__file__).parents[2] / "model" / "tiny" / "weights"
DEVICE = torch.device("cuda")
SIDE_PX, NUM_ROWS = 256, 23
ALL_ONLINE = Fields(text="token_ids", mask="none", moments=False, images=True)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return load_vae(WEIGHTS / "vae", DEVICE)


@pytest.fixture(scope="module")
def text() -> TextEncoder:
    return load_text_encoder(WEIGHTS / "open_clip", load_image_tower=False, device=DEVICE)


def _specs(text: TextEncoder) -> DatasetSpecs:
    return DatasetSpecs(
        LatentSpec(resolution_px=SIDE_PX, scaling_factor=0.2, weights_sha256=""),
        TextSpec(width=text.width, weights_sha256=""),
        MaskSpec(family="sd_256train", resolution_px=SIDE_PX, num_variants=0, seed=1),
        frozenset(),
    )


def _batch(text: TextEncoder) -> Batch:
    rng = np.random.default_rng(0)
    return Batch(
        uids=tuple(f"{index:032x}" for index in range(NUM_ROWS)),
        epochs=(2,) * NUM_ROWS,
        moments=None,
        masked_moments=None,
        mask=None,
        text_embeddings=None,
        token_ids=text.tokenize([f"a picture of {index} things" for index in range(NUM_ROWS)]),
        images=torch.from_numpy(rng.integers(0, 256, (NUM_ROWS, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)),
    )


def _draws(is_replaced: Tensor) -> Draws:
    noise = torch.zeros(len(is_replaced), 4, SIDE_PX // 8, SIDE_PX // 8)
    return Draws(noise, noise, noise, torch.zeros(len(is_replaced), dtype=torch.int64), is_replaced, is_replaced)


def _conditioner(vae: AutoencoderKL, text: TextEncoder) -> OnlineConditioner:
    specs = _specs(text)
    constants = Constants(
        torch.zeros(specs.text.embeddings_shape, dtype=torch.float16),
        torch.zeros(specs.latents.moments_shape, dtype=torch.float16),
    )
    return OnlineConditioner(ALL_ONLINE, specs, constants, masks=specs.masks, vae=vae, text=text, device=DEVICE)


def test_online_is_what_encoding_stores(vae: AutoencoderKL, text: TextEncoder):
    batch = _batch(text)
    assert batch.images is not None
    assert batch.token_ids is not None
    # As the encode stage has it: pictures become pixels on the CPU, all rows at once.
    pixels = images_to_pixels(batch.images)
    masks = torch.from_numpy(draw_masks_of(_specs(text).masks, batch.uids, 2))
    stored: dict[str, Tensor] = {
        "moments": encode_stored_moments(vae, pixels),
        "masked_moments": encode_stored_moments(vae, pixels, masks),
        "text_embeddings": encode_stored_text(text, batch.token_ids),
    }
    is_replaced = torch.arange(NUM_ROWS) % 4 == 0
    for start, stop in ((0, NUM_ROWS), (3, 5), (7, 20)):
        part: Any = _conditioner(vae, text).complete(batch.part(start, stop), _draws(is_replaced[start:stop]))
        for name, expected in stored.items():
            rows = torch.ones(stop - start, dtype=torch.bool) if name == "moments" else ~is_replaced[start:stop]
            made = getattr(part, name).cpu()
            assert torch.equal(made[rows], expected[start:stop].cpu()[rows]), name
            assert bool((made[~rows] == 0).all()), "of those the constants"


def test_lower_precision_stays_close(vae: AutoencoderKL, text: TextEncoder):
    batch = _batch(text)
    nothing = torch.zeros(NUM_ROWS, dtype=torch.bool)
    exact: Any = _conditioner(vae, text).complete(batch, _draws(nothing))
    rough_text = load_text_encoder(WEIGHTS / "open_clip", load_image_tower=False, device=DEVICE)
    rough_vae = load_vae(WEIGHTS / "vae", DEVICE, torch.bfloat16)
    rough: Any = _conditioner(rough_vae, rough_text.to(DEVICE, torch.bfloat16)).complete(batch, _draws(nothing))
    for name in ("moments", "masked_moments", "text_embeddings"):
        expected, found = getattr(exact, name).float(), getattr(rough, name).float()
        assert (expected - found).abs().mean() < 0.05 * expected.abs().mean(), name
