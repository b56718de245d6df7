"""Looking around in a real store: what a URI names, and which rows a dataset has."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from flows.store import dataset_at, locate, read_manifest
from infra.storage import ObjectStore, open_store
from preprocessing.contracts.manifest import Manifest, dataset_prefix
from preprocessing.stage import RowsFile, ShardOutput, rejects_table, run_stage
from tests.preprocessing.given import GivenTables


class _Rows(GivenTables):
    """An encode stage of two shards of given uids, each of which refuses a row as well."""

    name, parents = "encode", {"download": "d" * 64}

    def __init__(self, digest: str, uids: Sequence[str]) -> None:
        super().__init__([pa.table({"uid": pa.array(uids[start::2], pa.string())}) for start in range(2)])
        self.digest = digest

    def output(self, index: int) -> ShardOutput:
        table = self.tables[index]
        rows = RowsFile(f"train-{index:05d}.parquet", table, split="train")
        rejects = rejects_table([f"r{index}"], [None], ["no_url"], [None])
        return ShardOutput(index, table.num_rows + 1, (rows,), rejects)


def _made(store: ObjectStore, digit: str, uids: Sequence[str]) -> tuple[str, Manifest]:
    manifest = run_stage(store, _Rows(digit * 64, uids))
    return dataset_prefix("encode", digit * 64), manifest


@pytest.mark.parametrize("form", ["{root}/{prefix}", "{root}/{prefix}/MANIFEST.json", "{prefix}", "{prefix}/"])
def test_all_ways_to_name_a_dataset(any_root: str, form: str) -> None:
    store = open_store(any_root)
    prefix, manifest = _made(store, "a", ["u0"])
    assert dataset_at(store, form.format(root=store.uri, prefix=prefix)) == (prefix, manifest)


def test_a_dataset_of_another_store_is_refused(tmp_path: Path) -> None:
    prefix, _ = _made(open_store(str(tmp_path / "one")), "a", ["u0"])
    with pytest.raises(ValueError, match=r"^train\.dataset: .* is not below --root .*/two; set --root .*/one$"):
        dataset_at(open_store(str(tmp_path / "two")), f"{tmp_path}/one/{prefix}", field="train.dataset")


@pytest.mark.parametrize("uri", ["stable", "/somewhere/else", "datasets/encode/0123456789abcdef"])
def test_what_is_not_there_is_one_clear_line(tmp_path: Path, uri: str) -> None:
    with pytest.raises(ValueError, match=r"^uri: "):
        read_manifest(*locate(uri, str(tmp_path)))
