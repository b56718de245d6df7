"""Every key of a full-size single file, both ways, against diffusers' own converters and a list made by hand."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.compvis import (
    TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    clip_text_from_transformers,
    clip_text_to_transformers,
    ema_name,
    named_extra,
    num_text_blocks,
    to_compvis,
    unet_from_compvis,
    unet_names,
    vae_from_compvis,
    vae_names,
)
from model.specs import SD2_UNET_CONFIG, SD2_VAE_CONFIG
from model.unet import build_unet

VIT_H_TEXT: dict[str, Any] = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}
SD1_UNET_CONFIG: dict[str, Any] = {
    **SD2_UNET_CONFIG,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "use_linear_projection": False,
}


def meta(build: Callable[[], Any]) -> dict[str, Tensor]:
    """The state dict of a module that takes no memory."""
    with torch.device("meta"):
        return build().state_dict()


def unet_state(config: Mapping[str, Any]) -> dict[str, Tensor]:
    return meta(lambda: build_unet(config))


def vae_state(config: Mapping[str, Any]) -> dict[str, Tensor]:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return meta(lambda: AutoencoderKL(**config))


def text_state(text_cfg: Mapping[str, Any]) -> dict[str, Tensor]:
    from open_clip.model import CLIP

    smallest: Any = {"image_size": 8, "patch_size": 8, "layers": 1, "width": 64, "head_width": 64}
    return meta(lambda: CLIP(embed_dim=1024, vision_cfg=smallest, text_cfg=dict(text_cfg)))  # pyright: ignore[reportArgumentType]  # open_clip casts dicts


@pytest.fixture(scope="module")
def full_size() -> dict[str, Tensor]:
    """The whole single file of Stable Diffusion 2 inpainting, on the meta device."""
    return to_compvis(
        unet=unet_state(SD2_UNET_CONFIG),
        unet_config=SD2_UNET_CONFIG,
        vae=vae_state(SD2_VAE_CONFIG),
        vae_config=SD2_VAE_CONFIG,
        text=text_state(VIT_H_TEXT),
    )


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


# From the released files' own listings and the reference classes, by hand: one or more of every kind.
HAND_CHECKED: dict[str, tuple[int, ...]] = {
    "model.diffusion_model.time_embed.0.weight": (1280, 320),
    "model.diffusion_model.time_embed.2.bias": (1280,),
    "model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3),
    "model.diffusion_model.input_blocks.1.0.in_layers.0.weight": (320,),
    "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": (320, 320, 3, 3),
    "model.diffusion_model.input_blocks.1.0.emb_layers.1.weight": (320, 1280),
    "model.diffusion_model.input_blocks.1.0.out_layers.0.bias": (320,),
    "model.diffusion_model.input_blocks.1.0.out_layers.3.weight": (320, 320, 3, 3),
    "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (320, 320),
    "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
    "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
    "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "model.diffusion_model.input_blocks.6.0.op.bias": (640,),
    "model.diffusion_model.input_blocks.8.1.norm.weight": (1280,),
    "model.diffusion_model.input_blocks.9.0.op.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.input_blocks.11.0.in_layers.2.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.middle_block.0.in_layers.2.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_out.0.bias": (1280,),
    "model.diffusion_model.middle_block.2.out_layers.3.bias": (1280,),
    "model.diffusion_model.output_blocks.0.0.skip_connection.weight": (1280, 2560, 1, 1),
    "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.3.1.proj_out.weight": (1280, 1280),
    "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.6.0.in_layers.0.weight": (1920,),
    "model.diffusion_model.output_blocks.8.2.conv.bias": (640,),
    "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm3.bias": (320,),
    "model.diffusion_model.out.0.weight": (320,),
    "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
    "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3),
    "first_stage_model.encoder.down.0.block.0.norm1.weight": (128,),
    "first_stage_model.encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
    "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "first_stage_model.encoder.mid.block_1.conv1.weight": (512, 512, 3, 3),
    "first_stage_model.encoder.mid.attn_1.norm.weight": (512,),
    "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "first_stage_model.encoder.norm_out.bias": (512,),
    "first_stage_model.encoder.conv_out.weight": (8, 512, 3, 3),
    "first_stage_model.decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
    "first_stage_model.decoder.mid.block_2.conv2.bias": (512,),
    "first_stage_model.decoder.up.3.block.2.conv1.weight": (512, 512, 3, 3),
    "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
    "first_stage_model.decoder.up.1.block.0.nin_shortcut.weight": (256, 512, 1, 1),
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "first_stage_model.decoder.conv_out.weight": (3, 128, 3, 3),
    "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
    "first_stage_model.post_quant_conv.bias": (4,),
    "cond_stage_model.model.token_embedding.weight": (49408, 1024),
    "cond_stage_model.model.positional_embedding": (77, 1024),
    "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": (3072, 1024),
    "cond_stage_model.model.transformer.resblocks.22.attn.out_proj.bias": (1024,),
    "cond_stage_model.model.transformer.resblocks.23.mlp.c_fc.weight": (4096, 1024),
    "cond_stage_model.model.transformer.resblocks.5.mlp.c_proj.weight": (1024, 4096),
    "cond_stage_model.model.ln_final.weight": (1024,),
    "cond_stage_model.model.text_projection": (1024, 1024),
    "cond_stage_model.model.logit_scale": (),
}


def test_full_size_file_has_the_names_and_shapes_checked_by_hand(full_size):
    assert {key: tuple(full_size[key].shape) for key in HAND_CHECKED} == HAND_CHECKED
    counts = {prefix: len(without_prefix(full_size, prefix)) for prefix in (UNET_PREFIX, VAE_PREFIX, TEXT_PREFIX)}
    # The text tower: 24 blocks of 12, and token and position embeddings, ln_final twice, text_projection, logit_scale.
    assert counts == {UNET_PREFIX: 686, VAE_PREFIX: 248, TEXT_PREFIX: 24 * 12 + 6}
    assert sum(counts.values()) == len(full_size)
    assert sum(value.numel() for value in without_prefix(full_size, UNET_PREFIX).values()) == 865_925_124


def test_diffusers_converters_read_every_key_of_ours(full_size):
    """They are another's work: what they make of our names must be diffusers' names, all of them, shapes included."""
    expected = unet_state(SD2_UNET_CONFIG)
    converted = convert_ldm_unet_checkpoint(dict(full_size), SD2_UNET_CONFIG)
    assert {key: value.shape for key, value in converted.items()} == {key: v.shape for key, v in expected.items()}
    names = unet_names(SD2_UNET_CONFIG)
    assert all(value is full_size[UNET_PREFIX + names[key]] for key, value in converted.items())

    expected = vae_state(SD2_VAE_CONFIG)
    converted = convert_ldm_vae_checkpoint(dict(full_size), SD2_VAE_CONFIG)
    assert {key: value.shape for key, value in converted.items()} == {key: v.shape for key, v in expected.items()}


def test_diffusers_reads_23_blocks_of_our_text_tower(full_size):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16)
    with torch.device("meta"):
        model = CLIPTextModel(config)
    converted = convert_open_clip_checkpoint(model, dict(full_size))
    ours = clip_text_to_transformers(without_prefix(full_size, TEXT_PREFIX), 23)
    assert {key: value.shape for key, value in converted.items()} == {key: value.shape for key, value in ours.items()}
    wanted = {key for key in model.state_dict() if not key.endswith("position_ids")}
    assert {key.removeprefix("text_model.") for key in ours} == {key.removeprefix("text_model.") for key in wanted}


def test_full_size_there_and_back_is_the_same(full_size):
    unet, vae = unet_state(SD2_UNET_CONFIG), vae_state(SD2_VAE_CONFIG)
    back = unet_from_compvis(without_prefix(full_size, UNET_PREFIX), SD2_UNET_CONFIG)
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in unet.items()}
    back = vae_from_compvis(without_prefix(full_size, VAE_PREFIX), SD2_VAE_CONFIG)
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in vae.items()}


def test_stable_diffusion_1_has_convolutions_where_2_has_matrices():
    names, state = unet_names(SD1_UNET_CONFIG), unet_state(SD1_UNET_CONFIG)
    key = "down_blocks.0.attentions.0.proj_in.weight"
    assert names[key] == "input_blocks.1.1.proj_in.weight"
    assert state[key].shape == (320, 320, 1, 1)
    back = unet_from_compvis({names[key]: value for key, value in state.items()}, SD1_UNET_CONFIG)
    assert all(back[key] is value for key, value in state.items())


@st.composite
def unet_configs(draw: st.DrawFn) -> dict[str, Any]:
    num_blocks, num_layers = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    attends = draw(st.lists(st.booleans(), min_size=num_blocks, max_size=num_blocks))
    return {
        "attention_head_dim": 2,
        "block_out_channels": draw(st.lists(st.sampled_from([8, 16]), min_size=num_blocks, max_size=num_blocks)),
        "cross_attention_dim": 8,
        "down_block_types": ["CrossAttnDownBlock2D" if is_on else "DownBlock2D" for is_on in attends],
        "in_channels": draw(st.sampled_from([4, 9])),
        "layers_per_block": num_layers,
        "norm_num_groups": 4,
        "transformer_layers_per_block": draw(st.integers(1, 2)),
        "up_block_types": ["CrossAttnUpBlock2D" if is_on else "UpBlock2D" for is_on in attends[::-1]],
        "use_linear_projection": draw(st.booleans()),
    }


@settings(max_examples=25, deadline=None)
@given(unet_configs())
def test_any_unet_of_this_shape_is_read_by_diffusers(config):
    state, names = unet_state(config), unet_names(config)
    assert set(names) == set(state)
    single = {UNET_PREFIX + names[key]: value for key, value in state.items()}
    assert len(single) == len(state)
    converted = convert_ldm_unet_checkpoint(single, config)
    assert set(converted) == set(state)
    assert all(converted[key] is value for key, value in state.items())


@pytest.mark.parametrize("num_blocks", [1, 2, 4])
@pytest.mark.parametrize("layers", [1, 2])
def test_any_vae_of_this_shape_comes_back_bit_for_bit(num_blocks: int, layers: int):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    config = {
        "block_out_channels": [4, 8, 8, 4][:num_blocks],
        "down_block_types": ["DownEncoderBlock2D"] * num_blocks,
        "up_block_types": ["UpDecoderBlock2D"] * num_blocks,
        "layers_per_block": layers,
        "norm_num_groups": 2,
    }
    vae = AutoencoderKL(**config)
    single = to_compvis(
        unet=unet_state(SD2_UNET_CONFIG),
        unet_config=SD2_UNET_CONFIG,
        vae=vae.state_dict(),
        vae_config=config,
        text=text_state({**VIT_H_TEXT, "layers": 2}),
    )
    converted = convert_ldm_vae_checkpoint({k: v for k, v in single.items() if k.startswith(VAE_PREFIX)}, config)
    back = vae_from_compvis(without_prefix(single, VAE_PREFIX), config)
    for key, value in vae.state_dict().items():
        assert torch.equal(back[key], value), key
        assert torch.equal(converted[key], value), key
    assert set(back) == set(converted) == set(vae.state_dict()) == set(vae_names(config))


def test_nothing_is_copied(full_size):
    state = {key: torch.zeros(1).expand(value.shape) for key, value in without_prefix(full_size, UNET_PREFIX).items()}
    back = unet_from_compvis(state, SD2_UNET_CONFIG)
    assert all(back[key] is state[name] for key, name in unet_names(SD2_UNET_CONFIG).items())


def test_matrices_of_the_vae_may_be_plain_already(full_size):
    state = without_prefix(full_size, VAE_PREFIX)
    state["encoder.mid.attn_1.q.weight"] = torch.empty(512, 512, device="meta")
    back = vae_from_compvis(state, SD2_VAE_CONFIG)
    assert back["encoder.mid_block.attentions.0.to_q.weight"].shape == (512, 512)


def test_moving_averages_are_named_as_ldm_names_them():
    assert ema_name("model.diffusion_model.time_embed.0.weight") == "model_ema.diffusion_modeltime_embed0weight"
    assert (
        ema_name("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.bias")
        == "model_ema.diffusion_modelinput_blocks11transformer_blocks0attn1to_out0bias"
    )
    with pytest.raises(ValueError, match="has no moving average"):
        ema_name("first_stage_model.quant_conv.bias")


def test_moving_averages_are_what_diffusers_extracts(full_size):
    unet = {key: value for key, value in full_size.items() if key.startswith(UNET_PREFIX)}
    averaged = {ema_name(key): torch.empty_like(value) for key, value in unet.items()}
    assert len(averaged) == 686
    converted = convert_ldm_unet_checkpoint({**unet, **averaged}, SD2_UNET_CONFIG, extract_ema=True)
    names = unet_names(SD2_UNET_CONFIG)
    assert all(value is averaged[ema_name(UNET_PREFIX + names[key])] for key, value in converted.items())


@pytest.mark.parametrize(
    "key",
    [
        "betas",
        "alphas_cumprod_prev",
        "sqrt_recipm1_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "posterior_mean_coef2",
        "posterior_log_variance_clipped",
        "logvar",
        "lvlb_weights",
        "scale_factor",
        "model_ema.decay",
        "model_ema.num_updates",
        "model_ema.diffusion_modeltime_embed0weight",
        "cond_stage_model.model.attn_mask",
        "cond_stage_model.model.logit_scale",
        "cond_stage_model.model.text_projection",
        "cond_stage_model.model.transformer.resblocks.23.ln_1.bias",
    ],
)
def test_what_published_files_hold_besides_is_named(key: str):
    assert named_extra(key)


@pytest.mark.parametrize(
    "key",
    ["model.diffusion_model.out.2.bias", "cond_stage_model.model.ln_final.bias", "betas2", "xbetas", "state_dict"],
)
def test_other_keys_are_no_extras(key: str):
    assert named_extra(key) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("out.2.bias"), r"the UNet does not fit its config: 1 keys are missing: out\.2\.bias$"),
        (lambda state: state.update(extra=state["out.2.bias"]), r"1 keys are unexpected: extra$"),
        (
            lambda state: [state.pop(key) for key in list(state) if key.startswith("middle_block.1.")],
            r"26 keys are missing: middle_block\.1\.[a-z_.0-9]+, [^,]+, [^,]+, …$",
        ),
        (
            lambda state: state.update({"input_blocks.0.0.weight": torch.empty(320, 4, 3, 3, device="meta")}),
            r"1 tensors have other shapes: input_blocks\.0\.0\.weight is \[320, 4, 3, 3\] and must be "
            r"\[320, 9, 3, 3\]$",
        ),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_in_one_line(full_size, change, message: str):
    state = without_prefix(full_size, UNET_PREFIX)
    change(state)
    with pytest.raises(ValueError, match=message) as caught:
        unet_from_compvis(state, SD2_UNET_CONFIG)
    assert "\n" not in str(caught.value)


def test_a_vae_of_another_size_is_refused(full_size):
    state = without_prefix(full_size, VAE_PREFIX)
    state["decoder.conv_out.weight"] = torch.empty(4, 128, 3, 3, device="meta")
    with pytest.raises(ValueError, match=re.escape("decoder.conv_out.weight is [4, 128, 3, 3] and must be [3, 128")):
        vae_from_compvis(state, SD2_VAE_CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up_block_types": ["AttnUpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}, "up_block_types has 'AttnUpBlock2D'"),
        ({"num_class_embeds": 10}, "class_embedding"),
        ({"layers_per_block": [1, 2, 2, 2]}, "layers_per_block"),
    ],
)
def test_a_unet_without_place_in_a_single_file_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        unet_names({**SD2_UNET_CONFIG, **change})


# ---------------------------------------------------------------------------------------------------------------- text


def test_text_towers_go_to_transformers_and_back_bit_for_bit(text_encoder):
    state = text_encoder.clip.state_dict()
    there = clip_text_to_transformers(state, num_text_blocks(state))
    back = clip_text_from_transformers({key.removeprefix("text_model."): value for key, value in there.items()})
    assert set(back) == set(clip_text_from_transformers(there))  # with the wrapper's name or without
    for key, value in back.items():
        assert torch.equal(value, state[key]), key
    left_out = {key for key in state if key not in back and not key.startswith("visual.")}
    assert left_out <= {"text_projection", "logit_scale", "attn_mask"}


def test_a_projection_comes_transposed_and_constants_are_ignored(text_encoder):
    there = clip_text_to_transformers(text_encoder.clip.state_dict(), 3)
    there["text_projection.weight"] = torch.arange(6.0).reshape(2, 3)
    there["text_model.embeddings.position_ids"] = torch.arange(77)
    back = clip_text_from_transformers(there)
    assert torch.equal(back["text_projection"], torch.arange(6.0).reshape(2, 3).T)
    assert num_text_blocks(back) == 3


def test_text_towers_that_do_not_fit_are_refused(text_encoder, full_size):
    state = text_encoder.clip.state_dict()
    there = clip_text_to_transformers(state, 2)
    there.pop("text_model.encoder.layers.0.self_attn.k_proj.bias")
    with pytest.raises(ValueError, match=r"1 keys are missing: encoder\.layers\.0\.self_attn\.k_proj\.bias$"):
        clip_text_from_transformers(there)
    state.pop("transformer.resblocks.1.ln_1.weight")
    with pytest.raises(ValueError, match=r"missing: text_model\.encoder\.layers\.1\.layer_norm1\.weight$"):
        clip_text_to_transformers(state, 2)
    with pytest.raises(ValueError, match=r"must be 0, 1, 2"):
        num_text_blocks({key: value for key, value in state.items() if ".resblocks.1." not in key})
    with pytest.raises(ValueError, match=r"the text tower does not fit its config: 1 keys are missing"):
        to_compvis(
            unet=unet_state(SD2_UNET_CONFIG),
            unet_config=SD2_UNET_CONFIG,
            vae=vae_state(SD2_VAE_CONFIG),
            vae_config=SD2_VAE_CONFIG,
            text=state,
        )
