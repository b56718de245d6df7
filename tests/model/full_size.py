"""Steps of a walk with Stable Diffusion 2 at full size, each a process of its own, so that its peak of memory is known.

``python tests/model/full_size.py STEP FOLDER`` does one step and writes what it found to standard output, as JSON.
The weights are random; everything else is what a user does with the published ones.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from diffusers_reference import SamplingCase, compare_sampling, compare_training
from safetensors import safe_open
from torch import Tensor

from model.base_weights import convert_base
from model.compvis import clip_text_to_transformers, to_compvis
from model.encoders import (
    TextEncoder,
    _build_clip,  # pyright: ignore[reportPrivateUsage]  # random weights for what is otherwise only loaded
    decode_latents,
    encode_moments,
    load_text_encoder,
    load_vae,
    mean_latents,
)
from model.masks import draw_mask, to_latent_mask
from model.safetensors_writer import save_safetensors
from model.sampler import noise_for, sample_inpainting
from model.schedule import alphas_cumprod
from model.single_file import export_single_file
from model.specs import SD2_SCALING_FACTOR, SD2_UNET_CONFIG, SD2_VAE_CONFIG
from model.unet import build_unet, load_unet, unet_input, widen_conv_in
from model.weights import export_diffusers, text_encoder_config
from preprocessing.contracts.digests import weights_sha256
from training.data import Batch, Constants
from training.ema import Ema
from training.step import draw, training_loss

FORMS: Final = ("diffusers", "sd2.safetensors", "sd2.ckpt")
LATENT_SHAPE: Final = (4, 64, 64)
_WEIGHTS: Final = "diffusion_pytorch_model.safetensors"


def build(folder: Path) -> dict[str, Any]:
    """A four-channel base with random weights, in the three forms in which bases are published."""
    import open_clip

    torch.manual_seed(0)
    unet = build_unet(SD2_UNET_CONFIG | {"in_channels": 4})
    vae = AutoencoderKL(**SD2_VAE_CONFIG)
    model_cfg = open_clip.get_model_config("ViT-H-14")
    assert model_cfg is not None
    clip = _build_clip(model_cfg, with_image_tower=False).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.normal_(std=0.02)
    text = TextEncoder(clip, model_cfg, has_image_tower=False)
    _write_diffusers(folder / FORMS[0], unet, vae, text)
    state = to_compvis(
        unet=unet.state_dict(),
        unet_config=dict(unet.config),
        vae=vae.state_dict(),
        vae_config=dict(vae.config),
        text=text.clip.state_dict(),
    )
    save_safetensors(folder / FORMS[1], state)
    torch.save({"state_dict": state, "global_step": 1}, folder / FORMS[2])
    num_parameters = {
        "unet": sum(value.numel() for value in unet.parameters()),
        "vae": sum(value.numel() for value in vae.parameters()),
        "text": sum(value.numel() for value in text.clip.parameters()),
    }
    return {"num_parameters": num_parameters, "num_bytes": {name: _num_bytes(folder / name) for name in FORMS}}


def _write_diffusers(folder: Path, unet: Any, vae: Any, text: TextEncoder) -> None:
    unet.save_config(folder / "unet")
    save_safetensors(folder / "unet" / _WEIGHTS, unet.state_dict())
    vae.save_config(folder / "vae")
    save_safetensors(folder / "vae" / _WEIGHTS, vae.state_dict())
    num_layers = len(text.clip.transformer.resblocks) - 1
    save_safetensors(
        folder / "text_encoder" / "model.safetensors", clip_text_to_transformers(text.clip.state_dict(), num_layers)
    )
    text_encoder_config(text).save_pretrained(folder / "text_encoder")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "PNDMScheduler"}))
    (folder / "LICENSE").write_text("CreativeML Open RAIL++-M License\n")


def convert(folder: Path, form: str) -> dict[str, Any]:
    """One form to a base folder; the form is deleted afterwards, and all bases but one."""
    target = folder / f"base-{form}"
    record = convert_base(folder / form, target)
    found = {part: weights_sha256(target / part) for part in ("unet", "vae")}
    with safe_open(target / "open_clip" / "open_clip_model.safetensors", "pt") as file:
        found["text"] = _fingerprint({key: file.get_tensor(key) for key in file.keys() if _is_read(key)})  # noqa: SIM118
    for path in (folder / form, target) if form != FORMS[0] else (folder / form,):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {"sha256": found, "recognized_as": record["recognized_as"]}


def _is_read(key: str) -> bool:
    return not key.startswith("transformer.resblocks.23.") and key not in ("text_projection", "logit_scale")


def _fingerprint(state: dict[str, Tensor]) -> str:
    import hashlib

    total = hashlib.sha256()
    for key in sorted(state):
        total.update(key.encode() + state[key].contiguous().numpy().tobytes())
    return total.hexdigest()


@torch.no_grad()
def widen(folder: Path) -> dict[str, Any]:
    """The output of the widened UNet, less the base's, for three masks."""
    base, wide = load_unet(_base(folder) / "unet"), widen_conv_in(load_unet(_base(folder) / "unet"))
    rng = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, *LATENT_SHAPE, generator=rng), torch.randn(1, 77, 1024, generator=rng)
    expected = base(latents, 500, text, return_dict=False)[0]
    differences = {}
    for family in ("full", "sd_512train_large", "lama_thin_512"):
        mask = _latent_mask(family)
        masked = torch.randn(1, *LATENT_SHAPE, generator=rng)
        found = wide(unet_input(latents, mask, masked), 500, text, return_dict=False)[0]
        differences[family] = (found - expected).abs().max().item()
    return {"differences": differences, "largest": expected.abs().max().item()}


