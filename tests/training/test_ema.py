"""The moving average."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from model.unet import build_unet, widen_conv_in
from training.ema import Ema, start_average


def test_warm_up_then_decay():
    module = nn.Linear(3, 2)
    ema = Ema(module, decay=0.5)
    expected = module.weight.detach().double().clone()
    assert torch.equal(ema.state_dict()["weight"], module.weight)
    for n in range(1, 30):
        with torch.no_grad():
            module.weight += n
        ema.update(module)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * module.weight.detach().double()
    assert ema.num_updates == 29
    assert torch.allclose(ema.state_dict()["weight"].double(), expected, rtol=1e-6)


def test_state_goes_on_bit_by_bit():
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    ema, other = Ema(module, 0.9), Ema(nn.Linear(3, 2), 0.9)
    for _ in range(3):
        with torch.no_grad():
            module.weight.normal_()
        ema.update(module)
    other.load_state_dict({name: value.clone() for name, value in ema.state_dict().items()}, ema.num_updates)
    with torch.no_grad():
        module.weight.normal_()
    ema.update(module)
    other.update(module)
    assert torch.equal(ema.state_dict()["weight"], other.state_dict()["weight"])


def test_the_average_is_no_view_and_is_float32():
    module = nn.Linear(3, 2).to(torch.bfloat16)
    ema = Ema(module, 0.9)
    before = ema.state_dict()["weight"].clone()
    with torch.no_grad():
        module.weight += 1
    assert torch.equal(ema.state_dict()["weight"], before)
    assert before.dtype == torch.float32


def test_another_modules_state_is_refused():
    with pytest.raises(ValueError, match="only on one side"):
        Ema(nn.Linear(3, 2), 0.9).load_state_dict({"weight": torch.zeros(2, 3)}, 1)


# ------------------------------------------------------------------------------------------------ from the base's own

TINY_UNET = {
    "attention_head_dim": [2, 2],
    "block_out_channels": [16, 32],
    "cross_attention_dim": 32,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}


def write_average(folder: Path, state: dict[str, torch.Tensor], num_updates: int | None) -> None:
    folder.mkdir()
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    (folder / "ema.json").write_text(json.dumps({"num_updates": num_updates}))


@pytest.mark.parametrize(("known", "expected"), [(70_000, 70_000), (None, 89_990)])
def test_a_training_starts_from_the_bases_own_average(tmp_path: Path, known: int | None, expected: int):
    unet = build_unet(TINY_UNET | {"in_channels": 4})
    narrow = {key: value + 0.5 for key, value in unet.state_dict().items()}
    write_average(tmp_path / "unet_ema", {key: value.half() for key, value in narrow.items()}, known)
    widen_conv_in(unet)
    ema = start_average(unet, 0.9999, tmp_path / "unet_ema")
    average = ema.state_dict()
    assert set(average) == {name for name, _ in unet.named_parameters()}
    for key, value in average.items():
        assert value.dtype == torch.float32
        if key == "conv_in.weight":
            assert value.shape[1] == 9
            assert not value[:, 4:].any()
            value = value[:, :4]
        assert torch.equal(value, narrow[key].half().float())
    assert ema.num_updates == expected
    ema.update(unet)  # a mature average moves by a ten-thousandth, it is not replaced
    moved = (ema.state_dict()["conv_out.bias"] - narrow["conv_out.bias"].half()).abs().max()
    assert moved < 2e-4


def test_without_an_average_of_its_own_it_starts_equal(tmp_path: Path):
    unet = build_unet(TINY_UNET | {"in_channels": 9})
    ema = start_average(unet, 0.99, tmp_path / "unet_ema")
    assert ema.num_updates == 0
    assert all(torch.equal(ema.state_dict()[name], value) for name, value in unet.named_parameters())


@pytest.mark.parametrize("key", ["conv_out.bias", "conv_in.weight"])
def test_the_average_of_another_unet_is_refused(tmp_path: Path, key: str):
    unet = build_unet(TINY_UNET | {"in_channels": 9})
    state = dict(unet.state_dict())
    state[key] = torch.zeros(3, *state[key].shape[1:])
    write_average(tmp_path / "unet_ema", state, 5)
    with pytest.raises(ValueError, match="the average is of another UNet"):
        start_average(unet, 0.99, tmp_path / "unet_ema")
