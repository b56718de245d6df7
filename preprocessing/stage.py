"""The one loop that turns shards of one dataset into shards of the next and commits them.

What is done is decided by what stands in the store. A shard is done when its report (written last, once) is of this
very dataset and names files that are there with the sizes it says; a dataset is done when its manifest is there. So a
run may be killed anywhere and started again, or run twice at once, and the effect is that of one run: of two that make
a shard at the same time, the first report stands, and the other run takes it over.
"""

import contextlib
import errno
import logging
import tempfile
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from infra.errors import TransientError
from infra.storage import (
    AlreadyExistsError,
    ConflictError,
    ObjectNotFoundError,
    ObjectStore,
    sha256_of_bytes,
    sha256_of_file,
)
from preprocessing.contracts.manifest import (
    MANIFEST_NAME,
    CommittedShard,
    DatasetFile,
    Manifest,
    ShardReport,
    Split,
    dataset_prefix,
    find_manifest,
    load_manifest,
)
from preprocessing.contracts.reasons import Reason
from preprocessing.contracts.schemas import REJECTS
from preprocessing.references import references_to

LOGGER = logging.getLogger(__name__)

PARQUET_WRITER: Mapping[str, Any] = {"compression": "zstd"}

_COMMITS_AT_ONCE = 3
_HASH_CHARS = 12  # of a sha256, where file names carry it
_DISK_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE})


@dataclass(frozen=True)
class RowsFile:
    """Rows that a kernel kept, to be written as one Parquet file."""

    name: str
    table: pa.Table
    split: Split | None = None
    writer: Mapping[str, Any] = field(default_factory=lambda: PARQUET_WRITER)
    without: tuple[str, ...] = ()
    """Columns of which some values are missing; see `DatasetFile.without`."""

    @property
    def num_rows(self) -> int:
        """How many there are."""
        return self.table.num_rows

    def write(self, folder: Path) -> Path:
        """Writes the file into a folder."""
        pq.write_table(self.table, folder / self.name, **self.writer)
        return folder / self.name


@dataclass(frozen=True)
class WrittenFile:
    """Rows that a kernel kept and wrote itself, somewhere in scratch."""

    name: str
    path: Path
    num_rows: int
    split: Split | None = None
    without: tuple[str, ...] = ()

    def write(self, folder: Path) -> Path:  # as RowsFile
        """Where it is."""
        return self.path


@dataclass(frozen=True)
class ShardOutput:
    """What a kernel made of one shard.

    Attributes:
        index: Of the shard.
        num_in: Rows read.
        rows: Kept rows, in one file or one a split.
        rejects: Refused rows, in the ``REJECTS`` schema: a table, or a file that the kernel wrote.
        dropped: Refused rows by reason, where ``rejects`` is a file, or where they are only counted and the table is
            not written.
        is_repeatable: Whether making it again gives the same bytes. Where it does not, file names carry their hash: of
            two runs at once, none replaces what the other's report names.
        digest: As in `ShardReport`.
    """

    index: int
    num_in: int
    rows: tuple[RowsFile | WrittenFile, ...]
    rejects: pa.Table | WrittenFile
    dropped: Mapping[str, int] | None = None
    is_repeatable: bool = True
    digest: str | None = None

    @property
    def is_on_disk(self) -> bool:
        """Whether its rows wait in scratch, and take no memory."""
        return all(isinstance(file, WrittenFile) for file in self.rows)


@dataclass(frozen=True)
class ShardReference:
    """A shard that stands in another dataset, and is named instead of made.

    Attributes:
        report: With the files where they are; see `ShardReport.standing_in`.
    """

    report: ShardReport

    @property
    def index(self) -> int:
        """Of the shard."""
        return self.report.index

    @property
    def num_in(self) -> int:
        """Rows read."""
        return self.report.num_in

    @property
    def is_on_disk(self) -> bool:
        """As `ShardOutput`: it takes no memory."""
        return True


@dataclass(frozen=True)
class Progress:
    """How far a stage is: shards done of shards in all, and the last one's report."""

    stage: str
    num_done: int
    num_shards: int
    report: ShardReport | None = None
    was_done: bool = False


