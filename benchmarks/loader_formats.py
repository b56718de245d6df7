"""One and the same rows in five formats, and each format's loader as its makers would have it used.

Imported by the children of ``loader.py`` and ``corruption.py``, in Lacuna's environment and in the peers': hence at the
top nothing but what all of them have.

A row is what a training at 512 px reads: ``moments`` and ``masked_moments`` (8 × 64 × 64 fp16, 64 KiB each),
``text_embeddings`` (77 × 1024 fp16, 154 KiB) and ``mask`` (64 × 64 bits, 512 B); 282.5 KiB. What comes out is the same
for all: a dict of collated tensors, the mask unpacked to (batch, 1, 64, 64) float32.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SHAPES: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
    "moments": (np.dtype("<f2"), (8, 64, 64)),
    "masked_moments": (np.dtype("<f2"), (8, 64, 64)),
    "text_embeddings": (np.dtype("<f2"), (77, 1024)),
    "mask": (np.dtype("u1"), (512,)),
}
WIDTHS = {name: dtype.itemsize * int(np.prod(shape)) for name, (dtype, shape) in SHAPES.items()}
ROW_BYTES = sum(WIDTHS.values())
SHARD_BYTES = 64 << 20  # MDS' default, and litdata's; ours and the tars have as many rows a file
ROWS_PER_SHARD = SHARD_BYTES // ROW_BYTES
SHUFFLE_BUFFER = 512  # samples; for webdataset, which cannot shuffle globally

Batch = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a dataset is.

    Attributes:
        folder: Its local folder; where `remote` is given, an empty one for the loader's cache.
        remote: ``s3://bucket/prefix``, with boto3's environment set; None for a local dataset.
        files: Names of its files.
    """

    folder: Path
    remote: str | None = None
    files: list[str] = field(default_factory=list)


def make_row(index: int) -> dict[str, np.ndarray]:
    """The row of an index: random bits, finite where they are numbers."""
    bits = np.frombuffer(np.random.default_rng(index).bytes(ROW_BYTES), np.uint8)
    row, start = {}, 0
    for name, (dtype, shape) in SHAPES.items():
        part = bits[start : start + WIDTHS[name]]
        if dtype.itemsize == 2:
            part = part.view(np.uint16) & 0xBFFF  # no exponent is all ones: neither NaN nor infinity
        row[name] = part.view(dtype).reshape(shape)
        start += WIDTHS[name]
    return row


def checksum(batch: Batch) -> int:
    """A sum over everything in a batch that neither the order of rows nor the split into batches changes."""
    total = int(batch["mask"].sum())
    for name in ("moments", "masked_moments", "text_embeddings"):
        total += int(np.ascontiguousarray(batch[name].numpy()).view(np.uint64).sum(dtype=np.uint64))
    return total % (1 << 64)


def row_checksum(row: dict[str, np.ndarray]) -> int:
    """What one row adds to `checksum`."""
    total = int(np.unpackbits(row["mask"]).sum())
    for name in ("moments", "masked_moments", "text_embeddings"):
        total += int(row[name].reshape(-1).view(np.uint64).sum(dtype=np.uint64))
    return total


def collate(rows: list[dict[str, Any]]) -> Batch:
    """Rows to tensors, by torch's own collation: in a worker it stacks into shared memory, without a further copy."""
    from torch.utils.data import default_collate

    return unpack_mask(default_collate([{name: row[name] for name in SHAPES} for row in rows]))


def unpack_mask(batch: Batch) -> Batch:
    """Bits to numbers, in place."""
    import torch

    bits = np.unpackbits(batch["mask"].numpy(), axis=1).reshape(-1, 1, 64, 64)
    batch["mask"] = torch.from_numpy(bits.astype(np.float32))
    return batch


# ---------------------------------------------------------------------------------------------------------------- ours


def write_ours(folder: Path, num_rows: int) -> None:
    """A committed dataset: Parquet shards, constants, manifest."""
    from benchmarks.loader_ours import write

    write(folder, num_rows)


def read_ours(place: Place, batch_size: int, num_workers: int) -> Callable[[], Iterator[Batch]]:
    """Lacuna's own."""
    from benchmarks.loader_ours import read

    return read(place, batch_size, num_workers)


# ----------------------------------------------------------------------------------------------------------------- MDS


