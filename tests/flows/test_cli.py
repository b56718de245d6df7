"""The command line as people and programs meet it: a process, its streams and its exit code."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.storage import open_store
from tests.preprocessing.looked_at import encoded_dataset

_ROOM = Path(__file__).parents[2]


def lacuna(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a folder of its own."""
    environment = {**os.environ, "PYTHONPATH": str(_ROOM), "PREFECT_HOME": str(cwd / "prefect"), **env}
    return subprocess.run(
        [sys.executable, "-P", "-m", "flows.cli", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def one_error(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of stderr, which is the error."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    """A metadata file in LAION's columns, on disk."""
    path = tmp_path / "metadata.parquet"
    rows = {
        "URL": ["http://127.0.0.1:1/a.jpg"], "TEXT": ["a"], "WIDTH": [512], "HEIGHT": [512],
        "punsafe": [0.01], "pwatermark": [0.1], "similarity": [0.3],
    }  # fmt: skip
    pq.write_table(pa.table(rows), path)
    return path


def _run(*sets: str) -> list[str]:
    return ["run", "--root", "store", *(word for text in sets for word in ("--set", text))]


def test_help_teaches(tmp_path: Path) -> None:
    done = lacuna("--help", cwd=tmp_path)
    assert done.returncode == 0
    verbs = ["run", "prepare", "train", "validate", "publish", "refresh", "plan", "status", "inspect", "verify", "pull"]
    verbs += ["show-config", "doctor"]
    assert all(f"\n  {verb} " in done.stdout for verb in verbs)
    assert "Exit codes" in done.stdout


def test_looking_does_not_import_heavy_things(tmp_path: Path) -> None:
    code = (
        "import sys; from flows.cli import app; app(['status', '--root', 'store'], standalone_mode=False); "
        "print([m for m in ('prefect', 'torch', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(_ROOM)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert not (tmp_path / "store").exists()  # looking leaves nothing behind


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.num_stepz=5", "train.num_stepz: unknown key; did you mean train.num_steps?"),
        ("train.num_steps=many", "train.num_steps: input should be a valid integer"),
    ],
)
def test_a_bad_config_is_exit_code_2(tmp_path: Path, with_base: list[str], override: str, message: str) -> None:
    done = lacuna(*_run(*with_base, override), cwd=tmp_path)
    assert done.returncode == 2
    assert message in one_error(done)
    assert done.stdout == ""


def test_an_error_is_json_too(tmp_path: Path, with_base: list[str]) -> None:
    done = lacuna(*_run(*with_base, "train.num_stepz=5"), "--json", cwd=tmp_path)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["exit_code"] == done.returncode == 2
    assert told["error"] in done.stderr


def test_a_wrong_option_is_exit_code_2(tmp_path: Path) -> None:
    assert lacuna("run", "--recipee", "demo", cwd=tmp_path).returncode == 2


def test_missing_metadata_is_exit_code_2(tmp_path: Path, with_base: list[str]) -> None:
    done = lacuna(*_run(*with_base, "source.metadata=[nowhere/*.parquet]"), cwd=tmp_path)
    assert done.returncode == 2
    assert "nowhere/*.parquet" in one_error(done)


def test_metadata_without_punsafe_is_exit_code_2(tmp_path: Path, with_base: list[str], metadata: Path) -> None:
    pq.write_table(pq.read_table(metadata).drop_columns(["punsafe"]), metadata)
    done = lacuna(*_run(*with_base, f"source.metadata=[{metadata}]"), cwd=tmp_path)
    assert done.returncode == 2
    assert "punsafe" in one_error(done)


def test_a_root_that_is_a_file_is_exit_code_2(tmp_path: Path, with_base: list[str], metadata: Path) -> None:
    (tmp_path / "store").write_text("not a folder")
    done = lacuna(*_run(*with_base, f"source.metadata=[{metadata}]"), cwd=tmp_path)
    assert done.returncode == 2
    assert str(tmp_path / "store") in one_error(done)


def test_an_unreachable_store_is_exit_code_2(tmp_path: Path, with_base: list[str], metadata: Path) -> None:
    with socket.socket() as closed:  # bound, never listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        account = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
        arguments = _run(*with_base, f"source.metadata=[{metadata}]")
        arguments[arguments.index("store")] = "s3://bucket/prefix"
        done = lacuna(*arguments, cwd=tmp_path, AWS_ENDPOINT_URL=endpoint, **account)
    assert done.returncode == 2
    assert endpoint in one_error(done)


def test_training_without_a_dataset_says_what_to_run(tmp_path: Path, with_base: list[str], metadata: Path) -> None:
    sets = [word for text in (*with_base, f"source.metadata=[{metadata}]") for word in ("--set", text)]
    done = lacuna("train", "--root", "store", *sets, cwd=tmp_path)
    assert done.returncode == 2
    assert "lacuna prepare" in one_error(done)


def test_pulling_from_an_empty_store(tmp_path: Path) -> None:
    done = lacuna("pull", "stable", "--to", "here", "--root", "store", cwd=tmp_path)
    assert done.returncode == 2
    assert "'stable'" in one_error(done)
    assert not (tmp_path / "here").exists()


def test_show_config_is_a_recipe(tmp_path: Path, with_base: list[str]) -> None:
    done = lacuna("show-config", "--set", with_base[0], "--set", "train.num_steps=7", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "again.yaml").write_text(done.stdout)
    again = lacuna("show-config", "--recipe", "again.yaml", "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["train"]["num_steps"] == 7


@pytest.mark.parametrize("words", [("run", "--nope"), ("pull", "stable"), ("bogus",)])
def test_usage_errors_are_one_line_and_one_object(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = lacuna(*words, "--json", cwd=tmp_path)
    assert done.returncode == 2
    assert one_error(done)
    assert json.loads(done.stdout.splitlines()[-1])["exit_code"] == 2


@pytest.mark.parametrize(
    "key", ["encode.mask_family=typo", "validation.mask_families=[typo]", "publish.best_metric=typo"]
)
def test_names_are_checked_before_anything_runs(tmp_path: Path, with_base: list[str], key: str) -> None:
    sets = [word for text in (*with_base, key) for word in ("--set", text)]
    done = lacuna("show-config", *sets, cwd=tmp_path)
    assert done.returncode == 2
    assert one_error(done).count(key.partition("=")[0]) == 1


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """The key of an encoded dataset in the folder ``store``."""
    return encoded_dataset(open_store(str(tmp_path / "store")), tmp_path / "rows", num_variants=0, moments=False)[0]


def test_a_dataset_is_inspected(tmp_path: Path, dataset: str) -> None:
    done = lacuna("inspect", dataset, "--root", "store", "--html", "sheet.html", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["stage"], told["num_out"], told["schema"]["image"]) == ("encode", 9, "binary")
    assert [step["prefix"] for step in told["lineage"]] == [dataset]
    assert told["columns"][0]["bytes_per_row"] > 0
    assert "bytes a row" in done.stderr
    page = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert page.count('<article class="row"') == 9
    assert "<script" not in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("datasets/encode/0123456789abcdef",), "is not there"),
        (("--html", "no/such/folder/sheet.html"), "--html: 'no/such/folder/sheet.html' cannot be written"),
        (("--html", "sheet.html", "--base", "no/such/base"), "'no/such/base' is not there"),
        (("--rows", "-1"), "--rows"),
    ],
)
def test_what_cannot_be_inspected_is_exit_code_2(
    tmp_path: Path, dataset: str, words: tuple[str, ...], message: str
) -> None:
    uri = () if words[0].startswith("datasets/") else (dataset,)
    done = lacuna("inspect", *uri, *words, "--root", "store", cwd=tmp_path)
    assert done.returncode == 2
    assert message in one_error(done)


def test_a_damaged_dataset_is_exit_code_3(tmp_path: Path, dataset: str) -> None:
    assert lacuna("verify", dataset, "--root", "store", cwd=tmp_path).returncode == 0
    (tmp_path / "store" / dataset / "train-00000.parquet").write_bytes(b"PAR1")
    (tmp_path / "store" / dataset / "train-00009.parquet").write_bytes(b"PAR1")
    done = lacuna("verify", dataset, "--root", "store", "--json", cwd=tmp_path)
    assert done.returncode == 3
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["exit_code"], [problem["kind"] for problem in told["problems"]]) == (3, ["bad", "foreign"])
    lines = done.stderr.splitlines()
    assert sum("train-00000.parquet: has 4 bytes" in line for line in lines) == 1
    assert sum("train-00009.parquet" in line for line in lines) == 1
    assert lines[-1].startswith("error: verify: 2 problems")


def test_status_shows_what_can_be_inspected(tmp_path: Path, dataset: str) -> None:
    done = lacuna("status", "--root", "store", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert dataset in done.stdout
