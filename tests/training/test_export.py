"""Exports: complete, loadable by others, made once; and the rules by which channels move."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from open_clip.tokenizer import get_clean_fn
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

from validation_fixtures import RUN_ID, demo_rows, write_checkpoint, write_dataset

from infra.bundles import commit_bundle, load_bundle, verify_bundle
from infra.channels import pull, read_channel
from infra.errors import ContractError
from infra.launch import run_module
from infra.storage import ObjectStore, open_store
from preprocessing.contracts.config import ModelConfig
from training.config import PublishConfig, TrainConfig
from training.export import export
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


def prepare(
    store: ObjectStore,
    folder: Path,
    model: ModelConfig,
    step: int,
    psnr: float,
    train: TrainConfig = TRAIN,
    **publish: Any,
) -> ExportSpec:
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
        train=train,
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
    code, cleaning, single = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
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

    singly: dict[str, Any] = {}
    exec(single, singly)  # noqa: S102 - our own card
    assert singly["pipeline"].scheduler.config == names["pipeline"].scheduler.config
    for part in ("unet", "vae", "text_encoder"):
        wanted, found = (getattr(n["pipeline"], part).state_dict() for n in (names, singly))
        assert set(found) == set(wanted)
        assert all(torch.equal(found[key], value) for key, value in wanted.items()), part
    exec(cleaning, singly)  # noqa: S102 - our own card
    prompt = "  Tom &amp;  “Jerry”, NAÏVE ﬁsh "
    assert singly["clean"](prompt) == get_clean_fn("lower")(prompt) == 'tom & "jerry", naïve fish'


def exported(store: ObjectStore, result: dict[str, Any], name: str) -> str:
    return store.read(f"{result['prefix']}/{name}").decode()


def front_matter_of(card: str) -> dict[str, Any]:
    opening, front, _ = card.split("---\n", 2)
    assert opening == ""
    return yaml.safe_load(front)


def with_license(tiny_model_dir: Path, folder: Path, text: str | None, **record: Any) -> ModelConfig:
    """A base with another licence, and what is known of where it came from."""
    shutil.copytree(tiny_model_dir, folder)
    if text is None:
        (folder / "LICENSE").unlink()
    else:
        (folder / "LICENSE").write_text(text)
    if record:
        (folder / "base.json").write_text(json.dumps(record))
    return ModelConfig(base=str(folder), base_prediction_type="v_prediction")


def test_export_holds_a_single_file_that_says_where_it_came_from(
    store: ObjectStore, tmp_path: Path, tiny_model: ModelConfig
):
    train = TRAIN.model_copy(update={"zero_terminal_snr": True})
    spec = prepare(store, tmp_path, tiny_model, 100, 20.0, train)
    result = export(spec, scratch(tmp_path, "1"))
    name = f"{RUN_ID}-step-00000100"
    manifest = load_bundle(store, result["prefix"])
    files = {file.name for file in manifest.files}
    assert {f"{name}.safetensors", f"{name}.yaml"} <= files
    assert manifest.metadata["single_file"] == f"{name}.safetensors"
    assert manifest.metadata["zero_terminal_snr"] is True
    (tmp_path / "one.safetensors").write_bytes(store.read(f"{result['prefix']}/{name}.safetensors"))
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        said = file.metadata()
    assert (said["lacuna.run_id"], said["lacuna.step"]) == (RUN_ID, "100")
    assert (said["prediction_type"], said["zero_terminal_snr"]) == ("v_prediction", "true")
    datasets = json.loads(said["lacuna.datasets"])
    assert datasets == manifest.metadata["datasets"]
    assert len(datasets["encode"]) == 64
    assert set(json.loads(said["lacuna.base_weights_sha256"])) == {"unet", "vae", "open_clip"}
    params = yaml.safe_load(exported(store, result, f"{name}.yaml"))["model"]["params"]
    assert (params["parameterization"], params["image_size"]) == ("v", 4)
    scheduler = json.loads(exported(store, result, "diffusers/scheduler/scheduler_config.json"))
    assert (scheduler["rescale_betas_zero_snr"], scheduler["timestep_spacing"]) == (True, "trailing")
    card = exported(store, result, "README.md")
    for words in ("zero terminal SNR", "zsnr `true`", "prediction_type=` is no way out", f"{name}.safetensors"):
        assert words in card


def test_export_without_single_file_in_half_precision(store: ObjectStore, tmp_path: Path, tiny_model: ModelConfig):
    spec = prepare(store, tmp_path, tiny_model, 100, 20.0, single_file=False, dtype="float16")
    result = export(spec, scratch(tmp_path, "1"))
    names = {file.name for file in load_bundle(store, result["prefix"]).files}
    assert not any(name.endswith(".safetensors") for name in names if "/" not in name)
    assert "from_single_file(" not in exported(store, result, "README.md")
    (tmp_path / "w.safetensors").write_bytes(
        store.read(f"{result['prefix']}/diffusers/unet/diffusion_pytorch_model.safetensors")
    )
    assert {value.dtype for value in load_file(tmp_path / "w.safetensors").values()} == {torch.float16}


RAIL = "CreativeML Open RAIL++-M License\ndated November 24, 2022\n\nSection I: PREAMBLE\n"


def test_card_tells_licence_and_origin(store: ObjectStore, tmp_path: Path, tiny_model_dir: Path):
    model = with_license(
        tiny_model_dir,
        tmp_path / "base",
        RAIL,
        source="/somewhere/private/512-base-ema.ckpt",
        sha256={"512-base-ema.ckpt": "ab" * 32},
        recognized_as="a single file with a text-to-image UNet",
        notes=["the text encoder has no image tower"],
    )
    spec = prepare(store, tmp_path, model, 100, 20.0, base_model="stabilityai/stable-diffusion-2-base")
    result = export(spec, scratch(tmp_path, "1"))
    card = exported(store, result, "README.md")
    assert front_matter_of(card) == {
        "license": "openrail++",
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        "base_model": "stabilityai/stable-diffusion-2-base",
        "tags": ["stable-diffusion", "stable-diffusion-2", "inpainting", "v_prediction"],
    }
    assert card == exported(store, result, "diffusers/README.md")
    assert exported(store, result, "LICENSE") == exported(store, result, "diffusers/LICENSE") == RAIL
    for words in ("CreativeML Open RAIL++-M (`openrail++`)", "ab" * 32, "`512-base-ema.ckpt`", "no image tower"):
        assert words in card
    assert "/somewhere/private" not in card
    assert load_bundle(store, result["prefix"]).metadata["license"] == "openrail++"


def test_a_licence_of_another_name_is_linked(store: ObjectStore, tmp_path: Path, tiny_model_dir: Path):
    model = with_license(tiny_model_dir, tmp_path / "base", "\n# The Nobody's Licence, v2\n\nDo as you like.\n")
    result = export(prepare(store, tmp_path, model, 100, 20.0), scratch(tmp_path, "1"))
    front = front_matter_of(exported(store, result, "README.md"))
    assert {key: front[key] for key in front if key.startswith("license")} == {
        "license": "other",
        "license_name": "the-nobody-s-licence-v2",
        "license_link": "LICENSE",
    }


def test_a_licence_in_a_file_of_another_name_travels(store: ObjectStore, tmp_path: Path, tiny_model_dir: Path):
    model = with_license(tiny_model_dir, tmp_path / "base", RAIL)
    (model.directory / "LICENSE").rename(model.directory / "LICENSE.md")
    result = export(prepare(store, tmp_path, model, 100, 20.0), scratch(tmp_path, "1"))
    assert exported(store, result, "LICENSE") == RAIL
    assert load_bundle(store, result["prefix"]).metadata["license"] == "openrail++"


def test_second_export_changes_nothing(store: ObjectStore, tmp_path: Path, tiny_model: ModelConfig):
    spec = prepare(store, tmp_path, tiny_model, 100, 20.0)
    export(spec, scratch(tmp_path, "1"))
    before = {info.key: info.etag for info in store.list()}
    result = export(spec, scratch(tmp_path, "2"))
    assert result["was_done"] is True
    assert set(result["channels"].values()) == {"kept: points to this export already"}
    assert {info.key: info.etag for info in store.list()} == before


def test_an_export_in_another_form_is_refused(store: ObjectStore, tmp_path: Path, tiny_model: ModelConfig):
    spec = prepare(store, tmp_path, tiny_model, 100, 20.0)
    export(spec, scratch(tmp_path, "1"))
    other = spec.model_copy(update={"config": spec.config.model_copy(update={"dtype": "float16"})})
    with pytest.raises(ValueError, match=r"^publish\.dtype: 'float16', but .* was exported with 'float32'"):
        export(other, scratch(tmp_path, "2"))


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
    model = with_license(tiny_model_dir, tmp_path / "base", None)
    result = export(prepare(store, tmp_path, model, 100, 20.0), scratch(tmp_path, "1"))
    assert "NO LICENSE CAME" in caplog.text
    for name in ("README.md", "LICENSE", "diffusers/LICENSE"):
        assert "NO LICENSE CAME" in exported(store, result, name)
    card = exported(store, result, "README.md")
    assert front_matter_of(card)["license"] == "unknown"
    assert card.index("NO LICENSE CAME") < card.index("An inpainting model")


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
