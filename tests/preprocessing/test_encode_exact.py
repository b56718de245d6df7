"""What is stored is exact: the same bytes however it was made, and the values that an encode on the spot gives."""

import io
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from infra.storage import open_store
from model.crop import central_square, decode_crop
from model.encoders import (
    decode_latents,
    encode_stored_moments,
    encode_stored_text,
    images_to_pixels,
    mean_latents,
    pixels_to_images,
)
from model.fixed_shape import vae_micro_batch
from model.masks import draw_mask, to_latent_mask, unpack_mask
from model.tiny.world import draw, scene_at
from preprocessing.contracts.config import EncodeConfig, ModelConfig
from preprocessing.contracts.digests import weights_sha256
from preprocessing.contracts.reasons import Reason
from preprocessing.encode.batches import BatchSize
from preprocessing.encode.kernel import Encoders, encode_rows
from preprocessing.encode.models import load_encoders
from preprocessing.encode.stage import EncodeStage
from preprocessing.stage import run_stage
from tests.preprocessing.pictures import Downloaded, picture_row, picture_table

SIDE_PX = 64
NUM_VARIANTS = 2
NUM_ROWS = 21
MODEL = ModelConfig(base="tiny", base_prediction_type="v_prediction")
LoadEncoders = Callable[..., Encoders]


def _config(**fields: Any) -> EncodeConfig:
    return EncodeConfig(
        **{
            "resolution_px": SIDE_PX,
            "mask_family": "lama_train_256",
            "num_mask_variants": NUM_VARIANTS,
            "text": "both",
            **fields,
        }
    )


@pytest.fixture(scope="module")
def load() -> LoadEncoders:
    """A function (fields of the config) → encoders; the models of each precision are loaded once."""
    weights = {name: weights_sha256(MODEL.directory / name) for name in ("vae", "open_clip")}
    loaded: dict[str, Encoders] = {}

    def make(**fields: Any) -> Encoders:
        config = _config(**fields)
        if config.precision not in loaded:
            loaded[config.precision] = load_encoders(MODEL.directory, config, weights, device="cpu")
        encoders = loaded[config.precision]
        masks = replace(encoders.mask_spec, num_variants=config.num_mask_variants)
        return replace(encoders, config=config, mask_spec=masks)

    return make


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    return picture_table([picture_row(index) for index in range(NUM_ROWS)])


@pytest.fixture(scope="module")
def stored(load: LoadEncoders, rows: pa.Table) -> pa.Table:
    table, rejects = encode_rows(rows, load(), batch_size=32)
    assert (table.num_rows, rejects.num_rows) == (NUM_ROWS, 0)
    return table


def _moments(table: pa.Table, name: str) -> torch.Tensor:
    values = np.stack([np.frombuffer(value, "<f2") for value in table.column(name).to_pylist()])
    return torch.from_numpy(values.reshape(-1, 8, 8, 8))


def _pixels(table: pa.Table) -> torch.Tensor:
    return images_to_pixels(np.stack([decode_crop(image) for image in table.column("image").to_pylist()]))


@pytest.mark.parametrize(("batch_size", "num_threads"), [(1, 1), (3, 2), (16, 1), (40, 2), (64, 3)])
def test_neither_batches_nor_threads_change_a_byte(
    load: LoadEncoders, rows: pa.Table, stored: pa.Table, batch_size: int, num_threads: int
):
    table, _ = encode_rows(rows, load(num_threads=num_threads), batch_size)
    assert table.equals(stored)


def test_torch_s_own_threads_do_not_change_a_byte(load: LoadEncoders, rows: pa.Table, stored: pa.Table):
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            assert encode_rows(rows.slice(0, 5), load(), 32)[0].equals(stored.slice(0, 5))
            assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)


def test_the_order_of_rows_does_not_change_a_byte(load: LoadEncoders, rows: pa.Table, stored: pa.Table):
    order = np.random.default_rng(0).permutation(NUM_ROWS)
    table, _ = encode_rows(rows.take(order), load(), batch_size=8)
    assert table.equals(stored.take(order).cast(table.schema))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_is_as_exact_on_a_cpu_and_close_to_float32(
    load: LoadEncoders, rows: pa.Table, stored: pa.Table, precision: str
):
    few, encoders = rows.slice(0, 6), load(precision=precision)
    table, _ = encode_rows(few, encoders, batch_size=6)
    assert encode_rows(few, load(precision=precision, num_threads=1), batch_size=4)[0].equals(table)
    tolerance = {"bf16": 0.1, "fp16": 0.02}[precision]
    for name in ("moments", "masked_moments_1"):
        exact = _moments(stored.slice(0, 6), name).float()
        assert (_moments(table, name).float() - exact).abs().max() < tolerance * (1 + exact.abs().max())


