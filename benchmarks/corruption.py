"""Damaged datasets: what a training is served by ours, and by MDS with and without its hashes, under the same damage.

The same 16 rows of 282.5 KiB stand in two shards, as a committed dataset of ours and as MDS (with sha1 of each shard in
its index). One file, or the list of files, is damaged in one way; then the dataset is read twice, from start to end or
to the first error, each time by a loader that starts anew, as a restarted training does. What comes out is compared
with what went in.

Where the damage is:

* ``local``: the dataset is read where it lies;
* ``store``: it is read through a cache, and the store's copy is damaged before anything is cached;
* ``cache``: the cached copy is damaged after an epoch that went well; the store's copy is whole.

What may come of it: ``refused`` (an error before anything wrong is handed out), ``right`` (all rows, all right: the
damage was mended or touched nothing that is read), ``wrong`` (a row that never went in was handed out), ``short`` (the
epoch ends early, without an error), ``hang`` (no answer for 30 s), ``crash`` (the process died).

    python benchmarks/corruption.py [--trials N] [--seed N] [--quick] [--json]

The bytes are damaged by the functions of ``tests/training/corruption.py``; that campaign (`make soak`) is the larger
one.
"""

import argparse
import contextlib
import json
import os
import platform
import selectors
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

from benchmarks.loader_formats import ROW_BYTES, SHAPES, make_row, row_checksum, write_mds  # noqa: E402 - see above

NUM_ROWS, ROWS_PER_SHARD = 16, 8
BATCH_SIZE = 4
OTHER_ROWS = 1000  # where the rows of the other dataset begin, from which stale lists and foreign files come
HASH = "sha1"
HANG_S = 30.0
SCENARIOS = ("local", "store", "cache")
SYSTEMS = ("ours", "mds", "mds_hash")
OUTCOMES = ("refused", "right", "wrong", "short", "hang", "crash")

Read = Callable[[dict[str, Any]], Iterator[tuple[int, int]]]


# ------------------------------------------------------------------------------------------------------------ children


