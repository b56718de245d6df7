"""The training loop: from the newest checkpoint to the last step."""

import json
import logging
import math
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
from infra.storage import ObjectStore, open_store
from model.schedule import alphas_cumprod_of
from model.unet import NUM_INPAINTING_CHANNELS, load_unet, widen_conv_in
from preprocessing.contracts.tombstones import Tombstones
from training.batch import Batch
from training.checkpoint import Checkpoints
from training.compatibility import check_specs
from training.conditioning import fields_of
from training.data import TrainingDataset, open_dataset
from training.ema import Ema, start_average
from training.engine import (
    build_engine,
    gradients_of,
    init_distributed,
    optimizer_of,
    set_learning_rate,
    shares_gradients,
)
from training.flops import peak_images_per_s
from training.health import (
    MAX_BAD_IN_A_ROW,
    MAX_UIDS_TOLD,
    Kind,
    Rollbacks,
    Skips,
    WeightsWatch,
    all_finite,
    check_trainable,
    shown,
    subject,
)
from training.loader import Batches
from training.loss_scale import LossScale
from training.loss_tally import describe, tally
from training.lr_schedule import learning_rate_at
from training.memory import shortage_told
from training.metrics_log import MetricsLog
from training.online import OnlineConditioner, load_conditioner
from training.optimizer_state import OptimizerState
from training.progress import Progress
from training.retention import Retention
from training.runspec import RunSpec, checkpoint_prefix, run_digest, run_prefix, step_of
from training.saved_state import TrainingState, load_state
from training.step import StepLoss, draw, training_loss
from training.stopping import Stop
from training.trackers import Trackers, check_trackers
from training.watchdog import Watchdog
from training.world import World

LOGGER = logging.getLogger(__name__)

_MIN_TIMEOUT_S = 1800.0
_TALLY_EVERY_STEPS = 50


def run_training(
    run: RunSpec, workdir: Path, world: World, trainer_type: "type[Trainer] | None" = None
) -> dict[str, Any] | None:
    """Trains, on this rank, from the newest checkpoint to the last step.

    Args:
        run: What to train.
        workdir: Scratch that all ranks share.
        world: This process.
        trainer_type: What takes the steps; by default `Trainer`, which others than tests have no reason to replace.

    Returns:
        On rank 0: checkpoint_prefix, step, loss (mean of the last step; None if no step was left).

    Raises:
        ContractError: The dataset, the model and the checkpoints do not belong together.
        GateError: Numbers are not finite, and what `training.health` does about it did not help; or nothing is learned.
        ValueError: The memory is too small for it; says what to lower.
        KeyboardInterrupt: Stopped by a signal, after a checkpoint.
        WalltimeError: Stopped near the end of ``train.walltime_s``, after a checkpoint.
        TransientError: A checkpoint could not be committed.
    """
    stop = Stop(run.train.walltime_s, run.train.walltime_margin_s)
    with shortage_told(run.train):
        trainer = _prepare(run, workdir, world, trainer_type or Trainer)
        trainer.resume()
        is_done = False
        try:
            with stop.signals_noted():
                result = trainer.run_to_end(stop)
            is_done = True
        finally:
            trainer.metrics.close(is_done=is_done)
        return result


