"""What select keeps, written down as plainly as possible: one row at a time, everything in memory."""

import math
from typing import Any

import numpy as np

from preprocessing.contracts.config import SelectConfig
from preprocessing.contracts.digests import uid_of
from preprocessing.contracts.reasons import Reason

Row = dict[str, Any]


def select(rows: list[Row], config: SelectConfig) -> list[Reason | None]:
    """The reason for each row, in order; None where it is kept.

    Args:
        rows: With the keys url, caption, width, height, similarity, punsafe, pwatermark, aesthetic, language.
        config: Without block-lists and boilerplate.
    """
    reasons = [_alone(row, config) for row in rows]
    uids = [uid_of(row["url"] or "", row["caption"] or "") for row in rows]
    order = sorted((i for i, reason in enumerate(reasons) if reason is None), key=lambda i: (uids[i], i))
    urls: dict[str, set[str]] = {}
    hosts: dict[str, int] = {}
    num_kept = 0
    for i in order:
        url = rows[i]["url"]
        if config.drop_duplicates and url in urls:
            reasons[i] = Reason.DUPLICATE_ROW if uids[i] in urls[url] else Reason.DUPLICATE_URL
            urls[url].add(uids[i])
            continue
        urls.setdefault(url, set()).add(uids[i])
        host = url.split("/")[2] if url.startswith("http://") else ""
        if config.max_rows_per_host is not None and hosts.get(host, 0) >= config.max_rows_per_host:
            reasons[i] = Reason.HOST_FULL
            continue
        hosts[host] = hosts.get(host, 0) + 1
        if config.max_rows is not None and num_kept >= config.max_rows:
            reasons[i] = Reason.OVER_LIMIT
            continue
        num_kept += 1
    return reasons


def _alone(row: Row, config: SelectConfig) -> Reason | None:
    def missing(name: str) -> bool:
        return row[name] is None or not math.isfinite(row[name])

    def not_below(name: str, limit: float) -> bool:
        return bool(row[name] >= limit or np.float32(row[name]) >= np.float32(limit))

    def below(name: str, limit: float) -> bool:
        return missing(name) or bool(np.float32(row[name]) < np.float32(limit))

    if missing("punsafe"):
        return Reason.PUNSAFE_MISSING
    if not_below("punsafe", config.max_punsafe):
        return Reason.PUNSAFE_HIGH
    if config.max_pwatermark is not None:
        if missing("pwatermark"):
            return Reason.PWATERMARK_MISSING
        if not_below("pwatermark", config.max_pwatermark):
            return Reason.PWATERMARK_HIGH
    if config.min_similarity is not None and below("similarity", config.min_similarity):
        return Reason.SIMILARITY_LOW
    if config.min_aesthetic is not None and below("aesthetic", config.min_aesthetic):
        return Reason.AESTHETIC_LOW
    sides = [0 if side is None or abs(side) >= 2**31 else side for side in (row["width"], row["height"])]
    if min(sides) < config.min_side_px:
        return Reason.SIDE_SMALL
    if max(sides) > float(min(sides)) * config.max_aspect:
        return Reason.ASPECT_EXTREME
    if not (row["url"] or "").strip():
        return Reason.NO_URL
    if config.languages and (row["language"] or "").strip().lower() not in config.languages:
        return Reason.LANGUAGE_REFUSED
    num_chars = len((row["caption"] or "").strip())
    if num_chars < config.min_caption_chars:
        return Reason.CAPTION_EMPTY
    if num_chars > config.max_caption_chars:
        return Reason.CAPTION_LONG
    uid = uid_of(row["url"], row["caption"] or "")
    if int(uid[:16], 16) >= config.subsample * 2**64:
        return Reason.NOT_SAMPLED
    return None
