"""Channels: compare-and-swap under real races, and what a consumer pulls."""

import subprocess
import sys
from pathlib import Path

import pytest

from infra.bundles import MANIFEST_NAME, commit_bundle
from infra.channels import ChannelPointer, channel_key, move_channel, pointer_to, pull, read_channel
from infra.errors import ContractError, TransientError
from infra.storage import open_store


def always(_: ChannelPointer | None) -> bool:
    return True


def make_bundle(root: str, tmp_path: Path, step: int, run_id: str = "demo") -> str:
    folder = tmp_path / f"made-{run_id}-{step}"
    folder.mkdir(exist_ok=True)
    (folder / "weights").write_text(f"{run_id} {step}")
    prefix = f"exports/{run_id}/step-{step:08d}"
    commit_bundle(open_store(root), prefix, folder, kind="export", run_id=run_id, step=step)
    return prefix


def test_channel_remembers_where_it_pointed(any_root: str, tmp_path: Path):
    store = open_store(any_root)
    first, second = (make_bundle(any_root, tmp_path, step) for step in (100, 200))
    assert read_channel(store, "latest") is None
    moved = move_channel(store, "latest", pointer_to(store, "latest", first, {"psnr": 20.0}), always)
    assert moved is not None
    assert (moved.previous, moved.step, moved.metrics) == (None, 100, {"psnr": 20.0})
    moved = move_channel(store, "latest", pointer_to(store, "latest", second), always)
    assert moved is not None
    assert (moved.previous, moved.step) == (first, 200)
    assert read_channel(store, "latest") == moved
    again = move_channel(store, "latest", pointer_to(store, "latest", second), lambda _: False)
    assert again == moved  # it points there already: nothing to do, nobody to ask


def test_latest_never_goes_back_within_a_run(tmp_path: Path):
    root = str(tmp_path / "store")
    store = open_store(root)
    old, new = (make_bundle(root, tmp_path, step) for step in (100, 200))
    other = make_bundle(root, tmp_path, 50, run_id="other")
    for channel in ("latest", "best"):
        move_channel(store, channel, pointer_to(store, channel, new), always)
    assert move_channel(store, "latest", pointer_to(store, "latest", old), always) is None
    assert move_channel(store, "best", pointer_to(store, "best", old), always) is not None
    assert move_channel(store, "latest", pointer_to(store, "latest", other), always) is not None


def test_channel_stays_where_the_rule_says_no(tmp_path: Path):
    root = str(tmp_path / "store")
    store = open_store(root)
    pointer = pointer_to(store, "best", make_bundle(root, tmp_path, 100))
    seen: list[ChannelPointer | None] = []
    assert move_channel(store, "best", pointer, lambda current: bool(seen.append(current))) is None
    assert seen == [None]
    assert read_channel(store, "best") is None


def test_pointer_must_be_true(tmp_path: Path):
    root = str(tmp_path / "store")
    store = open_store(root)
    pointer = pointer_to(store, "best", make_bundle(root, tmp_path, 100))
    with pytest.raises(ContractError, match="manifest sha256"):
        move_channel(store, "best", pointer.model_copy(update={"manifest_sha256": "0" * 64}), always)
    with pytest.raises(ContractError, match="'best' given for 'latest'"):
        move_channel(store, "latest", pointer, always)
    for name in ("../best", "", "a/b", "Best", "b.json"):
        with pytest.raises(ValueError, match="no channel's name"):
            channel_key(name)
    store.put(channel_key("best"), b'{"channel": "best"}')
    with pytest.raises(ContractError, match="not a channel's pointer"):
        read_channel(store, "best")


_MOVE = """
import sys
from infra.channels import move_channel, pointer_to
from infra.storage import open_store
store = open_store(sys.argv[1])
pointers = [pointer_to(store, "latest", prefix) for prefix in sys.argv[2:]]
print("ready", flush=True)
sys.stdin.readline()
for pointer in pointers:
    moved = move_channel(store, "latest", pointer, lambda current: current is None or current.step < pointer.step)
    if moved is not None:
        print(moved.previous, moved.bundle, flush=True)
"""


def test_racing_movers_leave_one_chain_that_only_rises(any_root: str, tmp_path: Path):
    steps = list(range(1, 25))
    prefixes = [make_bundle(any_root, tmp_path, step) for step in steps]
    movers = [
        subprocess.Popen(
            [sys.executable, "-c", _MOVE, any_root, *prefixes[start::4]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for start in range(4)
    ]
    for mover in movers:
        assert mover.stdout is not None
        assert mover.stdout.readline() == "ready\n"
    outputs = []
    for mover in movers:
        assert mover.stdin is not None
        mover.stdin.write("\n")
        mover.stdin.flush()
    for mover in movers:
        outputs.append(mover.communicate(timeout=500)[0])
        assert mover.returncode == 0
    moves = dict(line.split() for output in outputs for line in output.splitlines())
    assert len(moves) == sum(len(output.splitlines()) for output in outputs)  # no two replaced the same pointer
    chain = ["None"]
    while chain[-1] in moves:
        chain.append(moves[chain[-1]])
    assert len(chain) == len(moves) + 1  # nobody's move was lost
    assert chain[1:] == sorted(chain[1:])
    final = read_channel(open_store(any_root), "latest")
    assert final is not None
    assert final.bundle == prefixes[-1]


def test_pull_by_channel_and_by_prefix(any_root: str, tmp_path: Path):
    store = open_store(any_root)
    first, second = (make_bundle(any_root, tmp_path, step) for step in (100, 200))
    move_channel(store, "stable", pointer_to(store, "stable", second), always)
    assert pull(store, "stable", tmp_path / "to").step == 200
    assert (tmp_path / "to" / "weights").read_text() == "demo 200"
    assert pull(store, "stable", tmp_path / "to").step == 200
    assert pull(store, first, tmp_path / "to").step == 100
    assert (tmp_path / "to" / "weights").read_text() == "demo 100"
    with pytest.raises(ValueError, match="points to nothing"):
        pull(store, "best", tmp_path / "new")
    with pytest.raises(ValueError, match="not complete"):
        pull(store, "exports/demo/step-00000300", tmp_path / "new")


def test_pull_believes_neither_a_changed_manifest_nor_a_changed_file(any_root: str, tmp_path: Path):
    store = open_store(any_root)
    prefix = make_bundle(any_root, tmp_path, 100)
    move_channel(store, "stable", pointer_to(store, "stable", prefix), always)
    store.put(f"{prefix}/weights", b"DEMO 100")
    with pytest.raises(TransientError, match="sha256"):
        pull(store, "stable", tmp_path / "to")
    key = f"{prefix}/{MANIFEST_NAME}"
    store.put(key, store.read(key).replace(b'"step": 100', b'"step": 101'))
    with pytest.raises(ContractError, match="tampered"):
        pull(store, "stable", tmp_path / "to")
    assert not (tmp_path / "to").exists()
