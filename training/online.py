"""Conditioning that is made in the step, of what the dataset stores: masks, masked moments, moments, text embeddings.

The same values as the encode stage stores for the same (mask spec, uid, variant), rounded as it rounds them: a training
does not see where its conditioning came from. But no sample meets a mask twice, however often it is visited.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, final

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from model.encoders import (
    TextEncoder,
    encode_stored_moments,
    encode_stored_text,
    images_to_pixels,
    load_text_encoder,
    load_vae,
)
from model.masks import draw_masks_of, to_latent_mask
from model.specs import MaskSpec
from training.batch import Batch, Constants
from training.compatibility import DatasetSpecs
from training.conditioning import fields_of, is_any_online
from training.config import TrainConfig
from training.data import mask_variants
from training.fields import Fields
from training.rows import UID_NUM_BYTES
from training.step import Draws

_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def masks_of(train: TrainConfig, specs: DatasetSpecs) -> MaskSpec:
    """The masks that are drawn online: the dataset's, or those of the family that the training names."""
    if train.mask_family is None:
        return specs.masks
    return replace(specs.masks, family=train.mask_family, files_sha256=())


def variants_of(uids: Sequence[str], epochs: Sequence[int], num_stored: int) -> list[int]:
    """Which mask each visit meets: never one that the sample met before.

    Args:
        uids: The samples.
        epochs: How often each was visited before.
        num_stored: Variants that the dataset stores. The first so many visits meet just these, in the order in which a
            training that reads them meets them.
    """
    if not num_stored:
        return list(epochs)
    visits = np.asarray(epochs, dtype=np.int64)
    bits = np.frombuffer(bytes.fromhex("".join(uids)), np.uint8).reshape(len(uids), UID_NUM_BYTES)
    return (visits - visits % num_stored + mask_variants(bits, visits, num_stored)).tolist()


def draw_visits(spec: MaskSpec, uids: Sequence[str], epochs: Sequence[int]) -> UInt8[np.ndarray, "batch height width"]:
    """Draws the mask of each visit, at full resolution, 1 = repaint.

    Args:
        spec: Which masks.
        uids: The samples.
        epochs: How often each was visited before.
    """
    masks = np.empty((len(uids), spec.resolution_px, spec.resolution_px), np.uint8)
    variants = variants_of(uids, epochs, spec.num_variants)
    for variant in sorted(set(variants)):
        rows = [row for row, its in enumerate(variants) if its == variant]
        masks[rows] = draw_masks_of(spec, [uids[row] for row in rows], variant)
    return masks


