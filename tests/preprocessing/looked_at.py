"""Datasets to look at: real files in the contracts' schemas, with the captions and URLs of strangers."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from infra.storage import ObjectStore, sha256_of_file
from preprocessing.contracts.bases import TINY, parse_base
from preprocessing.contracts.digests import uid_of, weights_sha256
from preprocessing.contracts.manifest import (
    MANIFEST_NAME,
    DatasetFile,
    Manifest,
    ShardReport,
    dataset_prefix,
)
from preprocessing.contracts.schemas import DOWNLOADED, SELECTED, TENSOR_WRITER, training_rows

SIDE_PX = 64
LATENT_PX = 8
HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</style></title><svg onload=alert(1)>",
    "{{ 7 * 7 }} {% raw %} ]]> &lt;b&gt;",
    "left \u202e\u2066right\u2069 to left \u200f\u061c",
    "nul \x00 bell \x07 escape \x1b[31m newline \n tab \t",
    "long " * 2000,
    "\ufeff\U000e0001 e\u0301 漢字 🖼️",
    "",
)


def write_dataset(
    store: ObjectStore,
    stage: str,
    tables: Sequence[Mapping[Any, pa.Table]],  # by split; None where rows are not split by file
    *,
    scratch: Path,
    writer: dict[str, Any] | None = None,
    **fields: Any,
) -> tuple[str, Manifest]:
    """Writes a dataset of given rows: a table a shard and split; returns its prefix and manifest."""
    digest = hashlib.sha256(repr((stage, fields, [len(part) for part in tables])).encode()).hexdigest()
    prefix = dataset_prefix(stage, digest)
    scratch.mkdir(parents=True, exist_ok=True)
    shards = []
    for index, parts in enumerate(tables):
        files = []
        for split, table in parts.items():
            name = f"{split or 'shard'}-{index:05d}.parquet"
            pq.write_table(table, scratch / name, **(writer or {"compression": "zstd"}))
            sha256 = sha256_of_file(scratch / name)
            num_bytes = store.upload(f"{prefix}/{name}", scratch / name, sha256).num_bytes
            files.append(
                DatasetFile(name=name, num_bytes=num_bytes, sha256=sha256, num_rows=table.num_rows, split=split)
            )
        num_rows = sum(table.num_rows for table in parts.values())
        report = ShardReport(
            index=index, num_in=num_rows + 2, num_out=num_rows, dropped={"duplicate_image": 2}, files=tuple(files)
        )
        shards.append(report)
    manifest = Manifest(
        **{
            "stage": stage,
            "stage_version": 1,
            "digest": digest,
            "parents": {},
            "config": {},
            "shards": tuple(shards),
            "created_at": "2026-01-02T03:04:05+00:00",
            "code_version": "0",
            **fields,
        }
    )
    store.put_if_absent(f"{prefix}/{MANIFEST_NAME}", manifest.model_dump_json(indent=1).encode())
    return prefix, manifest


def selected_dataset(store: ObjectStore, scratch: Path, captions: Sequence[str] = HOSTILE) -> tuple[str, Manifest]:
    """A select dataset of one shard."""
    table = pa.Table.from_pylist([_metadata(i, caption) for i, caption in enumerate(captions)], schema=SELECTED)
    config = {"max_punsafe": 0.1, "max_pwatermark": 0.8, "min_similarity": None, "min_side_px": 64}
    return write_dataset(store, "select", [{None: table}], scratch=scratch, config=config, parents={"source": "5" * 64})


def downloaded_dataset(
    store: ObjectStore, scratch: Path, selected: Manifest, captions: Sequence[str] = HOSTILE
) -> tuple[str, Manifest]:
    """A download dataset of two shards, made from a selection."""
    rows = [
        {**_metadata(i, caption), "image": picture(i, "JPEG"), "sha256": f"{i:064x}"}
        | dict.fromkeys(("image_width", "image_height", "original_width", "original_height"), 64 + i)
        for i, caption in enumerate(captions)
    ]
    tables = [{None: pa.Table.from_pylist(part, schema=DOWNLOADED)} for part in (rows[::2], rows[1::2])]
    return write_dataset(store, "download", tables, scratch=scratch, parents={"select": selected.digest})


def encoded_dataset(
    store: ObjectStore,
    scratch: Path,
    *,
    captions: Sequence[str] = HOSTILE,
    image: str = "png",
    moments: bool = True,
    text: tuple[str, ...] = ("text_embeddings",),
    num_variants: int = 2,
    parents: dict[str, str] | None = None,
    broken: bool = False,
) -> tuple[str, Manifest]:
    """An encode dataset of two shards with a held-out row each; its moments are noise that the tiny VAE can decode.

    With ``broken``, the first row's moments are not finite, and its picture is none.
    """
    tiny = parse_base(TINY, None).path
    assert tiny is not None
    schema = training_rows(
        1024, 77 * 64 * 2, 8, num_variants, has_image=image != "none", has_moments=moments, text_columns=text
    )
    rng = np.random.default_rng(3)
    rows = []
    for i, caption in enumerate(captions):
        row: dict[str, Any] = {**_metadata(i, caption), "sha256": f"{i:064x}"}
        row |= dict.fromkeys(("crop_top", "crop_left", "resized_width", "resized_height"), 64)
        row["image"] = picture(i, image.upper()) if image != "none" else b""
        for name, kind in zip(schema.names, schema.types, strict=True):
            if pa.types.is_fixed_size_binary(kind):
                width = kind.byte_width
                is_moments = name.endswith("moments") or name.startswith("masked_moments")
                row[name] = rng.standard_normal(512).astype("<f2").tobytes() if is_moments else rng.bytes(width)
        rows.append(row)
    if broken:
        rows[0] |= {"image": b"\x89PNG no picture", "moments": np.full(512, np.nan, "<f2").tobytes()}
    tables = []
    for part in (rows[::2], rows[1::2]):
        both = {"train": part[:-1], "validation": part[-1:]}
        tables.append({split: pa.Table.from_pylist(some, schema=schema) for split, some in both.items() if some})
    config = {
        "resolution_px": SIDE_PX,
        "image": image,
        "moments": moments,
        "text": text[0] if len(text) == 1 else "both",
        "num_mask_variants": num_variants,
    }
    latents = {
        "channels": 4,
        "resolution_px": SIDE_PX,
        "factor": 8,
        "scaling_factor": 0.78395,
        "dtype": "float16",
        "weights_sha256": weights_sha256(tiny / "vae"),
    }
    specs = {"latents": latents, "masks": {"family": "lama_train_256", "num_variants": num_variants}}
    return write_dataset(
        store,
        "encode",
        tables,
        scratch=scratch,
        writer=dict(TENSOR_WRITER),
        config=config,
        specs=specs,
        parents=parents or {},
    )


def picture(index: int, kind: str) -> bytes:
    """A small picture, encoded."""
    pixels = np.random.default_rng(index).integers(0, 255, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def _metadata(index: int, caption: str) -> dict[str, Any]:
    url = f"http://<b>evil</b>.test:80/{index}.jpg?{caption[:20]}"
    return {
        "uid": uid_of(url, caption),
        "url": url,
        "caption": caption,
        "width": 100 + index,
        "height": 90,
        "similarity": None if index == 0 else 0.3,
        "punsafe": 0.01 * (index + 1),
        "pwatermark": float("nan") if index == 1 else 0.2,
        "aesthetic": 5.0,
        "split": "train",
    }
