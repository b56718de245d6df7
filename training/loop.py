"""The training loop: from the newest checkpoint to the last step."""

import contextlib
import json
import logging
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from infra.child import emit
from infra.errors import GateError
from infra.storage import ObjectNotFoundError, ObjectStore, open_store
from model.schedule import alphas_cumprod_of
from model.unet import NUM_INPAINTING_CHANNELS, load_unet, widen_conv_in
from training.batch import Batch
from training.checkpoint import Checkpoints
from training.compatibility import check_specs
from training.conditioning import fields_of
from training.data import TrainingDataset, open_dataset
from training.ema import Ema, start_average
from training.engine import World, build_engine, init_distributed, learning_rate_at, set_learning_rate
from training.loader import Batches
from training.loss_tally import describe, tally
from training.online import OnlineConditioner, load_conditioner
from training.retention import Retention
from training.runspec import RunSpec, checkpoint_prefix, run_digest, run_prefix, step_of
from training.saved_state import TrainingState, load_state
from training.step import StepLoss, draw, training_loss
from training.stopping import Stop

LOGGER = logging.getLogger(__name__)

_EMIT_EVERY_S = 1.0
_MIN_TIMEOUT_S = 1800.0
_MAX_UIDS_IN_MESSAGE = 20
_TALLY_EVERY_STEPS = 50


def run_training(run: RunSpec, workdir: Path, world: World) -> dict[str, Any] | None:
    """Trains, on this rank, from the newest checkpoint to the last step.

    Args:
        run: What to train.
        workdir: Scratch that all ranks share.
        world: This process.

    Returns:
        On rank 0: checkpoint_prefix, step, loss (mean of the last step; None if no step was left).

    Raises:
        ContractError: The dataset, the model and the checkpoints do not belong together.
        GateError: A loss or the gradient is not finite.
        KeyboardInterrupt: Stopped by a signal, after a checkpoint.
        WalltimeError: Stopped near the end of ``train.walltime_s``, after a checkpoint.
        TransientError: A checkpoint could not be committed.
    """
    stop = Stop(run.train.walltime_s, run.train.walltime_margin_s)
    trainer = _prepare(run, workdir, world)
    trainer.resume()
    with stop.signals_noted():
        return trainer.run_to_end(stop)


def _prepare(run: RunSpec, workdir: Path, world: World) -> "_Trainer":
    store = open_store(run.store_uri)
    if world.local_rank == 0:  # the others wait for it when they join the process group
        check_specs(_open(run, store, workdir).specs, run.model)
    init_distributed(world, max(_MIN_TIMEOUT_S, run.train.stall_timeout_s))
    session = [uuid.uuid4().hex]
    dist.broadcast_object_list(session, src=0)
    dataset = _open(run, store, workdir, session[0])
    conditioner = load_conditioner(
        run.train, dataset.specs, dataset.constants, directory=run.model.directory, device=world.device
    )
    torch.manual_seed(run.train.seed)  # nothing draws from it; a layer with dropout would
    unet = load_unet(run.model.directory / "unet")
    if unet.config["in_channels"] != NUM_INPAINTING_CHANNELS:
        widen_conv_in(unet)
    torch.nn.Module.to(unet, world.device).train()
    ema = start_average(unet, run.train.ema_decay, run.model.directory / "unet_ema") if world.is_first else None
    engine = build_engine(unet, run.train)
    digest = run_digest(run.train, run.model, dataset.digest)
    if world.is_first:
        config = run.model_dump(mode="json") | {"digest": digest, "dataset_digest": dataset.digest}
        store.put(f"{run_prefix(run.run_id)}/config.json", json.dumps(config, indent=1).encode())
    return _Trainer(run, world, store, dataset, conditioner, unet, engine, ema, digest, workdir)


def _open(run: RunSpec, store: ObjectStore, workdir: Path, session: str | None = None) -> TrainingDataset:
    return open_dataset(
        store,
        run.datasets,
        workdir / "cache",
        fields=fields_of(run.train),
        cache_bytes=run.train.cache_bytes,
        session=session,
    )


