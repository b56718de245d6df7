"""Which parts of the rows a training asks for. No torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Fields:
    """Which tensors of the rows are wanted: only these columns are mapped and copied.

    Attributes:
        text: ``embeddings`` (`Batch.text_embeddings`) or ``token_ids`` (`Batch.token_ids`).
        mask: ``cached`` (`Batch.mask` and `Batch.masked_moments`, of the visit's variant) or ``none``.
        moments: Whether `Batch.moments` is wanted.
        images: Whether `Batch.images` is wanted: the crops, decoded.
    """

    text: Literal["embeddings", "token_ids"] = "embeddings"
    mask: Literal["cached", "none"] = "cached"
    moments: bool = True
    images: bool = False