ProgressCallback = Callable[[Progress], None]
Gate = Callable[[Manifest], None]
"""Raises `infra.errors.GateError` where a dataset is not good enough."""


class Stage(Protocol):
    """A stage: what it is made from, and a generator of its shards."""

    @property
    def name(self) -> str:
        """``select``, ``download`` or ``encode``."""
        ...

    @property
    def version(self) -> int:
        """``STAGE_VERSION``: raised whenever the code's result changes."""
        ...

    @property
    def digest(self) -> str:
        """sha256 of what determines the result."""
        ...

    @property
    def parents(self) -> dict[str, str]:
        """Stage → digest of what it reads."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """The config fields that change the result."""
        ...

    @property
    def num_shards(self) -> int:
        """How many shards there are to make."""
        ...

    def specs(self) -> dict[str, dict[str, Any]]:
        """Specs of the tensors in the rows; empty where there are none."""
        ...

    def write_extra_files(self, folder: Path) -> Sequence[Path]:
        """Writes files that belong to the whole dataset; returns their paths under ``folder``."""
        ...

    def outputs(self, indices: Sequence[int], scratch: Path) -> Iterator[ShardOutput | ShardReference]:
        """Makes or names the given shards, in any order, each once, but for those that somebody else has committed."""
        ...


def rejects_table(
    uids: Sequence[str], urls: Sequence[str | None], reasons: Sequence[str], details: Sequence[str | None]
) -> pa.Table:
    """Refused rows in the ``REJECTS`` schema; all sequences are of one length. Of forgotten ones only the uid stays."""
    if Reason.FORGOTTEN in reasons:
        is_shown = [reason != Reason.FORGOTTEN for reason in reasons]
        urls = [url if is_told else None for url, is_told in zip(urls, is_shown, strict=True)]
        details = [detail if is_told else None for detail, is_told in zip(details, is_shown, strict=True)]
    return pa.table(
        [pa.array(uids, pa.string()), pa.array(urls, pa.string()), reasons, pa.array(details, pa.string())],
        schema=REJECTS,
    )


def run_stage(
    store: ObjectStore, stage: Stage, on_progress: ProgressCallback | None = None, gate: Gate | None = None
) -> Manifest:
    """Makes a dataset complete: only the shards that are not there yet, then the manifest.

    Args:
        store: Where datasets stand.
        stage: What to run.
        on_progress: Called after each shard.
        gate: Asked of the dataset before it is complete. What it refuses keeps its shards and gets no manifest: the
            next run makes none of them again, and asks its own gate.

    Returns:
        The manifest, whether it was there before or not.

    Raises:
        TransientError: The outside world failed; what is done is kept, and a retry goes on from there.
        GateError: The gate refused.
    """
    prefix = dataset_prefix(stage.name, stage.digest)
    done = find_manifest(store, prefix)
    if done is not None:
        return done
    reports = run_shards(store, stage, range(stage.num_shards), on_progress)
    with _scratch(stage) as scratch:
        extra = [_put_extra_file(store, prefix, path) for path in stage.write_extra_files(scratch)]
    shards = [reports[index] for index in sorted(reports)]
    manifest = _manifest_of(store, stage, shards, extra)
    if gate is not None:
        gate(manifest)
    done = find_manifest(store, prefix)  # what another run's names is not to be swept
    if done is not None:
        return done
    own = {file.name for shard in shards for file in shard.files if file.folder is None}
    _sweep(store, prefix, own | {file.name for file in extra})
    _check_references(store, prefix, manifest)
    committed = _commit_manifest(store, prefix, manifest)
    try:
        _check_references(store, prefix, committed)
    except TransientError:
        store.delete(f"{prefix}/{MANIFEST_NAME}")  # nothing that it names is to be believed
        raise
    return committed


def _check_references(store: ObjectStore, prefix: str, manifest: Manifest) -> None:
    """Makes sure that files in other datasets' folders are there: they may have been replaced since they were named.

    Raises:
        TransientError: One is not there; the next run makes its shard.
    """
    files = [(shard.index, file) for shard in manifest.shards for file in shard.files if file.folder is not None]
    folders = {file.folder for _, file in files}
    stands = {(info.key, info.num_bytes) for folder in folders for info in store.list(f"{folder}/")}
    for index, file in files:
        if (file.key(prefix), file.num_bytes) not in stands:
            raise TransientError(
                f"{store.uri_of(file.key(prefix))}, a file of shard {index} of {prefix}, is gone: it was replaced "
                "meanwhile, and the next run makes the shard again"
            )


def run_shards(
    store: ObjectStore, stage: Stage, indices: Sequence[int], on_progress: ProgressCallback | None = None
) -> dict[int, ShardReport]:
    """Makes some of a dataset's shards and commits each: one task's part, where many tasks or machines share the work.

    Parts may overlap, and may run at the same time. Once all are done, `run_stage` finds the shards there and writes
    the manifest.

    Args:
        store: Where datasets stand.
        stage: What to run.
        indices: Of the shards.
        on_progress: Called after each shard.

    Returns:
        The shards' reports by index, whether they were there before or not.

    Raises:
        TransientError: The outside world failed; what is done is kept, and a retry goes on from there.
    """
    reports: dict[int, ShardReport] = {}
    for index in indices:
        report = find_report(store, stage, index)
        if report is not None:
            reports[index] = report
    notify = on_progress or (lambda _: None)
    notify(Progress(stage.name, len(reports), len(indices), was_done=bool(reports)))
    todo = [index for index in indices if index not in reports]
    with _scratch(stage) as scratch:
        for report in _committed(store, stage, todo, scratch):
            reports[report.index] = report
            notify(Progress(stage.name, len(reports), len(indices), report))
    for index in todo:
        # A stage may leave out what somebody else commits while it is busy with other shards.
        if index not in reports and (report := find_report(store, stage, index)) is not None:
            reports[index] = report
            notify(Progress(stage.name, len(reports), len(indices), was_done=True))
    missing = sorted(set(indices) - set(reports))
    if missing:
        raise RuntimeError(f"{stage.name}: shards {missing[:10]} were not made, and nothing said why")
    return reports


def _committed(store: ObjectStore, stage: Stage, indices: Sequence[int], scratch: Path) -> Iterator[ShardReport]:
    """Makes shards and commits each; those that wait on disk, several at once: a commit mostly waits for a disk."""

    def commit(output: ShardOutput | ShardReference) -> ShardReport:
        if isinstance(output, ShardReference):
            return _commit_report(store, stage, output.report)
        made = commit_shard(store, dataset_prefix(stage.name, stage.digest), output, scratch)
        report = _commit_report(store, stage, made)
        _delete_unused(store, dataset_prefix(stage.name, stage.digest), made, report)
        return report

    waiting: deque[Future[ShardReport]] = deque()
    with ThreadPoolExecutor(_COMMITS_AT_ONCE, "commit") as pool:
        for output in stage.outputs(indices, scratch) if indices else ():
            waiting.append(pool.submit(commit, output))
            num_ahead = _COMMITS_AT_ONCE if output.is_on_disk else 0
            del output  # else its rows would stay in memory until the next ones are there
            while len(waiting) > num_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextlib.contextmanager
def _scratch(stage: Stage) -> Iterator[Path]:
    """A folder for files on their way; a disk that is full or fails is the world's fault, and a retry may help."""
    try:
        with tempfile.TemporaryDirectory(prefix=f"lacuna-{stage.name}-") as folder:
            yield Path(folder)
    except OSError as error:
        if error.errno not in _DISK_FAULTS:
            raise
        where = error.filename or tempfile.gettempdir()
        raise TransientError(f"{stage.name}: {where}: {error.strerror or error}; is there room in $TMPDIR?") from error


