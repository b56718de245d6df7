"""Fetches pictures with img2dataset, in a child process, and believes its rows and not its exit code.

One child fetches many shards, since starting it takes seconds. It gets one Parquet file a shard, and numbers its own
shards by position among the sorted files; so the n-th file given is its shard n. It writes each shard's rows, then a
``_stats.json``; a shard is done when both can be read. What img2dataset is known for is dealt with here: it ends with 0
when shards failed, drops rows on errors of its own, hangs for ever when a worker is killed, and takes an empty stats
file for a finished shard.

It re-encodes nothing: the bytes come as the server sent them. Opt-out headers (``X-Robots-Tag`` with noai, noimageai,
noindex or noimageindex) are respected; with ``download.retries`` it asks again for opted-out pictures, too, in vain.
Its time limit is per read from the socket: a server that drips bytes can hold a thread for ever, which is a stall.

Source: img2dataset 1.47.0, ``main.py``, ``reader.py``, ``downloader.py``, ``writer.py``.
"""

import contextlib
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import TransientError
from infra.processes import GuardedProcess
from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.reasons import Reason

LOGGER = logging.getLogger(__name__)

REQUESTS = pa.schema([pa.field("uid", pa.string(), nullable=False), pa.field("url", pa.string(), nullable=False)])
NUM_ATTEMPTS = 2
MAX_DETAIL_CHARS = 200

# Not its command line, which would guess types from text: a user agent "1e3" would arrive as a number.
_CHILD = "import json, sys, img2dataset; img2dataset.download(**json.loads(sys.argv[1]))"
# What img2dataset imports in each of its processes and, the way it is called here, never uses: resizing, reporting,
# tar files (which import torch). Empty modules stand in for them, and it starts in a quarter of the time.
_NEVER_USED = ("albumentations", "wandb", "webdataset")
_POLL_S = 0.2
_GRACE_S = 5.0
_BATCH_ROWS = 64
_ID_DIGITS = 8
_BYTES_COLUMN = "jpg"  # named by `encode_format`, whatever the bytes are
_WITHHELD = re.compile(r"_proxy$|^(aws|prefect|wandb)_|token|secret|password|credential|api_?key", re.IGNORECASE)

# The first that is found in img2dataset's message decides.
_REASONS = tuple(
    (re.compile(pattern, re.IGNORECASE), reason)
    for pattern, reason in (
        (r"X-Robots-Tag", Reason.OPTED_OUT),
        (r"redirection to url .* is not allowed", Reason.URL_REFUSED),
        (r"HTTP Error 4\d\d", Reason.HTTP_CLIENT_ERROR),
        (r"HTTP Error 5\d\d", Reason.HTTP_SERVER_ERROR),
        (r"IncompleteRead", Reason.IMAGE_TRUNCATED),
        (r"timed out|timeout", Reason.TIMED_OUT),
        (r"name or service not known|name resolution|nodename nor servname", Reason.HOST_UNKNOWN),
        (r"no address associated|getaddrinfo|Errno -[235]\b", Reason.HOST_UNKNOWN),
        (r"refused|reset by peer|unreachable|no route|broken pipe|network is down", Reason.CONNECTION_FAILED),
        (r"connection aborted|closed connection|\bssl\b|certificate|EOF occurred", Reason.CONNECTION_FAILED),
    )
)


@dataclass(frozen=True)
class FetchedRow:
    """What came of one request.

    Attributes:
        uid: As given.
        data: The bytes as they arrived; None where nothing did.
        sha256: Of the bytes, by img2dataset; None where nothing came.
        error: img2dataset's message; None where something came.
    """

    uid: str
    data: bytes | None
    sha256: str | None
    error: str | None


@dataclass(frozen=True)
class FetchedShard:
    """A shard that img2dataset has finished; its rows are read a few at a time, in any order, and may not be all."""

    index: int
    path: Path

    def batches(self) -> Iterator[list[FetchedRow]]:
        """Yields rows, at most a few dozen pictures in memory at once."""
        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(_BATCH_ROWS, columns=["uid", _BYTES_COLUMN, "sha256", "error_message"]):
                yield [
                    FetchedRow(row["uid"], row[_BYTES_COLUMN], row["sha256"], row["error_message"])
                    for row in batch.to_pylist()
                ]


def reason_of(message: str) -> tuple[Reason, str]:
    """The drop reason that img2dataset's message amounts to, and the message cut to a readable length."""
    detail = message[:MAX_DETAIL_CHARS]
    for pattern, reason in _REASONS:
        if pattern.search(message):
            return reason, detail
    return Reason.DOWNLOAD_FAILED, detail


