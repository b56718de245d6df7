"""The hostile image corpus against img2dataset's own command and our decoders: what is accepted, refused, dies, hangs.

Every file of ``tests/preprocessing/image_corpus.py`` is served on loopback. img2dataset fetches them, some files a run;
a run that takes over ``--memory-gb`` or ``--seconds`` is killed, so that this machine survives, and its rows are lost,
as they are when it hangs. Empty modules stand in for two that it imports and does not use here (webdataset, which
imports torch, and wandb): it starts in a quarter of the time. Our decoders get the same files. Both at 512 px, JPEG
quality 95.

    python benchmarks/hostile_images.py [--memory-gb 6] [--seconds 60] [--files-a-run 40]
"""

import argparse
import collections
import contextlib
import http.server
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "preprocessing")]

from image_corpus import Sample, corpus  # noqa: E402  # pyright: ignore[reportMissingImports]  # beside the tests

from preprocessing.contracts.config import DownloadConfig  # noqa: E402
from preprocessing.download.decoding import Decoders  # noqa: E402
from preprocessing.download.images import NormalizedImage  # noqa: E402

POLL_S = 0.1


class _Handler(http.server.BaseHTTPRequestHandler):
    samples: tuple[Sample, ...] = ()
    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        data = self.samples[int(self.path.rpartition("/")[2])].make()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # silence
        return


def family_rss_bytes(group: int) -> int:
    """Resident memory of all processes of a process group."""
    total = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == group:
                    total += int(fields[21]) * resource.getpagesize()
            except (OSError, IndexError):
                continue
    return total


def run_img2dataset(numbers: list[int], port: int, args: argparse.Namespace) -> tuple[collections.Counter[str], int]:
    """One run of its own command over some files: how many ended how, and the peak memory of its processes."""
    with tempfile.TemporaryDirectory() as folder:
        urls, results = Path(folder) / "urls.parquet", Path(folder) / "results"
        pq.write_table(pa.table({"url": [f"http://127.0.0.1:{port}/{number}" for number in numbers]}), urls)
        for unused in ("webdataset", "wandb"):
            (Path(folder) / f"{unused}.py").touch()
        words = {
            "url_list": urls, "input_format": "parquet", "url_col": "url", "output_folder": results,
            "output_format": "parquet", "image_size": 512, "resize_mode": "keep_ratio", "resize_only_if_bigger": True,
            "encode_quality": 95, "processes_count": 1, "thread_count": 2, "number_sample_per_shard": len(numbers),
            "timeout": 30, "enable_wandb": False,
        }  # fmt: skip
        with open(Path(folder) / "log", "wb") as log:
            child = subprocess.Popen(
                [str(Path(sys.executable).with_name("img2dataset")), *(f"--{k}={v}" for k, v in words.items())],
                stdout=log, stderr=log, start_new_session=True, cwd=folder,
                env={**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "no_proxy": "*", "PYTHONPATH": folder},
            )  # fmt: skip
            deadline, peak = time.monotonic() + args.seconds, 0
            while child.poll() is None and time.monotonic() < deadline and peak < args.memory_gb * 1e9:
                peak = max(peak, family_rss_bytes(child.pid))
                time.sleep(POLL_S)
            is_hung = child.poll() is None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, 9)
            code = child.wait()
        found: collections.Counter[str] = collections.Counter()
        for path in results.glob("*.parquet"):
            try:
                rows = pq.read_table(path, columns=["status"]).column("status").to_pylist()
            except (OSError, pa.ArrowException, KeyError):
                continue
            found.update("accepted" if status == "success" else "refused" for status in rows)
        lost = len(numbers) - found.total()
        if lost:
            why = "killed for memory" if peak >= args.memory_gb * 1e9 else "hung" if is_hung else f"exit code {code}"
            found[f"lost, {why}"] += lost
        return found, peak


def run_ours(samples: list[Sample]) -> tuple[collections.Counter[str], int, float, int]:
    """Our decoders: how many ended how, the peak memory of one decoder, the longest wait, and expectations missed."""
    found: collections.Counter[str] = collections.Counter()
    peak, longest_s, missed = 0, 0.0, 0
    with Decoders(DownloadConfig(), 2) as decoders:

        def one(sample: Sample) -> tuple[Sample, str | None, float]:
            data, start = sample.make(), time.monotonic()
            result = decoders.normalize(data)
            reason = None if isinstance(result, NormalizedImage) else str(result[0])
            return sample, reason, time.monotonic() - start

        with ThreadPoolExecutor(2) as pool:
            for sample, reason, waited_s in pool.map(one, samples):
                found["accepted" if reason is None else f"refused: {reason}"] += 1
                missed += reason not in {None if right is None else str(right) for right in sample.expected}
                longest_s = max(longest_s, waited_s)
                for pid in decoders.pids:
                    status = Path(f"/proc/{pid}/status")
                    if status.exists():
                        lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
                        peak = max([peak, *(1024 * int(line.split()[1]) for line in lines)])
    return found, peak, longest_s, missed


def main() -> None:
    """Runs both and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory-gb", type=float, default=6, help="resident memory of all processes of one run")
    parser.add_argument("--seconds", type=float, default=60, help="for one run of img2dataset")
    parser.add_argument("--files-a-run", type=int, default=40)
    parser.add_argument("--every", type=int, default=1, help="only each so-manyth file")
    args = parser.parse_args()
    samples = corpus()[:: args.every]
    _Handler.samples = tuple(samples)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ours, our_peak, longest_s, missed = run_ours(samples)
    report: dict[str, object] = {
        "files": len(samples),
        "ours": {**ours, "peak_decoder_mb": our_peak // 10**6, "longest_s": round(longest_s, 1), "unexpected": missed},
    }
    print(json.dumps(report), flush=True)
    theirs: collections.Counter[str] = collections.Counter()
    their_peak, start = 0, time.monotonic()
    for first in range(0, len(samples), args.files_a_run):
        numbers = list(range(first, min(first + args.files_a_run, len(samples))))
        found, peak = run_img2dataset(numbers, server.server_port, args)
        theirs += found
        their_peak = max(their_peak, peak)
        where = f"{samples[numbers[0]].name} to {samples[numbers[-1]].name}"
        print(json.dumps({"files": where, **found, "peak_mb": peak // 10**6}), file=sys.stderr, flush=True)
    report["img2dataset"] = {**theirs, "peak_mb": their_peak // 10**6, "seconds": round(time.monotonic() - start)}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
