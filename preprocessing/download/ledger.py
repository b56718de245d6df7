"""What became of every URL that was asked for and did not come, over all datasets and runs.

Each shard that a run has fetched adds one small Parquet file, ``ledger/download/{dataset}/{shard}-{hash}.parquet``;
none is ever changed, and where a dataset has many, `preprocessing.download.compaction` makes one of them. It is
written before the shard is committed: what was asked was asked, whatever becomes of the shard. The newest entry of a
URL counts, except that a no to training is for ever. A row that came at the first asking leaves no trace here: it
stands in its dataset.

| what became of it | is it asked for again? |
| --- | --- |
| opted out | never |
| gone or refused by the server (401, 402, 403, 404, 410, 451 and any 4xx that the last line does not name), no | |
| picture, not the bytes that the metadata speaks of | in `permanent_retry_days` |
| refused by our limits, or by robots.txt | in `permanent_retry_days`, or at once under another config |
| anything that may pass: timeouts, DNS, 5xx, 408, 421, 423, 425, 429 | by whatever dataset has it; `due` says when |

A dataset that was interrupted is not told what it noted itself, except the opt-outs: so it ends as if it had not been.
All of what is remembered is held in memory, in about 100 bytes an entry.
"""

import contextlib
import io
import logging
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import ContractError, TransientError
from infra.storage import ObjectNotFoundError, ObjectStore, sha256_of_bytes
from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.digests import canonical_json
from preprocessing.contracts.reasons import Reason
from preprocessing.download.addresses import Verdict
from preprocessing.download.images import NormalizedImage
from preprocessing.uids import url_halves

LOGGER = logging.getLogger(__name__)

LEDGER_PREFIX = "ledger/download"
MERGED = "/merged-"  # in the keys of merged parts only
ARRIVED = "arrived"  # only of what had not come before
LEDGER = pa.schema(
    [
        pa.field("uid", pa.string(), nullable=False),
        pa.field("url_high", pa.uint64(), nullable=False),  # XXH3-128 of the URL
        pa.field("url_low", pa.uint64(), nullable=False),
        pa.field("outcome", pa.string(), nullable=False),  # a `Reason`, or ARRIVED
        pa.field("detail", pa.string(), nullable=False),
        pa.field("num_attempts", pa.int32(), nullable=False),  # runs in which it was asked for, not requests
        pa.field("at", pa.timestamp("us", "UTC"), nullable=False),
        pa.field("due_at", pa.timestamp("us", "UTC")),  # null: never
        pa.field("judged_by", pa.string(), nullable=False),  # sha256 of the config, 16 digits
    ]
)
_URL = ["url_high", "url_low"]
_NUM_READS = 5


class Memory(StrEnum):
    """How long an outcome is remembered."""

    FOR_EVER = "for ever"
    LONG = "long"
    LONG_BY_CONFIG = "long, under the same config"
    PASSING = "passing"


MEMORY: Mapping[Reason, Memory] = {
    Reason.OPTED_OUT: Memory.FOR_EVER,
    Reason.HTTP_CLIENT_ERROR: Memory.LONG,
    Reason.HASH_MISMATCH: Memory.LONG,
    Reason.EMPTY_FILE: Memory.LONG,
    Reason.NOT_AN_IMAGE: Memory.LONG,
    Reason.IMAGE_TRUNCATED: Memory.LONG,
    Reason.IMAGE_BROKEN: Memory.LONG,
    Reason.URL_REFUSED: Memory.LONG_BY_CONFIG,
    Reason.ROBOTS_DISALLOWED: Memory.LONG_BY_CONFIG,
    Reason.TOO_MANY_REDIRECTS: Memory.LONG_BY_CONFIG,
    Reason.BODY_TOO_LARGE: Memory.LONG_BY_CONFIG,
    Reason.IMAGE_TOO_LARGE: Memory.LONG_BY_CONFIG,
    Reason.IMAGE_TOO_SMALL: Memory.LONG_BY_CONFIG,
    Reason.ASPECT_EXTREME: Memory.LONG_BY_CONFIG,
    Reason.HOST_UNKNOWN: Memory.PASSING,
    Reason.CONNECTION_FAILED: Memory.PASSING,
    Reason.TLS_FAILED: Memory.PASSING,
    Reason.TIMED_OUT: Memory.PASSING,
    Reason.HTTP_NOT_NOW: Memory.PASSING,
    Reason.HTTP_SERVER_ERROR: Memory.PASSING,
    Reason.RATE_LIMITED: Memory.PASSING,
    Reason.BAD_RESPONSE: Memory.PASSING,
    Reason.DECODER_DIED: Memory.PASSING,
    Reason.DECODE_TIMED_OUT: Memory.PASSING,
    Reason.DECODE_OUT_OF_MEMORY: Memory.PASSING,
    Reason.LOST_BY_DOWNLOADER: Memory.PASSING,
    Reason.DOWNLOAD_FAILED: Memory.PASSING,
}
# After the first failure; twice as long after each further one.
_BACK_OFF = {
    Reason.HOST_UNKNOWN: timedelta(days=1),
    Reason.TLS_FAILED: timedelta(days=1),
    Reason.BAD_RESPONSE: timedelta(days=1),
    Reason.DECODE_OUT_OF_MEMORY: timedelta(days=1),
    Reason.DECODE_TIMED_OUT: timedelta(days=1),
    Reason.DECODER_DIED: timedelta(days=1),
    Reason.CONNECTION_FAILED: timedelta(hours=6),
}
_BACK_OFF_OTHERWISE = timedelta(hours=1)
_LONGEST_BACK_OFF = timedelta(days=30)
_OF_THE_DOWNLOAD = {reason.value: memory for reason, memory in MEMORY.items()}


