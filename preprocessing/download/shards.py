"""One shard from URLs to files: img2dataset's layout, filled by our client and our decoders.

`ShardDownloader` is img2dataset's ``Downloader`` with another middle: its reader has cut the shards, its writers write
them, its distributors call it, in whatever process. What changes is what happens to a row, and what is promised:
**every row that comes in goes out**, with a picture or with a reason; an error in writing fails the shard instead of
the row.

Columns of a shard's Parquet file: those that came in, img2dataset's own (``key``, ``status``, ``error_message``,
``width``, ``height``, ``original_width``, ``original_height``, ``sha256``, and ``jpg`` in Parquet output), and
``reason``, a value of `Reason`. ``status`` is img2dataset's: ``success``, ``failed_to_download`` or
``failed_to_resize``.

Source: img2dataset 1.47.0, ``downloader.py``.
"""

import atexit
import concurrent.futures
import contextlib
import hashlib
import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import fsspec
import pyarrow as pa

from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.reasons import Reason
from preprocessing.download.addresses import Verdict
from preprocessing.download.decoding import Decoders
from preprocessing.download.http_client import MAX_DETAIL_CHARS, HttpClient
from preprocessing.download.images import NormalizedImage
from preprocessing.download.img2dataset_parts import CappedCounter, Downloader, compute_key, write_stats
from preprocessing.download.opt_out import OptOutMemory

LOGGER = logging.getLogger(__name__)

