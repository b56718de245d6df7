"""`lacuna forget`: on datasets and a run that were really made, what it names is exact, and what it cleans is clean."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.forget import Forgotten, forget, parse_entries
from flows.inspection import inspect, inspect_json
from flows.screens import forget_screen, status_screen
from flows.status import status_of
from flows.verification import verify_uri
from infra.bundles import BundleKind, commit_bundle
from infra.channels import move_channel, pointer_to
from infra.errors import TransientError
from infra.storage import ObjectStore, open_store
from preprocessing.contact_sheet import make_contact_sheet
from preprocessing.contracts.config import DownloadConfig, EncodeConfig, ModelConfig
from preprocessing.contracts.manifest import Manifest, dataset_prefix, load_manifest
from preprocessing.contracts.reasons import Reason
from preprocessing.contracts.schemas import SELECTED
from preprocessing.contracts.tombstones import Kind, Tombstone, Tombstones
from preprocessing.download.ledger import Ledger, read_entries
from preprocessing.encode.stage import EncodeStage
from preprocessing.stage import run_stage
from tests.preprocessing.given import GivenTables
from tests.preprocessing.pictures import Downloaded, picture_row, picture_table
from tests.training.forked_ranks import Ranks
from training.config import TrainConfig
from training.data import TrainingDataset, open_dataset
from training.runspec import RunSpec, checkpoint_prefix, run_digest, run_id_of

NUM_STEPS, BATCH, SEED = 6, 4, 3  # 24 samples of 27 rows: some are never seen
MODEL = ModelConfig(base="tiny", base_prediction_type="v_prediction")


class _Selected(GivenTables):
    name, parents, digest = "select", {}, "5e1ec7" * 10 + "0000"


@dataclass(frozen=True)
class World:
    """Three datasets and a run."""

    store: ObjectStore
    prefixes: dict[str, str]
    rows: dict[str, dict[str, Any]]
    run: RunSpec

    def checkpoint(self, step: int) -> str:
        return checkpoint_prefix(self.run.run_id, step)

    def opened(self, folder: Path, tombstones: Tombstones | None = None) -> TrainingDataset:
        return open_dataset(self.store, self.prefixes["encode"], folder, tombstones=tombstones)


def _row(index: int) -> dict[str, Any]:
    return picture_row(index, split="train")


def _tables() -> list[pa.Table]:
    rows = [[_row(index) for index in range(start, start + 10)] for start in (0, 10, 20)]
    for row in rows[0][:3]:
        row["split"] = "validation"
    return [picture_table(shard) for shard in rows]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Made once; each test takes a copy."""
    store = open_store(str(tmp_path_factory.mktemp("made") / "store"))
    tables = _tables()
    selected = run_stage(store, _Selected([table.select(SELECTED.names) for table in tables]))
    downloaded = run_stage(store, Downloaded(tables))
    config = EncodeConfig(resolution_px=64, mask_family="lama_train_256", num_mask_variants=1, batch_size=10)
    encoded = run_stage(store, EncodeStage(store, downloaded, config, MODEL))
    train = TrainConfig(
        prediction_type="v_prediction",
        mask_source="cached",
        seed=SEED,
        num_steps=NUM_STEPS,
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        learning_rate=1e-3,
        warmup_steps=1,
        ema_decay=0.9,
        checkpoint_every_steps=2,
        keep_last=9,
    )
    prefixes = {m.stage: dataset_prefix(m.stage, m.digest) for m in (selected, downloaded, encoded)}
    run = RunSpec(
        run_id=run_id_of("test", run_digest(train, MODEL, encoded.digest)),
        store_uri=store.uri,
        dataset_prefix=prefixes["encode"],
        model=MODEL,
        train=train,
    )
    with Ranks() as ranks:
        ranks.run(run.model_dump(mode="json"), tmp_path_factory.mktemp("work"), 1)
    rows = {row["uid"]: row for table in tables for row in table.to_pylist()}
    return World(store, prefixes, rows, run)


@pytest.fixture
def world(made: World, tmp_path: Path) -> World:
    subprocess.run(["cp", "-r", made.store.uri, str(tmp_path / "store")], check=True, timeout=60)
    store = open_store(str(tmp_path / "store"))
    return World(store, made.prefixes, made.rows, made.run.model_copy(update={"store_uri": store.uri}))


