"""Claims: who may upload files under a prefix, so that writers of different bytes do not replace each other's files.

A claim is a lease in the store: an object written by compare-and-swap that names its holder and when it runs out. A
holder that dies keeps others waiting for a minute, not for ever. It is no guard against a holder that is stopped in the
middle of an upload for longer than its lease; readers, who check every sha256, would notice that.
"""

import time
from collections.abc import Callable
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from infra.storage import ConflictError, ObjectNotFoundError, ObjectStore

CLAIM_NAME: Final = "CLAIM.json"

_LEASE_S: Final = 60.0
_SLOWEST_BYTES_PER_S: Final = 1e6
_POLL_S: Final = 0.2


class _Lease(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    holder: str
    expires_at: float


class Claim:
    """The right to upload files under a prefix.

    Args:
        store: Where the prefix is.
        prefix: What is claimed.
        holder: Names who holds it. Holders of one name share it: let it name the bytes that are to be written.
        is_over: Says whether somebody finished what the claim is for; then nobody needs it.
    """

    def __init__(self, store: ObjectStore, prefix: str, holder: str, is_over: Callable[[], bool]) -> None:
        self._store = store
        self._key = f"{prefix}/{CLAIM_NAME}"
        self._holder = holder
        self._is_over = is_over
        self._expires_at = 0.0

    def hold(self, num_bytes: int) -> bool:
        """Takes the claim, or makes sure that it is still held for as long as an upload may take.

        Waits while another holds it.

        Args:
            num_bytes: Size of the upload to come.

        Returns:
            False if there is nothing left to do: somebody finished.
        """
        need_s = _LEASE_S / 2 + num_bytes / _SLOWEST_BYTES_PER_S
        if time.time() + need_s < self._expires_at:
            return True
        while not self._take(need_s + _LEASE_S):
            if self._is_over():
                return False
            time.sleep(_POLL_S)
        if self._is_over():  # asked after taking: who finishes gives the claim up, and so it was free
            self.release()
            return False
        return True

    def take_now(self) -> bool:
        """Takes the claim if nobody else holds it; does not wait."""
        return self._take(_LEASE_S)

    def release(self) -> None:
        """Gives the claim up."""
        self._expires_at = 0.0
        self._store.delete(self._key)

    def _take(self, lease_s: float) -> bool:
        lease, etag = self._read()
        now = time.time()
        if lease is not None and lease.holder != self._holder and lease.expires_at > now:
            return False
        wanted = _Lease(holder=self._holder, expires_at=now + lease_s)
        try:
            self._store.compare_and_swap(self._key, wanted.model_dump_json().encode(), etag)
        except ConflictError:
            return False
        self._expires_at = wanted.expires_at
        return True

    def _read(self) -> tuple[_Lease | None, str | None]:
        try:
            data, etag = self._store.read_with_etag(self._key)
        except ObjectNotFoundError:
            return None, None
        try:
            return _Lease.model_validate_json(data), etag
        except ValidationError:
            return None, etag  # of another version: as good as none