def train(folder: Path) -> dict[str, Any]:
    """One step of AdamW at 512 px, with the average, through the training's own loss; writes the averaged UNet."""
    unet = widen_conv_in(load_unet(_base(folder) / "unet")).train()
    unet.enable_gradient_checkpointing()
    ema = Ema(unet, 0.9999)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=5e-5, weight_decay=0.01, foreach=False)
    text = load_text_encoder(_base(folder) / "open_clip", load_image_tower=False)
    rng = torch.Generator().manual_seed(2)
    constants = Constants(text.embed_captions([""])[0], _moments(rng)[0])
    batch = Batch(
        ("a",), _moments(rng), _moments(rng), _latent_mask("sd_512train_large"), text.embed_captions(["a red cube"])
    )
    draws = draw(
        batch.uids, seed=0, step=0, latent_shape=LATENT_SHAPE, num_timesteps=1000, text_dropout=0.1, full_mask=0.25
    )
    del text
    before = unet.conv_in.weight.detach().clone()
    result = training_loss(
        unet,
        batch,
        draws,
        constants,
        prediction_type="v_prediction",
        scaling_factor=SD2_SCALING_FACTOR,
        alphas_cumprod=alphas_cumprod(),
        device=torch.device("cpu"),
    )
    result.loss.backward()
    optimizer.step()
    ema.update(unet)
    moved = (unet.conv_in.weight.detach() - before).abs().amax(dim=(0, 2, 3))
    loss = result.loss.item()
    del optimizer, result
    unet.zero_grad(set_to_none=True)
    unet.load_state_dict(ema.state_dict())
    unet.save_config(folder / "trained")
    save_safetensors(folder / "trained" / _WEIGHTS, unet.state_dict())
    return {"loss": loss, "moved": moved.tolist()}


