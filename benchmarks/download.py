"""Images a second from a server on loopback to img2dataset's files: our engine against img2dataset's own command.

Both ask the same server, which runs in a process of its own, for the same pictures, with the same number of processes
and threads, and write the same layout (Parquet, shorter side at most 512 px); the runs are interleaved, and the sets of
pictures that succeeded are compared. Three settings: ``small`` (JPEGs of at most 512 px), ``large`` (of at least 1,536
px), ``https`` (small ones; both trust, by ``SSL_CERT_FILE``, this machine's authorities and one of our own).

img2dataset is run twice. ``img2dataset``: with what makes the same result as ours, which is also what its recipes for
LAION's sets say (keep the ratio, only reduce, keep a JPEG that is small enough), and without EXIF, which ours has not
either. ``img2dataset_default``: as it is without being told (a border of 512 × 512, smaller pictures enlarged, all
encoded anew, EXIF extracted), in the first round. Only the first is held against the goals.

Images/s are given twice: *whole*, from starting the command to its end, and *steady*, from the start of the first shard
to the end of the last, by their ``_stats.json``, which leaves out how long each takes to import its modules. Ratio =
ours / img2dataset, above 1 is better.

    python benchmarks/download.py [--quick] [--json] [--only small|large|https]
"""

import argparse
import asyncio
import datetime
import io
import ipaddress
import json
import logging
import os
import platform
import shutil
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import certifi
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from preprocessing.contracts.config import DownloadConfig
from preprocessing.download.jobs import EngineJob

NUM_PICTURES = 100
NUM_PROCESSES = 2
NUM_THREADS = 32
PEERS = ("img2dataset", "img2dataset_default")
GOALS = {"small": 2.0, "large": 3.0, "https": 10.0}
NUM_ROWS = {"small": 6000, "large": 600, "https": 2400}
NUM_ROWS_QUICK = {"small": 1600, "large": 320, "https": 480}
LOGGER = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[1]


