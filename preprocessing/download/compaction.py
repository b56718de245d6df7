"""The ledger's many small parts made one for each dataset, so that reading it stays quick.

A part is deleted only when another one is there, was read back, and holds all of its entries. So nothing is lost
whenever this is killed, whoever adds parts meanwhile, and however many do it at once: at worst an entry stands there
twice, which counts once, until the next time. The name of a merged part is a hash of its entries and not of its bytes:
two machines that write the same entries in different bytes make one part, and neither deletes the other's for its own.
"""

import contextlib
import hashlib
import io
import logging
from collections.abc import Collection

import polars as pl
import pyarrow.parquet as pq

from infra.storage import AlreadyExistsError, ObjectNotFoundError, ObjectStore
from preprocessing.download.ledger import LEDGER, LEDGER_PREFIX, MERGED, read_part
from preprocessing.uids import url_halves

LOGGER = logging.getLogger(__name__)

_SLICE_ROWS = 1 << 16

MAX_PARTS = 64
"""Of a dataset. Each is one object to list and to read, at the beginning of every run."""


def compact(store: ObjectStore, max_parts: int = MAX_PARTS) -> int:
    """Merges the parts of each dataset that has many.

    Args:
        store: Where the ledger stands.
        max_parts: More are many.

    Returns:
        How many parts were merged and deleted.

    Raises:
        ContractError: A part is none of the ledger.
        TransientError: The store failed; nothing is lost.
    """
    parts: dict[str, list[str]] = {}
    for info in store.list(f"{LEDGER_PREFIX}/"):
        parts.setdefault(info.key.rpartition("/")[0], []).append(info.key)
    return sum(_merge(store, folder, keys) for folder, keys in parts.items() if len(keys) > max_parts)


def _merge(store: ObjectStore, folder: str, keys: list[str]) -> int:
    try:
        entries = pl.concat([read_part(store, key) for key in keys]).unique().sort(LEDGER.names)
        merged = f"{folder}{MERGED}{_digest(entries)[:16]}.parquet"
        with contextlib.suppress(AlreadyExistsError):
            store.put_if_absent(merged, _to_bytes(entries))
        is_there = read_part(store, merged).equals(entries)
    except ObjectNotFoundError:
        return 0  # another run is merging them
    if not is_there:
        LOGGER.warning("%s: does not hold the entries that its name says; move it away", store.uri_of(merged))
        return 0
    old = [key for key in keys if key != merged]
    for key in old:
        store.delete(key)
    LOGGER.info("%s: %d parts of the ledger are one", store.uri_of(merged), len(keys))
    return len(old)


def drop_entries(store: ObjectStore, uids: Collection[str], urls: Collection[str] = ()) -> int:
    """Forgets what became of some rows: a tombstone says from now on that they are not asked for.

    A part without the entries is there before the one with them is deleted, so all other entries stay readable.

    Args:
        store: Where the ledger stands.
        uids: Of the rows.
        urls: Addresses.

    Returns:
        How many entries are gone.

    Raises:
        ContractError: A part is none of the ledger.
        TransientError: The store failed; nothing else is lost.
    """
    if not uids and not urls:
        return 0
    named = pl.DataFrame({"url": list(urls)}, schema={"url": pl.String}).select(url_halves(pl.col("url")))
    num_dropped = 0
    for info in list(store.list(f"{LEDGER_PREFIX}/")):
        with contextlib.suppress(ObjectNotFoundError):  # merged meanwhile, and still there: the next call finds it
            entries = read_part(store, info.key)
            kept = entries.filter(~pl.col("uid").is_in(list(uids))).join(named, on=named.columns, how="anti")
            if kept.height == entries.height:
                continue
            if kept.height:
                key = f"{info.key.rpartition('/')[0]}{MERGED}{_digest(kept)[:16]}.parquet"
                with contextlib.suppress(AlreadyExistsError):
                    store.put_if_absent(key, _to_bytes(kept))
                if not read_part(store, key).equals(kept):
                    continue
            store.delete(info.key)
            num_dropped += entries.height - kept.height
    return num_dropped


def _digest(entries: pl.DataFrame) -> str:
    """Of the values alone: the same whatever wrote them, and in what layout."""
    digest = hashlib.sha256()
    for part in entries.iter_slices(_SLICE_ROWS):
        for name, dtype in part.schema.items():
            column = part[name]
            if dtype == pl.String:
                digest.update(column.str.len_bytes().to_numpy().astype("<u8").tobytes())
                digest.update("".join(column.to_list()).encode())
            else:
                values = column.to_physical().fill_null(0).to_numpy()
                digest.update(column.is_not_null().to_numpy().astype("u1").tobytes())
                digest.update(values.astype("<u8" if dtype == pl.UInt64 else "<i8").tobytes())
    return digest.hexdigest()


def _to_bytes(entries: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, LEDGER, compression="zstd") as writer:
        for part in entries.iter_slices(_SLICE_ROWS):  # a slice's texts fit Arrow's 32-bit offsets
            writer.write_table(part.to_arrow().cast(LEDGER))
    return buffer.getvalue()
