"""Which checkpoints stay."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.bundles import MANIFEST_NAME, commit_bundle, delete_bundle, fetch_bundle, list_bundles, verify_bundle
from infra.channels import move_channel, pointer_to
from infra.claims import Claim
from infra.reading import is_being_read, reading
from infra.storage import ObjectStore
from training.retention import Retention, delete_old, delete_old_exports, steps_to_keep
from training.runspec import checkpoint_prefix, checkpoints_prefix, export_prefix, step_of, validation_prefix

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


def _export(store: ObjectStore, tmp_path: Path, run_id: str, step: int) -> str:
    folder = tmp_path / f"{run_id}-{step}"
    folder.mkdir()
    (folder / "weights").write_text(f"{run_id} {step}")
    prefix = export_prefix(run_id, step)
    commit_bundle(store, prefix, folder, kind="export", run_id=run_id, step=step)
    return prefix


def test_exports_published_last_stay_whatever_their_step_or_run(store: ObjectStore, tmp_path: Path):
    order = [("small-0", 300), ("small-1", 100), ("small-0", 200), ("other-0", 100), ("small-small-0", 100)]
    made = [_export(store, tmp_path, run_id, step) for run_id, step in order]
    assert delete_old_exports(store, "small-9", keep=2) == [made[0]]
    assert list_bundles(store, "exports") == sorted(made[1:])
    assert delete_old_exports(store, "small-9", keep=2) == []
    assert list(store.list(f"{made[0]}/")) == []


def test_an_export_that_a_channel_names_or_somebody_reads_stays(store: ObjectStore, tmp_path: Path):
    made = [_export(store, tmp_path, "small-0", step) for step in range(100, 800, 100)]
    for prefix in made[:3]:  # the first is forgotten; the second is where one could go back to
        move_channel(store, "best", pointer_to(store, "best", prefix), lambda _: True)
    claim = Claim(store, made[4], "somebody who publishes it again", lambda: False)
    assert claim.take_now()
    with reading(store, made[3], 10):
        assert delete_old_exports(store, "small-0", keep=1) == [made[0], made[5]]
    claim.release()
    assert delete_old_exports(store, "small-0", keep=1) == [made[3], made[4]]
    assert list_bundles(store, "exports") == [made[1], made[2], made[6]]


def test_what_a_killed_deletion_left_of_an_export_goes(store: ObjectStore, tmp_path: Path):
    made = [_export(store, tmp_path, "small-0", step) for step in (100, 200)]
    store.delete(f"{made[0]}/{MANIFEST_NAME}")
    assert delete_old_exports(store, "small-0", keep=5) == []
    assert {info.key for info in store.list("exports/")} == {f"{made[1]}/{MANIFEST_NAME}", f"{made[1]}/weights"}


def test_nothing_is_deleted_while_a_channel_cannot_be_read(
    store: ObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    made = [_export(store, tmp_path, "small-0", step) for step in (100, 200)]
    store.put("channels/stable.json", b"damaged")
    assert delete_old_exports(store, "small-0", keep=1) == []
    assert "nothing is deleted, since a channel cannot be read" in caplog.text
    assert list_bundles(store, "exports") == made


def test_an_export_that_cannot_be_read_stays_and_keeps_no_other(
    store: ObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    made = [_export(store, tmp_path, "small-0", step) for step in (100, 200, 300)]
    store.put(f"{made[1]}/{MANIFEST_NAME}", b"damaged")
    assert delete_old_exports(store, "small-0", keep=1) == [made[0]]
    assert f"{made[1]}/{MANIFEST_NAME}: not a bundle's manifest" in caplog.text
    assert list_bundles(store, "exports") == made[1:]


def test_a_deletion_that_was_killed_is_undone_where_a_channel_came_to_name_it(store: ObjectStore, tmp_path: Path):
    made = [_export(store, tmp_path, "small-0", step) for step in (100, 200)]
    move_channel(store, "best", pointer_to(store, "best", made[0]), lambda _: True)
    channel = store.read("channels/best.json")
    store.delete("channels/best.json")

    class Killed(BaseException):
        pass

    def named_when_the_manifest_is_gone() -> bool:
        if store.exists(f"{made[0]}/{MANIFEST_NAME}"):
            return False
        store.put("channels/best.json", channel)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("infra.bundles._restore", lambda *_: None)  # killed before it could
        with pytest.raises(Killed):
            delete_bundle(store, made[0], named_when_the_manifest_is_gone)
    assert list_bundles(store, "exports") == made[1:]
    assert delete_old_exports(store, "small-0", keep=1) == []
    assert list_bundles(store, "exports") == made
    assert verify_bundle(store, made[0]) == []
    assert {info.key for info in store.list(f"{made[0]}/")} == {f"{made[0]}/{MANIFEST_NAME}", f"{made[0]}/weights"}
