r"""The download engine: img2dataset's reader, writers and distributors around our client and decoders.

As the pipeline runs it, `fetch` writes a job and starts ``python -m preprocessing.download.engine --job FILE``. By hand
it takes what img2dataset takes, and writes what img2dataset writes:

    python -m preprocessing.download.engine --input urls.parquet --output folder --output-format webdataset \
        --caption-column caption --config download.json

A group of shards is one task of the distributor, so a process lives for as long as there is work, and so do its
connections, resolved names and decoders. With ``download.distributor`` ``pyspark`` or ``ray``, that package must be
installed, this one importable on all machines, and the folders on a file system that they share. With
``multiprocessing``, a worker that is killed ends the engine (img2dataset's pool would wait for it for ever); whoever
started it starts it again.

Source: img2dataset 1.47.0, ``main.py``, ``distributor.py``.
"""

import argparse
import importlib.abc
import json
import logging
import math
import multiprocessing
import multiprocessing.process
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from infra.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_OUTSIDE_WORLD
from preprocessing.contracts.config import DownloadConfig
from preprocessing.download.img2dataset_parts import DISTRIBUTORS, WRITERS, Reader
from preprocessing.download.jobs import EngineJob
from preprocessing.download.shards import SHARDS_AT_ONCE, ShardDownloader, is_done

LOGGER = logging.getLogger(__name__)


class _NoPandas(importlib.abc.MetaPathFinder):
    """Says that there is no pandas.

    pyarrow imports it at the first list that it is given, to see whether that is a series: a second or two of each
    process's time, for nothing.
    """

    def find_spec(self, fullname: str, *_: object) -> None:
        """Finds everything but pandas by other means."""
        if fullname == "pandas":
            raise ModuleNotFoundError("the download engine does without pandas", name=fullname)


if __name__ in ("__main__", "__mp_main__"):  # in this process and its workers, and in nobody else's
    sys.meta_path.insert(0, _NoPandas())

_TASKS_A_PROCESS = 5  # after so many, img2dataset's pool replaces a process
_MAX_SHARD_RETRY = 1
_SUBJOB_SIZE = 1000  # tasks that pyspark is given at once
_WATCH_S = 0.05


class GroupReader(Reader):
    """img2dataset's reader, which hands out several shards at a time.

    Args:
        num_processes: That will share them.
        arguments: The reader's.
    """

    def __init__(self, num_processes: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._num_processes = num_processes

    def __iter__(self) -> Generator[tuple[tuple[int, ...], tuple[str, ...]], None, None]:
        """Yields groups of shards: their numbers, and the files with their rows."""
        shards = list(super().__iter__())
        a_process = math.ceil(len(shards) / self._num_processes)
        size = max(1, math.ceil(a_process / _TASKS_A_PROCESS), min(SHARDS_AT_ONCE, a_process))
        for start in range(0, len(shards), size):
            group = shards[start : start + size]
            yield tuple(index for index, _ in group), tuple(file for _, file in group)


def run(job: EngineJob) -> list[int]:
    """Fetches what is not yet done.

    Returns:
        The shards that could not be finished.

    Raises:
        ValueError: The input has no rows or lacks a column.
    """
    job.output.mkdir(parents=True, exist_ok=True)
    scratch = job.output / "_tmp"
    scratch.mkdir(exist_ok=True)
    # A stats file counts if it can be read, and not by its name.
    names = [path.name.partition("_")[0] for path in job.output.glob("*_stats.json")]
    done = {int(name) for name in names if is_done(job.output, int(name), job.num_digits)}
    reader = GroupReader(
        num_processes=job.config.num_processes,
        url_list=str(job.input.absolute()),
        input_format="parquet",
        url_col=job.url_column,
        caption_col=job.caption_column,
        verify_hash_col=None,
        verify_hash_type=None,
        save_additional_columns=list(job.columns),
        number_sample_per_shard=job.rows_per_shard,
        done_shards=done,
        tmp_path=str(scratch.absolute()),
    )
    downloader = ShardDownloader(
        job.config,
        WRITERS[job.output_format],
        reader.column_list,
        str(job.output.absolute()),
        job.rows_per_shard,
        job.num_digits,
        (job.opted_out or job.output / "opted_out.txt").absolute(),
    )
    wanted: set[int] = set()

    def unfinished() -> list[int]:
        return sorted(index for index in list(wanted) if not is_done(job.output, index, job.num_digits))

    if job.config.distributor == "multiprocessing":
        threading.Thread(target=_end_with_a_killed_worker, args=(unfinished,), daemon=True).start()
    distribute = DISTRIBUTORS[job.config.distributor]
    distribute(job.config.num_processes, downloader, _Noted(reader, wanted), _SUBJOB_SIZE, _MAX_SHARD_RETRY)
    shutil.rmtree(scratch, ignore_errors=True)
    return unfinished()


class _Noted:
    """A reader of which one knows what it has handed out."""

    def __init__(self, reader: GroupReader, handed_out: set[int]) -> None:
        self._reader = reader
        self._handed_out = handed_out

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], tuple[str, ...]]]:
        for indices, files in self._reader:
            self._handed_out.update(indices)
            yield indices, files


def _end_with_a_killed_worker(unfinished: Callable[[], list[int]]) -> None:
    """Ends this process when a child of it is killed and shards are left; runs for ever, in a thread."""
    seen: set[multiprocessing.process.BaseProcess] = set()
    while True:
        seen.update(multiprocessing.active_children())
        for child in [child for child in seen if child.exitcode is not None]:
            seen.remove(child)
            # At its end the pool itself terminates its workers: then nothing is left.
            if child.exitcode and (left := unfinished()):
                LOGGER.error("download: a worker ended with %d, and %d shards are left", child.exitcode, len(left))
                os._exit(EXIT_OUTSIDE_WORLD)
        time.sleep(_WATCH_S)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fetch pictures into img2dataset's layout.")
    parser.add_argument("--job", type=Path, help="a JSON file that says all of it (EngineJob)")
    parser.add_argument("--input", type=Path, help="a Parquet file or a folder of them")
    parser.add_argument("--output", type=Path, help="a folder")
    parser.add_argument("--output-format", choices=sorted(WRITERS), default="parquet")
    parser.add_argument("--url-column", default="url")
    parser.add_argument("--caption-column")
    parser.add_argument("--columns", nargs="*", default=[], help="columns to take over")
    parser.add_argument("--rows-per-shard", type=int, default=10_000)
    parser.add_argument("--config", type=Path, help="a JSON file with the fields of `download`")
    words = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        missing = run(_job(words))
    except ValueError as error:
        LOGGER.error("%s", error)
        return EXIT_BAD_INPUT
    if missing:
        LOGGER.error("download: %d shards could not be finished: %s", len(missing), missing[:10])
        return EXIT_OUTSIDE_WORLD
    return EXIT_DONE


def _job(words: argparse.Namespace) -> EngineJob:
    if words.job is not None:
        return EngineJob.model_validate_json(words.job.read_bytes())
    if words.input is None or words.output is None:
        raise ValueError("--input, --output: both are needed, or --job")
    fields = json.loads(words.config.read_bytes()) if words.config else {}
    return EngineJob(
        input=words.input,
        output=words.output,
        config=DownloadConfig.model_validate(fields),
        output_format=words.output_format,
        url_column=words.url_column,
        caption_column=words.caption_column,
        columns=tuple(words.columns),
        rows_per_shard=words.rows_per_shard,
    )


if __name__ == "__main__":
    sys.exit(main())
