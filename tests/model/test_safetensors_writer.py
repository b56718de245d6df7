"""The streaming writer: the library's bytes, one tensor in memory at a time."""

import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.safetensors_writer import DTYPE_NAMES, save_safetensors


def test_the_bytes_are_those_of_the_librarys_own_writer(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.{index}": (torch.randn(3, 5, generator=generator) * 10).to(dtype)
        for index, dtype in enumerate(DTYPE_NAMES)
        for name in ("b", "a", "ü")
    }
    tensors |= {"scalar": torch.tensor(3), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    save_safetensors(tmp_path / "ours", tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_shared_and_transposed_tensors_and_a_dtype(tmp_path: Path) -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    tensors = {"a": tensor, "b": tensor.T, "n": torch.tensor(3)}
    save_safetensors(tmp_path / "sub" / "w.safetensors", tensors, dtype=torch.half, metadata={"what": "test"})
    loaded = load_file(tmp_path / "sub" / "w.safetensors")
    assert torch.equal(loaded["a"], tensor.half())
    assert torch.equal(loaded["b"], tensor.T.half())
    assert loaded["n"].dtype == torch.int64
    with safe_open(tmp_path / "sub" / "w.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "what": "test"}


def test_an_unknown_dtype_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^w is torch.complex64: safetensors files hold "):
        save_safetensors(tmp_path / "w", {"w": torch.zeros(2, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []


class Lazy(Mapping[str, Tensor]):
    """32 tensors of 16 MiB, made when asked for."""

    def __getitem__(self, key: str) -> Tensor:
        return torch.full((4 << 20,), float(key))

    def __iter__(self) -> Iterator[str]:
        return iter(str(index) for index in range(32))

    def __len__(self) -> int:
        return 32


def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    script = "from tests.model.test_safetensors_writer import measure; import sys; measure(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "big")], capture_output=True, text=True, check=True
    )
    grown_kib = int(done.stdout)
    assert (tmp_path / "big").stat().st_size > 512 << 20
    assert grown_kib < 128 << 10, f"{grown_kib} KiB for a file of 512 MiB in tensors of 16 MiB"


def measure(path: str) -> None:
    """Writes out by how many KiB the peak of memory grew while the lazy tensors were written as float32."""
    save_safetensors(path + ".warm", {"a": torch.zeros(4 << 20)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    save_safetensors(path, Lazy(), dtype=torch.float32)
    sys.stdout.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