def due_after(reason: Reason, num_attempts: int, config: DownloadConfig) -> timedelta | None:
    """How long after a failure a URL should be asked for again; None: never.

    Args:
        reason: Why it failed.
        num_attempts: Runs in which it failed, this one included.
        config: ``permanent_retry_days`` is used.
    """
    memory = MEMORY[reason]
    if memory is Memory.FOR_EVER:
        return None
    if memory is not Memory.PASSING:
        return timedelta(days=config.permanent_retry_days)
    return min(_BACK_OFF.get(reason, _BACK_OFF_OTHERWISE) * 2 ** min(num_attempts - 1, 16), _LONGEST_BACK_OFF)


class Ledger:
    """The ledger as one dataset sees it, as of the moment when it is first asked.

    Args:
        store: Where it stands.
        dataset: Digest of the dataset that is being made.
        config: How it fetches.
        now: The time, in UTC.
    """

    def __init__(
        self,
        store: ObjectStore,
        dataset: str,
        config: DownloadConfig,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._folder = f"{LEDGER_PREFIX}/{dataset[:16]}/"
        self._config = config
        self._judged_by = sha256_of_bytes(canonical_json(config.digest_fields()).encode())[:16]
        self._now = now
        self._lock = threading.Lock()
        self._attempts: pl.DataFrame | None = None
        self._closed: pl.DataFrame | None = None

    def remembered(self, table: pa.Table) -> dict[str, Verdict]:
        """What must not be asked for.

        Args:
            table: Rows, of which ``uid`` and ``url`` are used.

        Returns:
            uid → why, of the rows that are remembered.
        """
        self._load()
        assert self._closed is not None
        found = _keyed(table).join(self._closed, on=_URL)
        return {
            uid: (Reason(outcome), f"remembered since {at:%Y-%m-%d}: {detail}")
            for uid, outcome, detail, at in found.select("uid", "outcome", "detail", "at").iter_rows()
        }

    def record(self, index: int, table: pa.Table, results: Mapping[str, NormalizedImage | Verdict]) -> None:
        """Notes what became of a shard's rows.

        Args:
            index: Of the shard.
            table: Rows, of which ``uid`` and ``url`` are used.
            results: uid → what came, of the rows that were asked for.
        """
        self._load()
        assert self._attempts is not None
        now = self._now()
        rows = []
        for uid, high, low, before in _keyed(table).join(self._attempts, on=_URL, how="left").iter_rows():
            result = results.get(uid)
            if result is None or (isinstance(result, NormalizedImage) and before is None):
                continue
            num_attempts = (before or 0) + 1
            outcome, detail, due_at = ARRIVED, "", None
            if not isinstance(result, NormalizedImage):
                outcome, detail = result[0].value, result[1]
                wait = due_after(result[0], num_attempts, self._config)
                due_at = None if wait is None else now + wait
            rows.append((uid, high, low, outcome, detail, num_attempts, now, due_at, self._judged_by))
        if not rows:
            return
        columns = [pa.array(values, field.type) for values, field in zip(zip(*rows, strict=True), LEDGER, strict=True)]
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns, schema=LEDGER), buffer, compression="zstd")
        data = buffer.getvalue()
        self._store.put_if_absent(f"{self._folder}{index:05d}-{sha256_of_bytes(data)[:16]}.parquet", data)

    def _load(self) -> None:
        with self._lock:  # several tasks may share a stage
            if self._attempts is None:
                self._read()

    def _read(self) -> None:
        entries = read_entries(self._store)
        self._attempts = entries.group_by(_URL).agg(pl.col("num_attempts").max())
        refused = _newest(entries.filter(pl.col("outcome") == Reason.OPTED_OUT.value))
        memory = pl.col("outcome").replace_strict(_OF_THE_DOWNLOAD, default=Memory.PASSING.value)
        is_closed = (pl.col("due_at") > self._now()) & (
            (memory == Memory.LONG.value)
            | ((memory == Memory.LONG_BY_CONFIG.value) & (pl.col("judged_by") == self._judged_by))
        )
        others = _newest(entries.filter(~pl.col("part").str.starts_with(self._folder))).filter(is_closed)
        self._closed = pl.concat([refused, others.join(refused, on=_URL, how="anti")]).select(
            *_URL, "outcome", "detail", "at"
        )
        if not self._closed.is_empty():
            LOGGER.info("download: %d URLs are remembered, and not asked for", self._closed.height)


