"""The moving average."""

import pytest
import torch
from torch import nn

from training.ema import Ema


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
