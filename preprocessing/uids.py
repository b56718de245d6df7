"""``uid_of`` and ``is_held_out`` for whole columns.

A uid is held as its two halves, 64 bits each, which polars and numpy compare and sort as they are. The upper half
orders rows wherever some must go: the smallest win. The lower half says which rows are held out.
"""

import math

import numpy as np
import polars as pl
import polars_hash  # noqa: F401  # gives expressions the namespace `nchash`
import pyarrow as pa

_HALF = 2**64
_HEX = np.frombuffer(b"".join(b"%02x" % value for value in range(256)), np.uint16)


def uid_halves(url: pl.Expr, caption: pl.Expr) -> tuple[pl.Expr, pl.Expr]:
    """The halves of ``uid_of``, as UInt64, called ``uid_high`` and ``uid_low``; neither column may have nulls."""
    whole = pl.concat_str(url.str.len_bytes().cast(pl.String), pl.lit(":"), url, caption)
    return _halves(whole, "uid")


def url_halves(url: pl.Expr) -> tuple[pl.Expr, pl.Expr]:
    """XXH3-128 of the URL in halves, called ``url_high`` and ``url_low``."""
    return _halves(url, "url")


def _halves(text: pl.Expr, name: str) -> tuple[pl.Expr, pl.Expr]:
    whole = text.nchash.xxh3_128()  # pyright: ignore[reportAttributeAccessIssue]  # registered at run time
    return (
        (whole // _HALF).cast(pl.UInt64).alias(f"{name}_high"),
        (whole % _HALF).cast(pl.UInt64).alias(f"{name}_low"),
    )


def uid_text(high: np.ndarray, low: np.ndarray) -> pa.StringArray:
    """Uids as 32 hexadecimal digits, as ``uid_of`` writes them.

    Args:
        high: uint64, n.
        low: uint64, n.
    """
    big_endian = np.stack([high, low], axis=1).astype(">u8").view(np.uint8)
    offsets = np.arange(0, 32 * (len(high) + 1), 32, dtype=np.int32)
    return pa.StringArray.from_buffers(len(high), pa.py_buffer(offsets), pa.py_buffer(_HEX[big_endian]))


def threshold(fraction: float) -> int:
    """Halves below this are the given share of all; for fractions below 1."""
    return math.ceil(fraction * _HALF)
