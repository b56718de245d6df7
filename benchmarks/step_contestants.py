"""Who takes training steps beside each other, each in a process of its own that waits for its turn.

``ours`` is the product's own loop: batches from Parquet, draws, the step through DeepSpeed, what is agreed upon, the
average, metrics. ``bare`` is a plain PyTorch loop with the same UNet, optimizer, clipping and average, on batches that
lie ready in memory. ``dreambooth`` takes the step as `examples/research_projects/dreambooth_inpaint` of diffusers takes
it (commit 58eb52c): pictures decoded, masks drawn and tokens padded in the main process, two VAE encodes and the text
tower in each step, through accelerate; written here after reading it.

A contestant reads a number of steps from standard input, takes them, and writes how many seconds they took, and for how
many of these it waited for data.
"""

import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

from model.encoders import sample_latents  # noqa: E402 - after the path is set
from model.schedule import alphas_cumprod_of  # noqa: E402
from model.unet import load_unet, unet_input, widen_conv_in  # noqa: E402
from training.batch import Batch  # noqa: E402
from training.conditioning import fields_of  # noqa: E402
from training.data import open_dataset  # noqa: E402
from training.loop import Trainer, run_training  # noqa: E402
from training.runspec import RunSpec  # noqa: E402
from training.world import find_world  # noqa: E402

from infra.storage import open_store  # noqa: E402  # isort: skip

_TOLD = "@took "
_START_S = 900.0
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Taken = tuple[float, float]
PROMPT_IDS = (49406, 320, 1125, 539, 320, 736, 49407)
"""``a photo of a dog`` or the like: the script has one short prompt for all pictures, and pads to the longest."""


# ------------------------------------------------------------------------------------------------------- taking turns


class Contestant:
    """A process that takes steps when it is told to.

    Args:
        name: ``ours``, ``bare`` or ``dreambooth``.
        run: A `RunSpec`'s file.
        folder: Of its own: scratch and log.
        environment: Beside ours.
        options: Of the contestant, JSON values.
    """

    def __init__(
        self,
        name: str,
        run: Path,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log_path = folder / "log.txt"
        self._log = self._log_path.open("w")
        argv = [sys.executable, str(Path(__file__)), name, str(run), str(folder), json.dumps(options)]
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), **(environment or {})},
        )

    def __enter__(self) -> "Contestant":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate(timeout=60)  # the end of its input is its end
        self._log.close()

    def take(self, num_steps: int) -> dict[str, float]:
        """Seconds of so many steps, ``took``, of which it waited for data, ``waited``; and ``peak_bytes`` on a GPU.

        Raises:
            RuntimeError: It ended instead; the message holds the end of its log.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{num_steps}\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(_TOLD):
                return json.loads(line.removeprefix(_TOLD))
        self._log.flush()
        raise RuntimeError(f"it ended; the end of its log:\n{self._log_path.read_text()[-3000:]}")


def _serve(take: Callable[[int], Taken]) -> None:
    """The contestant's side: takes steps until its input ends."""
    on_gpu = torch.cuda.is_available()
    for line in sys.stdin:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        took, waited = take(int(line))
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        sys.stdout.write(f"{_TOLD}{json.dumps({'took': took, 'waited': waited, 'peak_bytes': peak})}\n")
        sys.stdout.flush()


def _timed(step: Callable[[], float]) -> Callable[[int], Taken]:
    """Takes steps; each returns for how long it waited for data."""

    def take(num_steps: int) -> Taken:
        started = time.perf_counter()
        waited = sum(step() for _ in range(num_steps))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started, waited

    return take


# ---------------------------------------------------------------------------------------------------------------- ours


class _Told(Trainer):
    """The product's trainer, but it takes its steps when told, and saves nothing."""

    has_average = True

    def _average(self) -> None:
        if self.has_average:
            super()._average()

    def _take_steps(self, batches: Any, stop: Any) -> Any:
        iterator = iter(batches)

        def step() -> float:
            started = time.perf_counter()
            batch = next(iterator)
            waited = time.perf_counter() - started
            _, problem = self._take_step(batch, stop)
            assert problem is None
            return waited

        profile = os.environ.get("PROFILE_STEPS")
        if profile is not None:
            _write_profile(Path(profile), step)
        _serve(_timed(step))
        os._exit(0)  # nothing of it is needed any more; the loop would go on to its last step


def _write_profile(path: Path, step: Callable[[], object]) -> None:
    """What the GPU did in three steps, by kernel; the longest first."""
    for _ in range(5):
        step()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profiler:
        for _ in range(3):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    path.write_text(profiler.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=90))