def write_mds(
    folder: Path, num_rows: int, first_row: int = 0, shard_bytes: int = SHARD_BYTES, hashes: tuple[str, ...] = ()
) -> None:
    """Columns as ndarrays of fixed dtype and shape: raw values, no header, no pickle."""
    from streaming import MDSWriter  # pyright: ignore[reportMissingImports]  # in the peers' environment

    columns = {name: f"ndarray:{dtype.name}:{','.join(map(str, shape))}" for name, (dtype, shape) in SHAPES.items()} | {
        "uid": "str"
    }
    with MDSWriter(out=str(folder), columns=columns, size_limit=shard_bytes, hashes=list(hashes)) as writer:
        for index in range(first_row, first_row + num_rows):
            writer.write({**make_row(index), "uid": f"{index:032x}"})


def read_mds(place: Place, batch_size: int, num_workers: int) -> Callable[[], Iterator[Batch]]:
    """`StreamingDataset` under its own `StreamingDataLoader`, shuffled globally (py1e, its default)."""
    from streaming import StreamingDataLoader, StreamingDataset  # pyright: ignore[reportMissingImports]  # as above

    dataset = StreamingDataset(
        local=str(place.folder), remote=place.remote, shuffle=True, batch_size=batch_size, num_canonical_nodes=1
    )
    loader = StreamingDataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        persistent_workers=num_workers > 0,
    )
    return lambda: iter(loader)


# ---------------------------------------------------------------------------------------------------------- webdataset


def write_webdataset(folder: Path, num_rows: int) -> None:
    """Tars with one member of raw bytes for each tensor: as little to decode as the format allows."""
    import webdataset  # pyright: ignore[reportMissingImports]  # in the peers' environment

    with webdataset.ShardWriter(f"{folder}/%05d.tar", maxcount=ROWS_PER_SHARD, verbose=0) as writer:
        for index in range(num_rows):
            members = {f"{name}.bin": value.tobytes() for name, value in make_row(index).items()}
            writer.write({"__key__": f"{index:032x}", **members})


def _from_members(sample: dict[str, Any]) -> dict[str, Any]:
    import torch

    return {
        name: torch.frombuffer(bytearray(sample[f"{name}.bin"]), dtype=getattr(torch, dtype.name)).reshape(shape)
        for name, (dtype, shape) in SHAPES.items()
    }


def read_webdataset(place: Place, batch_size: int, num_workers: int) -> Callable[[], Iterator[Batch]]:
    """`WebDataset` under `WebLoader`: shards shuffled, then samples within a buffer; it knows no other shuffle."""
    import webdataset  # pyright: ignore[reportMissingImports]  # as above

    urls = [str(place.folder / name) for name in place.files]
    if place.remote is not None:
        urls = [f"pipe:curl --silent --fail '{url}'" for url in presigned(place.remote, place.files)]
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False)
        .shuffle(SHUFFLE_BUFFER)
        .map(_from_members)
        .batched(batch_size, collation_fn=collate)
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=num_workers, persistent_workers=num_workers > 0)
    return lambda: iter(loader)


def presigned(remote: str, files: list[str]) -> list[str]:
    """Addresses that need no credentials."""
    import boto3  # pyright: ignore[reportMissingImports]  # in the peers' environment

    bucket, _, prefix = remote.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    return [
        client.generate_presigned_url("get_object", {"Bucket": bucket, "Key": f"{prefix}/{name}"}) for name in files
    ]


# ------------------------------------------------------------------------------------------------------------- litdata


def _litdata_row(index: int) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(value) for name, value in make_row(index).items()}


def write_litdata(folder: Path, num_rows: int) -> None:
    """Optimised chunks of torch tensors."""
    import litdata  # pyright: ignore[reportMissingImports]  # in the peers' environment

    with contextlib.redirect_stdout(None):
        litdata.optimize(
            fn=_litdata_row,
            inputs=list(range(num_rows)),
            output_dir=str(folder),
            chunk_bytes="64MB",
            num_workers=1,
            verbose=False,
        )


def read_litdata(place: Place, batch_size: int, num_workers: int) -> Callable[[], Iterator[Batch]]:
    """`StreamingDataset` under its own `StreamingDataLoader`: chunks shuffled, then samples within chunks."""
    import litdata  # pyright: ignore[reportMissingImports]  # as above

    options: dict[str, Any] = {}
    if place.remote is not None:
        from litdata.streaming import downloader  # pyright: ignore[reportMissingImports]  # as above

        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"  # it has no setting for servers without TLS
        options = {
            "storage_options": {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]},
            "cache_dir": str(place.folder),
        }
    dataset = litdata.StreamingDataset(place.remote or str(place.folder), shuffle=True, **options)
    loader = litdata.StreamingDataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        persistent_workers=num_workers > 0,
    )
    return lambda: iter(loader)


