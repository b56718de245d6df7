"""The moving average of the UNet's weights: what is validated and published."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from model.base_weights import EMA_NAME
from model.unet import widened
from model.weight_files import open_weights
from model.weights import WEIGHTS_NAME
from training.health import all_finite

_CONV_IN = "conv_in.weight"


class Ema:
    """An exponential moving average of parameters, in float32, with a warm-up.

    It reads whole parameters, as every rank has them under ZeRO 0, 1 and 2; so one rank may keep it for all. `update`
    is called after each step that the optimizer really took: never within gradient accumulation, nor after a skipped
    one.

    Attributes:
        num_updates: How often it was updated.

    Args:
        module: Whose parameters; the average starts equal to them.
        decay: Its final decay, in [0, 1).

    Source: CompVis `ldm/modules/ema.py`.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.num_updates = 0
        self._decay = decay
        self._average = {
            name: parameter.detach().to(dtype=torch.float32, copy=True) for name, parameter in module.named_parameters()
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Takes in the module's parameters: average += (1 − d)·(parameters − average), d = min(decay, (1+n)/(10+n))."""
        self.num_updates += 1
        decay = min(self._decay, (1 + self.num_updates) / (10 + self.num_updates))
        parameters = dict(module.named_parameters())
        new = [parameters[name].detach().float() for name in self._average]
        # The private name is what torch's own optimizers and averages call: one loop for all tensors.
        torch._foreach_lerp_(list(self._average.values()), new, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def start_over(self, module: nn.Module) -> None:
        """Makes the average equal to the module's parameters, as if it had never been updated."""
        self.num_updates = 0
        parameters = dict(module.named_parameters())
        for name, value in self._average.items():
            value.copy_(parameters[name])

    def is_finite(self) -> bool:
        """Whether every number of it is."""
        return all_finite(list(self._average.values()))

    def state_dict(self) -> dict[str, Tensor]:
        """The average, under the parameters' names."""
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], num_updates: int) -> None:
        """Goes on from what `state_dict` and `num_updates` were.

        Raises:
            ValueError: The names are others.
        """
        if set(state) != set(self._average):
            names = sorted(set(state) ^ set(self._average))
            raise ValueError(f"EMA: the parameters {names[:5]} are only on one side: the checkpoint is another UNet's")
        for name, value in self._average.items():
            value.copy_(state[name])
        self.num_updates = num_updates


def start_average(unet: nn.Module, decay: float, folder: Path) -> Ema:
    """The average that a training starts with: the base's own if it has one, else equal to the weights.

    Args:
        unet: What is trained, widened already.
        decay: The average's final decay.
        folder: The base's ``unet_ema/``, which may be absent. A narrower first convolution is widened as the UNet's
            was. ``ema.json`` says how often it was updated; where it does not know, the warm-up counts as over: an
            average that is replaced by the weights within ten steps need not have been loaded.

    Raises:
        ValueError: The average is of another UNet.
    """
    ema = Ema(unet, decay)
    if not folder.is_dir():
        return ema
    with open_weights(folder / WEIGHTS_NAME) as weights:
        state = dict(weights)  # mapped, not read
        wanted = ema.state_dict()[_CONV_IN]
        if _CONV_IN in state and state[_CONV_IN].shape[1] < wanted.shape[1]:
            state[_CONV_IN] = widened(state[_CONV_IN], wanted.shape[1])
        wrong = [key for key, value in ema.state_dict().items() if key in state and state[key].shape != value.shape]
        if wrong:
            raise ValueError(f"{folder}: {wrong[0]} is {list(state[wrong[0]].shape)}: the average is of another UNet")
        num_updates = json.loads((folder / EMA_NAME).read_text(encoding="utf-8"))["num_updates"]
        warmed_up = max(0, round((10 * decay - 1) / (1 - decay)))
        ema.load_state_dict(state, warmed_up if num_updates is None else num_updates)
    return ema
