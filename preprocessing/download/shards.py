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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import fsspec
import pyarrow as pa

from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.reasons import Reason
from preprocessing.download.addresses import Verdict
from preprocessing.download.decoder import NUM_SLOTS
from preprocessing.download.decoding import Decoders
from preprocessing.download.http_client import MAX_DETAIL_CHARS, Held, HttpClient
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


@dataclass
class Lane:
    """A shard's way through a session.

    Attributes:
        done: Position of a row, and what became of it.
        is_over: Whether nobody wants what is still under way.
    """

    done: queue.SimpleQueue[tuple[int, Result]] = field(default_factory=queue.SimpleQueue)
    is_over: bool = False


@dataclass(frozen=True, slots=True)
class _Row:
    lane: Lane
    position: int
    url: str
    expected: Mapping[str, str]


class Session:
    """What a process keeps from shard to shard: connections, resolved names, decoders, threads.

    Many threads ask servers. What they get waits in a line, within the client's budget of memory, for as few others as
    there are decoders: none of many waits for a decoder, and no decoder for the one that is to come next.

    Args:
        config: How to fetch.
        num_decoders: Decoder processes of this process.
        opted_out: A file that all processes of the run share.
    """

    def __init__(self, config: DownloadConfig, num_decoders: int, opted_out: Path | None) -> None:
        self.opted_out = OptOutMemory(opted_out)
        self.client = HttpClient(config, opted_out=self.opted_out)
        self.decoders = Decoders(config, num_decoders).__enter__()
        self._num_done = 0
        self._said_at = time.monotonic()
        self._rows: queue.SimpleQueue[_Row | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[_Row, Held] | None] = queue.SimpleQueue()
        self._fetchers = [threading.Thread(target=self._fetch, daemon=True) for _ in range(config.num_threads)]
        self._feeders = [threading.Thread(target=self._decode, daemon=True) for _ in range(num_decoders)]
        for thread in (*self._fetchers, *self._feeders):
            thread.start()

    def put(self, lane: Lane, position: int, url: str, expected: Mapping[str, str]) -> None:
        """Takes a row in; it comes out of its lane, unless that is over.

        Args:
            lane: The row's.
            position: In its shard.
            url: As it stands in the metadata.
            expected: Name of a hash function → what the bytes must hash to, in hexadecimal digits.
        """
        self._rows.put(_Row(lane, position, url, expected))

    def close(self) -> None:
        """Ends what it started."""
        for line, threads in ((self._rows, self._fetchers), (self._answers, self._feeders)):
            for _ in threads:
                line.put(None)
            for thread in threads:
                thread.join()
        self.decoders.close()
        self.client.close()

    def _fetch(self) -> None:
        while (row := self._rows.get()) is not None:
            if row.lane.is_over:
                continue
            try:
                held = self.client.get(row.url)
            except Exception as error:  # one strange row must not end the shard
                self._end(row, _refused(error))
                continue
            if isinstance(held.said, tuple):
                held.give_back()
                self._end(row, held.said)
            else:
                self._answers.put((row, held))

    def _decode(self) -> None:
        while (first := self._answers.get()) is not None:
            waiting = [first]
            # Together what is there, but not what the other decoders could begin with.
            for _ in range(min(NUM_SLOTS - 1, self._answers.qsize() // len(self._feeders))):
                try:
                    following = self._answers.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    self._answers.put(None)
                    break
                waiting.append(following)
            try:
                self._decode_all(waiting)
            finally:
                for _, held in waiting:
                    held.give_back()
            del first, waiting  # not kept while we wait

    def _decode_all(self, waiting: Sequence[tuple[_Row, Held]]) -> None:
        fit: list[tuple[_Row, bytes]] = []
        for row, held in waiting:
            assert not isinstance(held.said, tuple)
            mismatch = hash_mismatch(held.said.data, row.expected)
            if mismatch is None:
                fit.append((row, held.said.data))
            else:
                self._end(row, mismatch)
        try:
            results = self.decoders.normalize_all([data for _, data in fit])
        except Exception:  # strange rows must not end the shard, nor one the others' turn
            LOGGER.warning("download: %d pictures at once failed; one by one", len(fit), exc_info=True)
            results = [self._decode_alone(data) for _, data in fit]
        for (row, _), result in zip(fit, results, strict=True):
            self._end(row, result)

    def _decode_alone(self, data: bytes) -> Result:
        try:
            return self.decoders.normalize(data)
        except Exception as error:
            return _refused(error)

    def _end(self, row: _Row, result: Result) -> None:
        row.lane.done.put((row.position, result))
        # A line now and then: rows reach a file a hundred at a time, and whoever watches may not wait for so many.
        self._num_done += 1  # threads may miss a count: it is no more than a sign of life
        now = time.monotonic()
        if now - self._said_at > _SAY_EVERY_S:
            self._said_at = now
            LOGGER.info("download: process %d has asked for %d rows", os.getpid(), self._num_done)


def _refused(error: Exception) -> Verdict:
    """The boundary at which any failure turns into its row's drop reason."""
    LOGGER.error("download: a row is refused", exc_info=error)
    return Reason.DOWNLOAD_FAILED, f"{type(error).__name__}: {error}"[:MAX_DETAIL_CHARS]


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
        lane, num_running = Lane(), 0
        try:
            while True:
                while num_running < 2 * self.thread_count and (row := next(waiting, None)) is not None:
                    position, url = row
                    expected = {
                        function: value for name, function in hashes.items() if (value := table[name][position])
                    }
                    session.put(lane, position, url or "", expected)
                    num_running += 1
                if not num_running:
                    return
                yield lane.done.get()
                num_running -= 1
        finally:
            lane.is_over = True

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