@dataclass
class _Trainer:
    run: RunSpec
    world: World
    store: ObjectStore
    dataset: TrainingDataset
    conditioner: OnlineConditioner | None
    unet: UNet2DConditionModel
    engine: Any
    ema: Ema | None
    digest: str
    workdir: Path
    step: int = 0
    saved_step: int = -1
    progress: "_Progress" = field(init=False)
    metrics: "_Metrics" = field(init=False)
    checkpoints: Checkpoints = field(init=False)

    def __post_init__(self) -> None:
        train = self.run.train
        self.alphas_cumprod = alphas_cumprod_of(train.schedule).to(self.world.device)
        self.tally: Tensor | None = None  # since the last line that told it; starts anew at every checkpoint
        self.progress = _Progress(train.num_steps, train.global_batch_size)
        self.metrics = _Metrics(
            self.workdir / "metrics.jsonl", self.store, f"{run_prefix(self.run.run_id)}/metrics.jsonl"
        )
        retention = Retention(train.keep_last, train.keep_every_steps, train.keep_best, train.keep_best_metric)
        self.checkpoints = Checkpoints(self.store, self.run.run_id, self.workdir / "scratch", retention)

    # ----------------------------------------------------------------------------------------------------- the course

    def resume(self) -> None:
        """Goes on from the newest checkpoint that is whole, if there is any."""
        found: list[str | None] = [None]
        if self.world.is_first:
            folder = self.checkpoints.fetch_newest()
            found = [None if folder is None else str(folder)]
        dist.broadcast_object_list(found, src=0)
        if found[0] is not None:
            self.step = load_state(Path(found[0]), self.engine, self.unet, self.ema, self._state()).step
            self.saved_step = self.step
            dist.barrier()  # all ranks have read it
            if self.world.is_first:
                self.checkpoints.forget_fetched()
        if self.world.is_first:
            self.metrics.start(self.step)
            emit(
                {
                    "event": "resumed" if self.step else "started",
                    "step": self.step,
                    "num_steps": self.run.train.num_steps,
                }
            )

    def run_to_end(self, stop: Stop) -> dict[str, Any] | None:
        train = self.run.train
        loss = None
        with self._batches_from_here() as batches:
            while self.step < train.num_steps:
                loss, is_stopping = self._take_step(next(batches), stop)
                if self._is_checkpoint_due() or is_stopping:
                    self._save()
                self._tell_committed()
                stop.note_step(self.checkpoints.longest_save_s)
                if is_stopping and self.step < train.num_steps:
                    self._end_early(stop)
        self.checkpoints.wait()
        self._tell_committed()
        if not self.world.is_first:
            return None
        self.metrics.put()
        return {"checkpoint_prefix": checkpoint_prefix(self.run.run_id, self.step), "step": self.step, "loss": loss}

    def _batches_from_here(self) -> Batches:
        train = self.run.train
        return self.dataset.batches(
            seed=train.seed,
            global_batch_size=train.global_batch_size,
            start_step=self.step,
            num_steps=train.num_steps - self.step,
            rank=self.world.rank,
            world_size=self.world.size,
            pin_memory=self.world.device.type == "cuda",
        )

    def _save(self) -> None:
        if self.step == self.saved_step:
            return
        # The metrics before the commit: what a resumed run does not want it cuts off.
        metrics = self.metrics.object() if self.world.is_first else {}
        self.checkpoints.save(self.engine, self.unet, self.ema, self._state(), metrics)
        self.saved_step = self.step
        self.progress.skip_pause()

    def _tell_committed(self) -> None:
        for prefix in self.checkpoints.take_committed():
            emit({"event": "checkpoint", "step": step_of(prefix), "prefix": prefix})

    def _end_early(self, stop: Stop) -> NoReturn:
        """Waits for the checkpoint, then ends all ranks for the same reason."""
        self.checkpoints.wait()
        self._tell_committed()
        is_signalled = torch.tensor([float(stop.is_signalled)], device=self.world.device)
        dist.all_reduce(is_signalled, op=dist.ReduceOp.MAX)
        raise stop.error(self.step, was_signalled=bool(is_signalled.item()))

    def _state(self) -> TrainingState:
        return TrainingState(
            step=self.step,
            position=self.step * self.run.train.global_batch_size,
            ema_num_updates=0 if self.ema is None else self.ema.num_updates,
            world_size=self.world.size,
            run_digest=self.digest,
            dataset_digest=self.dataset.digest,
            config=self.run.train.model_dump(mode="json"),
        )

    # ------------------------------------------------------------------------------------------------------- one step

    def _take_step(self, batch: Batch, stop: Stop) -> tuple[float, bool]:
        """Takes one optimizer step.

        Returns:
            Its loss over the global batch, and whether any rank was told to stop.
        """
        train = self.run.train
        results, uids = self._forward_backward(batch)
        loss, is_stopping = self._agree(results, uids, stop)
        learning_rate = learning_rate_at(train, self.step)
        set_learning_rate(self.engine, learning_rate)
        self.engine.step()
        grad_norm = self._check_grad_norm(uids)
        if self.ema is not None:
            self.ema.update(self.unet)
        self.step += 1
        if self.world.is_first:
            speed = self.progress.note(self.step, loss)
            line = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm, "images_per_s": speed}
            self.metrics.append(step=self.step, **line, **self._told_tally(is_stopping))
        return loss, is_stopping

    def _is_checkpoint_due(self) -> bool:
        return self.step % self.run.train.checkpoint_every_steps == 0 or self.step == self.run.train.num_steps

    def _told_tally(self, is_stopping: bool) -> Mapping[str, Any]:
        """What is known of the loss's origin, every so many steps, and at a checkpoint: there is then none to save."""
        if self.step % _TALLY_EVERY_STEPS and not self._is_checkpoint_due() and not is_stopping:
            return {}
        assert self.tally is not None
        told, self.tally = self.tally, None
        return describe(told, len(self.alphas_cumprod))

    def _forward_backward(self, batch: Batch) -> tuple[list[StepLoss], tuple[str, ...]]:
        """Runs this rank's share of the global batch; returns its micro batches' losses, and the samples' uids."""
        train = self.run.train
        results = []
        for start in range(0, len(batch), train.micro_batch_size):
            result = self._loss_of(start, start + train.micro_batch_size, batch)
            self.engine.backward(result.loss)
            results.append(result)
            if start + train.micro_batch_size < len(batch):
                self.engine.step()  # within accumulation: only counts
        return results, batch.uids

    def _loss_of(self, start: int, stop: int, batch: Any) -> StepLoss:
        train, latents = self.run.train, self.dataset.specs.latents
        part = batch.part(start, stop)
        draws = draw(
            part.uids,
            seed=train.seed,
            step=self.step,
            latent_shape=(latents.channels, latents.latent_px, latents.latent_px),
            num_timesteps=len(self.alphas_cumprod),
            text_dropout=train.text_dropout,
            full_mask=train.full_mask,
        )
        if self.conditioner is not None:
            part = self.conditioner.complete(part, draws)
        return training_loss(
            self.engine,
            part,
            draws,
            self.dataset.constants,
            prediction_type=train.prediction_type,
            scaling_factor=latents.scaling_factor,
            alphas_cumprod=self.alphas_cumprod,
            device=self.world.device,
            min_snr_gamma=train.min_snr_gamma,
        )

    def _agree(self, results: Sequence[StepLoss], uids: tuple[str, ...], stop: Stop) -> tuple[float, bool]:
        """One small all-reduce: the mean loss, its origin, whether it is finite everywhere, whether to stop."""
        losses = torch.cat([result.per_sample for result in results])
        weights = torch.cat([result.weights for result in results])
        step_tally = tally(
            losses,
            torch.cat([result.timesteps for result in results]),
            torch.cat([result.is_full_mask for result in results]),
            len(self.alphas_cumprod),
        )
        total, num_bad = (weights * losses).double().sum(), (~losses.isfinite()).sum().double()
        own = torch.stack([total, num_bad, total.new_tensor(float(stop.is_set))])
        sums = torch.cat([own, step_tally.flatten()])
        dist.all_reduce(sums)
        step_tally = sums[len(own) :].reshape(step_tally.shape)
        if self.world.is_first:
            self.tally = step_tally if self.tally is None else self.tally + step_tally
        total, num_bad, num_interrupted = sums[: len(own)].tolist()
        if num_bad:
            bad = [uid for uid, loss in zip(uids, losses.tolist(), strict=True) if not math.isfinite(loss)]
            self._stop_at_non_finite("the loss", bad)
        return total / self.run.train.global_batch_size, num_interrupted > 0

    def _check_grad_norm(self, uids: tuple[str, ...]) -> float | None:
        norm = self.engine.get_global_grad_norm()
        if norm is None:
            return None
        if not math.isfinite(float(norm)):
            self._stop_at_non_finite("the gradient", list(uids))
        return float(norm)

    def _stop_at_non_finite(self, what: str, uids: list[str]) -> None:
        """Stops all ranks, with the samples of all of them in the message. Nothing of the bad step is saved."""
        everywhere: list[list[str]] = [[] for _ in range(self.world.size)]
        dist.all_gather_object(everywhere, uids)
        bad = [uid for part in everywhere for uid in part]
        shown = ", ".join(bad[:_MAX_UIDS_IN_MESSAGE]) + (" …" if len(bad) > _MAX_UIDS_IN_MESSAGE else "")
        self.checkpoints.wait()  # a rank that ends takes the others along, and the upload with them
        self._tell_committed()
        raise GateError(
            f"{what} of step {self.step} is not finite; {len(bad)} samples: {shown}. The last checkpoint is of step "
            f"{max(self.saved_step, 0)}; lower train.learning_rate, or forget the rows if they are at fault"
        )


