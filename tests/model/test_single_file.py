"""Single files: read by diffusers bit for bit, their `.yaml`, and the trap that they are for programs that guess."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers.loaders import single_file_utils
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model.compvis import TEXT_PREFIX, UNET_PREFIX, VAE_PREFIX, unet_from_compvis, vae_from_compvis
from model.encoders import TextEncoder, load_text_encoder, load_vae
from model.single_file import export_single_file, ldm_config, ldm_gaps
from model.specs import SD2_UNET_CONFIG, SD2_VAE_CONFIG, ScheduleSpec
from model.unet import build_unet, widen_conv_in
from model.weights import clip_text_state_dict, export_diffusers

LDM_UNET: dict[str, Any] = {
    "attention_head_dim": [4, 8],
    "block_out_channels": [32, 64],
    "cross_attention_dim": 32,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "in_channels": 9,
    "layers_per_block": 1,
    "sample_size": 8,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "use_linear_projection": True,
}
"""As small as a UNet can be that CompVis' classes could build: 32 groups, heads of one width."""
LDM_VAE: dict[str, Any] = {
    "block_out_channels": [32, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 1,
    "sample_size": 64,
    "scaling_factor": 0.2,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


@pytest.fixture
def unet(tiny_unet) -> UNet2DConditionModel:
    widened = widen_conv_in(tiny_unet)
    torch.nn.init.normal_(widened.conv_in.weight, std=0.1)
    return widened


@pytest.fixture
def publish(unet, vae_dir, text_dir, text_encoder, tmp_path):
    """Writes `diffusers/` and `model.safetensors`; keyword arguments replace the single file's defaults."""
    licence = tmp_path / "licence.txt"
    licence.write_text("a licence")

    def run(prediction_type: Any = "v_prediction", schedule: ScheduleSpec | None = None, **changes: Any) -> Path:
        shared: dict[str, Any] = {"unet": unet, "vae_dir": vae_dir, "prediction_type": prediction_type} | {
            key: changes.pop(key) for key in ("unet", "vae_dir", "dtype") if key in changes
        }
        export_diffusers(
            tmp_path / "diffusers",
            text_encoder=text_encoder,
            license_path=licence,
            model_card="",
            schedule=schedule,
            **shared,
        )
        export_single_file(
            tmp_path / "model.safetensors", schedule=schedule, **({"text_dir": text_dir} | shared | changes)
        )
        return tmp_path / "model.safetensors"

    return run


def from_single_file(path: Path, **arguments: Any) -> Any:
    return StableDiffusionInpaintPipeline.from_single_file(str(path), local_files_only=True, **arguments)


def paint(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    mask = Image.fromarray(np.pad(np.full((32, 32), 255, dtype=np.uint8), 16))
    return pipeline(
        "a cat",
        image=image,
        mask_image=mask,
        height=64,
        width=64,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_from_diffusers_to_one_file_and_back_is_bit_equal(publish, unet, vae_dir, text_encoder: TextEncoder, dtype):
    state = load_file(publish(dtype=dtype))

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

    def check(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
        assert set(found) == set(wanted)
        for key, value in wanted.items():
            assert found[key].dtype == dtype, key
            assert torch.equal(found[key], value.to(dtype)), key

    check(unet_from_compvis(part(UNET_PREFIX), unet.config), unet.state_dict())
    vae = load_vae(vae_dir)
    check(vae_from_compvis(part(VAE_PREFIX), vae.config), vae.state_dict())
    text = text_encoder.clip.state_dict()
    check(part(TEXT_PREFIX), {key: value for key, value in text.items() if not key.startswith("visual.")})
    assert "logit_scale" in part(TEXT_PREFIX)
    assert len(state) == sum(len(part(prefix)) for prefix in (UNET_PREFIX, VAE_PREFIX, TEXT_PREFIX))


def test_diffusers_makes_of_it_the_pipeline_that_its_folder_is(publish, text_encoder):
    path = publish()
    folder = StableDiffusionInpaintPipeline.from_pretrained(str(path.parent / "diffusers"), local_files_only=True)
    single = from_single_file(path, config=str(path.parent / "diffusers"))
    for name in ("unet", "vae", "text_encoder"):
        wanted, found = getattr(folder, name).state_dict(), getattr(single, name).state_dict()
        assert set(found) == set(wanted)
        assert all(torch.equal(found[key], value) for key, value in wanted.items()), name
    ours = {key.removeprefix("text_model."): value for key, value in clip_text_state_dict(text_encoder).items()}
    text = {key.removeprefix("text_model."): value for key, value in single.text_encoder.state_dict().items()}
    assert all(torch.equal(text[key], value) for key, value in ours.items())
    assert single.scheduler.config.prediction_type == "v_prediction"
    assert np.array_equal(paint(single), paint(folder))


@pytest.mark.parametrize("layers", [24, 23])
def test_text_towers_with_and_without_their_last_block_load(publish, tmp_path, layers: int):
    """24 blocks with the unused extras, as in the released file; 23, as from a text encoder of transformers'."""
    from open_clip.model import CLIP
    from transformers import CLIPTextConfig

    small: Any = {"image_size": 8, "patch_size": 8, "layers": 1, "width": 64, "head_width": 64}
    text_cfg: Any = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": layers}
    state = CLIP(embed_dim=24, vision_cfg=small, text_cfg=text_cfg).state_dict()
    state = {key: value for key, value in state.items() if not key.startswith("visual.") and key != "attn_mask"}
    if layers == 23:
        del state["text_projection"], state["logit_scale"]
    (tmp_path / "clip").mkdir()
    save_file(state, tmp_path / "clip" / "open_clip_model.safetensors")
    path = publish(text_dir=tmp_path / "clip")
    keys = load_file(path).keys()
    assert (TEXT_PREFIX + "transformer.resblocks.23.ln_1.weight" in keys) == (layers == 24)
    assert (TEXT_PREFIX + "text_projection" in keys) == (layers == 24)
    config_path = path.parent / "diffusers" / "text_encoder"
    config = CLIPTextConfig.from_pretrained(config_path)
    config.num_hidden_layers = 23
    config.save_pretrained(config_path)
    loaded = from_single_file(path, config=str(path.parent / "diffusers")).text_encoder.state_dict()
    in_proj = state["transformer.resblocks.22.attn.in_proj_weight"]
    (key,) = (key for key in loaded if key.endswith("encoder.layers.22.self_attn.v_proj.weight"))
    assert torch.equal(loaded[key], in_proj[64:])
    assert not any(value.is_meta for value in loaded.values())


# ------------------------------------------------------------------------------------------------------------ the trap


@pytest.fixture
def _scheduler_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers writes into its own table of defaults."""
    defaults = copy.deepcopy(single_file_utils.SCHEDULER_DEFAULT_CONFIG)
    monkeypatch.setattr(single_file_utils, "SCHEDULER_DEFAULT_CONFIG", defaults)


@pytest.fixture
def ldm_file(publish, tmp_path) -> Path:
    """A v-prediction file of the smallest model that CompVis' own classes could hold."""
    AutoencoderKL(**LDM_VAE).save_pretrained(tmp_path / "ldm-vae")
    return publish(unet=build_unet(LDM_UNET), vae_dir=tmp_path / "ldm-vae")


def load_by_yaml(path: Path, **arguments: Any) -> Any:
    """What a user does who has weights and `.yaml`, a tokenizer and a text encoder, but not our folder."""
    folder = StableDiffusionInpaintPipeline.from_pretrained(str(path.parent / "diffusers"), local_files_only=True)
    return from_single_file(
        path,
        original_config=str(path.with_suffix(".yaml")),
        text_encoder=folder.text_encoder,
        tokenizer=folder.tokenizer,
        safety_checker=None,
        feature_extractor=None,
        **arguments,
    )


@pytest.mark.usefixtures("_scheduler_defaults")
def test_the_yaml_builds_the_model_but_diffusers_overreads_the_v(ldm_file):
    """The trap: the `.yaml` says v, and the scheduler that diffusers makes from it says epsilon. And the cure."""
    assert yaml.safe_load(ldm_file.with_suffix(".yaml").read_text())["model"]["params"]["parameterization"] == "v"
    trapped = load_by_yaml(ldm_file)
    assert trapped.scheduler.config.prediction_type == "epsilon"

    folder = StableDiffusionInpaintPipeline.from_pretrained(str(ldm_file.parent / "diffusers"), local_files_only=True)
    for name in ("unet", "vae"):  # built from the numbers in the .yaml alone
        wanted, found = getattr(folder, name).state_dict(), getattr(trapped, name).state_dict()
        assert set(found) == set(wanted)
        assert all(torch.equal(found[key], value) for key, value in wanted.items()), name
    assert trapped.vae.config.scaling_factor == 0.2

    scheduler = DDIMScheduler.from_pretrained(ldm_file.parent / "diffusers", subfolder="scheduler")
    cured = load_by_yaml(ldm_file, scheduler=scheduler)
    assert cured.scheduler.config.prediction_type == "v_prediction"
    expected = paint(folder)
    assert np.abs(paint(cured) - expected).max() < 1e-5
    assert np.abs(paint(trapped) - expected).max() > 0.05


def test_released_configs_make_a_v_model_epsilon(publish):
    """The other way into the trap: the config of the released model, whose scheduler does not say what it predicts."""
    path = publish()
    released = path.parent / "released"
    shutil.copytree(path.parent / "diffusers", released)
    config_path = released / "scheduler" / "scheduler_config.json"
    config = json.loads(config_path.read_text())
    del config["prediction_type"], config["rescale_betas_zero_snr"], config["timestep_spacing"]
    config_path.write_text(json.dumps(config))
    assert from_single_file(path, config=str(released)).scheduler.config.prediction_type == "epsilon"
    scheduler = DDIMScheduler.from_pretrained(path.parent / "diffusers", subfolder="scheduler")
    cured = from_single_file(path, config=str(released), scheduler=scheduler)
    assert cured.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.usefixtures("_scheduler_defaults")
def test_the_short_cut_prediction_type_spoils_the_schedule(publish):
    """`from_single_file(prediction_type=…)` looks like the cure; with `config=` it makes betas of its own."""
    path = publish()
    with pytest.warns(FutureWarning, match="pass the object directly"):
        pipeline = from_single_file(path, config=str(path.parent / "diffusers"), prediction_type="v_prediction")
    scheduler = pipeline.scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    assert (scheduler.config.beta_start, scheduler.config.beta_end) != (0.00085, 0.012)


def test_programs_take_the_full_size_file_for_the_released_model():
    state = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.empty(320, 9, 3, 3, device="meta"),
        single_file_utils.CHECKPOINT_KEY_NAMES["v2"]: torch.empty(320, 1024, device="meta"),
    }
    assert single_file_utils.infer_diffusers_model_type(state) == "inpainting_v2"
    default = single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS["inpainting_v2"]
    assert default["pretrained_model_name_or_path"] == "stabilityai/stable-diffusion-2-inpainting"


# ---------------------------------------------------------------------------------------------------------------- yaml


def full_config(prediction_type: Any = "epsilon", schedule: ScheduleSpec | None = None) -> dict[str, Any]:
    with torch.device("meta"):
        unet, vae = build_unet(SD2_UNET_CONFIG).config, AutoencoderKL(**SD2_VAE_CONFIG).config
    assert ldm_gaps(unet, vae, text_width=1024) == []
    return ldm_config(unet, vae, prediction_type, schedule or ScheduleSpec(), latent_px=64)


def test_the_full_size_yaml_says_what_the_released_one_says():
    params = full_config()["model"]["params"]
    unet, vae = params["unet_config"]["params"], params["first_stage_config"]["params"]
    assert full_config()["model"]["target"] == "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"
    assert "parameterization" not in params
    said = {key: params[key] for key in ("linear_start", "linear_end", "timesteps", "image_size", "channels")}
    assert said == {"linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000, "image_size": 64, "channels": 4}
    assert (params["conditioning_key"], params["scale_factor"]) == ("hybrid", 0.18215)
    assert params["concat_keys"] == ["mask", "masked_image"]
    assert unet == {
        "use_checkpoint": True,
        "image_size": 32,
        "in_channels": 9,
        "out_channels": 4,
        "model_channels": 320,
        "attention_resolutions": [4, 2, 1],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 4, 4],
        "num_head_channels": 64,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "transformer_depth": 1,
        "context_dim": 1024,
        "legacy": False,
    }
    assert vae["embed_dim"] == 4
    assert (vae["ddconfig"]["ch"], vae["ddconfig"]["ch_mult"], vae["ddconfig"]["num_res_blocks"]) == (
        128,
        [1, 2, 4, 4],
        2,
    )
    assert params["cond_stage_config"] == {
        "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
        "params": {"freeze": True, "layer": "penultimate"},
    }


def test_diffusers_reads_the_full_size_yaml_as_the_full_size_config():
    read = single_file_utils.create_unet_diffusers_config_from_ldm(
        full_config("v_prediction"), {"x": torch.empty(0)}, image_size=None
    )
    for key in ("block_out_channels", "attention_head_dim", "cross_attention_dim", "in_channels", "layers_per_block"):
        assert read[key] == SD2_UNET_CONFIG[key], key
    assert read["down_block_types"] == SD2_UNET_CONFIG["down_block_types"]
    assert read["up_block_types"] == SD2_UNET_CONFIG["up_block_types"]
    assert read["use_linear_projection"] is True


def test_the_yaml_beside_the_file(publish):
    path = publish(schedule=ScheduleSpec(zero_terminal_snr=True, num_train_timesteps=500), resolution_px=128)
    text = path.with_suffix(".yaml").read_text()
    comment = "".join(line for line in text.splitlines() if line.startswith("#"))
    assert "Zero terminal SNR" in comment
    assert "model.safetensors" in comment
    assert "CompVis' own classes cannot hold these weights" in comment  # the tests' UNet has 8 groups
    params = yaml.safe_load(text)["model"]["params"]
    assert params["parameterization"] == "v"
    assert (params["timesteps"], params["image_size"], params["scale_factor"]) == (500, 16, 0.18215)
    assert params["unet_config"]["params"]["num_heads"] == 2


def test_an_epsilon_model_has_no_parameterization(publish):
    text = publish("epsilon").with_suffix(".yaml").read_text()
    assert "parameterization" not in text
    assert "Zero terminal SNR" not in text


def test_the_header_says_what_it_is(publish):
    path = publish(schedule=ScheduleSpec(zero_terminal_snr=True), metadata={"lacuna.run_id": "demo-1"})
    with safe_open(path, "pt") as file:
        said = file.metadata()
    assert said["format"] == "pt"
    assert (said["prediction_type"], said["modelspec.prediction_type"]) == ("v_prediction", "v")
    assert (said["zero_terminal_snr"], said["lacuna.run_id"]) == ("true", "demo-1")
    assert said["modelspec.resolution"] == "64x64"
    assert "modelspec.architecture" not in said  # it is none of Stable Diffusion's


def test_two_files_are_equal(publish, tmp_path, unet, vae_dir, text_dir):
    first = publish()
    again: dict[str, Any] = {"unet": unet, "vae_dir": vae_dir, "text_dir": text_dir}
    export_single_file(tmp_path / "again" / "model.safetensors", prediction_type="v_prediction", **again)
    for suffix in (".safetensors", ".yaml"):
        second = tmp_path / "again" / "model.safetensors"
        assert first.with_suffix(suffix).read_bytes() == second.with_suffix(suffix).read_bytes()


def test_refusals(unet, vae_dir, text_dir, tmp_path):
    arguments: dict[str, Any] = {"unet": unet, "vae_dir": vae_dir, "text_dir": text_dir}
    with pytest.raises(ValueError, match="does not end with"):
        export_single_file(tmp_path / "model.ckpt", prediction_type="epsilon", **arguments)
    with pytest.raises(ValueError, match="prediction_type is 'sample'"):
        export_single_file(tmp_path / "m.safetensors", prediction_type="sample", **arguments)  # pyright: ignore[reportArgumentType]  # on purpose
    with pytest.raises(ValueError, match="no text encoder in"):
        export_single_file(tmp_path / "m.safetensors", prediction_type="epsilon", **{**arguments, "text_dir": tmp_path})
    assert not list(tmp_path.glob("m.*"))


def test_the_canonical_text_folder_of_compact_vocabulary_is_written_whole(unet, vae_dir, tmp_path):
    """The shipped tiny encoder keeps only the rows that were trained; other programs need them all."""
    shipped = Path(__file__).parents[2] / "model" / "tiny" / "weights" / "open_clip"
    path = tmp_path / "m.safetensors"
    export_single_file(path, unet=unet, vae_dir=vae_dir, text_dir=shipped, prediction_type="epsilon")
    table = load_file(path)[TEXT_PREFIX + "token_embedding.weight"]
    expected = load_text_encoder(shipped, load_image_tower=False).clip.token_embedding.weight
    assert torch.equal(table, expected)
