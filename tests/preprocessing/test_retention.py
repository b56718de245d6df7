"""Raw pictures go once they are encoded; what else is known of each row, and all that is made of it, stays."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.verification import verify_uri
from infra.errors import ContractError, TransientError
from infra.reading import reading
from infra.storage import ObjectStore, open_store
from preprocessing.contact_sheet import make_contact_sheet
from preprocessing.contents import read_contents
from preprocessing.contracts.config import EncodeConfig, ModelConfig, RetentionConfig
from preprocessing.contracts.manifest import Manifest, dataset_prefix, find_manifest, load_manifest
from preprocessing.contracts.schemas import SELECTED
from preprocessing.download.images import NormalizedImage
from preprocessing.download.stage import shard_output
from preprocessing.encode.stage import EncodeStage
from preprocessing.retention import are_pictures_needed, check_pictures, delete_pictures, has_pictures, reopen
from preprocessing.reuse import Previous, PreviousRows, say_previous
from preprocessing.stage import ShardOutput, ShardReference, run_shards, run_stage
from tests.preprocessing.pictures import Downloaded, picture_row, picture_table

CONFIG = EncodeConfig(resolution_px=64, mask_family="lama_train_256", num_mask_variants=0, batch_size=8)
MODEL = ModelConfig(base="tiny", base_prediction_type="v_prediction")
GONE, KEPT = RetentionConfig(), RetentionConfig(keep_pictures=True)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def stage() -> Downloaded:
    return Downloaded([picture_table([picture_row(index) for index in range(start, start + 4)]) for start in (0, 4)])


@pytest.fixture
def downloaded(store: ObjectStore, stage: Downloaded) -> Manifest:
    return run_stage(store, stage)


def _rows(store: ObjectStore, manifest: Manifest) -> pa.Table:
    prefix = dataset_prefix(manifest.stage, manifest.digest)
    return pa.concat_tables(
        [pq.read_table(pa.BufferReader(store.read(file.key(prefix)))) for file in manifest.files("rows")]
    )


def test_pictures_stay_until_they_are_encoded_and_as_long_as_was_asked(store: ObjectStore, downloaded: Manifest):
    prefix = dataset_prefix("download", downloaded.digest)
    assert delete_pictures(store, downloaded, GONE).datasets == ()
    encoded = run_stage(store, EncodeStage(store, downloaded, CONFIG, MODEL))
    assert delete_pictures(store, downloaded, KEPT).datasets == ()
    days = RetentionConfig(keep_pictures_days=7)
    assert delete_pictures(store, downloaded, days).datasets == ()
    assert has_pictures(load_manifest(store, prefix))
    done = delete_pictures(store, downloaded, days, now=datetime.now(UTC) + timedelta(days=8))
    assert (done.datasets, done.num_written, done.num_deleted) == ((prefix,), 2, 2)
    assert delete_pictures(store, downloaded, GONE).datasets == ()
    assert load_manifest(store, dataset_prefix("encode", encoded.digest)) == encoded


def test_all_but_the_pictures_is_there_afterwards(store: ObjectStore, stage: Downloaded, downloaded: Manifest):
    before = _rows(store, downloaded)
    run_stage(store, EncodeStage(store, downloaded, CONFIG, MODEL))
    delete_pictures(store, downloaded, GONE)
    prefix = dataset_prefix("download", downloaded.digest)
    after = load_manifest(store, prefix)
    assert not has_pictures(after)
    assert _rows(store, after).equals(before.drop_columns(["image"]))
    assert after.model_copy(update={"shards": ()}) == downloaded.model_copy(update={"shards": ()})
    pictures = before.column("image").to_pylist()
    for info in store.list("datasets/download/"):
        data = store.read(info.key)
        assert not any(picture in data for picture in pictures)
    # It is complete, whole, and can be looked at; making it again makes nothing.
    assert run_stage(store, stage) == after
    assert verify_uri(prefix, store.uri).problems == ()
    assert read_contents(store, prefix, after, with_values=True).columns
    assert len(make_contact_sheet(store, prefix, after, 4).cards) == 4


def test_what_needs_the_pictures_again_says_so_and_gets_them(
    store: ObjectStore, stage: Downloaded, downloaded: Manifest
):
    encoded = run_stage(store, EncodeStage(store, downloaded, CONFIG, MODEL))
    delete_pictures(store, downloaded, GONE)
    prefix = dataset_prefix("download", downloaded.digest)
    bare = load_manifest(store, prefix)
    with pytest.raises(ContractError, match=r"pictures were deleted .* retention\.keep_pictures=true keeps them"):
        check_pictures(bare)
    other = CONFIG.model_copy(update={"mask_seed": 1, "num_mask_variants": 1})
    with pytest.raises(ContractError, match="were deleted"):
        run_stage(store, EncodeStage(store, bare, other, MODEL))
    reopen(store, bare)
    assert find_manifest(store, prefix) is None
    again = run_stage(store, stage)
    assert has_pictures(again)
    assert verify_uri(prefix, store.uri).problems == ()
    assert run_stage(store, EncodeStage(store, again, other, MODEL)).num_out == 8
    assert run_stage(store, EncodeStage(store, again, CONFIG, MODEL)) == encoded


class Named(Downloaded):
    """A download whose shards all stand in another one."""

    digest = "b" * 64

    def __init__(self, other: Manifest) -> None:
        super().__init__([])
        self.num_shards, self._other = len(other.shards), other

    def outputs(self, indices: Sequence[int], scratch: Path) -> Iterator[ShardOutput | ShardReference]:  # pyright: ignore[reportIncompatibleMethodOverride]  # the base makes all
        prefix = dataset_prefix("download", self._other.digest)
        return (ShardReference(self._other.shards[index].standing_in(prefix, index)) for index in indices)


def test_what_another_dataset_names_outlives_a_download_anew(
    store: ObjectStore, stage: Downloaded, downloaded: Manifest
):
    prefix, other = dataset_prefix("download", downloaded.digest), dataset_prefix("download", Named.digest)
    run_stage(store, EncodeStage(store, downloaded, CONFIG, MODEL))
    delete_pictures(store, downloaded, GONE)
    bare = load_manifest(store, prefix)
    run_stage(store, Named(bare))
    reopen(store, bare)
    left = f"{prefix}/shard-left-over.parquet"
    store.put(left, b"of a run that was killed")
    assert has_pictures(run_stage(store, stage))
    assert not store.exists(left)
    for whole in (prefix, other):
        assert verify_uri(whole, store.uri).problems == ()


def test_a_dataset_whose_files_are_replaced_before_it_is_complete_is_not_complete(
    store: ObjectStore, downloaded: Manifest
):
    key = downloaded.shards[1].files[0].key(dataset_prefix("download", downloaded.digest))
    data = store.read(key)
    with pytest.raises(TransientError, match=r"shard-00001\.parquet, a file of shard 1 .* is gone"):
        run_stage(store, Named(downloaded), gate=lambda _: store.delete(key))
    assert find_manifest(store, dataset_prefix("download", Named.digest)) is None
    store.put(key, data)
    assert run_stage(store, Named(downloaded)).num_out == 8


def test_pictures_that_are_being_encoded_stay(store: ObjectStore, downloaded: Manifest):
    other = EncodeStage(store, downloaded, CONFIG.model_copy(update={"num_mask_variants": 1}), MODEL)
    run_shards(store, other, [0])
    run_stage(store, EncodeStage(store, downloaded, CONFIG, MODEL))
    prefix = dataset_prefix("download", downloaded.digest)
    assert not list(store.list(f"{prefix}/READING"))
    assert delete_pictures(store, downloaded, GONE).datasets == ()
    month = datetime.now(UTC) + timedelta(days=31)
    with reading(store, prefix, 0):
        assert delete_pictures(store, downloaded, GONE, now=month).datasets == ()
    assert delete_pictures(store, downloaded, GONE, now=month).datasets == (prefix,)
    with pytest.raises(TransientError, match="is gone: the dataset was replaced while it was read"):
        run_stage(store, other)


def test_a_damaged_file_stays_damaged(store: ObjectStore, downloaded: Manifest):
    run_stage(store, EncodeStage(store, downloaded, CONFIG, MODEL))
    prefix = dataset_prefix("download", downloaded.digest)
    key = downloaded.shards[0].files[0].key(prefix)
    damaged = bytearray(store.read(key))
    damaged[100] ^= 1
    store.put(key, bytes(damaged))
    assert (delete_pictures(store, downloaded, GONE).num_written, store.read(key)) == (1, bytes(damaged))
    assert [(problem.kind, problem.uri) for problem in verify_uri(prefix, store.uri).problems] == [
        ("bad", store.uri_of(key))
    ]


class Partial(Downloaded):
    """A download that took one row's picture over after it was deleted, and got another's."""

    digest = "b" * 64

    def output(self, index: int) -> ShardOutput:
        rows = self.tables[index].to_pylist()
        pictures = {
            row["uid"]: NormalizedImage(
                image=row["image"],
                width=row["image_width"],
                height=row["image_height"],
                original_width=row["original_width"],
                original_height=row["original_height"],
                sha256=row["sha256"],
            )
            for row in rows
        }
        return shard_output(index, self.tables[index].select(SELECTED.names), pictures)


def test_a_file_with_some_pictures_says_so_and_gives_what_it_has(store: ObjectStore, downloaded: Manifest):
    encoded = run_stage(store, EncodeStage(store, downloaded, CONFIG, MODEL))
    before = Previous(
        dataset_prefix("download", downloaded.digest), downloaded, dataset_prefix("encode", encoded.digest)
    )
    gone, new = picture_row(0, image=b""), picture_row(20)
    partial = run_stage(store, Partial([picture_table([gone, new])]))
    prefix = dataset_prefix("download", partial.digest)
    assert not has_pictures(partial)
    assert are_pictures_needed(store, partial, None)
    assert not are_pictures_needed(store, partial, before)
    rows = PreviousRows(store, prefix, partial, "uid")
    _, table = rows.read(rows.find(pa.array([new["uid"], gone["uid"]], pa.string())), ["image"])
    assert table is not None
    assert table.column("image").to_pylist() == [new["image"], b""]

    with pytest.raises(ContractError, match="1 pictures of the download were deleted"):
        run_stage(store, EncodeStage(store, partial, CONFIG, MODEL))
    stage = EncodeStage(store, partial, CONFIG, MODEL)
    say_previous(store, "encode", stage.digest, dataset_prefix("encode", encoded.digest))
    assert run_stage(store, stage).num_out == 2
    assert delete_pictures(store, partial, GONE).num_written == 3
    after = load_manifest(store, prefix)
    assert "image" not in _rows(store, after).column_names
    assert delete_pictures(store, after, GONE).datasets == ()