def _by_step(dataset: TrainingDataset) -> list[tuple[str, ...]]:
    return [dataset.batch_at(step, seed=SEED, global_batch_size=BATCH).uids for step in range(NUM_STEPS)]


def _named(world: World, kind: Kind, value: str, **options: Any) -> Forgotten:
    return forget(world.store, [Tombstone.of(kind, value)], **options)


def _seen(found: Forgotten, kind: str = "checkpoint") -> dict[int, int]:
    return {bundle.step: bundle.num_seen for bundle in found.bundles if bundle.kind == kind}


def _parquets(store: ObjectStore) -> Iterator[tuple[str, pa.Table]]:
    for info in store.list("datasets/"):
        if info.key.endswith(".parquet"):
            yield info.key, pq.read_table(pa.BufferReader(store.read(info.key)))


def _holds(store: ObjectStore, row: dict[str, Any]) -> list[str]:
    """Keys of the files in which the row's address, picture or sha256 stands."""
    wanted = {row["url"], row["sha256"], row["image"]}
    return [
        key
        for key, table in _parquets(store)
        if any(
            not wanted.isdisjoint(table.column(name).to_pylist())
            for name in ("url", "sha256", "image")
            if name in table.column_names
        )
    ]


def test_the_checkpoints_that_are_named_are_those_that_saw_the_row(world: World, tmp_path: Path):
    """For every row of the dataset, against the batches that the loader gives."""
    steps = _by_step(world.opened(tmp_path / "look"))
    assert 0 < len({uid for step in steps for uid in step}) < 27
    train_uids = {uid for uid, row in world.rows.items() if row["split"] == "train"}
    for uid in sorted(train_uids):
        expected = {step: int(any(uid in batch for batch in steps[:step])) for step in (2, 4, 6)}
        assert _seen(_named(world, "uid", uid, is_dry_run=True)) == expected
    assert len(Tombstones.load(world.store)) == 0, "a dry run wrote something"


@pytest.mark.parametrize("kind", ["url", "host", "sha256", "uid"])
def test_what_is_named_however_it_is_named(world: World, tmp_path: Path, kind: Kind):
    steps = _by_step(world.opened(tmp_path / "look"))
    row = world.rows[steps[2][0]]  # not before step 3
    value = row["url"].split("/")[2] if kind == "host" else row[kind]
    meant = set(world.rows) if kind == "host" else {row["uid"]}
    assert _seen(_named(world, kind, value)) == {
        step: len(meant & {uid for batch in steps[:step] for uid in batch}) for step in (2, 4, 6)
    }
    found = _named(world, kind, value)
    assert found.num_new == 0
    assert [(d.prefix, d.num_rows) for d in found.datasets] == [
        (world.prefixes[stage], len(meant)) for stage in ("download", "encode", "select")
    ]
    if kind != "host":
        after = _by_step(world.opened(tmp_path / "after"))
        assert row["uid"] not in {uid for batch in after for uid in batch}
        assert [place for place in range(6) if steps[place] != after[place]] == [
            place for place in range(6) if row["uid"] in steps[place]
        ]
    if kind == "sha256":  # what is known by its bytes alone is not asked for again
        assert Tombstones.load(world.store).match(uid=row["uid"]) == "uid"


def test_what_is_published_and_reported_is_named_with_its_channels(world: World, tmp_path: Path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "weights").write_text("w")
    run_id = world.run.run_id
    bundles: tuple[tuple[str, BundleKind], ...] = (
        (f"exports/{run_id}/step-00000004", "export"),
        (f"runs/{run_id}/validation/step-00000002", "report"),
    )
    for prefix, kind in bundles:
        commit_bundle(world.store, prefix, folder, kind=kind, run_id=run_id, step=4)
    pointer = pointer_to(world.store, "latest", f"exports/{run_id}/step-00000004")
    move_channel(world.store, "latest", pointer, lambda _: True)
    steps = _by_step(world.opened(tmp_path / "look"))

    found = _named(world, "uid", steps[0][0])
    (export,) = [bundle for bundle in found.bundles if bundle.kind == "export"]
    assert (export.num_seen, export.channels) == (1, ("latest",))
    assert _seen(found, "report") == {}, "the row is not held out"
    assert f"exports/{run_id}/step-00000004 was trained on 1 of 1 rows (channel latest)" in forget_screen(found)
    # Later it is seen without looking for the rows again.
    text = status_screen(status_of(world.store), datetime.now(UTC))
    assert f"{world.checkpoint(2)} was trained on, or shows, 1 rows that were forgotten since" in text
    assert inspect_json(inspect(world.store, world.checkpoint(6)))["num_forgotten_rows"] == 1

    held_out = next(uid for uid, row in world.rows.items() if row["split"] == "validation")
    shown = _named(world, "uid", held_out)
    assert _seen(shown, "report") == {2: 1}
    assert set(_seen(shown).values()) <= {0}