def _prepare(run: RunSpec, workdir: Path, world: World, trainer_type: "type[Trainer]") -> "Trainer":
    tracker_names = check_trackers(run.train.trackers) if world.is_first else ()
    store = open_store(run.store_uri)
    if world.local_rank == 0:  # the others wait for it when they join the process group
        check_specs(_open(run, store, workdir, Tombstones()).specs, run.model)
    init_distributed(world, max(_MIN_TIMEOUT_S, run.train.stall_timeout_s))
    # What one process would read a moment after another may not be the same: all go by what the first one read.
    common: list[Any] = [uuid.uuid4().hex, Tombstones.load(store) if world.is_first else None]
    dist.broadcast_object_list(common, src=0)
    session, tombstones = common
    dataset = _open(run, store, workdir, tombstones, session)
    conditioner = load_conditioner(
        run.train, dataset.specs, dataset.constants, directory=run.model.directory, device=world.device
    )
    torch.manual_seed(run.train.seed)  # nothing draws from it; a layer with dropout would
    unet = _load_base(run)
    check_trainable(unet)
    torch.nn.Module.to(unet, world.device).train()
    engine = build_engine(unet, run.train)
    ema = start_average(unet, run.train.ema_decay, run.model.directory / "unet_ema") if world.is_first else None
    digest = run_digest(run.train, run.model, dataset.digest)
    if world.is_first:
        config = run.model_dump(mode="json") | {"digest": digest, "dataset_digest": dataset.digest}
        store.put(f"{run_prefix(run.run_id)}/config.json", json.dumps(config, indent=1).encode())
    return trainer_type(run, world, store, dataset, conditioner, unet, engine, ema, digest, workdir, tracker_names)


def _load_base(run: RunSpec) -> UNet2DConditionModel:
    unet = load_unet(run.model.directory / "unet")
    if unet.config["in_channels"] != NUM_INPAINTING_CHANNELS:
        widen_conv_in(unet)
    return unet


def _open(
    run: RunSpec, store: ObjectStore, workdir: Path, tombstones: Tombstones, session: str | None = None
) -> TrainingDataset:
    return open_dataset(
        store,
        run.datasets,
        workdir / "cache",
        fields=fields_of(run.train),
        cache_bytes=run.train.cache_bytes,
        session=session,
        tombstones=tombstones,
    )


@dataclass(frozen=True)
class _Agreed:
    """What all ranks know of a step before the optimizer takes it.

    Attributes:
        loss: Mean over the global batch.
        is_loss_finite: Whether each sample's is, on every rank.
        grad_norm: Of the averaged gradient, before clipping.
        tally: The loss's origin.
        is_stopping: Whether any rank was told to stop.
    """

    loss: float
    is_loss_finite: bool
    grad_norm: float
    tally: Tensor
    is_stopping: bool

    @property
    def problem(self) -> Kind | None:
        """What is not finite, if anything is."""
        if not self.is_loss_finite:
            return "loss"
        return None if math.isfinite(self.grad_norm) else "gradient"


@dataclass(frozen=True)
class _Problem:
    """Why to go back to the last checkpoint.

    Attributes:
        kind: What is not finite.
        uids: Of the samples at fault, if that is known.
    """

    kind: Kind
    uids: list[str]


