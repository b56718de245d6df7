"""Writing safetensors one tensor at a time: a file of gigabytes costs the memory of its largest tensor.

The library's own writer wants all tensors at once, in the dtype of the file. A conversion, or a checkpoint that is
mapped from another file, would then stand in memory twice.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

DTYPE_NAMES: Final[dict[torch.dtype, str]] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The format's names of the dtypes that are written here."""

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Key → dtype in the file, shape."""

_ALIGNMENT: Final = 8


def save_safetensors(
    path: Path | str,
    state_dict: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors to one safetensors file, which appears whole or not at all.

    The same tensors give the same bytes, those that the library's own writer gives.

    Args:
        path: the file; its folder is made.
        state_dict: tensors on any device, shared storage allowed (each is written in full). A lazy mapping may make
            them on demand: each is asked for twice, first for its shape, and not kept.
        dtype: what floating-point tensors are converted to; None leaves them.
        metadata: strings for the file's header, beside `format: pt`.

    Raises:
        ValueError: a tensor has a dtype that the format does not know.
    """
    layout = {key: (_dtype_in_file(key, tensor, dtype), tuple(tensor.shape)) for key, tensor in state_dict.items()}
    write_safetensors(path, layout, state_dict.__getitem__, metadata=metadata)


def write_safetensors(
    path: Path | str,
    layout: Layout,
    tensor_of: Callable[[str], Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors that are made one after another, as `save_safetensors` does; each is asked for once.

    Args:
        path: the file; its folder is made.
        layout: key → dtype in the file, shape.
        tensor_of: gives the tensor of a key; called in the order of `file_order`.
        metadata: strings for the file's header, beside `format: pt`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    names = file_order(layout)
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("wb") as file:
        file.write(_header(names, layout, {"format": "pt", **(metadata or {})}))
        for name in names:
            file.write(_data(tensor_of(name), layout[name][0]))
    os.replace(scratch, path)


def file_order(layout: Layout) -> list[str]:
    """The keys in the order in which a file holds them: processes that make a tensor together agree on it by this."""
    # The widest dtypes first, so that every tensor begins at a multiple of its item's size.
    return sorted(layout, key=lambda key: (-layout[key][0].itemsize, _rank(layout[key][0]), key))


def _dtype_in_file(key: str, tensor: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    dtype = wanted if wanted is not None and tensor.is_floating_point() else tensor.dtype
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"{key} is {dtype}: safetensors files hold {', '.join(DTYPE_NAMES.values())}")
    return dtype


def _rank(dtype: torch.dtype) -> int:
    """Among dtypes of one size, the order in which the library writes them."""
    order = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")
    return order.index(DTYPE_NAMES[dtype])


def _header(names: list[str], layout: Layout, metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        dtype, shape = layout[name]
        begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _data(tensor: Tensor, dtype: torch.dtype) -> Any:
    """The tensor's bytes, as numpy holds them: without another copy."""
    flat = tensor.detach().to(device="cpu", dtype=dtype).contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
