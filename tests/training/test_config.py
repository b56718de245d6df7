"""What a training is told about its objective: what goes together, and what makes it another run."""

from typing import Any

import pytest

from model.specs import ScheduleSpec
from preprocessing.contracts.config import ModelConfig
from training.config import TrainConfig
from training.runspec import run_digest


def _config(**changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {"prediction_type": "v_prediction", "mask_source": "cached", "seed": 0, "num_steps": 3}
    return TrainConfig(**(fields | changes))


def test_the_objective_is_stable_diffusions_by_default():
    assert _config().schedule == ScheduleSpec()
    assert _config().min_snr_gamma is None
    assert _config(zero_terminal_snr=True).schedule == ScheduleSpec(zero_terminal_snr=True)


def test_epsilon_and_a_zero_terminal_snr_do_not_go_together():
    with pytest.raises(ValueError, match=r"train\.zero_terminal_snr: true does not go with prediction_type 'epsilon'"):
        _config(prediction_type="epsilon", zero_terminal_snr=True)


@pytest.mark.parametrize("gamma", [0, -5, float("nan"), float("inf")])
def test_gamma_is_a_positive_number(gamma: float):
    with pytest.raises(ValueError, match="min_snr_gamma"):
        _config(min_snr_gamma=gamma)


def test_options_that_are_off_leave_the_run_what_it_was():
    """Their names are not in the digest, so that runs from before there were such options can be resumed."""
    assert not {"min_snr_gamma", "zero_terminal_snr"} & set(_config().digest_fields())
    assert _config(min_snr_gamma=5).digest_fields()["min_snr_gamma"] == 5
    assert _config(zero_terminal_snr=True).digest_fields()["zero_terminal_snr"] is True


def test_each_objective_is_another_run(tiny_model: ModelConfig):
    configs = [
        _config(),
        _config(prediction_type="epsilon"),
        _config(min_snr_gamma=5),
        _config(min_snr_gamma=1),
        _config(zero_terminal_snr=True),
    ]
    assert len({run_digest(config, tiny_model, "0" * 64) for config in configs}) == len(configs)
    other_ways = _config(
        keep_last=9, micro_batch_size=4, num_processes=2, zero_stage=2, checkpoint_every_steps=7, walltime_s=1e6
    )
    assert run_digest(other_ways, tiny_model, "0" * 64) == run_digest(_config(), tiny_model, "0" * 64)
