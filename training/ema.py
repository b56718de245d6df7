"""The moving average of the UNet's weights: what is validated and published."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


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
