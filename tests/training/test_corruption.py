"""Damage of every kind is caught before a batch is handed out, and is not served on the second attempt."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.storage import ObjectStore
from tests.training.corruption import Scene, make_scene, run_campaign

MakeDataset = Callable[..., str]


@pytest.fixture
def scene(store: ObjectStore, make_dataset: MakeDataset, tmp_path: Path) -> Scene:
    return make_scene(tmp_path, store, make_dataset(store, (20, 20)), make_dataset(store, (20, 20), seed=1))


def test_a_short_campaign(scene: Scene, tmp_path: Path):
    done = run_campaign(scene, tmp_path / "trials", 120, seed=1)
    assert done.total() == 120
    assert len(done) >= 18, done


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_long_campaign(scene: Scene, tmp_path: Path):
    num_trials = int(os.environ.get("LACUNA_CORRUPTION_TRIALS", "10000"))
    done = run_campaign(scene, tmp_path / "trials", num_trials, seed=2)
    print(json.dumps(done, indent=1, sort_keys=True))  # noqa: T201 - what `make soak` shows
    assert done.total() == num_trials
