"""Tombstones: what they match, and that nothing is lost whoever writes at once."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from infra.errors import ContractError
from infra.storage import ObjectStore, open_store
from preprocessing.contracts import tombstones
from preprocessing.contracts.config import DownloadConfig, SelectConfig, SourceConfig
from preprocessing.contracts.digests import uid_of
from preprocessing.contracts.manifest import DatasetFile, Manifest, ShardReport, dataset_prefix
from preprocessing.contracts.reasons import Reason
from preprocessing.contracts.tombstones import TOMBSTONES_PREFIX, Kind, Tombstone, Tombstones, normalized_url
from preprocessing.download.ledger import Ledger
from preprocessing.download.stage import DownloadStage, read_selected
from preprocessing.select import SelectStage
from preprocessing.stage import run_stage
from tests.preprocessing.given import Given

URL = "https://pictures.example.com:8443/a/b.jpg?size=1"
SHA256 = "ab" * 32


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "store"))


def _of(kind: Kind, value: str) -> Tombstones:
    return Tombstones([Tombstone.of(kind, value)])


@pytest.mark.parametrize(
    ("kind", "value", "row", "is_named"),
    [
        ("url", URL, {"url": URL}, True),
        ("url", f"  {URL}#part ", {"url": URL}, True),
        ("url", "HTTPS://Pictures.Example.com:8443/a/b.jpg?size=1", {"url": URL}, True),
        ("url", URL, {"url": URL.replace("a/b", "A/b")}, False),
        ("url", URL, {"url": URL + "0"}, False),
        ("host", "example.com", {"url": URL}, True),
        ("host", "Pictures.example.com.", {"url": URL}, True),
        ("host", "*.example.com", {"url": "http://user@x.y.EXAMPLE.com./c"}, True),
        ("host", "example.com", {"host": "www.example.com"}, True),
        ("host", "example.com", {"url": "https://notexample.com/a"}, False),
        ("host", "example.com", {"url": "https://elsewhere.net/example.com"}, False),
        ("host", "pictures.example.com", {"url": "https://example.com/"}, False),
        ("host", "[::1]", {"url": "http://[::1]:80/a"}, True),
        ("host", "münchen.example", {"url": "https://xn--mnchen-3ya.example/a.jpg"}, True),
        ("host", "xn--mnchen-3ya.example", {"url": "https://a.MÜNCHEN.example:8080/a.jpg"}, True),
        ("host", "*.München.example", {"host": "a.münchen.example."}, True),
        ("host", "b.example", {"url": "https://user:p@ss@b.example/x"}, True),
        ("host", "b.example", {"url": "https://b.example\\x"}, True),
        ("host", "b.example", {"url": "https://a.example/@b.example"}, False),
        ("url", "https://Example.com:443/a.jpg", {"url": "https://example.com/a.jpg"}, True),
        ("url", "http://example.com./a.jpg", {"url": "HTTP://example.com:080/a.jpg"}, True),
        ("url", "http://example.com:443/a.jpg", {"url": "http://example.com/a.jpg"}, False),
        ("url", "https://münchen.example/a", {"url": "https://xn--mnchen-3ya.example/a"}, True),
        ("sha256", SHA256.upper(), {"sha256": SHA256}, True),
        ("sha256", SHA256, {"sha256": "cd" * 32}, False),
        ("uid", uid_of(URL, "cat"), {"uid": uid_of(URL, "cat")}, True),
        ("uid", uid_of(URL, "cat"), {"uid": uid_of(URL, "dog")}, False),
        ("uid", uid_of(URL, "cat"), {"uid": "none"}, False),
    ],
)
def test_what_a_tombstone_matches(kind: Kind, value: str, row: dict[str, str], is_named: bool):
    named = _of(kind, value)
    assert named.match(**row) == (kind if is_named else None)
    columns = {f"{name}s": [row[name], None, ""] for name in row if name != "host"}
    if columns:
        assert named.matches(**columns).tolist() == [is_named, False, False]


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("url", "no address", "url: 'no address' is no address"),
        ("url", "", "url: '' is no address"),
        ("url", "b.org/x", "url: 'b.org/x' is no address with scheme and host"),
        ("url", "//b.org/x", "url: '//b.org/x' is no address with scheme and host"),
        ("host", "https://example.com", "without scheme, port and path"),
        ("host", "example.com:80", "without scheme, port and path"),
        ("host", "", "host: '' is no host"),
        ("sha256", "ab" * 31, "write 64 hexadecimal digits"),
        ("sha256", "zz" * 32, "write 64 hexadecimal digits"),
        ("uid", SHA256, "write 32 hexadecimal digits"),
    ],
)
def test_what_is_none_is_refused_in_one_line(kind: Kind, value: str, message: str):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")) as error:
        Tombstone.of(kind, value)
    assert "\n" not in str(error.value)


@given(st.text(max_size=40), st.sampled_from(["", "https://", "HTTP://u@", "http://[::1]:080", "https://ü:443", "//"]))
@example("\u2100.example", "https://")  # as IDNA it would have a slash
def test_normalizing_again_changes_nothing(text: str, start: str):
    once = normalized_url(start + text)
    assert normalized_url(once) == once


@given(st.text(max_size=40), st.text(max_size=10))
def test_any_row_can_be_asked_about(url: str, uid: str):
    named = Tombstones([Tombstone.of("url", URL), Tombstone.of("host", "a.example"), Tombstone.of("uid", "0" * 32)])
    named.match(uid=uid, url=url, host=url, sha256=uid)


def test_what_is_stored_names_nothing_in_clear(store: ObjectStore):
    assert Tombstones.add(store, [Tombstone.of("url", URL), Tombstone.of("host", "secret.example")]) == 2
    for info in store.list(f"{TOMBSTONES_PREFIX}/"):
        data = store.read(info.key)
        assert b"example" not in data
        assert b"pictures" not in data


def test_adding_again_adds_nothing(store: ObjectStore):
    entries = [Tombstone.of("url", URL), Tombstone.of("sha256", SHA256, reason="opt_out")]
    assert Tombstones.add(store, entries) == 2
    before = [info.key for info in store.list(f"{TOMBSTONES_PREFIX}/")]
    later = [Tombstone.of("url", URL, reason="withdrawn", at=datetime(2030, 1, 1, tzinfo=UTC))]
    assert Tombstones.add(store, [*entries, *later]) == 0
    assert Tombstones.add(store, []) == 0
    assert [info.key for info in store.list(f"{TOMBSTONES_PREFIX}/")] == before
    assert len(Tombstones.load(store)) == 2


def test_the_digest_is_of_what_is_named_alone(store: ObjectStore):
    assert Tombstones.load(store).digest == ""
    assert not len(Tombstones.load(store))
    one, other = Tombstone.of("url", URL), Tombstone.of("host", "a.example", by="somebody", reason="opt_out")
    assert Tombstones([one, other]).digest == Tombstones([other, one, one]).digest != Tombstones([one]).digest


def test_many_files_are_merged_and_nothing_is_lost(store: ObjectStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tombstones, "MAX_PARTS", 4)
    for number in range(14):
        Tombstones.add(store, [Tombstone.of("uid", f"{number:032x}")])
        assert len(list(store.list(f"{TOMBSTONES_PREFIX}/"))) <= 4
    found = Tombstones.load(store)
    assert len(found) == 14
    assert all(found.match(uid=f"{number:032x}") for number in range(14))


def test_writers_at_once_lose_nothing(store: ObjectStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tombstones, "MAX_PARTS", 3)

    def add(writer: int) -> None:
        for number in range(8):
            Tombstones.add(store, [Tombstone.of("uid", f"{writer:016x}{number:016x}")])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    found = Tombstones.load(store)
    assert len(found) == 32


def test_what_is_not_ours_stops_the_reading(store: ObjectStore):
    store.put(f"{TOMBSTONES_PREFIX}/note.parquet", b"not a list")
    with pytest.raises(ContractError, match=r"note\.parquet: no list of tombstones"):
        Tombstones.load(store)


def test_it_is_imported_without_pyarrow():
    heavy = "{'pyarrow', 'torch', 'polars'} & set(sys.modules)"
    code = f"import sys, preprocessing.contracts.tombstones; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_select_refuses_what_is_forgotten_before_others_lose_to_it(tmp_path: Path, store: ObjectStore):
    """Of two rows with one address the one with the smaller uid stays, if it is not forgotten."""
    urls = [f"https://h{number}.example/a.jpg" for number in range(6)] + ["https://h1.example/a.jpg"]
    columns = {
        "URL": urls,
        "TEXT": [f"caption {number}" for number in range(7)],
        "punsafe": [0.01] * 7,
        "pwatermark": [0.1] * 7,
        "WIDTH": [100] * 7,
        "HEIGHT": [100] * 7,
    }
    pq.write_table(pa.table(columns), tmp_path / "metadata.parquet")
    source = SourceConfig(metadata=(str(tmp_path / "metadata.parquet"),), rows_per_shard=4)
    uids = [uid_of(url, f"caption {number}") for number, url in enumerate(urls)]
    winner, loser = sorted([uids[1], uids[6]])
    named: list[tuple[Kind, str]] = [("uid", winner), ("url", urls[0]), ("host", "h5.example")]
    Tombstones.add(store, [Tombstone.of(*name) for name in named])
    for config in (SelectConfig(min_side_px=64), SelectConfig(min_side_px=64, rejects="counts")):
        manifest = run_stage(store, SelectStage(store, source, config))
        assert manifest.dropped == {"forgotten": 3}
        kept = _rows(store, manifest, "rows")
        assert {row["uid"] for row in kept} == set(uids) - {winner, uids[0], uids[5]}
        assert loser in {row["uid"] for row in kept}
        refused = _rows(store, manifest, "rejects")
        if config.rejects == "all":
            assert {row["uid"] for row in refused} == {winner, uids[0], uids[5]}
            assert {(row["url"], row["reason"], row["detail"]) for row in refused} == {(None, "forgotten", None)}


def test_what_the_ledger_remembers_is_written_in_clear_no_more_once_it_is_forgotten(store: ObjectStore):
    urls = ["http://127.0.0.1:9/private.jpg", "http://127.0.0.1:9/other.jpg"]
    config = DownloadConfig.model_validate({"allow_networks": ["127.0.0.0/8"], "retries": 0})
    selected = run_stage(store, Given([urls]))
    table = read_selected(store, selected, 0)
    uids = table.column("uid").to_pylist()
    Ledger(store, "f" * 64, config).record(0, table, dict.fromkeys(uids, (Reason.HTTP_CLIENT_ERROR, "404")))
    Tombstones.add(store, [Tombstone.of("url", urls[0])])
    refused = _rows(store, run_stage(store, DownloadStage(store, selected, config)), "rejects")
    assert {(row["url"], row["reason"]) for row in refused} == {(None, "forgotten"), (urls[1], "http_client_error")}
    assert [row["detail"] for row in refused if row["url"] is None] == [None]


def test_a_manifest_has_new_keys_only_where_they_say_something():
    file = DatasetFile(name="a.parquet", num_bytes=1, sha256=SHA256, num_rows=0)
    plain = ShardReport(index=0, num_in=0, num_out=0, dropped={}, files=(file,))
    assert json.loads(plain.model_dump_json()) == {
        "index": 0,
        "num_in": 0,
        "num_out": 0,
        "dropped": {},
        "files": [
            {"name": "a.parquet", "num_bytes": 1, "sha256": SHA256, "num_rows": 0, "kind": "rows", "split": None}
        ],
    }
    told = {"folder": "datasets/encode/a", "removed": (1,), "without": ("image",)}
    full = plain.model_copy(update={"digest": SHA256, "files": (file.model_copy(update=told),)})
    assert json.loads(full.model_dump_json())["files"][0]["removed"] == [1]
    assert ShardReport.model_validate_json(full.model_dump_json()) == full


def _rows(store: ObjectStore, manifest: Manifest, kind: str) -> list[dict[str, object]]:
    keys = [file.key(dataset_prefix(manifest.stage, manifest.digest)) for file in manifest.files(kind)]
    return [row for key in keys for row in pq.read_table(pa.BufferReader(store.read(key))).to_pylist()]
