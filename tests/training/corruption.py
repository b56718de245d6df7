"""A campaign of damage: one file of a small dataset is changed in one way, and whoever reads it must never see it.

The store is a folder, or a folder that does not let itself be read in place, as S3 does not: then files come through
the cache. What is handed out is compared, byte by byte, with what the undamaged dataset gives.
"""

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from typing_extensions import override

from infra.errors import ContractError
from infra.storage import ObjectStore
from infra.storage_folder import FolderStore
from preprocessing.contracts.manifest import MANIFEST_NAME
from training.batch import Batch
from training.data import TrainingDataset, open_dataset

BATCH_SIZE = 8
SEED = 5
Mutation = Callable[[np.random.Generator, "Scene", Path], None]


class DistantStore(FolderStore):
    """A folder that says that it is none: all reading goes through the store's own methods."""

    @override
    def local_path(self, key: str) -> Path | None:
        super().local_path(key)
        return None


@dataclass
class Scene:
    """A dataset that can be damaged and mended.

    Attributes:
        root: The store's folder, with the dataset at `prefix`.
        prefix: Key of its folder.
        spares: Files of other datasets, with the same names and schema: a stale manifest, foreign shards.
        pristine: A copy of the dataset's folder.
    """

    root: Path
    prefix: str
    spares: Path
    pristine: Path
    steps: int = 0
    truth: list[list[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        dataset = open_dataset(FolderStore(self.root), self.prefix, self.root.parent / "truth")
        self.steps = -(-len(dataset) // BATCH_SIZE)
        self.truth = [_bytes_of(batch_at(dataset, step)) for step in range(self.steps)]

    @property
    def folder(self) -> Path:
        return self.root / self.prefix

    @property
    def shards(self) -> list[Path]:
        return sorted(self.folder.glob("train-*.parquet"))

    def mend(self) -> None:
        """Makes the dataset what it was."""
        for path in self.pristine.rglob("*"):
            if path.is_file():
                target = self.folder / path.relative_to(self.pristine)
                if not target.is_file() or target.read_bytes() != path.read_bytes():
                    target.unlink(missing_ok=True)
                    shutil.copyfile(path, target)


def batch_at(dataset: TrainingDataset, step: int) -> Batch:
    return dataset.batch_at(step, seed=SEED, global_batch_size=BATCH_SIZE)


def _bytes_of(batch: Batch) -> list[bytes]:
    tensors = (batch.moments, batch.masked_moments, batch.mask, batch.text_embeddings)
    return ["".join(batch.uids).encode(), *(t.view(torch.uint8).numpy().tobytes() for t in tensors if t is not None)]


# ----------------------------------------------------------------------------------------------------------- mutations


def _overwrite(path: Path, content: bytes | bytearray) -> None:
    os.chmod(path, 0o644)
    path.write_bytes(content)


def flip_bits(rng: np.random.Generator, scene: Scene, path: Path) -> None:
    content = bytearray(path.read_bytes())
    for offset in rng.choice(len(content), size=int(rng.integers(1, 4)), replace=False).tolist():
        content[offset] ^= 1 << int(rng.integers(8))
    _overwrite(path, content)


def truncate(rng: np.random.Generator, scene: Scene, path: Path) -> None:
    content = path.read_bytes()
    _overwrite(path, content[: int(rng.integers(len(content)))])


def extend(rng: np.random.Generator, scene: Scene, path: Path) -> None:
    content = path.read_bytes()
    tail = content[-8:] if rng.integers(2) else rng.bytes(int(rng.integers(1, 5000)))
    _overwrite(path, content + tail)


def zero_page(rng: np.random.Generator, scene: Scene, path: Path) -> None:
    content = bytearray(path.read_bytes())
    pages = [at for at in range(0, len(content), 4096) if any(content[at : at + 4096])]
    at = int(rng.choice(pages))
    content[at : at + 4096] = bytes(len(content[at : at + 4096]))
    _overwrite(path, content)


def swap_shards(rng: np.random.Generator, scene: Scene, path: Path) -> None:
    other = path.with_name("train-00001.parquet" if path.name == "train-00000.parquet" else "train-00000.parquet")
    ours, theirs = path.read_bytes(), other.read_bytes()
    _overwrite(path, theirs)
    _overwrite(other, ours)


def foreign_parquet(rng: np.random.Generator, scene: Scene, path: Path) -> None:
    if rng.integers(2):
        _overwrite(path, (scene.spares / path.name).read_bytes())  # same schema, other rows
    else:
        pq.write_table(pa.table({"uid": [f"{i:032x}" for i in range(int(rng.integers(1, 30)))]}), path)


def stale_manifest(rng: np.random.Generator, scene: Scene, path: Path) -> None:
    stale = (scene.spares / MANIFEST_NAME).read_bytes()
    if rng.integers(2):  # of this dataset, as it was made another time
        digest, other = (_digest_in(folder / MANIFEST_NAME) for folder in (scene.pristine, scene.spares))
        stale = stale.replace(other, digest)
    _overwrite(scene.folder / MANIFEST_NAME, stale)


def remove(rng: np.random.Generator, scene: Scene, path: Path) -> None:
    path.unlink()


def _digest_in(manifest: Path) -> bytes:
    return manifest.read_bytes().split(b'"digest": "')[1][:64]


OF_A_FILE: Sequence[Mutation] = (flip_bits, flip_bits, truncate, extend, zero_page, foreign_parquet, remove)
OF_A_STORE: Sequence[Mutation] = (*OF_A_FILE, swap_shards, stale_manifest)


# -------------------------------------------------------------------------------------------------------------- trials


def read_all(scene: Scene, open_it: Callable[[], TrainingDataset]) -> str:
    """Reads an epoch, from start to end.

    Returns:
        What stopped it; empty where nothing did, and then all was right.

    Raises:
        AssertionError: Something else than the undamaged dataset's rows was handed out.
    """
    try:
        dataset = open_it()
    except ContractError as error:
        return str(error)
    found = ""
    for _ in range(2):  # a loader that was stopped, and goes on all the same
        for step in range(scene.steps):
            try:
                batch = batch_at(dataset, step)
            except ContractError as error:
                found = str(error)
                continue
            assert _bytes_of(batch) == scene.truth[step], f"step {step}: what was handed out is not the dataset's"
    return found


def damage_at_rest(scene: Scene, scratch: Path, rng: np.random.Generator) -> str:
    """A local folder is damaged, then read: refused, and refused again by a second start; whole again when mended."""
    mutation = OF_A_STORE[int(rng.integers(len(OF_A_STORE)))]
    mutation(rng, scene, scene.shards[int(rng.integers(2))])
    cache = scratch / "cache"
    for _ in range(2):
        found = read_all(scene, lambda: open_dataset(FolderStore(scene.root), scene.prefix, cache))
        assert found, f"{mutation.__name__}: not noticed"
    scene.mend()
    return mutation.__name__


def damage_in_the_store(scene: Scene, scratch: Path, rng: np.random.Generator) -> str:
    """The distant store's own file is damaged: refused, again and again; nothing of it ever enters the cache."""
    mutation = OF_A_STORE[int(rng.integers(len(OF_A_STORE)))]
    mutation(rng, scene, scene.shards[int(rng.integers(2))])
    cache = scratch / "cache"
    for _ in range(2):
        found = read_all(scene, lambda: open_distant(scene, cache))
        assert found, f"{mutation.__name__}: not noticed"
    scene.mend()
    assert not read_all(scene, lambda: open_distant(scene, cache)), "the good copy is not used"
    return mutation.__name__


def damage_in_the_cache(scene: Scene, scratch: Path, rng: np.random.Generator) -> str:
    """A cached file is damaged between two starts: put aside, fetched again, and all that is handed out is right."""
    cache = scratch / "cache"
    assert not read_all(scene, lambda: open_distant(scene, cache))
    cached = sorted((cache / "shards").glob("*.parquet"))
    path = cached[int(rng.integers(len(cached)))]
    mutation = OF_A_FILE[int(rng.integers(len(OF_A_FILE) - 2))]
    mutation(rng, scene, path)
    assert not read_all(scene, lambda: open_distant(scene, cache)), "the store's good copy is not used"
    assert list((cache / "quarantine").iterdir()), f"{mutation.__name__}: not noticed"
    return mutation.__name__


def damage_under_a_reader(scene: Scene, scratch: Path, rng: np.random.Generator) -> str:
    """A local file is written to, or replaced, while it is mapped: the next batch of it is refused."""
    cache = scratch / "cache"
    dataset = open_dataset(FolderStore(scene.root), scene.prefix, cache)
    for step in range(scene.steps):
        batch_at(dataset, step)
    path = scene.shards[int(rng.integers(2))]
    in_place = bool(rng.integers(2))
    if in_place:
        _wait_for_the_clock(path, scratch)
        content = path.read_bytes()
        os.chmod(path, 0o644)
        with path.open("r+b") as file:
            at = int(rng.integers(len(content)))
            file.seek(at)
            file.write(bytes([content[at] ^ (1 << int(rng.integers(8)))]))
    else:
        other = scratch / "other"
        other.write_bytes(rng.bytes(path.stat().st_size))
        os.replace(other, path)
    assert "damaged" in read_all(scene, lambda: dataset), "not noticed"
    scene.mend()
    return f"under a reader, {'in place' if in_place else 'replaced'}"


def _wait_for_the_clock(path: Path, scratch: Path) -> None:
    """Until the file system would give a change of the file another time than its last one: some ms at most."""
    probe = scratch / "probe"
    while True:
        probe.write_bytes(b"")
        if probe.stat().st_ctime_ns > path.stat().st_ctime_ns:
            return


def open_distant(scene: Scene, cache: Path) -> TrainingDataset:
    return open_dataset(DistantStore(scene.root), scene.prefix, cache, cache_bytes=10**9)


TRIALS = (damage_at_rest, damage_in_the_store, damage_in_the_cache, damage_under_a_reader)


def run_campaign(scene: Scene, scratch: Path, num_trials: int, seed: int) -> Counter[str]:
    """Runs trials of all kinds in turn; an assertion names the first that failed, and its number."""
    done: Counter[str] = Counter()
    for number in range(num_trials):
        trial = TRIALS[number % len(TRIALS)]
        with _fresh(scratch / f"{number}") as folder:
            try:
                done[f"{trial.__name__}: {trial(scene, folder, np.random.default_rng((seed, number)))}"] += 1
            except AssertionError as error:
                raise AssertionError(f"trial {number} of seed {seed}, {trial.__name__}: {error}") from error
    return done


@contextlib.contextmanager
def _fresh(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def make_scene(folder: Path, store: ObjectStore, prefix: str, spare_prefix: str) -> Scene:
    """A scene of two datasets that `store`, a folder, holds: one to be damaged, one to take foreign files from."""
    root = Path(store.uri)
    shutil.copytree(root / prefix, folder / "pristine")
    shutil.copytree(root / spare_prefix, folder / "spares")
    return Scene(root, prefix, folder / "spares", folder / "pristine")
