"""The engine: img2dataset's layout, every row accounted for, and no hanging when a worker dies."""

import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.reasons import Reason
from preprocessing.download import shards
from preprocessing.download.fetch import REQUESTS, child_environment, fetch_shards
from preprocessing.download.images import NormalizedImage
from preprocessing.download.img2dataset_parts import ParquetSampleWriter
from preprocessing.download.jobs import EngineJob
from preprocessing.download.shards import ShardDownloader, hash_mismatch
from tests.preprocessing.hostile_server import RawServer, reply

CONFIG = DownloadConfig.model_validate(
    {"allow_networks": ["127.0.0.0/8"], "image_size_px": 32, "timeout_s": 10, "retries": 0, "num_threads": 8}
)


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 48), (number % 256, 80, 160)).save(buffer, "JPEG")
    return buffer.getvalue()


class Site:
    """Serves ``/{number}.jpg``; ``/no`` opts out, ``/hold`` answers when it is let."""

    def __init__(self) -> None:
        self.hold = threading.Event()
        self.asked: list[str] = []
        self.server = RawServer(self._handle)
        self.url = f"http://127.0.0.1:{self.server.port}"

    def _handle(self, connection: socket.socket, path: str, request: bytes) -> None:
        self.asked.append(path)
        if path.startswith("/hold"):
            self.hold.wait(60)
        if path.startswith("/no"):
            connection.sendall(reply("200 OK", "X-Robots-Tag: noai", body=b"page"))
        elif path.startswith("/gone"):
            connection.sendall(reply("404 Not Found"))
        else:
            connection.sendall(reply("200 OK", body=picture(int(path.strip("/hold.jpg") or 0))))


@pytest.fixture
def site() -> Iterator[Site]:
    found = Site()
    yield found
    found.hold.set()
    found.server.close()


def run_engine(folder: Path, table: pa.Table, **settings: Any) -> tuple[int, Path]:
    pq.write_table(table, folder / "requests.parquet")
    job = EngineJob.model_validate(
        {"input": folder / "requests.parquet", "output": folder / "out", "config": CONFIG, "rows_per_shard": 10}
        | settings
    )
    (folder / "job.json").write_text(job.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-P", "-m", "preprocessing.download.engine", "--job", str(folder / "job.json")],
        env=child_environment(os.environ),
        cwd=folder,
        timeout=120,
        check=False,
    )
    return done.returncode, folder / "out"


def urls_of(site: Site) -> list[str]:
    return [
        *(f"{site.url}/{number}.jpg" for number in range(20)),
        f"{site.url}/gone",
        f"{site.url}/no",
        "file:///etc/passwd",
    ]


