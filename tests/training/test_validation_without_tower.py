"""A base out of a Stable Diffusion file has no tower for pictures: the report leaves out the figures that need it."""

import json
import logging
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from infra.storage import open_store
from tests.training.validation_fixtures import demo_rows, make_spec, with_judge, write_checkpoint, write_dataset
from training.config import PublishConfig
from training.export import check_metrics
from training.validation import validate


def test_a_report_without_similarities(tmp_path: Path, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture):
    model = with_judge(tiny_model_dir, tmp_path / "model")
    path = tmp_path / "model" / "open_clip" / "open_clip_model.safetensors"
    last = json.loads(path.with_name("open_clip_config.json").read_text())["model_cfg"]["text_cfg"]["layers"] - 1
    unused = ("visual.", f"transformer.resblocks.{last}.", "text_projection", "logit_scale")
    save_file({key: value for key, value in load_file(path).items() if not key.startswith(unused)}, path)
    store = open_store(str(tmp_path / "store"))
    dataset = write_dataset(store, tmp_path / "rows", demo_rows(12))
    checkpoint = write_checkpoint(store, tmp_path / "weights", tiny_model_dir, 100)
    (tmp_path / "scratch").mkdir()
    spec = make_spec(store, dataset, checkpoint, model, num_object_samples=4)
    with caplog.at_level(logging.WARNING, logger="training.validation"):
        result = validate(spec, tmp_path / "scratch")
    assert "image_text_similarity is left out" in caplog.text
    assert "masked_psnr_db" in result["summary"]
    assert "object_agreement" in result["summary"]
    assert not [name for name in result["summary"] if "similarity" in name]
    report = json.loads(store.read(f"{result['prefix']}/report.json"))
    assert "similarity" not in json.dumps(report["by_mask"])
    assert b"PSNR" in store.read(f"{result['prefix']}/report.html")
    config = PublishConfig(channels=("best",), best_metric="image_text_similarity")  # pyright: ignore[reportCallIssue]  # the rest has defaults
    message = (
        r"publish\.best_metric: the report has no metric 'image_text_similarity' \(the base's text encoder has no image"
    )
    with pytest.raises(ValueError, match=message):
        check_metrics(config, result["summary"])
