"""On a GPU: trainings through the product's own launcher, in bf16 under each ZeRO stage, and in channels_last."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.storage import ObjectStore
from tests.training.conftest import make_dataset, make_run, store, tiny_model, tiny_model_dir
from training.flops import peak_flops_per_s
from training.launch import train
from training.runspec import RunSpec, checkpoint_prefix, run_prefix

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

__all__ = ["make_dataset", "make_run", "store", "tiny_model", "tiny_model_dir"]  # fixtures
MakeRun = Callable[..., RunSpec]


@pytest.fixture(autouse=True)
def _on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")


def _losses(store: ObjectStore, run: RunSpec) -> list[dict[str, Any]]:
    return [json.loads(line) for line in store.read(f"{run_prefix(run.run_id)}/metrics.jsonl").splitlines()]


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_training_in_bf16(zero_stage: int, make_run: MakeRun, store: ObjectStore, tmp_path: Path):
    run = make_run(precision="bf16", zero_stage=zero_stage, num_steps=6, checkpoint_every_steps=3)
    events: list[dict[str, Any]] = []
    train(run, workdir=tmp_path / "work", on_event=events.append)
    lines = _losses(store, run)
    assert [line["step"] for line in lines] == [*range(1, 7)]
    last = [event for event in events if event["event"] == "step"][-1]
    assert last["left_s"] == 0
    if peak_flops_per_s(torch.cuda.get_device_name(), "bf16") is not None:
        assert 0 < last["mfu"] < 1
        assert all(0 < line["mfu"] < 1 for line in lines)
    assert store.read(f"{checkpoint_prefix(run.run_id, 6)}/MANIFEST.json")


def test_channels_last_is_the_same_training(make_run: MakeRun, store: ObjectStore, tmp_path: Path):
    losses = {}
    for channels_last in (False, True):
        run = make_run(precision="fp32", num_steps=4, checkpoint_every_steps=4, channels_last=channels_last)
        train(run, workdir=tmp_path / str(channels_last), on_event=lambda _: None)
        losses[channels_last] = [line["loss"] for line in _losses(store, run)]
        for info in list(store.list(f"{run_prefix(run.run_id)}/")):
            store.delete(info.key)
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
