"""The same run against a real S3 server: the same digests, the same bytes, and a checkpoint that consumers fetch."""

import json
from pathlib import Path
from typing import Any

import pytest

from infra.storage import open_store
from model.encoders import load_vae
from model.unet import load_unet
from tests.integration.conftest import Lacuna, shard_hashes

pytestmark = pytest.mark.timeout(900)


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
