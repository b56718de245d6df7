"""What is in a checkpoint: all that a run needs to go on, in a form that says nothing of how many processes wrote it.

```
unet/ ema/                 diffusers folders, float32 safetensors: for everybody, and to go on from
optimizer/exp_avg.safetensors  exp_avg_sq.safetensors    AdamW's moments, whole, by the parameters' names
generators.safetensors     torch's generators of each rank
state.json                 step, position, counts, digests, config
```

The schedule of learning rates is a function of the step, the draws of noise, timesteps and masks are functions of the
seed and of the batch's number in the order (position / global batch size): they have no state of their own. There is no
pickle: nothing here can bring code along.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
import torch.distributed as dist
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from infra.errors import ContractError
from model.safetensors_writer import Layout, file_order, save_safetensors, write_safetensors
from model.weight_files import Weights, open_weights
from model.weights import WEIGHTS_NAME
from training.ema import Ema
from training.health import Skips
from training.optimizer_state import MOMENTS, OptimizerState

LOGGER = logging.getLogger(__name__)

STATE_NAME: Final = "state.json"
GENERATORS_NAME: Final = "generators.safetensors"


class TrainingState(BaseModel):
    """What a resumed run must know besides tensors.

    Attributes:
        format_version: Of the checkpoint's files.
        step: Optimizer steps taken.
        position: Samples seen, and passed over: where the order goes on. The next step's draws are named by it.
        ema_num_updates: How often the average was updated.
        optimizer_num_updates: How often the optimizer stepped; `save_state` fills it in.
        world_size: Processes that wrote it; any number may go on from it.
        run_digest: Of what determines the run.
        dataset_digest: Of the dataset.
        skips: What was not trained on because numbers were not finite.
        loss_scale: Of fp16, and the good steps since it last changed.
        tombstones: From which positions on which rows were in no batch: the position, and the digest of the tombstones;
            before the first one none were.
        config: The `TrainConfig`, for people.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[2] = 2
    step: int = Field(ge=0)
    position: int = Field(ge=0)
    ema_num_updates: int = Field(ge=0)
    optimizer_num_updates: int = Field(default=0, ge=0)
    world_size: int = Field(ge=1)
    run_digest: str
    dataset_digest: str
    skips: Skips = Skips()
    loss_scale: tuple[float, int] | None = None
    tombstones: tuple[tuple[int, str], ...] = ()
    config: dict[str, Any]


# ------------------------------------------------------------------------------------------------------------- writing


def save_state(folder: Path, engine: Any, unet: UNet2DConditionModel, ema: Ema | None, state: TrainingState) -> None:
    """Writes a checkpoint's files. All ranks call it: each tensor is put together from all of them, one after another.

    Args:
        folder: Where to; rank 0 writes, the others may not even have it.
        engine: The DeepSpeed engine.
        unet: The module inside it.
        ema: On rank 0.
        state: Where the run is; rank 0's is written.
    """
    optimizer = OptimizerState(engine, unet)
    is_first = dist.get_rank() == 0
    shapes = optimizer.shapes
    buffers = {name: buffer for name, buffer in unet.state_dict().items() if name not in shapes}
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        name: (torch.float32, shape) for name, shape in shapes.items()
    }
    for moment in MOMENTS:
        gather = functools.partial(optimizer.gather, moment=moment)
        _write_together(folder / _moment_name(moment), layout, gather, is_first)
    layout |= {name: (_widened(buffer.dtype), tuple(buffer.shape)) for name, buffer in buffers.items()}
    _write_together(
        folder / "unet" / WEIGHTS_NAME,
        layout,
        lambda name: buffers[name] if name in buffers else optimizer.gather(name),
        is_first,
    )
    generators = _gather_generators(next(unet.parameters()).device)
    if not is_first:
        return
    assert ema is not None
    save_safetensors(folder / "ema" / WEIGHTS_NAME, {**buffers, **ema.state_dict()}, dtype=torch.float32)
    for name in ("unet", "ema"):
        unet.save_config(folder / name)
    save_safetensors(folder / GENERATORS_NAME, generators)
    written = state.model_copy(update={"optimizer_num_updates": optimizer.num_updates})
    (folder / STATE_NAME).write_text(written.model_dump_json(indent=1), encoding="utf-8")


