"""`lacuna verify`: every byte that a manifest names, and what nothing names."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.cli import _with_default_depth
from flows.progress import Silent
from flows.screens import verify_screen
from flows.store import locate, read_any
from flows.verification import Problem, verify, verify_uri
from infra.bundles import commit_bundle
from infra.channels import move_channel, pointer_to
from infra.storage import ObjectStore, open_store
from preprocessing.contracts.config import EncodeConfig, ModelConfig
from preprocessing.contracts.manifest import MANIFEST_NAME, Manifest, dataset_prefix
from preprocessing.contracts.schemas import TENSOR_WRITER
from preprocessing.encode.stage import EncodeStage
from preprocessing.stage import run_stage
from tests.preprocessing.looked_at import downloaded_dataset, encoded_dataset, selected_dataset, write_dataset


@pytest.fixture
def store(any_root: str) -> ObjectStore:
    return open_store(any_root)


def _dataset(store: ObjectStore, tmp_path: Path) -> tuple[str, Manifest]:
    return encoded_dataset(store, tmp_path / "rows", captions=["a", "b", "c"], num_variants=1)


def _names(problems: tuple[Problem, ...]) -> list[tuple[str, str]]:
    return [(problem.kind, problem.uri.rpartition("/")[2]) for problem in problems]


def test_a_whole_dataset(store: ObjectStore, tmp_path: Path) -> None:
    prefix, manifest = _dataset(store, tmp_path)
    store.put(f"{prefix}/reports/shard-00000.json", b"{}")  # a report of a shard of it
    told: list[tuple[int, int, int, int]] = []
    found = verify(store, prefix, manifest, on_progress=lambda *numbers: told.append(numbers))
    num_bytes = sum(file.num_bytes for file in manifest.files())
    assert (found.num_files, found.num_bytes, found.problems) == (len(manifest.files()), num_bytes, ())
    assert told[-1] == (found.num_files, found.num_files, num_bytes, num_bytes)
    assert told == sorted(told)


def test_everything_that_is_wrong_is_named(store: ObjectStore, tmp_path: Path) -> None:
    prefix, manifest = _dataset(store, tmp_path)
    names = [file.name for file in manifest.files()]
    bad = bytearray(store.read(f"{prefix}/{names[0]}"))
    bad[len(bad) // 2] ^= 1
    store.put(f"{prefix}/{names[0]}", bytes(bad))
    store.put(f"{prefix}/{names[1]}", store.read(f"{prefix}/{names[1]}") + b"\0")
    store.delete(f"{prefix}/{names[2]}")
    store.put(f"{prefix}/train-00009.parquet", b"PAR1")
    store.put(f"{prefix}/reports/shard-00009.json", b"{}")
    found = verify(store, prefix, manifest)
    assert _names(found.problems) == [
        ("bad", names[0]),
        ("bad", names[1]),
        ("missing", names[2]),
        ("foreign", "shard-00009.json"),
        ("foreign", "train-00009.parquet"),
    ]
    assert "sha256" in found.problems[0].detail
    assert "bytes" in found.problems[1].detail


def test_random_mutations_are_all_found(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    prefix, manifest = _dataset(store, tmp_path)
    rng = random.Random(5)
    for _ in range(30):
        file = rng.choice(manifest.files())
        key = f"{prefix}/{file.name}"
        whole = store.read(key)
        at = rng.randrange(len(whole))
        flipped = whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :]
        zeroed = whole[:at] + bytes(min(16, len(whole) - at)) + whole[at + 16 :]
        other = rng.choice([entry for entry in manifest.files() if entry != file])
        changed = rng.choice([flipped, zeroed, whole[:at], whole + b"\0", store.read(f"{prefix}/{other.name}")])
        store.put(key, changed)
        problems = verify(store, prefix, manifest).problems
        assert _names(problems) == ([] if changed == whole else [("bad", file.name)])
        store.put(key, whole)


def test_a_manifest_of_another_folder_is_a_problem(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    prefix, manifest = _dataset(store, tmp_path)
    for key in [info.key for info in store.list(f"{prefix}/")]:
        store.put(key.replace(prefix, "datasets/encode/0000000000000000"), store.read(key))
    found = verify(store, "datasets/encode/0000000000000000", manifest)
    assert _names(found.problems) == [("manifest", MANIFEST_NAME)]


def test_a_bundle_and_the_channel_that_points_to_it(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "files" / "deep").mkdir(parents=True)
    (tmp_path / "files" / "deep" / "weights").write_bytes(b"w" * 100)
    prefix = "exports/demo-1/step-00000010"
    commit_bundle(store, prefix, tmp_path / "files", kind="export", run_id="demo-1", step=10)
    move_channel(store, "latest", pointer_to(store, "latest", prefix), lambda _: True)
    for uri in ("latest", prefix, f"{store.uri}/{prefix}"):
        assert verify_uri(uri, store.uri).problems == ()
    manifest = store.read(f"{prefix}/{MANIFEST_NAME}")
    store.put(f"{prefix}/{MANIFEST_NAME}", manifest + b"\n")
    assert verify_uri(prefix, store.uri).problems == ()
    (problem,) = verify_uri("latest", store.uri).problems
    assert (problem.kind, "channel latest says" in problem.detail) == ("manifest", True)
    store.put(f"{prefix}/{MANIFEST_NAME}", manifest)
    store.put(f"{prefix}/deep/weights", b"x" * 100)
    store.put(f"{prefix}/deep/more", b"")
    assert _names(verify_uri("latest", store.uri).problems) == [("bad", "weights"), ("foreign", "more")]
    left = {info.key.removeprefix(f"{prefix}/") for info in store.list(f"{prefix}/")}
    assert left == {MANIFEST_NAME, "deep/weights", "deep/more"}  # and no lease


def test_files_larger_than_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.verification._CHUNK_BYTES", 100)
    store = open_store(str(tmp_path / "store"))
    prefix, manifest = selected_dataset(store, tmp_path / "rows")
    (file,) = manifest.files()
    assert file.num_bytes > 300
    assert verify(store, prefix, manifest).problems == ()
    for num_bytes in (file.num_bytes, file.num_bytes // 100 * 100):  # whole, and cut where a piece ends
        store.put(f"{prefix}/{file.name}", store.read(f"{prefix}/{file.name}")[:num_bytes])
        assert len(verify(store, prefix, manifest).problems) == (num_bytes != file.num_bytes)


def test_whoever_listens_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Listening(Silent):
        def advance(self, stage: str, num_done: int, num_total: int, text: str = "") -> None:
            told.append((stage, num_done, num_total, text))

    told: list[tuple[str, int, int, str]] = []
    monkeypatch.setattr("flows.verification.listener", Listening)
    store = open_store(str(tmp_path / "store"))
    prefix, manifest = _dataset(store, tmp_path)
    verify_uri(prefix, store.uri)
    assert told[-1][:3] == ("verify", len(manifest.files()), len(manifest.files()))
    assert read_any(*locate(prefix, store.uri)) == manifest


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> tuple[ObjectStore, str, Manifest]:
    """A dataset that the encode stage made with the tiny models."""
    folder = tmp_path_factory.mktemp("encoded")
    store = open_store(str(folder / "store"))
    captions = ["a red circle", "a blue square", "a star", "", "a ring"]
    _, downloaded = downloaded_dataset(store, folder / "rows", selected_dataset(store, folder / "select")[1], captions)
    config = EncodeConfig(resolution_px=64, mask_family="lama_train_256", num_mask_variants=1)
    stage = EncodeStage(store, downloaded, config, ModelConfig(base="tiny", base_prediction_type="v_prediction"))
    manifest = run_stage(store, stage)
    return store, dataset_prefix("encode", manifest.digest), manifest


def test_rows_are_encoded_again(encoded: tuple[ObjectStore, str, Manifest]) -> None:
    store, prefix, _ = encoded
    found = verify_uri(prefix, store.uri, num_rows=3)
    assert found.problems == ()
    assert found.rows is not None
    assert (found.rows.num_compared, found.rows.num_identical) == (3, 3)
    assert {"moments", "text_embeddings", "mask_0", "masked_moments_0"} <= set(found.rows.columns)
    assert "3 rows encoded again: 3 are the same" in verify_screen(found)


def test_rows_that_were_written_wrong_are_named(encoded: tuple[ObjectStore, str, Manifest], tmp_path: Path) -> None:
    """The hashes are right; only what they are of is not."""
    store, prefix, manifest = encoded
    file = manifest.files("rows", "train")[0]
    table = pq.read_table(store.local_path(f"{prefix}/{file.name}"))
    place = table.schema.get_field_index("text_embeddings")
    values = table.column(place).to_pylist()
    swapped = pa.array([*values[1:], values[0]], table.schema.field(place).type)
    wrong = table.set_column(place, table.schema.field(place), swapped)
    bad, _ = write_dataset(
        store,
        "encode",
        [{"train": wrong}],
        scratch=tmp_path,
        writer=dict(TENSOR_WRITER),
        config=manifest.config,
        specs=manifest.specs,
        parents=manifest.parents,
    )
    found = verify_uri(bad, store.uri, num_rows=100)
    assert found.rows is not None
    assert {problem.kind for problem in found.problems} == {"differs"}
    assert all("text_embeddings" in problem.detail for problem in found.problems)
    assert len(found.problems) == table.num_rows > found.rows.num_identical == 0


def test_what_cannot_be_encoded_again_is_said_beforehand(store: ObjectStore, tmp_path: Path) -> None:
    selected, _ = selected_dataset(store, tmp_path / "select")
    with pytest.raises(ValueError, match=r"^--deep: .* is a select dataset"):
        verify_uri(selected, store.uri, num_rows=1)
    prefix, _ = encoded_dataset(store, tmp_path / "rows")  # whose specs say nothing of the text
    with pytest.raises(ValueError, match=r"^--deep: .* in its specs"):
        verify_uri(prefix, store.uri, num_rows=1)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["verify", "a/b", "--deep"], ["verify", "a/b", "--deep=16"]),
        (["verify", "--deep", "a/b"], ["verify", "--deep=16", "a/b"]),
        (["verify", "--deep", "3", "a/b"], ["verify", "--deep", "3", "a/b"]),
        (["verify", "a/b", "--deep=3", "--json"], ["verify", "a/b", "--deep=3", "--json"]),
    ],
)
def test_deep_has_a_default_depth(words: list[str], meant: list[str]) -> None:
    assert _with_default_depth(words) == meant
