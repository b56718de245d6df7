"""What a URI names in the store, and the manifest that stands there. No prefect."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from infra.bundles import BundleManifest, parse_manifest
from infra.channels import read_channel
from infra.storage import ObjectNotFoundError, ObjectStore, open_store
from preprocessing.contracts.config import ModelConfig
from preprocessing.contracts.manifest import MANIFEST_NAME, Manifest, load_manifest
from training.runspec import run_prefix

_ROOMS = ("datasets", "runs", "exports")


def absolute_root(root: str) -> str:
    """A root that means the same in every process, whatever its current folder.

    Raises:
        ValueError: It is no folder, ``file://`` or ``s3://`` URI.
    """
    return open_store(root).uri


def locate(uri: str, root: str, *, field: str = "uri") -> tuple[ObjectStore, str]:
    """Finds what a user named.

    Args:
        uri: A dataset's or bundle's URI or folder, with or without ``/MANIFEST.json``; its key; or a channel.
        root: The store's root, for keys and channels.
        field: What the user set, for messages.

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
                f"{field}: {uri!r} is no channel of {store.uri}; give a URI, or a key such as datasets/encode/0123"
            )
        return store, pointer.bundle
    if name.split("/", 1)[0] in _ROOMS:
        return open_store(root), name
    for room in _ROOMS:
        before, separator, after = name.rpartition(f"/{room}/")
        if separator:
            return open_store(before or "/"), f"{room}/{after}"
    raise ValueError(
        f"{field}: {uri!r} names no dataset, run or export; it should hold one of {', '.join(f'/{r}/' for r in _ROOMS)}"
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
    elsewhere, prefix = locate(uri, store.uri, field=field)
    if elsewhere.uri != store.uri:
        raise ValueError(f"{field}: {uri!r} is not below --root {store.uri}; set --root {elsewhere.uri}")
    return prefix, read_manifest(store, prefix, field=field)


def read_manifest(store: ObjectStore, prefix: str, *, field: str = "uri") -> Manifest:
    """A dataset's manifest.

    Raises:
        ValueError: There is none.
        ContractError: It is of another format.
    """
    try:
        return load_manifest(store, prefix)
    except ObjectNotFoundError as error:
        raise ValueError(f"{field}: {error.uri} is not there; the dataset does not exist or is not complete") from None


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


def run_config(store: ObjectStore, run_id: str) -> dict[str, Any]:
    """A run's ``config.json`` as it is: one that another version wrote is of use, too; empty where there is none."""
    try:
        config = json.loads(store.read(f"{run_prefix(run_id)}/config.json"))
    except (ObjectNotFoundError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def base_folder(base: str) -> Path:
    """Where base weights are, once they are converted; what they predict does not matter here.

    Args:
        base: As ``model.base``.

    Raises:
        ValueError: They are not there, or not converted yet.
    """
    try:
        return ModelConfig(base=base, base_prediction_type="epsilon").directory
    except ValidationError as error:
        raise ValueError(f"--base: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
