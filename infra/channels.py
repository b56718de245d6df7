"""Channels: small pointers (``latest``, ``best``, ``stable``) to bundles, moved by compare-and-swap; and `pull`.

A pointer names a bundle and the sha256 of its manifest, which names the sha256 of every file: who trusts the pointer
can check all of the rest. The rules that hold whoever moves a channel are in `move_channel`: ``latest`` does not go
back within a run, ``stable`` goes only through the validation gate, and what is pointed to is there and stays.
"""

import contextlib
import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infra.bundles import (
    MANIFEST_NAME,
    BundleManifest,
    OnProgress,
    fetch_files,
    load_bundle,
    manifest_sha256,
    parse_manifest,
)
from infra.errors import ContractError, TransientError
from infra.gates import Gate, PassedGate, pass_gate
from infra.reading import reading
from infra.storage import ConflictError, ObjectNotFoundError, ObjectStore, check_key, sha256_of_bytes

STABLE: Final = "stable"
"""The channel that has a gate."""
FORMAT_VERSION: Final = 1

_log = logging.getLogger(__name__)
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_MAX_TRIES = 1000
_MAX_RESTARTS = 20
_LONGEST_MOVE_BYTES = 10**9
"""A mover's lease lasts as long as it takes to read so much: longer than a store is waited for."""


class ChannelPointer(BaseModel):
    """Where a channel points.

    Attributes:
        format_version: Of this record.
        channel: The channel's name.
        bundle: Prefix of the bundle in the store.
        manifest_sha256: Of the bundle's ``MANIFEST.json``.
        run_id: Run that the bundle belongs to.
        step: Its step.
        metrics: By which it was chosen.
        moved_at: ISO 8601, UTC; set when the channel moves.
        previous: The bundle that it pointed to before.
        gate: What ``stable`` has passed to point here; None for other channels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = FORMAT_VERSION
    channel: str
    bundle: str
    manifest_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    run_id: str
    step: int = Field(ge=0)
    metrics: dict[str, float] = Field(default_factory=dict)
    moved_at: str = ""
    previous: str | None = None
    gate: PassedGate | None = None


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
    """Return a pointer to a complete bundle, not yet written anywhere; metrics that are no numbers are left out.

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
        metrics={metric: value for metric, value in (metrics or {}).items() if math.isfinite(value)},
    )


def read_channel(store: ObjectStore, name: str, *, parent: str = "") -> ChannelPointer | None:
    """Return where a channel points, None if it was never moved.

    Raises:
        ContractError: What stands there is no pointer.
    """
    return _read(store, channel_key(name, parent))[0]


def named_bundles(store: ObjectStore) -> set[str]:
    """Return the bundles that the store's own channels name: those they point to, and those they pointed to before.

    Raises:
        ContractError: What stands in a channel is no pointer; nobody can say then what it names.
    """
    keys = [info.key for info in store.list("channels/") if info.key.endswith(".json")]
    pointers = [pointer for pointer in (_read(store, key)[0] for key in keys) if pointer is not None]
    previous = {pointer.previous for pointer in pointers if pointer.previous is not None}
    return previous | {pointer.bundle for pointer in pointers}


# -------------------------------------------------------------------------------------------------------------- moving


def move_channel(
    store: ObjectStore,
    name: str,
    pointer: ChannelPointer,
    may_replace: MayReplace,
    *,
    parent: str = "",
    gate: Gate | None = None,
) -> ChannelPointer | None:
    """Let a channel point elsewhere, if it may; among any number of movers each sees what it replaces.

    ``latest`` never goes to a lower step of the same run, and ``stable`` only through the gate, whatever
    ``may_replace`` says. A channel that points to this bundle already is left as it is.

    Args:
        store: Where the channels are.
        name: The channel.
        pointer: Where to; its ``moved_at``, ``previous`` and ``gate`` are set here.
        may_replace: Asked with the pointer that stands, None if there is none; asked again whenever somebody else moved
            the channel meanwhile.
        parent: Prefix of what the channel belongs to; empty for the store's own.
        gate: Which report, and how good it must be; ``stable`` does not move without one.

    Returns:
        The pointer that stands now, None if it may not be replaced.

    Raises:
        GateError: The gate refuses.
        ContractError: The pointer is another channel's, or its bundle is not there; or ``stable`` without a gate.
        TransientError: The store takes no write.
    """
    if pointer.channel != name:
        raise ContractError(f"channel: pointer of {pointer.channel!r} given for {name!r}")
    # Who deletes bundles sees the lease, or where the channel points; and if the bundle is gone, we see that. A run's
    # own channel needs none: the run itself deletes its checkpoints, after it has moved the channel.
    lease = contextlib.nullcontext() if parent else reading(store, pointer.bundle, _LONGEST_MOVE_BYTES)
    with lease:
        found = manifest_sha256(store, pointer.bundle)
        if found != pointer.manifest_sha256:
            raise ContractError(
                f"channel {name}: the pointer says manifest sha256 {pointer.manifest_sha256}, {pointer.bundle} has "
                f"{found}"
            )
        current = _read(store, channel_key(name, parent))[0]
        if current is not None and (current.bundle, current.manifest_sha256) == (pointer.bundle, found):
            return current
        passed = _pass_gate(store, pointer, gate) if name == STABLE else None
        return _swap(store, channel_key(name, parent), pointer.model_copy(update={"gate": passed}), may_replace)


def _pass_gate(store: ObjectStore, pointer: ChannelPointer, gate: Gate | None) -> PassedGate:
    if gate is None:
        raise ContractError(
            f"channel {STABLE}: moves only through the validation gate, and none was given for {pointer.bundle}"
        )
    # The bundle's own manifest says what it is, not the pointer.
    bundle = load_bundle(store, pointer.bundle)
    return pass_gate(store, gate, bundle.run_id, bundle.step)


