"""A download dataset of drawn pictures, put into a store without a network: what `encode` reads."""

import hashlib
import io
from collections.abc import Sequence

import pyarrow as pa

from model.tiny.world import draw, scene_at
from preprocessing.contracts.digests import is_held_out, uid_of
from preprocessing.contracts.schemas import DOWNLOADED
from tests.preprocessing.given import GivenTables

HELD_OUT = 0.3


def picture_row(index: int, **columns: object) -> dict[str, object]:
    """What `download` makes of one drawn picture; `columns` replace."""
    scene = scene_at(5, index)
    buffer = io.BytesIO()
    draw(scene).save(buffer, "PNG")
    url = f"http://pictures.test/{index}.png"
    uid = uid_of(url, scene.caption)
    return {
        "uid": uid,
        "url": url,
        "caption": scene.caption,
        "width": scene.width_px,
        "height": scene.height_px,
        "similarity": 0.3,
        "punsafe": 0.01,
        "pwatermark": 0.1,
        "aesthetic": 5.0,
        "split": "validation" if is_held_out(uid, HELD_OUT) else "train",
        "image": buffer.getvalue(),
        "image_width": scene.width_px,
        "image_height": scene.height_px,
        "original_width": scene.width_px,
        "original_height": scene.height_px,
        "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
    } | columns


def picture_table(rows: Sequence[dict[str, object]]) -> pa.Table:
    """Rows in the ``DOWNLOADED`` schema."""
    return pa.Table.from_pylist(list(rows), schema=DOWNLOADED)


class Downloaded(GivenTables):
    """The stage that makes the dataset.

    Args:
        tables: One a shard.
    """

    name, digest, parents = "download", "d" * 64, {"select": "s" * 64}