def test_masked_moments_are_an_encode_on_the_spot(load: LoadEncoders, stored: pa.Table):
    encoders, pixels = load(), _pixels(stored)
    uids = stored.column("uid").to_pylist()
    for k in range(NUM_VARIANTS):
        masks = torch.from_numpy(np.stack([draw_mask("lama_train_256", SIDE_PX, 0, uid, k) for uid in uids]))
        assert torch.equal(encode_stored_moments(encoders.vae, pixels, masks), _moments(stored, f"masked_moments_{k}"))
        for row in (0, 20):  # one at a time, as few as a step may have
            one = encode_stored_moments(encoders.vae, pixels[row : row + 1], masks[row : row + 1].float()[:, None])
            assert torch.equal(one[0], _moments(stored, f"masked_moments_{k}")[row])
    assert torch.equal(encode_stored_moments(encoders.vae, pixels), _moments(stored, "moments"))


def test_a_picture_that_is_all_hole_is_the_constant(load: LoadEncoders, stored: pa.Table):
    vae, ones = load().vae, torch.ones(2, SIDE_PX, SIDE_PX, dtype=torch.uint8)
    constant = encode_stored_moments(vae, torch.zeros(1, 3, SIDE_PX, SIDE_PX))[0]
    for made in encode_stored_moments(vae, _pixels(stored.slice(0, 2)), ones):
        assert made.numpy().tobytes() == constant.numpy().tobytes()


def test_variants_follow_the_mask_spec(load: LoadEncoders, stored: pa.Table):
    spec = load().mask_spec
    for k in range(NUM_VARIANTS):
        for uid, stored_mask in zip(*(stored.column(name).to_pylist() for name in ("uid", f"mask_{k}")), strict=True):
            drawn = draw_mask(spec.family, spec.resolution_px, spec.seed, uid, k)
            assert np.array_equal(unpack_mask(stored_mask, (8, 8)), to_latent_mask(drawn))


def test_a_caption_stands_in_the_row_of_its_picture(load: LoadEncoders, rows: pa.Table, stored: pa.Table):
    """Each row is known by its URL; a swap of any two rows in any column would be seen, for no two are alike."""
    encoders = load()
    names = ["moments", "text_embeddings", "token_ids", "masked_moments_0", "masked_moments_1"]
    for name in names:
        assert len(set(stored.column(name).to_pylist())) > NUM_ROWS - 3, f"{name} tells rows apart"
    ids = encoders.text.tokenize(stored.column("caption").to_pylist())
    text = encode_stored_text(encoders.text, ids)
    for position, row in enumerate(stored.to_pylist()):
        index = int(row["url"].rsplit("/", 1)[1].removesuffix(".png"))
        assert row["caption"] == scene_at(5, index).caption
        assert row["text_embeddings"] == text[position].numpy().tobytes()
        assert row["token_ids"] == ids[position].numpy().astype("<u2").tobytes()
        crop, box = central_square(draw(scene_at(5, index)), SIDE_PX)
        assert np.array_equal(decode_crop(row["image"]), crop)
        assert (row["crop_top"], row["crop_left"]) == (box.top, box.left)
    captions = rows.column("caption").to_pylist()
    swapped = rows.set_column(
        rows.schema.get_field_index("caption"),
        rows.schema.field("caption"),
        pa.array([captions[1], captions[0], *captions[2:]]),
    )
    other = encode_rows(swapped, encoders, 32)[0]
    assert other.column("text_embeddings")[0] == stored.column("text_embeddings")[1]
    assert other.column("moments").equals(stored.column("moments"))


def test_the_mean_decodes_to_about_the_crop(load: LoadEncoders, stored: pa.Table):
    """With the tiny VAE; another pixel range, or a scaling too many, costs more than 10 dB."""
    vae = load().vae
    scaling_factor = float(vae.config["scaling_factor"])
    decoded = decode_latents(vae, mean_latents(_moments(stored, "moments"), scaling_factor), scaling_factor)
    crops = np.stack([decode_crop(image) for image in stored.column("image").to_pylist()])
    mse = np.square(pixels_to_images(decoded).numpy().astype(float) - crops).mean(axis=(1, 2, 3))
    psnr = 10 * np.log10(255**2 / mse)
    assert 27 < psnr.mean() < 40
    assert psnr.min() > 20


def test_a_jpeg_s_own_pixels_are_what_is_encoded(load: LoadEncoders, rows: pa.Table, stored: pa.Table):
    encoders = load(image="jpeg", image_quality=60)
    table, _ = encode_rows(rows.slice(0, 4), encoders, 8)
    image = table.column("image")[0].as_py()
    with Image.open(io.BytesIO(image)) as picture:
        assert (picture.format, picture.size) == ("JPEG", (SIDE_PX, SIDE_PX))
    assert torch.equal(encode_stored_moments(encoders.vae, _pixels(table)), _moments(table, "moments"))
    assert not torch.equal(_moments(table, "moments"), _moments(stored.slice(0, 4), "moments"))


