"""``lacuna plan --write-run``: what other launchers than ours start."""

import json
from pathlib import Path

from infra.storage import ObjectStore
from tests.flows.test_cli import lacuna
from tests.training.conftest import MakeDataset, make_dataset, store, tiny_model_dir
from training.runspec import RunSpec

__all__ = ["make_dataset", "store", "tiny_model_dir"]  # fixtures


def test_the_run_is_written_for_launchers(
    tiny_model_dir: Path, make_dataset: MakeDataset, store: ObjectStore, tmp_path: Path
) -> None:
    key = make_dataset(store)
    (tmp_path / "base").symlink_to(tiny_model_dir)
    sets = ["model.base=base", f"train.dataset={key}", "train.num_processes=16", "train.global_batch_size=512"]
    words = ["plan", "--root", "store", "--json", *(word for text in sets for word in ("--set", text))]
    done = lacuna(*words, "--write-run", "run.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    run = RunSpec.model_validate_json((tmp_path / "run.json").read_bytes())
    assert (told["run_id"], told["run_file"]) == (run.run_id, str(tmp_path / "run.json"))
    assert (run.dataset_prefix, run.train.num_processes) == (key, 16)
    assert run.store_uri == store.uri == str(tmp_path / "store"), "processes may be started in another folder"
    assert run.model.base == str(tmp_path / "base")

    done = lacuna(*words, "--write-run", "no/such/folder/run.json", cwd=tmp_path)
    assert done.returncode == 2
    assert "--write-run: 'no/such/folder/run.json' cannot be written" in done.stderr
