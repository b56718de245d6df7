"""What a picture costs: processor time of our engine, and of img2dataset's own parts, one process of each.

`benchmarks/download.py` measures images/s, which on a busy machine say as much of the others as of the two. Here each
downloads the same shard of the same pictures from the same server three times in one process, and the last two count:
processor time of that process, of all that it has started (our decoders), and of the server, divided by the pictures.
Starting and importing are left out. img2dataset is set to make the same result, as there.

    python benchmarks/download_cost.py [--rows 1000] [--rounds 5] [--json] [--only small|large|https]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.download import GOALS, NUM_PICTURES, NUM_PROCESSES, NUM_THREADS, make_certificate, make_pictures  # noqa: E402

_NUM_SHARDS = 3


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _started_by(pid: int) -> list[int]:
    children = [
        int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()
    ]
    return children + [pid for child in children for pid in _started_by(child)]


def _ours(folder: Path, num_rows: int) -> Callable[[tuple[int, str]], None]:
    from preprocessing.contracts.config import DownloadConfig  # here: each imports its own only
    from preprocessing.download.img2dataset_parts import WRITERS
    from preprocessing.download.shards import ShardDownloader

    config = DownloadConfig(
        allow_networks=("127.0.0.0/8",),
        num_processes=NUM_PROCESSES,
        num_threads=NUM_THREADS,
        max_connections_per_host=1024,
        image_size_px=512,
    )
    return ShardDownloader(config, WRITERS["parquet"], ["url"], str(folder), num_rows, 5, None).download_shard


def _img2dataset(folder: Path, num_rows: int) -> Callable[[tuple[int, str]], None]:
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import ParquetSampleWriter

    resizer = Resizer(512, "keep_ratio", resize_only_if_bigger=True, skip_reencode=True)
    return Downloader(
        sample_writer_class=ParquetSampleWriter,
        resizer=resizer,
        thread_count=NUM_THREADS,
        save_caption=False,
        extract_exif=False,
        output_folder=str(folder),
        column_list=["url"],
        timeout=10,
        number_sample_per_shard=num_rows,
        oom_shard_count=5,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=["noai", "noimageai", "noindex", "noimageindex"],
    ).download_shard


def _be_one(who: str, site: str, num_rows: int, server: int) -> None:
    """Downloads the shards, and prints milliseconds a picture."""
    with tempfile.TemporaryDirectory(prefix="lacuna-bench-") as name:
        folder = Path(name)
        download = {"ours": _ours, "img2dataset": _img2dataset}[who](folder, num_rows)
        table = pa.table({"url": [f"{site}/{index % NUM_PICTURES}.jpg?row={index}" for index in range(num_rows)]})
        spent = []
        for _ in range(_NUM_SHARDS):
            shard = folder / "shard.feather"
            with pa.ipc.new_file(str(shard), table.schema) as file:
                file.write_table(table)
            download((0, str(shard)))
            successes = json.loads((folder / "00000_stats.json").read_bytes())["successes"]
            if successes != num_rows:
                raise RuntimeError(f"{who}: {successes} of {num_rows} pictures")
            spent.append(sum(map(_ticks, [os.getpid(), server, *_started_by(os.getpid())])))
        ticks = (spent[-1] - spent[0]) / (_NUM_SHARDS - 1)
        print(1000 * ticks / os.sysconf("SC_CLK_TCK") / num_rows, flush=True)
    # The rest is nobody's time: the interpreter waits for nothing that was started.
    os._exit(0)


def main() -> None:
    """Serves pictures, runs each in turn, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000, help="of a shard of small pictures; a tenth of large ones")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--only", choices=sorted(GOALS), help="one of the settings")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.one is not None:
        who, site, rows, server = words.one
        _be_one(who, site, int(rows), int(server))
        return
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="lacuna-bench-") as name:
        folder = Path(name)
        make_pictures(folder)
        make_certificate(folder)
        command = [sys.executable, str(ROOT / "benchmarks" / "download.py"), "--serve", str(folder)]
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            ports = dict(zip(("http", "https"), server.stdout.readline().split(), strict=True))
            for kind in [kind for kind in GOALS if words.only in (None, kind)]:
                scheme, pictures = ("https" if kind == "https" else "http"), ("large" if kind == "large" else "small")
                site = f"{scheme}://127.0.0.1:{ports[scheme]}/{pictures}"
                rows = max(20, words.rows // {"small": 1, "large": 10, "https": 5}[kind])
                found[kind] = _measure(site, rows, words.rounds, server.pid, folder)
        finally:
            server.kill()
            server.wait()
    print(f"{'ms a picture':14}{'ours':>8}{'img2dataset':>13}{'ratio':>8}")
    for kind, costs in found.items():
        print(f"{kind:14}{costs['ours']:8.2f}{costs['img2dataset']:13.2f}{costs['img2dataset'] / costs['ours']:8.2f}")
    if words.json:
        said = {
            "name": "download_cost",
            "unit": "processor ms a picture",
            "ours": {kind: round(costs["ours"], 3) for kind, costs in found.items()},
            "peers": {"img2dataset": {kind: round(costs["img2dataset"], 3) for kind, costs in found.items()}},
            "ratios": {
                f"img2dataset_{kind}": round(costs["img2dataset"] / costs["ours"], 3) for kind, costs in found.items()
            },
        }
        print(json.dumps(said))


def _measure(site: str, num_rows: int, num_rounds: int, server: int, folder: Path) -> dict[str, float]:
    kept = {name: value for name, value in os.environ.items() if name != "SSL_CERT_DIR"}
    environment = kept | {
        "SSL_CERT_FILE": str(folder / "authorities.pem"),
        "WANDB_MODE": "disabled",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "OMP_NUM_THREADS": "1",
    }
    costs: dict[str, list[float]] = {"ours": [], "img2dataset": []}
    for _ in range(num_rounds):
        for who, values in costs.items():
            command = [sys.executable, __file__, "--one", who, site, str(num_rows), str(server)]
            run = subprocess.run(
                command, check=True, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            values.append(float(run.stdout.split()[-1]))
    return {who: statistics.median(values) for who, values in costs.items()}


if __name__ == "__main__":
    main()
