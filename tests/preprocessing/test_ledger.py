"""The ledger: what is remembered, for how long, by whom; and what is due."""

import io
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import ContractError, GateError, TransientError
from infra.storage import ObjectStore, open_store
from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.manifest import Manifest, dataset_prefix
from preprocessing.contracts.reasons import Reason
from preprocessing.download import stage as stage_module
from preprocessing.download.addresses import Verdict
from preprocessing.download.fetch import FetchedRow
from preprocessing.download.images import NormalizedImage
from preprocessing.download.ledger import LEDGER_PREFIX, MEMORY, Ledger, Memory, due, due_after, read_entries
from preprocessing.download.stage import DownloadStage
from preprocessing.stage import run_stage
from tests.preprocessing.given import Given, rows_of

CONFIG = DownloadConfig()
OTHER_CONFIG = DownloadConfig(allow_networks=("127.0.0.0/8",))
START = datetime(2026, 3, 1, tzinfo=UTC)
ONE, TWO = "1" * 64, "2" * 64
URL = "http://a.example/1.jpg"
ROWS = rows_of([URL])
UID = ROWS.column("uid")[0].as_py()
PICTURE = NormalizedImage(b"x", 1, 1, 1, 1, "0")


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "store"))


def ledger(store: ObjectStore, days: float = 0, dataset: str = TWO, config: DownloadConfig = CONFIG) -> Ledger:
    return Ledger(store, dataset, config, now=lambda: START + timedelta(days=days))


def note(store: ObjectStore, result: NormalizedImage | Verdict, days: float = 0, dataset: str = ONE) -> None:
    ledger(store, days, dataset).record(0, ROWS, {UID: result})


def test_every_reason_of_the_download_has_a_memory() -> None:
    reasons = list(Reason)
    first, last = reasons.index(Reason.URL_REFUSED), reasons.index(Reason.DOWNLOAD_FAILED)
    assert set(MEMORY) == {*reasons[first : last + 1], Reason.ASPECT_EXTREME}


def test_what_is_gone_is_not_asked_for_while_it_is_remembered(store: ObjectStore) -> None:
    note(store, (Reason.HTTP_CLIENT_ERROR, "HTTP 404 Not Found"))
    assert ledger(store, 29.9).remembered(ROWS) == {
        UID: (Reason.HTTP_CLIENT_ERROR, "remembered since 2026-03-01: HTTP 404 Not Found")
    }
    assert ledger(store, 30.1).remembered(ROWS) == {}
    other_caption = rows_of([URL], uid="f" * 32)
    assert list(ledger(store, 1).remembered(other_caption)) == ["f" * 32]
    assert ledger(store, 1).remembered(rows_of(["http://a.example/2.jpg"])) == {}


def test_a_no_is_for_ever_whatever_comes_later(store: ObjectStore) -> None:
    note(store, (Reason.OPTED_OUT, "X-Robots-Tag: noai"))
    note(store, PICTURE, days=1)
    note(store, (Reason.TIMED_OUT, ""), days=2)
    for days, dataset, config in ((0.1, ONE, CONFIG), (9999, TWO, OTHER_CONFIG)):
        found = ledger(store, days, dataset, config).remembered(ROWS)
        assert found == {UID: (Reason.OPTED_OUT, "remembered since 2026-03-01: X-Robots-Tag: noai")}
    assert due(store, START + timedelta(days=9999)).is_empty()


def test_a_dataset_is_not_told_what_it_noted_itself(store: ObjectStore) -> None:
    """Interrupted and started again, it ends as if it had not been."""
    note(store, (Reason.HTTP_CLIENT_ERROR, "HTTP 404"), dataset=ONE)
    assert ledger(store, 1, dataset=ONE).remembered(ROWS) == {}
    assert ledger(store, 1, dataset=TWO).remembered(ROWS) != {}


def test_what_our_limits_refused_is_asked_for_under_others(store: ObjectStore) -> None:
    note(store, (Reason.URL_REFUSED, "127.0.0.1 is loopback"))
    assert ledger(store, 1).remembered(ROWS) != {}
    assert ledger(store, 1, config=OTHER_CONFIG).remembered(ROWS) == {}
    slower = CONFIG.model_copy(update={"num_threads": 1})  # changes no result
    assert ledger(store, 1, config=slower).remembered(ROWS) != {}


