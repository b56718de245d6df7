"""Does a dataset fit a model? No torch: the flows ask before anything is spent, and each rank asks again."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from infra.errors import ContractError
from model.specs import LatentSpec, MaskSpec, TextSpec
from preprocessing.contracts.config import EncodeConfig, ModelConfig
from preprocessing.contracts.digests import weights_sha256
from preprocessing.contracts.manifest import Manifest
from training.conditioning import encoded_columns


@dataclass(frozen=True)
class DatasetSpecs:
    """What the stored tensors mean.

    Attributes:
        latents: Of ``moments`` and ``masked_moments_k``.
        text: Of ``text_embeddings``.
        masks: Of ``mask_k``.
        columns: What of it the rows hold: ``moments``, ``text_embeddings``, ``token_ids``, ``mask_k``,
            ``masked_moments_k``, ``image``.
    """

    latents: LatentSpec
    text: TextSpec
    masks: MaskSpec
    columns: frozenset[str]


def parse_specs(manifest: Manifest, uri: str) -> DatasetSpecs:
    """Reads the specs of an encoded dataset.

    Args:
        manifest: Its manifest.
        uri: What to call it in messages.

    Raises:
        ContractError: It has none, or not those of this version.
    """
    try:
        latents = LatentSpec.from_json(manifest.specs["latents"])
        text = TextSpec.from_json(manifest.specs["text"])
        masks = MaskSpec.from_json(manifest.specs["masks"])
    except KeyError as error:
        raise ContractError(
            f"dataset: {uri} has no spec {error} (its stage is {manifest.stage!r}); training needs an encoded dataset"
        ) from error
    except ValueError as error:
        raise ContractError(f"dataset: {uri}: {error}; encode it again with this version") from error
    # Not validated: an encoding that another version was told of has other fields, too.
    encode = EncodeConfig.model_construct(**{**manifest.config, "num_mask_variants": masks.num_variants})
    return DatasetSpecs(latents, text, masks, encoded_columns(encode))


def check_agree(specs: Mapping[str, DatasetSpecs]) -> None:
    """Makes sure that the tensors of several datasets mean the same.

    Args:
        specs: By the datasets' names.

    Raises:
        ContractError: They do not; names both datasets, the field and both values.
    """
    (first, its), *others = specs.items()
    for name, theirs in others:
        for part in ("latents", "text", "masks"):
            ours, found = getattr(its, part).to_json(), getattr(theirs, part).to_json()
            for field in ours:
                if ours[field] != found[field]:
                    raise ContractError(
                        f"train.datasets: {part}.{field} is {ours[field]} in {first}, and {found[field]} in {name}; "
                        "mix datasets that were encoded alike"
                    )


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
