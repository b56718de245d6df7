"""The encode stage with the shipped tiny models, on pictures of the demo world and on awkward ones."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from infra.errors import GateError
from infra.storage import ObjectStore, open_store
from model.crop import central_square
from model.encoders import encode_moments, images_to_pixels
from model.masks import draw_mask, to_latent_mask, unpack_mask
from model.specs import MaskSpec
from model.tiny.world import draw, scene_at
from preprocessing.contracts.config import EncodeConfig, ModelConfig
from preprocessing.contracts.digests import is_held_out
from preprocessing.contracts.manifest import Manifest, dataset_prefix
from preprocessing.contracts.reasons import Reason
from preprocessing.encode.kernel import encode_rows
from preprocessing.encode.stage import EncodeStage, check_gate
from preprocessing.mask_files import read_mask_files
from preprocessing.stage import ShardOutput, commit_shard, run_stage
from tests.preprocessing.pictures import Downloaded, picture_row, picture_table

SIDE_PX = 64


def _table(indices: range) -> pa.Table:
    return picture_table([picture_row(index) for index in indices])


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return ModelConfig(base="tiny", base_prediction_type="v_prediction")


@pytest.fixture(scope="module")
def config() -> EncodeConfig:
    return EncodeConfig(resolution_px=SIDE_PX, mask_family="lama_train_256", num_mask_variants=2, batch_size=8)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    return open_store(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def stage(store: ObjectStore, config: EncodeConfig, model: ModelConfig) -> EncodeStage:
    copy = picture_row(1, uid="f" * 32, url="http://pictures.test/copy.png")
    broken = picture_row(30, image=b"not a picture", sha256="e" * 64)
    second = pa.concat_tables([_table(range(10, 20)), picture_table([copy, broken])])
    return EncodeStage(store, run_stage(store, Downloaded([_table(range(10)), second])), config, model)


@pytest.fixture(scope="module")
def manifest(store: ObjectStore, stage: EncodeStage) -> Manifest:
    return run_stage(store, stage)


def test_every_row_is_accounted_for(manifest: Manifest):
    assert (manifest.num_in, manifest.num_out) == (22, 20)
    assert manifest.dropped == {Reason.DUPLICATE_IMAGE: 1, Reason.IMAGE_UNREADABLE: 1}


def test_the_copy_in_a_later_shard_is_the_one_that_is_refused(store: ObjectStore, manifest: Manifest):
    name = manifest.shards[1].files[-1].name
    path = store.local_path(f"{dataset_prefix('encode', manifest.digest)}/{name}")
    assert {row["uid"] for row in pq.read_table(path).to_pylist() if row["reason"] == Reason.DUPLICATE_IMAGE} == {
        "f" * 32
    }


def test_held_out_rows_stand_in_files_of_their_own(store: ObjectStore, manifest: Manifest):
    prefix = dataset_prefix("encode", manifest.digest)
    for split in ("train", "validation"):
        files = manifest.files("rows", split)
        assert files
        for file in files:
            uids = pq.read_table(store.local_path(f"{prefix}/{file.name}"), columns=["uid"]).column("uid").to_pylist()
            assert all(is_held_out(uid, 0.3) == (split == "validation") for uid in uids)


def test_tensors_are_what_the_models_give(
    store: ObjectStore, stage: EncodeStage, manifest: Manifest, config: EncodeConfig
):
    encoders = stage.encoders
    prefix = dataset_prefix("encode", manifest.digest)
    rows = pq.read_table(store.local_path(f"{prefix}/{manifest.files('rows', 'train')[0].name}")).to_pylist()
    for row in rows[:3]:
        with Image.open(io.BytesIO(row["image"])) as picture:
            crop = np.array(picture)
        index = int(row["url"].rsplit("/", 1)[1][:-4])
        assert np.array_equal(crop, central_square(draw(scene_at(5, index)), SIDE_PX)[0])
        pixels = images_to_pixels(crop[None])
        moments = np.frombuffer(row["moments"], "<f2").reshape(8, 8, 8)
        np.testing.assert_allclose(moments, encode_moments(encoders.vae, pixels)[0].numpy(), atol=0.02, rtol=0.002)
        text = np.frombuffer(row["text_embeddings"], "<f2").reshape(77, encoders.text.width)
        np.testing.assert_allclose(text, encoders.text.embed_captions([row["caption"]])[0].numpy(), atol=5e-3)
        for k in range(config.num_mask_variants):
            mask = draw_mask(config.mask_family, SIDE_PX, config.mask_seed, row["uid"], k)
            assert np.array_equal(unpack_mask(row[f"mask_{k}"], (8, 8)), to_latent_mask(mask))
            masked = encode_moments(encoders.vae, pixels * torch.from_numpy(1 - mask))[0].numpy()
            stored = np.frombuffer(row[f"masked_moments_{k}"], "<f2").reshape(8, 8, 8)
            np.testing.assert_allclose(stored, masked, atol=0.02, rtol=0.002)


def test_tensor_columns_can_be_mapped(store: ObjectStore, manifest: Manifest):
    """data_page_offset + total_compressed_size - num_rows × width is where the raw values start."""
    prefix = dataset_prefix("encode", manifest.digest)
    path = store.local_path(f"{prefix}/{manifest.files('rows', 'train')[0].name}")
    assert path is not None
    file, content = pq.ParquetFile(path), path.read_bytes()
    assert file.num_row_groups == 1
    group, table = file.metadata.row_group(0), file.read()
    names = [name for name in table.schema.names if pa.types.is_fixed_size_binary(table.schema.field(name).type)]
    assert len(names) == 2 + 2 * 2
    for i in range(group.num_columns):
        chunk = group.column(i)
        if chunk.path_in_schema not in names:
            continue
        values = b"".join(table.column(chunk.path_in_schema).to_pylist())
        start = chunk.data_page_offset + chunk.total_compressed_size - len(values)
        assert content[start : start + len(values)] == values


def test_constants_belong_to_the_dataset(store: ObjectStore, stage: EncodeStage, manifest: Manifest):
    (file,) = manifest.extra_files
    constants = load_file(str(store.local_path(f"{dataset_prefix('encode', manifest.digest)}/{file.name}")))
    grey = encode_moments(stage.encoders.vae, torch.zeros(1, 3, SIDE_PX, SIDE_PX))[0]
    torch.testing.assert_close(constants["full_mask_moments"].float(), grey, atol=0.02, rtol=0.002)
    null = stage.encoders.text.embed_captions([""])[0]
    torch.testing.assert_close(constants["null_text_embedding"].float(), null, atol=5e-3, rtol=0)


def test_again_is_the_same_bytes(tmp_path: Path, stage: EncodeStage, manifest: Manifest, store: ObjectStore):
    again = open_store(str(tmp_path))
    downloaded = run_stage(again, Downloaded([_table(range(10))]))
    fresh = EncodeStage(
        again,
        downloaded,
        EncodeConfig(**manifest.config, batch_size=8),
        ModelConfig(base_prediction_type="v_prediction", base="tiny"),
    )
    output = next(fresh.outputs([0], tmp_path))
    assert isinstance(output, ShardOutput)
    report = commit_shard(again, "x", output, tmp_path)
    assert {f.name: f.sha256 for f in report.files} == {f.name: f.sha256 for f in manifest.shards[0].files}


def test_other_weights_are_another_dataset(
    tmp_path: Path, store: ObjectStore, stage: EncodeStage, config: EncodeConfig, model: ModelConfig
):
    import shutil

    shutil.copytree(model.directory, tmp_path / "model")
    path = tmp_path / "model" / "vae" / "config.json"
    path.write_text(path.read_text() + "\n")
    other = EncodeStage(
        store, stage._downloaded, config, ModelConfig(base=str(tmp_path / "model"), base_prediction_type="v_prediction")
    )
    assert other.digest != stage.digest


def test_a_row_that_becomes_nan_is_refused(
    stage: EncodeStage, store: ObjectStore, config: EncodeConfig, model: ModelConfig
):
    """A VAE whose encoder overflows never reaches a committed shard."""
    broken = EncodeStage(store, stage._downloaded, config, model)
    with torch.no_grad():
        broken.encoders.vae.encoder.conv_in.weight.fill_(float("nan"))
    kept, rejects = encode_rows(_table(range(4)), broken.encoders, batch_size=3)
    assert kept.num_rows == 0
    assert rejects.column("reason").to_pylist() == [Reason.NON_FINITE] * 4


def test_an_empty_shard_is_an_empty_shard(store: ObjectStore, config: EncodeConfig, model: ModelConfig, tmp_path: Path):
    folder = open_store(str(tmp_path))
    manifest = run_stage(folder, EncodeStage(folder, run_stage(folder, Downloaded([_table(range(0))])), config, model))
    assert (manifest.num_in, manifest.num_out, manifest.files("rows")) == (0, 0, [])


def test_the_gate_wants_rows_on_both_sides(manifest: Manifest):
    check_gate(manifest, 0.3)
    only_train = [
        shard.model_copy(update={"files": tuple(f for f in shard.files if f.split == "train")})
        for shard in manifest.shards
    ]
    lopsided = manifest.model_copy(update={"shards": tuple(only_train)})
    check_gate(lopsided, 0)
    with pytest.raises(GateError, match=r"^select\.validation_fraction: 0\.01 .* raise it"):
        check_gate(lopsided, 0.01)
    with pytest.raises(GateError, match="no row of 0 is left to train on"):
        check_gate(manifest.model_copy(update={"shards": ()}), 0)


def _mask_file(path: Path, columns: slice) -> None:
    pixels = np.zeros((48, 96), np.uint8)
    pixels[:, columns] = 255
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)


def _with_masks(stage: EncodeStage, *patterns: Path) -> EncodeStage:
    config = EncodeConfig(
        resolution_px=SIDE_PX, mask_family="user", mask_files=tuple(map(str, patterns)), num_mask_variants=2
    )
    model = ModelConfig(base="tiny", base_prediction_type="v_prediction")
    return EncodeStage(stage._store, stage._downloaded, config, model)


def test_the_user_s_own_masks(tmp_path: Path, stage: EncodeStage, store: ObjectStore):
    _mask_file(tmp_path / "masks" / "left.png", slice(0, 48))
    _mask_file(tmp_path / "masks" / "right.png", slice(48, 96))
    manifest = run_stage(store, _with_masks(stage, tmp_path / "masks"))
    left, right = np.zeros((2, 8, 8), np.uint8)
    left[:, :4] = right[:, 4:] = 1
    path = store.local_path(f"{dataset_prefix('encode', manifest.digest)}/{manifest.files('rows', 'train')[0].name}")
    firsts = set()
    for row in pq.read_table(path).to_pylist():
        masks = [unpack_mask(row[f"mask_{k}"], (8, 8)).tobytes() for k in range(2)]
        assert set(masks) == {left.tobytes(), right.tobytes()}
        firsts.add(masks[0])
        with Image.open(io.BytesIO(row["image"])) as picture:
            pixels = images_to_pixels(np.array(picture)[None])
        known = torch.ones(SIDE_PX, SIDE_PX)
        known[:, slice(0, 32) if masks[0] == left.tobytes() else slice(32, 64)] = 0
        masked = encode_moments(stage.encoders.vae, pixels * known)[0].numpy()
        stored = np.frombuffer(row["masked_moments_0"], "<f2").reshape(8, 8, 8)
        np.testing.assert_allclose(stored, masked, atol=0.02, rtol=0.002)
    assert len(firsts) == 2
    spec = MaskSpec.from_json(manifest.specs["masks"])
    assert spec.family == "user"
    assert len(spec.files_sha256) == 2


def test_what_the_mask_files_hold_determines_the_dataset_and_not_their_names(tmp_path: Path, stage: EncodeStage):
    _mask_file(tmp_path / "a" / "left.png", slice(0, 48))
    _mask_file(tmp_path / "a" / "right.png", slice(48, 96))
    _mask_file(tmp_path / "b" / "1.png", slice(48, 96))
    _mask_file(tmp_path / "b" / "2.png", slice(0, 48))
    digest = _with_masks(stage, tmp_path / "a").digest
    assert _with_masks(stage, tmp_path / "b" / "*.png").digest == digest
    assert _with_masks(stage, tmp_path / "b" / "1.png").digest != digest
    _mask_file(tmp_path / "b" / "2.png", slice(0, 47))
    assert _with_masks(stage, tmp_path / "b").digest != digest


def test_mask_files_of_other_formats(tmp_path: Path):
    deep = np.zeros((16, 16), np.uint16)
    deep[:, 8:], deep[:8, 8:] = 65535, 32767  # the upper half of 16 bits decides
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep >= 32768).save(tmp_path / "one-bit.png")
    color = np.zeros((16, 16, 3), np.uint8)
    color[8:, 8:] = 255
    Image.fromarray(color).save(tmp_path / "color.png")
    for file in read_mask_files([str(tmp_path)]):
        assert np.array_equal(file.pixels >= 128, deep >= 32768), file.name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing/*.png", r"^encode\.mask_files: .*nothing/\*\.png' matches no file"),
        ("text.png", r"^encode\.mask_files: .*text\.png' cannot be read as a mask"),
        ("black.png", r"^encode\.mask_files: .*black\.png: nothing in it is to be repainted"),
        ("transparent.png", r"^encode\.mask_files: .*transparent\.png' cannot be read .*flatten it"),
        ("dot.png", r"^encode\.mask_files: .*dot\.png: it covers no cell of the latent grid at 64 px"),
    ],
)
def test_mask_files_that_cannot_be_used_are_named(tmp_path: Path, stage: EncodeStage, name: str, message: str):
    (tmp_path / "text.png").write_text("no picture")
    _mask_file(tmp_path / "black.png", slice(0, 0))
    _mask_file(tmp_path / "dot.png", slice(5, 6))
    Image.new("RGBA", (8, 8)).save(tmp_path / "transparent.png")
    with pytest.raises(ValueError, match=message):
        _ = _with_masks(stage, tmp_path / name).digest


def test_mask_files_and_the_user_family_go_together():
    with pytest.raises(ValueError, match="mask_files: 0 given, and mask_family is 'user'"):
        EncodeConfig(mask_family="user")
    with pytest.raises(ValueError, match="mask_files: 1 given, and mask_family is 'sd_512train_large'"):
        EncodeConfig.model_validate({"mask_files": "masks/*.png"})
    with pytest.raises(ValueError, match="no mask family 'users'"):
        EncodeConfig(mask_family="users")
