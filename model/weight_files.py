"""Reading weight files that others made, without trusting them.

A file is checked before a library reads it, so that each kind of damage gets one clear line: what the file is, what it
should be, what to do. Nothing is ever executed: a pickle is read by torch's own reader for plain tensors only
(`weights_only=True`), and only after its instructions were listed, without running them, and found to ask for nothing
but tensors. Data is mapped, not read: a tensor costs memory when somebody looks at it.
"""

import json
import os
import pickle  # for the name of an error; nothing is unpickled with it
import pickletools
import re
import stat
import struct
import warnings
import zipfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.safetensors_writer import DTYPE_NAMES

PICKLE_SUFFIXES: Final = (".ckpt", ".bin", ".pt", ".pth")
INDEX_SUFFIX: Final = ".json"

_MAX_HEADER_BYTES: Final = 100_000_000  # the format's own limit
_MAX_JSON_BYTES: Final = 64_000_000
_MAX_PICKLE_BYTES: Final = 256_000_000  # of the instructions, without the tensors; 5 GB of weights have 200 kB of them
_MAX_DIMS: Final = 8
_HEAD_BYTES: Final = 1024
_OLD_PICKLE_MAGIC: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_NUM_OLD_PICKLES: Final = 5  # magic, protocol, system, the object, the storages' keys

