"""Leases of readers: what is being read is not deleted under them.

Who reads a bundle that may be deleted leaves a lease beside it, an object that says until when, and takes it away at
the end. Who deletes one looks for leases before and after the manifest is gone (`infra.bundles.delete_bundle`). So
either the deleter sees the reader, or the reader sees that there is no bundle any more: never half of one.
"""

import contextlib
import logging
import time
import uuid
from collections.abc import Iterator
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from infra.errors import TransientError
from infra.storage import ObjectNotFoundError, ObjectStore

_log = logging.getLogger(__name__)

LEASE_PREFIX: Final = "READING-"

_SHORTEST_S: Final = 120.0
_SLOWEST_BYTES_PER_S: Final = 1e6


class _Lease(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    expires_at: float


@contextlib.contextmanager
def reading(store: ObjectStore, prefix: str, num_bytes: int) -> Iterator[None]:
    """Within, nobody who asks `is_being_read` deletes what lies under a prefix.

    A reader who may not write goes on without a lease; one that is killed leaves a lease that runs out.

    Args:
        store: Where it lies.
        prefix: What is read. Read its manifest, or read it again, within.
        num_bytes: How much there is to read: a lease lasts as long as that may take.
    """
    key = f"{prefix}/{LEASE_PREFIX}{uuid.uuid4().hex}.json"
    lease = _Lease(expires_at=time.time() + _SHORTEST_S + num_bytes / _SLOWEST_BYTES_PER_S)
    is_written = False
    try:
        store.put(key, lease.model_dump_json().encode())
        is_written = True
    except (ValueError, TransientError, OSError) as error:
        _log.info("%s: read without a lease: %s", store.uri_of(prefix), error)
    try:
        yield
    finally:
        if is_written:
            with contextlib.suppress(ValueError, TransientError, OSError):
                store.delete(key)


def is_being_read(store: ObjectStore, prefix: str) -> bool:
    """Return whether somebody holds a lease that has not run out."""
    for info in store.list(f"{prefix}/{LEASE_PREFIX}"):
        with contextlib.suppress(ObjectNotFoundError, ValidationError):
            if _Lease.model_validate_json(store.read(info.key)).expires_at > time.time():
                return True
    return False
