"""The learning rate: a function of the step, with the values of the models' cards."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from training.config import LrScheduleConfig, TrainConfig
from training.lr_schedule import learning_rate_at


def config(**train: Any) -> TrainConfig:
    required = {"prediction_type": "v_prediction", "mask_source": "cached", "seed": 0, "num_steps": 1000}
    return TrainConfig(**(required | train))


def test_the_cards_courses():
    stable_diffusion_2 = config(learning_rate=1e-4, warmup_steps=10_000)
    assert learning_rate_at(stable_diffusion_2, 0) == pytest.approx(1e-8)
    assert learning_rate_at(stable_diffusion_2, 4_999) == pytest.approx(5e-5)
    assert {learning_rate_at(stable_diffusion_2, step) for step in (9_999, 10_000, 10**6)} == {1e-4}
    # The first inpainting model: LambdaLinearScheduler with f_start 1e-6, f_max 1, 2500 steps, then constant.
    first = config(learning_rate=7.5e-5, warmup_steps=2_500, lr_schedule={"warmup_start_factor": 1e-6})
    for step in (0, 1, 1_000, 2_499):
        assert learning_rate_at(first, step) == pytest.approx(7.5e-5 * ((1 - 1e-6) / 2_500 * step + 1e-6), rel=1e-12)
    assert learning_rate_at(first, 2_500) == learning_rate_at(first, 400_000) == 7.5e-5


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_falling_courses_are_torchs(kind: str):
    """Without a warm-up, against torch's own schedulers."""
    import torch

    train = config(learning_rate=3e-4, warmup_steps=0, num_steps=40, lr_schedule={"kind": kind, "final_factor": 0.1})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    if kind == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=3e-5)
    else:
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.1, total_iters=40)
    for step in range(40):
        assert learning_rate_at(train, step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


@given(
    kind=st.sampled_from(["constant", "cosine", "linear"]),
    warmup=st.integers(0, 50),
    extra=st.integers(1, 200),
    final=st.floats(0, 1),
    start=st.none() | st.floats(0, 1),
)
def test_it_rises_to_the_rate_and_falls_to_its_end(kind: Any, warmup: int, extra: int, final: float, start: Any):
    schedule = LrScheduleConfig(kind=kind, final_factor=final, warmup_start_factor=start)
    train = config(learning_rate=1.0, warmup_steps=warmup, num_steps=warmup + extra, lr_schedule=schedule)
    rates = [learning_rate_at(train, step) for step in range(train.num_steps + 1)]
    assert all(math.isfinite(rate) and 0 <= rate <= 1 for rate in rates)
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup] == 1.0
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[-1] == pytest.approx(1.0 if kind == "constant" else final, abs=1e-12)
    if kind != "constant":
        assert rates[-2] > 0, "the last step still learns"


def test_what_a_user_writes():
    assert config(warmup_steps=10, lr_schedule="cosine").lr_schedule == LrScheduleConfig(kind="cosine")
    with pytest.raises(ValidationError, match="kind"):
        config(lr_schedule="cosinus")
    with pytest.raises(ValidationError, match="make warmup_steps smaller"):
        config(lr_schedule="linear", warmup_steps=1000)
    assert "lr_schedule" not in config().digest_fields(), "at its default older runs stay valid"
    assert config(warmup_steps=1, lr_schedule="linear").digest_fields()["lr_schedule"]["kind"] == "linear"
