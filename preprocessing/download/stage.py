"""The download stage: from selected rows to rows with pictures.

For each shard: judge the URLs by address, let img2dataset fetch the rest, check and normalize what came, and give
every row that did not make it a reason.
"""

import concurrent.futures
import functools
import io
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import ContractError, GateError, TransientError
from infra.storage import ObjectStore, sha256_of_bytes
from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.digests import digest_of
from preprocessing.contracts.manifest import Manifest, dataset_prefix
from preprocessing.contracts.reasons import Reason
from preprocessing.contracts.schemas import DOWNLOADED, SELECTED
from preprocessing.download.addresses import Target, Verdict, check_urls
from preprocessing.download.containers import ImageRefused
from preprocessing.download.fetch import MAX_DETAIL_CHARS, REQUESTS, FetchedRow, FetchedShard, fetch_shards, reason_of
from preprocessing.download.images import NormalizedImage, normalize_image
from preprocessing.stage import RowsFile, ShardOutput, rejects_table

LOGGER = logging.getLogger(__name__)

STAGE_VERSION = 1

_SHARDS_A_CHILD = (
    256  # bounds what waits on the local disk, and how long name resolution takes before the first picture
)
_MAX_THREADS = 8  # each may hold a decoded picture of `max_image_area_px`
_UNREACHABLE = frozenset({Reason.HOST_UNKNOWN, Reason.CONNECTION_FAILED, Reason.TIMED_OUT})


@dataclass(frozen=True)
class _Selected:
    """A shard of selected rows, and what the preflight says of each row's URL."""

    index: int
    table: pa.Table
    verdicts: Mapping[str, Target | Verdict]

    def requests(self) -> pa.Table:
        """The rows that may be asked for, in the ``REQUESTS`` schema."""
        wanted = [
            (uid, verdict.url)
            for uid, url in zip(self.column("uid"), self.column("url"), strict=True)
            if isinstance(verdict := self.verdicts[url], Target)
        ]
        return pa.table({"uid": [uid for uid, _ in wanted], "url": [url for _, url in wanted]}, schema=REQUESTS)

    def column(self, name: str) -> list[str]:
        return self.table.column(name).to_pylist()


class DownloadStage:
    """Fetches the pictures of a selected dataset.

    Every selected shard becomes one shard with the rows whose picture arrived whole, in the selected order. The digest
    names what was asked for; what the world answered at the time is kept by the manifest.

    Args:
        store: Where datasets stand.
        selected: The manifest of the ``select`` stage.
        config: How to fetch, and what pictures are taken.
    """

    name = "download"
    version = STAGE_VERSION

    def __init__(self, store: ObjectStore, selected: Manifest, config: DownloadConfig) -> None:
        self._store = store
        self._selected = selected
        self._config = config

    @property
    def digest(self) -> str:
        """sha256 of what determines the result."""
        return digest_of(self.name, self.version, self.config, [self._selected.digest])

    @property
    def parents(self) -> dict[str, str]:
        """Stage → digest of what it reads."""
        return {self._selected.stage: self._selected.digest}

    @property
    def config(self) -> dict[str, Any]:
        """The config fields that change the result."""
        return self._config.digest_fields()

    @property
    def num_shards(self) -> int:
        """As many as were selected."""
        return len(self._selected.shards)

    def specs(self) -> dict[str, dict[str, Any]]:
        """No tensors are stored."""
        return {}

    def write_extra_files(self, folder: Path) -> Sequence[Path]:
        """There are none."""
        return ()

    def outputs(self, indices: Sequence[int], scratch: Path) -> Iterator[ShardOutput]:
        """Makes the given shards, in the order in which they arrive.

        Shards without any answer are held back until some server has answered anything, now or in an earlier run: if
        none does, the fault is rather with the network here, or with the one server that is down, than with every row,
        and no row is refused for it.

        Raises:
            TransientError: Nothing could be reached, or img2dataset failed twice.
        """
        held: list[ShardOutput] = []
        has_answer = len(indices) < self.num_shards
        for output in self._make(indices, scratch):
            has_answer = has_answer or not is_unreachable(output)
            if not has_answer:
                held.append(output)
                continue
            yield output
            yield from held
            held.clear()
        if held:
            num_in = sum(output.num_in for output in held)
            raise TransientError(f"{_arrived(0, num_in, _count(held))}; nothing of it is kept")

    def _make(self, indices: Sequence[int], scratch: Path) -> Iterator[ShardOutput]:
        for start in range(0, len(indices), _SHARDS_A_CHILD):
            shards = self._preflight(indices[start : start + _SHARDS_A_CHILD])
            requests = {index: shard.requests() for index, shard in shards.items()}
            for index in [index for index, table in requests.items() if table.num_rows == 0]:
                del requests[index]
                yield self._finish(shards[index], ())
            for fetched in fetch_shards(requests, self._config, scratch):
                yield self._finish(shards[fetched.index], _rows(fetched))

    def _preflight(self, indices: Sequence[int]) -> dict[int, _Selected]:
        tables = {index: read_selected(self._store, self._selected, index) for index in indices}
        urls = {url for table in tables.values() for url in table.column("url").to_pylist()}
        verdicts = check_urls(urls, self._config.allow_networks)
        return {index: _Selected(index, table, verdicts) for index, table in tables.items()}

    def _finish(self, shard: _Selected, fetched: Iterable[list[FetchedRow]]) -> ShardOutput:
        results: dict[str, NormalizedImage | Verdict] = {}
        with concurrent.futures.ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
            for batch in fetched:
                done = pool.map(functools.partial(normalize_row, config=self._config), batch)
                results.update(zip((row.uid for row in batch), done, strict=True))
        return shard_output(shard.index, shard.table, shard.verdicts, results)


