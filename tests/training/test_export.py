"""Exports: complete, loadable by others, made once; and the rules by which channels move."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from validation_fixtures import RUN_ID, demo_rows, write_checkpoint, write_dataset

from infra.bundles import commit_bundle, load_bundle, verify_bundle
from infra.channels import pull, read_channel
from infra.errors import ContractError
from infra.storage import ObjectStore, open_store
from preprocessing.contracts.config import ModelConfig
from training.config import PublishConfig, TrainConfig
from training.export import export
from training.launch import run_module
from training.runspec import validation_prefix
from training.runspec_validation import ExportSpec

TRAIN = TrainConfig(prediction_type="v_prediction", mask_source="cached", seed=0, num_steps=300)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "store"))


def write_report(store: ObjectStore, folder: Path, step: int, summary: dict[str, float], run_id: str = RUN_ID) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps({"summary": summary}))
    prefix = validation_prefix(run_id, step)
    commit_bundle(store, prefix, folder, kind="report", run_id=run_id, step=step, metadata={"summary": summary})
    return prefix


def prepare(store: ObjectStore, folder: Path, model: ModelConfig, step: int, psnr: float, **publish: Any) -> ExportSpec:
    return ExportSpec(
        store_uri=store.uri,
        run_id=RUN_ID,
        step=step,
        checkpoint_prefix=write_checkpoint(store, folder / f"weights-{step}", model.directory, step, seed=step),
        report_prefix=write_report(
            store, folder / f"report-{step}", step, {"masked_psnr_db": psnr, "object_agreement": 0.5}
        ),
        dataset_prefixes=(write_dataset(store, folder / "rows", demo_rows(5)),),
        model=model,
        train=TRAIN,
        config=PublishConfig(**publish),
    )


def scratch(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / f"scratch-{name}"
    folder.mkdir()
    return folder


def test_exported_folder_is_used_as_its_card_says(
    store: ObjectStore, tmp_path: Path, tiny_model: ModelConfig, monkeypatch: pytest.MonkeyPatch
):
    spec = prepare(store, tmp_path, tiny_model, 100, 20.0)
    events: list[dict[str, Any]] = []
    result = run_module(
        "training.export", spec.model_dump(mode="json"), workdir=tmp_path / "work", on_event=events.append
    )
    assert result["prefix"] == f"exports/{RUN_ID}/step-00000100"
    assert result["was_done"] is False
    assert set(result["channels"]) == {"latest", "best", "stable"}
    assert all(outcome == f"moved to {result['prefix']}" for outcome in result["channels"].values())
    assert verify_bundle(store, result["prefix"]) == []
    manifest = load_bundle(store, result["prefix"])
    assert {"README.md", "LICENSE", "config.json", "report.json", "diffusers/model_index.json"} <= {
        file.name for file in manifest.files
    }
    assert manifest.metadata["prediction_type"] == "v_prediction"
    pulled = tmp_path / "pulled"
    pull(store, "stable", pulled)
    card = (pulled / "README.md").read_text()
    for word in ("v_prediction", "epsilon", "Limits", "masked_psnr_db", "sha256", "brown noise"):
        assert word in card
    assert "NO LICENSE" not in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(pulled / "picture.png")
    Image.fromarray(np.pad(np.full((20, 20), 255, np.uint8), 20)).save(pulled / "mask.png")
    monkeypatch.chdir(pulled)
    assert "num_inference_steps=50" in code
    names: dict[str, Any] = {}
    exec(code.replace("num_inference_steps=50", "num_inference_steps=2"), names)  # noqa: S102 - our own card
    with Image.open("result.png") as image:
        assert image.size == (32, 32)
    assert names["pipeline"].scheduler.config.prediction_type == "v_prediction"
    from model.unet import load_unet

    weights = names["pipeline"].unet.state_dict()
    expected = load_unet(tmp_path / "weights-100" / "ema").state_dict()
    assert all(torch.equal(weights[key], value) for key, value in expected.items())


def test_second_export_changes_nothing(store: ObjectStore, tmp_path: Path, tiny_model: ModelConfig):
    spec = prepare(store, tmp_path, tiny_model, 100, 20.0)
    export(spec, scratch(tmp_path, "1"))
    before = {info.key: info.etag for info in store.list()}
    result = export(spec, scratch(tmp_path, "2"))
    assert result["was_done"] is True
    assert set(result["channels"].values()) == {"kept: points to this export already"}
    assert {info.key: info.etag for info in store.list()} == before


def test_channels_move_by_their_rules(store: ObjectStore, tmp_path: Path, tiny_model: ModelConfig):
    def publish(step: int, psnr: float) -> dict[str, str]:
        spec = prepare(store, tmp_path, tiny_model, step, psnr, stable_min={"masked_psnr_db": 19.0})
        return export(spec, scratch(tmp_path, str(step)))["channels"]

    first = publish(200, 20.0)
    assert all(outcome.startswith("moved") for outcome in first.values())
    worse = publish(300, 18.0)
    assert worse["latest"].startswith("moved")
    assert worse["best"] == f"kept: masked_psnr_db 18 is not above 20 of exports/{RUN_ID}/step-00000200"
    assert worse["stable"] == "kept: below publish.stable_min: masked_psnr_db 18 < 19"
    older_but_better = publish(100, 25.0)
    assert older_but_better["latest"].startswith("kept")
    assert older_but_better["best"].startswith("moved")
    assert older_but_better["stable"].startswith("kept")
    steps = {}
    for name in ("latest", "best", "stable"):
        pointer = read_channel(store, name)
        assert pointer is not None
        steps[name] = pointer.step
    assert steps == {"latest": 300, "best": 100, "stable": 200}


def test_only_named_channels_move(store: ObjectStore, tmp_path: Path, tiny_model: ModelConfig):
    spec = prepare(store, tmp_path, tiny_model, 100, 20.0, channels=("latest",), best_metric="masked_ssim")
    assert set(export(spec, scratch(tmp_path, "1"))["channels"]) == {"latest"}
    assert read_channel(store, "best") is None


def test_base_without_license_is_said_loudly(
    store: ObjectStore, tmp_path: Path, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    (base / "LICENSE").unlink()
    model = ModelConfig(base=str(base), base_prediction_type="v_prediction")
    result = export(prepare(store, tmp_path, model, 100, 20.0), scratch(tmp_path, "1"))
    assert "NO LICENSE CAME" in caplog.text
    for name in ("README.md", "LICENSE", "diffusers/LICENSE"):
        assert "NO LICENSE CAME" in store.read(f"{result['prefix']}/{name}").decode()


@pytest.mark.parametrize(
    ("publish", "message"),
    [
        (
            {"best_metric": "masked_ssim"},
            r"publish\.best_metric: the report has no metric 'masked_ssim'; choose one of",
        ),
        ({"stable_min": {"fid": 1.0}}, r"publish\.stable_min\.fid"),
    ],
)
def test_rules_over_unknown_metrics_are_refused_before_anything_is_published(
    store: ObjectStore, tmp_path: Path, tiny_model: ModelConfig, publish: dict[str, Any], message: str
):
    spec = prepare(store, tmp_path, tiny_model, 100, 20.0, **publish)
    with pytest.raises(ValueError, match=message):
        export(spec, scratch(tmp_path, "1"))
    assert not list(store.list("exports/"))
    assert not list(store.list("channels/"))


def test_report_must_be_this_checkpoints(store: ObjectStore, tmp_path: Path, tiny_model: ModelConfig):
    spec = prepare(store, tmp_path, tiny_model, 100, 20.0)
    other = write_report(store, tmp_path / "other", 200, {"masked_psnr_db": 99.0})
    with pytest.raises(ContractError, match="step 200"):
        export(spec.model_copy(update={"report_prefix": other}), scratch(tmp_path, "1"))
    with pytest.raises(ValueError, match="validate the checkpoint first"):
        export(spec.model_copy(update={"report_prefix": "runs/none"}), scratch(tmp_path, "2"))
