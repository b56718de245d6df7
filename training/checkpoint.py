"""Checkpoints: committed so that a half-written one is never believed, and believed only after every hash is checked.

Order of a save: all ranks put the state together in rank 0's scratch folder (`training.saved_state` says what is in it;
other machines' parts come through the process group: machines need nothing but the store in common)
→ training goes on, and a thread commits: sizes and sha256 → upload → ``MANIFEST.json`` by put-if-absent → the run's
channel ``newest`` by compare-and-swap → old ones are deleted. At most one is on its way; the next save waits for it.

```
runs/{run_id}/checkpoints/step-00000100/{unet/ ema/ optimizer/ generators.safetensors state.json MANIFEST.json}
runs/{run_id}/channels/newest.json      the proof that there are checkpoints, whatever a listing says
```
"""

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from infra.bundles import MANIFEST_NAME, commit_bundle, fetch_bundle, load_bundle, manifest_sha256, verify_bundle
from infra.channels import ChannelPointer, channel_key, move_channel, pointer_to, read_channel
from infra.child import emit
from infra.errors import ContractError, TransientError
from infra.storage import ObjectNotFoundError, ObjectStore, sha256_of_file
from training.checkpoint_upload import Uploader
from training.ema import Ema
from training.retention import Retention, delete_old, list_checkpoints
from training.runspec import checkpoint_prefix, run_prefix, step_of
from training.saved_state import TrainingState, read_state, save_state

LOGGER = logging.getLogger(__name__)

DAMAGED_NAME: Final = "DAMAGED.json"
"""What the manifest of a damaged checkpoint is renamed to, so that the step can be committed again."""

