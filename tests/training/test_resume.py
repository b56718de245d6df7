"""What a checkpoint is for: to go on exactly, on as many processes and under whichever ZeRO stage there are then."""

import hashlib
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.bundles import MANIFEST_NAME, fetch_bundle, list_bundles
from infra.errors import EXIT_INTERRUPTED, EXIT_OUTSIDE_WORLD, EXIT_WALLTIME
from infra.storage import ObjectStore, open_store
from tests.training import save_harness
from tests.training.ends import clear, hex_losses, losses, state_sha256
from tests.training.forked_ranks import Ranks, Started
from training.checkpoint import Checkpoints
from training.runspec import RunSpec, checkpoint_prefix, checkpoints_prefix, run_prefix, step_of
from training.saved_state import read_state

MakeRun = Callable[..., RunSpec]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as ranks:
        yield ranks


def _with(run: RunSpec, **train: Any) -> RunSpec:
    """The same run, done in another way."""
    return run.model_copy(update={"train": run.train.model_copy(update=train)})


def _spec(run: RunSpec) -> Any:
    return run.model_dump(mode="json")


def _delete_after(store: ObjectStore, run: RunSpec, step: int) -> None:
    """Turns back to a step, as if the run had been killed soon after it was saved."""
    for info in list(store.list(f"{checkpoints_prefix(run.run_id)}/")):
        if step_of(info.key.removeprefix(f"{checkpoints_prefix(run.run_id)}/").partition("/")[0]) > step:
            store.delete(info.key)
    store.delete(f"{run_prefix(run.run_id)}/channels/newest.json")


def test_two_then_one_then_four_processes(make_run: MakeRun, store: ObjectStore, tmp_path: Path, ranks: Ranks):
    """Each leg under another ZeRO stage, too. But for the last digits of sums it is the run that one process makes."""
    run = make_run(num_steps=6, checkpoint_every_steps=2, micro_batch_size=2, keep_last=9)
    ranks.run(_spec(run), tmp_path / "one", 1)
    alone = losses(store, run)
    clear(store, run)

    legs = [
        _with(run, num_processes=2, zero_stage=2),
        _with(run, num_processes=1, zero_stage=0, micro_batch_size=8),
        _with(run, num_processes=4, zero_stage=1),
    ]
    for i, leg in enumerate(legs):
        ranks.run(_spec(leg), tmp_path / f"leg-{i}", leg.train.num_processes)
        if i < 2:
            _delete_after(store, run, 2 * (i + 1))
    resumed = losses(store, run)
    assert len(resumed) == 6
    differences = [abs(a - b) / b for a, b in zip(resumed, alone, strict=True)]
    _tell(f"2 -> 1 -> 4 processes: largest relative difference of a loss {max(differences):.1e}")
    assert max(differences) < 1e-5
    assert "was written by 1 processes, now there are 4" in (tmp_path / "leg-2" / "rank-0.log").read_text()


# -------------------------------------------------------------------------------------------------- killed, all at once