EXPECTED_HASHES = {"expected_md5": "md5", "expected_sha256": "sha256"}
ENCODE_FORMAT = "jpg"
_SAY_EVERY_S = 5.0
SHARDS_AT_ONCE = 2  # while the last rows of one wait for slow servers, the next one has begun
_ADDED = (
    ("key", pa.string()),
    ("status", pa.string()),
    ("error_message", pa.string()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("original_width", pa.int32()),
    ("original_height", pa.int32()),
    ("sha256", pa.string()),
    ("reason", pa.string()),
)
# What img2dataset would have said of these: it had the bytes, and could not make a picture of them.
_RESIZING = frozenset(
    {
        Reason.EMPTY_FILE,
        Reason.NOT_AN_IMAGE,
        Reason.IMAGE_TRUNCATED,
        Reason.IMAGE_TOO_LARGE,
        Reason.IMAGE_TOO_SMALL,
        Reason.IMAGE_BROKEN,
        Reason.ASPECT_EXTREME,
        Reason.DECODER_DIED,
        Reason.DECODE_TIMED_OUT,
        Reason.DECODE_OUT_OF_MEMORY,
    }
)

Result = NormalizedImage | Verdict
Group = tuple[tuple[int, ...], tuple[str, ...]]


class Session:
    """What a process keeps from shard to shard: connections, resolved names, decoders, threads.

    Args:
        config: How to fetch.
        num_decoders: Decoder processes of this process.
        opted_out: A file that all processes of the run share.
    """

    def __init__(self, config: DownloadConfig, num_decoders: int, opted_out: Path | None) -> None:
        self.opted_out = OptOutMemory(opted_out)
        self.client = HttpClient(config, opted_out=self.opted_out)
        self.threads = concurrent.futures.ThreadPoolExecutor(config.num_threads, thread_name_prefix="fetch")
        self.decoders = Decoders(config, num_decoders).__enter__()
        self._num_done = 0
        self._said_at = time.monotonic()

    def close(self) -> None:
        """Ends what it started."""
        self.threads.shutdown(cancel_futures=True)
        self.decoders.close()
        self.client.close()

    def result(self, url: str, expected: Mapping[str, str]) -> Result:
        """What becomes of one row: the boundary at which any failure turns into that row's drop reason.

        Args:
            url: As it stands in the metadata.
            expected: Name of a hash function → what the bytes must hash to, in hexadecimal digits.
        """
        try:
            with self.client.get(url) as answer:
                if isinstance(answer, tuple):
                    return answer
                mismatch = hash_mismatch(answer.data, expected)
                return mismatch or self.decoders.normalize(answer.data)
        except Exception as error:  # one strange row must not end the shard
            LOGGER.exception("download: a row is refused")
            return Reason.DOWNLOAD_FAILED, f"{type(error).__name__}: {error}"[:MAX_DETAIL_CHARS]
        finally:
            self._say_that_we_live()

    def _say_that_we_live(self) -> None:
        """A line now and then: rows reach a file a hundred at a time, and whoever watches may not wait for so many."""
        self._num_done += 1  # threads may miss a count: it is no more than a sign of life
        now = time.monotonic()
        if now - self._said_at > _SAY_EVERY_S:
            self._said_at = now
            LOGGER.info("download: process %d has asked for %d rows", os.getpid(), self._num_done)


def hash_mismatch(data: bytes, expected: Mapping[str, str]) -> Verdict | None:
    """Whether bytes are not those that the metadata speaks of."""
    for name, digest in expected.items():
        found = hashlib.new(name, data, usedforsecurity=False).hexdigest()
        if found != digest.strip().lower():
            return Reason.HASH_MISMATCH, f"{name} is {found}, the metadata says {digest}"[:MAX_DETAIL_CHARS]
    return None


_sessions: dict[tuple[str, int, Path | None], Session] = {}
_sessions_lock = threading.Lock()


def _session(config: str, num_decoders: int, opted_out: Path | None) -> Session:
    """The session of this process."""
    with _sessions_lock:
        key = config, num_decoders, opted_out
        if key not in _sessions:
            logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")  # in a worker nobody else does
            _sessions[key] = Session(DownloadConfig.model_validate_json(config), num_decoders, opted_out)
        return _sessions[key]


@atexit.register
def close_sessions() -> None:
    """Ends what the sessions of this process have started."""
    with _sessions_lock:
        while _sessions:
            _sessions.popitem()[1].close()


class ShardDownloader(Downloader):
    """Downloads groups of shards; a group is one task of a distributor.

    It is pickled into every process, so it holds settings only; what is costly stands in the process's `Session`.

    Args:
        config: How to fetch.
        sample_writer_class: One of img2dataset's.
        columns: Of the rows: the reader's ``column_list``.
        output_folder: Where shards are written.
        rows_per_shard: The reader's ``number_sample_per_shard``.
        num_digits: Of a shard's number in file names.
        opted_out: A file that all processes of the run share.
    """

    def __init__(
        self,
        config: DownloadConfig,
        sample_writer_class: type,
        columns: Sequence[str],
        output_folder: str,
        rows_per_shard: int,
        num_digits: int,
        opted_out: Path | None,
    ) -> None:
        super().__init__(
            sample_writer_class=sample_writer_class,
            resizer=None,  # `Decoders` instead
            thread_count=config.num_threads,
            save_caption="caption" in columns,
            extract_exif=False,
            output_folder=output_folder,
            column_list=list(columns),
            timeout=config.timeout_s,
            number_sample_per_shard=rows_per_shard,
            oom_shard_count=num_digits,
            compute_hash="sha256",
            verify_hash_type=None,  # `hash_mismatch` instead
            encode_format=ENCODE_FORMAT,
            retries=config.retries,
            user_agent_token=config.user_agent_token,
            disallowed_header_directives=None,  # `opt_out` instead
        )
        self._config = config.model_dump_json()
        # One more than its share of the cores: while one answers and takes the next picture, another computes.
        self._num_decoders = 1 + math.ceil(len(os.sched_getaffinity(0)) / config.num_processes)
        self._opted_out = opted_out

    def __call__(self, row: Group) -> tuple[Literal[True], Group] | tuple[Literal[False], Group]:
        """Downloads a group of shards; those that fail are given back."""
        failed: list[tuple[int, str]] = []
        with concurrent.futures.ThreadPoolExecutor(SHARDS_AT_ONCE, thread_name_prefix="shard") as lanes:
            done = {lanes.submit(self.download_shard, shard): shard for shard in zip(*row, strict=True)}
            for future, shard in done.items():
                try:
                    future.result()
                except Exception:  # as img2dataset has it: the distributor tries again, and the others go on
                    LOGGER.exception("download: shard %d failed", shard[0])
                    failed.append(shard)
        if not failed:
            return True, row
        return False, (tuple(index for index, _ in failed), tuple(file for _, file in failed))

    def download_shard(self, row: tuple[int, str]) -> None:
        """Downloads one shard: every row that it has is written, and then its stats.

        Raises:
            OSError: It could not be written; a later attempt starts it afresh.
        """
        index, file = row
        session = _session(self._config, self._num_decoders, self._opted_out)
        started = time.time()
        session.opted_out.reload()
        table, schema = self._read(file)
        counter = CappedCounter()
        statuses: dict[str, int] = {}
        writer = self.sample_writer_class(
            index, self.output_folder, self.save_caption, self.oom_shard_count, schema, self.encode_format
        )
        with contextlib.closing(writer), contextlib.closing(self._results(session, table)) as results:
            for position, result in results:
                meta = self._meta(index, position, {name: values[position] for name, values in table.items()}, result)
                image = result.image if isinstance(result, NormalizedImage) else None
                writer.write(image, meta["key"], meta.get("caption"), meta)
                statuses[meta["status"]] = statuses.get(meta["status"], 0) + 1
                counter.increment(meta["reason"] or meta["status"])
        count = len(table["url"])
        if sum(statuses.values()) != count:
            raise AssertionError(f"{sum(statuses.values())} of {count} rows were written")
        write_stats(
            self.output_folder,
            index,
            count,
            statuses.get("success", 0),
            statuses.get("failed_to_download", 0),
            statuses.get("failed_to_resize", 0),
            started,
            time.time(),
            counter,
            self.oom_shard_count,
        )
        fs, path = fsspec.core.url_to_fs(file)
        fs.rm(path)

    def _read(self, file: str) -> tuple[dict[str, list[Any]], pa.Schema]:
        fs, path = fsspec.core.url_to_fs(file)
        with fs.open(path, "rb") as source:
            table = pa.ipc.open_file(source).read_all().select(self.column_list)
        schema = table.schema
        for name, kind in _ADDED:
            schema = schema.append(pa.field(name, kind))
        return table.to_pydict(), schema

    def _results(
        self, session: Session, table: Mapping[str, Sequence[Any]]
    ) -> Generator[tuple[int, Result], None, None]:
        """Yields rows as they are done; not many more are under way than there are threads."""
        hashes = {name: function for name, function in EXPECTED_HASHES.items() if name in table}
        waiting = iter(enumerate(table["url"]))
        running: dict[concurrent.futures.Future[Result], int] = {}
        done: queue.SimpleQueue[concurrent.futures.Future[Result]] = queue.SimpleQueue()
        try:
            while True:
                while len(running) < 2 * self.thread_count and (row := next(waiting, None)) is not None:
                    position, url = row
                    expected = {
                        function: value for name, function in hashes.items() if (value := table[name][position])
                    }
                    future = session.threads.submit(session.result, url or "", expected)
                    running[future] = position
                    future.add_done_callback(done.put)
                if not running:
                    return
                future = done.get()
                yield running.pop(future), future.result()
        finally:
            for future in running:
                future.cancel()

    def _meta(self, index: int, position: int, row: dict[str, Any], result: Result) -> dict[str, Any]:
        digits = math.ceil(math.log10(max(2, self.number_sample_per_shard)))
        key = compute_key(position, index, digits, self.oom_shard_count)
        meta = row | {name: None for name, _ in _ADDED} | {"key": key}
        if isinstance(result, NormalizedImage):
            return meta | {
                "status": "success",
                "width": result.width,
                "height": result.height,
                "original_width": result.original_width,
                "original_height": result.original_height,
                "sha256": result.sha256,
            }
        reason, detail = result
        status = "failed_to_resize" if reason in _RESIZING else "failed_to_download"
        return meta | {"status": status, "error_message": detail, "reason": reason.value}


def stats_path(folder: Path, index: int, num_digits: int) -> Path:
    """Where a shard's stats stand, once it is done."""
    return folder / f"{index:0{num_digits}d}_stats.json"


def is_done(folder: Path, index: int, num_digits: int) -> bool:
    """Whether a shard's stats, written last, can be read: an empty file is the mark of a kill."""
    try:
        json.loads(stats_path(folder, index, num_digits).read_bytes())
    except (OSError, ValueError):
        return False
    return True
