"""Channels: compare-and-swap under real races, and what a consumer pulls."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from infra.bundles import MANIFEST_NAME, commit_bundle, delete_bundle, manifest_sha256, verify_bundle
from infra.channels import ChannelPointer, channel_key, move_channel, named_bundles, pointer_to, pull, read_channel
from infra.errors import ContractError, GateError, TransientError
from infra.gates import Gate, PassedGate
from infra.storage import FileEntry, ObjectInfo, open_store
from infra.storage_folder import FolderStore


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


def make_report(root: str, tmp_path: Path, step: int, summary: dict[str, Any], run_id: str = "demo") -> str:
    folder = tmp_path / f"report-{run_id}-{step}"
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text("{}")
    prefix = f"runs/{run_id}/validation/step-{step:08d}"
    metadata = {"summary": summary}
    commit_bundle(open_store(root), prefix, folder, kind="report", run_id=run_id, step=step, metadata=metadata)
    return prefix


def test_stable_moves_only_through_the_gate(any_root: str, tmp_path: Path):
    store = open_store(any_root)
    bundle = make_bundle(any_root, tmp_path, 100)
    report = make_report(any_root, tmp_path, 100, {"psnr": 20.0, "ssim": None})
    pointer = pointer_to(store, "stable", bundle, {"psnr": 99.0})  # whatever the pointer claims
    with pytest.raises(ContractError, match="only through the validation gate"):
        move_channel(store, "stable", pointer, always)
    for name, least in (("psnr", 20.5), ("ssim", 0.0), ("fid", 0.0), ("psnr", float("inf"))):
        with pytest.raises(GateError, match=name):
            move_channel(store, "stable", pointer, always, gate=Gate(report=report, minimum={name: least}))
    with pytest.raises(GateError, match="there is no report"):
        move_channel(store, "stable", pointer, always, gate=Gate(report="runs/demo/validation/step-00000200"))
    others = make_report(any_root, tmp_path, 100, {"psnr": 30.0}, run_id="other")
    for wrong in (others, make_report(any_root, tmp_path, 200, {"psnr": 30.0}), bundle):
        with pytest.raises(ContractError, match="not the report of demo step 100"):
            move_channel(store, "stable", pointer, always, gate=Gate(report=wrong))
    assert read_channel(store, "stable") is None
    # A pointer that pretends to have passed is believed no more than one that does not.
    pretends = PassedGate(report=report, minimum={}, report_sha256="0" * 64)
    with pytest.raises(ContractError, match="none was given"):
        move_channel(store, "stable", pointer.model_copy(update={"gate": pretends}), always)
    moved = move_channel(store, "stable", pointer, always, gate=Gate(report=report, minimum={"psnr": 20.0}))
    assert moved is not None
    assert moved.gate == PassedGate(report=report, minimum={"psnr": 20.0}, report_sha256=manifest_sha256(store, report))
    assert read_channel(store, "stable") == moved


def test_a_pointer_of_a_metric_that_is_no_number_can_be_read(tmp_path: Path):
    root = str(tmp_path / "store")
    store = open_store(root)
    pointer = pointer_to(store, "best", make_bundle(root, tmp_path, 100), {"psnr": float("nan"), "ssim": 1.0})
    move_channel(store, "best", pointer, always)
    found = read_channel(store, "best")
    assert found is not None
    assert found.metrics == {"ssim": 1.0}


class _DeletedWhileItMoves(FolderStore):
    """Somebody who has seen no channel that names the bundle deletes it right before the channel moves."""

    was_deleted: bool | None = None

    @override
    def compare_and_swap(self, key: str, data: bytes, expected_etag: str | None) -> ObjectInfo:
        prefix = "exports/demo/step-00000100"
        self.was_deleted = delete_bundle(self, prefix, lambda: prefix in named_bundles(self))
        return super().compare_and_swap(key, data, expected_etag)


def test_what_a_channel_is_moved_to_is_not_deleted_meanwhile(tmp_path: Path):
    root = str(tmp_path / "store")
    prefix = make_bundle(root, tmp_path, 100)
    store = _DeletedWhileItMoves(Path(root))
    assert move_channel(store, "best", pointer_to(store, "best", prefix), always) is not None
    assert store.was_deleted is False
    assert verify_bundle(store, prefix) == []
    assert not list(store.list(f"{prefix}/READING"))


def test_what_channels_name_is_what_they_point_to_and_pointed_to(any_root: str, tmp_path: Path):
    store = open_store(any_root)
    assert named_bundles(store) == set()
    prefixes = [make_bundle(any_root, tmp_path, step) for step in (100, 200, 300)]
    for prefix in prefixes:
        move_channel(store, "latest", pointer_to(store, "latest", prefix), always)
    assert named_bundles(store) == set(prefixes[1:])
    move_channel(store, "best", pointer_to(store, "best", prefixes[0]), always)
    assert named_bundles(store) == set(prefixes)
    store.put("channels/best.json", b"{}")
    with pytest.raises(ContractError, match="not a channel's pointer"):
        named_bundles(store)


def test_pull_by_channel_and_by_prefix(any_root: str, tmp_path: Path):
    store = open_store(any_root)
    first, second = (make_bundle(any_root, tmp_path, step) for step in (100, 200))
    move_channel(store, "latest", pointer_to(store, "latest", second), always)
    pulled = pull(store, "latest", tmp_path / "to")
    assert (pulled.manifest.step, pulled.is_changed, pulled.num_restarts) == (200, True, 0)
    assert (tmp_path / "to" / "weights").read_text() == "demo 200"
    assert not pull(store, "latest", tmp_path / "to").is_changed
    assert not list(store.list(f"{second}/READING"))
    assert pull(store, f"{first}/", tmp_path / "to").manifest.step == 100
    assert (tmp_path / "to" / "weights").read_text() == "demo 100"
    with pytest.raises(ValueError, match="points to nothing"):
        pull(store, "best", tmp_path / "new")
    with pytest.raises(ValueError, match="not complete"):
        pull(store, "exports/demo/step-00000300", tmp_path / "new")


class _Watched(FolderStore):
    """Remembers what was read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.was_read: list[str] = []

    @override
    def read_with_etag(self, key: str) -> tuple[bytes, str]:
        self.was_read.append(key)
        return super().read_with_etag(key)

    @override
    def download(self, key: str, path: Path, sha256: str | None = None) -> FileEntry:
        self.was_read.append(key)
        return super().download(key, path, sha256)