def test_killed_at_random_moments_it_ends_the_same(make_run: MakeRun, store: ObjectStore, tmp_path: Path, ranks: Ranks):
    _kill_at_random_moments(make_run, store, tmp_path, ranks, num_processes=1, num_kills=2, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize(("num_processes", "num_kills"), [(1, 100), (2, 20)])
def test_killed_at_random_moments_it_ends_the_same_campaign(
    make_run: MakeRun, store: ObjectStore, tmp_path: Path, ranks: Ranks, num_processes: int, num_kills: int
):
    num_kills = int(os.environ.get(f"LACUNA_RESUME_KILLS_{num_processes}", num_kills))
    seed = int(os.environ.get("LACUNA_SEED", time.time()))
    _kill_at_random_moments(make_run, store, tmp_path, ranks, num_processes, num_kills, seed)


def _kill_at_random_moments(
    make_run: MakeRun, store: ObjectStore, tmp_path: Path, ranks: Ranks, num_processes: int, num_kills: int, seed: int
) -> None:
    """SIGKILL to the whole process group, again and again; whenever a run reaches its end, it must be the same end.

    A run has twelve steps of two micro batches each, and saves after every other one: of ten losses that come after a
    checkpoint each is compared, to the last bit, and so is everything that is trained.
    """
    run = make_run(
        num_steps=12,
        checkpoint_every_steps=2,
        micro_batch_size=2 if num_processes == 2 else 4,
        num_processes=num_processes,
        zero_stage=2 if num_processes == 2 else 1,
        keep_last=2,
    )
    began = time.monotonic()
    ranks.run(_spec(run), tmp_path / "whole", num_processes)
    took_s = time.monotonic() - began
    expected = (state_sha256(store, run, 12), hex_losses(store, run))
    assert len(expected[1]) == 12
    clear(store, run)

    rng = random.Random(f"{seed} {num_processes}")
    done, pending, ends, moments = 0, 0, 0, Counter[str]()
    failures: list[str] = []
    while done + pending < num_kills or pending:
        started = ranks.start(_spec(run), tmp_path / f"try-{done + pending}-{ends}", num_processes)
        if done + pending < num_kills:
            time.sleep(rng.uniform(0, took_s))
            started.kill()
        codes = ranks.wait(started)
        if any(codes):
            assert set(codes) <= {0, -signal.SIGKILL}, started.log()
            pending += 1
            moments[_moment(started)] += 1
            continue
        ends += 1
        found = (state_sha256(store, run, 12), hex_losses(store, run))
        if found != expected:
            failures.append(f"{pending} kills since the last whole run: {found}, expected {expected}")
        clear(store, run)
        done, pending = done + pending, 0
    _tell(
        f"{num_processes} process(es), seed {seed}: {done} kills (last seen {dict(moments)}), {ends} runs to the end, "
        f"{len(failures)} ended differently; 95 % bound for none {_bound(done):.4f}"
    )
    assert not failures, "\n".join(failures)


def _bound(num_trials: int) -> float:
    """Up to which rate of failures no failure in so many trials leaves open, with 95 % confidence."""
    return 1 - 0.05 ** (1 / num_trials)


def _moment(started: Started) -> str:
    events = started.events()
    return events[-1]["event"] if events else "starting"


# ------------------------------------------------------------------------------------------- one rank killed in a save


def test_one_rank_killed_during_a_save(store: ObjectStore, tmp_path: Path, ranks: Ranks):
    _kill_one_rank_during_saves(store, tmp_path, ranks, num_kills=5)


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_one_rank_killed_during_a_save_campaign(store: ObjectStore, tmp_path: Path, ranks: Ranks):
    num_kills = int(os.environ.get("LACUNA_SAVE_KILLS", "300"))
    _kill_one_rank_during_saves(store, tmp_path, ranks, num_kills, seed=int(os.environ.get("LACUNA_SEED", "0")))


def _kill_one_rank_during_saves(
    store: ObjectStore, tmp_path: Path, ranks: Ranks, num_kills: int, seed: int = 0
) -> None:
    """Two ranks that only save, under ZeRO-2. What is believed after each kill must be what an undisturbed run has."""
    rng = random.Random(seed)
    spec = {"store": store.uri, "num_processes": 2, "num_steps": 10**6, "keep_last": 3}
    run_id = save_harness.RUN
    believed: dict[int, str] = {}
    num_nothing = 0
    for trial in range(num_kills):
        started = ranks.start(spec, tmp_path / f"try-{trial}", 2, "tests.training.save_harness:main")
        _wait_for_saves(started, rng.randint(1, 4))
        time.sleep(rng.uniform(0, 0.3))
        os.kill(rng.choice(started.pids), signal.SIGKILL)
        time.sleep(rng.choice([0, 0.5]))  # the other rank may go on for a while: its upload, for one
        started.kill()
        assert set(ranks.wait(started)) & {-signal.SIGKILL}, started.log()
        folder = Checkpoints(store, run_id, tmp_path / "reader").fetch_newest()
        if folder is None:
            num_nothing += 1
            continue
        believed[read_state(folder).step] = _folder_sha256(folder)
        shutil.rmtree(tmp_path / f"try-{trial}")
    assert believed, "every kill came before the first checkpoint"

    undisturbed = open_store(str(tmp_path / "undisturbed"))
    spec |= {"store": undisturbed.uri, "num_steps": max(believed), "keep_last": 10**6}
    started = ranks.start(spec, tmp_path / "undisturbed-work", 2, "tests.training.save_harness:main")
    assert ranks.wait(started) == [0, 0], started.log()
    for step, sha256 in believed.items():
        fetch_bundle(undisturbed, checkpoint_prefix(run_id, step), tmp_path / "expected" / str(step))
        assert sha256 == _folder_sha256(tmp_path / "expected" / str(step)), (
            f"the checkpoint of step {step} is not whole"
        )
    _tell(
        f"one rank killed during a save: {num_kills} kills ({num_nothing} before the first checkpoint), "
        f"{max(believed)} steps, 0 incomplete checkpoints believed; 95 % bound {_bound(num_kills):.4f}"
    )


def _wait_for_saves(started: Started, num_saves: int) -> None:
    _wait_until(started, lambda: sum(event["event"] == "saving" for event in started.events()) >= num_saves)


def _folder_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST_NAME:
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------- damage


def test_any_damage_to_the_newest_is_noticed_and_the_one_before_is_used(
    make_run: MakeRun, store: ObjectStore, tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
):
    """Each file of a real checkpoint, flipped, cut, and gone; and its manifest, in more ways."""
    run = make_run(num_steps=2, checkpoint_every_steps=1)
    ranks.run(_spec(run), tmp_path / "work", 1)
    prefix = checkpoint_prefix(run.run_id, 2)
    before = {info.key: store.read(info.key) for info in store.list(f"{run_prefix(run.run_id)}/")}
    names = [key.removeprefix(f"{prefix}/") for key in before if key.startswith(f"{prefix}/")]
    assert len(names) == 9, names
    rng = random.Random(0)
    manifest = before[f"{prefix}/{MANIFEST_NAME}"]
    damages: list[tuple[str, str, bytes | None]] = [
        (MANIFEST_NAME, "the older one's", before[f"{checkpoint_prefix(run.run_id, 1)}/{MANIFEST_NAME}"]),
        (MANIFEST_NAME, "empty", b""),
        *((MANIFEST_NAME, "flipped", _flipped(manifest, rng)) for _ in range(8)),
    ]
    for name in names:
        content = before[f"{prefix}/{name}"]
        damages += [
            (name, "flipped", _flipped(content, rng)),
            (name, "cut", content[: rng.randrange(len(content))]),
            (name, "gone", None),
        ]
    for name, what, content in damages:
        _put_back(store, run, before)
        key = f"{prefix}/{name}"
        store.delete(key) if content is None else store.put(key, content)
        caplog.clear()
        folder = Checkpoints(store, run.run_id, tmp_path / "reader").fetch_newest()
        assert folder is not None
        assert read_state(folder).step == 1, f"{name} {what}: it was believed"
        loud = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert any("CHECKPOINT DAMAGED" in line and name in line for line in loud), (name, what, loud)
    _tell(f"damage to the newest checkpoint: {len(damages)} kinds, {len(damages)} noticed")

    # Where there is no pointer to hold it against, the manifest knows its own content.
    _put_back(store, run, before)
    store.delete(f"{run_prefix(run.run_id)}/channels/newest.json")
    store.put(f"{prefix}/{MANIFEST_NAME}", manifest.replace(b'"created_at": "2', b'"created_at": "3'))
    folder = Checkpoints(store, run.run_id, tmp_path / "reader").fetch_newest()
    assert folder is not None
    assert read_state(folder).step == 1


def _flipped(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _put_back(store: ObjectStore, run: RunSpec, before: dict[str, bytes]) -> None:
    for info in list(store.list(f"{run_prefix(run.run_id)}/")):
        if info.key not in before:
            store.delete(info.key)
    for key, content in before.items():
        if not store.exists(key) or store.read(key) != content:
            store.put(key, content)


# ----------------------------------------------------------------------------------------------------- how a run ends


def test_near_the_end_of_its_time_it_saves_and_exits_5(
    make_run: MakeRun, store: ObjectStore, tmp_path: Path, ranks: Ranks
):
    run = make_run(num_steps=10**5, checkpoint_every_steps=10**5, walltime_s=3, walltime_margin_s=1)
    started = ranks.start(_spec(run), tmp_path / "work", 1)
    assert ranks.wait(started) == [EXIT_WALLTIME], started.log()
    event = started.events()[-1]
    (prefix,) = list_bundles(store, checkpoints_prefix(run.run_id))
    assert event["type"] == "WalltimeError"
    assert f"the checkpoint of step {step_of(prefix)} is committed" in event["message"]


def test_a_second_signal_ends_a_rank_at_once_even_where_it_waits_for_others(
    make_run: MakeRun, tmp_path: Path, ranks: Ranks
):
    run = make_run(num_steps=10**5, checkpoint_every_steps=10**5, num_processes=2)
    started = ranks.start(_spec(run), tmp_path / "work", 2)
    try:
        _wait_until(started, lambda: any(event["event"] == "step" for event in started.events()))
        os.kill(started.pids[1], signal.SIGSTOP)  # rank 0 now waits for ever, in gloo
        os.kill(started.pids[0], signal.SIGTERM)
        _wait_until(started, lambda: "SIGTERM: a checkpoint is written" in started.log())
        time.sleep(0.6)
        os.kill(started.pids[0], signal.SIGTERM)
        _wait_until(started, lambda: "SIGTERM again" in started.log())
    finally:
        os.kill(started.pids[1], signal.SIGKILL)
        codes = ranks.wait(started)
    assert codes == [EXIT_INTERRUPTED, -signal.SIGKILL], started.log()


@pytest.mark.parametrize(("num_failures", "codes"), [(2, [0, 0]), (10**6, [EXIT_OUTSIDE_WORLD] * 2)])
def test_an_upload_that_fails_is_tried_again_and_then_ends_the_run(
    store: ObjectStore, tmp_path: Path, ranks: Ranks, num_failures: int, codes: list[int]
):
    spec = {"store": store.uri, "num_processes": 2, "num_steps": 3, "keep_last": 9, "num_failures": num_failures}
    started = ranks.start(spec, tmp_path / "work", 2, "tests.training.save_harness:main")
    assert ranks.wait(started) == codes, started.log()
    assert "is tried again" in started.log()
    steps = [step_of(prefix) for prefix in list_bundles(store, checkpoints_prefix(save_harness.RUN))]
    assert steps == ([1, 2, 3] if codes[0] == 0 else [])
    if codes[0]:
        saved = [event["step"] for event in started.events() if event["event"] == "saving"]
        assert saved == [1, 2], "it went on though its first checkpoint was lost"
        assert "503 Slow Down" in started.events()[-1]["message"]


def _tell(line: str) -> None:
    print(f"\n{line}", flush=True)  # noqa: T201 - what the campaigns are for


def _wait_until(started: Started, is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not is_so():
        assert time.monotonic() < deadline, started.log()
        time.sleep(0.02)
