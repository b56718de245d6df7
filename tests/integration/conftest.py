"""The command line as a user runs it: real processes, a real Prefect server, real HTTP, the shipped tiny models."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# The demo, small: every stage and every awkward kind of row, few pictures and steps.
SMALL = {
    "source.demo.num_pictures": 240,
    "source.rows_per_shard": 64,
    "select.validation_fraction": 0.12,
    "download.timeout_s": 3,
    "encode.num_mask_variants": 2,
    "train.num_steps": 24,
    "train.num_processes": 1,
    "train.global_batch_size": 32,
    "train.warmup_steps": 4,
    "train.checkpoint_every_steps": 8,
    "validation.mask_families": ["lama_medium_512"],
    "validation.num_samples": 6,
    "validation.num_object_samples": 8,
    "validation.num_inference_steps": 4,
    "validation.num_grid_rows": 2,
}


@dataclass
class Lacuna:
    """Runs ``lacuna`` with a Prefect home and a demo port of its own."""

    folder: Path
    port: int

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PREFECT_HOME": str(self.folder / "prefect")}

    def argv(self, verb: str, root: str, **settings: Any) -> list[str]:
        overrides = {**SMALL, "source.demo.port": self.port, **settings}
        flags = [flag for key, value in overrides.items() for flag in ("--set", f"{key}={json.dumps(value)}")]
        return [sys.executable, "-m", "flows.cli", verb, "--recipe", "demo", "--root", root, "--json", *flags]

    def run(self, verb: str, root: str, **settings: Any) -> dict[str, Any]:
        """Runs a verb that must succeed; returns the JSON object of the last line."""
        return self._succeed(self.argv(verb, root, **settings))

    def fail(self, verb: str, root: str, exit_code: int, **settings: Any) -> str:
        """Runs a verb that must fail with this exit code and one clear line; returns the line."""
        argv = self.argv(verb, root, **settings)
        done = subprocess.run(argv, env=self.environment(), capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == exit_code, done.stderr[-4000:]
        assert "Traceback" not in done.stderr
        last = json.loads(done.stdout.strip().splitlines()[-1])
        assert last["exit_code"] == exit_code
        assert "\n" not in last["error"]
        return last["error"]

    def pull(self, channel: str, root: str, to: Path) -> dict[str, Any]:
        """What a program that consumes checkpoints calls."""
        argv = [sys.executable, "-m", "flows.cli", "pull", channel, "--root", root, "--to", str(to), "--json"]
        return self._succeed(argv)

    def _succeed(self, argv: list[str]) -> dict[str, Any]:
        done = subprocess.run(argv, env=self.environment(), capture_output=True, text=True, timeout=540, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.strip().splitlines()[-1])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def snapshot(root: Path) -> dict[str, tuple[int, str]]:
    """Every file under a folder: when it was written, and the sha256 of its content."""
    return {
        str(path.relative_to(root)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(root.rglob("*"))
        if path.is_file() and not any(part.startswith(".lacuna-") for part in path.parts)
    }


def shard_hashes(root: Path) -> dict[str, list[tuple[str, str]]]:
    """Stage and digest of each dataset → (name, sha256) of its files, by its manifest."""
    found = {}
    for path in sorted((root / "datasets").rglob("MANIFEST.json")):
        manifest = json.loads(path.read_text())
        files = [(file["name"], file["sha256"]) for shard in manifest["shards"] for file in shard["files"]]
        found[f"{manifest['stage']}/{manifest['digest']}"] = files
    return found


@pytest.fixture(scope="session")
def lacuna(tmp_path_factory: pytest.TempPathFactory) -> Lacuna:
    return Lacuna(tmp_path_factory.mktemp("lacuna"), free_port())


@pytest.fixture(scope="session")
def demo_root(lacuna: Lacuna) -> Path:
    return lacuna.folder / "store"


@pytest.fixture(scope="session")
def demo(lacuna: Lacuna, demo_root: Path) -> dict[str, Any]:
    """One whole run of the small demo, shared by the tests."""
    return lacuna.run("run", str(demo_root))
