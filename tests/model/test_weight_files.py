"""Weight files that others made: whole ones are read as they are, bad ones refused in a line, nothing is executed."""

import builtins
import io
import json
import os
import pickle
import pickletools
import re
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from model.weight_files import TensorInfo, WeightFileError, open_weights

Make = Callable[[Path], object]

STATE = {
    "a.weight": torch.arange(24, dtype=torch.float32).reshape(4, 6),
    "a.bias": torch.arange(4, dtype=torch.float16),
    "b.weight": torch.ones(2, 3, dtype=torch.bfloat16),
}


def check_state(path: Path) -> None:
    with open_weights(path) as weights:
        assert set(weights) == set(STATE)
        for key, value in STATE.items():
            assert weights.info(key) == TensorInfo(value.dtype, tuple(value.shape))
            assert torch.equal(weights.tensor(key), value)
        with pytest.raises(KeyError):
            weights.tensor("c")


# ------------------------------------------------------------------------------------------------------------- whole


def fake_lightning() -> Any:
    """A class with the name under which PyTorch Lightning pickles its callbacks."""
    names = ["pytorch_lightning", "callbacks", "model_checkpoint"]
    for depth in range(1, 4):
        sys.modules.setdefault(".".join(names[:depth]), ModuleType(".".join(names[:depth])))
    module = sys.modules[".".join(names)]
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": ".".join(names)})  # pyright: ignore[reportAttributeAccessIssue]  # made here
    return module.ModelCheckpoint


def save_lightning(path: Path) -> None:
    callback = {"monitor": "loss", "best": torch.tensor(0.5), "score": np.float64(0.25)}
    content = {"state_dict": OrderedDict(STATE), "callbacks": {fake_lightning(): callback}, "global_step": 875000}
    torch.save(content | {"optimizer_states": [{"state": {}, "param_groups": []}], "epoch": 3}, path)
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        del sys.modules[name]


def save_sharded(folder: Path, suffix: str = ".safetensors") -> Path:
    keys = list(STATE)
    places = {}
    for number, part in enumerate((keys[:1], keys[1:]), start=1):
        name = f"m-{number:05d}-of-00002{suffix}"
        tensors = {key: STATE[key] for key in part}
        save_file(tensors, folder / name) if suffix == ".safetensors" else torch.save(tensors, folder / name)
        places |= dict.fromkeys(part, name)
    index = folder / f"m{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("x.safetensors", lambda path: save_file(STATE, path)),
        ("x.ckpt", lambda path: torch.save({"state_dict": STATE, "global_step": 7}, path)),
        ("x.bin", lambda path: torch.save(STATE, path)),
        ("x.pt", lambda path: torch.save(OrderedDict(STATE), path)),
        ("parameters.pt", lambda path: torch.save({k: torch.nn.Parameter(v) for k, v in STATE.items()}, path)),
        ("old.ckpt", lambda path: torch.save({"state_dict": STATE}, path, _use_new_zipfile_serialization=False)),
        ("lightning.ckpt", save_lightning),
    ],
)
def test_whole_files_are_read_as_they_are(tmp_path: Path, name: str, make: Make):
    make(tmp_path / name)
    check_state(tmp_path / name)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_are_one_file(tmp_path: Path, suffix: str):
    check_state(save_sharded(tmp_path, suffix))


def test_views_come_out_as_they_were(tmp_path: Path):
    whole = torch.arange(12.0).reshape(3, 4)
    torch.save({"t": whole.T, "row": whole[1], "whole": whole}, tmp_path / "x.ckpt")
    with open_weights(tmp_path / "x.ckpt") as weights:
        assert torch.equal(weights["t"], whole.T)
        assert torch.equal(weights["row"], whole[1])


