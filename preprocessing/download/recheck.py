"""Whether servers whose pictures we hold have said no to training since: asked without the picture, and politely.

Every row has its turn once in `refresh.recheck_days`: its uid says when. So the requests of a large dataset are spread
over all refreshes, and nothing need be noted of each row but when the last refresh was.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import ObjectStore
from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.manifest import Manifest
from preprocessing.contracts.reasons import Reason
from preprocessing.contracts.tombstones import Tombstone, Tombstones
from preprocessing.download.addresses import Verdict
from preprocessing.download.http_client import HttpClient
from preprocessing.download.ledger import Ledger
from preprocessing.stored_parquet import open_parquet

LOGGER = logging.getLogger(__name__)

_EPOCH = datetime(2020, 1, 1, tzinfo=UTC)
_NUM_DIGITS = 12  # of a uid: where in the period its turn is
_ROWS_AT_ONCE = 10_000


def turns(since: datetime, now: datetime, days: float) -> tuple[float, float]:
    """Whose turn it is: a part of the circle of all uids.

    Args:
        since: When rows were last asked.
        now: The time; both UTC.
        days: In which every row has its turn once.

    Returns:
        Where the part begins, and its length, both as shares of the circle; the length is at most 1.
    """
    period = timedelta(days=days)
    if now - since >= period:
        return 0.0, 1.0
    return ((since - _EPOCH) / period) % 1.0, max(0.0, (now - since) / period)


def is_turn(uid: str, start: float, length: float) -> bool:
    """Whether a row's place on the circle is in a part of it."""
    at = int(uid[:_NUM_DIGITS], 16) / 16**_NUM_DIGITS
    return length >= 1 or (at - start) % 1.0 < length


def recheck(
    store: ObjectStore,
    prefix: str,
    manifest: Manifest,
    config: DownloadConfig,
    *,
    since: datetime,
    now: datetime,
    days: float,
) -> int:
    """Asks for the headers of rows whose turn it is; those that opted out are forgotten, here and in the ledger.

    Only a clear no counts: what cannot be reached, or has gone since, is kept as it is.

    Args:
        store: Where the dataset and the ledger stand.
        prefix: Key of the folder of a dataset with the columns ``uid`` and ``url``. Of an ``encode`` dataset only those
            rows are asked about that may be trained on. What is said is noted in the ledger under its digest, as
            that of no download: so it counts for every later one.
        manifest: Its manifest.
        config: How to ask.
        since: When rows were last asked.
        now: The time; both UTC.
        days: As in `turns`.

    Returns:
        How many have opted out.
    """
    start, length = turns(since, now, days)
    if length <= 0:
        return 0
    ledger, num_asked, num_out = Ledger(store, manifest.digest, config), 0, 0
    with HttpClient(config, method="HEAD") as client, ThreadPoolExecutor(config.num_threads, "recheck") as pool:
        for number, rows in enumerate(_rows(store, prefix, manifest, start, length)):
            urls = rows.column("url").to_pylist()
            uids = rows.column("uid").to_pylist()
            said = dict(zip(uids, pool.map(lambda url: _refusal(client, url), urls), strict=True))
            refused: dict[str, Verdict] = {uid: verdict for uid, verdict in said.items() if verdict is not None}
            num_asked, num_out = num_asked + len(urls), num_out + len(refused)
            if refused:
                gone = [url for uid, url in zip(uids, urls, strict=True) if uid in refused]
                ledger.record(number, rows, refused)
                Tombstones.add(store, [Tombstone.of("url", url, reason="opt_out", by="refresh") for url in gone])
    if num_asked:
        LOGGER.info("refresh: %d servers' answers were looked at again, %d have opted out", num_asked, num_out)
    return num_out


def _refusal(client: HttpClient, url: str) -> Verdict | None:
    with client.get(url) as said:
        return said if isinstance(said, tuple) and said[0] is Reason.OPTED_OUT else None


def _rows(store: ObjectStore, prefix: str, manifest: Manifest, start: float, length: float) -> Iterator[pa.Table]:
    """The rows whose turn it is, some at a time."""
    waiting: list[pa.Table] = []
    for file in manifest.files("rows"):
        with open_parquet(store, file.key(prefix)) as stored:
            table = _turn_of(stored, start, length)
        if table.num_rows:
            waiting.append(table)
        if sum(part.num_rows for part in waiting) >= _ROWS_AT_ONCE:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _turn_of(stored: pq.ParquetFile, start: float, length: float) -> pa.Table:
    table = stored.read(["uid", "url"])
    return table.filter(pa.array([is_turn(uid, start, length) for uid in table.column("uid").to_pylist()], pa.bool_()))
