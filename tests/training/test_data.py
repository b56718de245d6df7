"""The rows are read as pyarrow reads them, in an order that is a pure function; and damage is refused."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import ContractError
from infra.storage import ObjectStore
from preprocessing.contracts.config import ModelConfig
from preprocessing.contracts.manifest import MANIFEST_NAME
from training import data
from training.compatibility import check_specs
from training.data import Shard, decode_column, mask_variant, open_dataset, sample_order

MakeDataset = Callable[..., str]


def _shard_paths(store: ObjectStore, prefix: str) -> list[Path]:
    paths = [store.local_path(info.key) for info in store.list(f"{prefix}/train-")]
    return [path for path in paths if path is not None]


def _tensor_columns(path: Path) -> dict[str, int]:
    schema = pq.read_schema(path)
    return {field.name: field.type.byte_width for field in schema if pa.types.is_fixed_size_binary(field.type)}


def test_every_mapped_value_is_pyarrows(store: ObjectStore, make_dataset: MakeDataset):
    num_compared = 0
    for path in _shard_paths(store, make_dataset(store)):
        shard = Shard(path)
        table = pq.read_table(path)
        for name, width in _tensor_columns(path).items():
            column = shard.column(name, width)
            assert isinstance(column.base, np.memmap) or isinstance(column, np.memmap), "not mapped but copied"
            assert [row.tobytes() for row in column] == table.column(name).to_pylist()
            num_compared += len(column)
    assert num_compared == 37 * 8


@pytest.mark.parametrize(
    "writer",
    [
        {"compression": "zstd"},
        {"compression": "NONE", "row_group_size": 5},
        {"compression": "NONE", "use_dictionary": True},
        {"compression": "NONE", "use_dictionary": False, "data_page_size": 64, "write_batch_size": 1},
    ],
)
def test_a_file_of_another_layout_is_decoded(
    store: ObjectStore, make_dataset: MakeDataset, tmp_path: Path, writer: dict[str, Any]
):
    table = pq.read_table(_shard_paths(store, make_dataset(store))[0])
    path = tmp_path / "other.parquet"
    pq.write_table(table, path, **writer)
    column = Shard(path).column("moments", _tensor_columns(path)["moments"])
    assert [row.tobytes() for row in column] == table.column("moments").to_pylist()


def test_decode_column_of_a_slice(store: ObjectStore, make_dataset: MakeDataset):
    path = _shard_paths(store, make_dataset(store))[0]
    width = _tensor_columns(path)["mask_0"]
    assert decode_column(pq.ParquetFile(path), "mask_0", width).shape == (20, width)


def test_a_column_of_another_width_is_refused(store: ObjectStore, make_dataset: MakeDataset):
    shard = Shard(_shard_paths(store, make_dataset(store))[0])
    with pytest.raises(ContractError, match=r"'moments' holds 256 bytes a row, the dataset's specs say 512"):
        shard.column("moments", 512)
    with pytest.raises(ContractError, match="no column 'mask_7'"):
        shard.column("mask_7", 2)


# --------------------------------------------------------------------------------------------------------------- order


@given(
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 1000),
    num_rows=st.lists(st.integers(1, 40), min_size=1, max_size=12).map(tuple),
    window=st.integers(1, 200),
)
def test_order_is_a_permutation_and_pure(seed: int, epoch: int, num_rows: tuple[int, ...], window: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "ROWS_PER_WINDOW", window)
        order = sample_order.__wrapped__(seed, epoch, "digest", num_rows)
        again = sample_order.__wrapped__(seed, epoch, "digest", num_rows)
    assert sorted(order) == list(range(sum(num_rows)))
    assert (order == again).all()


def test_order_depends_on_all_that_it_should():
    rows = (50, 50)
    orders = [
        sample_order(0, 0, "a", rows),
        sample_order(1, 0, "a", rows),
        sample_order(0, 1, "a", rows),
        sample_order(0, 0, "b", rows),
    ]
    assert len({order.tobytes() for order in orders}) == 4


def test_a_window_touches_few_shards(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data, "ROWS_PER_WINDOW", 20)
    order = sample_order.__wrapped__(0, 0, "a", (10,) * 50)
    for start in range(0, 500, 20):
        assert len(set(order[start : start + 20] // 10)) == 2


def _uids(dataset: data.TrainingDataset, num_steps: int, world_size: int) -> list[str]:
    return [
        uid
        for step in range(num_steps)
        for rank in range(world_size)
        for uid in dataset.batch_at(step, seed=5, global_batch_size=8, rank=rank, world_size=world_size).uids
    ]


def test_order_is_the_same_for_any_number_of_processes(store: ObjectStore, make_dataset: MakeDataset, tmp_path: Path):
    dataset = open_dataset(store, make_dataset(store), tmp_path)
    alone = _uids(dataset, 12, 1)
    assert _uids(dataset, 12, 2) == alone
    assert _uids(dataset, 12, 4) == alone


def test_each_epoch_has_each_sample_once_and_a_new_mask(store: ObjectStore, make_dataset: MakeDataset, tmp_path: Path):
    dataset = open_dataset(store, make_dataset(store), tmp_path)
    uids = _uids(dataset, 37 * 3 // 8 + 1, 1)
    for epoch in range(3):
        assert set(Counter(uids[37 * epoch : 37 * (epoch + 1)]).values()) == {1}
    for uid in set(uids):
        assert sorted(mask_variant(uid, epoch, 3) for epoch in range(3)) == [0, 1, 2]


def test_batch_holds_the_rows_that_it_names(store: ObjectStore, make_dataset: MakeDataset, tmp_path: Path):
    prefix = make_dataset(store)
    rows = {row["uid"]: row for path in _shard_paths(store, prefix) for row in pq.read_table(path).to_pylist()}
    dataset = open_dataset(store, prefix, tmp_path)
    for step in (0, 6):  # the second reaches into epoch 1
        batch = dataset.batch_at(step, seed=5, global_batch_size=8)
        for i, uid in enumerate(batch.uids):
            k = mask_variant(uid, (step * 8 + i) // 37, 3)
            row = rows[uid]
            assert batch.moments[i].numpy().tobytes() == row["moments"]
            assert batch.masked_moments[i].numpy().tobytes() == row[f"masked_moments_{k}"]
            assert batch.text_embeddings[i].numpy().tobytes() == row["text_embeddings"]
            bits = np.unpackbits(np.frombuffer(row[f"mask_{k}"], np.uint8))[:16]
            assert batch.mask[i].flatten().tolist() == bits.tolist()
    assert batch.moments.dtype == torch.float16
    assert batch.mask.shape == (8, 1, 4, 4)


# -------------------------------------------------------------------------------------------------------------- damage


def test_a_flipped_bit_is_refused(store: ObjectStore, make_dataset: MakeDataset, tmp_path: Path):
    prefix = make_dataset(store)
    path = _shard_paths(store, prefix)[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    with pytest.raises(ContractError, match=r"train-00001.parquet: sha256 \w+, the manifest says \w+"):
        open_dataset(store, prefix, tmp_path)


def test_a_truncated_file_is_refused_without_reading_it(store: ObjectStore, make_dataset: MakeDataset, tmp_path: Path):
    prefix = make_dataset(store)
    path = _shard_paths(store, prefix)[0]
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content[:-1])
    with pytest.raises(ContractError, match=f"{len(content) - 1} bytes, the manifest says {len(content)}"):
        open_dataset(store, prefix, tmp_path, verify_hashes=False)


def test_a_dataset_that_is_not_complete_is_refused(store: ObjectStore, make_dataset: MakeDataset, tmp_path: Path):
    prefix = make_dataset(store)
    store.delete(f"{prefix}/{MANIFEST_NAME}")
    with pytest.raises(ContractError, match="not complete"):
        open_dataset(store, prefix, tmp_path)


def test_from_s3_through_a_cache_that_heals(s3_root: str, make_dataset: MakeDataset, tmp_path: Path):
    from infra.storage import open_store

    store = open_store(s3_root)
    prefix = make_dataset(store)
    cache = tmp_path / "cache"
    first = open_dataset(store, prefix, cache).batch_at(0, seed=0, global_batch_size=4)
    file = next(cache.rglob("*.parquet"))
    file.write_bytes(b"\0" * file.stat().st_size)
    again = open_dataset(store, prefix, cache).batch_at(0, seed=0, global_batch_size=4)
    assert first.uids == again.uids
    assert torch.equal(first.moments, again.moments)


# --------------------------------------------------------------------------------------------------------------- specs


def test_specs_that_fit(store: ObjectStore, make_dataset: MakeDataset, tiny_model: ModelConfig, tmp_path: Path):
    check_specs(open_dataset(store, make_dataset(store), tmp_path).specs, tiny_model)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (
            {"latents": {"weights_sha256": "f" * 64}},
            r"VAE weights sha256: the dataset was encoded with f{64}, model.base",
        ),
        ({"latents": {"scaling_factor": 0.13025}}, r"scaling_factor: .* 0.13025, .* has 0.18215 in vae/config.json"),
        ({"text": {"weights_sha256": "e" * 64}}, r"text encoder weights sha256: .* e{64}"),
        ({"text": {"width": 8}}, r"text width: .* 8, .* has 16 in unet/config.json"),
    ],
)
def test_specs_that_do_not_fit(
    store: ObjectStore,
    make_dataset: MakeDataset,
    tiny_model: ModelConfig,
    tmp_path: Path,
    specs: dict[str, Any],
    message: str,
):
    dataset = open_dataset(store, make_dataset(store, (3,), **specs), tmp_path)
    with pytest.raises(ContractError, match=message):
        check_specs(dataset.specs, tiny_model)


def test_a_manifest_without_specs_is_refused(store: ObjectStore, make_dataset: MakeDataset, tmp_path: Path):
    prefix = make_dataset(store, (3,))
    manifest = json.loads(store.read(f"{prefix}/{MANIFEST_NAME}"))
    manifest["specs"] = {}
    store.put(f"{prefix}/{MANIFEST_NAME}", json.dumps(manifest).encode())
    with pytest.raises(ContractError, match="no spec 'latents'"):
        open_dataset(store, prefix, tmp_path)
