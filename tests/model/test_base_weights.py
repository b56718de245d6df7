"""Published weights in any form become one folder: the same bytes from each, every key used or named, none guessed."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import base_configs, compvis
from model.base_kinds import recognize
from model.base_weights import convert_base
from model.encoders import load_text_encoder, load_vae
from model.specs import SD2_UNET_CONFIG, SD2_VAE_CONFIG
from model.unet import build_unet, load_unet, unet_input, widen_conv_in, widened

# Small, and such that the configs follow from the shapes as Stable Diffusion 2's do: 64 channels a head, 32 groups.
UNET: dict[str, Any] = {
    **SD2_UNET_CONFIG,
    "attention_head_dim": [1, 2],
    "block_out_channels": [64, 128],
    "cross_attention_dim": 64,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 1,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
VAE: dict[str, Any] = {
    **SD2_VAE_CONFIG,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "layers_per_block": 1,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
CLIP_CFG: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 3},
}
State = dict[str, Tensor]
PARTS = ("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
         "vae/diffusion_pytorch_model.safetensors", "open_clip/open_clip_config.json",
         "open_clip/open_clip_model.safetensors")  # fmt: skip


class Published:
    """One small model in the forms in which Stable Diffusion 2 is published."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.unet: State = build_unet(UNET).state_dict()
        self.ema: State = {key: value + 0.125 for key, value in self.unet.items()}
        self.vae: State = AutoencoderKL(**VAE).state_dict()
        clip = CLIP(**CLIP_CFG)
        for name, parameter in clip.named_parameters():
            if "embedding" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        self.clip: State = {key: value.detach() for key, value in clip.state_dict().items()}
        self.text: State = {key: value for key, value in self.clip.items() if not key.startswith("visual.")}

    def single(self, unet: State | None = None, *, ema: bool = False) -> State:
        unet = unet or self.unet
        config = UNET | {"in_channels": unet["conv_in.weight"].shape[1]}
        state = compvis.to_compvis(unet=unet, unet_config=config, vae=self.vae, vae_config=VAE, text=self.text)
        if ema:
            names = compvis.unet_names(config)
            for key, name in names.items():
                state[compvis.ema_name(compvis.UNET_PREFIX + name)] = self.ema[key]
            state["model_ema.decay"] = torch.tensor(0.9999)
            state["model_ema.num_updates"] = torch.tensor(4321, dtype=torch.int32)
        return {key: value.contiguous() for key, value in state.items()}

    def write_diffusers(
        self, folder: Path, *, suffix: str = ".safetensors", variant: str = "", wrapped: bool = True
    ) -> Path:
        def write(part: str, stem: str, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
            (folder / part).mkdir(parents=True)
            (folder / part / "config.json").write_text(json.dumps(config))
            path = folder / part / f"{stem}{variant}{suffix}"
            state = {key: value.contiguous() for key, value in state.items()}
            save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)

        write("unet", "diffusion_pytorch_model", self.unet, {"_class_name": "UNet2DConditionModel", **UNET})
        write("vae", "diffusion_pytorch_model", self.vae, {"_class_name": "AutoencoderKL", **VAE})
        text = compvis.clip_text_to_transformers(self.text, 2)
        if not wrapped:
            text = {key.removeprefix("text_model."): value for key, value in text.items()}
        text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        config = {"num_attention_heads": 1, "num_hidden_layers": 2, "hidden_size": 64, "hidden_act": "gelu"}
        write("text_encoder", "model" if suffix == ".safetensors" else "pytorch_model", text, config)
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"beta_start": 0.00085}))
        (folder / "LICENSE.md").write_text("OpenRAIL")
        return folder


@pytest.fixture(scope="module")
def published() -> Published:
    return Published()


