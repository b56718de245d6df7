"""Reading rows beside MDS, webdataset, litdata and HF `datasets`: the same ones, to collated tensors, in one run.

Rows of 512 px (282.5 KiB; ``loader_formats.py`` says how each format holds and reads them) are read in shuffled
order, in batches of 64. Ours, MDS and `datasets` shuffle globally; litdata shuffles chunks and within chunks,
webdataset shards and within a buffer of 512 samples: both cannot do more, and have the easier job. Each loader runs
in a child process, peers with two workers and with none, of which the better counts; ours with two threads and with
one, likewise.

``rows/s`` counts from the first batch of a later epoch to its last: neither imports nor opening nor the start of
workers count, and what workers have fetched ahead by then is for nothing, to the peers' advantage. ``first epoch`` is
the time from opening to the end of the first epoch, imports left out. ``memcpy`` copies the same Parquet files, page
cache to one reused buffer of a batch's size. All of a round takes turns; medians are over rounds. Before anything is
timed, each format's epoch is read once and its content compared with the rows that went in.

Scenarios: ``warm`` (files in the page cache), ``cold`` (dropped from it beforehand by posix_fadvise, which mincore
confirms; from opening to the end of the epoch), ``s3`` (from a SeaweedFS server on loopback into an empty cache; from
opening to the end of the epoch). Ratios are ours / peer, in throughput; ``…_cpu`` peer / ours in processor time a row,
which says more on a machine that does other work as well.

    python benchmarks/loader.py [--rows N] [--rounds N] [--scenarios warm cold s3] [--quick] [--json]

The peers run in virtual environments that this makes under ``var/``: MDS has one of its own.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import importlib
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

from benchmarks import loader_formats  # noqa: E402 - after the path is set
from benchmarks.loader_formats import FORMATS, ROW_BYTES, Place  # noqa: E402

BATCH_SIZE = 64
NUM_WORKERS = 2
TORCH = ("torch==2.13.0", "torchvision==0.28.0")
MDS_PACKAGES = ("mosaicml-streaming==0.13.0", *TORCH)
PEER_PACKAGES = ("webdataset==1.0.2", "litdata==0.2.76", "datasets==5.2.0", "boto3==1.44.5", *TORCH)
SCENARIOS = ("warm", "cold", "s3")
REMOTE = ("ours", "mds", "webdataset", "litdata")  # `datasets` copies Parquet into its cache before it reads a row
BUCKET = "bench"
CHILD_S = 900.0


# ------------------------------------------------------------------------------------------------------------ children


def local_place(folder: Path, name: str) -> Place:
    """A dataset in a folder, with the files that hold its rows."""
    suffix = {"webdataset": ".tar", "mds": ".mds", "litdata": ".bin"}.get(name, ".parquet")
    files = sorted(
        str(path.relative_to(folder)) for path in folder.rglob(f"*{suffix}") if not path.name.startswith("rejects")
    )
    return Place(folder, None, files)


def check(name: str, place: Place, num_rows: int) -> dict[str, Any]:
    """One epoch: how many rows it has, and whether what they hold is what went in."""
    batches = FORMATS[name].read(place, BATCH_SIZE, 0)()
    found = [(len(batch["moments"]), loader_formats.checksum(batch)) for batch in batches]
    seen = sum(rows for rows, _ in found)
    expected = sum(loader_formats.row_checksum(loader_formats.make_row(index)) for index in range(num_rows))
    total = sum(value for _, value in found)
    return {"rows": seen, "equal": total % (1 << 64) == expected % (1 << 64)}


def read(name: str, place: Place, num_workers: int, num_epochs: int) -> dict[str, Any]:
    """Opens a dataset and reads epochs: the first from the very beginning, the others between their batches."""
    opener = _opener(name)
    started = time.perf_counter()
    epoch = opener(place, BATCH_SIZE, num_workers)
    num_rows = sum(_num_rows(batch) for batch in epoch())
    result: dict[str, Any] = {"first_epoch_s": time.perf_counter() - started, "rows": num_rows}
    rates, processor_s = [], []
    for _ in range(num_epochs - 1):
        batches = epoch()
        next(batches)
        started, busy = time.perf_counter(), time.process_time()
        num_rows = sum(_num_rows(batch) for batch in batches)
        rates.append(num_rows / (time.perf_counter() - started))
        processor_s.append((time.process_time() - busy) / num_rows)
    if rates:
        result["rate"] = statistics.median(rates)
        if num_workers == 0 or name in ("ours", "memcpy"):  # else the work is done by other processes
            result["cpu_us"] = statistics.median(processor_s) * 1e6
    return result


def _opener(name: str) -> Callable[[Place, int, int], Callable[[], Iterator[Any]]]:
    if name == "memcpy":
        from benchmarks.loader_ours import copy_memory

        return copy_memory
    for module in FORMATS[name].modules:
        importlib.import_module(module)
    return FORMATS[name].read


def _num_rows(batch: Any) -> int:
    return batch if isinstance(batch, int) else len(batch["moments"])


def run_child(argv: list[str]) -> None:
    """Does one thing and prints what came of it."""
    action, name, *rest = argv
    if action == "write":
        folder, num_rows = Path(rest[0]), int(rest[1])
        FORMATS[name].write(folder, num_rows)
        result = check(name, local_place(folder, name), num_rows)
    else:
        place = json.loads(rest[0])
        place = Place(Path(place["folder"]), place["remote"], place["files"])
        numbers = [int(number) for number in rest[1:]]
        result = check(name, place, *numbers) if action == "check" else read(name, place, *numbers)
    packages = FORMATS["ours" if name == "memcpy" else name].packages
    result["versions"] = {package: version(package) for package in packages}
    sys.stdout.flush()
    print("\n" + json.dumps(result), flush=True)
    os._exit(0)  # some peers leave threads behind that would not end


# -------------------------------------------------------------------------------------------------------------- parent


class Bench:
    """The datasets in all formats, and children that read them.

    Args:
        folder: For everything that is written.
        num_rows: In each dataset.
    """

    def __init__(self, folder: Path, num_rows: int) -> None:
        from benchmarks.peers import peers_python

        self.folder, self.num_rows = folder, num_rows
        peers = peers_python("loader", PEER_PACKAGES)
        self._pythons = dict.fromkeys(("webdataset", "litdata", "datasets", "datasets_rows"), peers) | {
            "ours": sys.executable,
            "memcpy": sys.executable,
            "mds": peers_python("mds", MDS_PACKAGES),
        }
        self.versions: dict[str, str] = {}

    def child(self, action: str, name: str, *arguments: Any, environment: dict[str, str] | None = None) -> Any:
        """Runs an action in a process of its own."""
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        command = [self._pythons[name], str(REPOSITORY / "benchmarks" / "loader.py"), "--child", action, name]
        settings = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "HOME": str(home),
            "TMPDIR": str(home),
            "OMP_NUM_THREADS": str(NUM_WORKERS),
            "HF_HUB_OFFLINE": "1",
            **(environment or {}),
        }
        said = subprocess.run(
            [*command, *map(str, arguments)], env=settings, capture_output=True, check=False, timeout=CHILD_S
        )
        if said.returncode:
            raise SystemExit(f"{name}: {action} ended with {said.returncode}\n{said.stderr.decode()[-4000:]}")
        result = json.loads(said.stdout.splitlines()[-1])
        self.versions |= result.pop("versions")
        return result

    def write(self, names: list[str]) -> None:
        """Writes and checks all formats; each is in the page cache afterwards."""
        for name in names:
            if FORMATS[name].written_by == name:
                (self.folder / name).mkdir()
                found = self.child("write", name, self.folder / name, self.num_rows)
            else:
                found = self.child("check", name, self.place(name), self.num_rows)
            if not found["equal"] or found["rows"] != self.num_rows:
                raise SystemExit(f"{name}: {found['rows']} rows of {self.num_rows}, content equal: {found['equal']}")

    def place(self, name: str) -> str:
        """Where a format's dataset is, as JSON."""
        return json.dumps(dataclasses.asdict(self._place(name)), default=str)

    def _place(self, name: str) -> Place:
        return local_place(self.folder / ("ours" if name == "memcpy" else FORMATS[name].written_by), name)

    def remote_place(self, name: str, cache: Path) -> str:
        """The same, on the S3 server."""
        place = dataclasses.replace(self._place(name), folder=cache, remote=f"s3://{BUCKET}/{name}")
        return json.dumps(dataclasses.asdict(place), default=str)

    def files(self, name: str) -> list[Path]:
        """Everything that a reader of a format reads: `datasets` reads a cache of its own."""
        folder = self.folder / ("hf-cache" if name.startswith("datasets") else FORMATS[name].written_by)
        return [path for path in folder.rglob("*") if path.is_file()]