@pytest.mark.parametrize("output_format", ["parquet", "webdataset", "files"])
def test_img2datasets_layout(output_format: str, site: Site, tmp_path: Path) -> None:
    urls = urls_of(site)
    table = pa.table({"URL": urls, "TEXT": [f"caption {n}" for n in range(len(urls))], "punsafe": [0.01] * len(urls)})
    code, out = run_engine(
        tmp_path,
        table,
        output_format=output_format,
        url_column="URL",
        caption_column="TEXT",
        columns=("punsafe",),
        config=CONFIG.model_copy(update={"num_processes": 2}),
    )
    assert code == 0
    assert [path.name for path in sorted(out.glob("*_stats.json"))] == [f"{n:05d}_stats.json" for n in range(3)]
    stats = [json.loads(path.read_bytes()) for path in sorted(out.glob("*_stats.json"))]
    assert [one["count"] for one in stats] == [10, 10, 3]
    assert [one["successes"] for one in stats] == [10, 10, 0]
    assert stats[2]["status_dict"] == {"http_client_error": 1, "opted_out": 1, "url_refused": 1}
    rows = [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert sorted(row["url"] for row in rows) == sorted(urls)
    assert {row["key"] for row in rows} == {f"{shard:05d}{n}" for shard in (0, 1) for n in range(10)} | {
        f"00002{n}" for n in range(3)
    }
    for row in rows:
        assert row["caption"] == f"caption {urls.index(row['url'])}"
        assert row["punsafe"] == 0.01
        assert row["status"] == ("success" if row["url"].endswith(".jpg") else "failed_to_download")
        assert (row["error_message"] is None) == (row["status"] == "success")
        if row["status"] == "success":
            data = picture(urls.index(row["url"]))
            assert row["sha256"] == hashlib.sha256(data).hexdigest()
            assert (row["original_width"], row["original_height"], row["width"]) == (40, 48, 32)
    good = {row["key"] for row in rows if row["status"] == "success"}
    if output_format == "webdataset":
        members = []
        for path in out.glob("*.tar"):
            with tarfile.open(path) as tar:
                members += tar.getnames()
        assert set(members) == {f"{key}.{end}" for key in good for end in ("jpg", "json", "txt")}
    elif output_format == "files":
        assert {path.stem for path in out.glob("*/*.jpg")} == good
        assert all(Image.open(io.BytesIO(path.read_bytes())).width == 32 for path in out.glob("*/*.jpg"))
    else:
        assert all((row["jpg"] is not None) == (row["key"] in good) for row in rows)
    assert not (out / "_tmp").exists()
    site.asked.clear()
    assert run_engine(tmp_path, table, url_column="URL", caption_column="TEXT", columns=("punsafe",))[0] == 0
    assert site.asked == []  # all is done


def test_hashes_are_verified(site: Site, tmp_path: Path) -> None:
    right = [hashlib.new(name, picture(1)).hexdigest() for name in ("md5", "sha256")]
    rows = [
        (None, None),
        (right[0], None),
        (None, right[1]),
        (right[0].upper(), right[1]),
        ("0" * 32, None),
        (right[0], "0" * 64),
    ]
    table = pa.Table.from_pylist(
        [
            {"uid": str(n), "url": f"{site.url}/1.jpg", "expected_md5": md5, "expected_sha256": sha256}
            for n, (md5, sha256) in enumerate(rows)
        ],
        schema=REQUESTS,
    )
    found = {}
    for shard in fetch_shards({0: table}, CONFIG, tmp_path):
        found = {row.uid: row.result for batch in shard.batches() for row in batch}
    for uid in "0123":
        assert isinstance(found[uid], NormalizedImage)
    for uid in "45":
        verdict = found[uid]
        assert isinstance(verdict, tuple)
        assert verdict[0] is Reason.HASH_MISMATCH
    assert hash_mismatch(b"", {}) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the worker through /proc")
def test_a_killed_worker_costs_seconds_and_no_row(site: Site, tmp_path: Path) -> None:
    """img2dataset's pool would wait for it for ever. What opted out is not asked again by the second child."""
    table = pa.Table.from_pylist(
        [{"uid": str(n), "url": f"{site.url}{path}"} for n, path in enumerate(["/no", "/1.jpg", "/hold"])],
        schema=REQUESTS,
    )
    started: list[float] = []

    def kill_a_worker() -> None:
        while not any(path == "/hold" for path in site.asked):
            time.sleep(0.05)
        while not (tmp_path / "opted_out.txt").exists():
            time.sleep(0.05)
        for process in Path("/proc").iterdir():
            try:
                words = (process / "cmdline").read_bytes()
                if b"spawn_main" in words and str(tmp_path) in os.readlink(process / "cwd"):
                    started.append(time.monotonic())
                    os.kill(int(process.name), signal.SIGKILL)
            except (OSError, ValueError):
                continue
        site.hold.set()

    thread = threading.Thread(target=kill_a_worker)
    thread.start()
    found = {}
    for shard in fetch_shards({0: table}, CONFIG, tmp_path):
        found = {row.uid: row.result for batch in shard.batches() for row in batch}
    thread.join()
    assert len(started) == 1
    assert time.monotonic() - started[0] < 60
    assert set(found) == {"0", "1", "2"}
    assert isinstance(found["2"], NormalizedImage)
    opted_out = found["0"]
    assert isinstance(opted_out, tuple)
    assert opted_out[0] is Reason.OPTED_OUT
    assert site.asked.count("/no") == 1
    assert site.asked.count("/1.jpg") == 2


class _FullDisk(ParquetSampleWriter):
    """Fails once, in the middle."""

    num_left = 3

    def write(self, img_str: Any, key: Any, caption: Any, meta: Any) -> None:
        _FullDisk.num_left -= 1
        if _FullDisk.num_left == 0:
            raise OSError(28, "No space left on device")
        super().write(img_str, key, caption, meta)


def test_an_error_in_writing_fails_the_shard_and_loses_no_row(site: Site, tmp_path: Path) -> None:
    def feather() -> str:
        table = pa.table({"url": [f"{site.url}/{n}.jpg" for n in range(6)]})
        path = tmp_path / "0.feather"
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
        return str(path)

    downloader = ShardDownloader(CONFIG, _FullDisk, ["url"], str(tmp_path), 6, 5, None)
    try:
        group = ((0,), (feather(),))
        done, left = downloader(group)
        assert not done
        assert left == group
        assert not (tmp_path / "00000_stats.json").exists()
        done, _ = downloader(left)
        assert done
    finally:
        shards.close_sessions()
    assert pq.read_table(tmp_path / "00000.parquet").num_rows == 6
    assert json.loads((tmp_path / "00000_stats.json").read_bytes())["successes"] == 6


def test_bad_input_is_said_in_a_line(tmp_path: Path) -> None:
    code, _ = run_engine(tmp_path, pa.table({"other": ["x"]}))
    assert code == 2
