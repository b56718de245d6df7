"""A refresh over generations of a served metadata set: only the difference is asked for and encoded."""

import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prefect.settings import PREFECT_API_URL

from flows import events
from flows.plan import find_dataset, look_up_stages
from flows.prepare import prepare
from flows.refresh import refresh
from flows.refresh_record import record_key
from flows.results import RefreshResult
from flows.verification import verify
from infra.errors import GateError
from infra.storage import ObjectStore, open_store
from preprocessing.contracts.digests import uid_of
from preprocessing.contracts.manifest import load_manifest
from preprocessing.contracts.tombstones import Tombstones
from preprocessing.encode import stage as encode_stage
from tests.flows.conftest import prefect_api  # noqa: F401 - a fixture
from tests.integration.refresh_world import Gallery, config_of, row, running_gallery, write

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("prefect_api")]
NUM_ROWS = 48
FAILING, MISSING = 20, 21


@pytest.fixture
def gallery() -> Iterator[Gallery]:
    with running_gallery() as gallery:
        gallery.status = {f"/{FAILING}": 503, f"/{MISSING}": 404}
        yield gallery


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The captions of the rows that go through the models, from here on."""
    seen: list[str] = []
    prepare = encode_stage.prepare

    def counting(rows: pa.Table, encoders: Any) -> Any:
        seen.extend(rows.column("caption").to_pylist())
        return prepare(rows, encoders)

    monkeypatch.setattr(encode_stage, "prepare", counting)
    return seen


def first_generation(gallery: Gallery) -> list[dict[str, object]]:
    return [row(gallery, index) for index in range(NUM_ROWS)]


def third_generation(gallery: Gallery) -> list[dict[str, object]]:
    """One row is gone, one has another caption, one another score."""
    rows = first_generation(gallery)
    rows[7] = row(gallery, 7, caption="another caption")
    rows[9] = row(gallery, 9, similarity=0.35)
    return [item for index, item in enumerate(rows) if index != 2]


def rows_of(store: ObjectStore, prefix: str) -> dict[str, dict[str, Any]]:
    """Uid → all columns, and the split."""
    found = {}
    for file in load_manifest(store, prefix).files("rows"):
        table = pq.read_table(io.BytesIO(store.read(file.key(prefix))))
        found |= {item["uid"]: item | {"split": file.split} for item in table.to_pylist()}
    return found


def files_of(store: ObjectStore, prefix: str) -> list[tuple[str, str]]:
    return [(file.name, file.sha256) for file in load_manifest(store, prefix).files("rows")]


def gets(asked: Counter[tuple[str, str]]) -> Counter[str]:
    return Counter({path: count for (method, path), count in asked.items() if method == "GET"})


def is_by_reference(store: ObjectStore, prefix: str) -> list[bool]:
    """Of each shard, whether its files stand elsewhere."""
    return [any(file.folder for file in shard.files) for shard in load_manifest(store, prefix).shards]


@pytest.mark.parametrize("keep", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_three_generations(gallery: Gallery, encoded: list[str], tmp_path: Path, keep: bool) -> None:
    metadata, root = tmp_path / "metadata", tmp_path / "store"
    store = open_store(str(root))
    kept = f"retention.keep_pictures={json.dumps(keep)}"
    now, asking = config_of(metadata, kept), config_of(metadata, kept, "refresh.recheck_days=0")

    write(first_generation(gallery), metadata / "a.parquet")
    first = refresh(now, str(root))
    assert gets(gallery.taken()) == {f"/{index}": 1 for index in range(NUM_ROWS)}
    assert (first.num_new, first.num_gone, len(encoded)) == (46, 0, 46)
    encoded.clear()

    write([row(gallery, index) for index in range(NUM_ROWS, NUM_ROWS + 8)], metadata / "b.parquet")
    gallery.opted_out = {"/5"}
    second = refresh(asking, str(root))
    asked = gallery.taken()
    # What failed an hour ago is not due, and what was gone is remembered; all that is held is asked without its bytes.
    assert gets(asked) == {f"/{index}": 1 for index in range(NUM_ROWS, NUM_ROWS + 8)}
    held = set(range(NUM_ROWS)) - {FAILING, MISSING}
    assert Counter({path: n for (method, path), n in asked.items() if method == "HEAD"}) == {f"/{i}": 1 for i in held}
    assert sorted(encoded) == sorted(f"picture {index}" for index in range(NUM_ROWS, NUM_ROWS + 8))
    assert (second.num_new, second.num_gone, second.num_kept, second.num_opted_out) == (8, 1, 45, 1)
    assert is_by_reference(store, second.stages["download"].prefix) == [False, True, True, False]
    assert is_by_reference(store, second.stages["encode"].prefix) == [False, True, True, False]
    assert Tombstones.load(store).match(url=f"{gallery.host}/5") == "url"
    for stage in ("download", "encode"):
        prefix = second.stages[stage].prefix
        assert not verify(store, prefix, load_manifest(store, prefix)).problems
    encoded.clear()

    write(third_generation(gallery), metadata / "a.parquet")
    num_bytes = gallery.num_bytes
    third = refresh(now, str(root))
    # A caption is new, of a picture that is held: where it was deleted, it is fetched again.
    assert gets(gallery.taken()) == ({} if keep else {"/7": 1})
    assert keep == (gallery.num_bytes == num_bytes)
    assert encoded == ["another caption"]
    assert (third.num_new, third.num_gone, third.num_kept, third.num_forgotten) == (1, 2, 51, 1)
    withdrawn = uid_of(f"{gallery.host}/2", "picture 2")
    assert Tombstones.load(store).match(uid=withdrawn) == "uid"
    encoded.clear()

    scratch = refresh(now, str(tmp_path / "scratch"))
    there = open_store(str(tmp_path / "scratch"))
    assert len(encoded) == 52
    for stage in ("select", "download", "encode"):
        assert third.stages[stage].digest == scratch.stages[stage].digest
    # Who has opted out is not even selected any more where that is known.
    assert (third.stages["select"].dropped, scratch.stages["select"].dropped) == ({"forgotten": 1}, {})
    assert Counter(scratch.stages["download"].dropped) - Counter(third.stages["download"].dropped) == {"opted_out": 1}
    assert third.stages["encode"].dropped == scratch.stages["encode"].dropped
    prefix = third.stages["encode"].prefix
    assert rows_of(store, prefix) == rows_of(there, prefix)
    assert files_of(store, prefix) == files_of(there, prefix)
    gallery.taken()

    fourth = refresh(now, str(root))
    assert (fourth.changed, fourth.report, fourth.num_kept) == (False, None, 52)
    assert not gallery.taken()  # nobody was asked
    assert all(summary.was_done for summary in fourth.stages.values())


def make_due(store: ObjectStore) -> None:
    """Moves the time of all rows that wait into the past."""
    for info in list(store.list("ledger/download/")):
        table = pq.read_table(io.BytesIO(store.read(info.key)))
        due = [None if at is None else datetime(2020, 1, 1, tzinfo=UTC) for at in table.column("due_at").to_pylist()]
        place = table.column_names.index("due_at")
        table = table.set_column(place, table.schema.field("due_at"), pa.array(due, table.schema.field("due_at").type))
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        store.put(info.key, buffer.getvalue())


@pytest.mark.soak
def test_rows_that_are_due_are_asked_again_though_the_metadata_is_the_same(
    gallery: Gallery, encoded: list[str], tmp_path: Path
) -> None:
    metadata, root = tmp_path / "metadata", tmp_path / "store"
    store, config = open_store(str(root)), config_of(metadata)
    write(first_generation(gallery)[:32], metadata / "a.parquet")
    first = refresh(config, str(root))
    gallery.taken()
    encoded.clear()

    make_due(store)
    again = refresh(config, str(root))  # they fail again
    assert gets(gallery.taken()) == {f"/{FAILING}": 1, f"/{MISSING}": 1}
    assert (again.changed, encoded) == (False, [])
    assert again.stages["encode"].digest == first.stages["encode"].digest
    round_ = refresh(config, str(root))  # not due now
    assert (round_.changed, round_.stages["download"].was_done) == (False, True)
    assert is_by_reference(store, round_.stages["download"].prefix) == [True, False]
    assert not gallery.taken()

    make_due(store)
    gallery.status = {}
    healed = refresh(config, str(root))
    assert gets(gallery.taken()) == {f"/{FAILING}": 1, f"/{MISSING}": 1}
    assert (healed.num_new, healed.num_gone, healed.num_kept) == (2, 0, 30)
    assert sorted(encoded) == [f"picture {FAILING}", f"picture {MISSING}"]
    # All others find that dataset by the config, which gives the selection before the round.
    assert find_dataset(config, store)[0] == healed.stages["encode"].prefix
    assert prepare(config, str(root)).stages["encode"].digest == healed.stages["encode"].digest
    assert not gallery.taken()
    other = config_of(metadata, "encode.num_mask_variants=2")
    assert [stage.manifest is not None for stage in look_up_stages(other, store)] == [True, True, False]
    scratch = refresh(config, str(tmp_path / "scratch"))
    there = open_store(str(tmp_path / "scratch"))
    assert files_of(store, healed.stages["encode"].prefix) == files_of(there, scratch.stages["encode"].prefix)


def test_a_refused_refresh_leaves_the_last_one_standing(
    gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(events, "dataset_accepted", lambda summary, *_: told.append(summary.digest))
    metadata, root = tmp_path / "metadata", tmp_path / "store"
    store, every = open_store(str(root)), "select.validation_fraction=0"
    config = config_of(metadata, every)
    write(first_generation(gallery)[:16], metadata / "a.parquet")
    first = refresh(config, str(root))
    write(first_generation(gallery)[:4], metadata / "a.parquet")
    for _ in range(2):
        with pytest.raises(GateError, match=r"refresh\.max_lost_share: 12 of the last dataset's 16 rows are gone"):
            refresh(config, str(root))
    assert not len(Tombstones.load(store))
    allowed = refresh(config_of(metadata, every, "refresh.max_lost_share=1"), str(root))
    assert allowed.previous_digest == first.stages["encode"].digest
    assert told == [first.stages["encode"].digest, allowed.stages["encode"].digest]
    assert not refresh(config_of(metadata, every), str(root)).changed
    assert len(told) == 2
    # So many at once are rather missing than withdrawn: nothing is forgotten until somebody says so.
    assert (allowed.num_gone, allowed.num_kept, allowed.num_forgotten) == (12, 4, 0)
    assert not len(Tombstones.load(store))
    said = refresh(config_of(metadata, every, "refresh.max_withdrawn_share=0.75"), str(root))
    assert (said.changed, said.num_forgotten) == (False, 12)
    assert refresh(config_of(metadata, every, "refresh.max_withdrawn_share=0.75"), str(root)).num_forgotten == 0


def start(metadata: Path, root: Path, kill_at: str = "") -> "subprocess.Popen[str]":
    argv = [sys.executable, "-m", "tests.integration.refresh_world", str(metadata), str(root), kill_at]
    environment = {**os.environ, "PREFECT_API_URL": str(PREFECT_API_URL.value())}
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result_of(process: "subprocess.Popen[str]") -> RefreshResult:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return RefreshResult.model_validate_json(out.splitlines()[-1])


KILLS = ["datasets/download", "reports/shard-00002.json", "datasets/encode", "reports/drift-", "ledger/refresh/"]


@pytest.mark.soak
@pytest.mark.parametrize("kill_at", KILLS)
def test_a_killed_refresh_goes_on(gallery: Gallery, tmp_path: Path, kill_at: str) -> None:
    metadata, root = tmp_path / "metadata", tmp_path / "store"
    store = open_store(str(root))
    write(first_generation(gallery), metadata / "a.parquet")
    refresh(config_of(metadata), str(root))
    gallery.taken()
    write(third_generation(gallery), metadata / "a.parquet")
    write([row(gallery, index) for index in range(NUM_ROWS, NUM_ROWS + 8)], metadata / "b.parquet")
    killed = start(metadata, root, kill_at)
    killed.communicate(timeout=300)
    assert killed.returncode == -9
    found = result_of(start(metadata, root))
    scratch = refresh(config_of(metadata), str(tmp_path / "scratch"))
    there = open_store(str(tmp_path / "scratch"))
    assert files_of(store, found.stages["encode"].prefix) == files_of(there, scratch.stages["encode"].prefix)
    assert (found.num_new, found.num_gone, found.num_forgotten) == (9, 2, 0 if kill_at == KILLS[-1] else 1)
    assert not refresh(config_of(metadata), str(root)).changed
    record = json.loads(store.read(record_key(config_of(metadata).recipe)))
    assert record["digest"] == scratch.stages["encode"].digest


@pytest.mark.soak
def test_two_at_once_have_the_effect_of_one(gallery: Gallery, tmp_path: Path) -> None:
    metadata, root = tmp_path / "metadata", tmp_path / "store"
    store = open_store(str(root))
    write(first_generation(gallery), metadata / "a.parquet")
    refresh(config_of(metadata), str(root))
    write(third_generation(gallery), metadata / "a.parquet")
    both = [result_of(one) for one in [start(metadata, root) for _ in range(2)]]
    scratch = refresh(config_of(metadata), str(tmp_path / "scratch"))
    there = open_store(str(tmp_path / "scratch"))
    assert {one.stages["encode"].digest for one in both} == {scratch.stages["encode"].digest}
    prefix = scratch.stages["encode"].prefix
    assert files_of(store, prefix) == files_of(there, prefix)
    assert not refresh(config_of(metadata), str(root)).changed
