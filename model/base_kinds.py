"""What a file of weights is, by its keys and shapes: so that a wrong one is refused by its name."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

EXPECTED: Final = (
    "expected Stable Diffusion 2: a UNet of 4 input channels (base) or 9 (inpainting) that reads text of width 1024, "
    "with its VAE and its OpenCLIP text encoder"
)

_SPECIAL: Final = (
    (
        r".*(\.lora[._]|lora_(A|B|up|down)\b|^lora_|\.hada_w|\.lokr_w).*",
        "LoRA weights: changes to a model, not a model",
    ),
    (r".*\.(exp_avg|exp_avg_sq)|optimizer_states?\..*", "an optimizer's state, not a model's weights"),
    (r"(control_model|controlnet_\w+|input_hint_block|zero_convs)\..*", "a ControlNet"),
    (r"(emb_params|string_to_param.*|clip_[gl])", "a textual inversion: a word's embedding, not a model"),
    (r"((model\.)?diffusion_model\.)?(double_blocks|single_blocks|single_transformer_blocks)\..*", "Flux"),
    (r"((model\.)?diffusion_model\.)?joint_blocks\..*", "Stable Diffusion 3"),
    (r"conditioner\.embedders\..*", "Stable Diffusion XL"),
    (r"(prior|decoder_pipe)\..*|.*\.(temporal_transformer|motion_modules|time_stack)\..*", "a video or unCLIP model"),
    (r"(transformer_blocks|blocks)\.\d+\..*", "a diffusion transformer"),
)
_BY_TEXT_WIDTH: Final = {
    768: "Stable Diffusion 1.x (text of width 768)",
    1280: "the Stable Diffusion XL refiner (text of width 1280)",
    2048: "Stable Diffusion XL (text of width 2048)",
}
_BY_CHANNELS: Final = {
    5: "the depth-to-image model (5 input channels)",
    7: "the x4 upscaler (7 input channels)",
    8: "InstructPix2Pix (8 input channels)",
}
_UNET_PREFIX: Final = r"model\.diffusion_model\."


@dataclass(frozen=True)
class Kind:
    """What weights are.

    Attributes:
        name: in words, after "this is".
        parts: which of `unet`, `vae`, `text` they hold.
        is_usable: whether these parts are of the kind that Lacuna starts from.
    """

    name: str
    parts: frozenset[str]
    is_usable: bool


def recognize(keys: Iterable[str], shape: Callable[[str], tuple[int, ...]]) -> Kind:
    """Says what weights are.

    Args:
        keys: of one file, or of one part of a folder, in CompVis', diffusers', open_clip's or transformers' names.
        shape: the shape of a key's tensor.
    """
    keys = list(keys)
    for pattern, name in _SPECIAL:
        if any(re.fullmatch(pattern, key) for key in keys):
            return Kind(name, frozenset(), is_usable=False)
    parts = _parts(keys)
    if "unet" in parts:
        wrong = _wrong_unet(keys, shape)
        channels = _size(keys, shape, rf"({_UNET_PREFIX})?input_blocks\.0\.0\.weight|conv_in\.weight", 1)
        name = wrong or f"a {channels}-channel UNet"
        if wrong is None and parts == {"unet", "vae", "text"}:
            name = (
                "a text-to-image base" if channels == 4 else "an inpainting model"
            ) + f" of {channels} input channels"
        elif wrong is None:
            name += " alone" if parts == {"unet"} else f" with {' and '.join(sorted(parts - {'unet'}))}"
        return Kind(name, parts, is_usable=wrong is None)
    if parts == {"vae"}:
        return Kind("a VAE alone", parts, is_usable=True)
    if parts == {"text"}:
        has_images = any(re.match(r"(visual|vision_model)\.", key) for key in keys)
        return Kind("a CLIP model alone" if has_images else "a text encoder alone", parts, is_usable=True)
    if parts:
        return Kind(f"{' and '.join(sorted(parts))} alone", parts, is_usable=True)
    shown = ", ".join(sorted(keys)[:3])
    return Kind(f"an unknown model (its keys are like {shown})", parts, is_usable=False)


def _parts(keys: list[str]) -> frozenset[str]:
    has = {
        "unet": rf"({_UNET_PREFIX})?(input_blocks|middle_block|output_blocks)\..*|time_embedding\..*",
        "vae": r"(first_stage_model\.)?(encoder|decoder)\.(mid|mid_block|conv_in|down|down_blocks|up|up_blocks)\..*",
        "text": r"cond_stage_model\..*|(text_model\.)?(embeddings|encoder\.layers|final_layer_norm)\..*"
        r"|transformer\.resblocks\..*|token_embedding\..*",
    }
    return frozenset(part for part, pattern in has.items() if any(re.match(pattern, key) for key in keys))


def _wrong_unet(keys: list[str], shape: Callable[[str], tuple[int, ...]]) -> str | None:
    """Which other model a UNet is of; None if it may be Stable Diffusion 2's."""
    if any(
        re.match(r"(cond_stage_model\.transformer\.text_model|cond_stage_model\.transformer\.embed)", k) for k in keys
    ):
        return _BY_TEXT_WIDTH[768]
    if any(re.match(r"(controlnet_\w+)\.", key) for key in keys):
        return "a ControlNet"
    channels = _size(keys, shape, rf"({_UNET_PREFIX})?input_blocks\.0\.0\.weight|conv_in\.weight", 1)
    if channels in _BY_CHANNELS:
        return _BY_CHANNELS[channels]
    width = _size(keys, shape, r".*\.attn2\.to_k\.weight", 1)
    if width in _BY_TEXT_WIDTH:
        return _BY_TEXT_WIDTH[width]
    if any(re.match(rf"({_UNET_PREFIX})?(label_emb|class_embedding|add_embedding)\.", key) for key in keys):
        return "an unCLIP model, or another one with a second condition"
    if width is None:
        return "a UNet without text"
    if channels not in (4, 9):
        return f"a UNet of {channels} input channels"
    return None


def _size(keys: list[str], shape: Callable[[str], tuple[int, ...]], pattern: str, axis: int) -> int | None:
    found = next((key for key in keys if re.fullmatch(pattern, key)), None)
    return None if found is None or len(shape(found)) <= axis else shape(found)[axis]
