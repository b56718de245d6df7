import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from model.encoders import TextEncoder, load_text_encoder
from model.safetensors_writer import save_safetensors
from model.specs import ScheduleSpec
from model.unet import widen_conv_in
from model.weights import export_diffusers

CAPTIONS = ["", "a photo of a cat", "wow! it's 3 dogs ?!", "! ! !!!", "naïve 漢字 🎉", "WORD " * 100, "a  b\tc"]


@pytest.fixture
def export(tiny_unet, vae_dir, text_encoder, tmp_path):
    """Exports to a new folder; keyword arguments replace the defaults."""
    licence = tmp_path / "base-licence.txt"
    licence.write_text("the base's licence")

    def run(name: str = "pipeline", **changes: Any) -> Path:
        unet = tiny_unet if tiny_unet.config["in_channels"] == 9 else widen_conv_in(tiny_unet)
        arguments: dict[str, Any] = {
            "unet": unet,
            "vae_dir": vae_dir,
            "text_encoder": text_encoder,
            "prediction_type": "v_prediction",
            "license_path": licence,
            "model_card": "# A model",
        }
        export_diffusers(tmp_path / name, **(arguments | changes))
        return tmp_path / name

    return run


def load_pipeline(directory: Path) -> Any:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline

    pipeline = StableDiffusionInpaintPipeline.from_pretrained(str(directory), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_exported_pipeline_is_the_model_that_was_trained(export, text_encoder: TextEncoder, tiny_unet, dtype):
    directory = export(dtype=dtype)
    pipeline = load_pipeline(directory)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2

    ids = pipeline.tokenizer(CAPTIONS, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    assert torch.equal(ids.input_ids, text_encoder.tokenize(CAPTIONS))
    assert pipeline.tokenizer.pad_token_id == 0
    with torch.no_grad():
        hidden = pipeline.text_encoder(ids.input_ids).last_hidden_state.float()
    torch.testing.assert_close(hidden, text_encoder.embed_captions(CAPTIONS), rtol=tolerance, atol=tolerance)

    embeddings, null = pipeline.encode_prompt("a photo of a cat", torch.device("cpu"), 1, True)
    torch.testing.assert_close(
        embeddings.float(), text_encoder.embed_captions(["a photo of a cat"]), rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(null.float(), text_encoder.embed_captions([""]), rtol=tolerance, atol=tolerance)

    state = pipeline.unet.state_dict()
    for key, value in tiny_unet.state_dict().items():
        assert torch.equal(state[key].float(), value.to(dtype).float()), key
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert (directory / "LICENSE").read_text() == "the base's licence"
    assert (directory / "README.md").read_text() == "# A model"

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    mask = Image.fromarray(np.pad(np.full((32, 32), 255, dtype=np.uint8), 16))
    picture = pipeline(
        "a cat", image=image, mask_image=mask, height=64, width=64, num_inference_steps=2, output_type="np"
    ).images
    assert picture.shape == (1, 64, 64, 3)
    assert np.isfinite(picture).all()


def test_the_pipeline_samples_what_our_sampler_samples(export, text_encoder, tiny_unet):
    from model.sampler import sample_inpainting
    from model.schedule import alphas_cumprod

    pipeline = load_pipeline(export())
    noise, masked = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    theirs = pipeline(
        "a cat",
        image=torch.zeros(1, 3, 64, 64),
        mask_image=mask,
        masked_image_latents=masked,
        latents=noise,
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=5.0,
        output_type="latent",
    ).images
    ours = sample_inpainting(
        tiny_unet,
        noise=noise,
        mask=mask[..., ::8, ::8],
        masked_image_latents=masked,
        text_embeddings=text_encoder.embed_captions(["a cat"]),
        null_embedding=text_encoder.embed_captions([""])[0],
        num_inference_steps=4,
        guidance_scale=5.0,
        prediction_type="v_prediction",
        alphas_cumprod=alphas_cumprod(),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_weights_are_named_as_released_pipelines_name_them(export):
    keys = load_file(export() / "text_encoder" / "model.safetensors").keys()
    assert all(key.startswith("text_model.") for key in keys)
    assert not any(key.startswith("text_model.encoder.layers.2.") for key in keys)  # the third block is left out


def test_a_tower_that_came_without_its_last_block_gives_the_same_text_encoder(text_dir, export, tmp_path):
    """The last block serves nothing here; bases out of Stable Diffusion's own files lack it, and the projection."""
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copyfile(text_dir / "open_clip_config.json", bare / "open_clip_config.json")
    unused = ("visual.", "transformer.resblocks.2.", "text_projection", "logit_scale")
    state = load_file(text_dir / "open_clip_model.safetensors")
    save_file({k: v for k, v in state.items() if not k.startswith(unused)}, bare / "open_clip_model.safetensors")
    whole, partial = export("whole"), export("partial", text_encoder=load_text_encoder(bare))
    for name in ("model.safetensors", "config.json"):
        assert (whole / "text_encoder" / name).read_bytes() == (partial / "text_encoder" / name).read_bytes()


def test_zero_terminal_snr_is_in_the_scheduler(export):
    directory = export(schedule=ScheduleSpec(zero_terminal_snr=True))
    scheduler = load_pipeline(directory).scheduler
    assert scheduler.config.timestep_spacing == "trailing"
    assert scheduler.alphas_cumprod[-1] == 0


def test_two_exports_are_equal_and_no_path_travels(export, tmp_path):
    first, second = export("one"), export("two")
    files = {
        folder: {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for folder in (first, second)
    }
    assert files[first] == files[second]
    for file in first.rglob("*.json"):
        assert str(tmp_path) not in file.read_text()


def test_export_refuses(export, tmp_path):
    with pytest.raises(ValueError, match="license_path"):
        export(license_path=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="prediction_type is 'sample'"):
        export(prediction_type="sample")
    with pytest.raises(ValueError, match="no VAE in"):
        export("no-vae", vae_dir=tmp_path)
    export()
    with pytest.raises(ValueError, match="is not empty"):
        export()


def test_a_text_tower_without_counterpart_is_refused(text_dir, export, tmp_path):
    from open_clip.model import CLIP

    source = tmp_path / "clip"
    shutil.copytree(text_dir, source)
    config = json.loads((source / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["ls_init_value"] = 0.1
    (source / "open_clip_config.json").write_text(json.dumps(config))
    save_file(CLIP(**config["model_cfg"]).state_dict(), source / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=re.escape("ls_1.gamma has no counterpart")):
        export(text_encoder=load_text_encoder(source))


def test_saving_copes_with_shared_storage_and_leaves_no_scratch(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3)
    save_safetensors(tmp_path / "w.safetensors", {"a": tensor, "b": tensor.T, "n": torch.tensor(3)}, dtype=torch.half)
    loaded = load_file(tmp_path / "w.safetensors")
    assert torch.equal(loaded["b"], tensor.T.half())
    assert loaded["n"].dtype == torch.int64
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]
