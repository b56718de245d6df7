"""Which checkpoint is believed, and which may go. (That they hold what resumes a run is shown in test_train.)"""

import logging
from pathlib import Path

import pytest

from infra.bundles import MANIFEST_NAME, commit_bundle, list_bundles
from infra.channels import move_channel, pointer_to
from infra.errors import ContractError
from infra.storage import ObjectStore
from training.checkpoint import DAMAGED_NAME, Checkpoints
from training.retention import Retention
from training.runspec import checkpoint_prefix, checkpoints_prefix, export_prefix
from training.saved_state import TrainingState

RUN = "run"


def _commit(store: ObjectStore, tmp_path: Path, step: int) -> str:
    folder = tmp_path / f"folder-{step}"
    folder.mkdir()
    (folder / "state.json").write_text(_state(step))
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 10)
    prefix = checkpoint_prefix(RUN, step)
    commit_bundle(store, prefix, folder, kind="checkpoint", run_id=RUN, step=step)
    return prefix


def _state(step: int) -> str:
    state = TrainingState(
        step=step, position=0, ema_num_updates=0, world_size=1, run_digest="", dataset_digest="", config={}
    )
    return state.model_dump_json()


def _damage(store: ObjectStore, key: str) -> None:
    path = store.local_path(key)
    assert path is not None
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


@pytest.fixture
def checkpoints(store: ObjectStore, tmp_path: Path) -> Checkpoints:
    return Checkpoints(store, RUN, tmp_path / "scratch", Retention(last=2))


def test_nothing_there_is_no_error(checkpoints: Checkpoints):
    assert checkpoints.fetch_newest() is None


def test_one_without_manifest_does_not_count(checkpoints: Checkpoints, store: ObjectStore, tmp_path: Path):
    _commit(store, tmp_path, 100)
    newest = _commit(store, tmp_path, 200)
    store.delete(f"{newest}/{MANIFEST_NAME}")
    folder = checkpoints.fetch_newest()
    assert folder is not None
    assert (folder / "state.json").read_text() == _state(100)


@pytest.mark.parametrize("damage", ["flip", "delete", "manifest"])
def test_a_damaged_one_is_passed_over_loudly(
    checkpoints: Checkpoints, store: ObjectStore, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
):
    _commit(store, tmp_path, 100)
    newest = _commit(store, tmp_path, 200)
    if damage == "flip":
        _damage(store, f"{newest}/weights.bin")
    elif damage == "delete":
        store.delete(f"{newest}/weights.bin")
    else:
        store.put(f"{newest}/{MANIFEST_NAME}", b"{}")
    with caplog.at_level(logging.ERROR):
        folder = checkpoints.fetch_newest()
    assert folder is not None
    assert (folder / "state.json").read_text() == _state(100)
    assert "CHECKPOINT DAMAGED" in caplog.text
    # The step can be committed again, and what was there can be looked at.
    assert list_bundles(store, checkpoints_prefix(RUN)) == [checkpoint_prefix(RUN, 100)]
    assert store.exists(f"{newest}/{DAMAGED_NAME}")


def test_all_damaged_is_an_error_however_often_one_tries(checkpoints: Checkpoints, store: ObjectStore, tmp_path: Path):
    for step in (100, 200):
        _damage(store, f"{_commit(store, tmp_path, step)}/weights.bin")
    for _ in range(2):
        with pytest.raises(ContractError, match="none of its 2 checkpoints is whole"):
            checkpoints.fetch_newest()


def test_rotation_keeps_the_newest_and_what_a_channel_names(
    checkpoints: Checkpoints, store: ObjectStore, tmp_path: Path
):
    prefixes = [_commit(store, tmp_path, step) for step in (100, 200, 300, 400, 500)]
    move_channel(store, "best", pointer_to(store, "best", prefixes[0]), lambda _: True)
    exported = export_prefix(RUN, 200)
    commit_bundle(store, exported, tmp_path / "folder-200", kind="export", run_id=RUN, step=200)
    move_channel(store, "latest", pointer_to(store, "latest", exported), lambda _: True)
    assert checkpoints.rotate() == [prefixes[2]]
    assert list_bundles(store, checkpoints_prefix(RUN)) == [prefixes[0], prefixes[1], prefixes[3], prefixes[4]]
    assert list(store.list(f"{prefixes[2]}/")) == []