@pytest.mark.soak
def test_a_run_that_left_rows_out_meanwhile_is_judged_by_that(world: World, tmp_path: Path):
    """Its last steps were taken anew without some rows: they were not seen there, and those in their places were."""
    free = _by_step(world.opened(tmp_path / "free"))
    gone = [Tombstone.of("uid", free[step][0]) for step in (4, 5)]
    Tombstones.add(world.store, gone)
    for info in list(world.store.list(f"{world.checkpoint(6)}/")):
        world.store.delete(info.key)
    world.store.delete(f"runs/{world.run.run_id}/channels/newest.json")
    with Ranks() as ranks:
        ranks.run(world.run.model_dump(mode="json"), tmp_path / "work", 1)
    rest = _by_step(world.opened(tmp_path / "rest"))
    assert rest[4:] != free[4:]
    seen = {uid for batch in (*free[:4], *rest[4:]) for uid in batch}
    assert not {free[4][0], free[5][0]} & seen
    for uid in {uid for batch in (*free, *rest) for uid in batch}:
        assert _seen(_named(world, "uid", uid, is_dry_run=True))[6] == (uid in seen), uid


def _turn_back(world: World, step: int) -> dict[str, bytes]:
    """Takes away what the run made after a step; gives it, to be put back."""
    later = [checkpoint_prefix(world.run.run_id, other) for other in (2, 4, 6) if other > step]
    taken = {info.key: world.store.read(info.key) for prefix in later for info in world.store.list(f"{prefix}/")}
    for key in taken:
        world.store.delete(key)
    return taken


def _marked(world: World) -> set[int]:
    return {int(prefix.rpartition("-")[2]) for prefix in status_of(world.store).with_forgotten_rows}


def test_what_is_made_after_the_files_were_cleaned_is_named_too(world: World, tmp_path: Path):
    """A run that goes on from what it has seen, and one that comes to see it since it knows no new tombstone."""
    steps = _by_step(world.opened(tmp_path / "look"))
    later = _turn_back(world, 2)
    seen = next(uid for uid in steps[0] if uid not in steps[4])
    unseen = next(uid for uid in steps[4] if uid not in {uid for step in steps[:4] for uid in step})
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", world.store.uri, str(copy)], check=True, timeout=60)
    for uid, store, expected in ((seen, world.store, {2, 4, 6}), (unseen, open_store(str(copy)), {6})):
        here = World(store, world.prefixes, world.rows, world.run)
        forget(store, [Tombstone.of("uid", uid)], with_compaction=True)
        assert _marked(here) == expected & {2}
        for key, data in later.items():
            store.put(key, data)
        (tmp_path / uid).mkdir()
        (tmp_path / uid / "weights").write_text("w")
        export = f"exports/{world.run.run_id}/step-00000006"
        commit_bundle(store, export, tmp_path / uid, kind="export", run_id=world.run.run_id, step=6)
        assert _marked(here) == expected
        assert export in status_of(store).with_forgotten_rows
        assert inspect_json(inspect(store, here.checkpoint(6)))["num_forgotten_rows"] == 1
    # Had it begun anew before it came there, it had left the row out.
    state = json.loads(store.read(f"{here.checkpoint(6)}/state.json"))
    state["tombstones"] = [[2 * BATCH, Tombstones.load(store).digest]]
    store.put(f"{here.checkpoint(6)}/state.json", json.dumps(state).encode())
    assert _marked(here) == set()