NEWEST: Final = "newest"
"""The run's own channel: moved after each commit."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        store: Where they are.
        run_id: The run.
        scratch: A local folder that the ranks on this machine share and nobody else uses. Other machines' may be the
            same one, or another.
        retention: Which are kept.
        uploader: Commits them.
        tell_every_s: How often ranks that wait for an upload hear that it goes on.
    """

    store: ObjectStore
    run_id: str
    scratch: Path
    retention: Retention = field(default_factory=Retention)
    uploader: Uploader = field(default_factory=Uploader)
    tell_every_s: float = 20.0

    # -------------------------------------------------------------------------------------------------------- saving

    def save(
        self,
        engine: Any,
        unet: UNet2DConditionModel,
        ema: Ema | None,
        state: TrainingState,
        before_commit: Mapping[str, bytes] | None = None,
    ) -> None:
        """Saves the state as it is now, and begins to commit it. All ranks call it.

        It returns when the state is in scratch: the training may go on. `take_committed` tells when it is committed.

        Args:
            engine: The DeepSpeed engine.
            unet: The module inside it; its parameters are whole on every rank.
            ema: On rank 0.
            state: Where the run is; rank 0's is written.
            before_commit: Objects, key → content, that are put before the manifest.

        Raises:
            TransientError: The save before this one could not be committed; on all ranks.
        """
        self.wait()
        folder = self.scratch / "checkpoint"
        if _is_first():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        save_state(folder, engine, unet, ema, state)
        dist.barrier()  # every rank has given its part; one that could not has raised, and the others are stopped
        if _is_first():
            objects = dict(before_commit or {})
            self.uploader.start(
                checkpoint_prefix(self.run_id, state.step), lambda: self._commit(folder, state, objects)
            )

    def wait(self) -> None:
        """Returns when nothing is on its way any more. All ranks call it.

        Rank 0 tells the others every few seconds that it still waits: an upload may take longer than the process group
        waits for anything, and a rank that died is noticed all the same.

        Raises:
            TransientError: What was on its way could not be committed; on all ranks. A `ValueError` where the store
                refuses it for good.
        """
        is_over = False
        while not is_over:
            error: BaseException | None = None
            problem: tuple[type[Exception], str] | None = None
            if _is_first():
                try:
                    # An event, so that the launcher does not take us for hung.
                    is_over = self.uploader.wait(
                        lambda prefix: emit({"event": "uploading", "prefix": prefix}), self.tell_every_s
                    )
                except BaseException as caught:  # raised below, once the others know
                    error, problem = caught, (_kind_of(caught), str(caught) or type(caught).__name__)
            said: list[Any] = [is_over, problem]
            dist.broadcast_object_list(said, src=0)
            is_over, problem = said
            if error is not None:
                raise error
            if problem is not None:
                kind, message = problem
                raise kind(f"rank 0 could not commit a checkpoint: {message}")

    def take_committed(self) -> list[str]:
        """Keys of the checkpoints that were committed since the last call, on rank 0. Does not wait."""
        return self.uploader.take_done()

    @property
    def longest_save_s(self) -> float:
        """How long the longest commit took, on rank 0; 0 as long as there was none."""
        return self.uploader.longest_s

    def _commit(self, folder: Path, state: TrainingState, objects: Mapping[str, bytes]) -> None:
        """In the uploader's thread, and again if the store failed: what is done already is not done twice."""
        for key, data in objects.items():
            self.store.put(key, data)
        prefix = checkpoint_prefix(self.run_id, state.step)
        commit_bundle(
            self.store,
            prefix,
            folder,
            kind="checkpoint",
            run_id=self.run_id,
            step=state.step,
            metadata={
                "run_digest": state.run_digest,
                "dataset_digest": state.dataset_digest,
                "config": state.config,
            },
        )
        self._point_to(prefix)
        shutil.rmtree(folder)
        self.rotate()

    def rotate(self) -> list[str]:
        """Deletes old checkpoints, as `training.retention` says. What cannot be deleted now goes the next time.

        Returns:
            What was deleted.
        """
        try:
            return delete_old(self.store, self.run_id, self.retention)
        except (TransientError, ValueError) as error:  # ValueError: we may not delete there
            LOGGER.warning("old checkpoints of %s stay for now: %s", self.run_id, error)
            return []

    def _point_to(self, prefix: str) -> None:
        pointer = pointer_to(self.store, NEWEST, prefix)
        move_channel(self.store, NEWEST, pointer, lambda _: True, parent=run_prefix(self.run_id))

    # ------------------------------------------------------------------------------------------------------- loading

    def fetch_newest(self) -> Path | None:
        """Brings the newest checkpoint that is whole to the scratch folder, with every sha256 verified.

        A damaged one is passed over, loudly; and once an older one proved good it is marked, so that its step can be
        committed again.

        Returns:
            Its folder; None if the run has no checkpoint at all.

        Raises:
            ContractError: There are checkpoints, and all are damaged: starting over would silently throw work away.
            TransientError: The store cannot be read.
        """
        folder = self.scratch / "resume"
        try:
            return self._fetch_newest(folder)
        except TransientError as error:
            raise TransientError(
                f"run {self.run_id}: its checkpoints cannot be read, and it does not start over without them: {error}; "
                f"make {self.store.uri} readable, and say the same command again"
            ) from error

    def fetch_everywhere(self, is_first_here: bool) -> Path | None:
        """`fetch_newest` on every machine: rank 0 chooses, the others bring the very same one. All ranks call it.

        Where scratch is shared between machines, what is there already is verified and used.

        Args:
            is_first_here: Whether this process fetches for its machine.

        Returns:
            The folder on this machine; None if the run has no checkpoint at all.

        Raises:
            ContractError: As `fetch_newest`; on all ranks.
            TransientError: As `fetch_newest`, or another machine cannot fetch it; on all ranks.
        """
        chosen: list[tuple[str, str] | None] = [None]
        with _raised_on_all():
            if _is_first() and (folder := self.fetch_newest()) is not None:
                manifest = sha256_of_file(folder / MANIFEST_NAME)
                chosen = [(checkpoint_prefix(self.run_id, read_state(folder).step), manifest)]
        dist.broadcast_object_list(chosen, src=0)
        if chosen[0] is None:
            return None
        folder = self.scratch / "resume"
        with _raised_on_all():
            if is_first_here and not _is_first():
                self._fetch_same(*chosen[0], folder)
        return folder

    def _fetch_same(self, prefix: str, sha256: str, folder: Path) -> None:
        """Brings the checkpoint that rank 0 has verified."""
        try:
            fetch_bundle(self.store, prefix, folder)
        except (ContractError, ObjectNotFoundError) as error:
            raise TransientError(f"{error}, though rank 0 has just read it; say the same command again") from error
        found = sha256_of_file(folder / MANIFEST_NAME)
        if found != sha256:
            raise TransientError(
                f"{self.store.uri_of(prefix)}: its manifest has sha256 {found} here, {sha256} on rank 0's machine; "
                "say the same command again"
            )

    def forget_fetched(self) -> None:
        """Deletes this machine's copy, once all of its ranks have read it."""
        shutil.rmtree(self.scratch / "resume", ignore_errors=True)

    def _fetch_newest(self, folder: Path) -> Path | None:
        pointer = self._read_pointer()
        damaged: dict[str, str] = {}
        for prefix in self._candidates(pointer):
            shutil.rmtree(folder, ignore_errors=True)
            problem = self._fetch(prefix, folder, pointer)
            if problem is None:
                for bad in damaged:
                    self._mark_damaged(bad)
                self._point_to(prefix)
                if damaged:
                    LOGGER.error("FELL BACK to the checkpoint of step %d, which is whole", step_of(prefix))
                return folder
            LOGGER.error("CHECKPOINT DAMAGED, falling back to the one before: %s", problem)
            damaged[prefix] = problem
        if damaged:
            raise ContractError(
                f"run {self.run_id}: none of its {len(damaged)} checkpoints is whole ({next(iter(damaged.values()))}); "
                f"restore one, or delete {self.store.uri_of(run_prefix(self.run_id))} to start over from step 0"
            )
        return None

    def _candidates(self, pointer: ChannelPointer | None) -> list[str]:
        """Prefixes to try, newest first: those with a manifest, and the one that the pointer proves was committed."""
        names = list_checkpoints(self.store, self.run_id)
        complete = {prefix for prefix, files in names.items() if MANIFEST_NAME in files}
        marked = {prefix for prefix, files in names.items() if DAMAGED_NAME in files}
        if pointer is not None and pointer.bundle not in marked:
            complete.add(pointer.bundle)
        for prefix in sorted(names.keys() - complete):
            LOGGER.warning(
                "%s is no checkpoint and is not used: %s",
                self.store.uri_of(prefix),
                "it was found damaged before" if prefix in marked else "it has no MANIFEST.json; its save was cut off",
            )
        return sorted(complete, reverse=True)

    def _read_pointer(self) -> ChannelPointer | None:
        parent = run_prefix(self.run_id)
        try:
            return read_channel(self.store, NEWEST, parent=parent)
        except ContractError as error:
            # It proves nothing any more, and is written anew: the checkpoints themselves are still checked.
            LOGGER.error("CHECKPOINT POINTER DAMAGED, looking at all checkpoints: %s", error)
            self.store.delete(channel_key(NEWEST, parent))
            return None

    def _fetch(self, prefix: str, folder: Path, pointer: ChannelPointer | None) -> str | None:
        """Fetches one checkpoint; returns what is wrong with it, if anything is."""
        manifest_uri = self.store.uri_of(f"{prefix}/{MANIFEST_NAME}")
        try:
            manifest = load_bundle(self.store, prefix)
            found = (manifest.kind, manifest.run_id, manifest.step)
            if found != ("checkpoint", self.run_id, step_of(prefix)):
                return f"{manifest_uri}: is that of {found[0]} {found[1]} step {found[2]}"
            sha256 = manifest_sha256(self.store, prefix)
            if pointer is not None and pointer.bundle == prefix and pointer.manifest_sha256 != sha256:
                return f"{manifest_uri}: has sha256 {sha256}, the run's newest.json says {pointer.manifest_sha256}"
            fetch_bundle(self.store, prefix, folder)
        except ContractError as error:
            return str(error)
        except (TransientError, ObjectNotFoundError) as error:
            # A damaged object, or a store that had a bad moment? Only the first is a reason to go back in time.
            try:
                problems = verify_bundle(self.store, prefix)
            except ObjectNotFoundError:
                return f"{manifest_uri}: is missing, though {prefix} was committed"
            if not problems:
                raise TransientError(str(error)) from error
            return problems[0]
        step = read_state(folder).step
        return None if step == step_of(prefix) else f"{self.store.uri_of(prefix)}/state.json: is that of step {step}"

    def _mark_damaged(self, prefix: str) -> None:
        manifest_key = f"{prefix}/{MANIFEST_NAME}"
        with contextlib.suppress(ObjectNotFoundError):
            self.store.put(f"{prefix}/{DAMAGED_NAME}", self.store.read(manifest_key))
            self.store.delete(manifest_key)


@contextlib.contextmanager
def _raised_on_all() -> Iterator[None]:
    """What is raised within, on any rank, is raised on all ranks; on the others as an error of the same kind."""
    error: BaseException | None = None
    try:
        yield
    except (ValueError, TransientError, OSError) as caught:
        error = caught
    said: list[tuple[type[Exception], str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, None if error is None else (_kind_of(error), str(error)))
    if error is not None:
        raise error
    for rank, problem in enumerate(said):
        if problem is not None:
            kind, message = problem
            raise kind(f"rank {rank}: {message}")


def _kind_of(error: BaseException) -> type[Exception]:
    """As what another rank raises it: the exit code must not depend on who is heard first."""
    return next((kind for kind in (ContractError, ValueError) if isinstance(error, kind)), TransientError)


def _is_first() -> bool:
    return dist.get_rank() == 0
