"""Base weights from anywhere, made ready once: pins, the cache, two at once, a killed one, a real object store."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from infra.errors import ContractError
from infra.storage import open_store
from preprocessing.base_weights import look_up_base, resolve_base
from preprocessing.contracts.bases import is_in_place
from preprocessing.contracts.config import ModelConfig
from preprocessing.contracts.digests import weights_sha256

TINY = ModelConfig(base="tiny", base_prediction_type="v_prediction").directory
CONFIGS = ("unet/config.json", "vae/config.json", "open_clip/open_clip_config.json", "scheduler/scheduler_config.json")


def model_of(base: object, **values: Any) -> ModelConfig:
    return ModelConfig(base=str(base), **{"base_prediction_type": "v_prediction", **values})


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny models as one file, with the configs that its shapes do not tell, and a licence, beside it."""
    folder = tmp_path_factory.mktemp("published")
    write_single(folder / "tiny-base.safetensors")
    return folder / "tiny-base.safetensors"


def write_single(path: Path) -> None:
    """In a process of its own, which has torch."""
    script = (
        "import sys; from pathlib import Path; from model import compvis; from model.encoders import *;"
        "from model.unet import load_unet; from model.safetensors_writer import save_safetensors;"
        "tiny = Path(sys.argv[1]); u = load_unet(tiny / 'unet'); v = load_vae(tiny / 'vae');"
        "t = load_text_encoder(tiny / 'open_clip', load_image_tower=False).clip.state_dict();"
        "save_safetensors(sys.argv[2], compvis.to_compvis(unet=u.state_dict(), unet_config=dict(u.config),"
        " vae=v.state_dict(), vae_config=dict(v.config), text=t))"
    )
    subprocess.run([sys.executable, "-c", script, str(TINY), str(path)], check=True, timeout=300)
    for name in CONFIGS:
        (path.parent / name).parent.mkdir(exist_ok=True)
        shutil.copy(TINY / name, path.parent / name)
    shutil.copy(TINY / "LICENSE", path.parent / "LICENSE")


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cache(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One cache for the tests that may find there what another one has converted."""
    monkeypatch.setenv("LACUNA_CACHE", str(shared_cache))
    return shared_cache / "bases"


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LACUNA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bases"


def left_over(cache: Path) -> list[str]:
    return [path.name for path in cache.glob(".*")]


def test_a_single_file_is_converted_once(single: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    model = model_of(single)
    assert not look_up_base(model).is_ready
    with pytest.raises(ValueError, match="has not been converted on this machine"):
        _ = model.directory
    told: list[str] = []
    folder = resolve_base(model, told.append)
    assert [what.split()[0] for what in told] == ["hash", "convert"]
    assert folder.parent == own_cache
    assert model.directory == folder
    record = json.loads((folder / "base.json").read_text())
    assert record["source"] == str(single)
    assert record["sha256"]["tiny-base.safetensors"] == hashlib.sha256(single.read_bytes()).hexdigest()
    assert (folder / "LICENSE").read_bytes() == (TINY / "LICENSE").read_bytes()
    assert look_up_base(model).sha256 == record["sha256"]["tiny-base.safetensors"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    told.clear()
    monkeypatch.setattr("preprocessing.base_weights.run_guarded", None)  # no child any more
    assert resolve_base(model, told.append) == folder
    assert not told
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert left_over(own_cache) == []


def test_a_changed_file_is_another_base(single: Path, cache: Path, tmp_path: Path):
    shutil.copytree(single.parent, tmp_path / "copy")
    copy = tmp_path / "copy" / single.name
    assert resolve_base(model_of(copy)) == resolve_base(model_of(single))  # named by its content
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    assert not look_up_base(model_of(copy)).is_ready
    changed = resolve_base(model_of(copy))
    assert changed != resolve_base(model_of(single))
    assert weights_sha256(changed / "unet") != "" != weights_sha256(changed / "open_clip")


def test_pins(single: Path, cache: Path):
    right = hashlib.sha256(single.read_bytes()).hexdigest()
    assert resolve_base(model_of(single, base_sha256=right)) == resolve_base(model_of(single))
    with pytest.raises(ValueError, match=rf"^model\.base_sha256: .* has the sha256 {right}, not {'0' * 64}"):
        resolve_base(model_of(single, base_sha256="0" * 64))
    with pytest.raises(ValueError, match=rf"has the sha256 \w{{64}}, not {'0' * 64}"):
        resolve_base(model_of("tiny", base_sha256="0" * 64))


def test_the_base_must_predict_what_the_config_says(single: Path, cache: Path):
    for base in (single, "tiny"):
        with pytest.raises(ValueError, match=r"^model\.base_prediction_type: it is epsilon, but .* says v_prediction"):
            resolve_base(model_of(base, base_prediction_type="epsilon"))


def test_bad_weights_are_one_line_and_leave_nothing(single: Path, own_cache: Path, tmp_path: Path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(single.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated: its header promises") as caught:
        resolve_base(model_of(path))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"model.base: {path}: ")
    assert left_over(own_cache) == []
    assert [entry.name for entry in own_cache.iterdir()] == ["found"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "no safetensors file"),
        (lambda data: data[:-10], "truncated or damaged"),
        (lambda data: data[:6], "no safetensors file"),
    ],
)
def test_a_folder_that_is_used_in_place_is_looked_at_too(tmp_path: Path, damage: Any, message: str):
    folder = shutil.copytree(TINY, tmp_path / "base")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    resolve_base(model_of(folder))
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(ValueError, match=rf"^model\.base: {weights} is .*{message}") as caught:
        resolve_base(model_of(folder))
    assert "\n" not in str(caught.value)


def test_only_names_that_are_loaded_are_used_in_place(tmp_path: Path):
    folder = shutil.copytree(TINY, tmp_path / "base")
    assert is_in_place(model_of(folder).source)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert not is_in_place(model_of(folder).source)
    weights.with_name("diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights in vae/"):
        is_in_place(model_of(folder).source)


def test_a_source_that_changes_while_it_is_converted_leaves_nothing(single: Path, own_cache: Path, tmp_path: Path):
    folder = shutil.copytree(single.parent, tmp_path / "published")
    path = folder / single.name

    def change(what: str) -> None:
        if what.startswith("convert"):
            path.write_bytes(path.read_bytes())  # the same bytes, but another file as far as anyone can know

    with pytest.raises(ContractError, match="changed while it was read"):
        resolve_base(model_of(path), change)
    assert [entry.name for entry in own_cache.iterdir()] == ["found"]
    assert left_over(own_cache) == []


# ---------------------------------------------------------------------------------------------------------- processes

RESOLVE = (
    "import sys; from preprocessing.base_weights import *; from preprocessing.contracts.config import ModelConfig;"
    "m = ModelConfig(base=sys.argv[1], base_prediction_type='v_prediction');"
    "print(resolve_base(m, lambda what: print(what, flush=True)), flush=True);"
    "assert 'torch' not in sys.modules"  # the flows' process stays small
)


def start(single: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", RESOLVE, str(single)], stdout=subprocess.PIPE, text=True)


def test_two_at_once_convert_once(single: Path, own_cache: Path):
    children = [start(single) for _ in range(2)]
    said = [child.communicate(timeout=300)[0].splitlines() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert said[0][-1] == said[1][-1]
    assert sum(line.startswith("convert") for lines in said for line in lines) == 1
    assert left_over(own_cache) == []


def test_a_killed_one_leaves_nothing_that_counts(single: Path, own_cache: Path):
    child = start(single)
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("convert"):
            break
    deadline = time.monotonic() + 120
    while not list(own_cache.glob(".work-*/base")) and time.monotonic() < deadline:
        time.sleep(0.01)  # until it has begun to write
    os.kill(child.pid, signal.SIGKILL)
    child.communicate(timeout=60)
    assert not look_up_base(model_of(single)).is_ready
    folder = resolve_base(model_of(single))
    assert (folder / "base.json").is_file()
    assert left_over(own_cache) == []


# --------------------------------------------------------------------------------------------------------------- store


def test_a_file_in_a_real_object_store(single: Path, cache: Path, s3_root: str):
    store = open_store(s3_root)
    for path in single.parent.rglob("*"):
        if path.is_file():
            store.upload(path.relative_to(single.parent).as_posix(), path)
    store.put("unrelated/large.bin", b"not fetched")
    uri, pin = f"{s3_root}/{single.name}", hashlib.sha256(single.read_bytes()).hexdigest()
    model = model_of(uri, base_sha256=pin)
    assert "fetched and converted" in look_up_base(model).detail
    folder = resolve_base(model)
    assert folder == resolve_base(model_of(single))  # the same content, local
    assert model.directory == folder
    assert left_over(cache) == []
    with pytest.raises(ValueError, match=rf"^model\.base_sha256: .* has the sha256 {pin}, not {'1' * 64}"):
        resolve_base(model_of(uri, base_sha256="1" * 64))
    with pytest.raises(ValueError, match=r"^model\.base: .*/none\.ckpt' is not there"):
        look_up_base(model_of(f"{s3_root}/none.ckpt", base_sha256=pin))
    # A folder below a prefix: a base folder in its final form, copied as it is.
    for part in folder.rglob("*"):
        if part.is_file():
            store.upload(f"folder/{part.relative_to(folder).as_posix()}", part)
    wrong = model_of(f"{s3_root}/folder", base_sha256="1" * 64)
    with pytest.raises(ValueError, match="has the sha256") as caught:
        resolve_base(wrong)
    pin = str(caught.value).partition("has the sha256 ")[2][:64]
    copied = resolve_base(model_of(f"{s3_root}/folder", base_sha256=pin))
    assert weights_sha256(copied / "unet") == weights_sha256(folder / "unet")


@pytest.mark.parametrize(
    ("base", "pin", "message"),
    [
        ("s3://bucket/model.ckpt", None, "set model.base_sha256"),
        ("s3://bucket", "0" * 64, "names no object"),
        ("ftp://host/model.ckpt", None, "unknown scheme 'ftp'"),
        ("file://elsewhere/model.ckpt", None, "names another host"),
        ("/no/such/place", None, "is not there"),
        ("tiny", "xyz", "should match pattern"),
    ],
)
def test_what_cannot_be_a_base(base: str, pin: str | None, message: str):
    with pytest.raises(ValidationError, match=message):
        model_of(base, base_sha256=pin)


def test_a_file_uri_is_a_path(single: Path):
    assert model_of(single.as_uri()).source.path == single
