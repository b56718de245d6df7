"""A changed config or input never reuses what an earlier run made; what only changes the speed does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.errors import ContractError
from infra.storage import ObjectStore, open_store
from preprocessing.contracts.config import NOT_IN_DIGEST, DownloadConfig
from preprocessing.contracts.manifest import MANIFEST_NAME, Manifest, dataset_prefix
from preprocessing.download import stage as stage_module
from preprocessing.download.stage import DownloadStage
from preprocessing.stage import load_manifest, run_stage
from tests.preprocessing.given import Given
from tests.preprocessing.test_ledger import Told

CONFIG = DownloadConfig()
SHARDS = [["http://a.example/1", "http://a.example/2"], ["http://a.example/3"]]

# Every field of DownloadConfig stands in one of these two: a test says so.
CHANGES_THE_RESULT: dict[str, Any] = {
    "allow_networks": ("127.0.0.0/8",),
    "image_size_px": 256,
    "encode_quality": 94,
    "max_image_area_px": 63_999_999,
    "min_image_side_px": 17,
    "max_aspect": 19.5,
    "allow_ports": (80, 443, 8080),
    "allow_downgrade": True,
    "max_body_bytes": 31_999_999,
    "max_redirects": 4,
    "robots_txt": True,
    "user_agent_token": "Other",
}
CHANGES_THE_WAY: dict[str, Any] = {
    "min_success_rate": 0.1,
    "min_shard_success_rate": 0.1,
    "permanent_retry_days": 3,
    "max_header_bytes": 4096,
    "max_bodies_bytes": 2**20,
    "timeout_s": 1.5,
    "deadline_s": 9.0,
    "min_rate_bytes_per_s": 10,
    "retries": 9,
    "num_processes": 3,
    "num_threads": 3,
    "distributor": "ray",
    "max_connections_per_host": 1,
    "host_delay_s": 0.1,
    "max_retry_after_s": 1.0,
    "max_host_failures": 0,
    "dns_ttl_s": 1.0,
    "stall_timeout_s": 9.0,
    "user_agent_contact": "https://a.example/robot",
}
# What the selection may say that it did not say before.
CHANGED_SELECTIONS: dict[str, Given] = {
    "a row more": Given([[*SHARDS[0], "http://a.example/4"], SHARDS[1]]),
    "a row less": Given([SHARDS[0][:1], SHARDS[1]]),
    "another URL": Given([["http://a.example/1", "http://b.example/2"], SHARDS[1]]),
    "another order": Given([SHARDS[0][::-1], SHARDS[1]]),
    "other shards": Given([SHARDS[0][:1], [SHARDS[0][1], *SHARDS[1]]]),
    "a shard more": Given([*SHARDS, []]),
    "a hash to expect": Given(SHARDS, expected_sha256="0" * 64),
    "another split": Given(SHARDS, split="validation"),
    "another score": Given(SHARDS, punsafe=0.02),
    "another caption": Given(SHARDS, caption="x"),
}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    monkeypatch.setattr(stage_module, "fetch_shards", Told({}))
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def selected(store: ObjectStore) -> Manifest:
    return run_stage(store, Given(SHARDS))


@pytest.fixture
def halfway(store: ObjectStore, selected: Manifest) -> Manifest:
    """A run that has made its first shard; the manifest is what it would have come to."""
    whole = run_stage(store, DownloadStage(store, selected, CONFIG))
    prefix = dataset_prefix("download", whole.digest)
    store.delete(f"{prefix}/{MANIFEST_NAME}")
    store.delete(f"{prefix}/reports/shard-00001.json")
    return whole


def asked_for(monkeypatch: pytest.MonkeyPatch, store: ObjectStore, stage: DownloadStage) -> list[str]:
    engine = Told({})
    monkeypatch.setattr(stage_module, "fetch_shards", engine)
    run_stage(store, stage)
    return sorted(engine.asked)


def test_every_field_is_known_here() -> None:
    fields = DownloadConfig.model_fields
    assert set(fields) == CHANGES_THE_RESULT.keys() | CHANGES_THE_WAY.keys()
    assert {name for name, field in fields.items() if field.json_schema_extra == NOT_IN_DIGEST} == set(CHANGES_THE_WAY)


@pytest.mark.parametrize("name", CHANGES_THE_RESULT)
def test_another_config_starts_afresh(
    name: str, store: ObjectStore, selected: Manifest, halfway: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = DownloadStage(store, selected, DownloadConfig.model_validate({name: CHANGES_THE_RESULT[name]}))
    assert stage.digest != halfway.digest
    assert asked_for(monkeypatch, store, stage) == SHARDS[0] + SHARDS[1]


@pytest.mark.parametrize("name", CHANGES_THE_WAY)
def test_another_way_goes_on(
    name: str, store: ObjectStore, selected: Manifest, halfway: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = DownloadStage(store, selected, DownloadConfig.model_validate({name: CHANGES_THE_WAY[name]}))
    assert stage.digest == halfway.digest
    assert asked_for(monkeypatch, store, stage) == SHARDS[1]
    made = load_manifest(store, dataset_prefix("download", stage.digest))
    assert (made.shards, made.config) == (halfway.shards, halfway.config)


@pytest.mark.parametrize("what", CHANGED_SELECTIONS)
def test_another_selection_starts_afresh(
    what: str, store: ObjectStore, halfway: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = CHANGED_SELECTIONS[what]
    stage = DownloadStage(store, run_stage(store, changed), CONFIG)
    assert stage.digest != halfway.digest
    asked = asked_for(monkeypatch, store, stage)
    assert len(asked) == load_manifest(store, dataset_prefix("download", stage.digest)).num_in


def test_another_version_of_the_code_starts_afresh(
    store: ObjectStore, selected: Manifest, halfway: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DownloadStage, "version", DownloadStage.version + 1)
    stage = DownloadStage(store, selected, CONFIG)
    assert stage.digest != halfway.digest
    assert asked_for(monkeypatch, store, stage) == SHARDS[0] + SHARDS[1]


ROWS_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a bit": lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:],
    "the end": lambda data: data[:-1],
    "all": lambda data: b"",
    "more": lambda data: data + b"\0",
}


@pytest.mark.parametrize("damage", ROWS_DAMAGE)
def test_rows_that_changed_under_their_manifest_are_refused(
    damage: str, store: ObjectStore, selected: Manifest, halfway: Manifest
) -> None:
    key = f"{dataset_prefix('select', selected.digest)}/shard-00001.parquet"
    store.put(key, ROWS_DAMAGE[damage](store.read(key)))
    with pytest.raises(ContractError, match=r"sha256 is .*, its manifest says"):
        run_stage(store, DownloadStage(store, selected, CONFIG))


def test_shards_of_another_dataset_are_not_taken(
    store: ObjectStore, selected: Manifest, halfway: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody copies a dataset's folder over another's."""
    stage = DownloadStage(store, selected, CONFIG.model_copy(update={"encode_quality": 90}))
    before, after = (dataset_prefix("download", digest) for digest in (halfway.digest, stage.digest))
    for info in list(store.list(f"{before}/")):
        store.put(info.key.replace(before, after), store.read(info.key))
    assert asked_for(monkeypatch, store, stage) == SHARDS[0] + SHARDS[1]


def test_a_picture_that_changed_in_a_finished_shard_is_noticed(
    store: ObjectStore, selected: Manifest, halfway: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = dataset_prefix("download", halfway.digest)
    (rows,) = [file.name for file in halfway.shards[0].files if file.kind == "rows"]
    store.put(f"{prefix}/{rows}", store.read(f"{prefix}/{rows}") + b"\0")
    stage = DownloadStage(store, selected, CONFIG)
    assert asked_for(monkeypatch, store, stage) == SHARDS[0] + SHARDS[1]


def test_there_are_enough_mutations() -> None:
    others = 1 + len(ROWS_DAMAGE) + 2
    assert len(CHANGES_THE_RESULT) + len(CHANGED_SELECTIONS) + others >= 20
