"""The same entry point, started by the launchers that clusters have: the same files, to the last bit."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from infra.storage import ObjectStore
from training.launch import train
from training.runspec import RunSpec, checkpoint_prefix, run_prefix

MakeRun = Callable[..., RunSpec]
Commands = Callable[[list[str], Path], list[tuple[list[str], dict[str, str]]]]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
LIMIT_S = 400
PLACES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _torchrun(run: list[str], folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    port = f"--master-port={_free_port()}"
    return [([str(BIN / "torchrun"), "--nproc-per-node=2", "--master-addr=127.0.0.1", port, "-m", *run], {})]


def _accelerate(run: list[str], folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    options = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    argv = [str(BIN / "accelerate"), "launch", *options, f"--main_process_port={_free_port()}", "-m", *run]
    return [(argv, {})]


def _deepspeed(run: list[str], folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    options = ["--num_gpus=2", f"--master_port={_free_port()}", "--module"]
    return [([str(BIN / "deepspeed"), *options, *run], {})]


def _deepspeed_hostfile(run: list[str], folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    """Two machines in the file, each started by hand with its number, as where there is no ssh between them."""
    hostfile = folder / "hostfile"
    hostfile.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    options = [f"--hostfile={hostfile}", "--no_ssh", "--master_addr=127.0.0.1", f"--master_port={_free_port()}"]
    command = [str(BIN / "deepspeed"), *options]
    return [([*command, f"--node_rank={node}", "--module", *run], {}) for node in range(2)]


def _slurm(run: list[str], folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    """What ``srun --ntasks=2`` tells its tasks, here without srun."""
    shared = {
        "SLURM_JOB_ID": _free_port(),
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NODEID": "0",
        "MASTER_PORT": _free_port(),
    }
    return [
        ([sys.executable, "-m", *run], {**shared, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        for rank in range(2)
    ]


def _run_all(commands: Sequence[tuple[list[str], dict[str, str]]]) -> None:
    """Runs commands beside each other, each in a process group of its own, and expects all to end well."""
    environment = {name: value for name, value in os.environ.items() if name not in PLACES}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    running = [
        subprocess.Popen(
            argv,
            env=environment | added,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for argv, added in commands
    ]
    try:
        for process in running:
            output, _ = process.communicate(timeout=LIMIT_S)
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


def _sha256(store: ObjectStore, run: RunSpec) -> str:
    """Of everything that is trained: parameters, optimizer, average, generators."""
    prefix, digest = checkpoint_prefix(run.run_id, run.train.num_steps), hashlib.sha256()
    names = sorted(info.key for info in store.list(f"{prefix}/") if info.key.endswith(".safetensors"))
    assert len(names) >= 5
    for name in names:
        digest.update(name.encode() + store.read(name))
    return digest.hexdigest()


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    """What `training.launch` came to, once it has been asked."""
    return {}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "commands",
    [
        pytest.param(_torchrun, id="torchrun", marks=pytest.mark.soak),
        pytest.param(_deepspeed, id="deepspeed"),
        pytest.param(_accelerate, id="accelerate", marks=pytest.mark.soak),
        pytest.param(_slurm, id="slurm", marks=pytest.mark.soak),
        pytest.param(_deepspeed_hostfile, id="deepspeed-hostfile", marks=pytest.mark.soak),
    ],
)
def test_every_launcher_trains_the_same(
    commands: Commands, make_run: MakeRun, store: ObjectStore, tmp_path: Path, expected: dict[str, str]
):
    run = make_run(num_processes=2, zero_stage=2, num_steps=2, checkpoint_every_steps=2, trackers=())
    if not expected:
        train(run, workdir=tmp_path / "ours", on_event=lambda _: None)
        expected["sha256"] = _sha256(store, run)
        for info in list(store.list(f"{run_prefix(run.run_id)}/")):
            store.delete(info.key)
    path = tmp_path / "run.json"
    path.write_text(run.model_dump_json())
    arguments = ["training.main", "--run-file", str(path), "--workdir", str(tmp_path / "scratch")]
    _run_all(commands(arguments, tmp_path))
    assert _sha256(store, run) == expected["sha256"]
    assert (tmp_path / "scratch" / "metrics.jsonl").is_file(), "scratch is where --workdir says"
