"""Channels: small pointers (``latest``, ``best``, ``stable``) to bundles, moved by compare-and-swap; and `pull`.

A pointer names a bundle and the sha256 of its manifest, which names the sha256 of every file: who trusts the pointer
can check all of the rest.
"""

import logging
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infra.bundles import MANIFEST_NAME, BundleManifest, fetch_files, load_bundle, manifest_sha256
from infra.errors import ContractError, TransientError
from infra.storage import ConflictError, ObjectNotFoundError, ObjectStore, check_key, sha256_of_bytes

_log = logging.getLogger(__name__)
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_MAX_TRIES = 1000


class ChannelPointer(BaseModel):
    """Where a channel points.

    Attributes:
        channel: The channel's name.
        bundle: Prefix of the bundle in the store.
        manifest_sha256: Of the bundle's ``MANIFEST.json``.
        run_id: Run that the bundle belongs to.
        step: Its step.
        metrics: By which it was chosen.
        moved_at: ISO 8601, UTC; set when the channel moves.
        previous: The bundle that it pointed to before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    channel: str
    bundle: str
    manifest_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    run_id: str
    step: int = Field(ge=0)
    metrics: dict[str, float] = Field(default_factory=dict)
    moved_at: str = ""
    previous: str | None = None


MayReplace = Callable[[ChannelPointer | None], bool]


def channel_key(name: str, parent: str = "") -> str:
    """Return a channel's key in the store.

    Args:
        name: The channel's.
        parent: Prefix of what it belongs to, such as a run; empty for the store's own channels.

    Raises:
        ValueError: It is no name of a channel.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"channel: {name!r} is no channel's name; use lower-case letters, digits, '-' and '_'")
    return f"{parent}/channels/{name}.json" if parent else f"channels/{name}.json"


def pointer_to(
    store: ObjectStore, channel: str, prefix: str, metrics: dict[str, float] | None = None
) -> ChannelPointer:
    """Return a pointer to a complete bundle, not yet written anywhere.

    Raises:
        ObjectNotFoundError: There is no complete bundle.
    """
    manifest = load_bundle(store, prefix)
    return ChannelPointer(
        channel=channel,
        bundle=prefix,
        manifest_sha256=manifest_sha256(store, prefix),
        run_id=manifest.run_id,
        step=manifest.step,
        metrics=dict(metrics or {}),
    )


def read_channel(store: ObjectStore, name: str, *, parent: str = "") -> ChannelPointer | None:
    """Return where a channel points, None if it was never moved.

    Raises:
        ContractError: What stands there is no pointer.
    """
    return _read(store, channel_key(name, parent))[0]


def move_channel(
    store: ObjectStore, name: str, pointer: ChannelPointer, may_replace: MayReplace, *, parent: str = ""
) -> ChannelPointer | None:
    """Let a channel point elsewhere, if it may; among any number of movers each sees what it replaces.

    ``latest`` never goes to a lower step of the same run, whatever ``may_replace`` says. A channel that points to this
    bundle already is left as it is.

    Args:
        store: Where the channels are.
        name: The channel.
        pointer: Where to; its ``moved_at`` and ``previous`` are set here.
        may_replace: Asked with the pointer that stands, None if there is none; asked again whenever somebody else moved
            the channel meanwhile.
        parent: Prefix of what the channel belongs to; empty for the store's own.

    Returns:
        The pointer that stands now, None if it may not be replaced.

    Raises:
        ContractError: The pointer is another channel's, or its bundle is not there.
        TransientError: The store takes no write.
    """
    if pointer.channel != name:
        raise ContractError(f"channel: pointer of {pointer.channel!r} given for {name!r}")
    found = manifest_sha256(store, pointer.bundle)
    if found != pointer.manifest_sha256:
        raise ContractError(
            f"channel {name}: the pointer says manifest sha256 {pointer.manifest_sha256}, {pointer.bundle} has {found}"
        )
    key = channel_key(name, parent)
    for _ in range(_MAX_TRIES):
        current, etag = _read(store, key)
        if current is not None and (current.bundle, current.manifest_sha256) == (pointer.bundle, found):
            return current
        goes_back = (
            name == "latest"
            and current is not None
            and current.run_id == pointer.run_id
            and pointer.step < current.step
        )
        if goes_back or not may_replace(current):
            return None
        moved = pointer.model_copy(
            update={
                "moved_at": datetime.now(UTC).isoformat(timespec="microseconds"),
                "previous": None if current is None else current.bundle,
            }
        )
        try:
            store.compare_and_swap(key, moved.model_dump_json(indent=1).encode(), etag)
        except ConflictError:
            continue  # somebody else moved it: look again
        return moved
    raise TransientError(f"{store.uri_of(key)}: {_MAX_TRIES} moves were overtaken by others")


def pull(store: ObjectStore, name: str, to: Path) -> BundleManifest:
    """Bring what a channel points to, or a bundle, to a local folder, with every hash verified.

    Args:
        store: Where from.
        name: A channel's name, or a bundle's prefix (which has a slash).
        to: The folder: see `infra.bundles.fetch_bundle`.

    Returns:
        The bundle's manifest; as ``MANIFEST.json`` it lies in the folder, too.

    Raises:
        ValueError: There is no such channel or bundle, or the folder holds something else.
        ContractError: The bundle's manifest is not the one that the pointer names.
        TransientError: A file is not what the manifest says.
    """
    if "/" in name:
        return fetch_files(store, name, _read_manifest(store, name), to)
    pointer = read_channel(store, name)
    if pointer is None:
        raise ValueError(
            f"channel: {name!r} points to nothing in {store.uri}; publish first, or name a bundle's prefix"
        )
    data = _read_manifest(store, pointer.bundle)
    if sha256_of_bytes(data) != pointer.manifest_sha256:
        raise ContractError(
            f"channel {name}: the pointer says manifest sha256 {pointer.manifest_sha256}, "
            f"{pointer.bundle} has {sha256_of_bytes(data)}; the bundle was tampered with"
        )
    return fetch_files(store, pointer.bundle, data, to)


def _read_manifest(store: ObjectStore, prefix: str) -> bytes:
    try:
        return store.read(f"{check_key(prefix)}/{MANIFEST_NAME}")
    except ObjectNotFoundError as error:
        raise ValueError(f"bundle: {error.uri} is not there; the bundle does not exist or is not complete") from None


def _read(store: ObjectStore, key: str) -> tuple[ChannelPointer | None, str | None]:
    try:
        data, etag = store.read_with_etag(key)
    except ObjectNotFoundError:
        return None, None
    try:
        return ChannelPointer.model_validate_json(data), etag
    except ValidationError as error:
        first = error.errors()[0]
        raise ContractError(
            f"{store.uri_of(key)}: not a channel's pointer "
            f"({'.'.join(map(str, first['loc'])) or 'whole'}: {first['msg']}); put it right by hand"
        ) from error