def read_ours(request: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Number and checksum of each row that the trainer's loader hands out."""
    from benchmarks.loader_ours import PREFIX
    from infra.storage_folder import FolderStore
    from tests.training.corruption import DistantStore
    from training.data import open_dataset

    store = DistantStore(Path(request["remote"])) if request["remote"] else FolderStore(Path(request["local"]))
    cache = Path(request["local"]) if request["remote"] else Path(request["scratch"])
    dataset = open_dataset(store, PREFIX, cache, cache_bytes=1 << 30 if request["remote"] else None)
    num_steps = -(-len(dataset) // BATCH_SIZE)
    with dataset.batches(seed=0, global_batch_size=BATCH_SIZE, num_steps=num_steps, num_workers=0) as batches:
        for batch in batches:
            for i, uid in enumerate(batch.uids):
                row = {name: getattr(batch, name)[i].numpy() for name in SHAPES}
                row["mask"] = np.packbits(row["mask"].astype(np.uint8).reshape(-1))
                yield int(uid, 16), row_checksum(row)


def read_mds(request: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """The same by MDS."""
    from streaming import StreamingDataset  # pyright: ignore[reportMissingImports]  # in the peers' environment
    from streaming.base.util import clean_stale_shared_memory  # pyright: ignore[reportMissingImports]  # as above

    clean_stale_shared_memory()
    dataset = StreamingDataset(
        local=request["local"],
        remote=request["remote"],
        validate_hash=HASH if request["hash"] else None,
        batch_size=BATCH_SIZE,
        num_canonical_nodes=1,
    )
    for sample in dataset:
        yield int(sample["uid"], 16), row_checksum({name: np.ascontiguousarray(sample[name]) for name in SHAPES})


def attempt(read: Read, request: dict[str, Any], truth: dict[int, int]) -> dict[str, str]:
    """Reads until the end, or until an error."""
    seen = set()
    try:
        for number, found in read(request):
            if truth.get(number) != found or number in seen:
                return {"outcome": "wrong", "why": f"row {number}"}
            seen.add(number)
    except Exception as error:  # whatever a loader raises, it has refused
        return {"outcome": "refused", "why": f"{type(error).__name__}: {error}"[:300]}
    if len(seen) < NUM_ROWS:
        return {"outcome": "short", "why": f"{len(seen)} rows of {NUM_ROWS}, and no error"}
    return {"outcome": "right", "why": ""}


def answer_requests(system: str) -> None:
    """A child: one line in, one line out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes elsewhere
    read = read_ours if system == "ours" else read_mds
    truth = {index: row_checksum(make_row(index)) for index in range(NUM_ROWS)}
    for line in sys.stdin:
        request = json.loads(line)
        if request["action"] == "write":
            folder, first = Path(request["folder"]), request["first"]
            write_mds(folder, NUM_ROWS, first, ROWS_PER_SHARD * (ROW_BYTES + 200), (HASH,))
            reply: dict[str, Any] = {"version": version("mosaicml-streaming")}
        else:
            reply = attempt(read, request, truth)
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


class Child:
    """A process that reads; started again where it died or hangs.

    Args:
        python: Its interpreter.
        system: ``ours`` or ``mds``.
        log: What it says.
    """

    def __init__(self, python: str, system: str, log: Path) -> None:
        self._command = [python, str(REPOSITORY / "benchmarks" / "corruption.py"), "--child", system]
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, Any], patience_s: float) -> dict[str, Any]:
        """Its answer."""
        if self._process is None:
            environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            with self._log.open("a") as log:
                self._process = subprocess.Popen(
                    self._command,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
            patience_s += 120  # imports
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            is_ready = bool(selector.select(patience_s))
        line = process.stdout.readline() if is_ready else ""
        if line:
            return json.loads(line)
        self.close()
        return {"outcome": "crash" if is_ready else "hang", "why": ""}

    def close(self) -> None:
        """Ends it."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


# -------------------------------------------------------------------------------------------------------------- damage


def damages() -> dict[str, Callable[[np.random.Generator, Path, Path, list[str], str], None]]:
    """Kinds of damage to a dataset: of `folder`, with another dataset, shards' names, and the name of their list."""
    from tests.training import corruption

    def of_one_shard(mutation: Callable[..., None]) -> Callable[..., None]:
        def damage(rng: np.random.Generator, folder: Path, other: Path, shards: list[str], index: str) -> None:
            mutation(rng, None, folder / shards[int(rng.integers(len(shards)))])

        return damage

    def swap(rng: np.random.Generator, folder: Path, other: Path, shards: list[str], index: str) -> None:
        first, second = (folder / name for name in shards)
        content = first.read_bytes()
        replace(first, second.read_bytes())
        replace(second, content)

    def foreign(rng: np.random.Generator, folder: Path, other: Path, shards: list[str], index: str) -> None:
        name = shards[int(rng.integers(len(shards)))]
        replace(folder / name, (other / name).read_bytes())

    def stale(rng: np.random.Generator, folder: Path, other: Path, shards: list[str], index: str) -> None:
        replace(folder / index, (other / index).read_bytes())

    return {
        "flipped bits": of_one_shard(corruption.flip_bits),
        "truncated": of_one_shard(corruption.truncate),
        "extended": of_one_shard(corruption.extend),
        "zeroed page": of_one_shard(corruption.zero_page),
        "missing": of_one_shard(corruption.remove),
        "swapped shards": swap,
        "foreign file": foreign,
        "stale list": stale,
    }


def replace(path: Path, content: bytes) -> None:
    """Writes a file that may be read-only."""
    path.unlink()
    path.write_bytes(content)


def copy(source: Path, target: Path) -> None:
    """A fresh copy of a folder."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


class Trials:
    """Everything that a trial needs.

    Args:
        folder: For all files.
        mds_python: The interpreter that has MDS.
    """

    def __init__(self, folder: Path, mds_python: str) -> None:
        from benchmarks.loader_ours import PREFIX, write

        self._folder, self._prefix = folder, PREFIX
        self._children = {
            "ours": Child(sys.executable, "ours", folder / "ours.log"),
            "mds": Child(mds_python, "mds", folder / "mds.log"),
        }
        self.versions: dict[str, str] = {"torch": version("torch"), "pyarrow": version("pyarrow")}
        for name, first in (("whole", 0), ("other", OTHER_ROWS)):
            write(folder / f"ours-{name}", NUM_ROWS, ROWS_PER_SHARD, first)
            (folder / f"mds-{name}").mkdir()
            request = {"action": "write", "folder": str(folder / f"mds-{name}"), "first": first}
            self.versions["mosaicml-streaming"] = self._children["mds"].ask(request, 120)["version"]

    def run(self, system: str, scenario: str, kind: str, rng: np.random.Generator) -> tuple[dict[str, str], ...]:
        """Damages and reads twice; what came of each."""
        is_ours = system == "ours"
        whole = self._folder / ("ours-whole" if is_ours else "mds-whole")
        other = self._folder / ("ours-other" if is_ours else "mds-other")
        store, cache, scratch = (self._folder / name for name in ("store", "cache", "scratch"))
        copy(whole, store)
        for folder in (cache, scratch):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        request = {
            "action": "read",
            "local": str(store if scenario == "local" else cache),
            "remote": None if scenario == "local" else str(store),
            "scratch": str(scratch),
            "hash": system == "mds_hash",
        }
        child = self._children["ours" if is_ours else "mds"]
        within = self._prefix if is_ours else "."
        suffix, index = ("train-*.parquet", "MANIFEST.json") if is_ours else ("*.mds", "index.json")
        shards = sorted(path.name for path in (store / within).glob(suffix))
        target, source, names = store / within, other / within, shards
        if scenario == "cache":
            first = child.ask(request, HANG_S)
            assert first["outcome"] == "right", first
            if is_ours:
                target, source, names = self._cached(cache, store / within, source, shards)
            else:
                target = cache
        damages()[kind](rng, target, source, names, index)
        return tuple(child.ask(request, HANG_S) for _ in range(2))

    def _cached(self, cache: Path, store: Path, other: Path, shards: list[str]) -> tuple[Path, Path, list[str]]:
        """Our cache's folder, foreign files under its names, and these."""
        from infra.storage import sha256_of_file

        folder, foreign = cache / "shards", self._folder / "scratch" / "foreign"
        foreign.mkdir()
        names = []
        for shard in shards:
            (path,) = folder.glob(f"*{sha256_of_file(store / shard)}*")
            names.append(path.name)
            shutil.copyfile(other / shard, foreign / path.name)
        return folder, foreign, names

    def close(self) -> None:
        """Ends the children."""
        for child in self._children.values():
            child.close()


def main() -> None:
    """Runs the trials and prints tables."""
    if sys.argv[1:2] == ["--child"]:
        answer_requests(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, help="of each kind of damage; default: 12; with --quick 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few trials: under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    from benchmarks.loader import MDS_PACKAGES
    from benchmarks.peers import peers_python

    num_trials = args.trials or (1 if args.quick else 12)
    found: dict[tuple[str, str], dict[str, list[Counter[str]]]] = {}
    whys: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="lacuna-bench-") as name, contextlib.ExitStack() as stack:
        trials = Trials(Path(name), peers_python("mds", MDS_PACKAGES))
        stack.callback(trials.close)
        for scenario in SCENARIOS:
            for kind in damages():
                if kind == "stale list" and scenario == "cache":
                    continue  # our list is not cached
                for number in range(num_trials):
                    for system in SYSTEMS:
                        rng = np.random.default_rng((args.seed, number, *kind.encode()))
                        for turn, outcome in enumerate(trials.run(system, scenario, kind, rng)):
                            counts = found.setdefault((scenario, kind), {s: [Counter(), Counter()] for s in SYSTEMS})
                            counts[system][turn][outcome["outcome"]] += 1
                            if outcome["outcome"] not in ("right", "wrong"):
                                whys.setdefault(f"{system}, {scenario}, {outcome['outcome']}", outcome["why"])
        versions = trials.versions
    show(found, num_trials)
    print("\nfor example:")
    for place, why in whys.items():
        print(f"  {place}: {why}")
    print("\n" + ", ".join(f"{package} {number}" for package, number in sorted(versions.items())))
    if args.json:
        print(json.dumps(summary(found, versions)))


def show(found: dict[tuple[str, str], dict[str, list[Counter[str]]]], num_trials: int) -> None:
    """One table for each place of the damage: first attempt / second attempt."""
    print(f"{num_trials} trials of each kind; outcomes of the first attempt / of the second")
    for scenario in SCENARIOS:
        print(f"\n{scenario:16}" + "".join(f"{system:34}" for system in SYSTEMS))
        for (where, kind), counts in found.items():
            if where == scenario:
                cells = [" / ".join(_cell(counter) for counter in counts[system]) for system in SYSTEMS]
                print(f"{kind:16}" + "".join(f"{cell:34}" for cell in cells))


def _cell(counter: Counter[str]) -> str:
    return ", ".join(f"{counter[outcome]} {outcome}" for outcome in OUTCOMES if counter[outcome])


def summary(found: dict[tuple[str, str], dict[str, list[Counter[str]]]], versions: dict[str, str]) -> dict[str, Any]:
    """What ``--json`` prints: how many of all attempts came to what, by system and place of the damage."""
    totals: dict[str, dict[str, dict[str, int]]] = {system: {} for system in SYSTEMS}
    for (scenario, _), counts in found.items():
        for system, turns in counts.items():
            for turn, counter in zip(("first", "second"), turns, strict=True):
                total = totals[system].setdefault(f"{scenario}_{turn}", dict.fromkeys(OUTCOMES, 0))
                for outcome, number in counter.items():
                    total[outcome] += number
    return {
        "name": "corruption",
        "unit": "attempts",
        "ours": totals["ours"],
        "peers": {system: totals[system] for system in SYSTEMS[1:]},
        "ratios": {},
        "versions": versions | {"python": platform.python_version()},
        "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
    }


if __name__ == "__main__":
    main()