def find_report(store: ObjectStore, stage: Stage, index: int) -> ShardReport | None:
    """A shard's report if it is there, is of this dataset, and its files have the sizes that it says; else None."""
    return _find_report(store, stage, index)[0]


def reported_shards(store: ObjectStore, stage: Stage) -> set[int]:
    """The shards that have a report, whatever it says: one listing, where `find_report` looks closely at one."""
    beginning = _report_key(dataset_prefix(stage.name, stage.digest), 0).removesuffix("00000.json")
    names = (info.key.removeprefix(beginning).removesuffix(".json") for info in store.list(beginning))
    return {int(name) for name in names if name.isdecimal()}


def _find_report(store: ObjectStore, stage: Stage, index: int) -> tuple[ShardReport | None, str | None]:
    """A shard's report, if it holds; and the etag of what stands there, whatever it is."""
    prefix = dataset_prefix(stage.name, stage.digest)
    key = _report_key(prefix, index)
    try:
        data, etag = store.read_with_etag(key)
    except ObjectNotFoundError:
        return None, None
    try:
        committed = CommittedShard.model_validate_json(data)
    except ValidationError:
        LOGGER.warning("%s cannot be read; the shard is made again", store.uri_of(key))
        return None, etag
    problem = _foreign(committed, stage, index) or missing_file(store, prefix, committed.report)
    if problem is not None:
        LOGGER.warning("%s: %s; the shard is made again", store.uri_of(key), problem)
        return None, etag
    return committed.report, etag


