import json
import subprocess
import sys

import pytest

from model.specs import SD2_UNET_CONFIG, SD2_VAE_CONFIG, LatentSpec, MaskSpec, ScheduleSpec, TextSpec

SPECS = [
    LatentSpec(resolution_px=512, scaling_factor=0.18215, weights_sha256="ab"),
    TextSpec(width=1024, weights_sha256="cd"),
    MaskSpec(family="sd_512train_large", resolution_px=512, num_variants=3, seed=0),
    ScheduleSpec(zero_terminal_snr=True),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_json_round_trip(spec):
    assert type(spec).from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_json_of_another_version_is_refused(spec):
    data = spec.to_json()
    with pytest.raises(ValueError, match="unknown fields \\['colour'\\]"):
        type(spec).from_json(data | {"colour": 1})
    data.popitem()
    with pytest.raises(ValueError, match="missing fields"):
        type(spec).from_json(data)


def test_published_sizes():
    latents, text = SPECS[0], SPECS[1]
    assert isinstance(latents, LatentSpec)
    assert isinstance(text, TextSpec)
    assert latents.moments_shape == (8, 64, 64)
    assert (latents.moments_num_bytes, latents.mask_num_bytes) == (65_536, 512)
    assert text.embeddings_num_bytes == 157_696
    assert LatentSpec(resolution_px=24, scaling_factor=1.0, weights_sha256="").mask_num_bytes == 2  # 9 bits


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LatentSpec(resolution_px=500, scaling_factor=1.0, weights_sha256=""), "resolution_px is 500"),
        (lambda: TextSpec(width=8, dtype="bfloat16", weights_sha256=""), "TextSpec.dtype is 'bfloat16'"),
        (lambda: MaskSpec(family="lama", resolution_px=64, num_variants=1, seed=0), "MaskSpec.family is 'lama'"),
        (lambda: MaskSpec(family="full", resolution_px=64, num_variants=-1, seed=0), "num_variants is -1"),
        (lambda: MaskSpec(family="full", resolution_px=64, num_variants=1, seed=0, p_full=-0.1), "p_full is -0.1"),
        (lambda: MaskSpec(family="user", resolution_px=64, num_variants=1, seed=0), "files_sha256 has 0 entries"),
        (
            lambda: MaskSpec(family="full", resolution_px=64, num_variants=1, seed=0, files_sha256=("a",)),
            "files_sha256 has 1 entries, and family is 'full'",
        ),
    ],
)
def test_bad_values_name_the_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_specs_need_no_torch():
    code = "import sys, model.specs; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_full_size_models_have_the_published_numbers_of_parameters():
    """On the meta device: shapes without memory."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from open_clip.factory import get_model_config
    from open_clip.model import CLIP

    from model.unet import build_unet

    def num_parameters(*modules: torch.nn.Module | None) -> int:
        return sum(parameter.numel() for module in modules if module for parameter in module.parameters())

    with torch.device("meta"):
        unet, base = build_unet(SD2_UNET_CONFIG), build_unet(SD2_UNET_CONFIG | {"in_channels": 4})
        vae = AutoencoderKL(**SD2_VAE_CONFIG)
        clip = CLIP(**get_model_config("ViT-H-14"))  # pyright: ignore[reportCallIssue]  # None for an unknown name only
    assert num_parameters(unet) == 865_925_124
    assert num_parameters(unet) - num_parameters(base) == 320 * 5 * 3 * 3
    assert num_parameters(vae) == 83_653_863
    assert num_parameters(vae.encoder, vae.quant_conv) == 34_163_664
    assert num_parameters(vae.decoder, vae.post_quant_conv) == 49_490_199
    text = {name: p.numel() for name, p in clip.named_parameters() if not name.startswith("visual.")}
    assert sum(text.values()) == 354_032_641
    unused = ("transformer.resblocks.23.", "text_projection", "logit_scale")
    assert sum(n for name, n in text.items() if not name.startswith(unused)) == 340_387_840