def _swap(store: ObjectStore, key: str, pointer: ChannelPointer, may_replace: MayReplace) -> ChannelPointer | None:
    for _ in range(_MAX_TRIES):
        current, etag = _read(store, key)
        if current is not None and _same(current, pointer):
            return current
        goes_back = (
            pointer.channel == "latest"
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


def _same(one: ChannelPointer, other: ChannelPointer) -> bool:
    return (one.bundle, one.manifest_sha256) == (other.bundle, other.manifest_sha256)


# ------------------------------------------------------------------------------------------------------------- pulling


@dataclass(frozen=True)
class Pulled:
    """What a pull brought.

    Attributes:
        bundle: Prefix of the bundle.
        manifest: Its manifest; as ``MANIFEST.json`` it lies in the folder, too.
        manifest_sha256: Of that file.
        pointer: Where the channel pointed; None where a bundle was named.
        is_changed: Whether the folder held another version before, or none.
        num_restarts: How often the bundle was deleted meanwhile, and the channel asked again.
    """

    bundle: str
    manifest: BundleManifest
    manifest_sha256: str
    pointer: ChannelPointer | None
    is_changed: bool
    num_restarts: int = 0


def pull(
    store: ObjectStore,
    name: str,
    to: Path,
    *,
    if_changed: bool = False,
    on_progress: OnProgress | None = None,
) -> Pulled:
    """Bring what a channel points to, or a bundle, to a local folder, with every hash verified.

    While it is read it is not deleted. Who has no right to write cannot see to that: if the bundle is deleted under the
    pull, it starts again from the channel.

    Args:
        store: Where from.
        name: A channel's name, or a bundle's prefix (which has a slash).
        to: The folder: see `infra.bundles.fetch_bundle`.
        if_changed: Where the folder holds this version already, by the sha256 of its manifest and the files' sizes, be
            content with that; nothing of the bundle is read then, neither there nor here.
        on_progress: Hears of the bytes.

    Returns:
        What is in the folder now.

    Raises:
        ValueError: There is no such channel or bundle, or the folder holds something else.
        ContractError: The bundle's manifest is not the one that the pointer names.
        TransientError: A file is not what the manifest says.
    """
    for num_restarts in range(_MAX_RESTARTS):
        pointer = None if "/" in name else _pointer(store, name)
        bundle = name.rstrip("/") if pointer is None else pointer.bundle
        if if_changed and pointer is not None and (held := _held(to, pointer.manifest_sha256)) is not None:
            return Pulled(bundle, held, pointer.manifest_sha256, pointer, is_changed=False, num_restarts=num_restarts)
        try:
            return _pull_bundle(store, bundle, pointer, to, if_changed, on_progress, num_restarts)
        except ObjectNotFoundError as error:
            if pointer is None:
                raise ValueError(
                    f"bundle: {error.uri} is not there; the bundle does not exist or is not complete"
                ) from None
            _log.info("channel %s: %s is gone, the pull starts again", name, error.uri)
    raise TransientError(f"channel {name}: what it points to was deleted {_MAX_RESTARTS} times while it was pulled")


def _pull_bundle(
    store: ObjectStore,
    bundle: str,
    pointer: ChannelPointer | None,
    to: Path,
    if_changed: bool,
    on_progress: OnProgress | None,
    num_restarts: int,
) -> Pulled:
    """One attempt of `pull`.

    Raises:
        ObjectNotFoundError: The bundle is not there, or no longer.
    """
    num_bytes = parse_manifest(_checked(store, bundle, pointer), store.uri_of(bundle)).num_bytes
    with reading(store, bundle, num_bytes):
        data = _checked(store, bundle, pointer)
        sha256 = sha256_of_bytes(data)
        held = _held(to, sha256)
        if held is None or not if_changed:
            manifest = fetch_files(store, bundle, data, to, on_progress=on_progress)
        else:
            manifest = held
        return Pulled(bundle, manifest, sha256, pointer, is_changed=held is None, num_restarts=num_restarts)


def _checked(store: ObjectStore, bundle: str, pointer: ChannelPointer | None) -> bytes:
    """A bundle's manifest, which is the one that the pointer names."""
    key = f"{check_key(bundle)}/{MANIFEST_NAME}"
    data = store.read(key)
    sha256 = sha256_of_bytes(data)
    if pointer is None or sha256 == pointer.manifest_sha256:
        return data
    if _pointer(store, pointer.channel) != pointer:  # deleted, made again, and not pointed to any more
        raise ObjectNotFoundError(key, store.uri_of(key))
    raise ContractError(
        f"channel {pointer.channel}: the pointer says manifest sha256 {pointer.manifest_sha256}, {bundle} has {sha256}"
        "; the bundle was tampered with"
    )


def _held(to: Path, sha256: str) -> BundleManifest | None:
    """The manifest in a folder, if it is this one and all files are there in their sizes."""
    try:
        data = (to / MANIFEST_NAME).read_bytes()
    except OSError:
        return None
    if sha256_of_bytes(data) != sha256:
        return None
    manifest = parse_manifest(data, str(to))
    paths = ((to / file.name, file.num_bytes) for file in manifest.files)
    return manifest if all(path.is_file() and path.stat().st_size == size for path, size in paths) else None


def _pointer(store: ObjectStore, name: str) -> ChannelPointer:
    pointer = read_channel(store, name)
    if pointer is None:
        raise ValueError(
            f"channel: {name!r} points to nothing in {store.uri}; publish first, or name a bundle's prefix"
        )
    return pointer


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
