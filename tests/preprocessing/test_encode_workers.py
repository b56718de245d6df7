"""Several encoders on one dataset: who makes what, what they tell each other, and that nothing of it can be seen."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typing_extensions import override

from infra.errors import ContractError
from infra.storage import ObjectInfo, ObjectStore, open_store
from infra.storage_folder import FolderStore
from preprocessing.contracts.config import EncodeConfig, ModelConfig
from preprocessing.contracts.manifest import DatasetFile, Manifest, dataset_prefix, load_manifest
from preprocessing.contracts.schemas import TENSOR_WRITER
from preprocessing.encode import duplicates
from preprocessing.encode.job import EncodeJob, run_workers
from preprocessing.encode.stage import EncodeStage
from preprocessing.encode.worker import _slurm, shares
from preprocessing.stage import run_shards, run_stage
from preprocessing.verify_rows import check_rows
from tests.preprocessing.pictures import Downloaded, picture_row, picture_table

MODEL = ModelConfig(base="tiny", base_prediction_type="v_prediction")
CONFIG = EncodeConfig(resolution_px=64, mask_family="lama_train_256", num_mask_variants=1, batch_size=8, text="both")


def _downloaded(root: str, num_shards: int = 3) -> tuple[ObjectStore, Manifest]:
    store = open_store(root)
    tables = [picture_table([picture_row(index) for index in range(7 * i, 7 * i + 7)]) for i in range(num_shards)]
    return store, run_stage(store, Downloaded(tables))


def _hashes(manifest: Manifest) -> list[tuple[str, str]]:
    files = [*(file for shard in manifest.shards for file in shard.files), *manifest.extra_files]
    return [(file.name, file.sha256) for file in files]


@pytest.fixture(scope="module")
def store_and_manifest(tmp_path_factory: pytest.TempPathFactory) -> tuple[ObjectStore, Manifest]:
    store, downloaded = _downloaded(str(tmp_path_factory.mktemp("store")))
    return store, run_stage(store, EncodeStage(store, downloaded, CONFIG, MODEL, "cpu"))


def test_two_workers_make_the_bytes_of_one(tmp_path: Path, store_and_manifest: tuple[ObjectStore, Manifest]):
    root = str(tmp_path / "store")
    store, downloaded = _downloaded(root)
    prefix = dataset_prefix("download", downloaded.digest)
    job = EncodeJob(store_uri=root, downloaded_prefix=prefix, encode=CONFIG, model=MODEL, cpu=True)
    told: list[int] = []
    made = run_workers(job, 2, workdir=tmp_path / "work", on_shard=lambda report: told.append(report.index))
    assert _hashes(load_manifest(store, made)) == _hashes(store_and_manifest[1])
    assert set(told) == {0, 1, 2}
    assert not store.exists(f"{made}/{duplicates.DUPLICATES_NAME}"), "it is for the workers only"


class _Sleeper(FolderStore):
    """Just before it writes the copies, or just before it looks for them first, another worker does everything."""

    def __init__(self, root: Path, method: str, meanwhile: Callable[[], object]) -> None:
        super().__init__(root)
        self._method, self._meanwhile = method, meanwhile

    def _sleep(self, method: str, key: str) -> None:
        if method == self._method and key.endswith(duplicates.DUPLICATES_NAME):
            self._method = ""
            self._meanwhile()

    @override
    def read_with_etag(self, key: str) -> tuple[bytes, str]:
        self._sleep("read", key)
        return super().read_with_etag(key)

    @override
    def put_if_absent(self, key: str, data: bytes) -> ObjectInfo:
        self._sleep("put", key)
        return super().put_if_absent(key, data)


@pytest.mark.parametrize("sleeps_before", ["read", "put"])
def test_who_wakes_after_the_sweep_leaves_nothing_behind(tmp_path: Path, sleeps_before: str):
    root = tmp_path / "store"
    store, downloaded = _downloaded(str(root), num_shards=1)
    done: list[Manifest] = []
    sleeper = _Sleeper(
        root, sleeps_before, lambda: done.append(run_stage(store, EncodeStage(store, downloaded, CONFIG, MODEL, "cpu")))
    )
    stage = EncodeStage(sleeper, downloaded, CONFIG, MODEL, "cpu")
    run_shards(sleeper, stage, [0])  # as a worker that is not the one to write the manifest
    named = {f"{stage.prefix}/{name}" for name, _ in _hashes(done[0])}
    found = {info.key for info in store.list(f"{stage.prefix}/")}
    assert found - named == {f"{stage.prefix}/MANIFEST.json", f"{stage.prefix}/reports/shard-00000.json"}


@pytest.mark.parametrize("num_workers", [1, 2, 3, 7])
def test_shares_are_all_shards_and_each_is_somebody_s_own_once(num_workers: int):
    own = []
    for rank in range(num_workers):
        mine, others = shares(20, rank, num_workers, seed=rank)
        assert sorted(mine + others) == list(range(20))
        own += mine
    assert sorted(own) == list(range(20))
    assert shares(20, 0, num_workers, seed=1) != shares(20, 0, num_workers, seed=2), "thieves walk differently"


def test_slurm_s_place_is_ours():
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "MASTER_ADDR": "node0"}
    assert _slurm(slurm) == {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_PORT": "29500"}
    assert _slurm(slurm | {"RANK": "0"}) == {}
    assert _slurm({}) == {}


@pytest.mark.parametrize("rows_per_part", [1 << 22, 50])
def test_copies_are_found_over_shards_in_any_number_of_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_part: int
):
    monkeypatch.setattr(duplicates, "ROWS_PER_PART", rows_per_part)
    rng = np.random.default_rng(0)
    shards = [[hashlib.sha256(value).hexdigest() for value in rng.integers(0, 300, n)] for n in (100, 0, 170, 1, 60)]
    seen: set[str] = set()
    expected: dict[int, list[int]] = {}
    for index, hashes in enumerate(shards):
        for row, value in enumerate(hashes):
            if value in seen:
                expected.setdefault(index, []).append(row)
            seen.add(value)
    columns = ((i, pa.chunked_array([hashes[:7], hashes[7:]], pa.string())) for i, hashes in enumerate(shards))
    found = duplicates.find_copies(columns, 331, tmp_path)
    assert {index: rows.tolist() for index, rows in found.items()} == expected
    assert not list(tmp_path.iterdir())
    store = open_store(str(tmp_path / "store"))
    duplicates.write_copies(store, "p", "d" * 64, found)
    again = duplicates.read_copies(store, "p", "d" * 64)
    assert again is not None
    assert {index: rows.tolist() for index, rows in again.items()} == expected
    assert duplicates.read_copies(store, "p", "e" * 64) is None, "of another dataset"
    data = bytearray(store.read(f"p/{duplicates.DUPLICATES_NAME}"))
    data[len(data) // 3] ^= 1
    store.put(f"p/{duplicates.DUPLICATES_NAME}", bytes(data))
    damaged = duplicates.read_copies(store, "p", "d" * 64)
    assert damaged is None or {index: rows.tolist() for index, rows in damaged.items()} == expected


def test_scratch_holds_one_shard_of_the_parent_s_at_most(s3_root: str, tmp_path: Path):
    store, downloaded = _downloaded(s3_root)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for _ in EncodeStage(store, downloaded, CONFIG, MODEL, "cpu").outputs([0, 1, 2], scratch):
        assert len(list(scratch.iterdir())) <= 1
    assert not list(scratch.iterdir())


def test_rows_that_stand_are_what_the_models_give(store_and_manifest: tuple[ObjectStore, Manifest]):
    store, manifest = store_and_manifest
    check = check_rows(store, manifest, MODEL, num_rows=9, seed=1)
    assert (check.num_rows, check.is_exact, check.not_compared) == (9, True, {})
    assert check.columns == ("moments", "text_embeddings", "token_ids", "mask_0", "masked_moments_0")


def test_a_swapped_value_is_named(tmp_path: Path, store_and_manifest: tuple[ObjectStore, Manifest]):
    """Two rows exchange their text: each value is a good one, each hash is made anew, and still it is found."""
    store, manifest = store_and_manifest
    file = manifest.files("rows", "train")[0]
    prefix = dataset_prefix("encode", manifest.digest)
    table = pq.read_table(store.local_path(f"{prefix}/{file.name}"))
    values = table.column("text_embeddings").to_pylist()
    field = table.schema.field("text_embeddings")
    values[0], values[1] = values[1], values[0]
    table = table.set_column(table.schema.get_field_index(field.name), field, pa.array(values, field.type))
    other = open_store(str(tmp_path / "other"))
    pq.write_table(table, tmp_path / file.name, **TENSOR_WRITER)
    entry = other.upload(f"{prefix}/{file.name}", tmp_path / file.name)
    shard = manifest.shards[0].model_copy(
        update={
            "files": (DatasetFile(name=file.name, num_bytes=entry.num_bytes, sha256="", num_rows=file.num_rows),),
        }
    )
    check = check_rows(other, manifest.model_copy(update={"shards": (shard,)}), MODEL, num_rows=100)
    assert {item.uid for item in check.differences} == set(table.column("uid").to_pylist()[:2])
    assert {(item.column, item.is_within_tolerance) for item in check.differences} == {("text_embeddings", False)}
    assert not check.is_good


def test_other_weights_are_no_measure(store_and_manifest: tuple[ObjectStore, Manifest]):
    store, manifest = store_and_manifest
    specs = {**manifest.specs, "latents": {**manifest.specs["latents"], "weights_sha256": "0" * 64}}
    with pytest.raises(ContractError, match=r"^vae weights sha256: the dataset was encoded with 0000"):
        check_rows(store, manifest.model_copy(update={"specs": specs}), MODEL, num_rows=1)
