"""Rows that the source has withdrawn, and rows that block lists name by now: they get tombstones.

A row that is merely refused by other limits, or has lost against another, is in the metadata still: it is not
withdrawn. Nor is one whose URL stands there under another caption.
"""

import logging
import math
from collections.abc import Sequence

import polars as pl

from infra.storage import ObjectStore
from preprocessing.contracts.manifest import Manifest
from preprocessing.contracts.reasons import Reason
from preprocessing.contracts.tombstones import Tombstone, Tombstones
from preprocessing.stored_parquet import open_parquet

LOGGER = logging.getLogger(__name__)

_BLOCKED = [Reason.URL_BLOCKED.value, Reason.HOST_BLOCKED.value, Reason.HASH_BLOCKED.value]


def forget_withdrawn(
    store: ObjectStore,
    before: tuple[str, Manifest],
    now: tuple[str, Manifest],
    selected: tuple[str, Manifest],
    *,
    max_share: float,
) -> int | None:
    """Writes tombstones of rows that an earlier dataset held, and that the source has withdrawn or block lists name.

    Where more of them were withdrawn than is likely, the metadata is rather incomplete: then none is written.

    Args:
        store: Where the datasets stand.
        before: Key and manifest of the earlier dataset, with columns ``uid`` and ``url``.
        now: Those of the present one.
        selected: Those of the selection that was made of the present metadata.
        max_share: Of the earlier dataset's rows that may have been withdrawn at once.

    Returns:
        How many tombstones were not there yet; None where it is not settled, and has to be looked at again.
    """
    rows = _read(store, *before, "rows", ["uid", "url"])
    gone = rows.join(_read(store, *now, "rows", ["uid"]), on="uid", how="anti")
    if not gone.height:
        return 0
    if any(shard.dropped for shard in selected[1].shards) and not selected[1].files("rejects"):
        LOGGER.warning("select.rejects is 'counts': which of %d rows were withdrawn cannot be told", gone.height)
        return 0
    refused = _read(store, *selected, "rejects", ["uid", "url", "reason"])
    is_blocked = pl.col("reason").is_in(_BLOCKED)
    blocked = gone.join(refused.filter(is_blocked), on="uid", how="semi")
    there = pl.concat([_read(store, *selected, "rows", ["uid", "url"]), refused.select("uid", "url")])
    withdrawn = gone.join(there, on="uid", how="anti").join(there, on="url", how="anti")
    is_likely = withdrawn.height <= max(1, max_share * rows.height)  # one row may always go
    entries = [Tombstone.of("uid", uid, reason="request", by="block lists") for uid in blocked["uid"]]
    if is_likely:
        entries += [Tombstone.of("uid", uid, reason="withdrawn", by="refresh") for uid in withdrawn["uid"]]
    else:
        LOGGER.warning(
            "refresh.max_withdrawn_share: %d of %d rows have gone from the metadata, more than %g of them: is it "
            "incomplete? None is forgotten; where they were withdrawn, set refresh.max_withdrawn_share=%g and refresh "
            "again",
            withdrawn.height,
            rows.height,
            max_share,
            math.ceil(100 * withdrawn.height / rows.height) / 100,
        )
    num_new = Tombstones.add(store, entries)
    return num_new if is_likely else None


def _read(store: ObjectStore, prefix: str, manifest: Manifest, kind: str, columns: Sequence[str]) -> pl.DataFrame:
    parts = [pl.DataFrame(schema=dict.fromkeys(columns, pl.String))]
    for file in manifest.files(kind):
        with open_parquet(store, file.key(prefix)) as stored:
            part = pl.from_arrow(stored.read(list(columns)))
        assert isinstance(part, pl.DataFrame)
        parts.append(part.cast(pl.String))
    return pl.concat(parts)
