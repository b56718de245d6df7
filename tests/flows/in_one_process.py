"""The small demo's datasets as one process makes them, without Prefect: what any engine must come to, too."""

import json
from pathlib import Path
from typing import Any

from flows.config import PipelineConfig, load_config
from flows.plan import DATA_STAGES, data_stage
from infra.storage import open_store
from preprocessing.contracts.manifest import Manifest
from preprocessing.demo.server import serve_demo_world
from preprocessing.stage import run_stage

# Every awkward kind of row, few pictures; several shards.
SMALL = {
    "source.demo.num_pictures": 50,
    "source.rows_per_shard": 24,
    "select.validation_fraction": 0.2,
    "download.timeout_s": 6,  # a busy machine must not fail rows
    "download.retries": 0,
    "retention.keep_pictures": True,
    "encode.num_mask_variants": 1,
}


def small_config(port: int, **settings: Any) -> PipelineConfig:
    """The demo recipe, small."""
    values = {**SMALL, "source.demo.port": port, **settings}
    return load_config("demo", [f"{key}={json.dumps(value)}" for key, value in values.items()])


def make_in_one_process(config: PipelineConfig, root: Path) -> dict[str, Manifest]:
    """Stage → its dataset."""
    store = open_store(str(root))
    made: dict[str, Manifest] = {}
    parent = None
    with serve_demo_world(config.source.demo.port):
        for name in DATA_STAGES:
            parent = made[name] = run_stage(store, data_stage(name, config, store, parent))
    return made


def shard_files(manifest: Manifest) -> list[tuple[str, str]]:
    """Names and sha256 of all that a dataset's manifest names."""
    files = [file for shard in manifest.shards for file in shard.files]
    return [(file.name, file.sha256) for file in (*files, *manifest.extra_files)]
