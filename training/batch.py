"""What a batch of training rows holds, and the memory in which it is put together."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from training.compatibility import DatasetSpecs
from training.fields import Fields
from training.rows import UID_COLUMN, UID_NUM_BYTES

__all__ = ["Batch", "BatchBuffers", "Constants", "Fields"]

_DTYPES: Final = {"float16": torch.float16, "float32": torch.float32}
_HUGE_PAGE_BYTES: Final = 2 << 20
_ALIGNMENT: Final = 4096
_BITS_OF_BYTE: Final = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.float32)


@dataclass(frozen=True)
class Constants:
    """Tensors that belong to the whole dataset.

    Attributes:
        null_text_embedding: (num_tokens, width) of the empty caption.
        full_mask_moments: (2c, h, w) of a picture that is all hole.
        null_token_ids: (num_tokens,) int64 of the empty caption; None in datasets without.
    """

    null_text_embedding: Tensor
    full_mask_moments: Tensor
    null_token_ids: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Some training rows; on the CPU, in the dataset's precision. What `Fields` does not ask for is None.

    Attributes:
        uids: One a sample.
        moments: (batch, 2c, h, w), mean | logvar, unscaled.
        masked_moments: (batch, 2c, h, w), of the picture with the hole.
        mask: (batch, 1, h, w) float32 in {0, 1}, 1 = repaint.
        text_embeddings: (batch, num_tokens, width).
        token_ids: (batch, num_tokens) int64.
        images: (batch, side, side, 3) uint8, the crops.
        epochs: How often each sample was seen before this visit: epoch of the dataset that it is from.
    """

    uids: tuple[str, ...]
    moments: Tensor | None
    masked_moments: Tensor | None
    mask: Tensor | None
    text_embeddings: Tensor | None
    token_ids: Tensor | None = None
    images: Tensor | None = None
    epochs: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.uids)

    def part(self, start: int, stop: int) -> "Batch":
        """Samples ``start … stop - 1``, as views."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[start:stop] for name, value in values.items() if value is not None})


class Columns:
    """The columns of fixed width of which batches are made.

    Args:
        wanted: Which tensors.
        specs: Their shapes.

    Attributes:
        widths: The columns and the bytes of a value; the uids first, as what they are in memory.
        places: Tensor → place of its column in `widths`; for those of the masks, of variant 0: the others follow.
    """

    def __init__(self, wanted: Fields, specs: DatasetSpecs) -> None:
        latents, text = specs.latents, specs.text
        self.widths: list[tuple[str, int]] = [(UID_COLUMN, UID_NUM_BYTES)]
        self.places: dict[str, int] = {}
        if wanted.moments:
            self._add("moments", latents.moments_num_bytes)
        if wanted.mask == "cached":
            self._add("mask", latents.mask_num_bytes, specs.masks.num_variants)
            self._add("masked_moments", latents.moments_num_bytes, specs.masks.num_variants)
        if wanted.text == "embeddings":
            self._add("text_embeddings", text.embeddings_num_bytes)
        else:
            self._add("token_ids", text.token_ids_num_bytes)

    def _add(self, name: str, width: int, num_variants: int | None = None) -> None:
        self.places[name] = len(self.widths)
        names = [name] if num_variants is None else [f"{name}_{k}" for k in range(num_variants)]
        self.widths += [(column, width) for column in names]


class BatchBuffers:
    """Memory for one batch: what is copied out of the shards is copied to here, and nowhere else.

    Args:
        num_samples: Of the batch.
        wanted: Which tensors.
        specs: Their shapes.
        pin_memory: Whether a GPU is to copy from it by itself; needs CUDA.

    Attributes:
        raw: Column without variant (``moments``, ``masked_moments``, ``mask``, ``text_embeddings``, ``token_ids``) →
            (batch, bytes of a value) uint8: to be written.
        images: (batch, side, side, 3) uint8, likewise; None where they are not wanted.
    """

    def __init__(self, num_samples: int, wanted: Fields, specs: DatasetSpecs, *, pin_memory: bool = False) -> None:
        latents, text = specs.latents, specs.text
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if wanted.moments:
            shapes["moments"] = (_DTYPES[latents.dtype], latents.moments_shape)
        if wanted.mask == "cached":
            shapes["masked_moments"] = (_DTYPES[latents.dtype], latents.moments_shape)
            shapes["mask"] = (torch.float32, (1, latents.latent_px, latents.latent_px))
        if wanted.text == "embeddings":
            shapes["text_embeddings"] = (_DTYPES[text.dtype], text.embeddings_shape)
        else:
            shapes["token_ids"] = (torch.int64, (text.num_tokens,))
        if wanted.images:
            shapes["images"] = (torch.uint8, (latents.resolution_px, latents.resolution_px, 3))
        self._tensors = _allocate(num_samples, shapes, pin_memory=pin_memory)
        packed = {"mask": latents.mask_num_bytes, "token_ids": text.token_ids_num_bytes}
        self.raw: dict[str, Tensor] = {}
        for name, tensor in self._tensors.items():
            if name in packed:
                self.raw[name] = torch.empty(num_samples, packed[name], dtype=torch.uint8)
            elif name != "images":
                self.raw[name] = tensor.view(num_samples, -1).view(torch.uint8)
        self.images: np.ndarray | None = self._tensors["images"].numpy() if wanted.images else None

    def to_batch(self, uids: tuple[str, ...], epochs: tuple[int, ...]) -> Batch:
        """What was written, as a batch: views of this memory, which the next batch in it overwrites."""
        tensors: dict[str, Tensor | None] = dict.fromkeys(
            ("moments", "masked_moments", "mask", "text_embeddings", "token_ids", "images")
        )
        tensors |= self._tensors
        if "mask" in self.raw:
            _unpack_bits(self.raw["mask"].numpy(), self._tensors["mask"].numpy())
        if "token_ids" in self.raw:
            self._tensors["token_ids"].numpy()[:] = self.raw["token_ids"].numpy().view("<u2")
        return Batch(uids=uids, epochs=epochs, **tensors)


def _allocate(
    num_samples: int, shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]], *, pin_memory: bool
) -> dict[str, Tensor]:
    """Tensors (num_samples, *shape), one behind the other in one piece of memory.

    Of huge pages, where the system has them: copying there is a sixth faster. numpy asks for them, torch does not.
    """
    ends, at = {}, 0
    for name, (dtype, shape) in shapes.items():
        at = -(-at // _ALIGNMENT) * _ALIGNMENT
        ends[name] = (at, at := at + num_samples * math.prod(shape) * dtype.itemsize)
    if pin_memory:
        memory = torch.empty(at, dtype=torch.uint8, pin_memory=True)
    else:
        raw = np.empty(at + _HUGE_PAGE_BYTES, dtype=np.uint8)
        memory = torch.from_numpy(raw[-raw.ctypes.data % _HUGE_PAGE_BYTES :])
    return {
        name: memory[slice(*ends[name])].view(dtype).view(num_samples, *shape)
        for name, (dtype, shape) in shapes.items()
    }


def _unpack_bits(packed: np.ndarray, out: np.ndarray) -> None:
    """(batch, bytes), most significant bit first → float32 0 and 1, as many of them as `out` has."""
    values = out.reshape(len(out), -1)
    if values.shape[1] % 8:
        values[:] = np.unpackbits(packed, axis=1, count=values.shape[1])
    else:  # 8 floats at once: 4 times as fast
        np.take(_BITS_OF_BYTE, packed, axis=0, out=values.reshape(*packed.shape, 8), mode="clip")