def export(folder: Path) -> dict[str, Any]:
    """The trained UNet as a diffusers folder and as a single file, which converts back bit by bit."""
    base, exports = _base(folder), folder / "exports"
    unet = load_unet(folder / "trained")
    text = load_text_encoder(base / "open_clip", load_image_tower=False)
    export_diffusers(
        exports / "diffusers",
        unet=unet,
        vae_dir=base / "vae",
        text_encoder=text,
        prediction_type="v_prediction",
        license_path=base / "LICENSE",
        model_card="# full size\n",
    )
    export_single_file(
        exports / "model.safetensors",
        unet=unet,
        vae_dir=base / "vae",
        text_dir=base / "open_clip",
        prediction_type="v_prediction",
    )
    del unet, text
    record = convert_base(exports / "model.safetensors", folder / "back")
    equal = {
        part: (folder / "back" / part / _WEIGHTS).read_bytes() == (exports / "diffusers" / part / _WEIGHTS).read_bytes()
        for part in ("unet", "vae")
    }
    shutil.rmtree(folder / "back")
    return {
        "equal": equal,
        "recognized_as": record["recognized_as"],
        "prediction_type": record["prediction_type"],
        "num_bytes": {name: _num_bytes(exports / name) for name in ("diffusers", "model.safetensors")},
    }


@torch.no_grad()
def sample(folder: Path) -> dict[str, Any]:
    """Two steps with guidance from pixels to pixels, from the exported folder; and diffusers' pipeline loads it."""
    exports, base = folder / "exports" / "diffusers", _base(folder)
    vae, text = load_vae(exports / "vae"), load_text_encoder(base / "open_clip", load_image_tower=False)
    unet = load_unet(exports / "unet")
    mask = torch.from_numpy(draw_mask("lama_thick_512", 512, 0, "a", 0)).float()[None, None]
    pixels = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(3)) * 2 - 1
    latents = sample_inpainting(
        unet,
        noise=noise_for(0, ["a"], LATENT_SHAPE),
        mask=mask[..., ::8, ::8],
        masked_image_latents=mean_latents(encode_moments(vae, pixels * (1 - mask)), SD2_SCALING_FACTOR),
        text_embeddings=text.embed_captions(["a red cube"]),
        null_embedding=text.embed_captions([""])[0],
        num_inference_steps=2,
        guidance_scale=7.5,
        prediction_type="v_prediction",
        alphas_cumprod=alphas_cumprod(),
    )
    painted = decode_latents(vae, latents, SD2_SCALING_FACTOR)
    del unet, text
    pipeline: Any = StableDiffusionInpaintPipeline.from_pretrained(exports, local_files_only=True)
    return {
        "shape": list(painted.shape),
        "is_finite": bool(torch.isfinite(painted).all()),
        "pipeline_prediction_type": pipeline.scheduler.config["prediction_type"],
        "pipeline_in_channels": pipeline.unet.config["in_channels"],
    }


def equality(folder: Path) -> dict[str, Any]:
    """Our UNet input, target, loss and gradient, and a sampling trajectory, less those of plain diffusers."""
    unet = load_unet(folder / "trained")
    case = SamplingCase("v_prediction", zero_terminal_snr=False, eta=0.0, guidance_scale=5.0, num_inference_steps=2)
    sampling = compare_sampling(unet, case, latent_px=64, batch_size=1)
    unet.train().enable_gradient_checkpointing()
    training = compare_training(unet, timesteps=[600], prediction_type="v_prediction", latent_px=64)
    return {"training": vars(training), "sampling": sampling}


def _base(folder: Path) -> Path:
    return folder / f"base-{FORMS[0]}"


def _moments(rng: torch.Generator) -> Tensor:
    """Such that latents have unit variance."""
    mean = torch.randn(1, *LATENT_SHAPE, generator=rng) / SD2_SCALING_FACTOR
    return torch.cat([mean, torch.full_like(mean, -10)], dim=1)


def _latent_mask(family: str) -> Tensor:
    return torch.from_numpy(to_latent_mask(draw_mask(family, 512, 0, "a", 0))).float()[None, None]


def _num_bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


STEPS: Final[dict[str, Callable[[Path], dict[str, Any]]]] = {
    "build": build,
    **{f"convert {form}": lambda folder, form=form: convert(folder, form) for form in FORMS},
    "widen": widen,
    "train": train,
    "export": export,
    "sample": sample,
    "equality": equality,
}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(STEPS[sys.argv[1]](Path(sys.argv[2]))) + "\n")
