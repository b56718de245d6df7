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


def with_uids(rows: pl.DataFrame) -> pl.DataFrame:
    """Adds the halves of ``uid_of`` of ``url`` and ``caption``, as UInt64: ``uid_high`` and ``uid_low``.

    A null counts as an empty text.
    """
    url, caption = (pl.col(name).fill_null("") for name in ("url", "caption"))
    whole = pl.concat_str(url.str.len_bytes().cast(pl.String), pl.lit(":"), url, caption)
    hashed = rows.select(whole.nchash.xxh3_128())  # pyright: ignore[reportAttributeAccessIssue]  # as below
    return rows.hstack(hashed.select(_halves(pl.first(), "uid")))  # in two steps, or it would be hashed twice


def url_halves(url: pl.Expr) -> tuple[pl.Expr, pl.Expr]:
    """XXH3-128 of the URL in halves, called ``url_high`` and ``url_low``."""
    return _halves(url.nchash.xxh3_128(), "url")  # pyright: ignore[reportAttributeAccessIssue]  # registered at run time


def _halves(whole: pl.Expr, name: str) -> tuple[pl.Expr, pl.Expr]:
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