@final
class OnlineConditioner:
    """Completes batches by the frozen encoders.

    Attributes:
        vae: On its device; None where it has nothing to do.
        text: Likewise.

    Args:
        fields: What is read; all else is made here.
        specs: The dataset's: what is made is rounded to what it would have stored.
        constants: The dataset's.
        masks: Which are drawn.
        vae: On the device.
        text: On the device.
        device: Of what is made.
    """

    def __init__(
        self,
        fields: Fields,
        specs: DatasetSpecs,
        constants: Constants,
        *,
        masks: MaskSpec,
        vae: AutoencoderKL | None,
        text: TextEncoder | None,
        device: torch.device,
    ) -> None:
        self._fields, self._specs, self._masks = fields, specs, masks
        self.vae, self.text, self._device = vae, text, device
        self._full_mask_moments = constants.full_mask_moments.to(device)
        self._null_text_embedding = constants.null_text_embedding.to(device)
        self._levels = images_to_pixels(torch.arange(256, dtype=torch.uint8).expand(1, 1, 3, 256).mT)[0, 0, 0].to(
            device
        )

    @torch.no_grad()
    def complete(self, batch: Batch, draws: Draws) -> Batch:
        """Makes what the batch lacks.

        What the draws replace is not made: a row with a full mask takes the dataset's constant, and so does a row
        whose caption is dropped.

        Args:
            batch: What the dataset stores, with ``epochs``.
            draws: Of the same samples.

        Returns:
            The batch with all that `training.step.training_loss` reads; what was made is on the device.
        """
        pixels = None
        if self._fields.images:
            assert batch.images is not None
            pixels = self._pixels(batch.images)
        if not self._fields.moments:
            assert pixels is not None
            batch = replace(batch, moments=self._encode(pixels))
        if self._fields.mask == "none":
            assert pixels is not None
            mask, masked_moments = self._masked(pixels, batch, draws.is_full_mask)
            batch = replace(batch, mask=mask, masked_moments=masked_moments)
        if self._fields.text == "token_ids":
            assert batch.token_ids is not None
            batch = replace(batch, text_embeddings=self._embed(batch.token_ids, draws.drops_text))
        return batch

    def _pixels(self, images: UInt8[Tensor, "batch height width 3"]) -> Float[Tensor, "batch 3 height width"]:
        if self._device.type == "cpu":
            return images_to_pixels(images)
        # By a table from the CPU: a GPU divides by multiplying, which is not the same in the last bit.
        return self._levels[images.to(self._device).int()].permute(0, 3, 1, 2)

    def _masked(
        self, pixels: Float[Tensor, "batch 3 height width"], batch: Batch, is_full_mask: Bool[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch 1 h w"], Float[Tensor, "batch c2 h w"]]:
        latents = self._specs.latents
        drawn = np.flatnonzero(~is_full_mask.numpy())
        masks = draw_visits(self._masks, [batch.uids[row] for row in drawn], [batch.epochs[row] for row in drawn])
        mask = torch.ones(len(batch), 1, latents.latent_px, latents.latent_px)
        mask[drawn, 0] = torch.from_numpy(to_latent_mask(masks, latents.factor)).float()
        masked_moments = self._full_mask_moments.expand(len(batch), *latents.moments_shape).clone()
        is_partial = masks.reshape(len(masks), latents.resolution_px**2).min(axis=1) == 0
        rows = torch.from_numpy(drawn[is_partial]).to(self._device)
        if len(rows):
            holes = torch.from_numpy(masks[is_partial]).to(self._device)
            masked_moments[rows] = self._encode(pixels[rows], holes).to(masked_moments.dtype)
        return mask.to(self._device), masked_moments

    def _encode(
        self,
        pixels: Float[Tensor, "batch 3 height width"],
        holes: UInt8[Tensor, "batch height width"] | None = None,
    ) -> Float[Tensor, "batch c2 h w"]:
        assert self.vae is not None
        return encode_stored_moments(self.vae, pixels, holes)

    def _embed(
        self, token_ids: Int[Tensor, "batch tokens"], drops_text: Bool[Tensor, " batch"]
    ) -> Float[Tensor, "batch tokens width"]:
        assert self.text is not None
        embeddings = self._null_text_embedding.expand(len(token_ids), *self._specs.text.embeddings_shape).clone()
        kept = torch.from_numpy(np.flatnonzero(~drops_text.numpy()))
        if len(kept):
            made = encode_stored_text(self.text, token_ids[kept])
            embeddings[kept.to(self._device)] = made.to(embeddings.dtype)
        return embeddings


def load_conditioner(
    train: TrainConfig,
    specs: DatasetSpecs,
    constants: Constants,
    *,
    directory: Path,
    device: torch.device,
) -> OnlineConditioner | None:
    """Loads the frozen models that are needed, and no other.

    Args:
        train: How to train.
        specs: The dataset's; `training.compatibility.check_specs` has seen to it that they are this model's.
        constants: The dataset's.
        directory: The model's folder.
        device: The trainer's.

    Returns:
        The conditioner; None where everything is stored.
    """
    fields = fields_of(train)
    if not is_any_online(fields):
        return None
    vae = text = None
    if fields.images:
        vae = load_vae(directory / "vae", device, _DTYPES[train.encoder_precision or specs.latents.precision])
    if fields.text == "token_ids":
        text = load_text_encoder(directory / "open_clip", load_image_tower=False, device=device)
        text.to(device, _DTYPES[train.encoder_precision or specs.text.precision])
    return OnlineConditioner(fields, specs, constants, masks=masks_of(train, specs), vae=vae, text=text, device=device)
