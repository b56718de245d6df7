"""The one loop that turns shards of one dataset into shards of the next and commits them.

What is done is decided by what stands in the store. A shard is done when its report (written last) names files that
are there with the sizes it says; a dataset is done when its manifest is there. So a run may be killed anywhere and
started again, or run twice at once, and the effect is that of one run.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from infra.errors import ContractError
from infra.storage import AlreadyExistsError, ObjectNotFoundError, ObjectStore, sha256_of_file
from preprocessing.contracts.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    DatasetFile,
    Manifest,
    ShardReport,
    Split,
    dataset_prefix,
)
from preprocessing.contracts.schemas import REJECTS

LOGGER = logging.getLogger(__name__)

PARQUET_WRITER: Mapping[str, Any] = {"compression": "zstd"}


@dataclass(frozen=True)
class RowsFile:
    """Rows that a kernel kept, to be written as one Parquet file."""

    name: str
    table: pa.Table
    split: Split | None = None
    writer: Mapping[str, Any] = field(default_factory=lambda: PARQUET_WRITER)


@dataclass(frozen=True)
class ShardOutput:
    """What a kernel made of one shard.

    Attributes:
        index: Of the shard.
        num_in: Rows read.
        rows: Kept rows, in one file or one a split.
        rejects: Refused rows, in the ``REJECTS`` schema.
    """

    index: int
    num_in: int
    rows: tuple[RowsFile, ...]
    rejects: pa.Table


@dataclass(frozen=True)
class Progress:
    """How far a stage is: shards done of shards in all, and the last one's report."""

    stage: str
    num_done: int
    num_shards: int
    report: ShardReport | None = None
    was_done: bool = False


ProgressCallback = Callable[[Progress], None]


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

    def outputs(self, indices: Sequence[int], scratch: Path) -> Iterator[ShardOutput]:
        """Makes the given shards, in any order, each exactly once."""
        ...


def rejects_table(
    uids: Sequence[str], urls: Sequence[str | None], reasons: Sequence[str], details: Sequence[str | None]
) -> pa.Table:
    """Refused rows in the ``REJECTS`` schema; all sequences are of one length."""
    return pa.table(
        [pa.array(uids, pa.string()), pa.array(urls, pa.string()), reasons, pa.array(details, pa.string())],
        schema=REJECTS,
    )


def load_manifest(store: ObjectStore, prefix: str) -> Manifest:
    """Reads a dataset's manifest.

    Raises:
        ObjectNotFoundError: There is none: the dataset is not complete.
        ContractError: It is not a manifest of a format that this version reads.
    """
    key = f"{prefix}/{MANIFEST_NAME}"
    try:
        return Manifest.model_validate_json(store.read(key))
    except ValidationError as error:
        first = error.errors()[0]
        raise ContractError(
            f"{store.uri_of(key)}: not a manifest of format {FORMAT_VERSION} "
            f"({'.'.join(map(str, first['loc']))}: {first['msg']}); make the dataset again with this version"
        ) from error


def find_manifest(store: ObjectStore, prefix: str) -> Manifest | None:
    """The dataset's manifest, or None where the dataset is not complete."""
    try:
        return load_manifest(store, prefix)
    except ObjectNotFoundError:
        return None


def run_stage(store: ObjectStore, stage: Stage, on_progress: ProgressCallback | None = None) -> Manifest:
    """Makes a dataset complete: only the shards that are not there yet, then the manifest.

    Args:
        store: Where datasets stand.
        stage: What to run.
        on_progress: Called after each shard.

    Returns:
        The manifest, whether it was there before or not.
    """
    prefix = dataset_prefix(stage.name, stage.digest)
    done = find_manifest(store, prefix)
    if done is not None:
        return done
    reports: dict[int, ShardReport] = {}
    for index in range(stage.num_shards):
        report = find_report(store, prefix, index)
        if report is not None:
            reports[index] = report
    notify = on_progress or (lambda _: None)
    notify(Progress(stage.name, len(reports), stage.num_shards, was_done=bool(reports)))
    todo = [index for index in range(stage.num_shards) if index not in reports]
    with tempfile.TemporaryDirectory(prefix=f"lacuna-{stage.name}-") as folder:
        scratch = Path(folder)
        for output in stage.outputs(todo, scratch) if todo else ():
            report = commit_shard(store, prefix, output, scratch)
            reports[report.index] = report
            notify(Progress(stage.name, len(reports), stage.num_shards, report))
        missing = sorted(set(range(stage.num_shards)) - set(reports))
        if missing:
            raise RuntimeError(f"{stage.name}: shards {missing[:10]} were not made, and nothing said why")
        extra = [
            _upload(store, prefix, path, DatasetFile(name=path.name, num_bytes=0, sha256="", kind="extra"))
            for path in stage.write_extra_files(scratch)
        ]
    return _commit_manifest(store, prefix, stage, [reports[index] for index in sorted(reports)], extra)