def test_compaction_leaves_no_trace_and_all_else_as_it_was(world: World, tmp_path: Path):
    store = world.store
    rejected = _row(1)["url"]  # of the ledger
    note = pa.table({"uid": [_row(1)["uid"]], "url": [rejected]})
    Ledger(store, "a" * 64, DownloadConfig()).record(0, note, {note["uid"][0].as_py(): (Reason.TIMED_OUT, rejected)})
    before = dict(_parquets(store))
    row, other = _row(1), _row(25)
    found = forget(
        store,
        [Tombstone.of("url", row["url"]), Tombstone.of("sha256", other["sha256"])],
        with_compaction=True,
        urls=[row["url"]],
    )
    assert found.compacted is not None
    assert set(found.compacted) == set(world.prefixes.values())
    assert found.num_files_deleted == 6 + 6, "two shards of three datasets, their rows and rejects"
    for item in (row, other):
        assert _holds(store, item) == []
    assert read_entries(store).is_empty()
    for prefix in world.prefixes.values():
        assert verify_uri(prefix, store.uri).problems == ()
        manifest = load_manifest(store, prefix)
        assert manifest.dropped == {"forgotten": 2}
        assert manifest.num_out == 28
    _check_rest_is_alike(world, before, {row["uid"], other["uid"]})
    # Nothing is left to do, and nobody has to be asked anything again.
    again = forget(store, [], with_compaction=True)
    assert again.datasets == ()
    assert again.compacted == ()
    config = EncodeConfig(resolution_px=64, mask_family="lama_train_256", num_mask_variants=1, batch_size=10)
    stage = EncodeStage(store, load_manifest(store, world.prefixes["download"]), config, MODEL)
    assert dataset_prefix("encode", stage.digest) == world.prefixes["encode"]
    assert run_stage(store, stage) == load_manifest(store, world.prefixes["encode"])


def _check_rest_is_alike(world: World, before: dict[str, pa.Table], gone: set[str]) -> None:
    rows_before = _rows_by_uid(before)
    rows_after = _rows_by_uid(dict(_parquets(world.store)))
    for stage in world.prefixes:
        kept = {uid: row for uid, row in rows_before[stage].items() if uid not in gone}
        assert len(kept) == 28
        assert rows_after[stage] == kept


def _rows_by_uid(tables: dict[str, pa.Table]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for key, table in tables.items():
        if "caption" in table.column_names:
            rows = found.setdefault(key.split("/")[1], {})
            rows |= {
                row["uid"]: hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest() for row in table.to_pylist()
            }
    return found


def test_a_compaction_that_breaks_off_is_ended_by_the_next(world: World, monkeypatch: pytest.MonkeyPatch):
    row = _row(5)
    note = pa.table({"uid": [row["uid"]], "url": [row["url"]]})
    Ledger(world.store, "a" * 64, DownloadConfig()).record(0, note, {row["uid"]: (Reason.TIMED_OUT, "late")})
    _named(world, "url", row["url"])
    kind = type(world.store)
    delete = kind.delete
    for num_deletes in (0, 1, 3):
        left = [num_deletes]

        def failing(self: ObjectStore, key: str, left: list[int] = left) -> None:
            if key.endswith(".parquet"):
                left[0] -= 1
                if left[0] < 0:
                    raise TransientError("the store is away")
            delete(self, key)

        with monkeypatch.context() as patch:
            patch.setattr(kind, "delete", failing)
            with pytest.raises(TransientError):
                forget(world.store, [], with_compaction=True)
        assert _holds(world.store, row) != []
    forget(world.store, [], with_compaction=True)
    assert _holds(world.store, row) == []
    assert read_entries(world.store).is_empty()
    for prefix in world.prefixes.values():
        assert verify_uri(prefix, world.store.uri).problems == ()


def test_two_compactions_at_once_are_one(world: World):
    rows = [_row(index) for index in (5, 15)]
    forget(world.store, [Tombstone.of("url", row["url"]) for row in rows])
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: forget(world.store, [], with_compaction=True), range(2)))
    assert sum(len(each.compacted or ()) for each in done) == 3
    assert not any(_holds(world.store, row) for row in rows)
    for prefix in world.prefixes.values():
        assert verify_uri(prefix, world.store.uri).problems == ()


def test_a_file_that_two_datasets_name_is_cleaned_for_both(world: World):
    """As a refresh leaves it: the later dataset names a shard of the earlier one where that stands."""
    store, prefix = world.store, world.prefixes["download"]
    first = load_manifest(store, prefix)
    digest = "ab" * 32
    shards = tuple(shard.standing_in(prefix, shard.index) for shard in first.shards)
    second = Manifest.model_validate(
        first.model_dump() | {"digest": digest, "shards": [s.model_dump() for s in shards]}
    )
    other = dataset_prefix("download", digest)
    store.put_if_absent(f"{other}/MANIFEST.json", second.model_dump_json().encode())
    row = _row(5)
    found = _named(world, "url", row["url"], with_compaction=True)
    assert found.compacted is not None
    assert {prefix, other} < set(found.compacted)
    assert _holds(store, row) == []
    cleaned = {name: load_manifest(store, name) for name in (prefix, other)}
    assert {tuple(f.key(name) for f in m.files("rows")) for name, m in cleaned.items()} == {
        tuple(f.key(prefix) for f in cleaned[prefix].files("rows"))
    }
    assert verify_uri(other, store.uri).problems == ()
    assert verify_uri(prefix, store.uri).problems == ()


