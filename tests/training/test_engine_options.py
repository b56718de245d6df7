"""Each way of doing the same sums faster, or with less memory, against the plain one."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load
from torch import Tensor

from infra.storage import ObjectStore
from tests.training.forked_ranks import Ranks
from training.config import TrainConfig
from training.runspec import RunSpec, checkpoint_prefix, run_prefix

MakeRun = Callable[..., RunSpec]

NUM_STEPS = 4
PLAIN: dict[str, Any] = {"num_steps": NUM_STEPS, "checkpoint_every_steps": 2, "keep_last": 9, "precision": "fp32"}
HARNESS = "tests.training.run_harness:main"
WEIGHTS = "diffusion_pytorch_model.safetensors"
EXACT = 0.0
CLOSE = 1e-3
"""Of the root mean square of what the weights change by. Sums in another order are off by 1e-7, and AdamW makes more of
that where a gradient is nothing but such noise, as that of a bias before a normalization: its steps are no smaller."""

SAME_SUMS: dict[str, tuple[dict[str, Any], float]] = {
    "activation_checkpointing": ({"activation_checkpointing": True}, EXACT),
    "zero_stage 0": ({"zero_stage": 0}, EXACT),
    "zero_stage 2": ({"zero_stage": 2}, EXACT),
    "channels_last, zero_stage 1": ({"channels_last": True}, CLOSE),
    "channels_last, zero_stage 0": ({"channels_last": True, "zero_stage": 0}, CLOSE),
    "plain attention": ({"attention": "plain"}, CLOSE),
    "fused optimizer": ({"fused_optimizer": True}, CLOSE),
    "optimizer offload, zero_stage 1": ({"optimizer_offload": "cpu"}, CLOSE),
    "optimizer offload, zero_stage 2": ({"optimizer_offload": "cpu", "zero_stage": 2}, CLOSE),
}
COMPILED: dict[str, tuple[dict[str, Any], float]] = {
    "regional compilation": ({"compile": "regional"}, CLOSE),
    "whole compilation": ({"compile": "whole"}, CLOSE),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as ranks:
        yield ranks


def _train(ranks: Ranks, runs: list[RunSpec], folder: Path) -> None:
    spec = {"runs": [run.model_dump(mode="json") for run in runs]}
    started = ranks.start(spec, folder, runs[0].train.num_processes, HARNESS)
    assert not any(ranks.wait(started)), started.log()


def _tensors(store: ObjectStore, run: RunSpec, name: str, step: int = NUM_STEPS) -> dict[str, Tensor]:
    return load(store.read(f"{checkpoint_prefix(run.run_id, step)}/{name}"))


def _lines(store: ObjectStore, run: RunSpec) -> list[dict[str, Any]]:
    return [json.loads(line) for line in store.read(f"{run_prefix(run.run_id)}/metrics.jsonl").splitlines()]


def _named(run: RunSpec, name: str) -> RunSpec:
    return run.model_copy(update={"run_id": name.replace(" ", "-").replace(",", "")})


def test_the_same_result(make_run: MakeRun, store: ObjectStore, tmp_path: Path, ranks: Ranks):
    _compare(SAME_SUMS, make_run, store, tmp_path, ranks)


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_the_same_result_compiled(make_run: MakeRun, store: ObjectStore, tmp_path: Path, ranks: Ranks):
    _compare(COMPILED, make_run, store, tmp_path, ranks)


def _compare(
    options: dict[str, tuple[dict[str, Any], float]],
    make_run: MakeRun,
    store: ObjectStore,
    tmp_path: Path,
    ranks: Ranks,
) -> None:
    plain = _named(make_run(**PLAIN), "plain")
    runs = {name: _named(make_run(**(PLAIN | fields)), name) for name, (fields, _) in options.items()}
    _train(ranks, [plain, *runs.values()], tmp_path / "work")
    expected = _tensors(store, plain, f"unet/{WEIGHTS}")
    first = _tensors(store, plain, f"unet/{WEIGHTS}", 2)
    change = _distance(expected, first)
    assert change > 1e-4, "something is learned"
    for name, run in runs.items():
        tolerance = options[name][1]
        found = _tensors(store, run, f"unet/{WEIGHTS}")
        distance = _distance(found, expected) / change
        print(f"\n{name}: off by {distance:.1e} of the change", end="", flush=True)  # noqa: T201
        assert distance <= tolerance, name
        for line, plain_line in zip(_lines(store, run), _lines(store, plain), strict=True):
            assert line["loss"] == pytest.approx(plain_line["loss"], rel=1e-5), name
            assert line["grad_norm"] == pytest.approx(plain_line["grad_norm"], rel=1e-4), name


def _distance(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """Root mean square over all elements."""
    squares = [(some[name] - others[name]).double().square() for name in others]
    return math.sqrt(sum(part.sum().item() for part in squares) / sum(part.numel() for part in squares))


def test_what_only_changes_how_fast_it_is_leaves_the_run_its_name():
    required: dict[str, Any] = {"prediction_type": "v_prediction", "mask_source": "cached", "seed": 0, "num_steps": 9}
    plain = TrainConfig(**required).digest_fields()
    for fields, _ in (*SAME_SUMS.values(), *COMPILED.values()):
        assert TrainConfig(**(required | fields)).digest_fields() == plain, fields
    others: list[dict[str, Any]] = [
        {"precision": "fp16"},
        {"ema_start_step": 5},
        {"lr_schedule": "cosine", "warmup_steps": 1},
    ]
    for fields in others:
        assert TrainConfig(**(required | fields)).digest_fields() != plain, fields


def test_fp16_learns_and_goes_on_with_its_scale(make_run: MakeRun, store: ObjectStore, tmp_path: Path, ranks: Ranks):
    plain = _named(make_run(**PLAIN), "plain")
    fields = PLAIN | {"precision": "fp16"}
    half = {stage: _named(make_run(**(fields | {"zero_stage": stage})), f"fp16-{stage}") for stage in (0, 1)}
    _train(ranks, [plain, *half.values()], tmp_path / "work")
    for run in half.values():
        for line, plain_line in zip(_lines(store, run), _lines(store, plain), strict=True):
            assert line["loss"] == pytest.approx(plain_line["loss"], rel=2e-2)
            assert line["grad_norm"] == pytest.approx(plain_line["grad_norm"], rel=5e-2)
            assert line["loss_scale"] >= 1
        assert all(value.isfinite().all() for value in _tensors(store, run, f"ema/{WEIGHTS}").values())
        state = json.loads(store.read(f"{checkpoint_prefix(run.run_id, NUM_STEPS)}/state.json"))
        assert state["loss_scale"] == [_lines(store, run)[-1]["loss_scale"], NUM_STEPS]

    run = half[1]
    whole = _trained(store, run)
    for key in [info.key for info in store.list(f"{checkpoint_prefix(run.run_id, NUM_STEPS)}/")]:
        store.delete(key)
    store.delete(f"{run_prefix(run.run_id)}/channels/newest.json")
    _train(ranks, [run], tmp_path / "resumed")
    assert _trained(store, run) == whole


def _trained(store: ObjectStore, run: RunSpec) -> dict[str, bytes]:
    prefix = checkpoint_prefix(run.run_id, NUM_STEPS)
    keys = [info.key for info in store.list(f"{prefix}/") if not info.key.endswith("MANIFEST.json")]
    return {key: store.read(key) for key in keys}


def test_the_average_starts_when_it_is_told(make_run: MakeRun, store: ObjectStore, tmp_path: Path, ranks: Ranks):
    run = make_run(**(PLAIN | {"ema_start_step": 2, "ema_decay": 0.5}))
    _train(ranks, [run], tmp_path / "work")
    for step in (2, NUM_STEPS):
        weights, average = (_tensors(store, run, f"{part}/{WEIGHTS}", step) for part in ("unet", "ema"))
        is_equal = all(torch.equal(weights[name], average[name]) for name in weights)
        assert is_equal == (step == 2)
    state = json.loads(store.read(f"{checkpoint_prefix(run.run_id, NUM_STEPS)}/state.json"))
    assert state["ema_num_updates"] == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"zero_stage": 3}, "the moving average of every step reads them whole; set it to 2"),
        ({"zero_stage": 0, "optimizer_offload": "cpu"}, "goes with train.zero_stage 1 or 2"),
        ({"precision": "fp16", "optimizer_offload": "cpu"}, "does not go with train.optimizer_offload"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], message: str):
    required: dict[str, Any] = {"prediction_type": "v_prediction", "mask_source": "cached", "seed": 0, "num_steps": 9}
    with pytest.raises(ValidationError, match=message):
        TrainConfig(**(required | fields))