def fetch_shards(requests: Mapping[int, pa.Table], config: DownloadConfig, scratch: Path) -> Iterator[FetchedShard]:
    """Fetches shards, each exactly once, in the order in which they are done.

    A child that dies or stalls is started once more, for the shards that are missing. A shard's file is deleted when
    the next one is asked for.

    Args:
        requests: Shard → its rows in the ``REQUESTS`` schema; at least one row each.
        config: How to fetch; addresses are not checked here.
        scratch: Folder for files on their way.

    Yields:
        The shards.

    Raises:
        TransientError: Shards are still missing after the second child; names them and quotes its log.
    """
    missing = sorted(requests)
    why = last_lines = ""
    for attempt in range(1, NUM_ATTEMPTS + 1):
        if not missing:
            return
        with tempfile.TemporaryDirectory(prefix="img2dataset-", dir=scratch) as folder:
            child = _Child([(index, requests[index]) for index in missing], config, Path(folder))
            # Closed here, whoever stops listening: the child must be gone before its folder is.
            with contextlib.closing(child.shards()) as shards:
                for shard in shards:
                    missing.remove(shard.index)
                    yield shard
                    shard.path.unlink()
        last_lines = child.last_lines
        why = f"img2dataset {child.ended} and left {len(missing)} shards undone ({_some(missing)})"
        if missing:
            LOGGER.warning("download: %s, attempt %d of %d", why, attempt, NUM_ATTEMPTS)
    if missing:
        raise TransientError(f"download: {why}, in attempt {NUM_ATTEMPTS}; its last words:\n{last_lines}")


class _Child:
    """One run of img2dataset over some shards.

    Attributes:
        ended: How it ended, as a phrase.
        last_lines: Of its log.
    """

    def __init__(self, shards: Sequence[tuple[int, pa.Table]], config: DownloadConfig, folder: Path) -> None:
        self.ended = "did not start"
        self.last_lines = ""
        self._indices = [index for index, _ in shards]  # by img2dataset's own shard number
        self._config = config
        self._folder = folder
        self._requests = folder / "requests"
        self._results = folder / "results"
        self._stand_ins = folder / "stand-ins"
        for subfolder in (self._requests, self._results, self._stand_ins):
            subfolder.mkdir()
        for name in _NEVER_USED:
            (self._stand_ins / f"{name}.py").touch()
        for number, (_, table) in enumerate(shards):
            pq.write_table(table.select(REQUESTS.names), self._requests / f"{number:0{_ID_DIGITS}d}.parquet")
        self._longest = max(table.num_rows for _, table in shards)

    def shards(self) -> Generator[FetchedShard, None, None]:
        """Starts the child and yields shards as they appear, until all have or the child has ended or stalled."""
        left = set(range(len(self._indices)))
        process = GuardedProcess(
            [sys.executable, "-P", "-c", _CHILD, json.dumps(self._arguments())],
            env=child_environment(os.environ, self._stand_ins),
            cwd=self._folder,
            log_path=self._log,
            grace_s=_GRACE_S,
        )
        with process:
            changed, last = time.monotonic(), self._signs_of_life()
            while left:
                code = process.poll()  # before looking: what it wrote before it ended is seen
                for number in sorted(left):
                    if self._is_done(number):
                        left.remove(number)
                        yield FetchedShard(self._indices[number], self._path(number))
                signs = self._signs_of_life()
                if signs != last:
                    changed, last = time.monotonic(), signs
                if code is not None:
                    self.ended = f"ended with {code}"
                    break
                if time.monotonic() - changed > self._config.stall_timeout_s:
                    self.ended = f"made no progress for {self._config.stall_timeout_s:g} s (download.stall_timeout_s)"
                    break
                if left:
                    time.sleep(_POLL_S)
        self.last_lines = process.last_lines()

    @property
    def _log(self) -> Path:
        return self._folder / "log.txt"

    def _path(self, number: int) -> Path:
        return self._results / f"{number:0{_ID_DIGITS}d}.parquet"

    def _is_done(self, number: int) -> bool:
        """Whether a shard's stats, written last, and its rows can be read."""
        try:
            json.loads((self._results / f"{number:0{_ID_DIGITS}d}_stats.json").read_bytes())
            pq.read_metadata(self._path(number))
        except (OSError, ValueError, pa.ArrowException):
            return False
        return True

    def _signs_of_life(self) -> tuple[int, ...]:
        """Changes while the child gets on: rows are written a hundred at a time, long before a shard is done."""
        files = [self._log, *self._results.iterdir()]
        sizes = [file.stat().st_size for file in files if file.is_file()]
        return len(sizes), sum(sizes)

    def _arguments(self) -> dict[str, Any]:
        config = self._config
        return {
            "url_list": str(self._requests),
            "output_folder": str(self._results),
            "input_format": "parquet",
            "url_col": "url",
            "save_additional_columns": ["uid"],
            "number_sample_per_shard": self._longest,  # one file, one shard
            "oom_shard_count": _ID_DIGITS,
            "output_format": "parquet",
            "encode_format": _BYTES_COLUMN,
            "resize_mode": "no",
            "disable_all_reencoding": True,
            "compute_hash": "sha256",
            "extract_exif": False,
            "enable_wandb": False,
            "timeout": config.timeout_s,
            "retries": config.retries,
            "processes_count": config.num_processes,
            "thread_count": config.num_threads,
            "user_agent_token": config.user_agent_token,
        }


def child_environment(environment: Mapping[str, str], modules: Path) -> dict[str, str]:
    """The environment for a process that talks to strangers: no proxies, no secrets, no reporting home.

    Args:
        environment: Ours.
        modules: A folder of modules that go before all others.
    """
    kept = {name: value for name, value in environment.items() if not _WITHHELD.search(name)}
    paths = [str(modules), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "no_proxy": "*"}


def _some(indices: Sequence[int]) -> str:
    shown = ", ".join(str(index) for index in indices[:10])
    return shown if len(indices) <= 10 else f"{shown}, …"
