"""What the encode stage costs beside the bare models: rows/s end to end against a loop over tensors in memory.

Ours decodes JPEGs, crops, draws K masks a row, runs the VAE K + 1 times and the text tower once a row, checks for NaN,
packs, writes Parquet and commits it with hashes. The peer, ``bare``, runs only the models, on pictures and masks that
are ready in memory: same models, batch, memory format and threads. Ratio = ours / bare in rows/s, at best 1.

    python benchmarks/encode.py [--quick] [--json]
"""

import argparse
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from infra.storage import open_store
from model.crop import central_square
from model.encoders import encode_moments, images_to_pixels
from model.masks import draw_masks
from model.tiny.world import draw, scene_at
from preprocessing.contracts.config import EncodeConfig, ModelConfig
from preprocessing.contracts.manifest import Manifest, ShardReport
from preprocessing.contracts.schemas import DOWNLOADED
from preprocessing.encode import Encoders, EncodeStage, encode_rows
from preprocessing.stage import RowsFile, ShardOutput, commit_shard

NUM_VARIANTS = 3
BATCH_SIZE = 64


def _rows(num_rows: int) -> pa.Table:
    rows = []
    for index in range(num_rows):
        scene, buffer = scene_at(3, index), io.BytesIO()
        draw(scene).save(buffer, "JPEG", quality=95)
        row = dict.fromkeys(DOWNLOADED.names, 1) | {
            **dict.fromkeys(("expected_md5", "expected_sha256", "source")),
            "uid": f"{index:032x}",
            "url": f"http://pictures.test/{index}",
            "caption": scene.caption,
            "split": "train",
            "image": buffer.getvalue(),
            "sha256": f"{index:064x}",
        }
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=DOWNLOADED)


def _encoders() -> Encoders:
    nothing = Manifest(
        stage="download",
        stage_version=1,
        digest="0" * 64,
        parents={},
        config={},
        shards=(ShardReport(index=0, num_in=0, num_out=0, dropped={}, files=()),),
        created_at="",
        code_version="",
    )
    config = EncodeConfig(
        resolution_px=64, mask_family="lama_train_256", num_mask_variants=NUM_VARIANTS, batch_size=BATCH_SIZE
    )
    model = ModelConfig(base="tiny", base_prediction_type="v_prediction")
    with tempfile.TemporaryDirectory() as folder:
        return EncodeStage(open_store(folder), nothing, config, model).encoders


def _ours(rows: pa.Table, encoders: Encoders, folder: Path) -> None:
    table, rejects = encode_rows(rows, encoders, BATCH_SIZE)
    table = table.drop_columns(["split"])
    output = ShardOutput(0, rows.num_rows, (RowsFile("train-00000.parquet", table, "train"),), rejects)
    commit_shard(open_store(str(folder / "store")), "datasets/encode/x", output, folder)


def _bare(rows: pa.Table, encoders: Encoders) -> Callable[[], None]:
    crops = np.stack([central_square(draw(scene_at(3, index)), 64)[0] for index in range(rows.num_rows)])
    pixels = images_to_pixels(crops).contiguous(memory_format=torch.channels_last)
    known = [
        torch.from_numpy(1 - draw_masks("lama_train_256", 64, 0, [str(uid) for uid in range(rows.num_rows)], k))[
            :, None
        ]
        for k in range(NUM_VARIANTS)
    ]
    captions = rows.column("caption").to_pylist()

    def run() -> None:
        for start in range(0, rows.num_rows, BATCH_SIZE):
            part = slice(start, start + BATCH_SIZE)
            encode_moments(encoders.vae, pixels[part])
            encoders.text.embed_captions(captions[part])
            for mask in known:
                encode_moments(encoders.vae, pixels[part] * mask[part])

    return run


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    """Runs both, alternating, and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows: under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    num_rows, num_rounds = (256, 5) if args.quick else (1024, 7)
    rows, encoders = _rows(num_rows), _encoders()
    bare = _bare(rows, encoders)
    ours_s, bare_s = [], []
    for index in range(num_rounds + 1):  # the first round warms up
        with tempfile.TemporaryDirectory() as folder:
            ours = _seconds(lambda folder=folder: _ours(rows, encoders, Path(folder)))
        peer = _seconds(bare)
        if index:
            ours_s.append(ours)
            bare_s.append(peer)
    ours_rate, bare_rate = num_rows / statistics.median(ours_s), num_rows / statistics.median(bare_s)
    print(f"rows/s, {num_rows} rows of 64 px, K = {NUM_VARIANTS}, median of {num_rounds}")
    print(f"  ours (JPEG to committed Parquet)   {ours_rate:8.1f}")
    print(f"  bare (models only, from memory)    {bare_rate:8.1f}")
    print(f"  ratio                              {ours_rate / bare_rate:8.2f}")
    if args.json:
        result = {
            "name": "encode",
            "unit": "rows/s",
            "ours": {"median": ours_rate},
            "peers": {"bare": {"median": bare_rate}},
            "ratios": {"bare": ours_rate / bare_rate},
            "versions": {"torch": torch.__version__, "pyarrow": pa.__version__, "python": platform.python_version()},
            "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "threads": torch.get_num_threads()},
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
