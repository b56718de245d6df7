"""Somebody's own metadata: CSV and Parquet with other column names, pictures of any size from another server."""

import http.server
import io
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import csv

from tests.integration.conftest import Lacuna

pytestmark = pytest.mark.timeout(900)
NUM_PICTURES = 60


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Says nothing."""


@pytest.fixture
def gallery(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder of photographs (gradients and noise) of many sizes, served on loopback."""
    folder = tmp_path / "gallery"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(NUM_PICTURES):
        width, height = (int(side) for side in rng.integers(70, 700, size=2))
        coarse = Image.fromarray(rng.integers(0, 255, size=(6, 6, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, ["PNG", "JPEG", "WEBP"][index % 3])
        (folder / f"{index}").write_bytes(buffer.getvalue())
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def _rows(folder: Path, host: str) -> pa.Table:
    sizes = []
    for index in range(NUM_PICTURES):
        with Image.open(folder / f"{index}") as picture:
            sizes.append(picture.size)
    return pa.table(
        {
            "url": [f"{host}/{index}" for index in range(NUM_PICTURES)],
            "caption": [f"picture {index}" for index in range(NUM_PICTURES)],
            "width": [width for width, _ in sizes],
            "height": [height for _, height in sizes],
            "punsafe": [0.01] * NUM_PICTURES,
            "pwatermark": [0.1] * NUM_PICTURES,
            "similarity": [0.3] * NUM_PICTURES,
            "aesthetic": [5.0] * NUM_PICTURES,
        }
    )


def test_own_metadata_and_own_pictures(gallery: tuple[Path, str], lacuna: Lacuna, tmp_path: Path):
    rows = _rows(*gallery)
    (tmp_path / "own").mkdir()
    pq.write_table(rows.slice(0, 40), tmp_path / "own" / "a.parquet")
    csv.write_csv(rows.slice(40), tmp_path / "own" / "b.csv")
    result = lacuna.run(
        "run",
        str(tmp_path / "store"),
        **{
            "source.metadata": [str(tmp_path / "own" / "*.parquet"), str(tmp_path / "own" / "b.csv")],
            "select.max_aspect": 20,
            "select.validation_fraction": 0.3,
            "train.num_steps": 4,
            "train.checkpoint_every_steps": 4,
        },
    )
    assert result["stages"]["select"]["num_in"] == NUM_PICTURES
    assert result["stages"]["encode"]["num_out"] == NUM_PICTURES
    assert Path(result["checkpoint"]).exists()
    assert Path(result["report"]).exists()


def test_loopback_is_refused_unless_allowed(gallery: tuple[Path, str], lacuna: Lacuna, tmp_path: Path):
    pq.write_table(_rows(*gallery), tmp_path / "own.parquet")
    settings = {"source.metadata": [str(tmp_path / "own.parquet")], "download.allow_networks": []}
    assert "url_refused" in lacuna.fail("prepare", str(tmp_path / "store"), 3, **settings)
