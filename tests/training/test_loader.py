"""Batches ahead of need: the same ones for any number of threads, in memory that is used again, and errors in order."""

import hashlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from infra.errors import ContractError
from infra.storage import ObjectStore, open_store, sha256_of_file
from preprocessing.contracts.manifest import MANIFEST_NAME, DatasetFile, Manifest, ShardReport
from preprocessing.contracts.schemas import TENSOR_WRITER
from training.batch import Batch, Fields
from training.data import TrainingDataset, open_dataset

MakeDataset = Callable[..., str]

WORLD_SIZES = (1, 2, 4, 8)
NUM_WORKERS = (0, 1, 4)


@pytest.fixture
def dataset(store: ObjectStore, make_dataset: MakeDataset, tmp_path: Path) -> TrainingDataset:
    return open_dataset(store, make_dataset(store, (20, 17, 30)), tmp_path / "cache")


def _global_order(dataset: TrainingDataset, steps: range, batch_size: int, world_size: int, workers: int) -> list[str]:
    ranks: list[Iterator[Batch]] = []
    loaders = [
        dataset.batches(
            seed=3,
            global_batch_size=batch_size,
            start_step=steps.start,
            num_steps=len(steps),
            rank=rank,
            world_size=world_size,
            num_workers=workers,
        )
        for rank in range(world_size)
    ]
    try:
        ranks = [iter(loader) for loader in loaders]
        return [uid for _ in steps for rank in ranks for uid in next(rank).uids]
    finally:
        for loader in loaders:
            loader.close()


def test_order_is_the_same_for_any_number_of_processes_and_threads(dataset: TrainingDataset):
    alone = _global_order(dataset, range(20), 8, 1, 0)
    for world_size in WORLD_SIZES:
        for workers in NUM_WORKERS:
            for step in (0, 7, 13):
                assert _global_order(dataset, range(step, 20), 8, world_size, workers) == alone[step * 8 :]


@pytest.mark.parametrize("workers", NUM_WORKERS)
def test_a_batch_stays_as_it_is_until_the_next_but_one(dataset: TrainingDataset, workers: int):
    with dataset.batches(seed=3, global_batch_size=8, num_steps=30, num_workers=workers) as batches:
        last: Batch | None = None
        addresses = set()
        step = -1
        for step, batch in enumerate(batches):
            for number, held in ((step - 1, last), (step, batch)):
                if held is not None:
                    expected = dataset.batch_at(number, seed=3, global_batch_size=8)
                    assert held.uids == expected.uids
                    for name in ("moments", "masked_moments", "mask", "text_embeddings"):
                        assert torch.equal(getattr(held, name), getattr(expected, name))
            last = batch
            assert batch.moments is not None
            addresses.add(batch.moments.data_ptr())
        assert step == 29
        assert len(addresses) <= 2 * workers + 2  # exactly the ring: memory does not grow with steps


def test_threads_end_with_the_loader(dataset: TrainingDataset):
    before = threading.active_count()
    num_threads = torch.get_num_threads()
    batches = dataset.batches(seed=3, global_batch_size=8, num_workers=3)
    next(batches)
    assert torch.get_num_threads() == num_threads
    batches.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize("workers", NUM_WORKERS)
def test_an_error_comes_where_its_batch_would_and_again(
    store: ObjectStore, make_dataset: MakeDataset, tmp_path: Path, workers: int
):
    prefix = make_dataset(store, (64, 64), seed=4)
    with open_dataset(store, prefix, tmp_path).batches(seed=0, global_batch_size=1, num_workers=0) as batches:
        uids = [next(batches).uids[0] for _ in range(40)]
    path = store.local_path(f"{prefix}/train-00001.parquet")
    assert path is not None
    bad = set(pq.read_table(path, columns=["uid"]).column("uid").to_pylist())
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])
    first_bad = next(i for i, uid in enumerate(uids) if uid in bad)
    with open_dataset(store, prefix, tmp_path).batches(seed=0, global_batch_size=1, num_workers=workers) as batches:
        assert [next(batches).uids[0] for _ in range(first_bad)] == uids[:first_bad]
        for _ in range(3):
            with pytest.raises(ContractError, match=r"train-00001.parquet: \d+ bytes, the manifest says"):
                next(batches)


@pytest.mark.parametrize(
    ("rank", "world_size", "message"), [(0, 3, "not a multiple of world_size 3"), (2, 2, "rank: 2 is not one of")]
)
def test_shares_that_do_not_fit(dataset: TrainingDataset, rank: int, world_size: int, message: str):
    with pytest.raises(ValueError, match=message):
        dataset.batches(seed=0, global_batch_size=8, rank=rank, world_size=world_size)