# ------------------------------------------------------------------------------------------------------------ datasets


_COLUMNS = {"moments": "moments", "masked_moments": "masked_moments_0", "text_embeddings": "text_embeddings"} | {
    "mask": "mask_0"
}


def _from_table(table: Any) -> Batch:
    import torch

    batch = {}
    for name, (dtype, shape) in SHAPES.items():
        values = table.column(_COLUMNS[name]).combine_chunks()
        raw = np.frombuffer(values.buffers()[1], np.uint8)[values.offset * WIDTHS[name] :][: len(values) * WIDTHS[name]]
        with warnings.catch_warnings(action="ignore"):  # the memory is Arrow's, and read-only
            batch[name] = torch.from_numpy(raw.view(dtype).reshape(-1, *shape))
    return unpack_mask(batch)


def _from_values(rows: list[dict[str, bytes]]) -> Batch:
    arrays = [
        {name: np.frombuffer(row[_COLUMNS[name]], dtype).reshape(shape) for name, (dtype, shape) in SHAPES.items()}
        for row in rows
    ]
    with warnings.catch_warnings(action="ignore"):
        return collate(arrays)


def _open_datasets(place: Place) -> Any:
    import datasets  # pyright: ignore[reportMissingImports]  # in the peers' environment

    datasets.disable_progress_bars()
    files = [str(place.folder / name) for name in place.files]
    cache = str(place.folder.parent / "hf-cache")
    return datasets.load_dataset(
        "parquet", data_files=files, split="train", columns=list(_COLUMNS.values()), cache_dir=cache
    )


def read_datasets(place: Place, batch_size: int, num_workers: int) -> Callable[[], Iterator[Batch]]:
    """HF `datasets` over our very Parquet files (from which it makes an Arrow cache), a whole batch at once as Arrow.

    The fastest way that we found: Arrow gathers the rows with one copy, and tensors are views of that.
    """
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler

    dataset = _open_datasets(place).with_format("arrow")
    loader = DataLoader(
        dataset,
        sampler=BatchSampler(RandomSampler(dataset), batch_size, drop_last=False),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_from_table,
        persistent_workers=num_workers > 0,
    )
    return lambda: iter(loader)


def read_datasets_rows(place: Place, batch_size: int, num_workers: int) -> Callable[[], Iterator[Batch]]:
    """The same as one would write it first: rows of bytes, collated."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        _open_datasets(place),
        batch_size=batch_size,
        shuffle=True,
        num_workers=num_workers,
        collate_fn=_from_values,
        persistent_workers=num_workers > 0,
    )
    return lambda: iter(loader)


# ------------------------------------------------------------------------------------------------------ all of them


@dataclass(frozen=True)
class Format:
    """How a format is written and read.

    Attributes:
        write: Into an empty folder, so many rows.
        read: Opens a dataset; what it returns gives one epoch of batches each time it is called.
        modules: What it imports, in this order; imports are not measured.
        packages: Whose versions to name.
        written_by: Which format's files these are.
    """

    write: Callable[[Path, int], None]
    read: Callable[[Place, int, int], Callable[[], Iterator[Batch]]]
    modules: tuple[str, ...]
    packages: tuple[str, ...]
    written_by: str


FORMATS = {
    "ours": Format(write_ours, read_ours, ("benchmarks.loader_ours",), ("torch", "pyarrow", "numpy"), "ours"),
    "mds": Format(write_mds, read_mds, ("streaming",), ("mosaicml-streaming", "torch"), "mds"),
    "webdataset": Format(
        write_webdataset, read_webdataset, ("torch.utils.data", "webdataset", "boto3"), ("webdataset",), "webdataset"
    ),
    "litdata": Format(write_litdata, read_litdata, ("litdata",), ("litdata",), "litdata"),
    "datasets": Format(write_ours, read_datasets, ("torch.utils.data", "datasets"), ("datasets",), "ours"),
    "datasets_rows": Format(write_ours, read_datasets_rows, ("torch.utils.data", "datasets"), ("datasets",), "ours"),
}
