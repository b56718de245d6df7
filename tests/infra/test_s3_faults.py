"""Each way in which S3 and the network fail, alone and often. A whole training through all of them: tests/training."""

import random
import time
from pathlib import Path

import pytest

from infra import storage_s3
from infra.errors import TransientError
from infra.s3_server import S3Server
from infra.storage import ObjectStore, open_store
from tests.infra.s3_fault_proxy import RATES, FaultPlan, FaultProxy, running_proxy, waiting_less

READ_TIMEOUT_S = 1.0
SEED = 13  # with which each fault does happen


def _open(root: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
    return open_store(root)


@pytest.mark.parametrize("fault", sorted(RATES))
def test_each_fault_alone(
    s3_root: str, s3_server: S3Server, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third request fails in the same way: puts, conditional puts, reads, ranges, parts, listings."""
    plan = FaultPlan(SEED, {fault: 1 / 2 if fault == "error_in_200" else 1 / 3}, stall_s=1.2 * READ_TIMEOUT_S)
    content = random.Random(0).randbytes(300_000)
    large = random.Random(1).randbytes(6 << 20)
    (tmp_path / "large").write_bytes(large)
    with waiting_less(READ_TIMEOUT_S), running_proxy(s3_server.endpoint_url, plan) as proxy:
        store = _open(s3_root, proxy, monkeypatch)
        for number in range(2):
            store.put_if_absent(f"a{number}", content)
            assert store.read(f"a{number}") == content
            assert store.read_range(f"a{number}", 1000, 200_000) == content[1000:201_000]
            assert store.read_range(f"a{number}", 299_000, 200_000) == content[299_000:]
            etag = store.compare_and_swap(f"a{number}", b"2", store.head(f"a{number}").etag).etag
            assert store.read_with_etag(f"a{number}") == (b"2", etag)
        for number in range(2):
            store.upload(f"large{number}", tmp_path / "large")
        store.download("large0", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == large
        store.delete("a1")
        assert [info.key for info in store.list("a")] == ["a0"]
    assert proxy.done[fault] > 0


def test_patience_ends(s3_root: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that answered is waited for, for as long as patience lasts; one that never did, for five attempts."""
    monkeypatch.setattr(storage_s3, "PATIENCE_S", 1.0)
    with waiting_less(READ_TIMEOUT_S), running_proxy(s3_server.endpoint_url, FaultPlan(None)) as proxy:
        known, unknown = (_open(s3_root, proxy, monkeypatch) for _ in range(2))
        known.put("a", b"1")
        proxy.go_out(0.5)
        assert known.read("a") == b"1"
        proxy.go_out(3600)
        num_before = proxy.num_requests
        with pytest.raises(TransientError, match="cannot be reached"):
            unknown.read("a")
        assert proxy.num_requests - num_before == storage_s3.NUM_FIRST_TRIES
        began = time.monotonic()
        for operation in (lambda: known.read("a"), lambda: known.put("b", b""), lambda: list(known.list())):
            with pytest.raises(TransientError, match="cannot be reached"):
                operation()
        assert time.monotonic() - began > 3 * 0.9
