"""Other programs open a shard and see what the trainer sees: DuckDB, pandas, polars, HF datasets.

Files are opened as anybody would open them, without anything of ours but the manifest's list of names.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pytest

from infra.storage import ObjectStore, open_store
from preprocessing.contracts.config import EncodeConfig, ModelConfig
from preprocessing.contracts.manifest import Manifest, dataset_prefix
from preprocessing.encode.stage import EncodeStage
from preprocessing.stage import run_stage
from tests.preprocessing.pictures import Downloaded, picture_row, picture_table
from training.batch import Batch
from training.data import open_dataset

NUM_ROWS, ROWS_PER_SHARD = 20, 8
TENSORS = {
    "moments": ("<f2", (8, 8, 8)),
    "masked_moments_0": ("<f2", (8, 8, 8)),
    "text_embeddings": ("<f2", (77, 64)),
    "mask_0": ("u1", (8,)),
    "token_ids": ("<u2", (77,)),
}
NULLABLE = ("similarity", "pwatermark", "aesthetic", "width")
PLAIN = ("uid", "caption", "punsafe", "crop_top", *NULLABLE)

Row = dict[str, Any]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    return open_store(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def manifest(store: ObjectStore) -> Manifest:
    rows = [picture_row(index) for index in range(NUM_ROWS)]
    rows[0] |= dict.fromkeys(NULLABLE) | {"caption": "ein „Bild“,\n\tمع ‘quotes’ 🖼 and a NUL-like \x01"}
    rows[1] |= {"image": b"no picture", "sha256": "0" * 64}
    shards = [rows[start : start + ROWS_PER_SHARD] for start in range(0, NUM_ROWS, ROWS_PER_SHARD)]
    downloaded = run_stage(store, Downloaded([picture_table(shard) for shard in shards]))
    config = EncodeConfig(resolution_px=64, mask_family="lama_train_256", num_mask_variants=1, text="both")
    model = ModelConfig(base="tiny", base_prediction_type="v_prediction")
    return run_stage(store, EncodeStage(store, downloaded, config, model, device="cpu"))


@pytest.fixture(scope="module")
def files(store: ObjectStore, manifest: Manifest) -> list[str]:
    """The training split's files, in the manifest's order: all that a stranger has to know."""
    prefix = dataset_prefix("encode", manifest.digest)
    files = [str(store.local_path(f"{prefix}/{file.name}")) for file in manifest.files("rows", "train")]
    assert len(files) == 3
    return files


def with_duckdb(files: list[str], cache_dir: Path) -> list[Row]:
    found = duckdb.execute("SELECT * FROM read_parquet($files)", {"files": files})
    names = [column[0] for column in found.description or ()]
    return [dict(zip(names, values, strict=True)) for values in found.fetchall()]


def with_pandas(files: list[str], cache_dir: Path) -> list[Row]:
    frame = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
    records = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return [{str(name): value for name, value in record.items()} for record in records]


def with_polars(files: list[str], cache_dir: Path) -> list[Row]:
    return pl.read_parquet(files).to_dicts()


def with_datasets(files: list[str], cache_dir: Path) -> list[Row]:
    import datasets

    datasets.disable_progress_bars()
    found = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(cache_dir))
    return [dict(row) for row in found]  # pyright: ignore[reportArgumentType, reportCallIssue]  # rows, not columns


READERS: dict[str, Callable[[list[str], Path], list[Row]]] = {
    "duckdb": with_duckdb,
    "pandas": with_pandas,
    "polars": with_polars,
    "datasets": with_datasets,
}


@pytest.fixture(scope="module")
def seen_by_the_trainer(store: ObjectStore, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Batch:
    """Each training row once."""
    prefix = dataset_prefix("encode", manifest.digest)
    dataset = open_dataset(store, prefix, tmp_path_factory.mktemp("cache"))
    return dataset.batch_of(range(len(dataset)), seed=0)


@pytest.mark.parametrize("reader", READERS)
def test_others_see_what_the_trainer_sees(
    reader: str, files: list[str], manifest: Manifest, seen_by_the_trainer: Batch, tmp_path: Path
) -> None:
    rows = READERS[reader](files, tmp_path)
    assert len(rows) == sum(file.num_rows for file in manifest.files("rows", "train"))
    batch = seen_by_the_trainer
    assert sorted(batch.uids) == sorted(row["uid"] for row in rows)
    by_uid = {row["uid"]: row for row in rows}
    tensors = {"moments": batch.moments, "masked_moments_0": batch.masked_moments} | {
        "text_embeddings": batch.text_embeddings
    }
    assert batch.mask is not None
    for i, uid in enumerate(batch.uids):
        values = {
            name: np.frombuffer(by_uid[uid][name], dtype).reshape(shape) for name, (dtype, shape) in TENSORS.items()
        }
        for name, tensor in tensors.items():
            assert tensor is not None
            assert np.array_equal(values[name], tensor[i].numpy()), (uid, name)
        bits = np.unpackbits(values["mask_0"].view(np.uint8))
        assert np.array_equal(bits.reshape(1, 8, 8), batch.mask[i].numpy())


def test_all_others_agree_on_every_value_and_on_the_order(files: list[str], tmp_path: Path) -> None:
    rows = {name: read(files, tmp_path / name) for name, read in READERS.items()}
    columns = [*PLAIN, "image", *TENSORS]
    seen = {name: [[row[column] for column in columns] for row in its] for name, its in rows.items()}
    assert seen["duckdb"] == seen["pandas"] == seen["polars"] == seen["datasets"]
    assert len({name for its in rows.values() for row in its for name in row}) == len(rows["duckdb"][0])


def test_captions_and_nulls_are_what_went_in(files: list[str], tmp_path: Path) -> None:
    expected = {row["uid"]: row for row in (picture_row(index) for index in range(NUM_ROWS))}
    odd = picture_row(0)["uid"]
    for name, read in READERS.items():
        for row in read(files, tmp_path / name):
            if row["uid"] == odd:
                assert [row[column] for column in NULLABLE] == [None] * len(NULLABLE)
                assert row["caption"] == "ein „Bild“,\n\tمع ‘quotes’ 🖼 and a NUL-like \x01"
            else:
                assert row["caption"] == expected[row["uid"]]["caption"]
                assert row["similarity"] == pytest.approx(0.3)


def test_tensors_of_a_whole_shard_at_once(files: list[str], seen_by_the_trainer: Batch) -> None:
    """As the README says: one array for a column, without a Python object for each value."""
    frame = pl.read_parquet(files, columns=["uid", "moments"])
    moments = np.frombuffer(b"".join(frame["moments"]), "<f2").reshape(-1, 8, 8, 8)
    order = [seen_by_the_trainer.uids.index(uid) for uid in frame["uid"]]
    assert seen_by_the_trainer.moments is not None
    assert np.array_equal(moments, seen_by_the_trainer.moments.numpy()[order])


def test_rejected_rows_can_be_counted_by_anybody(store: ObjectStore, manifest: Manifest) -> None:
    prefix = dataset_prefix("encode", manifest.digest)
    files = [str(store.local_path(f"{prefix}/{file.name}")) for file in manifest.files("rejects")]
    query = "SELECT reason, count(*) FROM read_parquet($files) GROUP BY reason"
    assert dict(duckdb.execute(query, {"files": files}).fetchall()) == manifest.dropped == {"image_unreadable": 1}