def find_report(store: ObjectStore, prefix: str, index: int) -> ShardReport | None:
    """A shard's report if it is there and the files that it names have the sizes that it says; else None."""
    try:
        report = ShardReport.model_validate_json(store.read(_report_key(prefix, index)))
        for file in report.files:
            if store.head(f"{prefix}/{file.name}").num_bytes != file.num_bytes:
                LOGGER.warning(
                    "%s/%s has not the size that its report says; shard %d is made again", prefix, file.name, index
                )
                return None
    except ObjectNotFoundError:
        return None
    except ValidationError:
        LOGGER.warning("%s: the report of shard %d cannot be read; the shard is made again", prefix, index)
        return None
    return report


def commit_shard(store: ObjectStore, prefix: str, output: ShardOutput, scratch: Path) -> ShardReport:
    """Writes a shard's files to scratch, uploads them, and its report last."""
    files = []
    for rows in output.rows:
        pq.write_table(rows.table, scratch / rows.name, **rows.writer)
        entry = DatasetFile(name=rows.name, num_bytes=0, sha256="", num_rows=rows.table.num_rows, split=rows.split)
        files.append(_upload(store, prefix, scratch / rows.name, entry))
    name = f"rejects-{output.index:05d}.parquet"
    pq.write_table(output.rejects, scratch / name, **PARQUET_WRITER)
    entry = DatasetFile(name=name, num_bytes=0, sha256="", num_rows=output.rejects.num_rows, kind="rejects")
    files.append(_upload(store, prefix, scratch / name, entry))
    counted = output.rejects.column("reason").value_counts().to_pylist()
    report = ShardReport(
        index=output.index,
        num_in=output.num_in,
        num_out=sum(rows.table.num_rows for rows in output.rows),
        dropped={item["values"]: item["counts"] for item in sorted(counted, key=lambda item: item["values"])},
        files=tuple(files),
    )
    store.put(_report_key(prefix, output.index), report.model_dump_json(indent=1).encode())
    return report


def _report_key(prefix: str, index: int) -> str:
    return f"{prefix}/reports/shard-{index:05d}.json"


def _upload(store: ObjectStore, prefix: str, path: Path, entry: DatasetFile) -> DatasetFile:
    """Uploads a file and removes it from scratch, so that scratch never holds more than a shard."""
    uploaded = store.upload(f"{prefix}/{entry.name}", path, sha256_of_file(path))
    path.unlink()
    return entry.model_copy(update={"num_bytes": uploaded.num_bytes, "sha256": uploaded.sha256})


def _commit_manifest(
    store: ObjectStore, prefix: str, stage: Stage, reports: Sequence[ShardReport], extra: Sequence[DatasetFile]
) -> Manifest:
    manifest = Manifest(
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
    try:
        store.put_if_absent(f"{prefix}/{MANIFEST_NAME}", manifest.model_dump_json(indent=1).encode())
    except AlreadyExistsError:
        LOGGER.info("%s: another run committed %s first; its manifest stands", stage.name, prefix)
    return load_manifest(store, prefix)


def code_version() -> str:
    """The version of the installed distribution, or ``0+checkout`` where it is not installed."""
    try:
        return version("lacuna-inpainting")
    except PackageNotFoundError:
        return "0+checkout"
