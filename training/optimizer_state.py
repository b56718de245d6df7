"""The optimizer's state by parameter name, whole: the same on one process as on eight, under ZeRO 0, 1 and 2.

Under ZeRO each rank holds a slice of one flat tensor, cut without regard to where parameters begin. A checkpoint in
that form fits one number of processes and one stage. Here each parameter's piece is looked up, gathered into a tensor
of the parameter's shape, and scattered again however the ranks of another day divide them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from infra.errors import ContractError

MOMENTS: Final = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter, both float32 and of its shape; and one count of steps for all."""


@dataclass(frozen=True)
class _Piece:
    """Where this rank's optimizer holds a part of a parameter.

    Attributes:
        held: The tensor that the optimizer steps, float32: the parameter itself, or ZeRO's flat slice.
        start: Where the part begins in ``held``, flattened.
        begin: Where it begins in the parameter, flattened.
        num_elements: How long it is.
    """

    held: Tensor
    start: int
    begin: int
    num_elements: int

    def read(self, tensor: Tensor) -> Tensor:
        """The part, flat, of ``held`` or of a moment that has its shape."""
        return tensor.detach().reshape(-1).narrow(0, self.start, self.num_elements)

    def write(self, tensor: Tensor, value: Tensor) -> None:
        """Sets the part of ``held``, or of a moment that has its shape, from the whole parameter's value."""
        if self.num_elements == value.numel() == tensor.numel():  # whole, in whatever memory format
            tensor.copy_(value.reshape(tensor.shape))
        else:
            part = value.reshape(-1).narrow(0, self.begin, self.num_elements)
            tensor.view(-1).narrow(0, self.start, self.num_elements).copy_(part)


class OptimizerState:
    """AdamW's state in an engine, by parameter name. All ranks call each method, with the same arguments.

    Args:
        engine: DeepSpeed's, with torch's AdamW inside.
        module: The module that it trains.

    Raises:
        ContractError: This optimizer's state is not understood.
    """

    def __init__(self, engine: Any, module: nn.Module) -> None:
        zero = engine.optimizer if hasattr(engine.optimizer, "single_partition_of_fp32_groups") else None
        self._optimizer: torch.optim.Optimizer = engine.optimizer if zero is None else zero.optimizer
        if not isinstance(self._optimizer, torch.optim.AdamW):
            raise ContractError(
                f"checkpoint: the engine's optimizer is {type(self._optimizer).__name__}; only torch's AdamW, under "
                "ZeRO 0, 1 or 2, can be saved"
            )
        self._parameters = dict(module.named_parameters())
        self._is_divided = zero is not None and dist.get_world_size() > 1
        self._pieces = {
            name: _whole(parameter) if zero is None else _slice_of(parameter, zero)
            for name, parameter in self._parameters.items()
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters, in the module's order."""
        return {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}

    @property
    def num_updates(self) -> int:
        """How often the optimizer stepped.

        Raises:
            ContractError: It did not step all parameters alike.
        """
        counts = {int(state["step"]) for state in self._optimizer.state.values() if "step" in state}
        if len(counts) > 1:
            raise ContractError(
                f"checkpoint: the optimizer's parameters were stepped {sorted(counts)} times, not alike"
            )
        return counts.pop() if counts else 0

    def gather(self, name: str, moment: str | None = None) -> Tensor | None:
        """A parameter, or a moment of it, whole.

        Args:
            name: The parameter's.
            moment: One of `MOMENTS`; None for the float32 parameter that the optimizer steps.

        Returns:
            A float32 tensor of the parameter's shape on rank 0, None on the others.
        """
        parameter, piece = self._parameters[name], self._pieces[name]
        is_first = dist.get_rank() == 0
        if not self._is_divided and not is_first:
            return None
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if piece is not None:
            held = piece.held if moment is None else self._optimizer.state.get(piece.held, {}).get(moment)
            if held is not None:
                whole.narrow(0, piece.begin, piece.num_elements).copy_(piece.read(held))
        if self._is_divided:
            # Exactly one rank has each element. As integers, so that their sum with zeros is the very bits: -0.0 too.
            dist.reduce(whole.view(torch.int32), dst=0)
        return whole.reshape(parameter.shape) if is_first else None

    @torch.no_grad()
    def load_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the module's parameters, and the float32 ones that the optimizer steps."""
        for name, parameter in self._parameters.items():
            tensor = tensors[name]
            parameter.copy_(tensor)
            piece = self._pieces[name]
            if piece is not None and piece.held is not parameter:
                piece.write(piece.held, tensor)

    @torch.no_grad()
    def load_moments(self, moments: Mapping[str, Mapping[str, Tensor]], num_updates: int) -> None:
        """Sets the optimizer's moments, and how often it stepped.

        Args:
            moments: Name of the moment → name of the parameter → tensor; each is asked for once.
            num_updates: What `num_updates` was.
        """
        self._optimizer.state.clear()
        if num_updates == 0:
            return  # AdamW makes them at its first step
        for name, piece in self._pieces.items():
            if piece is None:
                continue
            state = self._optimizer.state[piece.held]
            if not state:
                # In the order in which AdamW makes them itself.
                state["step"] = self._count(num_updates, piece.held)
                for moment in MOMENTS:
                    state[moment] = torch.zeros_like(piece.held, memory_format=torch.preserve_format)
            for moment in MOMENTS:
                piece.write(state[moment], moments[moment][name])

    def _count(self, num_updates: int, held: Tensor) -> Tensor:
        on_device = any(group.get("fused") or group.get("capturable") for group in self._optimizer.param_groups)
        return torch.tensor(float(num_updates), dtype=torch.float32, device=held.device if on_device else "cpu")


def _whole(parameter: nn.Parameter) -> _Piece:
    return _Piece(parameter, 0, 0, parameter.numel())


def _slice_of(parameter: nn.Parameter, zero: Any) -> _Piece | None:
    """DeepSpeed says of each parameter which part of it lies in this rank's slice, if any does."""
    mapping = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]  # set by DeepSpeed
    if mapping is None:
        return None
    held, of_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    return _Piece(flat, held.start, of_parameter.start, held.numel)
