"""The parts of the health policy, one by one; `test_faults` shows them at work."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from infra.errors import GateError
from training.config import TrainConfig
from training.health import MAX_ROLLBACKS, WATCHED_STEPS, Rollbacks, Skips, WeightsWatch, all_finite, check_trainable
from training.loss_scale import GROWTH_STEPS, HIGHEST, INITIAL, LOWEST, LossScale
from training.memory import shortage_told


def config(**train: Any) -> TrainConfig:
    required = {"prediction_type": "v_prediction", "mask_source": "cached", "seed": 0, "num_steps": 1000}
    return TrainConfig(**(required | train))


@given(bad=st.lists(st.booleans(), max_size=30), back=st.integers(0, 30))
def test_skips_say_what_was_passed_over(bad: list[bool], back: int):
    skips, expected = Skips(), set[int]()
    for i, is_bad in enumerate(bad):
        skips = skips.with_bad_step(2 * i, 2 * i + 2) if is_bad else skips.with_good_step()
        expected |= {2 * i, 2 * i + 1} if is_bad else set()
    assert skips.num_steps == sum(bad)
    in_a_row = next((i for i, is_bad in enumerate(reversed(bad)) if not is_bad), len(bad))
    assert skips.num_bad_in_a_row == in_a_row
    first, end = 2 * min(back, len(bad)), 2 * len(bad)
    rolled_back = skips.with_rollback(first, end)
    for found, positions in ((skips, expected), (rolled_back, expected | set(range(first, end)))):
        assert {position for range_ in found.positions for position in range(*range_)} == positions
        flat = [edge for range_ in found.positions for edge in range_]
        assert flat == sorted(set(flat)), "in order, apart, none empty"
    assert (rolled_back.num_rollbacks, rolled_back.num_bad_in_a_row) == (1, 0)
    assert Skips.model_validate_json(rolled_back.model_dump_json()) == rolled_back


def test_a_rollback_that_did_not_help_ends_the_run():
    rollbacks = Rollbacks()
    rollbacks.check("loss", 7, 5, ["a"])
    rollbacks.check("gradient", 7, 5, ["a"])  # another kind has a chance of its own
    rollbacks.check("loss", 8, 5, ["a"])  # it got further
    with pytest.raises(GateError, match=r"^the loss of step 8 is not finite; 1 samples: a\. .* of step 5"):
        rollbacks.check("loss", 8, 5, ["a"])
    rollbacks.forget()
    rollbacks.check("loss", 8, 8, ["a"])


def test_rollbacks_to_one_checkpoint_end():
    rollbacks = Rollbacks()
    for step in range(MAX_ROLLBACKS):
        rollbacks.check("loss", step, 0, [])
    with pytest.raises(GateError, match="the loss of step 99 is not finite"):
        rollbacks.check("loss", 99, 0, [])


@pytest.mark.parametrize(
    ("value", "is_finite"), [(0.0, True), (3e38, True), (math.nan, False), (math.inf, False), (-math.inf, False)]
)
def test_all_finite(value: float, is_finite: bool):
    tensors = [torch.ones(5), torch.full((3, 2), value)]
    assert all_finite(tensors) == is_finite
    assert all_finite(tensors[:1])


def test_weights_that_do_not_change_are_noticed_within_100_steps(caplog: pytest.LogCaptureFixture):
    module = nn.Linear(3, 2)
    watch = WeightsWatch(module, config(learning_rate=1e-30))
    problems = [watch.note(step, 1e-30) for step in range(1, WATCHED_STEPS + 1)]
    assert WATCHED_STEPS <= 100
    assert problems[:-1] == [None] * (WATCHED_STEPS - 1)
    assert problems[-1] is not None
    assert "changed 0 of the UNet's 2 parameters, with a learning rate of at most 1e-30" in problems[-1]
    for step in range(1, WATCHED_STEPS + 1):
        with torch.no_grad():
            module.bias[0] = torch.nextafter(module.bias[0], torch.tensor(9.0))
        assert watch.note(step, 1e-30) is None, "the smallest change counts"
    assert "did not change 1 of the UNet's 2 parameters: weight" in caplog.text


def test_weights_may_stand_still_at_the_end_of_a_falling_rate():
    train = config(learning_rate=1e-3, warmup_steps=0, lr_schedule="linear")
    watch = WeightsWatch(nn.Linear(3, 2), train)
    assert all(watch.note(900 + step, 1e-9) is None for step in range(WATCHED_STEPS))
    assert any(watch.note(step, 1e-4) is not None for step in range(WATCHED_STEPS))
    assert any(watch.note(step, 0.0) is not None for step in range(WATCHED_STEPS)), "a rate of 0 is an accident"


def test_a_frozen_parameter_is_refused():
    module = nn.Linear(3, 2)
    check_trainable(module)
    module.bias.requires_grad_(False)
    with pytest.raises(GateError, match="1 of the UNet's parameters are frozen and would never change: bias"):
        check_trainable(module)


def test_the_loss_scale_falls_and_rises():
    scale = LossScale()
    assert scale.lower()
    assert scale.value == INITIAL / 2
    for _ in range(GROWTH_STEPS):
        scale.note_good()
    assert (scale.value, scale.num_good_steps) == (INITIAL, 0)
    scale.value = LOWEST
    assert not scale.lower(), "at its lowest it is not to blame"
    scale.value = HIGHEST
    for _ in range(GROWTH_STEPS):
        scale.note_good()
    assert scale.value == HIGHEST


def test_want_of_memory_says_what_to_lower():
    train = config(micro_batch_size=32, num_processes=2)
    expected = r"micro_batch_size \(32\).*activation_checkpointing to true.*precision to bf16.*zero_stage \(1\) to 2"
    with pytest.raises(ValueError, match=f"^the memory is too small: .*{expected}") as caught, shortage_told(train):
        torch.empty(1 << 60)  # torch's own words on the CPU
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=f"^the GPU's memory is too small: .*{expected}"), shortage_told(train):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")
    with pytest.raises(RuntimeError, match="another"), shortage_told(train):
        raise RuntimeError("another")