def drop_from_page_cache(paths: list[Path]) -> float:
    """Asks the kernel to forget files; returns which part of them it still holds."""
    held = total = 0
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            size = os.fstat(file.fileno()).st_size
            if size:
                resident = _resident_pages(file.fileno(), size)
                held, total = held + sum(resident), total + len(resident)
    return held / max(total, 1)


def _resident_pages(descriptor: int, size: int) -> bytes:
    """One byte a page: whether it is in memory (mincore)."""
    with mmap.mmap(descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        states = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        if ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), states):
            raise OSError(ctypes.get_errno(), "mincore")
        return bytes(state & 1 for state in states)


def measure_warm(bench: Bench, names: list[str], num_rounds: int, num_epochs: int, quick: bool) -> dict[str, Any]:
    """Rounds in which all take turns: rows/s by name and number of workers."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for _ in range(num_rounds):
        for name in (*names, "memcpy"):
            few = 1 if name in ("ours", "memcpy") else 0
            for num_workers in [few] if quick else [few, NUM_WORKERS]:
                result = bench.child("read", name, bench.place(name), num_workers, num_epochs)
                found.setdefault((name, num_workers), []).append(result)
    rates = {key: statistics.median(result["rate"] for result in results) for key, results in found.items()}
    firsts = {
        key: statistics.median(result["rows"] / result["first_epoch_s"] for result in results)
        for key, results in found.items()
    }
    cpu_us: dict[str, float] = {}
    for (name, _), results in found.items():
        busy = [result["cpu_us"] for result in results if "cpu_us" in result]
        if busy:
            cpu_us[name] = min(statistics.median(busy), cpu_us.get(name, float("inf")))
    return {
        "rates": _best(rates),
        "cpu_us": cpu_us,
        "first_epoch": _best(firsts),
        "all": {f"{name}, {num_workers}": rate for (name, num_workers), rate in rates.items()},
        "spread": {
            f"{name}, {num_workers}": [min(r["rate"] for r in results), max(r["rate"] for r in results)]
            for (name, num_workers), results in found.items()
        },
    }


def _best(rates: dict[tuple[str, int], float]) -> dict[str, float]:
    best: dict[str, float] = {}
    for (name, _), rate in rates.items():
        best[name] = max(best.get(name, 0), rate)
    return best


def measure_cold(bench: Bench, names: list[str], num_rounds: int) -> dict[str, Any]:
    """From opening to the end of an epoch, with nothing of the files in memory."""
    found: dict[str, list[float]] = {}
    still_held = 0.0
    for _ in range(num_rounds):
        for name in names:
            still_held = max(still_held, drop_from_page_cache(bench.files(name)))
            result = bench.child("read", name, bench.place(name), NUM_WORKERS, 1)
            found.setdefault(name, []).append(result["rows"] / result["first_epoch_s"])
    return {"rates": {name: statistics.median(rates) for name, rates in found.items()}, "still_held": still_held}


def measure_s3(bench: Bench, names: list[str], num_rounds: int) -> dict[str, Any]:
    """From opening to the end of an epoch, out of a real server into an empty cache."""
    from infra.s3_server import start_seaweedfs

    found: dict[str, list[float]] = {}
    with start_seaweedfs(bench.folder / "seaweedfs") as server:
        server.make_bucket(BUCKET)
        client = server.client()
        for name in names:
            for path in bench.files(name):
                relative = path.relative_to(bench.folder / FORMATS[name].written_by)
                client.upload_file(str(path), BUCKET, f"{name}/{relative}")
        environment = {**server.environment, "S3_ENDPOINT_URL": server.endpoint_url}
        for _ in range(num_rounds):
            for name in names:
                cache = bench.folder / "cache"
                cache.mkdir()
                place = bench.remote_place(name, cache)
                result = bench.child("read", name, place, NUM_WORKERS, 1, environment=environment)
                if result["rows"] < bench.num_rows:
                    raise SystemExit(f"{name}: {result['rows']} rows of {bench.num_rows} came from S3")
                found.setdefault(name, []).append(result["rows"] / result["first_epoch_s"])
                shutil.rmtree(cache)
    return {"rates": {name: statistics.median(rates) for name, rates in found.items()}}


def show(title: str, rates: dict[str, float]) -> None:
    """Prints a table."""
    print(f"\n{title}")
    for name, rate in rates.items():
        ratio = "" if name == "ours" else f"{rates['ours'] / rate:8.2f}"
        print(f"  {name:14}{rate:12,.0f} rows/s{rate * ROW_BYTES / 1e9:8.2f} GB/s{ratio}")


def main() -> None:
    """Measures and prints."""
    if sys.argv[1:2] == ["--child"]:
        run_child(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="default: 4,096; with --quick 1,024")
    parser.add_argument("--rounds", type=int, help="default: 5; with --quick 1")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, help="default: all; with --quick warm only")
    parser.add_argument("--formats", nargs="+", choices=tuple(FORMATS), default=list(FORMATS))
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds: under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    num_rows = args.rows or (1024 if args.quick else 4096)
    num_rounds = args.rounds or (1 if args.quick else 5)
    scenarios = args.scenarios or (["warm"] if args.quick else SCENARIOS)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="lacuna-bench-", ignore_cleanup_errors=True) as name:
        bench = Bench(Path(name), num_rows)
        bench.write(args.formats)
        print(f"{num_rows:,} rows of {ROW_BYTES:,} bytes, batches of {BATCH_SIZE}, median of {num_rounds}; ours / peer")
        if "warm" in scenarios:
            found["warm"] = measure_warm(bench, args.formats, num_rounds, 3 if args.quick else 4, args.quick)
            show("page cache warm, between batches", found["warm"]["rates"])
            show("page cache warm, from opening to the end of the first epoch", found["warm"]["first_epoch"])
            print("\nprocessor time of a row, µs; peers without worker processes, which cost more; peer / ours")
            for name, busy in found["warm"]["cpu_us"].items():
                print(f"  {name:14}{busy:12,.1f}{busy / found['warm']['cpu_us']['ours']:12.2f}")
            print("\nby number of workers (threads):")
            for key, rate in found["warm"]["all"].items():
                low, high = found["warm"]["spread"][key]
                print(f"  {key:16}{rate:12,.0f}   ({low:,.0f} … {high:,.0f})")
        if "cold" in scenarios:
            found["cold"] = measure_cold(bench, args.formats, num_rounds)
            show(f"page cache cold ({found['cold']['still_held']:.1%} was still held)", found["cold"]["rates"])
        if "s3" in scenarios:
            remote = [name for name in args.formats if name in REMOTE]
            found["s3"] = measure_s3(bench, remote, num_rounds)
            show("from S3 into an empty cache", found["s3"]["rates"])
    print("\n" + ", ".join(f"{package} {number}" for package, number in sorted(bench.versions.items())))
    if args.json:
        print(json.dumps(summary(found, bench.versions)))


def summary(found: dict[str, dict[str, Any]], versions: dict[str, str]) -> dict[str, Any]:
    """What ``--json`` prints."""
    tables = {key: result["rates"] for key, result in found.items()}
    if "warm" in found:
        tables["first_epoch"] = found["warm"]["first_epoch"]
    ratios = {
        name if key == "warm" else f"{name}_{key}": rates["ours"] / rate
        for key, rates in tables.items()
        for name, rate in rates.items()
        if name != "ours"
    }
    busy = found.get("warm", {}).get("cpu_us", {})
    ratios |= {f"{name}_cpu": value / busy["ours"] for name, value in busy.items() if name != "ours"}
    peers = {name for rates in tables.values() for name in rates if name != "ours"}
    return {
        "name": "loader",
        "unit": "rows/s",
        "ours": {key: rates["ours"] for key, rates in tables.items()},
        "peers": {name: {key: rates[name] for key, rates in tables.items() if name in rates} for name in sorted(peers)},
        "ratios": ratios,
        "versions": versions | {"python": platform.python_version()},
        "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
    }


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
