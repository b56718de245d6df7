"""Ours among the formats of ``loader_formats.py``, and the bare memory copy that bounds them all.

Rows are committed by the stage runner, as any dataset is: Parquet shards, reports, a manifest with every hash.
"""

import concurrent.futures
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file

from benchmarks.loader_formats import ROWS_PER_SHARD, SHAPES, WIDTHS, Batch, Place, make_row
from infra.storage import open_store
from model.specs import LatentSpec, MaskSpec, TextSpec
from preprocessing.contracts.manifest import Manifest, dataset_prefix
from preprocessing.contracts.schemas import SELECTED, TENSOR_WRITER
from preprocessing.stage import RowsFile, ShardOutput, rejects_table, run_stage
from training.data import CONSTANTS_NAME, TrainingDataset, open_dataset

COLUMNS = {"moments": "moments", "masked_moments_0": "masked_moments", "text_embeddings": "text_embeddings"} | {
    "mask_0": "mask"
}
DIGEST = "1" * 64
PREFIX = dataset_prefix("encode", DIGEST)


class RowsStage:
    """An encode stage whose rows are made up."""

    name = "encode"
    version = 1
    digest = DIGEST

    def __init__(self, num_rows: int, rows_per_shard: int = ROWS_PER_SHARD, first_row: int = 0) -> None:
        self.parents = {"download": "2" * 64}
        self.config: dict[str, Any] = {
            "resolution_px": 512,
            "num_mask_variants": 1,
            "image": "none",
            "moments": True,
            "text": "embeddings",
        }
        self._starts = range(first_row, first_row + num_rows, rows_per_shard)
        self._rows_per_shard = rows_per_shard

    @property
    def num_shards(self) -> int:
        """As many as the rows fill."""
        return len(self._starts)

    def specs(self) -> dict[str, dict[str, Any]]:
        """Stable Diffusion 2's."""
        return {
            "latents": LatentSpec(resolution_px=512, scaling_factor=0.18215, weights_sha256="3" * 64).to_json(),
            "text": TextSpec(width=1024, weights_sha256="4" * 64).to_json(),
            "masks": MaskSpec(family="lama_thick_512", resolution_px=512, num_variants=1, seed=0).to_json(),
        }

    def write_extra_files(self, folder: Path) -> Sequence[Path]:
        """Constants."""
        constants = {
            "null_text_embedding": torch.zeros(77, 1024, dtype=torch.float16),
            "null_token_ids": torch.zeros(77, dtype=torch.int64),
            "full_mask_moments": torch.zeros(8, 64, 64, dtype=torch.float16),
        }
        save_file(constants, folder / CONSTANTS_NAME)
        return [folder / CONSTANTS_NAME]

    def outputs(self, indices: Sequence[int], scratch: Path) -> Iterator[ShardOutput]:
        """Shards of train rows."""
        for index in indices:
            start = self._starts[index]
            table = _table(range(start, min(start + self._rows_per_shard, self._starts.stop)))
            file = RowsFile(f"train-{index:05d}.parquet", table, "train", TENSOR_WRITER)
            yield ShardOutput(index, table.num_rows, (file,), rejects_table([], [], [], []))


def _table(indices: range) -> pa.Table:
    rows = [make_row(index) for index in indices]
    numbers = [str(index) for index in indices]
    columns: dict[str, Any] = {
        "uid": pa.array([f"{index:032x}" for index in indices]),
        "url": pa.array([f"https://pictures.example.com/{number}.jpg" for number in numbers]),
        "caption": pa.array([f"a picture of something, number {number}" for number in numbers]),
        "punsafe": pa.array([0.01] * len(rows), pa.float32()),
    }
    fields = [SELECTED.field(name) for name in columns]
    for column, name in COLUMNS.items():
        raw = np.stack([row[name].reshape(-1).view(np.uint8) for row in rows])
        columns[column] = pa.Array.from_buffers(pa.binary(WIDTHS[name]), len(rows), [None, pa.py_buffer(raw)])
        fields.append(pa.field(column, pa.binary(WIDTHS[name]), nullable=False))
    return pa.table(list(columns.values()), schema=pa.schema(fields))


def write(folder: Path, num_rows: int, rows_per_shard: int = ROWS_PER_SHARD, first_row: int = 0) -> Manifest:
    """Commits a dataset of made-up rows into a store in a folder."""
    return run_stage(open_store(str(folder)), RowsStage(num_rows, rows_per_shard, first_row))


def open_ours(place: Place) -> TrainingDataset:
    """The training split; where it is remote, with its cache in the place's folder."""
    if place.remote is None:
        return open_dataset(open_store(str(place.folder)), PREFIX, place.folder / "cache")
    return open_dataset(open_store(place.remote), PREFIX, place.folder)


def read(place: Place, batch_size: int, num_workers: int) -> Callable[[], Iterator[Batch]]:
    """Shuffled globally; batches as the trainer takes them, in memory that is used again."""
    dataset = open_ours(place)
    batches = dataset.batches(seed=0, global_batch_size=batch_size, num_workers=num_workers)

    def epoch() -> Iterator[Batch]:
        for batch in itertools.islice(batches, len(dataset) // batch_size):
            yield {name: getattr(batch, name) for name in SHAPES}

    return epoch


def copy_memory(place: Place, batch_size: int, num_threads: int) -> Callable[[], Iterator[int]]:
    """The bytes of our rows, file after file, from the page cache's mapping into one reused buffer of a batch's size.

    Args:
        place: Our dataset.
        batch_size: Rows a buffer.
        num_threads: That share each buffer.
    """
    row_bytes = sum(WIDTHS.values())
    mapped = [np.memmap(place.folder / name, np.uint8, "r") for name in place.files]
    buffer = np.empty(batch_size * row_bytes, np.uint8)
    pool = concurrent.futures.ThreadPoolExecutor(num_threads)
    bounds = [len(buffer) * part // num_threads for part in range(num_threads + 1)]

    def copy_part(source: np.ndarray, part: int) -> None:
        start, stop = bounds[part], bounds[part + 1]
        np.copyto(buffer[start:stop], source[start:stop])

    def epoch() -> Iterator[int]:
        for source in mapped:
            for start in range(0, len(source) - len(buffer) + 1, len(buffer)):
                piece = source[start : start + len(buffer)]
                if num_threads == 1:
                    np.copyto(buffer, piece)
                else:
                    list(pool.map(lambda part, piece=piece: copy_part(piece, part), range(num_threads)))
                yield batch_size

    return epoch
