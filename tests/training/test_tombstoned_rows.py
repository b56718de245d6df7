"""A forgotten row is in no batch: through the real loader, mapped and cached, on one rank and on two, and compacted."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.errors import ContractError, TransientError
from infra.storage import ObjectStore, open_store
from preprocessing.compact_rows import compact_rows
from preprocessing.contracts.digests import uid_of
from preprocessing.contracts.manifest import load_manifest
from preprocessing.contracts.tombstones import Tombstone, Tombstones
from tests.training.corruption import DistantStore
from tests.training.ends import hex_losses, losses
from tests.training.forked_ranks import Ranks
from training.data import TrainingDataset, open_dataset
from training.heldout import HeldOutRows
from training.order import SampleOrder
from training.runspec import RunSpec, checkpoint_prefix, run_prefix
from training.saved_state import TrainingState

MakeDataset = Callable[..., str]
MakeRun = Callable[..., RunSpec]
SEED, BATCH, NUM_STEPS = 5, 8, 20  # 160 samples: more than four epochs of 37 rows


def _url(shard: int, row: int, split: str = "train") -> str:
    return f"http://127.0.0.1/{split}-0-{shard}/{row}.jpg"


def _uid(shard: int, row: int, split: str = "train") -> str:
    return uid_of(_url(shard, row, split), f"{split}-0-{shard}")


def _forget(store: ObjectStore, rows: Sequence[tuple[int, int]]) -> set[str]:
    Tombstones.add(store, [Tombstone.of("url", _url(*row)) for row in rows])
    return {_uid(*row) for row in rows}


def _samples(dataset: TrainingDataset, world_size: int = 1, num_steps: int = NUM_STEPS) -> list[tuple[str, bytes]]:
    """Uid and moments of each sample in order, through the loader with its threads."""
    ranks = [
        dataset.batches(seed=SEED, global_batch_size=BATCH, num_steps=num_steps, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    found = []
    for _ in range(num_steps):
        for batches in ranks:
            batch = next(batches)
            assert batch.moments is not None
            found += list(zip(batch.uids, [row.numpy().tobytes() for row in batch.moments], strict=True))
    for batches in ranks:
        batches.close()
    return found


def _uids(dataset: TrainingDataset, world_size: int = 1) -> list[str]:
    return [uid for uid, _ in _samples(dataset, world_size)]


@pytest.mark.parametrize("is_distant", [False, True], ids=["mapped", "cached"])
def test_a_forgotten_row_is_in_no_batch(
    store: ObjectStore, make_dataset: MakeDataset, tmp_path: Path, is_distant: bool
):
    prefix = make_dataset(store)
    seen: ObjectStore = DistantStore(tmp_path / "store") if is_distant else store
    cache: dict[str, Any] = {"cache_bytes": 10**8} if is_distant else {}
    before = _uids(open_dataset(seen, prefix, tmp_path / "before", **cache))
    gone = _forget(store, [(0, 3), (0, 19), (1, 0)])
    assert gone < set(before), "nothing was to be forgotten"
    after = _uids(open_dataset(seen, prefix, tmp_path / "alone", **cache))
    assert gone.isdisjoint(after)
    # Complete batches; every other row is where it was, and who stands in is a row of the dataset.
    assert len(after) == len(before)
    moved = [place for place, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    assert moved == [place for place, uid in enumerate(before) if uid in gone]
    assert {after[place] for place in moved} <= set(before) - gone
    # Whatever the number of processes, and each time.
    assert _uids(open_dataset(seen, prefix, tmp_path / "two", **cache), world_size=2) == after
    assert _uids(open_dataset(seen, prefix, tmp_path / "four", **cache), world_size=4) == after


def test_who_stands_in_is_not_in_the_same_batch(store: ObjectStore, make_dataset: MakeDataset, tmp_path: Path):
    prefix = make_dataset(store, (200, 200))
    _forget(store, [(0, row) for row in range(0, 200, 20)])
    uids = _uids(open_dataset(store, prefix, tmp_path / "cache"))
    for first in range(0, len(uids), BATCH):
        assert max(Counter(uids[first : first + BATCH]).values()) == 1


@pytest.mark.parametrize("is_distant", [False, True], ids=["mapped", "cached"])
def test_compacted_files_give_the_same_batches(
    store: ObjectStore, make_dataset: MakeDataset, tmp_path: Path, is_distant: bool
):
    """The rows are out of the files, and no other sample of a training has moved: so a run goes on over it."""
    prefix = make_dataset(store)
    _forget(store, [(0, 3), (0, 0), (1, 16)])
    seen: ObjectStore = DistantStore(tmp_path / "store") if is_distant else store
    before = _samples(open_dataset(seen, prefix, tmp_path / "before"))
    old = {file.key(prefix) for file in load_manifest(store, prefix).files("rows", split="train")}
    done = compact_rows(store, Tombstones.load(store))
    manifest = load_manifest(store, prefix)
    assert done.datasets == (prefix,)
    assert done.num_written == 2
    assert done.num_deleted == 2
    assert [file.removed for file in manifest.files("rows", split="train")] == [(0, 3), (16,)]
    assert manifest.dropped == {"forgotten": 3}
    assert manifest.num_out == 37 + 4 - 3
    assert not any(store.exists(key) for key in old)
    assert _samples(open_dataset(seen, prefix, tmp_path / "after")) == before
    # More is forgotten, of files that were rewritten already: places are still those of the first file.
    _forget(store, [(0, 4), (1, 15)])
    more = _samples(open_dataset(seen, prefix, tmp_path / "more"))
    assert more != before
    compact_rows(store, Tombstones.load(store))
    assert [file.removed for file in load_manifest(store, prefix).files("rows", split="train")] == [(0, 3, 4), (15, 16)]
    assert _samples(open_dataset(seen, prefix, tmp_path / "most")) == more
    assert compact_rows(store, Tombstones.load(store)).datasets == ()


@pytest.mark.parametrize("is_distant", [False, True], ids=["mapped", "cached"])
def test_who_reads_a_dataset_that_is_compacted_meanwhile_is_told_to_begin_again(
    store: ObjectStore, make_dataset: MakeDataset, tmp_path: Path, is_distant: bool
):
    prefix = make_dataset(store)
    seen: ObjectStore = DistantStore(tmp_path / "store") if is_distant else store
    dataset = open_dataset(seen, prefix, tmp_path / "before")
    _forget(store, [(0, 3), (1, 3)])
    compact_rows(store, Tombstones.load(store))
    with pytest.raises(TransientError, match=r"train-\S+: it went while it was in use, since rows"):
        dataset.batch_at(0, seed=SEED, global_batch_size=BATCH)
    again = open_dataset(seen, prefix, tmp_path / "after")
    for file in load_manifest(store, prefix).files("rows", split="train"):
        store.delete(file.key(prefix))
    with pytest.raises(ContractError, match="and the manifest names it"):
        again.batch_at(0, seed=SEED, global_batch_size=BATCH)


def test_a_whole_shard_may_be_forgotten_but_not_all(store: ObjectStore, make_dataset: MakeDataset, tmp_path: Path):
    prefix = make_dataset(store)
    _forget(store, [(1, row) for row in range(17)])
    uids = _uids(open_dataset(store, prefix, tmp_path / "one"))
    assert set(uids) == {_uid(0, row) for row in range(20)}
    compact_rows(store, Tombstones.load(store))
    assert _uids(open_dataset(store, prefix, tmp_path / "compacted")) == uids
    Tombstones.add(store, [Tombstone.of("host", "127.0.0.1")])
    with pytest.raises(ContractError, match=r"all 37 training rows of .* are forgotten; prepare another"):
        _uids(open_dataset(store, prefix, tmp_path / "none"))


def test_in_a_mixture_the_other_dataset_is_as_it_was(store: ObjectStore, make_dataset: MakeDataset, tmp_path: Path):
    weights = {make_dataset(store, (30,)): 3.0, make_dataset(store, (12,)): 1.0}
    before = _uids(open_dataset(store, weights, tmp_path / "before"))
    Tombstones.add(store, [Tombstone.of("uid", _uid(0, row)) for row in (20, 25)])
    after = _uids(open_dataset(store, weights, tmp_path / "after"))
    gone = {_uid(0, row) for row in (20, 25)}
    assert [place for place in range(len(before)) if before[place] != after[place]] == [
        place for place, uid in enumerate(before) if uid in gone
    ]
    assert gone.isdisjoint(after)


def test_stand_ins_are_every_row_of_the_epoch_once():
    order = SampleOrder(3, "digest", [5, 4, 6], rows_per_window=7)
    for position in (0, 7, 14, 40):
        found = list(order.stand_ins(position))
        assert len(found) == 15
        assert len(set(found)) == 15
        _epochs, shards, rows = order.locate([position])
        assert (int(shards[0]), int(rows[0])) in found
        window = order.plan_of(position // 15).shards_of(order.window_at(position)[1])
        size = sum([5, 4, 6][shard] for shard in window)
        assert {shard for shard, _ in found[:size]} <= set(window.tolist())


def test_held_out_rows_are_forgotten_too(store: ObjectStore, make_dataset: MakeDataset, tmp_path: Path):
    prefix = make_dataset(store)
    assert len(HeldOutRows(store, prefix, tmp_path / "before")) == 4
    Tombstones.add(store, [Tombstone.of("url", _url(0, 1, "validation"))])
    rows = HeldOutRows(store, prefix, tmp_path / "after")
    accepted: list[str] = []
    assert len(rows) == 3
    rows.choose(0, "validation", lambda url, _: bool(accepted.append(url)) or True)
    assert sorted(accepted) == [_url(0, 0, "validation"), _url(1, 0, "validation"), _url(1, 1, "validation")]


# ----------------------------------------------------------------------------------------------------------- whole runs


def _state(store: ObjectStore, run: RunSpec, step: int) -> TrainingState:
    return TrainingState.model_validate_json(store.read(f"{checkpoint_prefix(run.run_id, step)}/state.json"))


def _notes(store: ObjectStore, run: RunSpec) -> list[dict[str, Any]]:
    lines = store.read(f"{run_prefix(run.run_id)}/metrics.jsonl").splitlines()
    return [line for line in map(json.loads, lines) if "tombstones" in line]


def _turn_back(store: ObjectStore, run: RunSpec, step: int) -> None:
    for later in range(step + 1, run.train.num_steps + 1):
        for info in list(store.list(f"{checkpoint_prefix(run.run_id, later)}/")):
            store.delete(info.key)
    store.delete(f"{run_prefix(run.run_id)}/channels/newest.json")


def test_a_run_says_what_was_in_force_and_goes_on_alike(make_run: MakeRun, store: ObjectStore, tmp_path: Path):
    """Forgotten between two starts, in one process and in two: the rest of the run is the same each time it is resumed,
    also when the rows have left the files meanwhile."""
    run = make_run(num_steps=6, checkpoint_every_steps=3, micro_batch_size=4, keep_last=9)
    with Ranks() as ranks:
        ranks.run(run.model_dump(mode="json"), tmp_path / "whole", 1)
        free = hex_losses(store, run)
        assert _state(store, run, 6).tombstones == ()
        assert _notes(store, run) == []

        _turn_back(store, run, 3)
        dataset = open_dataset(store, run.dataset_prefix, tmp_path / "look", tombstones=Tombstones())
        later = [uid for step in (3, 4, 5) for uid in dataset.batch_at(step, seed=3, global_batch_size=8).uids]
        Tombstones.add(store, [Tombstone.of("uid", later[0])])
        digest = Tombstones.load(store).digest
        ranks.run(run.model_dump(mode="json"), tmp_path / "resumed", 1)
        resumed = hex_losses(store, run)
        assert resumed[:3] == free[:3]
        assert resumed[3:] != free[3:]
        assert _state(store, run, 6).tombstones == ((24, digest),)
        assert [(line["position"], line["tombstones"]) for line in _notes(store, run)] == [
            (24, {"digest": digest, "num": 1})
        ]

        _turn_back(store, run, 3)
        compact_rows(store, Tombstones.load(store))
        two = run.model_copy(update={"train": run.train.model_copy(update={"num_processes": 2})})
        ranks.run(two.model_dump(mode="json"), tmp_path / "two", 2)
        assert np.allclose(losses(store, run), [float.fromhex(loss) for loss in resumed], rtol=1e-5)
        assert _state(store, run, 6).tombstones == ((24, digest),)


def test_processes_go_by_what_the_first_one_read(make_dataset: MakeDataset, store: ObjectStore, tmp_path: Path):
    """Tombstones that come while a run is under way are those of its next start."""
    prefix = make_dataset(store)
    dataset = open_dataset(open_store(store.uri), prefix, tmp_path / "cache")
    before = _uids(dataset)
    _forget(store, [(0, 3)])
    assert _uids(dataset) == before
