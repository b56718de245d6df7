"""Where a process stands, from what each launcher puts into the environment."""

import pytest
import torch

from infra.errors import ContractError
from training.world import first_host, place_of, share_cores, share_of_cores, tasks_on_node

TORCHRUN = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "123456", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_JOB_NODELIST": "gpu[007-008]",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
}  # fmt: skip


def test_torch_words_are_taken_as_they_are():
    assert place_of(TORCHRUN) == TORCHRUN


def test_deepspeed_says_how_many_are_here_in_its_own_word():
    said = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"} | {"LOCAL_SIZE": "2"}
    assert place_of(said) == TORCHRUN | {"LOCAL_WORLD_SIZE": "2"}


def test_one_process_a_pod():
    said = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "run-master-0", "MASTER_PORT": "23456"}
    assert place_of(said) == said | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def test_slurm_is_translated():
    assert place_of(SRUN) == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": str(20000 + 123456 % 12000),
    }


def test_what_is_set_by_hand_counts_before_slurm():
    assert place_of(SRUN | {"MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "7"})["MASTER_ADDR"] == "10.1.1.1"
    assert place_of(SRUN | TORCHRUN) == TORCHRUN, "torchrun, started by srun once on each machine"


def test_the_step_counts_before_the_job():
    """Two of the job's eight tasks, on the second machine only."""
    said = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "gpu008", "SLURM_STEP_TASKS_PER_NODE": "2"}
    found = place_of(said | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"})
    assert (found["WORLD_SIZE"], found["MASTER_ADDR"], found["LOCAL_WORLD_SIZE"]) == ("2", "gpu008", "2")


def test_nobody_said_anything():
    found = place_of({"HOME": "/root"})
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_WORLD_SIZE"]) == ("0", "1", "1")


def test_several_without_an_address_cannot_meet():
    with pytest.raises(ContractError, match=r"MASTER_ADDR is not set"):
        place_of({"RANK": "1", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu007", "gpu007"),
        ("gpu[007-010,12],login1", "gpu007"),
        ("a1,b2", "a1"),
        ("rack[1-2]-n[05-06].example", "rack1-n05.example"),
        ("10.0.0.1,10.0.0.2", "10.0.0.1"),
    ],
)
def test_first_host(nodelist: str, host: str):
    assert first_host(nodelist) == host


def test_tasks_on_node():
    assert [tasks_on_node("4(x2),3", node) for node in range(3)] == [4, 4, 3]
    assert tasks_on_node("2", 0) == 2


@pytest.mark.parametrize(
    ("said", "local_size", "threads"),
    [
        ({}, 1, 16),
        ({}, 4, 4),
        ({}, 32, 1),
        ({"OMP_NUM_THREADS": "8"}, 4, 2),
        ({"OMP_NUM_THREADS": "1"}, 4, 1),
        ({"OMP_NUM_THREADS": "64"}, 4, 4),
        ({"OMP_NUM_THREADS": "4,2"}, 4, 4),
        ({"SLURM_PROCID": "0", "SLURM_CPUS_PER_TASK": "6"}, 4, 6),
        ({"SLURM_PROCID": "0", "SLURM_CPUS_PER_TASK": "64"}, 4, 16),
        ({"SLURM_CPUS_PER_TASK": "6"}, 4, 4),
    ],
)
def test_cores_are_shared(said: dict[str, str], local_size: int, threads: int):
    assert share_of_cores(said, 16, local_size) == threads


def test_torch_takes_its_share():
    before = torch.get_num_threads()
    try:
        assert share_cores(10**6) == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
