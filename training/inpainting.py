"""Repainting held-out pictures: the model's way, and the two ways it must beat (mean fill, OpenCV's Telea)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from infra.bundles import fetch_bundle
from infra.errors import ContractError
from infra.storage import ObjectStore
from model.encoders import (
    NULL_CAPTION,
    TextEncoder,
    decode_latents,
    encode_moments,
    images_to_pixels,
    load_text_encoder,
    load_vae,
    mean_latents,
    pixels_to_images,
)
from model.masks import to_latent_mask
from model.sampler import noise_for, sample_inpainting
from model.schedule import alphas_cumprod_of
from model.specs import PredictionType, ScheduleSpec, TimestepSpacing
from model.unet import load_unet
from preprocessing.contracts.config import ModelConfig
from training.config import ValidationConfig

TELEA_RADIUS_PX: Final = 3
_MIN_CROP_PX: Final = 16


@dataclass(frozen=True)
class Repainted:
    """What the model made of some pictures; all uint8, (batch, side, side, 3).

    Attributes:
        raw: Straight from the decoder: the known region went through the VAE, too.
        composited: The raw picture inside the mask, the original one outside.
    """

    raw: np.ndarray
    composited: np.ndarray


@final
class Inpainter:
    """A checkpoint's EMA UNet with the encoders that it was trained with.

    Args:
        unet: Nine channels in, four out.
        vae: Of the latents.
        text: Of the captions; with its image tower, if the base has one.
        prediction_type: What the UNet predicts.
        schedule: The noise schedule that it was trained on.
        config: Steps, guidance, batch size and seed.
        device: Where to run.

    Raises:
        ContractError: UNet and encoders do not fit.
    """

    def __init__(
        self,
        unet: Any,
        vae: Any,
        text: TextEncoder,
        *,
        prediction_type: PredictionType,
        schedule: ScheduleSpec,
        config: ValidationConfig,
        device: str = "cpu",
    ) -> None:
        latent_channels, wanted = vae.config.latent_channels, 2 * vae.config.latent_channels + 1
        if unet.config.in_channels != wanted:
            raise ContractError(
                f"the UNet reads {unet.config.in_channels} channels, inpainting with {latent_channels} latent channels "
                f"needs {wanted}"
            )
        if unet.config.cross_attention_dim != text.width:
            raise ContractError(
                f"the UNet reads text of width {unet.config.cross_attention_dim}, the text encoder's has {text.width}"
            )
        self.unet, self.vae, self.text = unet.to(device).eval(), vae.to(device), text.to(device)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.scaling_factor = float(vae.config.scaling_factor)
        self.alphas_cumprod = alphas_cumprod_of(schedule)
        self._timestep_spacing: TimestepSpacing = schedule.timestep_spacing
        self.prediction_type: PredictionType = prediction_type
        self._config = config
        self._device = device
        self._null = text.embed_captions([NULL_CAPTION])[0]

    def repaint(
        self, images: np.ndarray, masks: np.ndarray, captions: Sequence[str], uids: Sequence[str], purpose: str
    ) -> Repainted:
        """Fills the holes, as the captions say.

        Deterministic: the masked picture enters as the mean of the VAE's posterior, DDIM has eta 0, and the noise that
        it starts from is a stream of (seed, uid, purpose): another caption starts from the same noise.

        Args:
            images: (batch, side, side, 3) uint8.
            masks: (batch, side, side), {0, 1}; 1 is the hole.
            captions: One a picture.
            uids: One a picture.
            purpose: Names the noise.
        """
        parts = []
        for start in range(0, len(images), self._config.batch_size):
            part = slice(start, start + self._config.batch_size)
            parts.append(self._repaint_batch(images[part], masks[part], captions[part], uids[part], purpose))
        raw = np.concatenate(parts)
        return Repainted(raw, np.where(masks[..., None] > 0, raw, images))

    @torch.no_grad()
    def _repaint_batch(
        self, images: np.ndarray, masks: np.ndarray, captions: Sequence[str], uids: Sequence[str], purpose: str
    ) -> np.ndarray:
        masked_latents = self.masked_latents(images, masks)
        latents = sample_inpainting(
            self.unet,
            noise=noise_for(self._config.seed, uids, tuple(masked_latents.shape[1:]), name=purpose).to(self._device),
            mask=self.latent_masks(masks),
            masked_image_latents=masked_latents,
            text_embeddings=self.text.embed_captions(captions),
            null_embedding=self._null,
            num_inference_steps=self._config.num_inference_steps,
            guidance_scale=self._config.guidance_scale,
            prediction_type=self.prediction_type,
            alphas_cumprod=self.alphas_cumprod,
            timestep_spacing=self._timestep_spacing,
        )
        return pixels_to_images(decode_latents(self.vae, latents, self.scaling_factor).cpu()).numpy()

    def latents(self, images: np.ndarray) -> Tensor:
        """The mean latents of pictures, scaled: (batch, c, h, w) float32."""
        return mean_latents(encode_moments(self.vae, images_to_pixels(images)), self.scaling_factor)

    def masked_latents(self, images: np.ndarray, masks: np.ndarray) -> Tensor:
        """The mean latents of the pictures with their holes painted grey (0 in [-1, 1]), scaled."""
        pixels = images_to_pixels(images) * (1 - torch.from_numpy(masks).float())[:, None]
        return mean_latents(encode_moments(self.vae, pixels), self.scaling_factor)

    def latent_masks(self, masks: np.ndarray) -> Tensor:
        """The masks on the latent grid: (batch, 1, h, w) float32."""
        small = np.stack([to_latent_mask(mask, self.factor) for mask in masks])
        return torch.from_numpy(small).float()[:, None].to(self._device)

    def image_text_similarity(self, images: np.ndarray, masks: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """Cosine between each caption and the square around its picture's hole.

        Args:
            images: (batch, side, side, 3) uint8.
            masks: (batch, side, side): where the holes are.
            captions: One a picture.

        Returns:
            (batch,) float64 in [-1, 1], by the text encoder's own image tower.

        Raises:
            ValueError: The base's text encoder has none (``text.compares`` is false).
        """
        crops = [self._hole_pixels(image, mask) for image, mask in zip(images, masks, strict=True)]
        cosines = []
        for start in range(0, len(crops), self._config.batch_size):
            part = slice(start, start + self._config.batch_size)
            image_features = self.text.embed_image(torch.cat(crops[part]))
            cosines.append((image_features * self.text.embed_caption(captions[part])).sum(dim=1))
        return torch.cat(cosines).double().cpu().numpy()

    def _hole_pixels(self, image: np.ndarray, mask: np.ndarray) -> Tensor:
        """The square around the hole, resized to the image tower's input: (1, 3, size, size) in [0, 1]."""
        top, left, side = square_around(mask)
        crop = torch.from_numpy(image[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None].float() / 255
        size = (self.text.image_size, self.text.image_size)
        return functional.interpolate(crop, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def load_inpainter(
    store: ObjectStore,
    checkpoint_prefix: str,
    model: ModelConfig,
    *,
    prediction_type: PredictionType,
    schedule: ScheduleSpec,
    config: ValidationConfig,
    scratch: Path,
) -> Inpainter:
    """Loads a checkpoint's EMA weights, every file checked by its sha256, and the base's encoders.

    Raises:
        ContractError: The checkpoint holds no EMA weights, or does not fit the encoders.
        ObjectNotFoundError: There is no such checkpoint, or it is not complete.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.backends.cudnn.deterministic = True
    return Inpainter(
        load_ema_unet(store, checkpoint_prefix, scratch),
        load_vae(model.directory / "vae", device),
        load_text_encoder(model.directory / "open_clip", device=device),
        prediction_type=prediction_type,
        schedule=schedule,
        config=config,
        device=device,
    )


def load_ema_unet(store: ObjectStore, checkpoint_prefix: str, scratch: Path) -> Any:
    """Fetches and loads the UNet under a checkpoint's ``ema/``.

    Raises:
        ContractError: The checkpoint has none.
        ObjectNotFoundError: There is no such checkpoint, or it is not complete.
    """
    folder = scratch / "checkpoint"
    fetch_bundle(store, checkpoint_prefix, folder, lambda name: name.startswith("ema/"))
    if not (folder / "ema" / "config.json").is_file():
        raise ContractError(f"checkpoint: {store.uri_of(checkpoint_prefix)} has no ema/config.json; train it again")
    return load_unet(folder / "ema")


def mean_fill(images: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Fills each hole with the mean colour of its picture's known pixels; all known is left as it is."""
    filled = images.copy()
    for image, mask in zip(filled, masks > 0, strict=True):
        known = image[~mask]
        image[mask] = np.round(known.mean(axis=0)) if len(known) else 127
    return filled


def telea_fill(images: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Fills each hole by OpenCV's fast marching method, radius 3 px.

    Source: Telea 2004; ``cv2.INPAINT_TELEA``.
    """
    return np.stack(
        [
            # OpenCV takes the channels as they come; a picture without any known pixel has nothing to march from.
            cv2.inpaint(image, (mask > 0).astype(np.uint8), TELEA_RADIUS_PX, cv2.INPAINT_TELEA)
            if not mask.all()
            else np.full_like(image, 127)
            for image, mask in zip(images, masks, strict=True)
        ]
    )


def square_around(mask: np.ndarray) -> tuple[int, int, int]:
    """The smallest square around a hole's bounding box that lies in the picture, at least 16 px.

    Returns:
        top, left, side, in pixels.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    height, width = mask.shape
    extent = max(rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1, _MIN_CROP_PX)
    side = int(min(extent, height, width))
    top = int(np.clip((rows[0] + rows[-1] + 1 - side) // 2, 0, height - side))
    left = int(np.clip((columns[0] + columns[-1] + 1 - side) // 2, 0, width - side))
    return top, left, side
