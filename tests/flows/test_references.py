"""References that deployments are given: keys or URIs, and one line of the field where one does not fit."""

from pathlib import Path
from typing import Literal

import pytest

from flows.config import load_config
from flows.plan import find_dataset, run_spec
from flows.stage import stage
from flows.validate import checkpoint_of
from infra.storage import ObjectStore
from tests.training.conftest import MakeDataset, make_dataset, store, tiny_model_dir
from training.runspec import checkpoint_prefix

__all__ = ["make_dataset", "store", "tiny_model_dir"]  # fixtures


def test_a_checkpoint_may_be_named_by_its_uri(
    tiny_model_dir: Path, make_dataset: MakeDataset, store: ObjectStore, tmp_path: Path
) -> None:
    config = load_config("demo", [f"model.base={tiny_model_dir}", f"train.dataset={make_dataset(store)}"])
    run = run_spec(config, store.uri, *find_dataset(config, store))
    key = checkpoint_prefix(run.run_id, 4)
    for named in (key, store.uri_of(key), f"{store.uri_of(key)}/MANIFEST.json"):
        # It is of this run, and no more than not there.
        with pytest.raises(ValueError, match=rf"^checkpoint: '{key}' is not complete in"):
            checkpoint_of(config, store.uri, named)
    with pytest.raises(ValueError, match=r"^checkpoint: .* is not below root"):
        checkpoint_of(config, store.uri, str(tmp_path / "elsewhere" / key))
    with pytest.raises(ValueError, match=r"^checkpoint: 'nothing' is no channel"):
        checkpoint_of(config, store.uri, "nothing")


@pytest.mark.parametrize(
    ("name", "parent", "said"),
    [
        ("select", "datasets/select/0123", "is of no use: that stage reads metadata alone"),
        ("download", "datasets/select/0123", "is not there"),
        ("download", "encoded", "is of stage encode; download is made from a select dataset"),
        ("download", "nothing", "is no channel"),
    ],
)
def test_a_parent_that_does_not_fit_is_one_line(
    name: Literal["select", "download"], parent: str, said: str, make_dataset: MakeDataset, store: ObjectStore
) -> None:
    key = make_dataset(store) if parent == "encoded" else parent
    with pytest.raises(ValueError, match=rf"^parent: .*{said}") as caught:
        stage.fn({"recipe": "demo"}, store.uri, name, key)
    assert "\n" not in str(caught.value)