_DTYPES: Final[dict[str, torch.dtype]] = {name: dtype for dtype, name in DTYPE_NAMES.items()} | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class WeightFileError(ValueError):
    """A weight file is damaged, is something else, or asks for what is not given; one line, beginning with its path."""

    def __init__(self, path: Path | str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")


@dataclass(frozen=True)
class TensorInfo:
    """What a tensor is, known without reading it.

    Attributes:
        dtype: its dtype in the file.
        shape: its shape.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]


class Weights(Mapping[str, Tensor], AbstractContextManager["Weights"]):
    """An open weight file: a lazy mapping from keys to tensors on the CPU; data stays in the file until it is read.

    Attributes:
        path: the file, or the index of the shards.
    """

    path: Path

    @abstractmethod
    def info(self, key: str) -> TensorInfo:
        """Dtype and shape, without reading data; KeyError if there is no such key."""

    @abstractmethod
    def tensor(self, key: str) -> Tensor:
        """The tensor, mapped where the format allows; never write to it. KeyError if there is no such key."""

    @abstractmethod
    def close(self) -> None:
        """Lets the file go. Tensors that were handed out stay valid."""

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, without reading data."""
        return self.info(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """A tensor's dtype, without reading data."""
        return self.info(key).dtype

    def __getitem__(self, key: str) -> Tensor:
        return self.tensor(key)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_weights(path: Path | str) -> Weights:
    """Opens a weight file.

    Args:
        path: `*.safetensors`; `*.ckpt`, `*.bin`, `*.pt`, `*.pth`: what `torch.save` wrote, a state dict or a dict with
            one under `state_dict`; `*.index.json`: the index of shards that lie beside it.

    Returns:
        its tensors; close it, or use it in a `with`.

    Raises:
        WeightFileError: the file is not there, is damaged, is not what its name says, or asks for code.
    """
    path = Path(path)
    if path.suffix == INDEX_SUFFIX:
        return _ShardedWeights(path)
    num_bytes = _num_bytes(path)
    with path.open("rb") as file:
        found = _recognize(path, file, num_bytes)
    if path.suffix == ".safetensors":
        if found in _PICKLES:
            raise WeightFileError(path, f"this is {found}; name it .ckpt")
        if found is not None and found != _SAFETENSORS:
            raise WeightFileError(path, f"this is {found}{_advice(found)}")
        return _SafetensorsWeights(path, num_bytes)
    if path.suffix in PICKLE_SUFFIXES:
        if found == _SAFETENSORS:
            raise WeightFileError(path, f"this is {found}; name it .safetensors")
        if found is not None and found not in _PICKLES:
            raise WeightFileError(path, f"this is {found}{_advice(found)}")
        return _PickledWeights(path, found)
    what = "an unknown kind of file" if found is None else found
    raise WeightFileError(
        path, f"this is {what} by another name; weights end in .safetensors or {', '.join(PICKLE_SUFFIXES)}"
    )


def read_json(path: Path | str) -> dict[str, Any]:
    """Reads a small JSON object that came with weights: a config, an index.

    Raises:
        WeightFileError: it is not there, too large, or no JSON object.
    """
    path = Path(path)
    num_bytes = _num_bytes(path)
    if num_bytes > _MAX_JSON_BYTES:
        raise WeightFileError(path, f"{num_bytes} bytes are too many for a config or an index")
    data = path.read_bytes()
    found = _kind_of_head(data[:_HEAD_BYTES])
    if found in (_LFS_POINTER, _WEB_PAGE):
        raise WeightFileError(path, f"this is {found}{_advice(found)}")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise WeightFileError(path, "this is not JSON; download it again") from None
    if not isinstance(value, dict):
        raise WeightFileError(path, f"this holds a JSON {type(value).__name__}, not an object; is it the right file?")
    return value


# ------------------------------------------------------------------------------------------------------ what a file is

_EMPTY: Final = "an empty file"
_LFS_POINTER: Final = "a Git LFS pointer, not the weights"
_WEB_PAGE: Final = "a web page, not weights"
_SAFETENSORS: Final = "a safetensors file"
_PICKLE: Final = "a PyTorch pickle"
_OLD_PICKLE: Final = "an old PyTorch pickle"
_OTHER_PICKLE: Final = "a Python pickle that torch.save did not write"
_SCRIPT: Final = "a TorchScript program, not weights"
_ARCHIVE: Final = "a ZIP archive, not weights"
_PICKLES: Final = (_PICKLE, _OLD_PICKLE, _OTHER_PICKLE)

_BEGINNINGS: Final = (
    (b"version https://git-lfs", _LFS_POINTER),
    (_OLD_PICKLE_MAGIC, _OLD_PICKLE),
    (b"\x1f\x8b", "a gzip archive, not weights"),
    (b"BZh", "a bzip2 archive, not weights"),
    (b"\xfd7zXZ", "an xz archive, not weights"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive, not weights"),
    (b"7z\xbc\xaf", "a 7z archive, not weights"),
    (b"Rar!", "a RAR archive, not weights"),
    (b"\x89HDF", "an HDF5 file, not weights in a form that is read here"),
    (b"GGUF", "a GGUF file, not weights in a form that is read here"),
    (b"\x89PNG", "a picture, not weights"),
    (b"\xff\xd8\xff", "a picture, not weights"),
)


def _num_bytes(path: Path) -> int:
    try:
        found = path.stat()
    except OSError as error:
        raise WeightFileError(path, f"cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise WeightFileError(path, f"this is {'a folder' if stat.S_ISDIR(found.st_mode) else 'no regular file'}")
    if found.st_size == 0:
        raise WeightFileError(path, f"this is {_EMPTY}{_advice(_EMPTY)}")
    if not os.access(path, os.R_OK):
        raise WeightFileError(path, "cannot be read: permission denied")
    return found.st_size


def _recognize(path: Path, file: IO[bytes], num_bytes: int) -> str | None:
    head = file.read(_HEAD_BYTES)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _kind_of_archive(path)
    return _kind_of_head(head)


def _kind_of_head(head: bytes) -> str | None:
    for beginning, kind in _BEGINNINGS:
        if head.startswith(beginning):
            return kind
    if head[257:262] == b"ustar":
        return "a tar archive, not weights"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")):
        return _WEB_PAGE
    header_bytes = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and 2 <= header_bytes <= _MAX_HEADER_BYTES:
        return _SAFETENSORS
    if re.match(rb"\x80[\x02-\x05]", head):
        return _OTHER_PICKLE
    if text.startswith((b"{", b"[")):
        return "a JSON text, not weights"
    return None


def _kind_of_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error):
        return _PICKLE  # most likely; its reader says that the end is missing
    if any(name.endswith(("/constants.pkl", "/code/")) or "/code/" in name for name in names):
        return _SCRIPT
    return _PICKLE if any(name.rpartition("/")[2] == "data.pkl" for name in names) else _ARCHIVE


def _advice(found: str) -> str:
    return {
        _EMPTY: "; download it again",
        _LFS_POINTER: "; run git lfs pull",
        _WEB_PAGE: "; the server answered the download with it: log in if need be, and download again",
    }.get(found, "; give a .safetensors file or what torch.save wrote")


# --------------------------------------------------------------------------------------------------------- safetensors


@final
class _SafetensorsWeights(Weights):
    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path = path
        self._infos = _read_header(path, num_bytes)
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise WeightFileError(path, f"the safetensors library refuses it: {_one_line(error)}") from None

    def info(self, key: str) -> TensorInfo:
        return self._infos[key]

    def tensor(self, key: str) -> Tensor:
        if key not in self._infos:
            raise KeyError(key)
        if self._file is None:
            raise ValueError(f"{self.path} is closed")
        return self._file.get_tensor(key)

    def close(self) -> None:
        self._file = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)


def _read_header(path: Path, num_bytes: int) -> dict[str, TensorInfo]:
    """Checks everything that can be checked without reading tensors: the header, and that the data fit it exactly."""
    with path.open("rb") as file:
        first = file.read(8)
        header_bytes = int.from_bytes(first, "little")
        if len(first) < 8:
            raise WeightFileError(path, f"truncated: {num_bytes} bytes do not hold a header; download it again")
        if not 2 <= header_bytes <= _MAX_HEADER_BYTES:
            raise WeightFileError(path, f"this is no safetensors file: its header would have {header_bytes} bytes")
        if header_bytes > num_bytes - 8:
            raise WeightFileError(
                path, f"truncated: its header has {header_bytes} bytes, {num_bytes - 8} are there; download it again"
            )
        text = file.read(header_bytes)
    entries = _parse_header(path, text)
    spans: list[tuple[int, int, str]] = []
    infos: dict[str, TensorInfo] = {}
    for key, entry in entries.items():
        if key == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                raise WeightFileError(path, "damaged: __metadata__ holds something other than strings")
            continue
        infos[key], begin, end = _parse_entry(path, key, entry)
        spans.append((begin, end, key))
    _check_spans(path, sorted(spans), num_bytes - 8 - header_bytes)
    return infos


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise WeightFileError(path, f"damaged: its header names {twice!r} twice")
        return values

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except WeightFileError:
        raise
    except (ValueError, RecursionError):
        raise WeightFileError(path, "damaged: its header is not JSON; download it again") from None
    if not isinstance(header, dict):
        raise WeightFileError(path, f"damaged: its header is a JSON {type(header).__name__}, not an object")
    return header


def _parse_entry(path: Path, key: str, entry: Any) -> tuple[TensorInfo, int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise WeightFileError(path, f"damaged: the header's entry {key!r} is not dtype, shape and data_offsets")
    dtype, shape, offsets = _DTYPES.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
    if dtype is None:
        raise WeightFileError(path, f"{key!r} has the unknown dtype {entry['dtype']!r}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMS:
        raise WeightFileError(
            path, f"{key!r} has the shape {_short(shape)}: at most {_MAX_DIMS} sizes >= 0 are allowed"
        )
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise WeightFileError(path, f"damaged: {key!r} has the data_offsets {_short(offsets)}")
    num_bytes = dtype.itemsize
    for size in shape:
        num_bytes *= size
    if num_bytes != offsets[1] - offsets[0]:
        raise WeightFileError(
            path, f"damaged: {key!r} is {entry['dtype']} {_short(shape)}, {_short(num_bytes)} bytes, "
            f"and its data_offsets span {_short(offsets[1] - offsets[0])}"
        )  # fmt: skip
    return TensorInfo(dtype, tuple(shape)), offsets[0], offsets[1]


def _check_spans(path: Path, spans: list[tuple[int, int, str]], num_bytes: int) -> None:
    at, last = 0, ""
    for begin, end, key in spans:
        if begin < at:
            raise WeightFileError(path, f"damaged: the data of {key!r} and {last!r} overlap")
        if begin > at:
            raise WeightFileError(path, f"damaged: {_short(begin - at)} bytes before {key!r} belong to no tensor")
        at, last = end, key
    if at > num_bytes:
        raise WeightFileError(
            path, f"truncated: its header promises {_short(at)} bytes of data, {num_bytes} are there; download it again"
        )
    if at < num_bytes:
        raise WeightFileError(path, f"damaged: {num_bytes - at} bytes follow the last tensor; download it again")


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


# ------------------------------------------------------------------------------------------------------------- pickles

_STORAGE_ITEM_BYTES: Final = {
    "torch.BFloat16Storage": 2,
    "torch.BoolStorage": 1,
    "torch.ByteStorage": 1,
    "torch.CharStorage": 1,
    "torch.DoubleStorage": 8,
    "torch.FloatStorage": 4,
    "torch.HalfStorage": 2,
    "torch.IntStorage": 4,
    "torch.LongStorage": 8,
    "torch.ShortStorage": 2,
    "torch.storage.UntypedStorage": 1,
}
_PLAIN_GLOBALS: Final = frozenset(
    {
        "collections.OrderedDict",
        "torch.Size",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch.nn.parameter.Parameter",
        *_STORAGE_ITEM_BYTES,
        *(str(dtype) for dtype in DTYPE_NAMES),
    }
)
"""All that a pickle of plain tensors asks for; narrower than what torch's own reader would allow."""


class _Nothing:
    """Stands for what a training program left beside the weights: takes anything, keeps nothing, does nothing."""

    def __new__(cls, *args: object) -> Self:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


_IGNORED_GLOBALS: Final = (
    # What PyTorch Lightning's checkpoints, such as Stable Diffusion's own .ckpt files, hold under `callbacks`.
    "_codecs.encode",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.utilities.enums.AMPType",
)
"""Asked for by published checkpoints, and given `_Nothing` instead: nothing of the name is imported or run."""

# A hostile pickle can make its reader fail in any of these ways; all of them are the file's fault.
_UNPICKLING_FAILURES: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)


@final
class _PickledWeights(Weights):
    def __init__(self, path: Path, kind: str | None) -> None:
        self.path = path
        is_archive = kind == _PICKLE
        if is_archive:
            _check_archived_pickle(path)
        else:
            _check_old_pickle(path, kind)
        loaded = _load_plain(path, is_archive=is_archive)
        self._tensors = _state_dict_in(path, loaded)

    def info(self, key: str) -> TensorInfo:
        tensor = self._tensors[key]
        return TensorInfo(tensor.dtype, tuple(tensor.shape))

    def tensor(self, key: str) -> Tensor:
        return self._tensors[key].detach()

    def close(self) -> None:
        self._tensors = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _check_archived_pickle(path: Path) -> None:
    """Checks the archive around a pickle, what the pickle asks for, and that the data have the sizes that it says."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_archive(path, entries)
            main = next(entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl")
            with archive.open(main) as file:
                asked = _Asked()
                asked.read(file)
    except WeightFileError:
        raise
    except (
        zipfile.BadZipFile,
        EOFError,
        OSError,
        ValueError,
        NotImplementedError,
        RuntimeError,
        MemoryError,
        OverflowError,
        struct.error,
    ):
        raise WeightFileError(
            path, "truncated or damaged: its archive has no readable end, or no readable pickle; download it again"
        ) from None
    _check_globals(path, asked)
    folder = main.filename.removesuffix("data.pkl")
    sizes = {entry.filename: entry.file_size for entry in entries}
    for storage in asked.storages:
        if storage is None:
            raise WeightFileError(path, "damaged: its pickle asks for data as torch.save never does")
        kind, key, num_items = storage
        name, num_bytes = f"{folder}data/{key}", _STORAGE_ITEM_BYTES.get(kind, 0) * num_items
        if sizes.get(name) != num_bytes:
            raise WeightFileError(
                path,
                f"truncated or damaged: {name} has {sizes.get(name, 'no')} bytes, and its pickle wants {num_bytes}",
            )


def _check_archive(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names):
        raise WeightFileError(path, "damaged: its archive holds two entries of one name")
    packed = next((e for e in entries if e.compress_type != zipfile.ZIP_STORED or e.flag_bits & 1), None)
    if packed is not None:
        raise WeightFileError(
            path, f"its entry {packed.filename!r} is compressed or encrypted, which torch.save never does; refused"
        )
    if any(entry.file_size != entry.compress_size for entry in entries):
        raise WeightFileError(path, "damaged: an entry of its archive has two sizes")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise WeightFileError(path, "damaged: the entries of its archive are larger than the file")
    mains = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
    if len(mains) != 1:
        raise WeightFileError(path, f"damaged: its archive holds {len(mains)} data.pkl, and must hold one")
    if mains[0].file_size > _MAX_PICKLE_BYTES:
        raise WeightFileError(path, f"its data.pkl has {mains[0].file_size} bytes: too many for a state dict")


def _check_old_pickle(path: Path, kind: str | None) -> None:
    """Checks what the pickles of a file from before PyTorch 1.6 ask for; files that are no such pickles end here."""
    asked = _Asked()
    with path.open("rb") as file:
        try:
            for _ in range(_NUM_OLD_PICKLES if kind == _OLD_PICKLE else 1):
                asked.read(file)
        except (ValueError, EOFError, MemoryError, OverflowError):  # the last two: it says that a string is huge
            if kind is None and not asked.globals:
                raise WeightFileError(path, f"this is no weight file{_advice('')}") from None
            _check_globals(path, asked)
            raise WeightFileError(path, "truncated or damaged in the middle of its pickle; download it again") from None
    _check_globals(path, asked)
    if kind != _OLD_PICKLE:
        raise WeightFileError(path, f"this is {_OTHER_PICKLE}; load it where it comes from and use torch.save")
    sizes = {key: _STORAGE_ITEM_BYTES.get(name, 0) * num_items for name, key, num_items in filter(None, asked.storages)}
    if sum(sizes.values()) > path.stat().st_size:  # its reader would make room first, and read then
        raise WeightFileError(
            path, f"truncated or damaged: its pickle wants {_short(sum(sizes.values()))} bytes of data"
        )


class _Asked:
    """What pickles ask for, found by reading their instructions: nothing is run.

    Attributes:
        globals: names of classes and functions, in order.
        storages: (class, key, number of items) of the data beside the pickle; None for one in an unknown form.
    """

    def __init__(self) -> None:
        self.globals: dict[str, None] = {}
        self.storages: list[tuple[str, str, int] | None] = []

    def read(self, file: IO[bytes]) -> None:
        """Reads one pickle.

        Raises:
            ValueError: these are no pickle's instructions.
        """
        values: list[object] = []  # strings, numbers and globals, as they are pushed; a Global is a 1-tuple
        memo: dict[int, object] = {}
        pushed: object = None
        for opcode, arg, _ in pickletools.genops(file):
            name = opcode.name
            if name == "MEMOIZE":
                memo[len(memo)] = pushed
                continue
            if name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[int(arg or 0)] = pushed
                continue
            pushed = None
            if name in ("GLOBAL", "INST"):
                pushed = self._global(str(arg).replace(" ", ".", 1))
            elif name == "STACK_GLOBAL":
                module_and_name = [value for value in values[-2:] if isinstance(value, str)]
                is_known = len(module_and_name) == 2
                pushed = self._global(".".join(module_and_name) if is_known else "a global whose name is computed")
            elif name.startswith("EXT"):
                self._global(f"the registered extension {arg}")
            elif name in ("PERSID", "BINPERSID"):
                self.storages.append(_storage(values[-5:]))
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                pushed = memo.get(int(arg or 0))
            elif isinstance(arg, (str, int)) and (
                "UNICODE" in name or "STRING" in name or "INT" in name or "LONG" in name
            ):
                pushed = arg
            if pushed is not None:
                values = [*values[-4:], pushed]

    def _global(self, name: str) -> tuple[str]:
        name = f"builtins.{name.removeprefix('__builtin__.')}" if name.startswith("__builtin__.") else name
        self.globals[name] = None
        return (name,)


def _storage(values: list[object]) -> tuple[str, str, int] | None:
    match values:
        case ["storage", (str() as kind,), str() as key, str(), int() as num_items] if num_items >= 0:
            return kind, key, num_items
        case _:
            return None


def _check_globals(path: Path, asked: _Asked) -> None:
    refused = [name for name in asked.globals if name not in _PLAIN_GLOBALS and name not in _IGNORED_GLOBALS]
    if refused:
        others = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
        raise WeightFileError(
            path,
            f"this pickle asks for {_printable(refused[0])[:200]}{others}, and weights need only tensors; nothing was "
            "executed. Do not load it elsewhere unless you trust it; get the .safetensors file instead",
        )


def _load_plain(path: Path, *, is_archive: bool) -> Any:
    ignored: list[Any] = [(_Nothing, name) for name in _IGNORED_GLOBALS]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(ignored):
            warnings.simplefilter("ignore")  # of torch, about its own old formats
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except _UNPICKLING_FAILURES as error:
        raise WeightFileError(
            path, f"truncated or damaged: torch's reader for plain tensors refuses it: {_one_line(error)}"
        ) from None


def _state_dict_in(path: Path, loaded: Any) -> dict[str, Tensor]:
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise WeightFileError(path, f"this holds a {type(loaded).__name__}, not a state dict")
    if {"state", "param_groups"} <= set(loaded):
        raise WeightFileError(path, "this is an optimizer's state (state, param_groups), not a model's weights")
    tensors: dict[str, Tensor] = {}
    for key, value in loaded.items():
        if not isinstance(key, str):
            raise WeightFileError(path, f"this holds the key {_short(key)}, a {type(key).__name__}: no state dict")
        if type(value) in (Tensor, torch.nn.Parameter):
            _check_tensor(path, key, value)
            tensors[key] = value
        elif "." in key or not isinstance(value, (int, float, str, bool, type(None), _Nothing)):
            raise WeightFileError(path, f"{_printable(key)!r} is a {type(value).__name__}, not a tensor: no state dict")
    if not tensors:
        raise WeightFileError(path, "this holds no tensor")
    return tensors


def _check_tensor(path: Path, key: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise WeightFileError(path, f"{_printable(key)!r} is no plain dense tensor")
    if tensor.ndim > _MAX_DIMS or tensor.numel() * tensor.dtype.itemsize > tensor.untyped_storage().nbytes():
        shape = _short(list(tensor.shape))
        raise WeightFileError(path, f"{_printable(key)!r} has the shape {shape}, more than the file holds of it")


# -------------------------------------------------------------------------------------------------------------- shards


@final
class _ShardedWeights(Weights):
    """Several files with an index that says which key is in which."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._shards: dict[str, Weights] = {}
        self._places = _read_index(path)
        try:
            for name in sorted(set(self._places.values())):
                if not (path.parent / name).is_file():
                    raise WeightFileError(path, f"it names the shard {name!r}, which is not there; download it, too")
                self._shards[name] = open_weights(path.parent / name)
            self._check()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        for key, name in self._places.items():
            if key not in self._shards[name]:
                raise WeightFileError(self.path, f"it says that {key!r} is in {name!r}, which does not hold it")
        for name, shard in self._shards.items():
            for key in shard:
                if self._places.get(key) != name:
                    raise WeightFileError(self.path, f"{name!r} holds {key!r}, which the index does not say")

    def info(self, key: str) -> TensorInfo:
        return self._shards[self._places[key]].info(key)

    def tensor(self, key: str) -> Tensor:
        return self._shards[self._places[key]].tensor(key)

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _read_index(path: Path) -> dict[str, str]:
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise WeightFileError(path, "this is no index of shards: it has no weight_map")
    for key, name in places.items():
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
            raise WeightFileError(path, f"it says that {key!r} is in {name!r}: shards must lie beside their index")
        if Path(name).suffix == INDEX_SUFFIX:
            raise WeightFileError(path, f"it says that {key!r} is in {name!r}, another index")
    return places


# --------------------------------------------------------------------------------------------------------------- words


def _one_line(error: BaseException) -> str:
    text = _printable(" ".join(str(error).split()))
    text = text if len(text) <= 200 else f"{text[:199]}…"
    return text or type(error).__name__


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python prints
        text = "a huge number"
    return text if len(text) <= 80 else f"{text[:79]}…"


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "�" for character in text)
