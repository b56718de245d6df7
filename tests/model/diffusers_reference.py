"""What Lacuna's training forward and sampler should compute, written plainly with diffusers; and comparisons.

Each comparison takes a UNet of any size, with nine input channels, and returns differences, so that the same code
compares a small model in every test run and the full-size one in the soak. A difference is the largest one between two
tensors, over the larger of 1 and the reference's largest value.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own convention
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from model.encoders import encode_moments, sample_latents
from model.masks import to_latent_mask
from model.objective import target
from model.sampler import sample_inpainting
from model.schedule import alphas_cumprod_of
from model.specs import SD2_SCALING_FACTOR, PredictionType, ScheduleSpec
from training.data import Batch, Constants
from training.step import Draws, training_loss

FACTOR = 8
SCHEDULE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, over the larger of 1 and the reference's largest value."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()


@dataclass
class Recorder:
    """A UNet that remembers what it was given."""

    unet: Any
    samples: list[Tensor] = field(default_factory=list)

    def __call__(self, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.samples.append(sample.detach().clone())
        return self.unet(sample, *args, **kwargs)


# ------------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class TrainingDifferences:
    """Ours less diffusers': the nine channels that the UNet reads, the target, the loss, and the loss's gradient."""

    unet_input: float
    target: float
    loss: float
    gradient: float


@dataclass(frozen=True)
class _Case:
    """A batch before anything is drawn: stored moments, pixel masks, text, and the seeds of the draws."""

    moments: Tensor
    masked_moments: Tensor
    pixel_mask: Tensor
    text_embeddings: Tensor
    timesteps: Tensor

    @property
    def latent_shape(self) -> torch.Size:
        return torch.Size([len(self.moments), self.moments.shape[1] // 2, *self.moments.shape[2:]])

    def noise(self, name: str) -> Tensor:
        return torch.randn(self.latent_shape, generator=self.generator(name))

    @staticmethod
    def generator(name: str) -> torch.Generator:
        seeds = {"posterior": 11, "masked posterior": 12, "diffusion": 13}
        return torch.Generator().manual_seed(seeds[name])


def _case(timesteps: Tensor, *, latent_px: int, width: int, channels: int) -> _Case:
    rng = torch.Generator().manual_seed(10)
    size = (len(timesteps), 2 * channels, latent_px, latent_px)
    side = latent_px * FACTOR
    pixel_mask = F.interpolate(torch.rand(len(timesteps), 1, 7, 7, generator=rng), size=(side, side)).round()
    # Means of the size of real moments (a standard deviation of 1 / 0.18215), log variances below zero.
    scale = torch.tensor([1 / SD2_SCALING_FACTOR, 4.0]).repeat_interleave(channels)[:, None, None]
    shift = torch.tensor([0.0, -10.0]).repeat_interleave(channels)[:, None, None]
    return _Case(
        torch.randn(size, generator=rng) * scale + shift,
        torch.randn(size, generator=rng) * scale + shift,
        pixel_mask,
        torch.randn(len(timesteps), 77, width, generator=rng),
        timesteps,
    )


def compare_training(
    unet: Any,
    *,
    timesteps: list[int],
    prediction_type: PredictionType,
    latent_px: int,
    zero_terminal_snr: bool = False,
    min_snr_gamma: float | None = None,
) -> TrainingDifferences:
    """One forward and backward pass of `training.step.training_loss`, and of a training script written with diffusers.

    Args:
        unet: a UNet2DConditionModel with nine input channels; its gradients are overwritten.
        timesteps: one a sample.
        prediction_type: what the UNet predicts.
        latent_px: side of the latents.
        zero_terminal_snr: of the schedule.
        min_snr_gamma: of the loss weights.
    """
    channels, width = unet.config["out_channels"], unet.config["cross_attention_dim"]
    case = _case(torch.tensor(timesteps), latent_px=latent_px, width=width, channels=channels)
    alphas_cumprod = alphas_cumprod_of(ScheduleSpec(zero_terminal_snr=zero_terminal_snr))

    recorder = Recorder(unet)
    unet.zero_grad(set_to_none=True)
    result = training_loss(
        recorder,
        Batch(
            uids=tuple(str(i) for i in range(len(timesteps))),
            moments=case.moments,
            masked_moments=case.masked_moments,
            mask=torch.stack([torch.from_numpy(to_latent_mask(m[0].byte().numpy())) for m in case.pixel_mask])[
                :, None
            ].float(),
            text_embeddings=case.text_embeddings,
        ),
        Draws(
            posterior_noise=case.noise("posterior"),
            masked_posterior_noise=case.noise("masked posterior"),
            noise=case.noise("diffusion"),
            timesteps=case.timesteps,
            drops_text=torch.zeros(len(timesteps), dtype=torch.bool),
            is_full_mask=torch.zeros(len(timesteps), dtype=torch.bool),
        ),
        Constants(torch.zeros(77, width), torch.zeros(case.moments.shape[1:])),
        prediction_type=prediction_type,
        scaling_factor=SD2_SCALING_FACTOR,
        alphas_cumprod=alphas_cumprod,
        device=torch.device("cpu"),
        min_snr_gamma=min_snr_gamma,
    )
    result.loss.backward()
    our_gradients = [parameter.grad for parameter in unet.parameters()]
    latents = sample_latents(case.moments, case.noise("posterior"), SD2_SCALING_FACTOR)
    our_target = target(prediction_type, latents, case.noise("diffusion"), case.timesteps, alphas_cumprod)

    unet.zero_grad(set_to_none=True)
    their_input, their_target, their_loss = _diffusers_training(
        unet, case, prediction_type, zero_terminal_snr=zero_terminal_snr, min_snr_gamma=min_snr_gamma
    )
    their_loss.backward()
    their_gradients = [parameter.grad for parameter in unet.parameters()]
    return TrainingDifferences(
        unet_input=difference(recorder.samples[0], their_input),
        target=difference(our_target, their_target),
        loss=difference(result.loss.detach(), their_loss.detach()),
        gradient=_gradient_difference(our_gradients, their_gradients),
    )


def _gradient_difference(ours: list[Any], theirs: list[Any]) -> float:
    """The norm of the difference, over that of the gradient: all parameters together.

    Not one by one: a bias before a normalization has no gradient but rounding, of which nothing agrees.
    """
    norms = torch.stack([gradient.norm() for gradient in theirs])
    differences = torch.stack([(one - other).norm() for one, other in zip(ours, theirs, strict=True)])
    return (differences.norm() / norms.norm()).item()


def _diffusers_training(
    unet: Any, case: _Case, prediction_type: PredictionType, *, zero_terminal_snr: bool, min_snr_gamma: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As diffusers' example scripts do it: the UNet's input, the target, the loss."""
    scheduler: Any = DDPMScheduler(
        **SCHEDULE, prediction_type=prediction_type, rescale_betas_zero_snr=zero_terminal_snr
    )
    latents = DiagonalGaussianDistribution(case.moments).sample(case.generator("posterior")) * SD2_SCALING_FACTOR
    masked_latents = DiagonalGaussianDistribution(case.masked_moments).sample(case.generator("masked posterior"))
    masked_latents = masked_latents * SD2_SCALING_FACTOR
    noise = case.noise("diffusion")
    noisy_latents = scheduler.add_noise(latents, noise, case.timesteps)
    mask = F.interpolate(case.pixel_mask, size=tuple(latents.shape[-2:]))
    unet_input = torch.cat([noisy_latents, mask, masked_latents], dim=1)
    prediction = unet(unet_input, case.timesteps, case.text_embeddings, return_dict=False)[0]
    wanted = noise if prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, case.timesteps)
    if min_snr_gamma is None:
        return unet_input, wanted, F.mse_loss(prediction, wanted, reduction="mean")
    snr = compute_snr(scheduler, case.timesteps)
    weights = torch.stack([snr, min_snr_gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    weights = weights / snr if prediction_type == "epsilon" else weights / (snr + 1)
    losses = F.mse_loss(prediction, wanted, reduction="none").mean(dim=[1, 2, 3])
    return unet_input, wanted, (losses * weights).mean()


# ------------------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class SamplingCase:
    """How a sampling is done.

    Attributes:
        prediction_type: what the UNet predicts.
        zero_terminal_snr: of the schedule; the timesteps are then `trailing`.
        eta: DDIM's.
        guidance_scale: 1 is without.
        num_inference_steps: how many.
    """

    prediction_type: PredictionType
    zero_terminal_snr: bool
    eta: float
    guidance_scale: float
    num_inference_steps: int

    @property
    def schedule(self) -> ScheduleSpec:
        return ScheduleSpec(zero_terminal_snr=self.zero_terminal_snr)

    def scheduler(self) -> Any:
        """diffusers' scheduler, as Lacuna's exports configure it."""
        return DDIMScheduler(
            **SCHEDULE,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=self.prediction_type,
            rescale_betas_zero_snr=self.zero_terminal_snr,
            timestep_spacing=self.schedule.timestep_spacing,
        )


def ddim_cases(num_inference_steps: int) -> list[SamplingCase]:
    """Both prediction types, both schedules, η 0 and 0.7, without and with guidance; not ε where there is no signal."""
    kinds: list[tuple[PredictionType, bool]] = [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
    return [
        SamplingCase(prediction_type, zero_terminal_snr, eta, guidance_scale, num_inference_steps)
        for prediction_type, zero_terminal_snr in kinds
        for eta in (0.0, 0.7)
        for guidance_scale in (1.0, 5.0)
    ]


def compare_sampling(unet: Any, case: SamplingCase, *, latent_px: int, batch_size: int = 2) -> list[float]:
    """`sample_inpainting`, and a loop around diffusers' DDIMScheduler.

    Args:
        unet: with nine input channels.
        case: how to sample.
        latent_px: side of the latents.
        batch_size: samples at once.

    Returns:
        the difference of the latents after each step.
    """
    rng = torch.Generator().manual_seed(20)
    channels, width = unet.config["out_channels"], unet.config["cross_attention_dim"]
    shape = (batch_size, channels, latent_px, latent_px)
    start, masked_latents = torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)
    mask = torch.rand(batch_size, 1, latent_px, latent_px, generator=rng).round()
    text, null = torch.randn(batch_size, 77, width, generator=rng), torch.randn(77, width, generator=rng)
    fresh = torch.randn(case.num_inference_steps, *shape, generator=rng)

    recorder = Recorder(unet)
    final = sample_inpainting(
        recorder,
        noise=start,
        mask=mask,
        masked_image_latents=masked_latents,
        text_embeddings=text,
        null_embedding=null,
        num_inference_steps=case.num_inference_steps,
        guidance_scale=case.guidance_scale,
        prediction_type=case.prediction_type,
        alphas_cumprod=alphas_cumprod_of(case.schedule),
        eta=case.eta,
        timestep_spacing=case.schedule.timestep_spacing,
        fresh_noise=lambda step: fresh[step],
    )
    ours = [sample[:batch_size, :channels] for sample in recorder.samples[1:]] + [final]

    scheduler = case.scheduler()
    scheduler.set_timesteps(case.num_inference_steps)
    latents, theirs = start, []
    for index, t in enumerate(scheduler.timesteps):
        sample = torch.cat([scheduler.scale_model_input(latents, t), mask, masked_latents], dim=1)
        with torch.no_grad():
            prediction = unet(sample, t, text, return_dict=False)[0]
            if case.guidance_scale != 1:
                without = unet(sample, t, null.expand_as(text), return_dict=False)[0]
                prediction = without + case.guidance_scale * (prediction - without)
        noise = fresh[index] if case.eta else None
        latents = scheduler.step(prediction, t, latents, eta=case.eta, variance_noise=noise, return_dict=False)[0]
        theirs.append(latents)
    return [difference(one, other) for one, other in zip(ours, theirs, strict=True)]


def compare_pipeline(unet: Any, vae: Any, case: SamplingCase, *, latent_px: int, batch_size: int = 2) -> float:
    """Ours from pixels to latents, and diffusers' own StableDiffusionInpaintPipeline from pixels to latents.

    The pipeline draws each sample's posterior, and then the noise of each step, from the sample's own generator; here
    these draws are repeated in the same order.

    Args:
        unet: with nine input channels.
        vae: an AutoencoderKL with a factor of 8.
        case: how to sample.
        latent_px: side of the latents.
        batch_size: samples at once.

    Returns:
        the difference of the final latents.
    """
    rng = torch.Generator().manual_seed(30)
    side, channels = latent_px * FACTOR, unet.config["out_channels"]
    images = torch.rand(batch_size, 3, side, side, generator=rng)
    pixel_mask = F.interpolate(torch.rand(batch_size, 1, 7, 7, generator=rng), size=(side, side)).round()
    text = torch.randn(batch_size, 77, unet.config["cross_attention_dim"], generator=rng)
    null = torch.randn(77, unet.config["cross_attention_dim"], generator=rng)
    shape = (channels, latent_px, latent_px)
    start = torch.randn(batch_size, *shape, generator=rng)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(40 + i) for i in range(batch_size)]

    pipeline: Any = StableDiffusionInpaintPipeline(
        vae=vae,
        text_encoder=None,  # pyright: ignore[reportArgumentType]  # the embeddings are given
        tokenizer=None,  # pyright: ignore[reportArgumentType]  # as above
        unet=unet,
        scheduler=case.scheduler(),
        safety_checker=None,  # pyright: ignore[reportArgumentType]  # there is none
        feature_extractor=None,  # pyright: ignore[reportArgumentType]  # as above
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        image=images,
        mask_image=pixel_mask,
        prompt_embeds=text,
        negative_prompt_embeds=null.expand_as(text),
        height=side,
        width=side,
        latents=start,
        generator=generators(),
        num_inference_steps=case.num_inference_steps,
        guidance_scale=case.guidance_scale,
        eta=case.eta,
        output_type="latent",
    ).images

    own = generators()

    def draw() -> Tensor:
        return torch.cat([torch.randn(1, *shape, generator=generator) for generator in own])

    moments = encode_moments(vae, (2 * images - 1) * (1 - pixel_mask))
    masked_latents = sample_latents(moments, draw(), vae.config["scaling_factor"])
    fresh = [draw() for _ in range(case.num_inference_steps)]
    latent_masks = [torch.from_numpy(to_latent_mask(mask[0].byte().numpy())).float() for mask in pixel_mask]
    ours = sample_inpainting(
        unet,
        noise=start,
        mask=torch.stack(latent_masks)[:, None],
        masked_image_latents=masked_latents,
        text_embeddings=text,
        null_embedding=null,
        num_inference_steps=case.num_inference_steps,
        guidance_scale=case.guidance_scale,
        prediction_type=case.prediction_type,
        alphas_cumprod=alphas_cumprod_of(case.schedule),
        eta=case.eta,
        timestep_spacing=case.schedule.timestep_spacing,
        fresh_noise=lambda step: fresh[step],
    )
    return difference(ours, theirs)
