"""Somebody's metadata that changes, and a server of its pictures that counts what it is asked for."""

import http.server
import io
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from flows.config import PipelineConfig, load_config

ROWS_PER_SHARD = 16
SETTINGS = (
    f"source.rows_per_shard={ROWS_PER_SHARD}",
    "select.min_side_px=32",
    "select.validation_fraction=0.2",
    "download.allow_networks=[127.0.0.0/8]",
    "download.timeout_s=5",
    "download.retries=0",
    "encode.num_mask_variants=1",
    "encode.batch_size=8",
)


class Gallery:
    """Pictures ``/0``, ``/1``, … of loopback.

    Attributes:
        asked: Requests by method and path.
        num_bytes: Of all bodies that were sent.
        opted_out: Paths whose answers say no to training.
        status: Path → what it answers instead of a picture.
    """

    def __init__(self) -> None:
        self.asked: Counter[tuple[str, str]] = Counter()
        self.num_bytes = 0
        self.opted_out: set[str] = set()
        self.status: dict[str, int] = {}
        self._lock = threading.Lock()
        gallery = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                gallery.answer(self)

            def do_HEAD(self) -> None:
                gallery.answer(self)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
                """Says nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        status = self.status.get(request.path, 200)
        body = picture(int(request.path[1:])) if status == 200 else b""
        with self._lock:
            self.asked[request.command, request.path] += 1
            self.num_bytes += len(body) if request.command == "GET" else 0
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        if request.path in self.opted_out:
            request.send_header("X-Robots-Tag", "noai")
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)

    def taken(self) -> Counter[tuple[str, str]]:
        """The requests since the last call."""
        with self._lock:
            asked, self.asked = self.asked, Counter()
            return asked


@contextmanager
def running_gallery() -> Iterator[Gallery]:
    gallery = Gallery()
    thread = threading.Thread(target=gallery.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield gallery
    finally:
        gallery.server.shutdown()
        gallery.server.server_close()
        thread.join()


def picture(index: int) -> bytes:
    """A picture of which no other has the bytes."""
    rng = np.random.default_rng(index)
    coarse = Image.fromarray(rng.integers(0, 255, size=(5, 5, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((70 + index % 7, 72), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def row(gallery: Gallery, index: int, **columns: object) -> dict[str, object]:
    """What the metadata says of a picture; `columns` replace."""
    return {
        "url": f"{gallery.host}/{index}",
        "caption": f"picture {index}",
        "width": 70 + index % 7,
        "height": 72,
        "punsafe": 0.01,
        "pwatermark": 0.1,
        "similarity": 0.3,
        "aesthetic": 5.0,
    } | columns


def write(rows: list[dict[str, object]], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def config_of(metadata: Path, *settings: str) -> PipelineConfig:
    return load_config("demo", [f"source.metadata={metadata}/*.parquet", *SETTINGS, *settings])


def main(metadata: str, root: str, kill_at: str, *settings: str) -> None:
    """A refresh in a process of its own, which is killed when it is about to write a key that holds ``kill_at``."""
    from infra.storage_folder import FolderStore

    def killing(name: str) -> None:
        original = getattr(FolderStore, name)

        def call(self: FolderStore, key: str, *args: Any) -> Any:
            if kill_at and kill_at in key:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, key, *args)

        setattr(FolderStore, name, call)

    for name in ("put", "put_if_absent", "compare_and_swap"):
        killing(name)
    from flows.refresh import refresh

    result = refresh(config_of(Path(metadata), *settings), root)
    print(result.model_dump_json())  # noqa: T201 - for whoever started this


if __name__ == "__main__":
    main(*sys.argv[1:])
