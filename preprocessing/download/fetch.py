"""Runs the engine in a child process, and believes its rows and not its exit code.

One child fetches many shards, since starting it takes a second. It gets one Parquet file a shard, and numbers its own
shards by position among the sorted files; so the n-th file given is its shard n. It writes each shard's rows, then a
``_stats.json``; a shard is done when both can be read. A child that dies, stalls, or ends without having done
everything is started once more for what is missing. What said no to the first is not asked again by the second.
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

from infra import pulse
from infra.errors import TransientError
from infra.processes import GuardedProcess
from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.reasons import Reason
from preprocessing.download.addresses import Verdict
from preprocessing.download.images import NormalizedImage
from preprocessing.download.jobs import EngineJob

LOGGER = logging.getLogger(__name__)

REQUESTS = pa.schema(
    [
        pa.field("uid", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("expected_md5", pa.string()),
        pa.field("expected_sha256", pa.string()),
    ]
)
NUM_ATTEMPTS = 2

_ENGINE = ["-m", "preprocessing.download.engine"]
_ROOT = Path(__file__).resolve().parents[2]  # where `-m` finds it, installed or not
_POLL_S = 0.2
_GRACE_S = 5.0
_BATCH_ROWS = 64
_ID_DIGITS = 8
_COLUMNS = (
    "uid",
    "jpg",
    "width",
    "height",
    "original_width",
    "original_height",
    "sha256",
    "status",
    "error_message",
    "reason",
)
_WITHHELD = re.compile(r"_proxy$|^(aws|prefect|wandb)_|token|secret|password|credential|api_?key", re.IGNORECASE)


@dataclass(frozen=True)
class FetchedRow:
    """What came of one request.

    Attributes:
        uid: As given.
        result: The picture; or reason and detail.
    """

    uid: str
    result: NormalizedImage | Verdict


@dataclass(frozen=True)
class FetchedShard:
    """A shard that the engine has finished; its rows are read a few at a time, in any order, and may not be all."""

    index: int
    path: Path

    def batches(self) -> Iterator[list[FetchedRow]]:
        """Yields rows, at most a few dozen pictures in memory at once."""
        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(_BATCH_ROWS, columns=list(_COLUMNS)):
                yield [FetchedRow(row["uid"], _result(row)) for row in batch.to_pylist()]


def _result(row: Mapping[str, Any]) -> NormalizedImage | Verdict:
    if row["reason"] is not None:
        return Reason(row["reason"]), row["error_message"] or ""
    if row["jpg"] is None or row["status"] != "success":
        return Reason.DOWNLOAD_FAILED, f"the engine says {row['status']!r}, and gives neither picture nor reason"
    return NormalizedImage(
        row["jpg"], row["width"], row["height"], row["original_width"], row["original_height"], row["sha256"]
    )


def fetch_shards(requests: Mapping[int, pa.Table], config: DownloadConfig, scratch: Path) -> Iterator[FetchedShard]:
    """Fetches shards, each exactly once, in the order in which they are done.

    A child that dies or stalls is started once more, for the shards that are missing. A shard's file is deleted when
    the next one is asked for.

    Args:
        requests: Shard → its rows in the ``REQUESTS`` schema; at least one row each.
        config: How to fetch.
        scratch: Folder for files on their way.

    Yields:
        The shards.

    Raises:
        TransientError: Shards are still missing after the second child; names them and quotes its log.
    """
    opted_out = scratch / "opted_out.txt"  # for as long as the scratch folder: over children, and over calls
    missing = sorted(requests)
    why = last_lines = ""
    for attempt in range(1, NUM_ATTEMPTS + 1):
        if not missing:
            return
        with tempfile.TemporaryDirectory(prefix="engine-", dir=scratch) as folder:
            child = _Child([(index, requests[index]) for index in missing], config, Path(folder), opted_out)
            # Closed here, whoever stops listening: the child must be gone before its folder is.
            with contextlib.closing(child.shards()) as shards:
                for shard in shards:
                    missing.remove(shard.index)
                    yield shard
                    shard.path.unlink()
        last_lines = child.last_lines
        why = f"the engine {child.ended} and left {len(missing)} shards undone ({_some(missing)})"
        if missing:
            LOGGER.warning("download: %s, attempt %d of %d", why, attempt, NUM_ATTEMPTS)
    if missing:
        raise TransientError(f"download: {why}, in attempt {NUM_ATTEMPTS}; its last words:\n{last_lines}")


class _Child:
    """One run of the engine over some shards.

    Attributes:
        ended: How it ended, as a phrase.
        last_lines: Of its log.
    """

    def __init__(
        self, shards: Sequence[tuple[int, pa.Table]], config: DownloadConfig, folder: Path, opted_out: Path
    ) -> None:
        self.ended = "did not start"
        self.last_lines = ""
        self._indices = [index for index, _ in shards]  # by the engine's own shard number
        self._config = config
        self._folder = folder
        self._requests = folder / "requests"
        self._results = folder / "results"
        for subfolder in (self._requests, self._results):
            subfolder.mkdir()
        for number, (_, table) in enumerate(shards):
            pq.write_table(table.cast(REQUESTS), self._requests / f"{number:0{_ID_DIGITS}d}.parquet")
        job = EngineJob(
            input=self._requests,
            output=self._results,
            config=config,
            columns=tuple(name for name in REQUESTS.names if name != "url"),
            rows_per_shard=max(table.num_rows for _, table in shards),  # one file, one shard
            num_digits=_ID_DIGITS,
            opted_out=opted_out,
        )
        self._job = folder / "job.json"
        self._job.write_text(job.model_dump_json())

    def shards(self) -> Generator[FetchedShard, None, None]:
        """Starts the child and yields shards as they appear, until all have or the child has ended or stalled."""
        left = set(range(len(self._indices)))
        process = GuardedProcess(
            [sys.executable, "-P", *_ENGINE, "--job", str(self._job)],
            env=child_environment(os.environ),
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
                    pulse.beat()
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


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that talks to strangers: no proxies, no secrets, no reporting home.

    Args:
        environment: Ours.
    """
    kept = {name: value for name, value in environment.items() if not _WITHHELD.search(name)}
    paths = [str(_ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "no_proxy": "*"}


def _some(indices: Sequence[int]) -> str:
    shown = ", ".join(str(index) for index in indices[:10])
    return shown if len(indices) <= 10 else f"{shown}, …"
