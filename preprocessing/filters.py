"""Which rows of metadata are kept: a pure function of each row and of the limits.

The first rule that refuses a row gives the reason. Their order is that of ``Reason``: no URL, safety, watermark,
similarity, aesthetics, size, aspect, caption. A score that is missing (null), NaN or infinite is a refusal wherever
there is a limit, and ``punsafe`` always has one.

Scores are 32-bit numbers in LAION's files and limits are decimal fractions, so a comparison could go either way at the
limit itself: 0.7 as a 32-bit number is below 0.7. "Strictly below" therefore means below in both precisions, and "at
least" means at least in 32 bits: a score written with the limit's own digits is refused by the former and kept by the
latter.
"""

import math
from collections.abc import Iterator

import numpy as np
import polars as pl

from preprocessing.contracts.config import SelectConfig
from preprocessing.contracts.reasons import Reason

_MISSING = pl.lit("missing")


def judge(rows: pl.DataFrame, config: SelectConfig) -> pl.DataFrame:
    """Says of each row why it is refused, if it is.

    Args:
        rows: The columns ``laion.ROWS``.
        config: The limits.

    Returns:
        As many rows, in the same order, with the columns ``reason`` (a ``Reason``'s value; null: kept) and ``detail``
        (the value that was refused; null: kept).
    """
    rules = list(_rules(config))
    return rows.select(
        reason=pl.coalesce(pl.when(refused).then(pl.lit(reason.value)) for reason, refused, _ in rules),
        detail=pl.coalesce(pl.when(refused).then(detail) for _, refused, detail in rules),
    )


def _rules(config: SelectConfig) -> Iterator[tuple[Reason, pl.Expr, pl.Expr]]:
    """(reason, whether it refuses: never null, what it refused: never null), in order."""
    yield Reason.NO_URL, _stripped("url") == "", _MISSING
    yield Reason.PUNSAFE_MISSING, _is_missing("punsafe"), _value("punsafe")
    yield Reason.PUNSAFE_HIGH, _is_not_below("punsafe", config.max_punsafe), _value("punsafe")
    if config.max_pwatermark is not None:
        yield Reason.PWATERMARK_MISSING, _is_missing("pwatermark"), _value("pwatermark")
        yield Reason.PWATERMARK_HIGH, _is_not_below("pwatermark", config.max_pwatermark), _value("pwatermark")
    if config.min_similarity is not None:
        yield Reason.SIMILARITY_LOW, _is_below("similarity", config.min_similarity), _value("similarity")
    if config.min_aesthetic is not None:
        yield Reason.AESTHETIC_LOW, _is_below("aesthetic", config.min_aesthetic), _value("aesthetic")
    width, height = (pl.col(name).fill_null(0) for name in ("width", "height"))
    shorter, longer = pl.min_horizontal(width, height), pl.max_horizontal(width, height)
    size = pl.format("{}x{}", width, height)
    yield Reason.SIDE_SMALL, shorter <= 0, _MISSING
    yield Reason.SIDE_SMALL, shorter < config.min_side_px, size
    yield Reason.ASPECT_EXTREME, longer.cast(pl.Float64) > shorter.cast(pl.Float64) * config.max_aspect, size
    num_chars = _stripped("caption").str.len_chars()
    yield Reason.CAPTION_EMPTY, num_chars < config.min_caption_chars, pl.format("{} characters", num_chars)
    yield Reason.CAPTION_LONG, num_chars > config.max_caption_chars, pl.format("{} characters", num_chars)


def _stripped(column: str) -> pl.Expr:
    return pl.col(column).fill_null("").str.strip_chars()


def _score(column: str) -> pl.Expr:
    return pl.col(column).fill_null(math.nan)


def _is_missing(column: str) -> pl.Expr:
    return ~_score(column).is_finite()


def _is_not_below(column: str, limit: float) -> pl.Expr:
    single = _score(column).cast(pl.Float32).cast(pl.Float64)
    return _is_missing(column) | (_score(column) >= limit) | (single >= float(np.float32(limit)))


def _is_below(column: str, limit: float) -> pl.Expr:
    single = _score(column).cast(pl.Float32).cast(pl.Float64)
    return _is_missing(column) | (single < float(np.float32(limit)))


def _value(column: str) -> pl.Expr:
    return pl.col(column).cast(pl.String).fill_null("missing")