def rss_anon_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt"])
def test_data_stay_in_the_file(tmp_path: Path, name: str):
    num_bytes = 64 << 20
    state = {f"w.{i}": torch.full((num_bytes // 16,), float(i)) for i in range(4)}
    save_file(state, tmp_path / name) if name.endswith("s") else torch.save({"state_dict": state}, tmp_path / name)
    del state
    before = rss_anon_bytes()
    with open_weights(tmp_path / name) as weights:
        tensors = [weights[key] for key in weights]
        assert [float(tensor.sum()) for tensor in tensors] == [i * num_bytes / 16 for i in range(4)]
        assert rss_anon_bytes() - before < num_bytes // 8


# ----------------------------------------------------------------------------------------------------------- damaged


def written(data: bytes) -> Make:
    return lambda path: path.write_bytes(data)


def safetensors_of(header: Any, data: bytes = b"") -> Make:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return written(len(text).to_bytes(8, "little") + text + data)


def entry(begin: int, end: int, shape: Any = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def pickled(content: Any, **kwargs: Any) -> Make:
    return lambda path: torch.save(content, path, **kwargs)


def saved(content: Any, **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **kwargs)
    return buffer.getvalue()


def repacked(change: Callable[[dict[str, bytes]], None], compression: int = zipfile.ZIP_STORED) -> Make:
    """A .ckpt whose archive's entries were changed."""

    def make(path: Path) -> None:
        with zipfile.ZipFile(io.BytesIO(saved(STATE))) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        change(entries)
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in entries.items():
                archive.writestr(name, data)

    return make


def entry_twice(path: Path) -> None:
    repacked(lambda entries: None)(path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", b"")


def with_bomb(entries: dict[str, bytes]) -> None:
    entries["archive/data/9"] = bytes(20 << 20)


def without(entries: dict[str, bytes], name: str) -> None:
    del entries[name]


GOOD = save(STATE)
GOOD_CKPT = saved({"state_dict": STATE})
OLD_CKPT = saved({"state_dict": STATE}, _use_new_zipfile_serialization=False)
OLD_ABSURD = re.sub(
    rb"(cpuq.)K\x18", lambda found: found[1] + b"J\xff\xff\xff\x7f", OLD_CKPT, flags=re.DOTALL
)  # 24 items: 2**31 - 1
HEADER_END = 8 + int.from_bytes(GOOD[:8], "little")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 5214865152\n"
HTML = b"<!DOCTYPE html><html><body>Please log in to download this file</body></html>"

DAMAGED: dict[str, tuple[str, Make, str]] = {
    # safetensors
    "st-empty": ("safetensors", written(b""), "an empty file; download it again"),
    "st-3-bytes": ("safetensors", written(GOOD[:3]), "truncated"),
    "st-in-header": ("safetensors", written(GOOD[: HEADER_END - 5]), "truncated: its header has"),
    "st-header-only": ("safetensors", written(GOOD[:HEADER_END]), "truncated: its header promises .* 0 are there"),
    "st-in-data": ("safetensors", written(GOOD[: HEADER_END + 40]), "truncated: its header promises"),
    "st-last-byte": ("safetensors", written(GOOD[:-1]), "truncated: its header promises"),
    "st-extended": ("safetensors", written(GOOD + b"\0"), "1 bytes follow the last tensor"),
    "st-no-json": ("safetensors", safetensors_of(b"{not json at all"), "header is not JSON"),
    "st-deep-json": ("safetensors", safetensors_of(b'{"a":' * 5000 + b"1" + b"}" * 5000), "damaged|not JSON"),
    "st-no-utf8": ("safetensors", safetensors_of(b'{"\xff\xfe": 1}'), "header is not JSON"),
    "st-random": ("safetensors", written(bytes(range(1, 256)) * 8), "no safetensors file"),
    "st-twice": ("safetensors", safetensors_of(b'{"a": 1, "a": 2}'), "names 'a' twice"),
    "st-entry": ("safetensors", safetensors_of({"a": {"dtype": "F32"}}), "entry 'a' is not dtype, shape"),
    "st-dtype": ("safetensors", safetensors_of({"a": entry(0, 4, dtype="F31")}, b"1234"), "unknown dtype 'F31'"),
    "st-dtype-kind": ("safetensors", safetensors_of({"a": entry(0, 4) | {"dtype": 32}}), "unknown dtype 32"),
    "st-negative": ("safetensors", safetensors_of({"a": entry(0, 4, [-1])}, b"1234"), "sizes >= 0"),
    "st-absurd": ("safetensors", safetensors_of({"a": entry(0, 4, [2**62, 2**62])}, b"1234"), "data_offsets span 4"),
    "st-9-dims": ("safetensors", safetensors_of({"a": entry(0, 4, [1] * 9)}, b"1234"), "at most 8 sizes"),
    "st-bool-size": ("safetensors", safetensors_of({"a": entry(0, 4, [True])}, b"1234"), "sizes >= 0"),
    "st-offsets": ("safetensors", safetensors_of({"a": entry(0, 4) | {"data_offsets": [4, 0]}}), "data_offsets"),
    "st-overlap": ("safetensors", safetensors_of({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "overlap"),
    "st-hole": ("safetensors", safetensors_of({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "belong to no tensor"),
    "st-metadata": ("safetensors", safetensors_of({"__metadata__": {"a": 1}}), "other than strings"),
    "st-is-lfs": ("safetensors", written(LFS), "Git LFS pointer, not the weights; run git lfs pull"),
    "st-is-html": ("safetensors", written(HTML), "a web page, not weights; .*log in"),
    "st-is-xml": ("safetensors", written(b'<?xml version="1.0"?><Error>AccessDenied</Error>'), "a web page"),
    "st-is-json": ("safetensors", written(b'{"error": "gated"}'), "a JSON text"),
    "st-is-ckpt": ("safetensors", written(GOOD_CKPT), "this is a PyTorch pickle; name it .ckpt"),
    "st-is-old-ckpt": ("safetensors", written(OLD_CKPT), "this is an old PyTorch pickle; name it .ckpt"),
    "st-is-gzip": ("safetensors", written(b"\x1f\x8b" + bytes(100)), "a gzip archive"),
    "st-is-png": ("safetensors", written(b"\x89PNG\r\n\x1a\n" + bytes(100)), "a picture"),
    "st-is-gguf": ("safetensors", written(b"GGUF" + bytes(100)), "a GGUF file"),
    # pickles
    "pt-empty": ("ckpt", written(b""), "an empty file"),
    "pt-is-safetensors": ("ckpt", written(GOOD), "this is a safetensors file; name it .safetensors"),
    "pt-is-lfs": ("bin", written(LFS), "Git LFS pointer"),
    "pt-is-html": ("ckpt", written(HTML), "a web page"),
    "pt-is-text": ("ckpt", written(b"hello, world, this is a text"), "no weight file"),
    "pt-10-bytes": ("ckpt", written(GOOD_CKPT[:10]), "no readable end"),
    "pt-half": ("ckpt", written(GOOD_CKPT[: len(GOOD_CKPT) // 2]), "no readable end"),
    "pt-last-byte": ("ckpt", written(GOOD_CKPT[:-1]), "no readable end|truncated"),
    "pt-zip": ("ckpt", repacked(lambda e: without(e, "archive/data.pkl")), "a ZIP archive, not weights"),
    "pt-script": ("pt", repacked(lambda e: e.update({"archive/constants.pkl": b"."})), "a TorchScript program"),
    "pt-no-storage": ("ckpt", repacked(lambda e: without(e, "archive/data/0")), "truncated or damaged"),
    "pt-short-storage": (
        "ckpt",
        repacked(lambda e: e.update({"archive/data/2": b"12"})),
        "truncated|damaged|more than",
    ),
    "pt-garbage": ("ckpt", repacked(lambda e: e.update({"archive/data.pkl": b"\xff" * 99})), "damaged"),
    "pt-compressed": ("ckpt", repacked(lambda e: None, zipfile.ZIP_DEFLATED), "compressed or encrypted"),
    "pt-bomb": ("ckpt", repacked(with_bomb, zipfile.ZIP_DEFLATED), "compressed or encrypted"),
    "pt-two-mains": ("ckpt", repacked(lambda e: e.update({"b/data.pkl": b"."})), "holds 2 data.pkl"),
    "pt-entry-twice": ("ckpt", entry_twice, "two entries of one name"),
    "pt-optimizer": ("ckpt", pickled({"state": {}, "param_groups": []}), "an optimizer's state"),
    "pt-list": ("ckpt", pickled([torch.zeros(2)]), "a list, not a state dict"),
    "pt-no-tensor": ("ckpt", pickled({"epoch": 3}), "no tensor"),
    "pt-int-keys": ("ckpt", pickled({0: torch.zeros(2)}), "the key 0, a int"),
    "pt-float": ("ckpt", pickled({"state_dict": STATE | {"c.weight": 1.5}}), "'c.weight' is a float, not a tensor"),
    "pt-nested": ("ckpt", pickled({"state_dict": STATE | {"c": {"d": torch.zeros(2)}}}), "'c' is a dict, not a tensor"),
    "pt-expanded": ("ckpt", pickled({"a.b": torch.zeros(1).expand(10**9)}), "more than the file holds"),
    "pt-sparse": ("ckpt", pickled({"a.b": torch.zeros(3, 3).to_sparse()}), "asks for torch.*sparse|no plain dense"),
    "pt-old-half": ("ckpt", written(OLD_CKPT[: len(OLD_CKPT) // 2]), "truncated or damaged"),
    "pt-old-last": ("ckpt", written(OLD_CKPT[:-1]), "truncated or damaged"),
    "pt-old-absurd": ("ckpt", written(OLD_ABSURD), "its pickle wants .* bytes of data"),
    "pt-plain-pickle": ("ckpt", written(pickle.dumps({"a": 1})), "torch.save did not write"),
    "other-suffix": ("weights", written(GOOD), "a safetensors file by another name"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, case: str):
    suffix, make, message = DAMAGED[case]
    path = tmp_path / f"x.{suffix}"
    make(path)
    with pytest.raises(WeightFileError, match=message) as caught:
        open_weights(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_bytes=st.integers(0, len(GOOD) - 1))
def test_safetensors_cut_anywhere_are_refused(tmp_path: Path, num_bytes: int):
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD[:num_bytes])
    with pytest.raises(WeightFileError):
        open_weights(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, HEADER_END - 1), value=st.integers(0, 255))
def test_a_changed_header_is_refused_or_still_describes_the_data(tmp_path: Path, place: int, value: int):
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD[:place] + bytes([value]) + GOOD[place + 1 :])
    try:
        weights = open_weights(path)
    except WeightFileError:
        return
    assert sum(weights[key].nbytes for key in weights) == len(GOOD) - HEADER_END


def test_what_is_no_file_is_refused(tmp_path: Path):
    with pytest.raises(WeightFileError, match="No such file"):
        open_weights(tmp_path / "x.ckpt")
    (tmp_path / "y.ckpt").mkdir()
    with pytest.raises(WeightFileError, match="a folder"):
        open_weights(tmp_path / "y.ckpt")
    os.mkfifo(tmp_path / "z.ckpt")
    with pytest.raises(WeightFileError, match="no regular file"):
        open_weights(tmp_path / "z.ckpt")


# ---------------------------------------------------------------------------------------------------------- malicious


class Asks:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def touch(canary: Path) -> str:
    return f"touch {canary}"


def python(canary: Path) -> str:
    return f"__import__('pathlib').Path({str(canary)!r}).touch()"


ATTACKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "os.system": (lambda c: Asks(os.system, touch(c)), "posix.system"),
    "eval": (lambda c: Asks(builtins.eval, python(c)), "builtins.eval"),
    "exec": (lambda c: Asks(builtins.exec, python(c)), "builtins.exec"),
    "popen": (lambda c: Asks(subprocess.Popen, ["touch", str(c)]), "Popen"),  # protocol 2 calls its module `commands`
    "getattr": (lambda c: Asks(getattr, "", "join"), "builtins.getattr"),
    "open": (lambda c: Asks(io.open, str(c), "w"), "io.open"),
    "hub": (lambda c: Asks(torch.hub.load, str(c.parent), "model"), "torch.hub.load"),
    "torch.load": (lambda c: Asks(torch.load, str(c)), "torch.serialization.load"),
    "from-bytes": (
        lambda c: Asks(torch.storage._load_from_bytes, saved(Asks(os.system, touch(c)))),
        "torch.storage._load_from_bytes",
    ),
    "module": (lambda c: torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    "class": (lambda c: Path, "pathlib.Path"),
}


def protocol_0(canary: Path) -> bytes:
    return f"cposix\nsystem\n(V{touch(canary)}\ntR.".encode()


def with_inst(canary: Path) -> bytes:
    return f"(V{touch(canary)}\niposix\nsystem\n.".encode()


def with_memo(canary: Path) -> bytes:
    """STACK_GLOBAL whose strings come out of the memo."""
    return (
        b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94h\x00h\x01\x93\x8c"
        + bytes([len(touch(canary))])
        + touch(canary).encode()
        + b"\x85R."
    )


def in_archive(data: bytes, path: Path) -> None:
    repacked(lambda entries: entries.update({"archive/data.pkl": data}))(path)


@pytest.mark.parametrize("opcode", [b"\x8d", b"\x8e"], ids=["BINUNICODE8", "BINBYTES8"])
@pytest.mark.parametrize("form", ["bare", "archive"])
def test_a_string_of_exabytes_is_no_memory_error(tmp_path: Path, opcode: bytes, form: str):
    data, path = b"\x80\x04" + opcode + struct.pack("<Q", 2**62), tmp_path / "x.ckpt"
    if form == "bare":
        path.write_bytes(data)
    else:
        torch.save({"state_dict": STATE}, path)
        in_archive(data, path)
    with pytest.raises(WeightFileError) as caught:
        open_weights(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("form", ["zip", "nested", "old", "protocol-5"])
def test_pickles_that_ask_for_code_run_nothing(tmp_path: Path, attack: str, form: str):
    canary, path = tmp_path / "canary", tmp_path / "x.ckpt"
    make, name = ATTACKS[attack]
    payload = make(canary)
    if form == "zip":
        torch.save(payload, path)
    elif form == "nested":
        torch.save({"state_dict": OrderedDict(STATE) | {"x.y": [payload]}}, path)
    elif form == "old":
        torch.save({"state_dict": STATE, "x": payload}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps({"state_dict": payload}, protocol=5))
    with pytest.raises(WeightFileError) as caught:
        open_weights(path)
    assert "this pickle asks for" in str(caught.value)
    assert name in str(caught.value)
    assert "nothing was executed" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not canary.exists()


@pytest.mark.parametrize("make", [protocol_0, with_inst, with_memo])
@pytest.mark.parametrize("form", ["bare", "zip"])
def test_handmade_pickles_run_nothing(tmp_path: Path, make: Callable[[Path], bytes], form: str):
    canary, path = tmp_path / "c", tmp_path / "x.pt"
    path.write_bytes(make(canary)) if form == "bare" else in_archive(make(canary), path)
    with pytest.raises(WeightFileError, match=r"asks for posix\.system"):
        open_weights(path)
    assert not canary.exists()


@pytest.mark.parametrize("make", [protocol_0, with_memo])
def test_the_handmade_pickles_would_have_run(tmp_path: Path, make: Callable[[Path], bytes]):
    pickle.loads(make(tmp_path / "c"))  # noqa: S301 - it is ours
    assert (tmp_path / "c").exists()


def test_an_ignored_name_is_not_imported(tmp_path: Path):
    """A Lightning class is asked for by published checkpoints: it is never looked up, even where there is one."""
    callback = fake_lightning()
    called: list[object] = []
    callback.__setstate__ = lambda self, state: called.append(state)
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": STATE, "callbacks": callback()}, path)
    check_state(path)
    assert not called
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        del sys.modules[name]


def test_our_scan_is_not_all_that_stands_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Were the scan of instructions blind, torch's own reader would still refuse."""
    monkeypatch.setattr(pickletools, "genops", lambda file: iter(()))
    torch.save({"a.b": Asks(os.system, touch(tmp_path / "canary"))}, tmp_path / "x.ckpt")
    with pytest.raises(WeightFileError, match="torch's reader for plain tensors refuses it"):
        open_weights(tmp_path / "x.ckpt")
    assert not (tmp_path / "canary").exists()


# -------------------------------------------------------------------------------------------------------------- shards


def test_a_missing_shard_is_named(tmp_path: Path):
    index = save_sharded(tmp_path)
    (tmp_path / "m-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightFileError, match=r"names the shard 'm-00002-of-00002\.safetensors', which is not there"):
        open_weights(index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.weight": "../x.safetensors"}, "shards must lie beside their index"),
        ({"a.weight": "/etc/passwd"}, "shards must lie beside their index"),
        ({"a.weight": "..\\x.safetensors"}, "shards must lie beside their index"),
        ({"a.weight": 3}, "shards must lie beside their index"),
        ({"a.weight": "m.safetensors.index.json"}, "another index"),
        ({"z.weight": "m-00001-of-00002.safetensors"}, "which does not hold it"),
        ({"a.weight": "m-00002-of-00002.safetensors"}, "which does not hold it"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, change: dict[str, Any], message: str):
    index = save_sharded(tmp_path)
    save_file(STATE, tmp_path.parent / "x.safetensors")
    content = json.loads(index.read_text())
    content["weight_map"] |= change
    index.write_text(json.dumps(content))
    with pytest.raises(WeightFileError, match=message):
        open_weights(index)


def test_a_key_that_the_index_does_not_know_is_refused(tmp_path: Path):
    index = save_sharded(tmp_path)
    content = json.loads(index.read_text())
    del content["weight_map"]["b.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(WeightFileError, match=r"holds 'b\.weight', which the index does not say"):
        open_weights(index)


@pytest.mark.parametrize(
    ("data", "message"), [(b"{}", "no weight_map"), (b"[]", "a JSON list"), (LFS, "Git LFS"), (b"{", "not JSON")]
)
def test_what_is_no_index_is_refused(tmp_path: Path, data: bytes, message: str):
    (tmp_path / "m.index.json").write_bytes(data)
    with pytest.raises(WeightFileError, match=message):
        open_weights(tmp_path / "m.index.json")