def read_entries(store: ObjectStore) -> pl.DataFrame:
    """All entries, in the ``LEDGER`` schema, and ``part``, the key that each comes from.

    Raises:
        ContractError: A part is not of this schema.
        TransientError: Other runs were always quicker.
    """
    for _ in range(_NUM_READS):
        parts = [pl.DataFrame(schema=pl.from_arrow(LEDGER.empty_table()).schema | {"part": pl.String})]  # pyright: ignore
        keys = _keys(store)
        for key in sorted(keys):
            with contextlib.suppress(ObjectNotFoundError):  # another run has merged it with others since it was listed
                parts.append(read_part(store, key).with_columns(part=pl.lit(key)))
        # A listing is no moment: what was deleted since stands in a merged part, which is there by now.
        if not any(MERGED in key for key in _keys(store) - keys):
            return pl.concat(parts)
    raise TransientError(f"{store.uri_of(LEDGER_PREFIX)}: its parts are merged faster than they can be read")


def _keys(store: ObjectStore) -> set[str]:
    return {info.key for info in store.list(f"{LEDGER_PREFIX}/")}


def read_part(store: ObjectStore, key: str) -> pl.DataFrame:
    """The entries of one part, in the ``LEDGER`` schema.

    Raises:
        ContractError: It is not of this schema.
        ObjectNotFoundError: It is not there.
    """
    table = pq.read_table(io.BytesIO(store.read(key)))
    if not table.schema.equals(LEDGER):
        raise ContractError(
            f"{store.uri_of(key)}: not a part of the ledger (columns {table.column_names}, expected "
            f"{LEDGER.names}); move it away"
        )
    part = pl.from_arrow(table)
    assert isinstance(part, pl.DataFrame)
    return part


def due(store: ObjectStore, now: datetime | None = None) -> pl.DataFrame:
    """The rows that did not come and should be asked for again: passing failures, and what has been gone for long.

    Args:
        store: Where the ledger stands.
        now: As of when; UTC.

    Returns:
        ``uid, outcome, num_attempts, due_at``, one row a URL, most urgent first.
    """
    entries = read_entries(store)
    refused = entries.filter(pl.col("outcome") == Reason.OPTED_OUT.value)
    waiting = _newest(entries).join(refused, on=_URL, how="anti").filter(pl.col("due_at") <= (now or datetime.now(UTC)))
    return waiting.select("uid", "outcome", "num_attempts", "due_at").sort("due_at", "uid")


def _newest(entries: pl.DataFrame) -> pl.DataFrame:
    return entries.sort("at", "part").unique(_URL, keep="last", maintain_order=True)


def _keyed(table: pa.Table) -> pl.DataFrame:
    rows = pl.from_arrow(table.select(["uid", "url"]))
    assert isinstance(rows, pl.DataFrame)
    return rows.select("uid", *url_halves(pl.col("url")))