@pytest.mark.parametrize(
    ("fields", "columns"),
    [
        ({"text": "token_ids", "num_mask_variants": 0}, {"moments": 1024, "token_ids": 154}),
        ({"text": "embeddings", "num_mask_variants": 0, "moments": False}, {"text_embeddings": 9856}),
        (
            {"text": "both", "num_mask_variants": 1, "image": "none"},
            {"moments": 1024, "text_embeddings": 9856, "token_ids": 154, "mask_0": 8, "masked_moments_0": 1024},
        ),
    ],
)
def test_what_is_stored_is_what_was_asked_for(
    load: LoadEncoders, rows: pa.Table, stored: pa.Table, fields: dict[str, Any], columns: dict[str, int]
):
    encoders = load(**fields)
    table, _ = encode_rows(rows.slice(0, 3), encoders, 8)
    assert encoders.config.tensor_columns(encoders.latent_spec, encoders.text_spec) == columns
    widths = {name: table.schema.field(name).type for name in columns}
    assert widths == {name: pa.binary(width) for name, width in columns.items()}
    tensors = {"moments", "token_ids", "text_embeddings", "mask_0", "masked_moments_0", "mask_1"}
    assert tensors & set(table.schema.names) == set(columns)
    assert ("image" in table.schema.names) == (encoders.config.image != "none")
    for name in columns:
        assert table.column(name).equals(stored.slice(0, 3).column(name))


def test_what_cannot_be_trained_on_is_refused():
    with pytest.raises(ValueError, match=r"moments: false, and image is 'none'"):
        _config(image="none", moments=False)
    with pytest.raises(ValueError, match=r"num_mask_variants: 0, and image is 'none'"):
        _config(image="none", num_mask_variants=0)


def test_what_changes_no_byte_changes_no_digest():
    base = _config()
    assert _config(batch_size=5, num_threads=1, num_processes=3).digest_fields() == base.digest_fields()
    changes: list[dict[str, Any]] = [
        {"image": "jpeg"},
        {"image_quality": 5},
        {"moments": False},
        {"text": "token_ids"},
        {"precision": "bf16"},
        {"compile": True},
        {"num_mask_variants": 0},
    ]
    assert all(_config(**change).digest_fields() != base.digest_fields() for change in changes)


def test_what_float16_cannot_hold_is_refused_and_its_neighbors_are_not(load: LoadEncoders, rows: pa.Table):
    encoders = load()
    weights = encoders.vae.quant_conv
    assert weights is not None
    assert weights.bias is not None
    means = _moments(encode_rows(rows.slice(0, 4), encoders, 8)[0], "moments")[:, 0].float()
    largest = means.abs().amax(dim=(1, 2))
    loudest = int(largest.argmax())
    between = float(largest.sort().values[-2:].mean())
    bias = weights.bias
    before = weights.weight.clone(), bias.clone()
    with torch.no_grad():  # one channel grows until the loudest picture, and only that, is beyond 65504
        weights.weight[0] *= 65504 / between
        bias[0] *= 65504 / between
    try:
        kept, rejects = encode_rows(rows.slice(0, 4), load(num_mask_variants=0), 8)
    finally:
        with torch.no_grad():
            weights.weight.copy_(before[0])
            bias.copy_(before[1])
    uids = rows.column("uid").to_pylist()[:4]
    assert rejects.column("uid").to_pylist() == [uids[loudest]]
    assert rejects.column("reason").to_pylist() == [Reason.NON_FINITE]
    assert kept.column("uid").to_pylist() == [uid for uid in uids if uid != uids[loudest]]


@pytest.mark.parametrize("most", [1, 0])
def test_less_at_once_where_memory_does_not_suffice(
    tmp_path: Path, load: LoadEncoders, rows: pa.Table, stored: pa.Table, most: int
):
    """Memory for ``most`` micro-batches: with none, the message says what to change."""
    store = open_store(str(tmp_path))
    table = rows.slice(0, 20)
    config = _config(batch_size=4 * vae_micro_batch(SIDE_PX, torch.device("cpu")), num_threads=2)
    stage = EncodeStage(store, run_stage(store, Downloaded([table])), config, MODEL, device="cpu")
    lock, active = threading.Lock(), 0

    def enter(*_: object) -> None:
        nonlocal active
        with lock:
            active += 1
        all_in.wait(0.2) if most else None
        if active > most:
            with lock:
                active -= 1
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )

    def leave(*_: object) -> None:
        nonlocal active
        with lock:
            active -= 1

    all_in = threading.Event()
    encoder = stage.encoders.vae.encoder
    handles = [encoder.register_forward_pre_hook(enter), encoder.register_forward_hook(leave)]
    try:
        if not most:
            with pytest.raises(ValueError, match=r"^encode\.batch_size: memory does not .*lower encode\.num_threads"):
                list(stage.outputs([0], tmp_path))
            return
        (output,) = stage.outputs([0], tmp_path)
    finally:
        for handle in handles:
            handle.remove()
    assert stage._batch_size.value <= vae_micro_batch(SIDE_PX, torch.device("cpu")) * 2 - 1
    made = pa.concat_tables([file.table for file in output.rows])  # pyright: ignore[reportAttributeAccessIssue]
    assert sorted(made.column("moments").to_pylist()) == sorted(stored.slice(0, 20).column("moments").to_pylist())


def test_other_errors_are_not_mistaken_for_a_lack_of_memory():
    size = BatchSize(8, "")
    with pytest.raises(RuntimeError, match="shape mismatch"):
        size.run(lambda _: (_ for _ in ()).throw(RuntimeError("shape mismatch")))
    assert size.value == 8
