"""What is made while training is what is stored, bit for bit; and what a dataset lacks is said beforehand."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flows.config import load_config
from flows.plan import make_plan, run_spec
from infra.errors import ContractError
from infra.storage import ObjectStore, open_store
from model.masks import draw_mask, to_latent_mask
from model.schedule import alphas_cumprod
from model.specs import MASK_FAMILIES
from model.unet import load_unet, widen_conv_in
from preprocessing.contracts.config import EncodeConfig, ModelConfig
from preprocessing.contracts.digests import uid_of
from preprocessing.contracts.manifest import dataset_prefix, load_manifest
from preprocessing.encode.stage import EncodeStage
from preprocessing.stage import run_stage
from tests.preprocessing.pictures import Downloaded, picture_row, picture_table
from training.batch import Batch
from training.conditioning import check_conditioning, encoded_columns, fields_of
from training.config import TrainConfig
from training.data import TrainingDataset, open_dataset
from training.launch import train
from training.online import OnlineConditioner, load_conditioner, variants_of
from training.runspec import RunSpec, checkpoint_prefix, run_digest, run_id_of, run_prefix
from training.step import Draws, draw, training_loss

SIDE_PX = 64
NUM_ROWS = 26
NUM_VARIANTS = 3
LEAN = {"num_mask_variants": 0, "moments": False, "text": "token_ids"}
ONLINE = {"mask_source": "online", "text_source": "token_ids", "moments_source": "online"}
CPU = torch.device("cpu")

Encode = Callable[..., str]


@pytest.fixture(scope="module")
def encoded_store(tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    return open_store(str(tmp_path_factory.mktemp("encoded")))


@pytest.fixture(scope="module")
def encode(encoded_store: ObjectStore, tiny_model: ModelConfig) -> Encode:
    """A function (fields of EncodeConfig) → prefix of the drawings, encoded so."""
    rows = [[picture_row(place, split="train") for place in range(start, NUM_ROWS, 2)] for start in range(2)]
    downloaded = run_stage(encoded_store, Downloaded([picture_table(shard) for shard in rows]))

    def run(**fields: Any) -> str:
        config = EncodeConfig.model_validate(
            {
                "resolution_px": SIDE_PX,
                "mask_family": "lama_train_256",
                "num_mask_variants": NUM_VARIANTS,
                "batch_size": 16,
                "text": "both",
                **fields,
            }
        )
        return dataset_prefix(
            "encode", run_stage(encoded_store, EncodeStage(encoded_store, downloaded, config, tiny_model)).digest
        )

    return run


def _train(**fields: Any) -> TrainConfig:
    required = {"prediction_type": "v_prediction", "mask_source": "cached", "seed": 3, "num_steps": 6}
    return TrainConfig.model_validate(
        {**required, "text_dropout": 0.3, "full_mask": 0.3, "micro_batch_size": 1, **fields}
    )


class _Trainer:
    """A dataset as a training reads it, and completes it."""

    def __init__(self, store: ObjectStore, prefix: str, model: ModelConfig, cache: Path, **fields: Any) -> None:
        self.config = _train(**fields)
        self.dataset: TrainingDataset = open_dataset(store, prefix, cache, fields=fields_of(self.config))
        self.conditioner: OnlineConditioner | None = load_conditioner(
            self.config, self.dataset.specs, self.dataset.constants, directory=model.directory, device=CPU
        )

    def batch(self, step: int, size: int = 8, rank: int = 0, world_size: int = 1) -> tuple[Batch, Draws]:
        batch = self.dataset.batch_at(step, seed=3, global_batch_size=size, rank=rank, world_size=world_size)
        draws = draw(
            batch.uids,
            seed=3,
            step=step,
            latent_shape=(4, 8, 8),
            num_timesteps=1000,
            text_dropout=self.config.text_dropout,
            full_mask=self.config.full_mask,
        )
        return (batch if self.conditioner is None else self.conditioner.complete(batch, draws)), draws

    def loss(self, unet: Any, step: int) -> float:
        batch, draws = self.batch(step)
        return training_loss(
            unet,
            batch,
            draws,
            self.dataset.constants,
            prediction_type="v_prediction",
            scaling_factor=0.18215,
            alphas_cumprod=alphas_cumprod(),
            device=CPU,
        ).loss.item()


@pytest.fixture
def trainer(encoded_store: ObjectStore, tiny_model: ModelConfig, tmp_path: Path) -> Callable[..., _Trainer]:
    return lambda prefix, **fields: _Trainer(encoded_store, prefix, tiny_model, tmp_path / "cache", **fields)


def _seen(batch: Batch, draws: Draws) -> dict[str, bytes]:
    """uid → all that conditions a sample: what the draws replace does not count."""
    assert batch.mask is not None
    assert batch.masked_moments is not None
    assert batch.moments is not None
    assert batch.text_embeddings is not None
    return {
        uid: b"".join(
            tensor[row].numpy().tobytes()
            for tensor, is_replaced in (
                (batch.moments, False),
                (batch.mask, draws.is_full_mask[row]),
                (batch.masked_moments, draws.is_full_mask[row]),
                (batch.text_embeddings, draws.drops_text[row]),
            )
            if not is_replaced
        )
        for row, uid in enumerate(batch.uids)
    }


# ------------------------------------------------------------------------------------------------------------- equality


def test_online_is_cached_bit_for_bit_for_as_many_visits_as_are_stored(
    encode: Encode, trainer: Callable[..., _Trainer], tiny_model: ModelConfig
):
    """Batches of 8 of 26 rows, three epochs of them: each batch has another make-up than those that were encoded."""
    prefix = encode()
    cached, online = trainer(prefix), trainer(prefix, **ONLINE)
    assert cached.conditioner is None
    unet = widen_conv_in(load_unet(tiny_model.directory / "unet"))
    losses = []
    for step in range(NUM_VARIANTS * NUM_ROWS // 8):
        made, stored = online.batch(step), cached.batch(step)
        assert made[0].uids == stored[0].uids
        assert _seen(*made) == _seen(*stored), step
        losses.append((cached.loss(unet, step).hex(), online.loss(unet, step).hex()))
    assert [first for first, _ in losses] == [second for _, second in losses]
    assert len(set(losses)) == len(losses)


def test_a_dataset_that_stores_next_to_nothing_conditions_alike(encode: Encode, trainer: Callable[..., _Trainer]):
    """Crops as JPEG and token ids. Its digest is another, and so is its order: compared sample by sample."""
    cached = trainer(encode(image="jpeg", num_mask_variants=1))
    lean = trainer(encode(image="jpeg", **LEAN), **ONLINE)
    assert _seen(*lean.batch(0, NUM_ROWS)) == _seen(*cached.batch(0, NUM_ROWS))


def test_the_number_of_processes_and_the_micro_batch_change_nothing(encode: Encode, trainer: Callable[..., _Trainer]):
    online = trainer(encode(), **ONLINE)
    whole = _seen(*online.batch(2, 12))
    parts: dict[str, bytes] = {}
    for rank in range(4):
        parts |= _seen(*online.batch(2, 12, rank, 4))
    assert parts == whole


def test_only_some_may_be_online(encode: Encode, trainer: Callable[..., _Trainer]):
    prefix = encode()
    stored = _seen(*trainer(prefix).batch(1))
    for name, value in ONLINE.items():
        some = trainer(prefix, **{name: value})
        assert _seen(*some.batch(1)) == stored, name
        assert some.conditioner is not None
        assert (some.conditioner.vae is None, some.conditioner.text is None) == (
            name == "text_source",
            name != "text_source",
        )


def test_another_precision_is_close_and_no_longer_equal(encode: Encode, trainer: Callable[..., _Trainer]):
    prefix = encode()
    exact = trainer(prefix, **ONLINE).batch(0)[0]
    rough = trainer(prefix, **ONLINE, encoder_precision="bf16").batch(0)[0]
    for name in ("moments", "masked_moments", "text_embeddings"):
        expected, found = getattr(exact, name), getattr(rough, name)
        assert expected.dtype == found.dtype == torch.float16
        assert not torch.equal(expected, found), name
        assert (expected - found).float().abs().mean() < 0.05 * expected.float().abs().mean(), name


# ---------------------------------------------------------------------------------------------------------------- masks


def test_every_visit_has_a_mask_that_was_not_seen_before():
    uids = [uid_of(f"http://pictures.test/{index}", "") for index in range(50)]
    for num_stored in (0, 1, 3):
        met = np.array([variants_of(uids, [epoch] * len(uids), num_stored) for epoch in range(7)])
        assert all(len(set(variants)) == 7 for variants in met.T)
        if num_stored:
            assert (np.sort(met[:num_stored], axis=0) == np.arange(num_stored)[:, None]).all(), "first the stored ones"


def test_masks_are_those_of_the_family_that_training_names(encode: Encode, trainer: Callable[..., _Trainer]):
    prefix = encode(num_mask_variants=0)
    for family in (None, "sd_512train_large", "full"):
        online = trainer(prefix, mask_source="online", mask_family=family, full_mask=0)
        (batch, _), name = online.batch(NUM_ROWS, 1), family or "lama_train_256"
        assert batch.epochs == (1,)
        assert batch.mask is not None
        assert batch.masked_moments is not None
        expected = to_latent_mask(draw_mask(name, SIDE_PX, online.dataset.specs.masks.seed, batch.uids[0], 1))
        assert np.array_equal(batch.mask[0, 0].numpy(), expected)
        is_constant = torch.equal(batch.masked_moments[0], online.dataset.constants.full_mask_moments)
        assert is_constant == (family == "full")


def test_what_is_replaced_is_not_encoded(encode: Encode, trainer: Callable[..., _Trainer]):
    online = trainer(encode(), **ONLINE | {"moments_source": "cached"})
    assert online.conditioner is not None
    vae, text = online.conditioner.vae, online.conditioner.text
    assert vae is not None
    assert text is not None
    calls = {"vae": 0, "text": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    vae.encoder.register_forward_pre_hook(count("vae"))
    text.clip.ln_final.register_forward_pre_hook(count("text"))
    batch, draws = online.batch(0, 20)
    num_partial = int((~draws.is_full_mask).sum())
    assert num_partial <= 16 < len(batch), "16 pictures of 64 px go through the VAE at once"
    assert calls == {"vae": 1, "text": 1}
    stored = online.dataset.batch_at(0, seed=3, global_batch_size=20)
    everywhere = torch.ones(20, dtype=torch.bool)
    made = online.conditioner.complete(stored, replace(draws, is_full_mask=everywhere, drops_text=everywhere))
    assert calls == {"vae": 1, "text": 1}
    assert made.mask is not None
    assert made.text_embeddings is not None
    assert bool((made.mask == 1).all())
    assert torch.equal(made.text_embeddings[7], online.dataset.constants.null_text_embedding)


# ------------------------------------------------------------------------------------------------------------ real runs


def _run(store: ObjectStore, prefix: str, model: ModelConfig, **fields: Any) -> RunSpec:
    small = {"global_batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-3, "checkpoint_every_steps": 3}
    config, digest = _train(**small, **fields), load_manifest(store, prefix).digest
    run_id = run_id_of("test", run_digest(config, model, digest))
    return RunSpec(run_id=run_id, store_uri=store.uri, dataset_prefix=prefix, model=model, train=config)


@pytest.mark.soak
def test_a_run_that_was_interrupted_ends_the_same(
    encode: Encode, encoded_store: ObjectStore, tiny_model: ModelConfig, tmp_path: Path
):
    """Two epochs; then again, from the checkpoint in their middle."""
    run, told, weights = _run(encoded_store, encode(), tiny_model, **ONLINE), [], []
    for name in ("started", "resumed"):
        events: list[dict[str, Any]] = []
        result = train(run, workdir=tmp_path / name, on_event=events.append)
        assert events[0]["event"] == name
        told.append(encoded_store.read(f"{run_prefix(run.run_id)}/metrics.jsonl").splitlines())
        weights.append(encoded_store.read(f"{result.checkpoint_prefix}/ema/diffusion_pytorch_model.safetensors"))
        for info in list(encoded_store.list(f"{checkpoint_prefix(run.run_id, run.train.num_steps)}/")):
            encoded_store.delete(info.key)
    first, second = ([json.loads(line)["loss"].hex() for line in lines] for lines in told)
    assert len(set(first)) == run.train.num_steps
    assert first == second
    assert weights[0] == weights[1]


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("encoded", "asked", "message"),
    [
        ({"num_mask_variants": 0}, {}, "train.mask_source: 'cached', but D stores no masks; set it to 'online', or"),
        ({"image": "none"}, {"mask_source": "online"}, "train.mask_source: 'online', but D keeps no pictures"),
        ({"text": "token_ids"}, {}, "train.text_source: 'embeddings', but D stores no text embeddings; set it to 'tok"),
        ({}, {"text_source": "token_ids"}, "train.text_source: 'token_ids', but D stores no token ids; .*or 'both'"),
        ({"moments": False}, {}, "train.moments_source: 'cached', but D stores no moments; set it to 'online', or"),
        ({"image": "none"}, {"moments_source": "online"}, "train.moments_source: 'online', but D keeps no pictures"),
    ],
)
def test_what_is_lacking_is_said_with_both_sides(encoded: dict[str, Any], asked: dict[str, Any], message: str):
    columns = encoded_columns(EncodeConfig(**encoded))
    with pytest.raises(ContractError, match=message):
        check_conditioning(_train(**asked), columns, "lama_train_256", "D")


def test_masks_that_were_files_cannot_be_drawn():
    columns = encoded_columns(EncodeConfig())  # pyright: ignore[reportCallIssue]  # every field has a default
    with pytest.raises(ContractError, match=r"'online', but D does not hold the files .*, or train\.mask_family"):
        check_conditioning(_train(mask_source="online"), columns, "user", "D")
    check_conditioning(_train(mask_source="online", mask_family=MASK_FAMILIES[1]), columns, "user", "D")


def test_a_family_without_masks_to_draw_is_a_mistake():
    with pytest.raises(ValueError, match=r"train\.mask_family: 'full', but mask_source is 'cached'"):
        _train(mask_family="full")


def test_a_plan_says_it_before_anything_is_made(tmp_path: Path):
    config = load_config("demo", ["encode.num_mask_variants=0"])
    with pytest.raises(ContractError, match="'cached', but the dataset that `encode` is to make stores no masks"):
        make_plan(config, str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_a_run_on_a_dataset_that_lacks_something_is_refused(
    encode: Encode, encoded_store: ObjectStore, tiny_model: ModelConfig, tmp_path: Path
):
    """By the flow, before any process starts; and by each process, which others may start."""
    prefix = encode(**LEAN)
    config = load_config("demo", [f"train.dataset={encoded_store.uri_of(prefix)}", f"model.base={tiny_model.base}"])
    message = f"train.mask_source: 'cached', but {prefix} stores no masks; set it to 'online', or encode with"
    with pytest.raises(ContractError, match=message):
        run_spec(config, encoded_store.uri, prefix, load_manifest(encoded_store, prefix))
    with pytest.raises(ContractError, match=r"training asks for mask_0, and .* stores image, token_ids"):
        open_dataset(encoded_store, prefix, tmp_path, fields=fields_of(config.train))
