"""The order is a pure function of position: a permutation each epoch, the same however it is cut up and resumed."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.loader import Share
from training.mixture import SAMPLES_PER_BLOCK, Mixture, mixture_digest, shares_of
from training.order import SampleOrder

NUM_IDS = 1_000_000


def _ids(order: SampleOrder, positions: object, starts: np.ndarray) -> np.ndarray:
    _, shards, rows = order.locate(np.asarray(positions))
    return starts[shards] + rows


def _starts(num_rows: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(num_rows)])[:-1]


@given(
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 1000),
    num_rows=st.lists(st.integers(1, 40), min_size=1, max_size=12).map(tuple),
    window=st.integers(1, 200),
)
def test_an_epoch_is_a_permutation(seed: int, epoch: int, num_rows: tuple[int, ...], window: int):
    total = sum(num_rows)
    positions = np.arange(total * epoch, total * (epoch + 1))
    order = SampleOrder(seed, "digest", num_rows, window)
    ids = _ids(order, positions, _starts(num_rows))
    assert sorted(ids) == list(range(total))
    shuffled = np.random.default_rng(0).permutation(total)
    assert (_ids(order, positions[shuffled], _starts(num_rows)) == ids[shuffled]).all()
    assert set(order.locate(positions)[0]) == {epoch}


def test_order_depends_on_all_that_it_should():
    rows = (50, 50)
    orders = [SampleOrder(0, "a", rows), SampleOrder(1, "a", rows), SampleOrder(0, "b", rows)]
    found = [_ids(order, range(200), _starts(rows)) for order in orders]
    epochs = [ids[start : start + 100].tobytes() for ids in found for start in (0, 100)]
    assert len(set(epochs)) == 6


def test_a_known_order():
    """It must not change with a release of numpy: resumed runs would see other samples."""
    ids = _ids(SampleOrder(7, "digest", (5, 4, 3), 6), range(14), _starts((5, 4, 3)))
    assert ids.tolist() == [10, 11, 9, 3, 4, 2, 0, 1, 7, 6, 8, 5, 2, 7]


def test_a_window_touches_few_shards():
    order = SampleOrder(0, "a", (10,) * 50, 20)
    _, shards, _ = order.locate(range(500))
    assert all(len(set(shards[start : start + 20])) == 2 for start in range(0, 500, 20))
    windows = order.windows_from(115)
    for start in (100, 120, 140):
        assert set(next(windows)) == set(shards[start : start + 20])


def test_when_each_shard_is_needed_next():
    order = SampleOrder(3, "a", (10,) * 12, 20)
    needs = order.next_needs(65)  # the fourth of six windows
    for shard in range(12):
        _, shards, _ = order.locate(range(60, 240))
        assert needs[shard] == int(np.flatnonzero(shards == shard)[0]) // 20


@pytest.fixture(scope="module")
def million() -> tuple[int, ...]:
    sizes = np.random.default_rng(5).integers(200, 1800, size=1000)
    sizes[-1] += NUM_IDS - sizes.sum()
    return tuple(sizes.tolist())


def _global_order(num_rows: tuple[int, ...], steps: range, world_size: int, batch_size: int) -> np.ndarray:
    """What ranks of their own, begun at ``steps.start``, see: their batches one after the other."""
    starts = _starts(num_rows)
    ranks = [SampleOrder(11, "digest", num_rows) for _ in range(world_size)]
    shares = [Share(11, batch_size, rank, world_size) for rank in range(world_size)]
    return np.concatenate(
        [
            _ids(order, share.positions(step), starts)
            for step in steps
            for order, share in zip(ranks, shares, strict=True)
        ]
    )


def test_one_order_over_a_million_ids(million: tuple[int, ...]):
    """Order, not set: one hash for all numbers of processes; none is left out, none is seen twice."""
    batch_size = 8000
    alone = _global_order(million, range(NUM_IDS // batch_size), 1, batch_size)
    assert np.array_equal(np.sort(alone), np.arange(NUM_IDS))
    expected = hashlib.sha256(alone.tobytes()).hexdigest()
    found = _global_order(million, range(NUM_IDS // batch_size), 8, batch_size)
    assert hashlib.sha256(found.tobytes()).hexdigest() == expected
    resumed_at = np.random.default_rng(2).integers(0, NUM_IDS // batch_size - 1, size=50)
    for world_size in (1, 2, 4, 8):
        for step in resumed_at[: 50 // world_size].tolist():  # all 50 of each, with threads: tests/training/test_loader
            found = _global_order(million, range(step, step + 1), world_size, batch_size)
            assert np.array_equal(found, alone[step * batch_size : (step + 1) * batch_size])


@pytest.mark.parametrize("position", [0, 499_990, 123_456_789, 10**15])
def test_resuming_computes_what_it_needs(million: tuple[int, ...], position: int):
    order = SampleOrder(1, "digest", million)
    order.locate(range(position, position + 64))
    assert order.num_windows_computed <= 2


# ------------------------------------------------------------------------------------------------------------- mixture


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5),
    seed=st.integers(0, 100),
    start=st.integers(0, 10**7),
)
def test_a_mixture_keeps_its_weights_and_leaves_nothing_out(weights: list[float], seed: int, start: int):
    try:
        shares = shares_of(weights)
    except ValueError:
        assert min(weights) / sum(weights) * SAMPLES_PER_BLOCK < 1
        return
    assert sum(shares) == SAMPLES_PER_BLOCK
    assert all(abs(s - w / sum(weights) * SAMPLES_PER_BLOCK) < 1 for s, w in zip(shares, weights, strict=True))
    mixture = Mixture(shares, seed, [str(i) for i in range(len(weights))])
    block = np.arange(SAMPLES_PER_BLOCK) + start // SAMPLES_PER_BLOCK * SAMPLES_PER_BLOCK
    assert np.bincount(mixture.locate(block)[0], minlength=len(shares)).tolist() == list(shares)
    positions = np.arange(start, start + SAMPLES_PER_BLOCK)
    parts, owns = mixture.locate(positions)
    before = mixture.before(start)
    for part in range(len(shares)):
        own = owns[parts == part]
        assert np.array_equal(own, before[part] + np.arange(len(own)))  # each follows its own order without a gap
    assert before.sum() == start


def test_a_weight_that_would_never_be_seen_is_refused():
    with pytest.raises(ValueError, match=r"weight 1e-05 of 1.00001 in all is less than one sample in 10000; raise it"):
        shares_of([1.0, 1e-5])


def test_the_digest_of_a_mixture():
    one, two = "1" * 64, "2" * 64
    assert mixture_digest({one: 3.0}) == one
    assert mixture_digest({one: 1, two: 3}) == mixture_digest({two: 6, one: 2})
    assert mixture_digest({one: 1, two: 3}) != mixture_digest({one: 3, two: 1})