@pytest.fixture(scope="module")
def from_single(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base folder that a single file gives."""
    folder = tmp_path_factory.mktemp("single")
    save_file(published.single(), folder / "512-base-ema.safetensors")
    convert_base(folder / "512-base-ema.safetensors", folder / "base")
    return folder / "base"


def same_bytes(one: Path, other: Path) -> list[str]:
    return [name for name in PARTS if (one / name).read_bytes() != (other / name).read_bytes()]


# --------------------------------------------------------------------------------------------------------------- forms


def test_the_base_folder_holds_what_was_published(published: Published, from_single: Path):
    unet = load_unet(from_single / "unet").state_dict()
    assert unet.keys() == published.unet.keys()
    assert all(torch.equal(unet[key], value) for key, value in published.unet.items())
    vae = load_vae(from_single / "vae").state_dict()
    assert all(torch.equal(vae[key], value) for key, value in published.vae.items())
    text = load_text_encoder(from_single / "open_clip")
    assert not text.compares
    whole = CLIP(**CLIP_CFG)
    whole.load_state_dict(published.clip)
    from model.encoders import TextEncoder

    captions = ["", "a red circle!", "café " * 100]
    assert torch.equal(text.embed_captions(captions), TextEncoder(whole, CLIP_CFG).embed_captions(captions))


@pytest.mark.parametrize(
    "form", ["ckpt", "old-ckpt", "ckpt-folder", "diffusers", "diffusers-bin", "unwrapped", "sharded"]
)
def test_all_forms_give_the_same_bytes(published: Published, from_single: Path, tmp_path: Path, form: str):
    source = tmp_path / "source"
    if form.endswith("ckpt") or form == "ckpt-folder":
        source.mkdir()
        content = {"state_dict": published.single(), "global_step": 875000}
        torch.save(content, source / "m.ckpt", _use_new_zipfile_serialization=form != "old-ckpt")
        source = source if form == "ckpt-folder" else source / "m.ckpt"
    else:
        suffix = ".bin" if form == "diffusers-bin" else ".safetensors"
        published.write_diffusers(source, suffix=suffix, wrapped=form != "unwrapped")
    if form == "sharded":
        shard(source / "unet")
    record = convert_base(source, tmp_path / "base")
    assert same_bytes(tmp_path / "base", from_single) == []
    assert record["prediction_type"] is None
    assert record["license"] == (None if "ckpt" in form else "LICENSE.md")
    assert (tmp_path / "base" / "LICENSE").exists() == ("ckpt" not in form)
    assert json.loads((tmp_path / "base" / "base.json").read_text()) == record


def shard(folder: Path) -> None:
    whole = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(whole)
    whole.unlink()
    keys = sorted(state)
    places = {}
    for number, part in enumerate((keys[:30], keys[30:]), start=1):
        name = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({key: state[key] for key in part}, folder / name)
        places |= dict.fromkeys(part, name)
    (folder / f"{whole.name}.index.json").write_text(json.dumps({"weight_map": places}))


def test_half_precision_stays_half(published: Published, tmp_path: Path):
    half = Published.__new__(Published)
    for name in ("unet", "vae", "text"):
        setattr(half, name, {key: value.half() for key, value in getattr(published, name).items()})
    save_file(half.single(), tmp_path / "m.safetensors")
    half.write_diffusers(tmp_path / "d", variant=".fp16")
    convert_base(tmp_path / "m.safetensors", tmp_path / "a")
    convert_base(tmp_path / "d", tmp_path / "b")
    assert same_bytes(tmp_path / "a", tmp_path / "b") == []
    written = load_file(tmp_path / "a" / PARTS[1])
    assert {value.dtype for value in written.values()} == {torch.float16}
    assert load_unet(tmp_path / "a" / "unet").dtype == torch.float32


def test_full_precision_is_preferred_to_a_variant(published: Published, tmp_path: Path, from_single: Path):
    published.write_diffusers(tmp_path / "d")
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (tmp_path / "d" / part / f"{stem}.fp16.safetensors").write_bytes(b"not read")
        (tmp_path / "d" / part / f"{stem}.non_ema.safetensors").write_bytes(b"not read")
    convert_base(tmp_path / "d", tmp_path / "base")
    assert same_bytes(tmp_path / "base", from_single) == []


def test_a_vae_with_the_old_names_of_its_attention(published: Published, tmp_path: Path, from_single: Path):
    published.write_diffusers(tmp_path / "d")
    path = tmp_path / "d" / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, value in load_file(path).items():
        for now, then in old.items():
            key = key.replace(f"attentions.0.{now}.", f"attentions.0.{then}.")
        state[key] = value
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in state
    save_file(state, path)
    convert_base(tmp_path / "d", tmp_path / "base")
    assert same_bytes(tmp_path / "base", from_single) == []


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_open_clips_own_files_keep_the_image_tower(published: Published, tmp_path: Path, name: str):
    folder = published.write_diffusers(tmp_path / "d")
    (folder / "open_clip").mkdir()
    (folder / "open_clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP_CFG}))
    path = folder / "open_clip" / name
    save_file(published.clip, path) if path.suffix == ".safetensors" else torch.save(published.clip, path)
    if path.suffix == ".safetensors":  # else it is what is used already
        shutil.move(folder / "unet" / "diffusion_pytorch_model.safetensors", folder / "x.safetensors")
        torch.save(published.unet, folder / "unet" / "diffusion_pytorch_model.bin")
        (folder / "x.safetensors").unlink()
    convert_base(folder, tmp_path / "base")
    encoder = load_text_encoder(tmp_path / "base" / "open_clip")
    assert encoder.compares
    assert encoder.embed_caption(["a"]).shape == (1, 32)


def test_a_base_folder_is_copied_as_it_is(from_single: Path, tmp_path: Path):
    convert_base(from_single, tmp_path / "base")
    assert same_bytes(tmp_path / "base", from_single) == []


# --------------------------------------------------------------------------------------------- average and prediction


def test_the_average_is_converted_too(published: Published, tmp_path: Path, from_single: Path):
    save_file(published.single(ema=True), tmp_path / "m.safetensors")
    record = convert_base(tmp_path / "m.safetensors", tmp_path / "base")
    assert record["ema_num_updates"] == 4321
    assert same_bytes(tmp_path / "base", from_single) == []
    average = load_unet(tmp_path / "base" / "unet_ema").state_dict()
    assert all(torch.equal(average[key], value) for key, value in published.ema.items())


def test_an_average_that_is_not_whole_is_refused(published: Published, tmp_path: Path):
    state = published.single(ema=True)
    del state["model_ema.diffusion_modelout2bias"]
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(
        ValueError, match=r"moving average is not of its UNet: 1 keys .*model_ema\.diffusion_modelout2bias"
    ):
        convert_base(tmp_path / "m.safetensors", tmp_path / "base")


@pytest.mark.parametrize(("said", "found"), [("v", "v_prediction"), ("eps", "epsilon"), (None, None)])
def test_the_yaml_states_the_prediction(published: Published, tmp_path: Path, said: str | None, found: str | None):
    params: dict[str, Any] = {"unet_config": {"params": {"num_head_channels": 64}}, "scale_factor": 0.5}
    if said is not None:
        params["parameterization"] = said
    (tmp_path / "m.yaml").write_text(json.dumps({"model": {"params": params}}))
    save_file(published.single(), tmp_path / "m.safetensors")
    assert convert_base(tmp_path / "m.safetensors", tmp_path / "base")["prediction_type"] == found
    assert load_vae(tmp_path / "base" / "vae").config["scaling_factor"] == 0.5


def test_two_statements_that_differ_are_refused(published: Published, tmp_path: Path):
    (tmp_path / "m.yaml").write_text("model: {params: {parameterization: v}}")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "epsilon"}')
    save_file(published.single(), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"scheduler_config\.json says epsilon and m\.yaml says v_prediction"):
        convert_base(tmp_path / "m.safetensors", tmp_path / "base")


@pytest.mark.parametrize("text", ["a: [", "- 1", "model: 3", "model: {params: {parameterization: x0}}", "\x00"])
def test_what_is_no_yaml_of_a_single_file_is_refused(published: Published, tmp_path: Path, text: str):
    (tmp_path / "m.yaml").write_text(text)
    save_file(published.single(), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"m\.yaml: ") as caught:
        convert_base(tmp_path / "m.safetensors", tmp_path / "base")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- widening


def test_widened_it_gives_what_the_base_gives(from_single: Path):
    base, wide = load_unet(from_single / "unet"), widen_conv_in(load_unet(from_single / "unet"))
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 64)
    steps = torch.tensor([3, 900])
    with torch.no_grad():
        expected = base(latents, steps, text, return_dict=False)[0]
        for mask in (torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8), torch.rand(2, 1, 8, 8).round()):
            found = wide(unet_input(latents, mask, torch.randn(2, 4, 8, 8)), steps, text, return_dict=False)[0]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_an_inpainting_model_stays_as_it_is(published: Published, tmp_path: Path):
    unet = published.unet | {"conv_in.weight": torch.randn(64, 9, 3, 3)}
    save_file(published.single(unet), tmp_path / "m.safetensors")
    record = convert_base(tmp_path / "m.safetensors", tmp_path / "base")
    assert "inpainting model of 9 input channels" in record["recognized_as"]
    loaded = load_unet(tmp_path / "base" / "unet")
    assert loaded.config["in_channels"] == 9
    assert torch.equal(loaded.conv_in.weight, unet["conv_in.weight"])


def test_new_channels_are_zero():
    weight = torch.randn(3, 4, 2, 2)
    wide = widened(weight, 9)
    assert torch.equal(wide[:, :4], weight)
    assert not wide[:, 4:].any()


# ----------------------------------------------------------------------------------------------------------- strictness


def changed(state: State, **changes: Tensor | None) -> State:
    kept = {key: value for key, value in state.items() if key not in changes}
    return kept | {key: value for key, value in changes.items() if value is not None}


UNET_KEY, VAE_KEY = "model.diffusion_model.out.2.bias", "first_stage_model.quant_conv.bias"
TEXT_KEY = "cond_stage_model.model.ln_final.bias"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({UNET_KEY: None}, r"1 keys are missing: out\.2\.bias"),
        ({VAE_KEY: None}, r"1 keys are missing: quant_conv\.bias"),
        ({TEXT_KEY: None}, r"missing: text_model\.final_layer_norm\.bias"),
        ({"model.diffusion_model.out.3.bias": torch.zeros(4)}, r"1 keys are unexpected: out\.3\.bias"),
        ({"first_stage_model.new.bias": torch.zeros(4)}, "1 keys are unexpected"),
        ({"cond_stage_model.model.new.bias": torch.zeros(4)}, "new.bias has no counterpart"),
        ({"something.else": torch.zeros(4)}, r"1 keys belong to no part of Stable Diffusion 2: something\.else"),
        ({UNET_KEY: torch.zeros(5)}, r"out\.2\.bias is \[5\] and must be \[4\]"),
        ({VAE_KEY: torch.zeros(5)}, r"quant_conv\.bias is \[5\] and must be \[8\]"),
        ({UNET_KEY: torch.zeros(4, dtype=torch.int64)}, r"not floating point: conv_out\.bias is torch\.int64"),
        ({VAE_KEY: torch.zeros(8, dtype=torch.uint8)}, "not floating point"),
        ({TEXT_KEY: torch.zeros(64, dtype=torch.int32)}, "not floating point"),
    ],
)
def test_every_key_is_used_or_named(
    published: Published, tmp_path: Path, changes: dict[str, Tensor | None], message: str
):
    path = tmp_path / "m.safetensors"
    save_file(changed(published.single(), **changes), path)
    with pytest.raises(ValueError, match=message) as caught:
        convert_base(path, tmp_path / "base")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"cross_attention_dim": "x"}, {"attention_head_dim": 0}, {"act_fn": "nope"}])
def test_a_config_that_makes_no_model_is_one_line(change: dict[str, Any]):
    with pytest.raises(ValueError, match=r"^the config makes no UNet2DConditionModel \(") as caught:
        base_configs.unet_shapes(SD2_UNET_CONFIG | change)
    assert "\n" not in str(caught.value)


def test_named_extras_are_left_alone(published: Published, tmp_path: Path, from_single: Path):
    extras = {
        "betas": torch.zeros(1000),
        "alphas_cumprod": torch.zeros(1000),
        "posterior_mean_coef1": torch.zeros(1000),
        "logvar": torch.zeros(1000),
        "first_stage_model.loss.logvar": torch.zeros(1),
        "cond_stage_model.model.attn_mask": torch.zeros(77, 77),
    }
    save_file(published.single() | extras, tmp_path / "m.safetensors")
    convert_base(tmp_path / "m.safetensors", tmp_path / "base")
    assert same_bytes(tmp_path / "base", from_single) == []


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet", {"conv_out.bias": None}, r"1 keys are missing: conv_out\.bias"),
        ("unet", {"extra.bias": torch.zeros(2)}, r"1 are unexpected: extra\.bias"),
        ("unet", {"conv_out.bias": torch.zeros(5)}, r"conv_out\.bias is \[5\], not \[4\]"),
        ("vae", {"quant_conv.bias": torch.zeros(8, dtype=torch.int32)}, "not floating point"),
    ],
)
def test_folders_are_strict_too(
    published: Published, tmp_path: Path, part: str, change: dict[str, Tensor | None], message: str
):
    folder = published.write_diffusers(tmp_path / "d")
    path = folder / part / "diffusion_pytorch_model.safetensors"
    save_file(changed(load_file(path), **change), path)
    with pytest.raises(ValueError, match=message):
        convert_base(folder, tmp_path / "base")


def test_parts_that_do_not_belong_together_are_refused(published: Published, tmp_path: Path):
    folder = published.write_diffusers(tmp_path / "d")
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", folder / "unet")
    with pytest.raises(
        ValueError, match=r"unet/diffusion_pytorch_model\.safetensors: this is a VAE alone; expected Stable"
    ):
        convert_base(folder, tmp_path / "base")


def test_a_text_encoder_of_another_width_is_refused(published: Published, tmp_path: Path):
    folder = published.write_diffusers(tmp_path / "d")
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="its num_hidden_layers is 3, and the weights are of 2"):
        convert_base(folder, tmp_path / "base")


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "no weights in unet/"),
        ("vae/diffusion_pytorch_model.safetensors", "no weights in vae/"),
        ("text_encoder/model.safetensors", "no text encoder"),
        ("unet/config.json", r"has no unet/config\.json"),
    ],
)
def test_what_is_missing_is_named(published: Published, tmp_path: Path, remove: str, message: str):
    folder = published.write_diffusers(tmp_path / "d")
    (folder / remove).unlink()
    with pytest.raises(ValueError, match=message):
        convert_base(folder, tmp_path / "base")


def test_several_single_files_are_refused(tmp_path: Path):
    for name in ("a.safetensors", "b.ckpt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds 2 weight files; name one, such as a\.safetensors"):
        convert_base(tmp_path, tmp_path / "base")


def test_what_is_not_there_and_what_holds_no_weights_is_refused(tmp_path: Path):
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(ValueError, match=r"readme\.txt' is no weight file; give a \.safetensors"):
        convert_base(tmp_path / "readme.txt", tmp_path / "base")
    with pytest.raises(ValueError, match=r"nothing\.ckpt' is neither a folder nor a file"):
        convert_base(tmp_path / "nothing.ckpt", tmp_path / "base")
    assert not (tmp_path / "base").exists()


# ------------------------------------------------------------------------------------------------------------ strangers

_U = "model.diffusion_model."
_SD1_TEXT = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
_VAE_ALL = {"first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3)}
_TEXT_ALL = {"cond_stage_model.model.transformer.resblocks.0.ln_1.weight": (1024,)}


def _single(channels: int, width: int, **more: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    unet = {
        f"{_U}input_blocks.0.0.weight": (320, channels, 3, 3),
        f"{_U}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, width),
    }
    return unet | _VAE_ALL | _TEXT_ALL | more


STRANGERS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "sd1": ({**_single(4, 768), _SD1_TEXT: (49408, 768)}, r"Stable Diffusion 1\.x"),
    "sd1-unet": (_single(4, 768), r"Stable Diffusion 1\.x \(text of width 768\)"),
    "sdxl": ({**_single(4, 2048), "conditioner.embedders.0.x": (1,)}, "Stable Diffusion XL"),
    "sdxl-unet": ({"conv_in.weight": (320, 4, 3, 3), "time_embedding.linear_1.bias": (1,),
                   "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (640, 2048)}, "Diffusion XL"),
    "depth": (_single(5, 1024), "depth-to-image"),
    "upscaler": (_single(7, 1024), "upscaler"),
    "pix2pix": (_single(8, 1024), "InstructPix2Pix"),
    "unclip": (_single(4, 1024, **{f"{_U}label_emb.0.0.weight": (1280, 2048)}), "unCLIP"),
    "lora": ({"lora_unet_down_blocks_0.lora_down.weight": (4, 320)}, "LoRA weights"),
    "lora-peft": ({"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": (4, 320)}, "LoRA weights"),
    "vae": ({"encoder.conv_in.weight": (128, 3, 3, 3), "decoder.mid.block_1.norm1.weight": (512,)}, "a VAE alone"),
    "text": ({"text_model.encoder.layers.0.layer_norm1.weight": (1024,)}, "a text encoder alone"),
    "clip": ({"transformer.resblocks.0.ln_1.weight": (1024,), "visual.proj": (1280, 1024)}, "a CLIP model alone"),
    "unet": ({k: v for k, v in _single(4, 1024).items() if k.startswith(_U)}, "a 4-channel UNet alone"),
    "no-text": ({k: v for k, v in _single(9, 1024).items() if "cond" not in k}, "a 9-channel UNet with vae"),
    "controlnet": ({"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "a ControlNet"),
    "controlnet-diffusers": ({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}, "a ControlNet"),
    "flux": ({"double_blocks.0.img_attn.qkv.weight": (9216, 3072)}, "Flux"),
    "sd3": ({f"{_U}joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536)}, "Stable Diffusion 3"),
    "inversion": ({"emb_params": (1, 1024)}, "a textual inversion"),
    "optimizer": ({"param.0.exp_avg": (3,)}, "an optimizer's state"),
    "unknown": ({"backbone.stage1.weight": (3,)}, r"an unknown model \(its keys are like backbone\.stage1\.weight\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", STRANGERS)
def test_another_model_is_called_by_its_name(tmp_path: Path, case: str):
    shapes, name = STRANGERS[case]
    shapes = {key: (min(shape[0], 2), *shape[1:]) for key, shape in shapes.items()}  # small files
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=rf"this is .*{name}.*; expected Stable Diffusion 2"):
        convert_base(tmp_path / "m.safetensors", tmp_path / "base")


# ------------------------------------------------------------------------------------------------------------ full size


def test_the_full_size_configs_follow_from_the_shapes():
    """Stable Diffusion 2's own numbers, from the keys and shapes of its single file; nothing of that size is made."""
    for channels in (4, 9):
        config = SD2_UNET_CONFIG | {"in_channels": channels}
        shapes = base_configs.unet_shapes(config)
        names = compvis.unet_names(config)
        of = {names[key]: shape for key, shape in shapes.items()}
        found = base_configs.infer_unet_config(list(of), of.__getitem__)
        assert {key: value for key, value in found.items() if key != "_class_name"} == config
        prefixed = {compvis.UNET_PREFIX + key: shape for key, shape in of.items()}
        assert recognize(prefixed, prefixed.__getitem__).is_usable
    shapes = base_configs.vae_shapes(SD2_VAE_CONFIG)
    of = {name: shapes[key] for key, name in compvis.vae_names(SD2_VAE_CONFIG).items()}
    found = base_configs.infer_vae_config(list(of), of.__getitem__)
    assert {key: value for key, value in found.items() if key != "_class_name"} == SD2_VAE_CONFIG


def test_old_and_new_configs_of_one_model_are_one():
    old = {key: UNET[key] for key in UNET if key not in ("center_input_sample", "freq_shift")}
    new = UNET | {"_diffusers_version": "9", "dropout": 0.0, "class_embed_type": None, "a_future_key": None}
    assert base_configs.unet_config(old, "x") == base_configs.unet_config(new, "x")
    with pytest.raises(ValueError, match="x: a_future_key is 3, which this version of diffusers does not know"):
        base_configs.unet_config(UNET | {"a_future_key": 3}, "x")