@dataclass
class Trainer:
    """A training under way, on one rank; all ranks call the same methods in the same order.

    Attributes:
        step: Optimizer steps taken.
        position: Samples seen, and passed over; a multiple of the global batch size.
        saved_step: Step of the last checkpoint; -1 if there is none.
        skips: What was passed over, and why.
        tombstones: From which positions on which rows were in no batch: position, and digest.
    """

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
    tracker_names: Sequence[str]
    step: int = 0
    position: int = 0
    saved_step: int = -1
    skips: Skips = field(default_factory=Skips)
    tombstones: tuple[tuple[int, str], ...] = ()
    progress: Progress = field(init=False)
    metrics: MetricsLog = field(init=False)
    checkpoints: Checkpoints = field(init=False)

    def __post_init__(self) -> None:
        train = self.run.train
        self.alphas_cumprod = alphas_cumprod_of(train.schedule).to(self.world.device)
        self.tally: Tensor | None = None  # since the last line that told it; starts anew at every checkpoint
        self.loss: float | None = None
        self.loss_scale = LossScale() if train.precision == "fp16" else None
        self.optimizer = optimizer_of(self.engine)
        self.rollbacks = Rollbacks()
        self.watch = WeightsWatch(self.unet, train)
        self.watchdog = Watchdog(train.stall_timeout_s)
        peak = self._peak_images_per_s() if self.world.is_first else None
        self.progress = Progress(train.num_steps, train.global_batch_size, peak)
        config = train.model_dump(mode="json")
        trackers = Trackers(self.tracker_names, self.run.run_id, self.workdir / "trackers", config)
        self.metrics = MetricsLog(self.workdir, self.store, self.run.run_id, trackers)
        retention = Retention(train.keep_last, train.keep_every_steps, train.keep_best, train.keep_best_metric)
        self.checkpoints = Checkpoints(self.store, self.run.run_id, self.workdir / "scratch", retention)

    def _peak_images_per_s(self) -> float | None:
        specs = self.dataset.specs
        return peak_images_per_s(
            self.unet,
            specs.latents.latent_px,
            specs.text.embeddings_shape,
            device=self.world.device,
            precision=self.run.train.precision,
            num_devices=self.world.size,
        )

    # ----------------------------------------------------------------------------------------------------- the course

    def resume(self) -> None:
        """Goes on from the newest checkpoint that is whole, if there is any."""
        state = self._load_newest()
        if state is not None:
            self.position, self.skips, self.tombstones = state.position, state.skips, state.tombstones
        if self.world.is_first:
            self.metrics.start(self.step, self.position)
        self._note_tombstones()
        if self.world.is_first:
            emit(
                {
                    "event": "resumed" if self.step else "started",
                    "step": self.step,
                    "num_steps": self.run.train.num_steps,
                }
            )

    def _note_tombstones(self) -> None:
        """Says from where on the tombstones of this start are in force, if those of before were others."""
        found = self.dataset.tombstones
        before = self.tombstones[-1][1] if self.tombstones else ""
        if found.digest == before:
            return
        self.tombstones = (
            *(entry for entry in self.tombstones if entry[0] < self.position),
            (self.position, found.digest),
        )
        LOGGER.info("%d tombstones are in force from position %d on: %s", len(found), self.position, found.digest[:16])
        if self.world.is_first:
            told = {"digest": found.digest, "num": len(found)}
            self.metrics.note(step=self.step + 1, position=self.position, tombstones=told)

    def run_to_end(self, stop: Stop) -> dict[str, Any] | None:
        """Takes the steps that are left; see `run_training`."""
        while self.step < self.run.train.num_steps:
            with self._batches_from_here() as batches, self.watchdog:
                problem = self._take_steps(batches, stop)
            if problem is not None:
                self._roll_back(problem)
        self.checkpoints.wait()
        self._tell_committed()
        if not self.world.is_first:
            return None
        self.metrics.put()
        prefix = checkpoint_prefix(self.run.run_id, self.step)
        return {"checkpoint_prefix": prefix, "step": self.step, "loss": self.loss}

    def _take_steps(self, batches: Batches, stop: Stop) -> _Problem | None:
        """Takes a step a batch, until the batches end, or there is a reason to go back.

        Some of the batches may have been passed over: then the last step is not taken yet.
        """
        for batch in batches:
            step = self.step
            is_stopping, problem = self._take_step(batch, stop)
            self.watchdog.note()
            if problem is None and ((self.step > step and self._is_checkpoint_due()) or is_stopping):
                with self.watchdog.paused():
                    problem = self._save()
            if problem is not None:
                return problem
            self._tell_committed()
            stop.note_step(self.checkpoints.longest_save_s)
            if is_stopping and self.step < self.run.train.num_steps:
                with self.watchdog.paused():
                    self._end_early(stop)
        return None

    def _batches_from_here(self) -> Batches:
        train = self.run.train
        return self.dataset.batches(
            seed=train.seed,
            global_batch_size=train.global_batch_size,
            start_step=self.position // train.global_batch_size,
            num_steps=train.num_steps - self.step,
            rank=self.world.rank,
            world_size=self.world.size,
            pin_memory=self.world.device.type == "cuda",
        )

    def _save(self) -> _Problem | None:
        """Saves the state, unless it is not finite: then says what is not."""
        if self.step == self.saved_step:
            return None
        kind = self._find_state_problem()
        if kind is not None:
            LOGGER.error("%s not finite; nothing is saved", subject(kind, self.step))
            return _Problem(kind, [])
        # The metrics before the commit: what a resumed run does not want it cuts off.
        metrics = self.metrics.objects() if self.world.is_first else {}
        self.checkpoints.save(self.engine, self.unet, self.ema, self._state(), metrics)
        self.saved_step = self.step
        self.rollbacks.forget()
        self.progress.skip_pause()
        return None

    def _find_state_problem(self) -> Kind | None:
        own = [not all_finite(list(self.unet.parameters())), self.ema is not None and not self.ema.is_finite()]
        flags = torch.tensor(own, dtype=torch.float32, device=self.world.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        kinds: tuple[Kind, Kind] = ("parameters", "average")
        return next((kind for kind, flag in zip(kinds, flags.tolist(), strict=True) if flag), None)

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
            position=self.position,
            ema_num_updates=0 if self.ema is None else self.ema.num_updates,
            world_size=self.world.size,
            run_digest=self.digest,
            dataset_digest=self.dataset.digest,
            skips=self.skips,
            loss_scale=None if self.loss_scale is None else (self.loss_scale.value, self.loss_scale.num_good_steps),
            tombstones=self.tombstones,
            config=self.run.train.model_dump(mode="json"),
        )

    # ------------------------------------------------------------------------------------------------------ going back

    def _load_newest(self) -> TrainingState | None:
        """Makes everything that is trained as it is in the newest whole checkpoint, if there is one."""
        is_first_here = self.world.local_rank == 0
        folder = self.checkpoints.fetch_everywhere(is_first_here)
        if folder is None:
            return None
        state = load_state(folder, self.engine, self.unet, self.ema, self._state())
        self.step = self.saved_step = state.step
        if self.loss_scale is not None and state.loss_scale is not None:
            self.loss_scale = LossScale(*state.loss_scale)
        self.watch.start_over()
        dist.barrier()  # all ranks have read it
        if is_first_here:
            self.checkpoints.forget_fetched()
        return state

    def _roll_back(self, problem: _Problem) -> None:
        """Goes back to the last committed checkpoint, and on behind the samples that were bad.

        Where the samples have nothing to do with it, all since that checkpoint are seen again.
        """
        self.checkpoints.wait()
        self._tell_committed()
        failed_at, end = self.step, self.position
        self.rollbacks.check(problem.kind, failed_at, max(self.saved_step, 0), problem.uids)
        state = self._load_newest()
        if state is None:
            self._start_over()
        first = 0 if state is None else state.position
        self.position = end if problem.kind in ("loss", "gradient") else first
        positions = () if state is None else state.skips.positions
        self.skips = self.skips.model_copy(update={"positions": positions}).with_rollback(first, self.position)
        self.tally = None
        LOGGER.error(
            "ROLLED BACK: %s not finite; the run goes on from step %d, and %d samples since then are not seen again",
            subject(problem.kind, failed_at),
            self.step,
            self.position - first,
        )
        if self.world.is_first:
            told = {"from_step": failed_at, "reason": problem.kind, "num_samples": self.position - first}
            self.metrics.go_back(self.step, self.position)
            self.metrics.note(step=self.step + 1, position=self.position - 1, rolled_back=told)
            emit({"event": "rolled_back", "step": self.step, **told})
        self.progress.skip_pause()

    def _start_over(self) -> None:
        """Makes everything that is trained as it was before the first step: there is no checkpoint."""
        torch.manual_seed(self.run.train.seed)  # as at the start; a new layer draws its weights
        base = _load_base(self.run)
        optimizer = OptimizerState(self.engine, self.unet)
        optimizer.load_parameters({name: value.detach() for name, value in base.named_parameters()})
        optimizer.load_moments({}, 0)
        if self.ema is not None:
            fresh = start_average(self.unet, self.run.train.ema_decay, self.run.model.directory / "unet_ema")
            self.ema.load_state_dict(fresh.state_dict(), fresh.num_updates)
        if self.loss_scale is not None:
            self.loss_scale = LossScale()
        self.step, self.saved_step = 0, -1
        self.watch.start_over()

    # ------------------------------------------------------------------------------------------------------- one step

    def _take_step(self, batch: Batch, stop: Stop) -> tuple[bool, _Problem | None]:
        """Tries one optimizer step; one whose numbers are not finite changes nothing but the position.

        Returns:
            Whether any rank was told to stop, and the reason to go back, if there is one.
        """
        train = self.run.train
        results, agreed = self._attempt(batch, stop)
        learning_rate = learning_rate_at(train, self.step)
        kind = agreed.problem
        if kind is None:
            kind = self._update(learning_rate)
        else:
            self._drop_gradient()
        self.position += train.global_batch_size
        if kind is not None:
            return agreed.is_stopping, self._pass_over(kind, results, batch.uids)
        self.skips = self.skips.with_good_step()
        self.loss = agreed.loss
        self.step += 1
        self._average()
        standstill = self.watch.note(self.step, learning_rate)
        if standstill is not None:
            with self.watchdog.paused():
                self.checkpoints.wait()  # a rank that ends takes the others along, and the upload with them
            raise GateError(standstill)
        if self.world.is_first:
            self.tally = agreed.tally if self.tally is None else self.tally + agreed.tally
            speed = self.progress.note(self.step, agreed.loss)
            line = {"learning_rate": learning_rate, "grad_norm": agreed.grad_norm, **speed}
            if self.loss_scale is not None:
                line["loss_scale"] = self.loss_scale.value
            self.metrics.append(step=self.step, loss=agreed.loss, **line, **self._told_tally(agreed.is_stopping))
        return agreed.is_stopping, None

    def _attempt(self, batch: Batch, stop: Stop) -> tuple[list[StepLoss], _Agreed]:
        """Makes the gradient of a batch; in fp16 again and again with a lower scale, if it is the scale's fault."""
        before = None if self.loss_scale is None else self.loss_scale.value
        results = self._forward_backward(batch)
        agreed = self._agree(results, stop)
        while agreed.problem == "gradient" and self.loss_scale is not None and self.loss_scale.lower():
            self._drop_gradient()
            results = self._forward_backward(batch)
            agreed = self._agree(results, stop)
        if self.loss_scale is not None and before is not None:
            if agreed.problem is None:
                self.loss_scale.note_good()
            else:
                self.loss_scale.value = before
        return results, agreed

    def _update(self, learning_rate: float) -> Kind | None:
        """Lets the optimizer take its step; says so if DeepSpeed does not."""
        num_calls = self.optimizer.num_calls
        set_learning_rate(self.engine, learning_rate)
        self.engine.step()
        return None if self.optimizer.num_calls > num_calls else "gradient"

    def _drop_gradient(self) -> None:
        """Ends a step that is not taken: parameters and the optimizer's state stay as they are, bit by bit."""
        with self.optimizer.closed():
            self.engine.step()

    def _average(self) -> None:
        if self.ema is None:
            return
        if self.step <= self.run.train.ema_start_step:
            self.ema.start_over(self.unet)
        else:
            self.ema.update(self.unet)

    def _pass_over(self, kind: Kind, results: Sequence[StepLoss], uids: tuple[str, ...]) -> _Problem | None:
        """Notes a bad step; says who was in it, and whether it is one too many."""
        losses = torch.cat([result.per_sample for result in results]).tolist()
        bad = self._everywhere([uid for uid, loss in zip(uids, losses, strict=True) if not math.isfinite(loss)])
        if not bad:  # it is the gradient, or the mean: any of them may be at fault
            bad = self._everywhere(list(uids))
        first = self.position - self.run.train.global_batch_size
        self.skips = self.skips.with_bad_step(first, self.position)
        LOGGER.warning("SKIPPED: %s not finite; %d samples: %s", subject(kind, self.step), len(bad), shown(bad))
        if self.world.is_first:
            self.metrics.note(step=self.step + 1, position=first, skipped=kind, uids=bad)
            told = {"reason": kind, "num_samples": len(bad), "uids": bad[:MAX_UIDS_TOLD]}
            emit({"event": "skipped", "step": self.step, **told, "num_skipped": self.skips.num_steps})
        self.progress.skip_pause()
        return _Problem(kind, bad) if self.skips.num_bad_in_a_row >= MAX_BAD_IN_A_ROW else None

    def _everywhere(self, uids: list[str]) -> list[str]:
        """What all ranks say, by rank."""
        parts: list[list[str]] = [[] for _ in range(self.world.size)]
        dist.all_gather_object(parts, uids)
        return [uid for part in parts for uid in part]

    def _is_checkpoint_due(self) -> bool:
        return self.step % self.run.train.checkpoint_every_steps == 0 or self.step == self.run.train.num_steps

    def _told_tally(self, is_stopping: bool) -> Mapping[str, Any]:
        """What is known of the loss's origin, every so many steps, and at a checkpoint: there is then none to save."""
        if self.step % _TALLY_EVERY_STEPS and not self._is_checkpoint_due() and not is_stopping:
            return {}
        assert self.tally is not None
        told, self.tally = self.tally, None
        return describe(told, len(self.alphas_cumprod))

    def _forward_backward(self, batch: Batch) -> list[StepLoss]:
        """Runs this rank's share of the global batch; returns its micro batches' losses."""
        train = self.run.train
        results = []
        for start in range(0, len(batch), train.micro_batch_size):
            result = self._loss_of(start, start + train.micro_batch_size, batch)
            self.engine.backward(result.loss if self.loss_scale is None else result.loss * self.loss_scale.value)
            results.append(result)
            if start + train.micro_batch_size < len(batch):
                self.engine.step()  # within accumulation: only counts
        return results

    def _loss_of(self, start: int, stop: int, batch: Any) -> StepLoss:
        train, latents = self.run.train, self.dataset.specs.latents
        part = batch.part(start, stop)
        draws = draw(
            part.uids,
            seed=train.seed,
            step=self.position // train.global_batch_size,
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
            channels_last=train.channels_last,
        )

    def _agree(self, results: Sequence[StepLoss], stop: Stop) -> _Agreed:
        """One small all-reduce: the mean loss and its origin, whether all is finite everywhere, whether to stop."""
        losses = torch.cat([result.per_sample for result in results])
        weights = torch.cat([result.weights for result in results])
        step_tally = tally(
            losses,
            torch.cat([result.timesteps for result in results]),
            torch.cat([result.is_full_mask for result in results]),
            len(self.alphas_cumprod),
        )
        means = torch.stack([result.loss.detach() for result in results])
        num_bad = (~losses.isfinite()).sum() + (~means.isfinite()).sum()
        total, grad_squares = (weights * losses).double().sum(), self._grad_squares()
        own = torch.stack([total, num_bad.double(), grad_squares, total.new_tensor(float(stop.is_set))])
        sums = torch.cat([own, step_tally.flatten()])
        dist.all_reduce(sums)
        total, num_bad, grad_squares, num_stopping = sums[: len(own)].tolist()
        return _Agreed(
            loss=total / self.run.train.global_batch_size,
            is_loss_finite=num_bad == 0,
            grad_norm=math.sqrt(grad_squares) if grad_squares >= 0 else math.nan,
            tally=sums[len(own) :].reshape(step_tally.shape),
            is_stopping=num_stopping > 0,
        )

    def _grad_squares(self) -> Tensor:
        """This rank's part of the squared norm of the averaged gradient, which here is freed of the loss's scale."""
        gradients = list(gradients_of(self.engine))
        if not gradients:
            return torch.zeros((), dtype=torch.float64, device=self.world.device)
        if self.loss_scale is not None:
            torch._foreach_mul_(gradients, 1 / self.loss_scale.value)  # pyright: ignore[reportPrivateImportUsage]  # one call for all
        norms = torch.stack(torch._foreach_norm(gradients))  # pyright: ignore[reportPrivateImportUsage]  # as torch's own clipping
        squares = norms.double().square().sum().to(self.world.device)
        return squares if shares_gradients(self.engine) else squares / self.world.size