def ours(run: RunSpec, folder: Path, *, options: Mapping[str, Any]) -> None:
    """The product's loop, alone in its world."""
    _Told.has_average = bool(options.get("has_average", True))
    run_training(run, folder, find_world(run.train), trainer_type=_Told)


# ---------------------------------------------------------------------------------------------------------------- bare


def bare(run: RunSpec, folder: Path, *, options: Mapping[str, Any]) -> None:
    """A plain PyTorch loop, on batches in memory."""
    train, device = run.train, _device()
    dataset = open_dataset(open_store(run.store_uri), run.datasets, folder / "cache", fields=fields_of(train))
    num_kept = int(options.get("num_batches", 4))
    kept = [dataset.batch_at(i, seed=0, global_batch_size=train.global_batch_size) for i in range(num_kept)]
    batches = itertools.cycle([_on(batch, device) for batch in kept])
    latents_spec = dataset.specs.latents
    unet = _load(run).to(device)
    optimizer = _optimizer(unet, run)
    average = [parameter.detach().clone() for parameter in unet.parameters()]
    alphas = alphas_cumprod_of(train.schedule).to(device=device, dtype=torch.float32)

    def step() -> float:
        text, mask, moments, masked_moments = next(batches)
        loss = torch.zeros((), device=device)
        for start in range(0, len(text), train.micro_batch_size):
            part = slice(start, start + train.micro_batch_size)
            shape = moments[part].shape[0], latents_spec.channels, latents_spec.latent_px, latents_spec.latent_px
            latents = sample_latents(moments[part], torch.randn(shape, device=device), latents_spec.scaling_factor)
            masked = sample_latents(
                masked_moments[part], torch.randn(shape, device=device), latents_spec.scaling_factor
            )
            noise = torch.randn(shape, device=device)
            timesteps = torch.randint(0, len(alphas), (shape[0],), device=device)
            signal, sigma = (
                value[:, None, None, None] for value in (alphas[timesteps].sqrt(), (1 - alphas[timesteps]).sqrt())
            )
            sample = unet_input(signal * latents + sigma * noise, mask[part], masked)
            with _autocast(train.precision, device):
                prediction = unet(sample, timesteps, encoder_hidden_states=text[part].float(), return_dict=False)[0]
            target = signal * noise - sigma * latents
            share = nn.functional.mse_loss(prediction.float(), target) * len(sample) / len(text)
            share.backward()
            loss += share.detach()
        if train.gradient_clipping:
            nn.utils.clip_grad_norm_(unet.parameters(), train.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        weights = [parameter.detach() for parameter in unet.parameters()]
        torch._foreach_lerp_(average, weights, 1 - train.ema_decay)  # pyright: ignore[reportPrivateImportUsage]  # as torch's own averages do
        loss.item()
        return 0.0

    _serve(_timed(step))


def _on(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept = (batch.text_embeddings, batch.mask, batch.moments, batch.masked_moments)
    moved = [tensor.to(device, copy=True) for tensor in kept if tensor is not None]
    assert len(moved) == 4
    return moved[0], moved[1].float(), moved[2], moved[3]


def _load(run: RunSpec) -> nn.Module:
    unet = load_unet(run.model.directory / "unet")
    if unet.config["in_channels"] != 9:
        widen_conv_in(unet)
    if run.train.channels_last:
        nn.Module.to(unet, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # typed without it
    return unet.train()


def _optimizer(unet: nn.Module, run: RunSpec) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        unet.parameters(),
        lr=run.train.learning_rate,
        weight_decay=run.train.weight_decay,
        fused=_device().type == "cuda",
    )


# ---------------------------------------------------------------------------------------------------------- dreambooth


class _Pictures(torch.utils.data.Dataset[dict[str, Any]]):
    """The script's data: a picture's file is opened, resized and cropped each time it is asked for."""

    def __init__(self, folder: Path, side_px: int) -> None:
        from torchvision import transforms

        self._paths = sorted(folder.iterdir())
        mode = transforms.InterpolationMode.BILINEAR
        self._crop = transforms.Compose(
            [transforms.Resize(side_px, interpolation=mode), transforms.RandomCrop(side_px)]
        )
        self._to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = self._crop(Image.open(self._paths[index]).convert("RGB"))
        return {"picture": picture, "pixels": self._to_tensor(picture)}


def _shape_mask(side_px: int) -> Image.Image:
    """One rectangle or ellipse of random size and place."""
    mask = Image.new("L", (side_px, side_px), 0)
    width, height = random.randint(0, side_px), random.randint(0, side_px)  # noqa: S311 - as the script does
    x, y = (random.randint(size // 2, side_px - size // 2) for size in (width, height))  # noqa: S311 - likewise
    box = (x - width // 2, y - height // 2, x + width // 2, y + height // 2)
    draw = ImageDraw.Draw(mask)
    (draw.rectangle if random.random() < 0.5 else draw.ellipse)(box, fill=255)  # noqa: S311 - likewise
    return mask


def _collate(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    masks, masked = [], []
    for example in examples:
        picture = np.asarray(example["picture"], dtype=np.float32).transpose(2, 0, 1)[None] / 127.5 - 1.0
        mask = (np.asarray(_shape_mask(picture.shape[-1]), dtype=np.float32) / 255.0 >= 0.5)[None, None]
        masks.append(torch.from_numpy(mask.astype(np.float32)))
        masked.append(torch.from_numpy(picture * ~mask))
    return {
        "input_ids": torch.tensor([PROMPT_IDS] * len(examples)),
        "pixels": torch.stack([example["pixels"] for example in examples]).float(),
        "masks": torch.stack(masks),
        "masked": torch.stack(masked),
    }


def dreambooth(run: RunSpec, folder: Path, *, options: Mapping[str, Any]) -> None:
    """The step of diffusers' research script."""
    from accelerate import Accelerator
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.optimization import get_scheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from transformers import CLIPTextModel

    train, model = run.train, run.model.directory
    precision = {"fp32": "no"}.get(train.precision, train.precision)
    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available())
    dtype = _AUTOCAST[train.precision] or torch.float32
    vae: Any = AutoencoderKL.from_pretrained(str(model / "vae"), local_files_only=True)
    text_encoder = CLIPTextModel.from_pretrained(str(model / "text_encoder"), local_files_only=True)
    for frozen in (vae, text_encoder):
        frozen.requires_grad_(False).to(accelerator.device, dtype=dtype)
    unet = load_unet(model / "unet")
    if unet.config["in_channels"] != 9:
        widen_conv_in(unet)
    schedule: Any = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=train.prediction_type
    )
    optimizer = torch.optim.AdamW(unet.parameters(), lr=train.learning_rate, weight_decay=train.weight_decay)
    side_px = int(options["side_px"])
    loader = torch.utils.data.DataLoader(
        _Pictures(Path(options["pictures"]), side_px),
        batch_size=train.micro_batch_size,
        shuffle=True,
        collate_fn=_collate,
    )
    rates = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=500, num_training_steps=10**6)
    unet, optimizer, loader, rates = accelerator.prepare(unet, optimizer, loader, rates)
    unet.train()
    batches: Iterator[dict[str, Tensor]] = itertools.chain.from_iterable(itertools.repeat(loader))

    def step() -> float:
        started = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - started
        scale = vae.config["scaling_factor"]
        with accelerator.accumulate(unet):
            latents = vae.encode(batch["pixels"].to(dtype=dtype)).latent_dist.sample() * scale
            masked = (
                vae.encode(batch["masked"].reshape(batch["pixels"].shape).to(dtype=dtype)).latent_dist.sample() * scale
            )
            small = (side_px // 8, side_px // 8)
            mask = torch.stack([nn.functional.interpolate(mask, size=small) for mask in batch["masks"]])
            mask = mask.reshape(-1, 1, *small)
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device).long()
            noisy = schedule.add_noise(latents, noise, timesteps)
            text = text_encoder(batch["input_ids"])[0]
            prediction = unet(torch.cat([noisy, mask, masked], dim=1), timesteps, encoder_hidden_states=text).sample
            target = noise if train.prediction_type == "epsilon" else schedule.get_velocity(latents, noise, timesteps)
            loss = nn.functional.mse_loss(prediction.float(), target.float(), reduction="mean")
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
        loss.detach().item()
        return waited

    _serve(_timed(step))


# --------------------------------------------------------------------------------------------------------------- parts


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    dtype = _AUTOCAST[precision]
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def main() -> None:
    """One contestant: its name, the run's file, its folder, its options."""
    warnings.simplefilter("ignore")
    name, run_path, folder, options = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
    run = RunSpec.model_validate_json(run_path.read_bytes())
    run = run.model_copy(update={"train": run.train.model_copy(update=options.pop("train", {}))})
    if name == "ours":
        ours(run, folder, options=options)
    elif name == "bare":
        bare(run, folder, options=options)
    else:
        dreambooth(run, folder, options=options)


if __name__ == "__main__":
    main()
