"""Which selection a config's dataset is made from once a refresh has made a round of it."""

from pathlib import Path

import pytest

from flows.config import PipelineConfig
from flows.plan import data_stage, find_dataset, look_up_stages
from flows.refresh_record import RefreshRecord, write_record
from infra.storage import ObjectStore, open_store
from preprocessing.contracts.manifest import Manifest, dataset_prefix
from preprocessing.reuse import RoundStage
from preprocessing.stage import run_stage
from tests.flows.in_one_process import small_config


def declare(store: ObjectStore, config: PipelineConfig, name: str, parent: Manifest) -> Manifest:
    """A dataset of which nothing but the manifest stands: nobody here reads more."""
    stage = data_stage(name, config, store, parent)
    made = parent.model_copy(update={"stage": name, "digest": stage.digest, "parents": stage.parents, "shards": ()})
    store.put(f"{dataset_prefix(name, stage.digest)}/MANIFEST.json", made.model_dump_json().encode())
    return made


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path))


def test_the_dataset_of_a_round_is_the_configs(store: ObjectStore) -> None:
    config = small_config(8763)
    selected = run_stage(store, data_stage("select", config, store, None))
    before = declare(store, config, "encode", declare(store, config, "download", selected))
    assert find_dataset(config, store)[1] == before
    base = dataset_prefix("select", selected.digest)
    again = run_stage(store, RoundStage(base, selected, ["0" * 32]))
    now = declare(store, config, "encode", declare(store, config, "download", again))
    assert find_dataset(config, store)[1] == before
    record = RefreshRecord(
        digest=now.digest, prefix=dataset_prefix("encode", now.digest), base=selected.digest, selection="any"
    )
    write_record(store, config.recipe, record, None)
    assert find_dataset(config, store)[1] == now
    assert [stage.manifest for stage in look_up_stages(config, store)][::2] == [again, now]
    # What the refresh made is not what another config would make of the round.
    other = small_config(8763, **{"encode.num_mask_variants": 2})
    assert [stage.manifest for stage in look_up_stages(other, store)][::2] == [selected, None]
