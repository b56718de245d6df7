"""The record of the last refresh: read back, strange ones refused, and of two at once the later one counts."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from flows.refresh_record import RefreshRecord, end_forgetting, read_record, record_key, write_record
from infra.errors import ContractError
from infra.storage import open_store

START = datetime(2026, 1, 1, tzinfo=UTC)


def record(digit: str, started_after_s: float = 0) -> RefreshRecord:
    return RefreshRecord(
        digest=digit * 64, prefix=f"datasets/encode/{digit * 16}", started_at=START + timedelta(seconds=started_after_s)
    )


def test_it_is_read_back(any_root: str) -> None:
    store = open_store(any_root)
    assert read_record(store, "demo") == (None, None)
    assert write_record(store, "demo", record("a"), None)
    found, etag = read_record(store, "demo")
    assert found == record("a")
    assert write_record(store, "demo", record("b", 1), etag)
    assert json.loads(store.read(record_key("demo")))["digest"] == "b" * 64
    assert read_record(store, "another") == (None, None)


@pytest.mark.parametrize(("after_s", "stands"), [(-1, "b"), (0, "b"), (1, "c")])
def test_of_two_at_once_the_one_that_began_later_counts(any_root: str, after_s: float, stands: str) -> None:
    store = open_store(any_root)
    write_record(store, "demo", record("a"), None)
    _, etag = read_record(store, "demo")
    assert write_record(store, "demo", record("b", 10), etag)
    assert write_record(store, "demo", record("c", 10 + after_s), etag) is (stands == "c")
    found, _ = read_record(store, "demo")
    assert found is not None
    assert found.digest == stands * 64


def test_a_record_of_an_earlier_version_is_read(any_root: str) -> None:
    store = open_store(any_root)
    old = {"format_version": 1, "digest": "a" * 64, "prefix": "datasets/encode/a", "num_out": 3}
    store.put(record_key("demo"), json.dumps(old).encode())
    found, etag = read_record(store, "demo")
    assert found is not None
    assert (found.num_out, found.selection, found.started_at) == (3, None, None)
    assert write_record(store, "demo", record("b"), etag)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"format_version": 2}', b'{"format_version": 1, "digest": 3}'])
def test_a_strange_one_is_refused(tmp_path: object, content: bytes) -> None:
    store = open_store(str(tmp_path))
    store.put(record_key("demo"), content)
    with pytest.raises(ContractError, match="not a refresh ledger of format 1; move it away"):
        read_record(store, "demo")


def test_that_rows_are_forgotten_is_noted_in_the_record_that_they_are_of(any_root: str) -> None:
    store = open_store(any_root)
    made = record("a").model_copy(update={"forget_from": "datasets/encode/b"})
    write_record(store, "demo", made, None)
    end_forgetting(store, "demo", record("c"))
    assert read_record(store, "demo")[0] == made
    end_forgetting(store, "demo", made)
    assert read_record(store, "demo")[0] == record("a")