def _foreign(committed: CommittedShard, stage: Stage, index: int) -> str | None:
    """Why a report is none of this shard, if it is not."""
    said = (committed.stage, committed.digest, committed.parents, committed.report.index)
    wanted = (stage.name, stage.digest, stage.parents, index)
    for name, found, expected in zip(("stage", "digest", "parents", "index"), said, wanted, strict=True):
        if found != expected:
            return f"its {name} is {found!r}, expected {expected!r}"
    return None


def missing_file(store: ObjectStore, prefix: str, report: ShardReport) -> str | None:
    """What is wrong with a shard's files: one that is not there, or has another size; None where nothing is.

    Args:
        store: Where they stand.
        prefix: Of the dataset that the report is of.
        report: Names them.
    """
    for file in report.files:
        try:
            num_bytes = store.head(file.key(prefix)).num_bytes
        except ObjectNotFoundError:
            return f"{file.name} is not there"
        if num_bytes != file.num_bytes:
            return f"{file.name} has {num_bytes} bytes, expected {file.num_bytes}"
    return None


def commit_shard(store: ObjectStore, prefix: str, output: ShardOutput, scratch: Path) -> ShardReport:
    """Writes a shard's files to scratch and uploads them; the report that names them is returned, not written."""
    files = []
    for rows in output.rows:
        path = rows.write(scratch)
        entry = DatasetFile(
            name=rows.name,
            num_bytes=0,
            sha256="",
            num_rows=rows.num_rows,
            split=rows.split,
            without=rows.without,
        )
        files.append(_upload(store, prefix, path, entry, output.is_repeatable))
    rejects, counted = output.rejects, output.dropped
    if counted is None:
        assert not isinstance(rejects, WrittenFile), "who writes rejects counts them"
        counted = {item["values"]: item["counts"] for item in rejects.column("reason").value_counts().to_pylist()}
        name = f"rejects-{output.index:05d}.parquet"
        pq.write_table(rejects, scratch / name, **PARQUET_WRITER)
        rejects = WrittenFile(name, scratch / name, rejects.num_rows)
    if isinstance(rejects, WrittenFile):
        entry = DatasetFile(name=rejects.name, num_bytes=0, sha256="", num_rows=rejects.num_rows, kind="rejects")
        files.append(_upload(store, prefix, rejects.path, entry, output.is_repeatable))
    dropped = {reason: count for reason, count in counted.items() if count}
    return ShardReport(
        index=output.index,
        num_in=output.num_in,
        num_out=sum(rows.num_rows for rows in output.rows),
        dropped=dict(sorted(dropped.items())),
        files=tuple(files),
        digest=output.digest,
    )


def _commit_report(store: ObjectStore, stage: Stage, report: ShardReport) -> ShardReport:
    """Writes a shard's report where none stands that holds; returns the one that stands."""
    committed = CommittedShard(
        stage=stage.name, stage_version=stage.version, digest=stage.digest, parents=stage.parents, report=report
    )
    key = _report_key(dataset_prefix(stage.name, stage.digest), report.index)
    while True:
        there, etag = _find_report(store, stage, report.index)
        if there is not None:
            if there != report:
                LOGGER.info("%s: another run committed shard %d first; its report stands", stage.name, report.index)
            return there
        with contextlib.suppress(ConflictError):  # somebody was quicker: look again
            store.compare_and_swap(key, committed.model_dump_json(indent=1).encode(), etag)
            return report


