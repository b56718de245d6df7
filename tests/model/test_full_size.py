"""Stable Diffusion 2 at full size on a CPU, from three published forms to an export, inside 22 GiB.

``make soak`` runs it. It takes about 16 GB of disk at a time, and prints time and peak of memory of every step.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

MAX_MEMORY_BYTES = 22 << 30
MIN_DISK_BYTES = 24 << 30
NUM_PARAMETERS_4_CHANNELS = 865_925_124 - 14_400
SCRIPT = Path(__file__).with_name("full_size.py")
STEPS = (
    "build",
    "convert sd2.ckpt",
    "convert sd2.safetensors",
    "convert diffusers",
    "widen",
    "train",
    "export",
    "sample",
    "equality",
)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_the_whole_walk_fits_into_22_gib(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if shutil.disk_usage(tmp_path).free < MIN_DISK_BYTES:
        pytest.fail(f"needs {MIN_DISK_BYTES >> 30} GiB of disk under {tmp_path}")
    found: dict[str, Any] = {}
    for step in STEPS:
        found[step], seconds, peak = run(step, tmp_path)
        with capfd.disabled():
            print(f"\n{step:24} {seconds:7.1f} s {peak / 2**30:6.2f} GiB  {json.dumps(found[step])}", flush=True)  # noqa: T201 - what this campaign is for
        assert peak < MAX_MEMORY_BYTES, (step, peak)
        CHECKS.get(step, lambda _: None)(found[step])
    forms = [found[f"convert {form}"]["sha256"] for form in ("diffusers", "sd2.safetensors", "sd2.ckpt")]
    assert forms[0] == forms[1] == forms[2]


def run(step: str, folder: Path) -> tuple[dict[str, Any], float, int]:
    """One step in a process of its own: what it found, its seconds, and its peak of resident bytes."""
    started = time.monotonic()
    output = folder / "output.json"
    with output.open("w") as stdout, (folder / "log.txt").open("w") as stderr:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        child = subprocess.Popen(
            [sys.executable, str(SCRIPT), step, str(folder)], stdout=stdout, stderr=stderr, env=environment
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, f"{step}: {(folder / 'log.txt').read_text()[-3000:]}"
    return json.loads(output.read_text().splitlines()[-1]), time.monotonic() - started, usage.ru_maxrss * 1024


def check_build(found: dict[str, Any]) -> None:
    assert found["num_parameters"]["unet"] == NUM_PARAMETERS_4_CHANNELS
    assert found["num_parameters"]["vae"] == 83_653_863


def check_widen(found: dict[str, Any]) -> None:
    assert max(found["differences"].values()) <= 1e-5 * max(1.0, found["largest"])


def check_train(found: dict[str, Any]) -> None:
    assert 0.5 < found["loss"] < 5  # a velocity has about unit variance, and random weights explain none of it
    assert all(moved > 0 for moved in found["moved"]), "an input channel of conv_in did not learn"


def check_export(found: dict[str, Any]) -> None:
    assert found["equal"] == {"unet": True, "vae": True}
    assert found["prediction_type"] == "v_prediction"


def check_sample(found: dict[str, Any]) -> None:
    assert found == {
        "shape": [1, 3, 512, 512],
        "is_finite": True,
        "pipeline_prediction_type": "v_prediction",
        "pipeline_in_channels": 9,
    }


def check_equality(found: dict[str, Any]) -> None:
    assert max(found["training"].values()) < 1e-5
    assert max(found["sampling"]) < 1e-5


CHECKS = {
    "build": check_build,
    "widen": check_widen,
    "train": check_train,
    "export": check_export,
    "sample": check_sample,
    "equality": check_equality,
}
