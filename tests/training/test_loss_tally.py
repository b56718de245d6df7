"""Tallies are exact, add up in any grouping, and say which timesteps and masks the loss came from."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.loss_tally import bucket_names, describe, tally

samples = st.lists(st.tuples(st.floats(0, 1e4, width=32), st.integers(0, 999), st.booleans()), min_size=1, max_size=30)


def _tally(rows: list[tuple[float, int, bool]]) -> torch.Tensor:
    losses, timesteps, is_full = zip(*rows, strict=True)
    return tally(torch.tensor(losses), torch.tensor(timesteps), torch.tensor(is_full), 1000)


@settings(deadline=None)  # a busy machine is no failure
@given(rows=samples, cut=st.integers(1, 29))
def test_groups_are_what_a_plain_loop_finds_and_parts_add_up(rows: list[tuple[float, int, bool]], cut: int):
    whole = _tally(rows)
    told = describe(whole, 1000)
    for index, name in enumerate(bucket_names(1000)):
        mine = [loss for loss, t, _ in rows if t // 100 == index]
        assert told["loss_by_timestep"][name]["num_samples"] == len(mine)
        assert told["loss_by_timestep"][name]["mean"] == (pytest.approx(math.fsum(mine) / len(mine)) if mine else None)
    for name, is_full in (("partial", False), ("full", True)):
        mine = [loss for loss, _, full in rows if full == is_full]
        assert told["loss_by_mask"][name]["num_samples"] == len(mine)
        assert told["loss_by_mask"][name]["mean"] == (pytest.approx(math.fsum(mine) / len(mine)) if mine else None)
    parts = [part for part in (rows[:cut], rows[cut:]) if part]
    torch.testing.assert_close(torch.stack([_tally(part) for part in parts]).sum(dim=0), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_timesteps", [10, 25, 999, 1000])
def test_a_bucket_begins_where_its_name_says(num_timesteps: int):
    names = bucket_names(num_timesteps)
    for t in range(num_timesteps):
        told = describe(tally(torch.ones(1), torch.tensor([t]), torch.tensor([False]), num_timesteps), num_timesteps)
        (name,) = [name for name, group in told["loss_by_timestep"].items() if group["num_samples"]]
        assert name == max(one for one in names if int(one[2:]) <= t)