def _delete_unused(store: ObjectStore, prefix: str, made: ShardReport, stands: ShardReport) -> None:
    """Deletes what we made of a shard and another run's report does not name: its sweep may be over."""
    unused = {file.key(prefix) for file in made.files} - {file.key(prefix) for file in stands.files}
    for key in unused - references_to(store, prefix).keys() if unused else ():
        store.delete(key)


def forget_shards(store: ObjectStore, stage: Stage, indices: Sequence[int]) -> None:
    """Lets the next run make shards of a dataset again that is not complete; their files go once others are there."""
    for index in indices:
        store.delete(_report_key(dataset_prefix(stage.name, stage.digest), index))


def _report_key(prefix: str, index: int) -> str:
    return f"{prefix}/reports/shard-{index:05d}.json"


def _sweep(store: ObjectStore, prefix: str, named: Collection[str]) -> None:
    """Deletes files of shards that no report names: of runs that were killed, or came second.

    No run of this dataset can still need one: every shard's report stands, and whoever comes second takes that over.
    What another dataset names stays: this one may be made anew after that one took shards over.
    """
    keys = [info.key for info in store.list(f"{prefix}/")]
    unnamed = []
    for key in keys:
        name = key.removeprefix(f"{prefix}/")
        if name.endswith(".parquet") and "/" not in name and name not in named:
            unnamed.append(key)
    kept = references_to(store, prefix) if unnamed else {}
    for key in unnamed:
        if key in kept:
            LOGGER.info("%s: kept for %s", store.uri_of(key), ", ".join(kept[key]))
            continue
        LOGGER.info("%s: nothing names it; deleted", store.uri_of(key))
        store.delete(key)


def _upload(store: ObjectStore, prefix: str, path: Path, entry: DatasetFile, is_repeatable: bool = True) -> DatasetFile:
    """Uploads a file and removes it from scratch, so that scratch never holds more than a few shards."""
    sha256 = sha256_of_file(path)
    name = entry.name
    if not is_repeatable:
        stem, dot, suffix = name.rpartition(".")
        name = f"{stem}-{sha256[:_HASH_CHARS]}{dot}{suffix}"
    uploaded = store.upload(f"{prefix}/{name}", path, sha256)
    path.unlink()
    return entry.model_copy(update={"name": name, "num_bytes": uploaded.num_bytes, "sha256": uploaded.sha256})


def _put_extra_file(store: ObjectStore, prefix: str, path: Path) -> DatasetFile:
    """Writes a small file of the whole dataset; where another run wrote one first, that one stands.

    It may have other bytes, from a machine that rounds otherwise, and a manifest may name it by now.
    """
    key, data = f"{prefix}/{path.name}", path.read_bytes()
    try:
        store.put_if_absent(key, data)
    except AlreadyExistsError:
        data = store.read(key)
    return DatasetFile(name=path.name, num_bytes=len(data), sha256=sha256_of_bytes(data), kind="extra")


def _manifest_of(
    store: ObjectStore, stage: Stage, reports: Sequence[ShardReport], extra: Sequence[DatasetFile]
) -> Manifest:
    return Manifest(
        stage=stage.name,
        stage_version=stage.version,
        digest=stage.digest,
        parents=stage.parents,
        config=stage.config,
        shards=tuple(reports),
        extra_files=tuple(extra),
        specs=stage.specs(),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        code_version=code_version(),
        conditional_writes=getattr(store, "conditional_writes", True),
    )


def _commit_manifest(store: ObjectStore, prefix: str, manifest: Manifest) -> Manifest:
    try:
        store.put_if_absent(f"{prefix}/{MANIFEST_NAME}", manifest.model_dump_json(indent=1).encode())
    except AlreadyExistsError:
        LOGGER.info("%s: another run committed %s first; its manifest stands", manifest.stage, prefix)
    return load_manifest(store, prefix)


def code_version() -> str:
    """The version of the installed distribution, or ``0+checkout`` where it is not installed."""
    try:
        return version("lacuna-inpainting")
    except PackageNotFoundError:
        return "0+checkout"
