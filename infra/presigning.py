"""Addresses for outsiders: every file of a bundle behind a URL that needs no credentials and is valid for a while."""

from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

from boto3.session import Session
from botocore.config import Config
from pydantic import BaseModel, ConfigDict, Field

from infra.bundles import MANIFEST_NAME, parse_manifest
from infra.channels import read_channel
from infra.errors import ContractError
from infra.storage import ObjectNotFoundError, ObjectStore, check_key, sha256_of_bytes
from infra.storage_s3 import S3Store

FORMAT_VERSION: Final = 1
LONGEST_S: Final = 7 * 24 * 3600
"""What S3 allows."""


class PresignedFile(BaseModel):
    """One file.

    Attributes:
        name: Relative to the folder that is to be made.
        num_bytes: Size.
        sha256: Of the content.
        url: Where it can be had until the whole expires, by GET, with ranges.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    num_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    url: str


class PresignedBundle(BaseModel):
    """A bundle for outsiders; whoever has it can read the bundle until it expires.

    Attributes:
        format_version: Of this record.
        channel: By which it was named; None for a bundle's prefix.
        bundle: Prefix of the bundle in the store.
        run_id: Run that it belongs to.
        step: Its step.
        expires_at: ISO 8601, UTC. Addresses that were signed with temporary credentials end with these, if that is
            sooner.
        manifest: ``MANIFEST.json``.
        files: All other files, sorted by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = FORMAT_VERSION
    channel: str | None
    bundle: str
    run_id: str
    step: int = Field(ge=0)
    expires_at: str
    manifest: PresignedFile
    files: tuple[PresignedFile, ...]


def presign(store: ObjectStore, name: str, expires_s: int) -> PresignedBundle:
    """Sign an address for each file of what a channel points to; nothing is read but pointer and manifest.

    Args:
        store: In S3.
        name: A channel's name, or a bundle's prefix (which has a slash).
        expires_s: How long the addresses are valid.

    Raises:
        ValueError: The store is a folder, there is no such channel or bundle, or the time is longer than S3 allows.
        ContractError: The manifest is not the one that the channel names.
    """
    if not isinstance(store, S3Store):
        raise ValueError(f"root: {store.uri} is a folder, which has no addresses to sign; give s3://bucket/prefix")
    if not 0 < expires_s <= LONGEST_S:
        raise ValueError(f"expires: {expires_s} s is out of range; give 1 to {LONGEST_S} s (7 days)")
    pointer = None if "/" in name else read_channel(store, name)
    if pointer is None and "/" not in name:
        raise ValueError(
            f"channel: {name!r} points to nothing in {store.uri}; publish first, or name a bundle's prefix"
        )
    bundle = check_key(name.rstrip("/")) if pointer is None else pointer.bundle
    key = f"{bundle}/{MANIFEST_NAME}"
    try:
        data = store.read(key)
    except ObjectNotFoundError as error:
        raise ValueError(f"bundle: {error.uri} is not there; the bundle does not exist or is not complete") from None
    if pointer is not None and sha256_of_bytes(data) != pointer.manifest_sha256:
        raise ContractError(
            f"channel {name}: the pointer says manifest sha256 {pointer.manifest_sha256}, {bundle} has "
            f"{sha256_of_bytes(data)}; the bundle was tampered with"
        )
    manifest = parse_manifest(data, store.uri_of(key))
    client = _signing_client(store)

    def signed(name: str, num_bytes: int, sha256: str) -> PresignedFile:
        asked = {"Bucket": store.bucket, "Key": f"{store.prefix}{bundle}/{name}"}
        url = client.generate_presigned_url("get_object", Params=asked, ExpiresIn=expires_s)
        return PresignedFile(name=name, num_bytes=num_bytes, sha256=sha256, url=url)

    expires_at = datetime.now(UTC) + timedelta(seconds=expires_s)
    return PresignedBundle(
        channel=None if pointer is None else name,
        bundle=bundle,
        run_id=manifest.run_id,
        step=manifest.step,
        expires_at=expires_at.isoformat(timespec="seconds"),
        manifest=signed(MANIFEST_NAME, len(data), sha256_of_bytes(data)),
        files=tuple(signed(file.name, file.num_bytes, file.sha256) for file in manifest.files),
    )


def _signing_client(store: S3Store) -> Any:  # boto3 makes its classes at run time
    """The store's client, with the signature that every region knows: boto3 does not sign addresses so by itself."""
    config = store.client.meta.config.merge(Config(signature_version="s3v4"))
    return Session().client("s3", config=config)
