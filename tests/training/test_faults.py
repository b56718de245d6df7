"""Numbers that are not finite, injected into real training processes: the policy of `training.health` is followed."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.storage import ObjectStore
from tests.training.fault_harness import PATTERNS, PLACES, RESULTS_NAME, VALUES, name_of
from tests.training.forked_ranks import Ranks
from training.runspec import RunSpec, checkpoint_prefix, run_prefix, step_of

MakeRun = Callable[..., RunSpec]
Case = tuple[str, str, str]

NUM_STEPS, EVERY, BATCH = 8, 3, 8
CLEAN: Case = ("none", "0", "permanent")
HARNESS = "tests.training.fault_harness:main"
SHORT: tuple[Case, ...] = (
    ("loss", "nan", "single"),
    ("latents", "inf", "burst"),
    ("latents", "nan", "stretch"),
    ("loss", "-inf", "permanent"),
    ("average", "nan", "single"),
    ("average", "inf", "permanent"),
    ("gradient", "nan", "single"),
    ("gradient", "-inf", "stretch"),
)
# (error, steps passed over, rollbacks, position at the end, samples passed over): from the policy, by hand. There are
# checkpoints after steps 3 and 6; the bad batches are 4, 5 …, where the run has taken 4 steps.
SKIPPED: dict[str, tuple[str | None, int, int, int, list[list[int]]]] = {
    "first": (None, 1, 0, 9, [[0, 1]]),
    "single": (None, 1, 0, 9, [[4, 5]]),
    "burst": (None, 2, 0, 10, [[4, 6]]),
    "stretch": (None, 3, 1, 12, [[3, 7]]),  # back to step 3, which is followed by batch 7
    "permanent": ("of step 3 is not finite", 6, 1, 10, [[3, 10]]),
}
BAD_AVERAGE = "after step 6, the average of the weights is not finite"
REPLAYED: dict[str, tuple[str | None, int, int, int, list[list[int]]]] = {
    "first": (None, 0, 1, 8, []),
    "single": (None, 0, 1, 8, []),
    "burst": (None, 0, 1, 8, []),
    "stretch": (BAD_AVERAGE, 0, 1, 6, []),  # the third bad update is in the replay: it did not help
    "permanent": (BAD_AVERAGE, 0, 1, 6, []),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as ranks:
        yield ranks


def test_faults(make_run: MakeRun, store: ObjectStore, tmp_path: Path, ranks: Ranks):
    _inject(SHORT, make_run, store, tmp_path, ranks)


@pytest.mark.soak
def test_sixty_faults(make_run: MakeRun, store: ObjectStore, tmp_path: Path, ranks: Ranks):
    cases = tuple(itertools.product(PLACES, VALUES, PATTERNS))
    assert len(cases) == 60
    _inject(cases, make_run, store, tmp_path, ranks)


def test_a_resumed_run_has_passed_over_the_same(make_run: MakeRun, store: ObjectStore, tmp_path: Path, ranks: Ranks):
    """Gone back to step 6 the checkpoint knows what was passed over; gone back to step 3 it happens again."""
    run = make_run(num_steps=NUM_STEPS, checkpoint_every_steps=EVERY, global_batch_size=BATCH, keep_last=9)
    case = ("latents", "nan", "stretch")
    prefix = run_prefix(name_of(*case))
    spec = {"run": run.model_dump(mode="json"), "cases": [case]}
    ends: list[tuple[str, bytes, list[dict[str, Any]]]] = []
    for step in (None, 6, 3):
        if step is not None:
            for info in list(store.list(f"{prefix}/checkpoints/")):
                if step_of(info.key.removeprefix(f"{prefix}/checkpoints/").partition("/")[0]) > step:
                    store.delete(info.key)
            store.delete(f"{prefix}/channels/newest.json")
        started = ranks.start(spec, tmp_path / f"from-{step}", 1, HARNESS)
        assert ranks.wait(started) == [0], started.log()
        lines = [json.loads(line) for line in store.read(f"{prefix}/metrics.jsonl").splitlines()]
        told = [{name: line.get(name) for name in ("step", "position", "loss", "skipped", "uids")} for line in lines]
        state = store.read(f"{checkpoint_prefix(name_of(*case), NUM_STEPS)}/state.json")
        ends.append((_sha256(store, case), state, told))
    assert ends[0] == ends[1] == ends[2]


def _inject(cases: tuple[Case, ...], make_run: MakeRun, store: ObjectStore, tmp_path: Path, ranks: Ranks) -> None:
    """All faults of one process in one process, one after the other; those of one rank of two in another pair."""
    run = make_run(num_steps=NUM_STEPS, checkpoint_every_steps=EVERY, global_batch_size=BATCH, keep_last=9)
    pair = make_run(
        num_steps=NUM_STEPS,
        checkpoint_every_steps=EVERY,
        global_batch_size=BATCH,
        keep_last=9,
        num_processes=2,
        micro_batch_size=2,
        zero_stage=2,
    )
    num_followed = 0
    for is_pair, its_run in ((False, run), (True, pair)):
        its_cases = [case for case in cases if (case[0] == "gradient") == is_pair]
        folder = tmp_path / ("pair" if is_pair else "one")
        spec = {"run": its_run.model_dump(mode="json"), "cases": [CLEAN, *its_cases]}
        ends = ranks.wait(started := ranks.start(spec, folder, 2 if is_pair else 1, HARNESS))
        assert not any(ends), started.log()
        results = json.loads((folder / RESULTS_NAME).read_text())
        clean = _sha256(store, CLEAN)
        by_pattern: dict[str, set[str]] = {}
        for case in its_cases:
            _check(case, results[name_of(*case)], store)
            num_followed += 1
            if results[name_of(*case)]["error"] is None:
                by_pattern.setdefault(f"{case[0] == 'average'} {case[2]}", set()).add(_sha256(store, case))
        for pattern, digests in by_pattern.items():
            assert len(digests) == 1, f"{pattern}: what was passed over left its mark: {digests}"
            assert (digests == {clean}) == pattern.startswith("True"), pattern
        _clear(store, CLEAN)
    print(f"\n{len(cases)} faults, policy followed {num_followed} of {len(cases)}", flush=True)  # noqa: T201


def _check(case: Case, result: dict[str, Any], store: ObjectStore) -> None:
    place, _, pattern = case
    error, num_skipped, num_rollbacks, position, skipped = (REPLAYED if place == "average" else SKIPPED)[pattern]
    assert (result["error"] is None) == (error is None), (case, result)
    if error is not None:
        assert error in result["error"], (case, result)
        assert "lower train.learning_rate" in result["error"]
    else:
        assert result["step"] == NUM_STEPS, (case, result)
    skips = result["skips"]
    assert skips["num_steps"] == result["num_unchanged"] == num_skipped, (case, result)
    assert skips["num_rollbacks"] == num_rollbacks, (case, result)
    assert result["position"] == position * BATCH, (case, result)
    if error is None:
        assert skips["positions"] == [[first * BATCH, end * BATCH] for first, end in skipped], (case, result)
    assert result["is_loss_finite"], (case, result)
    if error is None:  # else its metrics are those of the last checkpoint
        _check_told(case, store)


def _check_told(case: Case, store: ObjectStore) -> None:
    """The metrics name the samples of each step that was passed over; every step that was taken is there once."""
    place, _, pattern = case
    data = store.read(f"{run_prefix(name_of(*case))}/metrics.jsonl")
    lines = [json.loads(line) for line in data.splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, NUM_STEPS + 1)), case
    told = [line for line in lines if "skipped" in line]
    expected = 0 if place == "average" else len(PATTERNS[pattern])
    assert len(told) == expected, (case, told)
    for line in told:
        assert line["skipped"] == ("gradient" if place == "gradient" else "loss")
        assert len(line["uids"]) == (BATCH if place == "gradient" else 1), case  # a batch may hold a row of two epochs
        assert all(len(uid) == 32 for uid in line["uids"])
    assert sum("rolled_back" in line for line in lines) == (1 if pattern == "stretch" or place == "average" else 0)


def _sha256(store: ObjectStore, case: Case) -> str:
    """Of all that is trained, at the end."""
    prefix = checkpoint_prefix(name_of(*case), NUM_STEPS)
    digest = hashlib.sha256()
    for info in store.list(f"{prefix}/"):
        if info.key.endswith(".safetensors"):
            digest.update(info.key.removeprefix(prefix).encode() + store.read(info.key))
    return digest.hexdigest()


def _clear(store: ObjectStore, case: Case) -> None:
    for info in list(store.list(f"{run_prefix(name_of(*case))}/")):
        store.delete(info.key)