def _write_together(path: Path, layout: Layout, gather: Callable[[str], Tensor | None], is_first: bool) -> None:
    """One file of tensors that all ranks make together, in the file's order."""
    if not is_first:
        for name in file_order(layout):
            gather(name)
        return

    def whole(name: str) -> Tensor:
        tensor = gather(name)
        assert tensor is not None, "rank 0 gets it"
        return tensor

    write_safetensors(path, layout, whole)


def _moment_name(moment: str) -> str:
    return f"optimizer/{moment}.safetensors"


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point else dtype


def _gather_generators(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators on every rank, as bytes: name → (num_bytes,) uint8."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    gathered: dict[str, Tensor] = {}
    for name, state in states.items():
        own = state.to(device)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        gathered |= {f"{name}.{rank}": part.cpu() for rank, part in enumerate(parts)}
    return gathered


# ------------------------------------------------------------------------------------------------------------- reading


def read_state(folder: Path) -> TrainingState:
    """The state of a fetched checkpoint.

    Raises:
        ContractError: It is none of this version.
    """
    try:
        return TrainingState.model_validate_json((folder / STATE_NAME).read_bytes())
    except (ValidationError, FileNotFoundError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "it is missing"
        raise ContractError(
            f"checkpoint: {folder / STATE_NAME} cannot be read ({reason}); go on with the version of Lacuna that wrote "
            "it, or give the run another id"
        ) from error


def load_state(
    folder: Path, engine: Any, unet: UNet2DConditionModel, ema: Ema | None, expected: TrainingState
) -> TrainingState:
    """Loads a fetched and verified checkpoint. All ranks call it; they may be more or fewer than wrote it.

    Args:
        folder: From `training.checkpoint.Checkpoints.fetch_newest`.
        engine: The DeepSpeed engine, new.
        unet: The module inside it.
        ema: On rank 0.
        expected: The state of this run at step 0.

    Returns:
        Its state.

    Raises:
        ContractError: It is the checkpoint of another run, or of another UNet.
    """
    state = read_state(folder)
    for name in ("run_digest", "dataset_digest"):
        ours, theirs = getattr(expected, name), getattr(state, name)
        if ours != theirs:
            raise ContractError(
                f"checkpoint at step {state.step}: its {name} is {theirs}, this run's is {ours}; "
                "give the run another id"
            )
    optimizer = OptimizerState(engine, unet)
    # Opened, not read: each tensor is in memory only while it is copied.
    with (
        open_weights(folder / "unet" / WEIGHTS_NAME) as parameters,
        open_weights(folder / _moment_name(MOMENTS[0])) as first,
        open_weights(folder / _moment_name(MOMENTS[1])) as second,
    ):
        for tensors in (parameters, first, second):
            _check_shapes(tensors, optimizer.shapes, state.step)
        optimizer.load_parameters(parameters)
        for name, buffer in unet.named_buffers():
            if name in parameters:
                buffer.copy_(parameters[name])
        optimizer.load_moments(dict(zip(MOMENTS, (first, second), strict=True)), state.optimizer_num_updates)
    if ema is not None:
        with open_weights(folder / "ema" / WEIGHTS_NAME) as average:
            names = ema.state_dict().keys()
            ema.load_state_dict({name: average[name] for name in names if name in average}, state.ema_num_updates)
    _set_generators(folder, state, next(unet.parameters()).device)
    return state


def _check_shapes(tensors: Weights, shapes: Mapping[str, tuple[int, ...]], step: int) -> None:
    for name, shape in shapes.items():
        found = tensors.shape(name) if name in tensors else None
        if found != shape:
            raise ContractError(
                f"checkpoint at step {step}: {name} has the shape {found}, this run's UNet {shape}: it is another "
                "model's; give the run another id"
            )


def _set_generators(folder: Path, state: TrainingState, device: torch.device) -> None:
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if state.world_size != world_size:
        LOGGER.warning(
            "the checkpoint at step %d was written by %d processes, now there are %d: the order of samples and every "
            "draw are the same, sums of floating-point numbers may differ in their last digits",
            state.step,
            state.world_size,
            world_size,
        )
        return  # the generators of `torch.manual_seed`: nothing of the step draws from them
    generators = load_file(folder / GENERATORS_NAME)
    torch.set_rng_state(generators[f"cpu.{rank}"])
    if device.type == "cuda" and f"cuda.{rank}" in generators:
        torch.cuda.set_rng_state(generators[f"cuda.{rank}"], device)