def make_pictures(folder: Path) -> None:
    """Draws pictures with the statistics of photographs: smooth areas, edges, and grain at every scale."""
    rng = np.random.default_rng(0)
    for kind, low, high in (("small", 384, 512), ("large", 1536, 2048)):
        (folder / kind).mkdir(parents=True)
        for index in range(NUM_PICTURES):
            width, height = (int(side) for side in rng.integers(low, high + 1, size=2))
            shapes = np.zeros((height // 4, width // 4, 3), np.float32)
            for octave in range(1, 7):
                coarse = (rng.normal(0, 60 / octave, (2**octave, 2**octave, 3)) + 128).clip(0, 255).astype(np.uint8)
                layer = Image.fromarray(coarse).resize((width // 4, height // 4), Image.Resampling.BICUBIC)
                shapes += np.asarray(layer, np.float32) - 128
            smooth = Image.fromarray((shapes + 128).clip(0, 255).astype(np.uint8)).resize((width, height))
            pixels = np.asarray(smooth, np.int16) + rng.integers(-9, 10, (height, width, 1), dtype=np.int16)
            buffer = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
            (folder / kind / f"{index}.jpg").write_bytes(buffer.getvalue())


def make_certificate(folder: Path) -> None:
    """Writes a certificate for loopback that is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    (folder / "certificate.pem").write_bytes(pem)
    # Loading a hundred authorities is what a new TLS context costs: whoever has but one has no ordinary machine.
    store = ssl.get_default_verify_paths().cafile or certifi.where()
    (folder / "authorities.pem").write_bytes(Path(store).read_bytes() + b"\n" + pem)
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


class _Answers(asyncio.Protocol):
    """As little HTTP as both clients need: the answer is ready, and the request is only looked at for its path."""

    def __init__(self, answers: dict[bytes, bytes]) -> None:
        self._answers = answers
        self._received = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answers every whole request."""
        assert self._transport is not None
        self._received += data
        while b"\r\n\r\n" in self._received:
            head, _, self._received = self._received.partition(b"\r\n\r\n")
            path = head.split(b" ", 2)[1].partition(b"?")[0]
            self._transport.write(self._answers[path])
            if b"connection: close" in head.lower():
                self._transport.close()


async def _serve(folder: Path) -> None:
    answers = {}
    for path in folder.glob("*/*.jpg"):
        body = path.read_bytes()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n"
        answers[f"/{path.parent.name}/{path.name}".encode()] = head.encode() + body
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    loop = asyncio.get_running_loop()
    servers = [
        await loop.create_server(lambda: _Answers(answers), "127.0.0.1", 0, ssl=tls, backlog=1024)
        for tls in (None, context)
    ]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))


def _requests(path: Path, site: str, kind: str, num_rows: int) -> int:
    urls = [f"{site}/{kind}/{index % NUM_PICTURES}.jpg?row={index}" for index in range(num_rows)]
    pq.write_table(pa.table({"url": urls}), path)
    return num_rows // (2 * NUM_PROCESSES)


def _ours(requests: Path, output: Path, rows_per_shard: int) -> list[str]:
    config = DownloadConfig(
        allow_networks=("127.0.0.0/8",),
        num_processes=NUM_PROCESSES,
        num_threads=NUM_THREADS,
        max_connections_per_host=1024,  # one host serves them all, and img2dataset spares none
        image_size_px=512,
    )
    job = EngineJob(input=requests, output=output, config=config, rows_per_shard=rows_per_shard)
    output.with_suffix(".json").write_text(job.model_dump_json())
    return [sys.executable, "-m", "preprocessing.download.engine", "--job", str(output.with_suffix(".json"))]


def _img2dataset(requests: Path, output: Path, rows_per_shard: int) -> list[str]:
    same = ("--resize_mode=keep_ratio", "--resize_only_if_bigger=True", "--skip_reencode=True", "--extract_exif=False")
    return [*_img2dataset_default(requests, output, rows_per_shard), *same]


def _img2dataset_default(requests: Path, output: Path, rows_per_shard: int) -> list[str]:
    arguments = {
        "url_list": requests,
        "input_format": "parquet",
        "url_col": "url",
        "output_folder": output,
        "output_format": "parquet",
        "processes_count": NUM_PROCESSES,
        "thread_count": NUM_THREADS,
        "image_size": 512,
        "compute_hash": "sha256",
        "number_sample_per_shard": rows_per_shard,
    }
    command = [str(Path(sys.executable).with_name("img2dataset"))]
    return command + [f"--{name}={value}" for name, value in arguments.items()]


@dataclass(frozen=True)
class _Run:
    whole: float  # images/s
    steady: float
    succeeded: dict[str, int]  # URL → the shorter side, in pixels


def _run(command: list[str], output: Path, environment: dict[str, str]) -> _Run:
    started = time.monotonic()
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    whole_s = time.monotonic() - started
    stats = [json.loads(path.read_bytes()) for path in output.glob("*_stats.json")]
    steady_s = max(shard["end_time"] for shard in stats) - min(shard["start_time"] for shard in stats)
    table = pa.concat_tables(
        [pq.read_table(path, columns=["url", "status", "width", "height"]) for path in output.glob("*.parquet")]
    ).to_pylist()
    succeeded = {row["url"]: min(row["width"], row["height"]) for row in table if row["status"] == "success"}
    shutil.rmtree(output)
    return _Run(len(table) / whole_s, len(table) / steady_s, succeeded)


def measure(kind: str, site: str, num_rows: int, num_runs: int, folder: Path) -> dict[str, float]:
    """Runs both, in turn, and returns the medians.

    Raises:
        RuntimeError: They did not succeed with the same pictures.
    """
    environment = {name: value for name, value in os.environ.items() if name != "SSL_CERT_DIR"} | {
        "SSL_CERT_FILE": str(folder / "authorities.pem"),
        "WANDB_MODE": "disabled",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "OMP_NUM_THREADS": "1",
    }
    requests = folder / f"{kind}.parquet"
    rows_per_shard = _requests(requests, site, "large" if kind == "large" else "small", num_rows)
    found: dict[str, list[float]] = {}
    for run in range(num_runs):
        succeeded = {}
        for name, command_of in (
            ("ours", _ours),
            ("img2dataset", _img2dataset),
            ("img2dataset_default", _img2dataset_default),
        ):
            if name == "img2dataset_default" and run:
                continue
            output = folder / f"{kind}-{name}-{run}"
            result = _run(command_of(requests, output, rows_per_shard), output, environment)
            succeeded[name] = result.succeeded
            found.setdefault(f"{name}_whole", []).append(result.whole)
            found.setdefault(f"{name}_steady", []).append(result.steady)
            LOGGER.info("%s %s, round %d: %.1f images/s, whole %.1f", kind, name, run, result.steady, result.whole)
        sets = {name: set(urls) for name, urls in succeeded.items()}
        if succeeded["ours"] != succeeded["img2dataset"] or any(len(urls) != num_rows for urls in sets.values()):
            raise RuntimeError(f"{kind}: they did not make the same {num_rows} pictures")
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    """Makes pictures, serves them, runs both, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer pictures, 3 runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--only", choices=sorted(GOALS), help="one of the settings")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.serve is not None:
        asyncio.run(_serve(words.serve))
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    num_rows, num_runs = (NUM_ROWS_QUICK, 3) if words.quick else (NUM_ROWS, 5)
    with tempfile.TemporaryDirectory(prefix="lacuna-bench-") as name:
        folder = Path(name)
        make_pictures(folder)
        make_certificate(folder)
        server = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        try:
            assert server.stdout is not None
            http_port, https_port = server.stdout.readline().split()
            sites = {kind: f"http://127.0.0.1:{http_port}" for kind in GOALS if kind != "https"}
            sites["https"] = f"https://127.0.0.1:{https_port}"
            results = {
                kind: measure(kind, site, num_rows[kind], num_runs, folder)
                for kind, site in sites.items()
                if words.only in (None, kind)
            }
        finally:
            server.kill()
            server.wait()
    _report(results, words.json)


def _report(results: dict[str, dict[str, float]], as_json: bool) -> None:
    print(f"{'images/s':10}{'peer':22}{'ours':>8}{'peer':>8}{'ratio':>8}{'goal':>6}   whole: ours, peer, ratio")
    ratios: dict[str, float] = {}
    for kind, found in results.items():
        for peer in PEERS:
            for rate in ("steady", "whole"):
                ratios[f"{peer}_{kind}_{rate}"] = found[f"ours_{rate}"] / found[f"{peer}_{rate}"]
            print(
                f"{kind:10}{peer:22}{found['ours_steady']:8.1f}{found[f'{peer}_steady']:8.1f}"
                f"{ratios[f'{peer}_{kind}_steady']:8.2f}{GOALS[kind] if peer == PEERS[0] else '':>6}   "
                f"{found['ours_whole']:.1f}, {found[f'{peer}_whole']:.1f}, {ratios[f'{peer}_{kind}_whole']:.2f}"
            )
    if as_json:
        rates = {
            name: {
                f"{kind}_{rate}": round(found[f"{name}_{rate}"], 1)
                for kind, found in results.items()
                for rate in ("steady", "whole")
            }
            for name in ("ours", *PEERS)
        }
        said = {
            "name": "download",
            "unit": "images/s",
            "ours": rates["ours"],
            "peers": {peer: rates[peer] for peer in PEERS},
            "ratios": {name: round(value, 3) for name, value in ratios.items()},
            "versions": {name: version(name) for name in ("img2dataset", "opencv-python-headless", "pillow", "pyarrow")}
            | {"python": platform.python_version()},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        }
        print(json.dumps(said))


if __name__ == "__main__":
    main()