def test_forgotten_rows_are_on_no_contact_sheet(world: World):
    prefix = world.prefixes["download"]
    manifest = load_manifest(world.store, prefix)
    cards = make_contact_sheet(world.store, prefix, manifest, 30).cards
    assert len(cards) == 30
    _named(world, "uid", cards[3].uid)
    assert {card.uid for card in make_contact_sheet(world.store, prefix, manifest, 30).cards} == {
        card.uid for card in cards
    } - {cards[3].uid}


def test_later_datasets_refuse_what_is_forgotten(world: World, tmp_path: Path):
    _named(world, "url", _row(5)["url"])
    _named(world, "sha256", _row(15)["sha256"])
    downloaded = load_manifest(world.store, world.prefixes["download"])
    config = EncodeConfig(resolution_px=64, mask_family="lama_train_256", num_mask_variants=0, batch_size=10)
    manifest = run_stage(world.store, EncodeStage(world.store, downloaded, config, MODEL))
    assert manifest.dropped == {"forgotten": 2}
    prefix = dataset_prefix("encode", manifest.digest)
    refused = pl.concat([pl.read_parquet(world.store.read(file.key(prefix))) for file in manifest.files("rejects")])
    assert set(refused["uid"]) == {_row(5)["uid"], _row(15)["uid"]}
    assert refused["url"].null_count() == 2


def test_a_forgotten_copy_of_a_picture_is_written_in_clear_no_more(tmp_path: Path):
    store = open_store(str(tmp_path / "store"))
    rows = [_row(index) for index in range(4)]
    rows[2] |= {name: rows[1][name] for name in ("image", "sha256")}
    copy = max(rows[1:3], key=lambda row: row["uid"])
    downloaded = run_stage(store, Downloaded([picture_table(rows)]))
    Tombstones.add(store, [Tombstone.of("url", row["url"]) for row in rows[1:3]])
    config = EncodeConfig(resolution_px=64, mask_family="lama_train_256", num_mask_variants=0, batch_size=10)
    manifest = run_stage(store, EncodeStage(store, downloaded, config, MODEL))
    assert manifest.dropped == {"forgotten": 2}
    assert _holds(store, {"url": copy["url"], "sha256": "", "image": b""}) == [
        file.key(dataset_prefix("download", downloaded.digest)) for file in downloaded.files("rows")
    ]


# ----------------------------------------------------------------------------------------------------- the command line


def _lacuna(world: World, *words: str) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "forget", "--root", world.store.uri, "--json", *words],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_the_command(world: World, tmp_path: Path):
    listed = tmp_path / "list.txt"
    url = _row(5)["url"]
    listed.write_text(f"# asked for on Monday\n\n{url}\nsha256 {_row(15)['sha256']}\nhost elsewhere.example\n")
    code, found, said = _lacuna(world, "--file", str(listed), "--compact", "--reason", "request", "--by", "desk")
    assert code == 0, said
    assert found["num_new"] == 4
    assert set(found["compacted"]) == set(world.prefixes.values())
    assert url not in json.dumps(found)
    assert url not in said
    assert {item["prefix"] for item in found["bundles"]} == {world.checkpoint(step) for step in (2, 4, 6)}
    assert _holds(world.store, _row(5)) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("host https://example.com", r"line 2 of .* is no host"),
        ("sha256 abc", r"line 2 of .* is no sha256"),
        ("url nothing", r"line 2 of .* is no url"),
        ("two words", r"line 2 of .* is no host"),
        ("b.example/x", r"line 2 of .* is no url"),
    ],
)
def test_a_bad_line_of_a_list_is_named_by_its_number(tmp_path: Path, line: str, message: str):
    file = tmp_path / "list.txt"
    file.write_text(f"host a.example\n{line}\n")
    with pytest.raises(ValueError, match=message) as error:
        parse_entries({}, file, "request", None)
    assert line.split()[-1] not in str(error.value).partition("write such")[0]
