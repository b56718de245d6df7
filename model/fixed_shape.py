"""Frozen models in a fixed shape: what a row becomes depends neither on its batch, nor on its place, nor on threads.

Kernels are chosen by shape and split their sums by threads, so the last bits of a result depend on both. Here a model
always sees as many rows at once as the device, the precision and the resolution say; the last row fills up what is
missing. On a CPU each such micro-batch is computed by a single thread, several side by side, which is also faster than
several threads in every operation. What remains: another kind of processor or GPU, or another release of torch.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from model.lone_threads import lone_threads

TEXT_MICRO_BATCH: Final = 16
_CUDA_TEXT_MICRO_BATCH: Final = 64
_CPU_PIXELS: Final = 1 << 16  # 16 pictures of 64 px, 1 of 256 px and more
_CUDA_PIXELS: Final = 1 << 20  # 4 pictures of 512 px
_MAX_CUDA_MICRO_BATCH: Final = 32


def vae_micro_batch(resolution_px: int, device: torch.device) -> int:
    """How many pictures the VAE sees at once."""
    area = resolution_px**2
    if device.type == "cpu":
        return max(1, _CPU_PIXELS // area)
    return min(_MAX_CUDA_MICRO_BATCH, max(1, _CUDA_PIXELS // area))


def text_micro_batch(device: torch.device) -> int:
    """How many captions the text tower sees at once."""
    return TEXT_MICRO_BATCH if device.type == "cpu" else _CUDA_TEXT_MICRO_BATCH


def is_exact(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the shape is fixed: always on a CPU; on a GPU in float32 only, where less would be slow anyway."""
    return device.type == "cpu" or dtype == torch.float32


def map_micro_batches(
    run: Callable[[Int[Tensor, " rows"]], Shaped[Tensor, "rows ..."]],
    num_rows: int,
    *,
    micro_batch: int,
    device: torch.device,
    num_lanes: int | None = None,
) -> Shaped[Tensor, "rows ..."]:
    """What a model makes of rows, a micro-batch at a time.

    Args:
        run: From the numbers of rows, always `micro_batch` of them, to what becomes of each. Called without gradients;
            on a CPU from several threads at once.
        num_rows: How many there are, at least 1.
        micro_batch: Rows at once.
        device: Where the model is.
        num_lanes: Micro-batches side by side, on a CPU; by default as many as torch uses threads.

    Returns:
        What becomes of each row, in order.
    """
    starts = range(0, num_rows, micro_batch)

    def part(start: int) -> Tensor:
        with torch.no_grad():  # known to one thread only
            return run(torch.arange(start, start + micro_batch).clamp(max=num_rows - 1))

    if device.type != "cpu":
        with _ieee_kernels():
            return torch.cat([part(start) for start in starts])[:num_rows]
    lanes = _lanes(num_lanes or torch.get_num_threads())
    return torch.cat(list(lanes.map(part, starts)))[:num_rows]


@functools.lru_cache(maxsize=4)
def _lanes(num_lanes: int) -> ThreadPoolExecutor:
    return lone_threads(num_lanes, "lane")


os.register_at_fork(after_in_child=_lanes.cache_clear)  # threads stay behind in a fork


@contextlib.contextmanager
def _ieee_kernels() -> Iterator[None]:
    """No TF32, and no choosing of kernels by a race, whatever else is set in this process."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue]
    before = (matmul.fp32_precision, conv.fp32_precision, torch.backends.cudnn.benchmark)
    deterministic = torch.backends.cudnn.deterministic
    try:
        matmul.fp32_precision = conv.fp32_precision = "ieee"
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        yield
    finally:
        matmul.fp32_precision, conv.fp32_precision, torch.backends.cudnn.benchmark = before
        torch.backends.cudnn.deterministic = deterministic
