import copy

import pytest
import torch

from model.unet import build_unet, load_unet, unet_input, widen_conv_in


@pytest.fixture
def batch():
    return torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 77, 32)


def test_the_widened_unet_computes_what_its_base_computes(tiny_unet, batch):
    latents, timesteps, text = batch
    wide = widen_conv_in(copy.deepcopy(tiny_unet))
    assert wide.config["in_channels"] == 9
    with torch.no_grad():
        base = tiny_unet(latents, timesteps, text, return_dict=False)[0]
        for mask in (torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8), torch.rand(2, 1, 8, 8).round()):
            sample = unet_input(latents, mask, 100 * torch.randn(2, 4, 8, 8))
            torch.testing.assert_close(wide(sample, timesteps, text, return_dict=False)[0], base, rtol=0, atol=1e-6)


def test_the_new_channels_learn(tiny_unet, batch):
    latents, timesteps, text = batch
    wide = widen_conv_in(tiny_unet)
    sample = unet_input(latents, torch.ones(2, 1, 8, 8), torch.randn(2, 4, 8, 8))
    wide(sample, timesteps, text, return_dict=False)[0].square().mean().backward()
    assert wide.conv_in.weight.grad is not None
    assert (wide.conv_in.weight.grad.abs().amax(dim=(0, 2, 3)) > 0).all()


def test_a_unet_is_widened_once(tiny_unet):
    with pytest.raises(ValueError, match="has 9 input channels"):
        widen_conv_in(widen_conv_in(tiny_unet))


def test_channel_order():
    parts = torch.full((1, 4, 2, 2), 1.0), torch.full((1, 1, 2, 2), 2.0), torch.full((1, 4, 2, 2), 3.0)
    assert unet_input(*parts)[0, :, 0, 0].tolist() == [1, 1, 1, 1, 2, 3, 3, 3, 3]


@pytest.mark.parametrize("max_shard_size", ["10GB", "100KB"])
def test_loading_whole_and_sharded(tiny_unet, tmp_path, max_shard_size):
    wide = widen_conv_in(tiny_unet)
    wide.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").exists() == (max_shard_size == "100KB")
    loaded = load_unet(tmp_path)
    assert loaded.config["in_channels"] == 9
    assert not loaded.training
    state = loaded.state_dict()
    assert all(torch.equal(state[key], value) for key, value in wide.state_dict().items())


def test_a_missing_folder_is_not_looked_up_on_a_hub(tmp_path):
    with pytest.raises(ValueError, match="no UNet in"):
        load_unet(tmp_path / "stabilityai")


def test_notes_in_a_config_are_ignored(tiny_unet):
    config = dict(tiny_unet.config) | {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0"}
    assert build_unet(config).config["cross_attention_dim"] == 32
