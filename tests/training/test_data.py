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

from infra.errors import ContractError
from infra.storage import ObjectStore
from preprocessing.contracts.config import ModelConfig
from preprocessing.contracts.manifest import MANIFEST_NAME
from training import data
from training.batch import Fields
from training.compatibility import check_specs
from training.data import mask_variants, open_dataset
from training.rows import Shard, decode_column
from training.shard_files import OpenFile, identity_of

MakeDataset = Callable[..., str]


def _shard_paths(store: ObjectStore, prefix: str) -> list[Path]:
    paths = [store.local_path(info.key) for info in store.list(f"{prefix}/train-")]
    return [path for path in paths if path is not None]


def _shard(path: Path) -> Shard:
    file = path.open("rb")
    return Shard(OpenFile(path, file, identity_of(file)))


def mask_variant(uid: str, epoch: int, num_variants: int) -> int:
    """As the loader does it for many at once: the lower half of the uid is the start."""
    return (epoch + int(uid[16:], 16) % num_variants) % num_variants


def _tensor_columns(path: Path) -> dict[str, int]:
    schema = pq.read_schema(path)
    return {field.name: field.type.byte_width for field in schema if pa.types.is_fixed_size_binary(field.type)}


def test_every_mapped_value_is_pyarrows(store: ObjectStore, make_dataset: MakeDataset):
    num_compared = 0
    for path in _shard_paths(store, make_dataset(store)):
        shard = _shard(path)
        table = pq.read_table(path)
        for name, width in _tensor_columns(path).items():
            column = shard.column(name, width)
            assert shard.is_mapped(column), "not mapped but copied"
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
    column = _shard(path).column("moments", _tensor_columns(path)["moments"])
    assert [row.tobytes() for row in column] == table.column("moments").to_pylist()


def test_decode_column_of_a_slice(store: ObjectStore, make_dataset: MakeDataset):
    path = _shard_paths(store, make_dataset(store))[0]
    width = _tensor_columns(path)["mask_0"]
    assert decode_column(pq.ParquetFile(path), "mask_0", width).shape == (20, width)


def test_a_column_of_another_width_is_refused(store: ObjectStore, make_dataset: MakeDataset):
    shard = _shard(_shard_paths(store, make_dataset(store))[0])
    with pytest.raises(ContractError, match=r"'moments' holds 256 bytes a row, the dataset's specs say 512"):
        shard.column("moments", 512)
    with pytest.raises(ContractError, match="no column 'mask_7'"):
        shard.column("mask_7", 2)


# --------------------------------------------------------------------------------------------------------------- order


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
        assert batch.moments is not None
        assert batch.masked_moments is not None
        assert batch.mask is not None
        assert batch.text_embeddings is not None
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


def test_a_dataset_that_is_not_complete_is_refused(store: ObjectStore, make_dataset: MakeDataset, tmp_path: Path):
    prefix = make_dataset(store)
    store.delete(f"{prefix}/{MANIFEST_NAME}")
    with pytest.raises(ContractError, match="not complete"):
        open_dataset(store, prefix, tmp_path)


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


def test_mask_variants_of_many():
    uids = [f"{value:032x}" for value in (0, 5, 2**64 + 7, 2**128 - 1)]
    bits = np.frombuffer(bytes.fromhex("".join(uids)), np.uint8).reshape(-1, 16)
    for epoch in (0, 1, 10):
        epochs = np.full(len(uids), epoch)
        assert mask_variants(bits, epochs, 3).tolist() == [mask_variant(uid, epoch, 3) for uid in uids]


# -------------------------------------------------------------------------------------------------------------- fields


def test_only_what_is_asked_for_is_read(store: ObjectStore, make_dataset: MakeDataset, tmp_path: Path):
    fields = Fields(mask="none", moments=False)
    dataset = open_dataset(store, make_dataset(store), tmp_path, fields=fields)
    batch = dataset.batch_at(0, seed=0, global_batch_size=4)
    assert batch.text_embeddings is not None
    assert batch.moments is batch.masked_moments is batch.mask is batch.images is batch.token_ids is None
    assert batch.epochs == (0,) * 4
    assert batch.part(1, 3).uids == batch.uids[1:3]


