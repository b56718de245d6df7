import json
import subprocess
import sys

import pytest

from model.specs import SD2_UNET_CONFIG, LatentSpec, MaskSpec, ScheduleSpec, TextSpec

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
    ],
)
def test_bad_values_name_the_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_specs_need_no_torch():
    code = "import sys, model.specs; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_full_size_unet_has_the_published_number_of_parameters():
    import torch

    from model.unet import build_unet

    with torch.device("meta"):
        unet = build_unet(SD2_UNET_CONFIG)
    num_parameters = sum(p.numel() for p in unet.parameters())
    assert num_parameters == pytest.approx(865.93e6, abs=0.01e6)
