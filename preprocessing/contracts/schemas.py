"""Arrow schemas of what is published between stages.

| stage | file | schema |
| --- | --- | --- |
| select | ``shard-00000.parquet`` | ``SELECTED`` |
| download | ``shard-00000.parquet`` | ``DOWNLOADED`` |
| encode | ``train-00000.parquet``, ``validation-00000.parquet`` | ``training_rows(…)`` |
| every | ``rejects-00000.parquet`` | ``REJECTS`` |

File names of ``download`` and ``encode`` end in a part of their hash (``shard-00000-0123456789ab.parquet``): shards of
the first cannot be made twice alike, those of the second not on another kind of machine. The manifest names the files.

Tensors are non-nullable ``fixed_size_binary``, little-endian, C order; see ``TENSOR_WRITER`` for how they must be
written.
"""

from collections.abc import Sequence

import pyarrow as pa

REJECTS = pa.schema(
    [
        pa.field("uid", pa.string(), nullable=False),
        pa.field("url", pa.string()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string()),
    ]
)

SELECTED = pa.schema(
    [
        pa.field("uid", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("similarity", pa.float32()),
        pa.field("punsafe", pa.float32(), nullable=False),
        pa.field("pwatermark", pa.float32()),
        pa.field("aesthetic", pa.float32()),
        # What the metadata says of the picture's bytes, as lower-case hexadecimal digits; null where it says nothing.
        pa.field("expected_md5", pa.string()),
        pa.field("expected_sha256", pa.string()),
        pa.field("source", pa.string()),  # the name of the subset, where source.subsets names any
        pa.field("split", pa.string(), nullable=False),
    ]
)
NOT_IN_TRAINING_ROWS = frozenset({"split", "expected_md5", "expected_sha256", "source"})

DOWNLOADED = pa.schema(
    [
        *SELECTED,
        pa.field("image", pa.binary(), nullable=False),
        pa.field("image_width", pa.int32(), nullable=False),
        pa.field("image_height", pa.int32(), nullable=False),
        pa.field("original_width", pa.int32(), nullable=False),
        pa.field("original_height", pa.int32(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)

# One data page a column chunk and no encoding: the raw values lie at
# data_page_offset + total_compressed_size - num_rows * width, and can be memory-mapped.
TENSOR_WRITER = {
    "compression": "NONE",
    "use_dictionary": False,
    "write_statistics": False,
    "data_page_size": 2**31 - 1,
    "row_group_size": 2**31 - 1,
    "store_schema": True,
}


def training_rows(
    moments_num_bytes: int,
    embeddings_num_bytes: int,
    mask_num_bytes: int,
    num_mask_variants: int,
    *,
    has_image: bool = True,
    has_moments: bool = True,
    text_columns: Sequence[str] = ("text_embeddings",),
    token_ids_num_bytes: int = 77 * 2,
) -> pa.Schema:
    """The schema of training rows.

    Args:
        moments_num_bytes: Of ``moments`` (8 × h × w fp16, mean | logvar, unscaled).
        embeddings_num_bytes: Of ``text_embeddings`` (77 × width fp16).
        mask_num_bytes: Of ``mask_k`` (h × w bits, row-major, most significant bit first).
        num_mask_variants: K.
        has_image: Whether the crop is kept.
        has_moments: Whether its moments are.
        text_columns: Of ``text_embeddings`` and ``token_ids`` those that are stored.
        token_ids_num_bytes: Of ``token_ids`` (77 uint16).
    """
    text = {"text_embeddings": embeddings_num_bytes, "token_ids": token_ids_num_bytes}
    tensors = [("moments", moments_num_bytes)] if has_moments else []
    tensors += [(name, text[name]) for name in text_columns]
    for k in range(num_mask_variants):
        tensors += [(f"mask_{k}", mask_num_bytes), (f"masked_moments_{k}", moments_num_bytes)]
    return pa.schema(
        [
            *(SELECTED.field(name) for name in SELECTED.names if name not in NOT_IN_TRAINING_ROWS),
            pa.field("sha256", pa.string(), nullable=False),
            pa.field("crop_top", pa.int32(), nullable=False),
            pa.field("crop_left", pa.int32(), nullable=False),
            pa.field("resized_width", pa.int32(), nullable=False),
            pa.field("resized_height", pa.int32(), nullable=False),
            *([pa.field("image", pa.binary(), nullable=False)] if has_image else []),
            *(pa.field(name, pa.binary(num_bytes), nullable=False) for name, num_bytes in tensors),
        ]
    )
