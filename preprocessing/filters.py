"""Which rows of metadata are kept: a pure function of each row and of the limits.

The first rule that refuses a row gives the reason. Their order is that of ``Reason``: first what the numbers say
(safety, watermark, similarity, aesthetics, size, aspect), so that most texts need not be read at all; then what the
texts say (URL, language, caption, block-lists); then the subsample. A score that is missing (null), NaN or infinite is
a refusal wherever there is a limit, and ``punsafe`` always has one. Rules over several rows are in ``winners``.

Scores are 32-bit numbers in LAION's files and limits are decimal fractions, so a comparison could go either way at the
limit itself: 0.7 as a 32-bit number is below 0.7. "Strictly below" therefore means below in both precisions, and "at
least" means at least in 32 bits: a score written with the limit's own digits is refused by the former and kept by the
latter.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl

from preprocessing.block_lists import BlockLists, host_of
from preprocessing.captions import BOILERPLATE
from preprocessing.contracts.config import SelectConfig
from preprocessing.contracts.reasons import Reason
from preprocessing.uids import threshold

Rule = tuple[Reason, pl.Expr, pl.Expr]
"""(reason, whether it refuses: never null, what it refused: never null)."""

KEPT = len(Reason)
"""The code of a row that no rule refuses."""

CODES = {reason: code for code, reason in enumerate(Reason)}
"""Rules as numbers: places in ``Reason``."""

_NOTHING = BlockLists()
_MISSING = pl.lit("missing")


def judge(rows: pl.DataFrame, config: SelectConfig, blocked: BlockLists = _NOTHING) -> pl.DataFrame:
    """Says of each row why its numbers or texts refuse it, if they do.

    Args:
        rows: The columns ``laion.ROWS``.
        config: The limits.
        blocked: What the block-lists hold.

    Returns:
        As many rows, in the same order, with the columns ``reason`` (a ``Reason``'s value; null: kept) and ``detail``
        (the value that was refused; null: kept).
    """
    rules = [*score_rules(config), *text_rules(config, blocked)]
    judged = with_hosts(rows, blocked).with_columns(code_of(rules))
    return judged.select(reason_of(pl.col("code")), detail_of(rules))


def reason_of(code: pl.Expr) -> pl.Expr:
    """The value of the ``Reason`` that a code means, called ``reason``; null where the row is kept."""
    return code.replace_strict(dict(enumerate(Reason)), default=None, return_dtype=pl.String).alias("reason")


def detail_of(rules: Sequence[Rule]) -> pl.Expr:
    """What the rule that a row's ``code`` names refused, called ``detail``; null where the row is kept.

    Rules with one reason say the same of it.
    """
    detail = pl.lit(None, pl.String)
    for reason, _, refused in rules:
        detail = pl.when(pl.col("code") == CODES[reason]).then(refused).otherwise(detail)
    return detail.alias("detail")


def code_of(rules: Sequence[Rule]) -> pl.Expr:
    """The code of the first rule that refuses, else ``KEPT``; UInt8, called ``code``."""
    code: pl.Expr = pl.lit(KEPT, pl.UInt8)
    for reason, refused, _ in reversed(rules):
        code = pl.when(refused).then(pl.lit(CODES[reason], pl.UInt8)).otherwise(code)
    return code.alias("code")


def score_rules(config: SelectConfig) -> Iterator[Rule]:
    """The rules that need numbers only, in order."""
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
    yield Reason.SIDE_SMALL, shorter < config.min_side_px, pl.when(shorter <= 0).then(_MISSING).otherwise(size)
    yield Reason.ASPECT_EXTREME, longer.cast(pl.Float64) > shorter.cast(pl.Float64) * config.max_aspect, size


def text_rules(config: SelectConfig, blocked: BlockLists) -> Iterator[Rule]:
    """The rules that need texts, in order; where hosts are blocked, the column ``is_host_blocked``, too."""
    yield Reason.NO_URL, _stripped("url") == "", _MISSING
    yield Reason.TEXT_INVALID, ~pl.col("is_text"), pl.lit("not UTF-8")
    if config.languages:
        wanted = [language.strip().lower() for language in config.languages]
        language = _stripped("language").str.to_lowercase()
        yield Reason.LANGUAGE_REFUSED, ~language.is_in(wanted), pl.col("language").fill_null("missing")
    num_chars = _stripped("caption").str.len_chars()
    yield Reason.CAPTION_EMPTY, num_chars < config.min_caption_chars, pl.format("{} characters", num_chars)
    yield Reason.CAPTION_LONG, num_chars > config.max_caption_chars, pl.format("{} characters", num_chars)
    if config.drop_boilerplate:
        caption = pl.col("caption").fill_null("")
        yield Reason.CAPTION_BOILERPLATE, caption.str.contains(BOILERPLATE), caption.str.head(100)
    listed = pl.lit("listed")  # what is listed is private
    if blocked.urls:
        yield Reason.URL_BLOCKED, _stripped("url").is_in(list(blocked.urls)), listed
    if blocked.hosts:
        yield Reason.HOST_BLOCKED, pl.col("is_host_blocked"), listed
    if blocked.hashes:
        known = list(blocked.hashes)
        hashes = (pl.col(name).fill_null("").is_in(known) for name in ("expected_md5", "expected_sha256"))
        yield Reason.HASH_BLOCKED, pl.any_horizontal(*hashes), listed


def with_hosts(rows: pl.DataFrame, blocked: BlockLists) -> pl.DataFrame:
    """Adds ``is_host_blocked`` where hosts are blocked at all."""
    if not blocked.hosts:
        return rows
    hosts = rows.select(host_of(_stripped("url")).alias("host"))["host"]
    refused = [host for host in hosts.unique() if blocked.blocks_host(host)]
    return rows.with_columns(is_host_blocked=hosts.is_in(refused))


def sample_rules(fraction: float, blocked: BlockLists) -> Iterator[Rule]:
    """The rules that need a uid (``uid_high``, ``uid_low``): blocked ones, and those outside the subsample."""
    uids = [uid for uid in blocked.hashes if len(uid) == 32]
    if uids:
        halves = pl.struct(high="uid_high", low="uid_low")
        listed = [{"high": int(uid[:16], 16), "low": int(uid[16:], 16)} for uid in uids]
        known = pl.Series(listed, dtype=pl.Struct({"high": pl.UInt64, "low": pl.UInt64}))
        yield Reason.HASH_BLOCKED, halves.is_in(known.implode()), pl.lit("listed")
    if fraction < 1:
        limit = pl.lit(threshold(fraction), pl.UInt64)
        yield Reason.NOT_SAMPLED, pl.col("uid_high") >= limit, pl.lit(f"a share of {fraction:g}")


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