# ------------------------------------------------------------------------------------------------- what the world sees


class _Progress:
    """Says how far the training is, about once a second."""

    def __init__(self, num_steps: int, global_batch_size: int) -> None:
        self._num_steps = num_steps
        self._global_batch_size = global_batch_size
        self._step_began = self._said = time.monotonic()
        self._num_since = 0
        self._s_since = 0.0

    def note(self, step: int, loss: float) -> float:
        """Counts a step; returns its images per second."""
        now = time.monotonic()
        seconds = max(now - self._step_began, 1e-9)
        self._step_began = now
        self._num_since += self._global_batch_size
        self._s_since += seconds
        if now - self._said >= _EMIT_EVERY_S or step == self._num_steps:
            speed = round(self._num_since / self._s_since, 2)
            emit({"event": "step", "step": step, "num_steps": self._num_steps, "loss": loss, "images_per_s": speed})
            self._said, self._num_since, self._s_since = now, 0, 0.0
        return self._global_batch_size / seconds

    def skip_pause(self) -> None:
        """The time since the last step was not training."""
        self._step_began = time.monotonic()


class _Metrics:
    """``metrics.jsonl``: one line a step, written locally and put to the store at every checkpoint."""

    def __init__(self, path: Path, store: ObjectStore, key: str) -> None:
        self._path, self._store, self._key = path, store, key

    def start(self, step: int) -> None:
        """Goes on after a step: what an earlier run wrote up to it stays, what it wrote beyond is cut off."""
        kept: list[str] = []
        if step:
            with contextlib.suppress(ObjectNotFoundError):
                lines = self._store.read(self._key).decode().splitlines()
                kept = [line for line in lines if json.loads(line)["step"] <= step]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def append(self, **values: Any) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def object(self) -> dict[str, bytes]:
        """Key and content, as it is now."""
        return {self._key: self._path.read_bytes()}

    def put(self) -> None:
        self._store.put(self._key, self._path.read_bytes())