def test_what_may_pass_is_asked_for_by_whoever_has_it_and_is_due_later_each_time(store: ObjectStore) -> None:
    waits = []
    for day in range(4):
        note(store, (Reason.HOST_UNKNOWN, "nowhere"), days=day)
        (row,) = due(store, START + timedelta(days=99)).to_dicts()
        assert (row["uid"], row["outcome"], row["num_attempts"]) == (UID, "host_unknown", day + 1)
        waits.append((row["due_at"] - START).days - day)
        assert due(store, row["due_at"] - timedelta(seconds=1)).is_empty()
    assert waits == [1, 2, 4, 8]
    assert ledger(store, 5).remembered(ROWS) == {}


def test_what_came_at_last_is_no_longer_due(store: ObjectStore) -> None:
    note(store, PICTURE)
    assert list(store.list(LEDGER_PREFIX)) == []  # at the first asking: its dataset says so
    note(store, (Reason.TIMED_OUT, ""), days=1)
    note(store, PICTURE, days=2)
    assert due(store, START + timedelta(days=99)).is_empty()
    assert read_entries(store).sort("at")["outcome"].to_list() == ["timed_out", "arrived"]


def test_what_is_gone_becomes_due_again(store: ObjectStore) -> None:
    note(store, (Reason.HTTP_CLIENT_ERROR, "HTTP 410"))
    assert due(store, START + timedelta(days=29)).is_empty()
    assert due(store, START + timedelta(days=31))["uid"].to_list() == [UID]


def test_the_same_content_is_one_part(store: ObjectStore) -> None:
    both = [ledger(store, dataset=ONE) for _ in range(2)]
    for one in both:
        assert one.remembered(ROWS) == {}  # each looks before the other notes
    for one in both:
        one.record(0, ROWS, {UID: (Reason.OPTED_OUT, "noai")})
    assert len(list(store.list(f"{LEDGER_PREFIX}/"))) == 1
    note(store, (Reason.OPTED_OUT, "noai"))  # by one that knows of the attempt: another content, and nothing replaced
    assert sorted(read_entries(store)["num_attempts"].to_list()) == [1, 2]


def test_a_part_of_another_schema_is_refused(store: ObjectStore) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"uid": ["x"]}), buffer)
    store.put(f"{LEDGER_PREFIX}/{ONE[:16]}/00000-0.parquet", buffer.getvalue())
    with pytest.raises(ContractError, match=r"00000-0\.parquet: not a part of the ledger \(columns \['uid'\]"):
        ledger(store).remembered(ROWS)


@given(
    st.sampled_from([reason for reason, memory in MEMORY.items() if memory is not Memory.FOR_EVER]),
    st.integers(1, 10_000),
)
def test_the_wait_grows_and_has_an_end(reason: Reason, num_attempts: int) -> None:
    now, later = (due_after(reason, n, CONFIG) for n in (num_attempts, num_attempts + 1))
    assert now is not None
    assert later is not None
    assert timedelta(0) < now <= later <= timedelta(days=30)


# ------------------------------------------------------------------------------ the stage, with an engine that is told


