"""Looking around in the store: what a URI names, what stands there, whether it is whole. No prefect."""

import base64
import html
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from infra.bundles import BundleManifest, hash_object, load_bundle, parse_manifest, verify_bundle
from infra.channels import ChannelPointer, read_channel
from infra.errors import ContractError
from infra.storage import ObjectNotFoundError, ObjectStore, open_store
from preprocessing.contracts.manifest import MANIFEST_NAME, Manifest

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_ROOMS = ("datasets", "runs", "exports")
_NUM_CROPS = 32


def absolute_root(root: str) -> str:
    """A root that means the same in every process, whatever its current folder.

    Raises:
        ValueError: It is no folder, ``file://`` or ``s3://`` URI.
    """
    return open_store(root).uri


def locate(uri: str, root: str) -> tuple[ObjectStore, str]:
    """Finds what a user named.

    Args:
        uri: A dataset's or bundle's URI or folder, with or without ``/MANIFEST.json``; its key; or a channel.
        root: The store's root, for keys and channels.

    Returns:
        The store, and the key of the folder in it.

    Raises:
        ValueError: It names nothing.
    """
    name = uri.rstrip("/").removesuffix(f"/{MANIFEST_NAME}")
    if "/" not in name:
        store = open_store(root)
        pointer = read_channel(store, name)
        if pointer is None:
            raise ValueError(
                f"uri: {uri!r} is no channel of {store.uri}; give a URI, or a key such as datasets/encode/0123"
            )
        return store, pointer.bundle
    if name.split("/", 1)[0] in _ROOMS:
        return open_store(root), name
    for room in _ROOMS:
        before, separator, after = name.rpartition(f"/{room}/")
        if separator:
            return open_store(before or "/"), f"{room}/{after}"
    raise ValueError(
        f"uri: {uri!r} names no dataset, run or export; it should hold one of {', '.join(f'/{r}/' for r in _ROOMS)}"
    )


def dataset_at(store: ObjectStore, uri: str, *, field: str = "uri") -> tuple[str, Manifest]:
    """A complete dataset of a store.

    Args:
        store: Where it must be.
        uri: As for `locate`.
        field: What the user set, for messages.

    Returns:
        Key of its folder, and its manifest.

    Raises:
        ValueError: There is none, or it is in another store.
    """
    elsewhere, prefix = locate(uri, store.uri)
    if elsewhere.uri != store.uri:
        raise ValueError(f"{field}: {uri!r} is not below --root {store.uri}; set --root {elsewhere.uri}")
    return prefix, read_manifest(store, prefix, field=field)


def read_manifest(store: ObjectStore, prefix: str, *, field: str = "uri") -> Manifest:
    """A dataset's manifest.

    Raises:
        ValueError: There is none.
        ContractError: It is of another format.
    """
    key = f"{prefix}/{MANIFEST_NAME}"
    try:
        return Manifest.model_validate_json(store.read(key))
    except ObjectNotFoundError:
        raise ValueError(
            f"{field}: {store.uri_of(key)} is not there; the dataset does not exist or is not complete"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ContractError(
            f"{store.uri_of(key)}: not a dataset's manifest ({'.'.join(map(str, first['loc']))}: {first['msg']})"
        ) from None


def read_any(store: ObjectStore, prefix: str) -> Manifest | BundleManifest:
    """A dataset's or a bundle's manifest, by the room in which it stands.

    Raises:
        ValueError: There is none.
    """
    if prefix.startswith("datasets/"):
        return read_manifest(store, prefix)
    key = f"{prefix}/{MANIFEST_NAME}"
    try:
        return parse_manifest(store.read(key), store.uri_of(key))
    except ObjectNotFoundError:
        raise ValueError(
            f"uri: {store.uri_of(key)} is not there; the bundle does not exist or is not complete"
        ) from None


# ------------------------------------------------------------------------------------------------------------- status


@dataclass(frozen=True)
class Status:
    """What stands in a store."""

    datasets: tuple[tuple[str, Manifest], ...]
    bundles: tuple[tuple[str, BundleManifest], ...]
    runs: tuple[str, ...]
    channels: tuple[ChannelPointer, ...]


def status_of(store: ObjectStore) -> Status:
    """Lists a store; what is not complete is not there."""
    datasets = [(prefix, read_manifest(store, prefix)) for prefix in _complete(store, "datasets/")]
    bundles = [
        (prefix, load_bundle(store, prefix)) for room in ("runs/", "exports/") for prefix in _complete(store, room)
    ]
    runs = {info.key.split("/")[1] for info in store.list("runs/")}
    names = [Path(info.key).stem for info in store.list("channels/")]
    channels = [pointer for name in names if (pointer := read_channel(store, name)) is not None]
    return Status(tuple(datasets), tuple(bundles), tuple(sorted(runs)), tuple(channels))


def _complete(store: ObjectStore, room: str) -> Iterator[str]:
    end = f"/{MANIFEST_NAME}"
    return (info.key.removesuffix(end) for info in store.list(room) if info.key.endswith(end))


# ------------------------------------------------------------------------------------------------------------- verify


def problems_of(store: ObjectStore, prefix: str) -> tuple[int, list[str]]:
    """Reads every file that a manifest names again and compares size and sha256.

    Returns:
        How many files were read, and one line for each that differs.

    Raises:
        ValueError: There is no manifest.
    """
    manifest = read_any(store, prefix)
    if isinstance(manifest, BundleManifest):
        return len(manifest.files), verify_bundle(store, prefix)
    files = [file for shard in manifest.shards for file in shard.files] + list(manifest.extra_files)
    problems = []
    for file in files:
        key = f"{prefix}/{file.name}"
        try:
            num_bytes, sha256 = hash_object(store, key)
        except ObjectNotFoundError:
            problems.append(f"{store.uri_of(key)}: is missing")
            continue
        if (num_bytes, sha256) != (file.num_bytes, file.sha256):
            found, said = f"{num_bytes} bytes, sha256 {sha256}", f"{file.num_bytes} bytes, sha256 {file.sha256}"
            problems.append(f"{store.uri_of(key)}: is {found}; the manifest says {said}")
    return len(files), problems


# ------------------------------------------------------------------------------------------------------------- inspect


class _StoredFile(io.RawIOBase):
    """An object as a file that can be read anywhere, so that a Parquet file's footer or one column costs just that."""

    def __init__(self, store: ObjectStore, key: str) -> None:
        self._store, self._key, self._at = store, key, 0
        self._num_bytes = store.head(key).num_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._num_bytes}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._num_bytes - self._at)
        data = (
            self._store.read_range(self._key, self._at, left if size < 0 else min(size, left)) if left and size else b""
        )
        self._at += len(data)
        return data


