"""The whole pipeline through the command line, end to end: on a folder, killed and started again, and on S3.

All of it in one file, since all compare with one run of the demo, which takes minutes.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from PIL import Image

from infra.storage import open_store
from model.encoders import load_vae
from model.unet import load_unet
from preprocessing.contracts.config import DemoWorldConfig
from preprocessing.contracts.digests import uid_of
from preprocessing.contracts.manifest import Manifest
from preprocessing.demo.metadata import awkward_rows
from tests.integration.conftest import SMALL, Lacuna, shard_hashes, snapshot

pytestmark = pytest.mark.timeout(900)
STAGES = ("select", "download", "encode")
NUM_KILLS = 10
LOADS_FROM_ELSEWHERE = re.compile(
    r"<[^>]*\b(src|href|srcset|action|data|poster)\s*=\s*[\"']?\s*(https?:)?//|url\(\s*[\"']?(https?:)?//|@import", re.I
)


def _manifest(demo: dict[str, Any], stage: str) -> tuple[Path, Manifest]:
    path = Path(demo["datasets"][stage])
    return path.parent, Manifest.model_validate_json(path.read_text())


def test_the_last_line_says_where_everything_is(demo: dict[str, Any]):
    assert set(demo["datasets"]) == set(STAGES)
    for stage in STAGES:
        assert {"num_in", "num_out", "dropped"} <= set(demo["stages"][stage])
    for key in ("checkpoint", "report", "grid", "export"):
        assert Path(demo[key]).exists(), key
    assert set(demo["channel"]) == {"latest", "best", "stable"}


@pytest.mark.parametrize("stage", STAGES)
def test_every_row_of_every_shard_is_accounted_for(demo: dict[str, Any], stage: str):
    """Counted from the files, not from the report."""
    folder, manifest = _manifest(demo, stage)
    assert manifest.shards
    for shard in manifest.shards:
        rows: dict[str, int] = defaultdict(int)
        for file in shard.files:
            rows[file.kind] += pq.read_metadata(folder / file.name).num_rows
        assert shard.num_in == rows["rows"] + rows["rejects"] == shard.num_out + sum(shard.dropped.values())


def test_stages_hand_on_every_row(demo: dict[str, Any]):
    stages = demo["stages"]
    assert stages["download"]["num_in"] == stages["select"]["num_out"]
    assert stages["encode"]["num_in"] == stages["download"]["num_out"]


def test_each_awkward_kind_ends_under_the_reason_one_expects(demo: dict[str, Any], lacuna: Lacuna):
    reasons: dict[str, list[tuple[str, str]]] = defaultdict(list)
    kept = set()
    for stage in STAGES:
        folder, manifest = _manifest(demo, stage)
        for file in manifest.files("rejects"):
            for row in pq.read_table(folder / file.name).to_pylist():
                reasons[row["uid"]].append((stage, row["reason"]))
        if stage == "encode":
            for file in manifest.files("rows"):
                kept |= set(pq.read_table(folder / file.name, columns=["uid"]).column("uid").to_pylist())
    world = DemoWorldConfig(num_pictures=SMALL["source.demo.num_pictures"], port=lacuna.port)
    rows = awkward_rows(world)
    assert len({row.kind for row in rows}) > 30
    for row in rows:
        uid = uid_of(row.values["URL"] or "", row.values["TEXT"] or "")
        if row.expected_reason is None:
            assert uid in kept, f"{row.kind}: should have been kept, was {reasons[uid]}"
        else:
            assert (row.expected_stage, row.expected_reason) in reasons[uid], f"{row.kind}: {reasons[uid]}"


def test_training_never_sees_a_held_out_row(demo: dict[str, Any]):
    folder, manifest = _manifest(demo, "encode")
    uids = {
        split: {
            uid
            for file in manifest.files("rows", split)
            for uid in pq.read_table(folder / file.name, columns=["uid"]).column("uid").to_pylist()
        }
        for split in ("train", "validation")
    }
    assert uids["train"]
    assert uids["validation"]
    assert not uids["train"] & uids["validation"]


def test_again_is_quick_and_writes_nothing(demo: dict[str, Any], lacuna: Lacuna, demo_root: Path):
    before = snapshot(demo_root)
    again = lacuna.run("run", str(demo_root))
    assert snapshot(demo_root) == before
    assert all(summary["was_done"] for summary in again["stages"].values())
    assert again["datasets"] == demo["datasets"]
    assert again["checkpoint"] == demo["checkpoint"]


def test_another_threshold_is_another_dataset(demo: dict[str, Any], lacuna: Lacuna, demo_root: Path):
    before = snapshot(demo_root)
    stricter = lacuna.run("prepare", str(demo_root), **{"select.max_punsafe": 0.05})
    for stage in STAGES:
        assert stricter["datasets"][stage] != demo["datasets"][stage]
    after = snapshot(demo_root)
    assert {name: after[name] for name in before} == before


def test_validation_report_is_for_people_and_programs(demo: dict[str, Any]):
    folder = Path(demo["report"]).parent
    report = json.loads((folder / "report.json").read_text())
    assert {"masked_psnr_db", "masked_ssim", "masked_l1"} <= set(report["summary"])
    html = (folder / "report.html").read_text()
    assert "<script" not in html.lower()
    assert not LOADS_FROM_ELSEWHERE.search(html)  # a caption may *say* an address
    assert (folder / "grid.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_pull_gives_what_diffusers_loads(demo: dict[str, Any], lacuna: Lacuna, demo_root: Path, tmp_path: Path):
    lacuna.pull("stable", str(demo_root), tmp_path / "model")
    pipe = StableDiffusionInpaintPipeline.from_pretrained(
        str(tmp_path / "model" / "diffusers"), local_files_only=True, safety_checker=None
    )
    assert pipe.unet.config.in_channels == 9
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    pipe.set_progress_bar_config(disable=True)
    picture, hole = Image.new("RGB", (64, 64), "navy"), Image.new("L", (64, 64), 255)
    out = pipe(
        "a large red circle in the center, on a plain navy background",
        image=picture,
        mask_image=hole,
        height=64,
        width=64,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
    )
    assert isinstance(out, StableDiffusionPipelineOutput)
    assert out.images[0].size == (64, 64)


def test_a_dataset_of_other_encoders_is_refused(demo: dict[str, Any], lacuna: Lacuna, demo_root: Path, tmp_path: Path):
    """By specs: before anything is trained, and also where a checkpoint of the run is there already."""
    other = tmp_path / "model"
    shutil.copytree(Path(__file__).parents[2] / "model" / "tiny" / "weights", other)
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.18215}))
    dataset = str(Path(demo["datasets"]["encode"]).parent)
    before = snapshot(demo_root)
    error = lacuna.fail("train", str(demo_root), 2, **{"train.dataset": dataset, "model.base": str(other)})
    assert "VAE weights sha256: the dataset was encoded with" in error
    assert snapshot(demo_root) == before


@pytest.mark.soak
def test_training_on_masks_drawn_online_is_training_on_the_stored_ones(
    demo: dict[str, Any], lacuna: Lacuna, demo_root: Path
):
    """The first steps; beyond as many epochs as there are stored masks each visit meets a fresh one instead."""
    online = lacuna.run("train", str(demo_root), **{"train.mask_source": "online", "train.num_steps": 2})
    losses = []
    for summary in (demo, online):
        lines = (Path(summary["checkpoint"]).parents[1] / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"].hex() for line in lines[:2]])
    assert online["checkpoint"] != demo["checkpoint"]
    assert losses[0] == losses[1]
    error = lacuna.fail("plan", str(demo_root), 2, **{"train.text_source": "token_ids"})
    assert "train.text_source: 'token_ids', but the dataset that `encode` is to make stores no token ids" in error


# --------------------------------------------------------------------------------------------------------------- killed


def _run_killed(lacuna: Lacuna, root: Path, after_s: float) -> bool:
    """Starts the command in a group of its own and kills the group after a while; whether it was still running."""
    child = subprocess.Popen(
        lacuna.argv("run", str(root)),
        env=lacuna.environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        child.wait(after_s)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        return True
    return False


def _campaign(demo: dict[str, Any], demo_root: Path, lacuna: Lacuna, root: Path, num_kills: int, seed: int) -> int:
    draws = random.Random(seed)
    parts = [*demo["stages"].values(), demo["train"], demo["validation"]]
    longest_s = 10 + sum(part["seconds"] for part in parts)
    killed = 0
    for _ in range(num_kills):
        killed += _run_killed(lacuna, root, draws.uniform(8, longest_s))
    result = lacuna.run("run", str(root))
    own = {Path(uri).parent.name for uri in demo["datasets"].values()}  # other tests add to that store
    expected = {name: files for name, files in shard_hashes(demo_root).items() if name.partition("/")[2][:16] in own}
    assert len(expected) == len(own) == 3
    assert shard_hashes(root) == expected
    assert result["run_id"] == demo["run_id"]
    assert result["channel"]
    return killed


@pytest.mark.soak
def test_killed_and_started_again_is_the_uninterrupted_run(
    demo: dict[str, Any], demo_root: Path, lacuna: Lacuna, tmp_path: Path
):
    assert _campaign(demo, demo_root, lacuna, tmp_path / "store", num_kills=1, seed=1) == 1


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_kills(demo: dict[str, Any], demo_root: Path, lacuna: Lacuna, tmp_path: Path, record_property: Any):
    killed = _campaign(demo, demo_root, lacuna, tmp_path / "store", NUM_KILLS, seed=int(time.time()))
    record_property("killed_while_running", killed)
    assert killed >= NUM_KILLS // 2


# ---------------------------------------------------------------------------------------------------------------- on S3


def test_a_bucket_is_as_good_as_a_folder(
    demo: dict[str, Any], demo_root: Path, lacuna: Lacuna, s3_root: str, tmp_path: Path
):
    there = lacuna.run("run", s3_root)
    assert {name: summary["digest"] for name, summary in there["stages"].items()} == {
        name: summary["digest"] for name, summary in demo["stages"].items()
    }
    assert there["run_id"] == demo["run_id"]
    store = open_store(s3_root)
    here = shard_hashes(demo_root)
    for uri in there["datasets"].values():
        manifest = json.loads(store.read(uri.removeprefix(f"{store.uri}/")))
        files = [(file["name"], file["sha256"]) for shard in manifest["shards"] for file in shard["files"]]
        assert files == here[f"{manifest['stage']}/{manifest['digest']}"]
    lacuna.pull("stable", s3_root, tmp_path / "model")
    assert load_unet(tmp_path / "model" / "diffusers" / "unet").config["in_channels"] == 9
    load_vae(tmp_path / "model" / "diffusers" / "vae")