def _rows(shard: FetchedShard) -> Iterator[list[FetchedRow]]:
    yield from shard.batches()


def read_selected(store: ObjectStore, selected: Manifest, index: int) -> pa.Table:
    """A shard of the selected dataset, in the ``SELECTED`` schema, verified.

    Raises:
        ContractError: Its bytes are not those that the manifest names, or its columns are not ``SELECTED``.
    """
    prefix = dataset_prefix(selected.stage, selected.digest)
    tables = []
    for file in selected.shards[index].files:
        if file.kind != "rows":
            continue
        data = store.read(f"{prefix}/{file.name}")
        if (found := sha256_of_bytes(data)) != file.sha256:
            raise ContractError(
                f"{store.uri_of(f'{prefix}/{file.name}')}: sha256 is {found}, its manifest says {file.sha256}; "
                "delete the dataset's folder and select again"
            )
        tables.append(pq.read_table(io.BytesIO(data)))
    table = pa.concat_tables(tables) if tables else SELECTED.empty_table()
    if table.column_names != SELECTED.names:
        raise ContractError(
            f"download: the selected rows have the columns {table.column_names}, expected {SELECTED.names}"
        )
    return table.cast(SELECTED).combine_chunks()


def normalize_row(row: FetchedRow, config: DownloadConfig) -> NormalizedImage | Verdict:
    """What becomes of one fetched row: the boundary at which any failure turns into that row's drop reason."""
    if row.data is None:
        return reason_of(row.error or "img2dataset gave neither bytes nor an error")
    try:
        picture = normalize_image(row.data, config)
    except ImageRefused as refused:
        return refused.reason, refused.detail[:MAX_DETAIL_CHARS]
    except Exception as error:  # one strange picture must not end the stage
        LOGGER.exception("download: the picture of row %s is refused", row.uid)
        return Reason.IMAGE_BROKEN, f"{type(error).__name__}: {error}"[:MAX_DETAIL_CHARS]
    if row.sha256 is not None and row.sha256 != picture.sha256:
        return Reason.DOWNLOAD_FAILED, "its bytes changed between img2dataset and us"
    return picture


def shard_output(
    index: int,
    table: pa.Table,
    verdicts: Mapping[str, Target | Verdict],
    results: Mapping[str, NormalizedImage | Verdict],
) -> ShardOutput:
    """Joins selected rows with what came of them; a row of which nothing is known is ``LOST_BY_DOWNLOADER``.

    Args:
        index: Of the shard.
        table: Selected rows.
        verdicts: URL → what the preflight said.
        results: uid → picture, or reason and detail.

    Returns:
        The shard, kept rows in the order of ``table``.
    """
    kept: list[int] = []
    pictures: list[NormalizedImage] = []
    rejects: list[tuple[str, str, str, str]] = []
    for position, (uid, url) in enumerate(
        zip(table.column("uid").to_pylist(), table.column("url").to_pylist(), strict=True)
    ):
        verdict = verdicts[url]
        lost = (Reason.LOST_BY_DOWNLOADER, "img2dataset says nothing about this row")
        result = results.get(uid, lost) if isinstance(verdict, Target) else verdict
        if isinstance(result, NormalizedImage):
            kept.append(position)
            pictures.append(result)
        else:
            rejects.append((uid, url, result[0].value, result[1]))
    rows = RowsFile(f"shard-{index:05d}.parquet", _with_pictures(table.take(pa.array(kept, pa.int64())), pictures))
    columns = [list(column) for column in zip(*rejects, strict=True)] or [[], [], [], []]
    return ShardOutput(index, table.num_rows, (rows,), rejects_table(*columns))


def _with_pictures(table: pa.Table, pictures: Sequence[NormalizedImage]) -> pa.Table:
    added = {
        "image": [picture.image for picture in pictures],
        "image_width": [picture.width for picture in pictures],
        "image_height": [picture.height for picture in pictures],
        "original_width": [picture.original_width for picture in pictures],
        "original_height": [picture.original_height for picture in pictures],
        "sha256": [picture.sha256 for picture in pictures],
    }
    columns = [table.column(name) for name in SELECTED.names]
    return pa.table(
        [*columns, *(pa.array(values, DOWNLOADED.field(name).type) for name, values in added.items())],
        schema=DOWNLOADED,
    )


def is_unreachable(output: ShardOutput) -> bool:
    """Whether nobody answered: at least one row was asked for, and each such row's host could not be reached."""
    dropped = _count([output])
    num_asked = output.num_in - dropped[Reason.URL_REFUSED]
    return 0 < num_asked == sum(dropped[reason] for reason in _UNREACHABLE)


def check_gate(manifest: Manifest, config: DownloadConfig) -> None:
    """Refuses a dataset of which too little arrived.

    Raises:
        GateError: Nothing arrived, or less than ``download.min_success_rate``.
    """
    said = _arrived(manifest.num_out, manifest.num_in, manifest.dropped)
    if manifest.num_out == 0:
        raise GateError(said)
    rate = manifest.num_out / manifest.num_in
    if rate < config.min_success_rate:
        raise GateError(f"{said} ({rate:.3f} is under download.min_success_rate = {config.min_success_rate:g})")


def _count(outputs: Iterable[ShardOutput]) -> Counter[str]:
    return Counter(reason for output in outputs for reason in output.rejects.column("reason").to_pylist())


def _arrived(num_out: int, num_in: int, dropped: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in Counter(dropped).most_common())
    return (
        f"download: {num_out:,} of {num_in:,} pictures arrived ({reasons or 'none was asked for'}): "
        "is the server up, are the networks allowed? see download.allow_networks"
    )
