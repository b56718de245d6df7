"""Real training in real processes: it learns, it survives being killed, and it says what is wrong."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.bundles import fetch_bundle, list_bundles
from infra.errors import ContractError, GateError, TransientError
from infra.storage import ObjectStore
from model.schedule import alphas_cumprod
from model.unet import load_unet, widen_conv_in
from training.data import open_dataset
from training.launch import train
from training.loss_tally import describe, tally
from training.runspec import RunSpec, checkpoint_prefix, checkpoints_prefix, run_prefix, step_of
from training.step import draw, training_loss

MakeRun = Callable[..., RunSpec]
LONG = {"num_steps": 30, "checkpoint_every_steps": 10, "learning_rate": 3e-3, "global_batch_size": 16}

DRIVER = """
import json, sys
from pathlib import Path
from training.launch import train
from training.runspec import RunSpec

if __name__ == "__main__":
    run = RunSpec.model_validate_json(Path(sys.argv[1]).read_text())
    train(run, workdir=Path(sys.argv[2]), on_event=lambda event: print(json.dumps(event), flush=True))
"""


def _metrics(store: ObjectStore, run: RunSpec) -> list[dict[str, Any]]:
    return [json.loads(line) for line in store.read(f"{run_prefix(run.run_id)}/metrics.jsonl").splitlines()]


def _weights(store: ObjectStore, run: RunSpec) -> dict[str, bytes]:
    prefix = checkpoint_prefix(run.run_id, run.train.num_steps)
    names = ("ema/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors")
    return {name: store.read(f"{prefix}/{name}") for name in names}


def _steps(store: ObjectStore, run: RunSpec) -> list[int]:
    return [step_of(prefix) for prefix in list_bundles(store, checkpoints_prefix(run.run_id))]


def _forget(store: ObjectStore, run: RunSpec) -> None:
    for info in list(store.list(f"{run_prefix(run.run_id)}/")):
        store.delete(info.key)


def _stop_after_first_checkpoint(run: RunSpec, folder: Path, number: signal.Signals) -> int:
    """Trains in a process group of its own, and sends it a signal as soon as its first checkpoint stands."""
    folder.mkdir()
    (folder / "driver.py").write_text(DRIVER)
    (folder / "spec.json").write_text(run.model_dump_json())
    argv = [sys.executable, str(folder / "driver.py"), str(folder / "spec.json"), str(folder / "work")]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True, env=env) as driver:
        assert driver.stdout is not None
        for line in driver.stdout:
            if json.loads(line)["event"] == "checkpoint":
                os.killpg(driver.pid, number)
                break
        driver.stdout.read()
        return driver.wait()


def _tallies(store: ObjectStore, run: RunSpec) -> list[dict[str, Any]]:
    names = ("step", "loss_by_timestep", "loss_by_mask")
    return [{name: line[name] for name in names} for line in _metrics(store, run) if "loss_by_mask" in line]


@pytest.mark.soak
def test_two_processes_learn_and_a_killed_run_ends_the_same(make_run: MakeRun, store: ObjectStore, tmp_path: Path):
    run = make_run(num_processes=2, **LONG)
    events: list[dict[str, Any]] = []
    result = train(run, workdir=tmp_path / "whole", on_event=events.append)
    assert (result.step, result.was_done) == (30, False)
    losses = [line["loss"] for line in _metrics(store, run)]
    assert len(losses) == 30
    assert sum(losses[15:]) / 15 < 0.85 * sum(losses[:5]) / 5
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [10, 20, 30]
    assert events[-1]["event"] == "done"
    whole = _weights(store, run)
    tallies = _tallies(store, run)
    assert [line["step"] for line in tallies] == [10, 20, 30]
    for i, line in enumerate(tallies):
        mean = sum(losses[10 * i : 10 * (i + 1)]) / 10
        for groups in (line["loss_by_timestep"].values(), line["loss_by_mask"].values()):
            assert sum(group["num_samples"] for group in groups) == 10 * 16, "of both ranks"
            total = sum(group["mean"] * group["num_samples"] for group in groups if group["num_samples"])
            assert total / 160 == pytest.approx(mean, rel=1e-12)
        assert 10 < line["loss_by_mask"]["full"]["num_samples"] < 80

    again = train(run, workdir=tmp_path / "again", on_event=events.append)
    assert (again.was_done, again.checkpoint_prefix) == (True, result.checkpoint_prefix)
    assert not (tmp_path / "again").exists()

    _forget(store, run)
    assert _stop_after_first_checkpoint(run, tmp_path / "killed", signal.SIGKILL) == -signal.SIGKILL
    assert max(_steps(store, run)) < 30, "it was killed too late to show anything"
    events.clear()
    train(run, workdir=tmp_path / "resumed", on_event=events.append)
    assert events[0]["event"] == "resumed"
    assert events[0]["step"] in (10, 20)
    assert [line["loss"] for line in _metrics(store, run)] == losses
    assert _tallies(store, run) == tallies
    assert _weights(store, run) == whole


def test_interrupted_run_leaves_a_checkpoint_and_a_damaged_one_is_passed_over(
    make_run: MakeRun, store: ObjectStore, tmp_path: Path
):
    run = make_run(**LONG, zero_stage=2, gradient_clipping=0.0)
    train(run, workdir=tmp_path / "whole", on_event=lambda _: None)
    whole = _weights(store, run)
    _forget(store, run)

    # Ctrl-C: the children finish their step, write a checkpoint, and end.
    code = _stop_after_first_checkpoint(run, tmp_path / "interrupted", signal.SIGINT)
    assert code in (-signal.SIGINT, 130)
    interrupted_at = max(_steps(store, run))
    assert 10 < interrupted_at < 30
    assert len(_metrics(store, run)) == interrupted_at

    damaged = store.local_path(f"{checkpoint_prefix(run.run_id, interrupted_at)}/state.json")
    assert damaged is not None
    damaged.chmod(0o644)
    damaged.write_bytes(damaged.read_bytes().replace(b'"step"', b'"stop"'))
    events: list[dict[str, Any]] = []
    train(run, workdir=tmp_path / "resumed", on_event=events.append)
    assert events[0] == {"event": "resumed", "step": _before(interrupted_at), "num_steps": 30}
    assert "CHECKPOINT DAMAGED" in (tmp_path / "resumed" / "rank-0.log").read_text()
    assert _weights(store, run) == whole
    assert len(_metrics(store, run)) == 30


def test_the_configured_objective_is_the_one_that_is_trained(make_run: MakeRun, store: ObjectStore, tmp_path: Path):
    """The first step of a run with min-SNR-γ and a zero terminal SNR, against the same loss taken here."""
    run = make_run(num_steps=1, micro_batch_size=8, min_snr_gamma=5.0, zero_terminal_snr=True)
    train(run, workdir=tmp_path / "work", on_event=lambda _: None)
    (line,) = _metrics(store, run)

    dataset = open_dataset(store, run.dataset_prefix, tmp_path / "cache")
    batch = dataset.batch_at(0, seed=run.train.seed, global_batch_size=8, rank=0, world_size=1)
    latents = dataset.specs.latents
    draws = draw(
        batch.uids,
        seed=run.train.seed,
        step=0,
        latent_shape=(latents.channels, latents.latent_px, latents.latent_px),
        num_timesteps=1000,
        text_dropout=run.train.text_dropout,
        full_mask=run.train.full_mask,
    )
    expected = training_loss(
        widen_conv_in(load_unet(run.model.directory / "unet")),
        batch,
        draws,
        dataset.constants,
        prediction_type="v_prediction",
        scaling_factor=latents.scaling_factor,
        alphas_cumprod=alphas_cumprod(zero_terminal_snr=True),
        device=torch.device("cpu"),
        min_snr_gamma=5.0,
    )
    assert line["loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    told = describe(tally(expected.per_sample, expected.timesteps, expected.is_full_mask, 1000), 1000)
    for name in ("loss_by_timestep", "loss_by_mask"):
        for group, figures in told[name].items():
            assert line[name][group]["num_samples"] == figures["num_samples"]
            assert line[name][group]["mean"] == (figures["mean"] and pytest.approx(figures["mean"], rel=1e-5))
    assert line["loss"] < 0.9 * expected.per_sample.mean().item(), "what is told by timestep is not weighted"


def _before(step: int) -> int:
    """The last regular checkpoint before a step."""
    return (step - 1) // 10 * 10


def test_checkpoint_is_a_diffusers_model(make_run: MakeRun, store: ObjectStore, tmp_path: Path):
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    run = make_run(num_steps=2, zero_stage=0, precision="bf16", gradient_clipping=0.5)
    result = train(run, workdir=tmp_path / "work", on_event=lambda _: None)
    fetch_bundle(store, result.checkpoint_prefix, tmp_path / "fetched")
    for name in ("ema", "unet"):
        unet = UNet2DConditionModel.from_pretrained(str(tmp_path / "fetched" / name), use_safetensors=True)
        assert isinstance(unet, UNet2DConditionModel)
        assert unet.config["in_channels"] == 9
    config = json.loads(store.read(f"{run_prefix(run.run_id)}/config.json"))
    assert config["train"]["num_steps"] == 2
    assert len(config["digest"]) == 64
    assert not list((tmp_path / "work" / "scratch").iterdir()), "scratch is left behind"


def test_a_non_finite_loss_stops_the_run_and_names_the_sample(
    make_run: MakeRun, make_dataset: Callable[..., str], store: ObjectStore, tmp_path: Path
):
    run = make_run(prefix=make_dataset(store, (8,), poison=float("nan")), num_steps=3)
    with pytest.raises(GateError, match=r"the loss of step 0 is not finite; [12] samples: [0-9a-f]{32}"):
        train(run, workdir=tmp_path / "work", on_event=lambda _: None)
    assert _steps(store, run) == []


def test_a_training_that_the_kernel_kills_says_what_to_lower(make_run: MakeRun, tmp_path: Path):
    run = make_run(num_steps=10**5, checkpoint_every_steps=10**5)

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "started":
            for command in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    line = command.read_bytes()
                    if b"-m\0training.main" in line and str(tmp_path).encode() in line and b"guard" not in line:
                        os.kill(int(command.parent.name), signal.SIGKILL)

    expected = r"rank 0 was killed by SIGKILL .*lower train\.micro_batch_size \(4\)"
    with pytest.raises(TransientError, match=expected):
        train(run, workdir=tmp_path / "work", on_event=kill)


@pytest.mark.soak  # fifty steps; `test_health.py` has the rule itself
def test_a_learning_rate_that_changes_nothing_ends_the_run(make_run: MakeRun, tmp_path: Path):
    run = make_run(num_steps=200, checkpoint_every_steps=200, learning_rate=1e-30, warmup_steps=0)
    with pytest.raises(GateError, match=r"steps 1 to 50 changed \d+ of the UNet's \d+ parameters, with"):
        train(run, workdir=tmp_path / "work", on_event=lambda _: None)


def test_specs_that_do_not_fit_are_a_contract_error_here(
    make_run: MakeRun, make_dataset: Callable[..., str], store: ObjectStore, tmp_path: Path
):
    run = make_run(prefix=make_dataset(store, (8,), text={"width": 8}))
    with pytest.raises(ContractError, match="text width: the dataset was encoded with 8"):
        train(run, workdir=tmp_path / "work", on_event=lambda _: None)
