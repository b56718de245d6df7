"""What became of the channels: when it may be said again, and when their rules have to be asked."""

from pathlib import Path
from typing import Any

import pytest

from flows.config import load_config
from flows.publication import find_publication, pointers, record_publication, settled_channels
from infra.bundles import commit_bundle
from infra.channels import move_channel, pointer_to
from infra.storage import ObjectStore, open_store
from training.runspec_validation import ExportSpec

RUN = "demo-0123456789abcdef"
KEPT = "kept: masked_psnr_db 20 is not above 21"


def spec_of(store: ObjectStore, *settings: str, report: str = "report") -> ExportSpec:
    config = load_config("demo", ['publish.channels=["latest", "best"]', *settings])
    return ExportSpec(
        store_uri=store.uri, run_id=RUN, step=20, checkpoint_prefix="c", report_prefix=report, dataset_prefixes=(),
        model=config.model, train=config.train, config=config.publish,
    )  # fmt: skip


def commit(store: ObjectStore, folder: Path, prefix: str) -> None:
    folder.mkdir()
    (folder / "w.safetensors").write_bytes(prefix.encode())
    commit_bundle(store, prefix, folder, kind="export", run_id=RUN, step=20)


def point(store: ObjectStore, name: str, prefix: str) -> None:
    assert move_channel(store, name, pointer_to(store, name, prefix), lambda current: True)


@pytest.fixture
def published(tmp_path: Path) -> tuple[ObjectStore, ExportSpec]:
    """`latest` was moved, `best` was kept at another export."""
    store = open_store(str(tmp_path / "store"))
    spec = spec_of(store)
    commit(store, tmp_path / "better", "exports/better")
    point(store, "best", "exports/better")
    assert settled_channels(store, spec) is None
    stood = pointers(store, spec)
    commit(store, tmp_path / "ours", spec.export_prefix)
    assert settled_channels(store, spec) is None  # nobody has been asked
    point(store, "latest", spec.export_prefix)
    record_publication(store, spec, stood, {"latest": f"moved to {spec.export_prefix}", "best": KEPT})
    return store, spec


def test_what_was_rightly_kept_is_not_asked_again(published: tuple[ObjectStore, ExportSpec]) -> None:
    store, spec = published
    assert settled_channels(store, spec) == {"latest": "kept: points to this export already", "best": KEPT}
    made = find_publication(store, spec)
    assert made is not None
    assert made.channels == {"latest": f"moved to {spec.export_prefix}", "best": KEPT}  # what was done, and not what is


@pytest.mark.parametrize("name", ["latest", "best"])
def test_a_pointer_that_has_moved_since_is_asked_again(
    published: tuple[ObjectStore, ExportSpec], tmp_path: Path, name: str
) -> None:
    store, spec = published
    commit(store, tmp_path / "third", "exports/third")
    point(store, name, "exports/third")
    assert settled_channels(store, spec) is None


@pytest.mark.parametrize(
    "changed",
    [{"report": "another"}, {"settings": ["publish.best_metric=masked_ssim"]}, {"settings": ["publish.dtype=float16"]}],
)
def test_other_rules_are_asked(published: tuple[ObjectStore, ExportSpec], changed: dict[str, Any]) -> None:
    store, _ = published
    spec = spec_of(store, *changed.get("settings", ()), report=changed.get("report", "report"))
    assert settled_channels(store, spec) is None
    assert find_publication(store, spec) is None


def test_a_record_that_cannot_be_read_is_none(published: tuple[ObjectStore, ExportSpec]) -> None:
    store, spec = published
    store.put(f"runs/{RUN}/publication/step-00000020.json", b"{")
    assert find_publication(store, spec) is None
    assert settled_channels(store, spec) is None
