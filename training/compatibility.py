"""Does a dataset fit a model? No torch: the flows ask before anything is spent, and each rank asks again."""

import json
from dataclasses import dataclass

from infra.errors import ContractError
from model.specs import LatentSpec, MaskSpec, TextSpec
from preprocessing.contracts.config import ModelConfig
from preprocessing.contracts.digests import weights_sha256
from preprocessing.contracts.manifest import Manifest


@dataclass(frozen=True)
class DatasetSpecs:
    """What the stored tensors mean.

    Attributes:
        latents: Of ``moments`` and ``masked_moments_k``.
        text: Of ``text_embeddings``.
        masks: Of ``mask_k``.
    """

    latents: LatentSpec
    text: TextSpec
    masks: MaskSpec


def parse_specs(manifest: Manifest, uri: str) -> DatasetSpecs:
    """Reads the specs of an encoded dataset.

    Args:
        manifest: Its manifest.
        uri: What to call it in messages.

    Raises:
        ContractError: It has none, or not those of this version.
    """
    try:
        specs = DatasetSpecs(
            LatentSpec.from_json(manifest.specs["latents"]),
            TextSpec.from_json(manifest.specs["text"]),
            MaskSpec.from_json(manifest.specs["masks"]),
        )
    except KeyError as error:
        raise ContractError(
            f"dataset: {uri} has no spec {error} (its stage is {manifest.stage!r}); training needs an encoded dataset"
        ) from error
    except ValueError as error:
        raise ContractError(f"dataset: {uri}: {error}; encode it again with this version") from error
    if specs.masks.num_variants < 1:
        raise ContractError(f"dataset: {uri} holds no masks, and train.mask_source is 'cached'; encode it with masks")
    return specs


def check_specs(specs: DatasetSpecs, model: ModelConfig) -> None:
    """Makes sure that a dataset was encoded by these very encoders, and fits this UNet.

    Raises:
        ContractError: It was not; names both sides and both values.
    """
    folder = model.directory
    vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    text_width = unet.get("cross_attention_dim", 1280)  # diffusers' default
    facts = [
        ("VAE weights sha256", specs.latents.weights_sha256, "vae/", weights_sha256(folder / "vae")),
        ("scaling_factor", specs.latents.scaling_factor, "vae/config.json", vae.get("scaling_factor", 0.18215)),
        ("latent channels", specs.latents.channels, "unet/config.json (out_channels)", unet.get("out_channels", 4)),
        ("text encoder weights sha256", specs.text.weights_sha256, "open_clip/", weights_sha256(folder / "open_clip")),
        ("text width", specs.text.width, "unet/config.json (cross_attention_dim)", text_width),
    ]
    for name, in_dataset, where, in_model in facts:
        if in_dataset != in_model:
            raise ContractError(
                f"{name}: the dataset was encoded with {in_dataset}, "
                f"model.base {model.base!r} has {in_model} in {where}; "
                "choose the model that the dataset was encoded with, or encode it again"
            )
    channels = specs.latents.channels
    if unet.get("in_channels", 4) not in (channels, 2 * channels + 1):
        raise ContractError(
            f"unet/config.json: in_channels is {unet['in_channels']}, the dataset's latents need {channels} "
            f"(text-to-image, to be widened) or {2 * channels + 1} (inpainting); choose another model.base"
        )