def test_pull_if_changed_reads_the_pointer_and_nothing_else(tmp_path: Path):
    root, to = str(tmp_path / "store"), tmp_path / "to"
    store = _Watched(Path(root))
    first, second = (make_bundle(root, tmp_path, step) for step in (100, 200))
    move_channel(store, "latest", pointer_to(store, "latest", first), always)
    assert pull(store, "latest", to, if_changed=True).is_changed
    store.was_read.clear()
    pulled = pull(store, "latest", to, if_changed=True)
    assert (pulled.is_changed, pulled.manifest.step) == (False, 100)
    assert store.was_read == ["channels/latest.json"]
    (to / "weights").write_text("demo 10")  # of another size
    assert pull(store, "latest", to, if_changed=True).is_changed
    assert (to / "weights").read_text() == "demo 100"
    move_channel(store, "latest", pointer_to(store, "latest", second), always)
    assert pull(store, "latest", to, if_changed=True).manifest.step == 200
    (to / "weights").write_text("demo 2OO")  # of the same size: only a pull that hashes sees it
    assert not pull(store, "latest", to, if_changed=True).is_changed
    pull(store, "latest", to)
    assert (to / "weights").read_text() == "demo 200"


class _MovesOn(_Watched):
    """An outsider's view: it may not write, and the first bundle is deleted while its files are fetched."""

    @override
    def put(self, key: str, data: bytes) -> ObjectInfo:
        raise ValueError("access denied")

    @override
    def download(self, key: str, path: Path, sha256: str | None = None) -> FileEntry:
        if "step-00000100" in key:
            store = open_store(self.uri)
            move_channel(store, "latest", pointer_to(store, "latest", "exports/demo/step-00000200"), always)
            delete_bundle(store, "exports/demo/step-00000100")
        return super().download(key, path, sha256)


def test_a_bundle_deleted_under_a_pull_makes_it_start_again(tmp_path: Path):
    root = str(tmp_path / "store")
    first, _ = (make_bundle(root, tmp_path, step) for step in (100, 200))
    move_channel(open_store(root), "latest", pointer_to(open_store(root), "latest", first), always)
    pulled = pull(_MovesOn(Path(root)), "latest", tmp_path / "to")
    assert (pulled.manifest.step, pulled.num_restarts) == (200, 1)
    assert (tmp_path / "to" / "weights").read_text() == "demo 200"
    assert {path.name for path in tmp_path.glob(".to*")} == set()


def test_pull_believes_neither_a_changed_manifest_nor_a_changed_file(any_root: str, tmp_path: Path):
    store = open_store(any_root)
    prefix = make_bundle(any_root, tmp_path, 100)
    move_channel(store, "latest", pointer_to(store, "latest", prefix), always)
    store.put(f"{prefix}/weights", b"DEMO 100")
    with pytest.raises(TransientError, match="sha256"):
        pull(store, "latest", tmp_path / "to")
    key = f"{prefix}/{MANIFEST_NAME}"
    store.put(key, store.read(key).replace(b'"step": 100', b'"step": 101'))
    with pytest.raises(ContractError, match="tampered"):
        pull(store, "latest", tmp_path / "to")
    assert not (tmp_path / "to").exists()
