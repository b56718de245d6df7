"""Small random models, and the shapes in every signature of `model` checked at run time."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# Before the first import of these modules: the hook checks jaxtyping's annotations on every call.
TENSOR_MODULES = ("encoders", "masks", "objective", "sampler", "schedule", "unet")
# jaxtyping wants the checker by its dotted name, and beartype's own refuses an int where a float is meant.
_checker: Any = ModuleType("lacuna_shape_checker")
_checker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))
sys.modules[_checker.__name__] = _checker
install_import_hook([f"model.{name}" for name in TENSOR_MODULES], f"{_checker.__name__}.check")

TINY_CLIP: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3},
}
TINY_UNET: dict[str, Any] = {
    "attention_head_dim": [2, 2],
    "block_out_channels": [16, 32],
    "cross_attention_dim": 32,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 4,
    "sample_size": 8,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "use_linear_projection": True,
}
TINY_VAE: dict[str, Any] = {
    "block_out_channels": [8, 8, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 64,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(num_threads)  # sums in other tests, beside those of a child process, must not depend on it


@pytest.fixture
def tiny_unet():
    """A four-channel UNet with random weights."""
    from model.unet import build_unet

    return build_unet(TINY_UNET).eval()


@pytest.fixture(scope="session")
def vae_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random AutoencoderKL, factor 8."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(1)
    directory = tmp_path_factory.mktemp("vae")
    AutoencoderKL(**TINY_VAE).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random OpenCLIP model, full vocabulary."""
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    torch.manual_seed(2)
    directory = tmp_path_factory.mktemp("clip")
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_CLIP}))
    clip: Any = CLIP(**TINY_CLIP)
    torch.nn.init.normal_(clip.positional_embedding, std=0.5)
    torch.nn.init.normal_(clip.token_embedding.weight, std=0.5)
    save_file(clip.state_dict(), directory / "open_clip_model.safetensors")
    return directory


@pytest.fixture(scope="session")
def text_encoder(text_dir: Path):
    """The loaded OpenCLIP model."""
    from model.encoders import load_text_encoder

    return load_text_encoder(text_dir)