def test_columns_that_are_not_there_are_refused(store: ObjectStore, make_dataset: MakeDataset, tmp_path: Path):
    prefix = make_dataset(store)
    with pytest.raises(ContractError, match=r"training asks for token_ids, and .* stores image, mask_0, .*encode.text"):
        open_dataset(store, prefix, tmp_path, fields=Fields(text="token_ids"))


# ------------------------------------------------------------------------------------------------------------- mixture


def test_datasets_are_mixed_by_weight(store: ObjectStore, make_dataset: MakeDataset, tmp_path: Path):
    large, small = make_dataset(store, (40, 20), seed=1), make_dataset(store, (8,), seed=2)
    uids = {
        prefix: {uid for path in _shard_paths(store, prefix) for uid in _uids_in(path)} for prefix in (large, small)
    }
    specs = json.loads(store.read(f"{small}/{MANIFEST_NAME}"))
    specs["specs"]["masks"]["seed"] = 1  # the fixture gives each seed masks of its own
    store.put(f"{small}/{MANIFEST_NAME}", json.dumps(specs).encode())
    dataset = open_dataset(store, {large: 3, small: 1}, tmp_path)
    assert len(dataset) == 68
    seen = _uids(dataset, 10_000 // 8, 1)
    assert _uids(dataset, 40, 4) == seen[:320]
    of_small = [uid for uid in seen if uid in uids[small]]
    assert len(of_small) == 2500
    for start in range(0, 2496, 8):  # each dataset has epochs of its own
        assert set(of_small[start : start + 8]) == uids[small]
    batch = dataset.batch_at(100, seed=5, global_batch_size=8)
    before = Counter(seen[:800])
    assert batch.epochs == tuple(before[uid] for uid in batch.uids)  # no uid stands twice in this batch


def test_datasets_that_do_not_agree_are_refused(store: ObjectStore, make_dataset: MakeDataset, tmp_path: Path):
    one, two = make_dataset(store, (4,)), make_dataset(store, (4,), latents={"scaling_factor": 0.5})
    with pytest.raises(ContractError, match=r"latents.scaling_factor is 0.18215 in .*, and 0.5 in "):
        open_dataset(store, {one: 1, two: 1}, tmp_path)


def _uids_in(path: Path) -> list[str]:
    return pq.read_table(path, columns=["uid"]).column("uid").to_pylist()


def test_the_flows_find_a_mixture(store: ObjectStore, make_dataset: MakeDataset, tmp_path: Path):
    """What the flow tells the trainers is what these open; its digest does not depend on how weights are written."""
    from types import SimpleNamespace
    from typing import cast

    from flows.config import PipelineConfig
    from flows.plan import _mixture_of
    from training.config import TrainConfig

    one, two = make_dataset(store, (9,)), make_dataset(store, (7,))
    train = {"prediction_type": "epsilon", "mask_source": "cached", "seed": 0, "num_steps": 1}

    def mixture_of(weights: dict[str, float]) -> tuple[dict[str, float], str]:
        config = SimpleNamespace(train=TrainConfig(**train, micro_batch_size=1, datasets=weights))
        return _mixture_of(cast(PipelineConfig, config), store)

    weights, digest = mixture_of({store.uri_of(one): 1, store.uri_of(two): 2})
    assert weights == {one: 1, two: 2}
    assert open_dataset(store, weights, tmp_path).digest == digest
    assert mixture_of({two: 4, one: 2})[1] == digest
    with pytest.raises(ValueError, match="is named twice"):
        mixture_of({store.uri_of(one): 1, one: 2})
    with pytest.raises(ValueError, match=r"train.datasets: a beside train.dataset b; leave one of the two out"):
        TrainConfig(**train, micro_batch_size=1, datasets={"a": 1}, dataset="b")
