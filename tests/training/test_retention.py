"""Which checkpoints stay."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.bundles import MANIFEST_NAME, commit_bundle, fetch_bundle, list_bundles
from infra.reading import is_being_read, reading
from infra.storage import ObjectStore
from training.retention import Retention, delete_old, steps_to_keep
from training.runspec import checkpoint_prefix, checkpoints_prefix, step_of, validation_prefix

RUN = "run"


@pytest.fixture
def prefixes(store: ObjectStore, tmp_path: Path) -> dict[int, str]:
    """Five checkpoints: step → prefix."""
    found = {}
    for step in (100, 200, 300, 400, 500):
        (tmp_path / f"{step}").mkdir()
        (tmp_path / f"{step}" / "state.json").write_text(f"{step}")
        found[step] = checkpoint_prefix(RUN, step)
        commit_bundle(store, found[step], tmp_path / f"{step}", kind="checkpoint", run_id=RUN, step=step)
    return found


def _steps(store: ObjectStore) -> list[int]:
    return [step_of(prefix) for prefix in list_bundles(store, checkpoints_prefix(RUN))]


def _report(store: ObjectStore, step: int, summary: dict[str, object]) -> None:
    store.put(f"{validation_prefix(RUN, step)}/report.json", json.dumps({"summary": summary}).encode())


@given(
    steps=st.lists(st.integers(0, 50), unique=True, min_size=1).map(sorted),
    last=st.integers(1, 5),
    every=st.none() | st.integers(1, 10),
    best=st.integers(0, 3),
    metrics=st.dictionaries(st.integers(0, 50), st.floats(-9, 9)),
    named=st.sets(st.integers(0, 50)),
)
def test_each_reason_keeps_and_nothing_else_does(
    steps: list[int], last: int, every: int | None, best: int, metrics: dict[int, float], named: set[int]
):
    kept = steps_to_keep(steps, Retention(last, every, best), metrics, named)
    ranked = sorted((step for step in steps if step in metrics), key=lambda step: (-metrics[step], -step))
    for step in steps:
        reasons = (
            step in steps[-last:],
            every is not None and step % every == 0,
            step in ranked[:best],
            step in named,
        )
        assert (step in kept) == any(reasons)
    assert kept <= set(steps)


def test_the_best_by_its_report_stays(store: ObjectStore, prefixes: dict[int, str]):
    _report(store, 100, {"masked_psnr_db": 20.0})
    _report(store, 200, {"masked_psnr_db": 30.0})
    _report(store, 300, {"masked_psnr_db": float("nan")})
    _report(store, 400, {"masked_ssim": 1.0})
    assert delete_old(store, RUN, Retention(last=1, best=1)) == [prefixes[100], prefixes[300], prefixes[400]]
    assert _steps(store) == [200, 500]


def test_every_so_many_steps_stay(store: ObjectStore, prefixes: dict[int, str]):
    delete_old(store, RUN, Retention(last=1, every_steps=200))
    assert _steps(store) == [200, 400, 500]


def test_what_is_being_read_stays_until_it_was_read(store: ObjectStore, prefixes: dict[int, str], tmp_path: Path):
    with reading(store, prefixes[100], 10):
        assert is_being_read(store, prefixes[100])
        assert delete_old(store, RUN, Retention(last=1)) == [prefixes[200], prefixes[300], prefixes[400]]
        assert fetch_bundle(store, prefixes[100], tmp_path / "fetched").step == 100
    assert not is_being_read(store, prefixes[100])
    assert delete_old(store, RUN, Retention(last=1)) == [prefixes[100]]
    assert list(store.list(f"{prefixes[100]}/")) == []


def test_a_lease_that_ran_out_keeps_nothing(store: ObjectStore, prefixes: dict[int, str]):
    store.put(f"{prefixes[100]}/READING-dead.json", b'{"expires_at": 1}')
    assert prefixes[100] in delete_old(store, RUN, Retention(last=1))


def test_what_killed_saves_and_deletions_left_goes_but_nothing_newer(store: ObjectStore, prefixes: dict[int, str]):
    store.delete(f"{prefixes[100]}/{MANIFEST_NAME}")  # a deletion that was killed
    store.put(f"{checkpoint_prefix(RUN, 150)}/state.json", b"half")  # a save that was killed
    store.put(f"{checkpoint_prefix(RUN, 600)}/state.json", b"half")  # one that may be under way
    assert delete_old(store, RUN, Retention(last=4)) == []
    left = {info.key.split("/")[3] for info in store.list(f"{checkpoints_prefix(RUN)}/")}
    assert left == {f"step-00000{step}" for step in (200, 300, 400, 500, 600)}