class Told:
    """Stands for the engine: says of each URL what it is told, and notes what it is asked."""

    def __init__(self, answers: Mapping[str, NormalizedImage | Verdict]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    def __call__(self, requests: Mapping[int, pa.Table], config: DownloadConfig, scratch: Path) -> Iterator["_Shard"]:
        for index, table in requests.items():
            rows = table.select(["uid", "url"]).to_pylist()
            self.asked += [row["url"] for row in rows]
            yield _Shard(index, [FetchedRow(row["uid"], self.answers.get(row["url"], PICTURE)) for row in rows])


class _Shard:
    def __init__(self, index: int, rows: list[FetchedRow]) -> None:
        self.index = index
        self._rows = rows

    def batches(self) -> Iterator[list[FetchedRow]]:
        yield self._rows


def urls(*names: str) -> list[str]:
    return [f"http://a.example/{name}" for name in names]


ANSWERS: dict[str, Verdict] = {
    "http://a.example/gone": (Reason.HTTP_CLIENT_ERROR, "HTTP 404"),
    "http://a.example/no": (Reason.OPTED_OUT, "noai"),
    "http://a.example/late": (Reason.TIMED_OUT, "silent"),
}


def make(store: ObjectStore, selected: Manifest, config: DownloadConfig = CONFIG) -> Manifest:
    return run_stage(store, DownloadStage(store, selected, config))


def details(store: ObjectStore, manifest: Manifest) -> dict[str, tuple[str, str]]:
    prefix = dataset_prefix(manifest.stage, manifest.digest)
    tables = [pq.read_table(io.BytesIO(store.read(f"{prefix}/{file.name}"))) for file in manifest.files("rejects")]
    return {row["url"]: (row["reason"], row["detail"]) for table in tables for row in table.to_pylist()}


def test_the_next_dataset_does_not_ask_for_what_is_remembered(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Told(ANSWERS)
    monkeypatch.setattr(stage_module, "fetch_shards", engine)
    shards = [urls("1", "gone", "no"), urls("2", "late"), urls("gone?", "3")]
    first = make(store, run_stage(store, Given(shards)))
    assert first.dropped == {"http_client_error": 1, "opted_out": 1, "timed_out": 1}
    engine.asked.clear()
    later = make(store, run_stage(store, Given([[*shards[0], *urls("4")], shards[1], urls("no", "gone")])))
    # `later` has been asked again, and the shard with nothing to ask did not go to the engine at all.
    assert sorted(engine.asked) == urls("1", "2", "4", "late")
    assert later.dropped == {"http_client_error": 2, "opted_out": 2, "timed_out": 1}
    for shard in later.shards:
        assert shard.num_in == shard.num_out + sum(shard.dropped.values())
    found = details(store, later)
    assert found["http://a.example/late"] == ("timed_out", "silent")
    assert found["http://a.example/no"][1].endswith(": noai")
    assert found["http://a.example/no"][1].startswith("remembered since 20")
    entries = read_entries(store).filter(pl.col("outcome") == "timed_out").sort("at")
    assert entries["num_attempts"].to_list() == [1, 2]


def test_what_is_remembered_is_no_sign_of_a_network(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is down, and part of the rows are known to be gone: nothing is committed."""
    monkeypatch.setattr(stage_module, "fetch_shards", Told(ANSWERS))
    make(store, run_stage(store, Given([urls("gone", "1")])))
    down: dict[str, Verdict] = dict.fromkeys(urls("2", "3"), (Reason.CONNECTION_FAILED, "refused"))
    monkeypatch.setattr(stage_module, "fetch_shards", Told(ANSWERS | down))
    selected = run_stage(store, Given([urls("gone", "2"), urls("3"), []]))
    with pytest.raises(TransientError, match=r"0 of 3 pictures arrived .*nothing of it is kept"):
        make(store, selected)
    digest = DownloadStage(store, selected, CONFIG).digest
    reports = [info.key for info in store.list(f"{dataset_prefix('download', digest)}/reports/")]
    assert [key[-10:] for key in reports] == ["00002.json"]  # the empty one
    # Only the empty one was committed, which says nothing about the network either.
    with pytest.raises(TransientError):
        make(store, selected)


def test_a_bad_shard_ends_the_run_and_is_not_kept(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    bad: dict[str, Verdict] = dict.fromkeys(urls("3", "4"), (Reason.HOST_UNKNOWN, ""))
    engine = Told(ANSWERS | bad)
    monkeypatch.setattr(stage_module, "fetch_shards", engine)
    selected = run_stage(store, Given([urls("1", "2", "gone"), urls("3", "4", "5"), urls("6")]))
    strict = CONFIG.model_copy(update={"min_shard_success_rate": 0.5})
    with pytest.raises(
        GateError, match=r"1 of 3 .*shard 1: 0\.333 is under download\.min_shard_success_rate = 0\.5; it is not kept"
    ):
        make(store, selected, strict)
    assert urls("6")[0] not in engine.asked
    prefix = dataset_prefix("download", DownloadStage(store, selected, strict).digest)
    assert [info.key[-10:-5] for info in store.list(f"{prefix}/reports/")] == ["00000"]
    monkeypatch.setattr(stage_module, "fetch_shards", Told({}))  # another day
    manifest = make(store, selected, strict)
    assert [shard.num_out for shard in manifest.shards] == [2, 3, 1]
    # What is remembered counts neither way.
    assert make(store, run_stage(store, Given([urls("gone", "7")])), strict).num_out == 1