def write_rows(folder: Path, make_dataset: MakeDataset, num_rows: int, rows_per_shard: int, side_px: int = 0) -> str:
    """A dataset of uids, token ids and, with a side, crops, in the fixture's specs; token 0 of row i is i.

    Returns:
        Key of its folder in the store at `folder`.
    """
    store = open_store(str(folder))
    prefix = make_dataset(store, (4,))
    manifest = Manifest.model_validate_json(store.read(f"{prefix}/{MANIFEST_NAME}"))
    rng = np.random.default_rng(0)
    shards = []
    for index, start in enumerate(range(0, num_rows, rows_per_shard)):
        numbers = range(start, min(start + rows_per_shard, num_rows))
        raw = rng.integers(0, 49408, size=(len(numbers), 77), dtype=np.uint16)
        raw[:, 0] = np.array(numbers) % 49408
        columns: dict[str, pa.Array] = {
            "uid": pa.array([hashlib.blake2b(b"%d" % i, digest_size=16).hexdigest() for i in numbers]),
            "token_ids": pa.Array.from_buffers(pa.binary(154), len(numbers), [None, pa.py_buffer(raw)]),
        }
        if side_px:
            columns["image"] = pa.array([crop_of(i, side_px) for i in numbers], pa.binary())
        schema = pa.schema([pa.field(name, column.type, nullable=False) for name, column in columns.items()])
        path = folder / prefix / f"train-{index:05d}.parquet"
        path.unlink(missing_ok=True)
        pq.write_table(pa.table(list(columns.values()), schema=schema), path, **TENSOR_WRITER)
        entry = DatasetFile(
            name=path.name,
            num_bytes=path.stat().st_size,
            sha256=sha256_of_file(path),
            num_rows=len(numbers),
            split="train",
        )
        shards.append(ShardReport(index=index, num_in=len(numbers), num_out=len(numbers), dropped={}, files=(entry,)))
    constants = folder / prefix / "constants.safetensors"
    save_file(load_file(constants) | {"null_token_ids": torch.zeros(77, dtype=torch.int64)}, constants)
    entry = manifest.extra_files[0].model_copy(
        update={"sha256": sha256_of_file(constants), "num_bytes": constants.stat().st_size}
    )
    made = manifest.model_copy(update={"shards": tuple(shards), "config": {"text": "both"}, "extra_files": (entry,)})
    store.put(f"{prefix}/{MANIFEST_NAME}", made.model_dump_json().encode())
    return prefix


def crop_of(number: int, side_px: int) -> bytes:
    """A picture of one colour; every third a JPEG, which keeps that of grey."""
    buffer = io.BytesIO()
    Image.new("RGB", (side_px, side_px), (number % 256,) * 3).save(buffer, "PNG" if number % 3 else "JPEG", quality=95)
    return buffer.getvalue()


@pytest.mark.parametrize("workers", [0, 2])
def test_token_ids_and_crops(make_dataset: MakeDataset, tmp_path: Path, workers: int):
    prefix = write_rows(tmp_path / "store", make_dataset, 50, 20, side_px=32)
    fields = Fields(text="token_ids", mask="none", moments=False, images=True)
    dataset = open_dataset(open_store(str(tmp_path / "store")), prefix, tmp_path / "cache", fields=fields)
    number_of = {hashlib.blake2b(b"%d" % i, digest_size=16).hexdigest(): i for i in range(50)}
    assert dataset.constants.null_token_ids is not None
    seen = []
    with dataset.batches(seed=0, global_batch_size=5, num_steps=10, num_workers=workers) as batches:
        for batch in batches:
            assert batch.token_ids is not None
            assert batch.images is not None
            assert batch.token_ids.dtype == torch.int64
            numbers = [number_of[uid] for uid in batch.uids]
            assert batch.token_ids[:, 0].tolist() == numbers
            assert batch.images[:, 0, 0, 0].tolist() == numbers
            assert batch.images.shape == (5, 32, 32, 3)
            seen += numbers
    assert sorted(seen) == list(range(50))


def test_a_crop_of_another_size_is_refused(make_dataset: MakeDataset, tmp_path: Path):
    prefix = write_rows(tmp_path / "store", make_dataset, 5, 5, side_px=16)
    fields = Fields(text="token_ids", mask="none", moments=False, images=True)
    dataset = open_dataset(open_store(str(tmp_path / "store")), prefix, tmp_path / "cache", fields=fields)
    with pytest.raises(ContractError, match=r"keeps a crop of \(16, 16, 3\), the dataset's specs say \(32, 32, 3\)"):
        dataset.batch_at(0, seed=0, global_batch_size=5)


# ---------------------------------------------------------------------------------------------------------------- soak


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_one_order_over_a_million_rows_and_a_quick_resume(make_dataset: MakeDataset, tmp_path: Path):
    """Every run is read from a resume point to the end of the epoch, by every number of processes and threads."""
    num_rows, batch_size, fields = 1_000_000, 8000, Fields(text="token_ids", mask="none", moments=False)
    root = str(tmp_path / "store")
    prefix = write_rows(tmp_path / "store", make_dataset, num_rows, 1000)
    num_steps = num_rows // batch_size
    points = [0, *np.random.default_rng(1).integers(1, num_steps - 1, size=49).tolist()]
    seconds = []
    for step in (0, num_steps // 2, num_steps - 2, 1000 * num_steps):
        began = time.perf_counter()
        fresh = open_dataset(open_store(root), prefix, tmp_path / "cache", fields=fields)
        fresh.batch_at(step * batch_size // 64, seed=3, global_batch_size=64)
        seconds.append(round(time.perf_counter() - began, 3))
    print(json.dumps({"first batch after a start, s": seconds}))  # noqa: T201 - what `make soak` shows
    assert max(seconds) <= 1.0
    dataset = open_dataset(open_store(root), prefix, tmp_path / "cache", fields=fields)
    alone = _global_order(dataset, range(num_steps), batch_size, 1, 0)
    assert len(set(alone)) == num_rows
    hashes = set()
    num_runs = 0
    for world_size in WORLD_SIZES:
        for workers in NUM_WORKERS:
            for step in points:
                resumed = _global_order(dataset, range(step, num_steps), batch_size, world_size, workers)
                whole = alone[: step * batch_size] + resumed
                hashes.add(hashlib.sha256("".join(whole).encode()).hexdigest())
                num_runs += 1
    print(json.dumps({"runs": num_runs, "hashes": sorted(hashes)}))  # noqa: T201
    assert len(hashes) == 1
