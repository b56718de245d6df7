"""The examples under infra/ start what there is to start, as those who read them understand it."""

import subprocess
import sys
from pathlib import Path

import yaml

INFRA = Path(__file__).parents[2] / "infra"


def test_hostfile_is_one_of_deepspeeds():
    code = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from deepspeed.launcher.runner import fetch_hostfile; print(dict(fetch_hostfile(sys.argv[1])))"
    )
    argv = [sys.executable, "-c", code, str(INFRA / "deepspeed" / "hostfile.example")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "{'gpu01': 8, 'gpu02': 8}", done.stderr


def test_slurm_script_is_a_script_of_as_many_tasks_as_it_says():
    script = INFRA / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    options = dict(
        line.split()[1].lstrip("-").split("=", 1)
        for line in text.splitlines()
        if line.startswith("#SBATCH --") and "=" in line
    )
    assert int(options["nodes"]) * int(options["ntasks-per-node"]) == 16
    assert "--set train.num_processes=16" in text


def test_pods_are_as_many_processes_as_the_run_says():
    path = INFRA / "kubernetes" / "pytorchjob.yaml"
    spec = yaml.safe_load(path.read_text())["spec"]
    replicas = spec["pytorchReplicaSpecs"]
    num_pods = sum(replica["replicas"] for replica in replicas.values())
    assert f"--set train.num_processes={num_pods * int(spec['nprocPerNode'])}" in path.read_text()
    for replica in replicas.values():
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        assert container["args"][:2] == ["-m", "training.main"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