def open_parquet(store: ObjectStore, key: str) -> "pq.ParquetFile":
    """A Parquet file of the store, of which only what is asked for is read."""
    import pyarrow.parquet as pq

    path = store.local_path(key)
    return pq.ParquetFile(path if path is not None else _StoredFile(store, key))


def schema_of(store: ObjectStore, prefix: str, manifest: Manifest) -> dict[str, str]:
    """Column → type of a dataset's rows; empty where the dataset has no files."""
    files = manifest.files("rows")
    if not files:
        return {}
    with open_parquet(store, f"{prefix}/{files[0].name}") as file:
        return {field.name: str(field.type) for field in file.schema_arrow}


def uids_of(store: ObjectStore, prefix: str, manifest: Manifest) -> set[str]:
    """The uids of all rows of a dataset."""
    found: set[str] = set()
    for entry in manifest.files("rows"):
        with open_parquet(store, f"{prefix}/{entry.name}") as file:
            found.update(file.read(columns=["uid"]).column("uid").to_pylist())
    return found


def contact_sheet(store: ObjectStore, prefix: str, manifest: Manifest) -> str:
    """A self-contained page: counts, drop reasons, and the first crops with their captions.

    Raises:
        ValueError: The dataset has no pictures.
    """
    if manifest.stage == "select":
        raise ValueError(
            f"--html: {prefix} is a select dataset and has no pictures; give a download or an encode dataset"
        )
    figures = "\n".join(_figure(row) for row in _first_rows(store, prefix, manifest))
    counts = "".join(
        f"<tr><td>{html.escape(reason)}</td><td>{count}</td></tr>" for reason, count in manifest.dropped.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(prefix)}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; }}
main {{ display: flex; flex-wrap: wrap; gap: 1rem; }}
figure {{ margin: 0; width: 160px; }} img {{ width: 160px; image-rendering: pixelated; }}
figcaption {{ font-size: 12px; overflow-wrap: anywhere; }} td {{ padding-right: 1rem; }}
</style></head><body>
<h1>{html.escape(prefix)}</h1>
<p>{manifest.num_out} of {manifest.num_in} rows kept, in {len(manifest.shards)} shards.
Made {html.escape(manifest.created_at)}.</p>
<table>{counts}</table>
<main>
{figures}
</main></body></html>
"""


def _first_rows(store: ObjectStore, prefix: str, manifest: Manifest) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for entry in manifest.files("rows"):
        with open_parquet(store, f"{prefix}/{entry.name}") as file:
            for batch in file.iter_batches(_NUM_CROPS, columns=["uid", "caption", "image"]):
                rows += batch.to_pylist()
                if len(rows) >= _NUM_CROPS:
                    return rows[:_NUM_CROPS]
    return rows


def _figure(row: dict[str, Any]) -> str:
    kind = "png" if row["image"].startswith(b"\x89PNG") else "jpeg"
    data = base64.b64encode(row["image"]).decode()
    picture = f'<img src="data:image/{kind};base64,{data}" alt="">'
    caption = f"{html.escape(row['caption'][:300])}<br><code>{html.escape(row['uid'])}</code>"
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"
