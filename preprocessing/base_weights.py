"""Base weights, wherever they are and in whatever form, made ready: fetched, checked against their pin, converted once.

The result is a folder in the cache that never changes. Two processes that want the same one wait for each other; one
that is killed leaves nothing that another could take for a whole folder, because the folder gets its name, and the
pointer to it is written, only when it is whole.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.errors import EXIT_BAD_INPUT, ContractError, TransientError
from infra.processes import run_guarded
from infra.storage import ObjectStore, open_store
from model.base_files import PART_CONFIGS, BaseFiles, choose_files, local_files
from preprocessing.base_conversion import ANSWER_NAME
from preprocessing.contracts.bases import (
    BaseSource,
    cache_folder,
    converted_folder,
    files_sha256,
    find_converted,
    find_sha256,
    is_in_place,
    pinned_sha256,
    pointer_path,
)
from preprocessing.contracts.config import ModelConfig

LOGGER = logging.getLogger(__name__)

Notify = Callable[[str], None]

_ROOT = Path(__file__).resolve().parents[1]
_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class BaseState:
    """How a base stands, before anything is spent.

    Attributes:
        is_ready: Whether it can be read at once.
        detail: Where it is, or what is still to do.
        sha256: What ``model.base_sha256`` pins; None where it is not known without reading all of it.
    """

    is_ready: bool
    detail: str
    sha256: str | None = None


def look_up_base(model: ModelConfig) -> BaseState:
    """Says how a base stands, in no time: nothing is fetched or converted.

    Raises:
        ValueError: It cannot become ready, as far as can be known without reading it.
        TransientError: Its store could not be asked.
    """
    source = model.source
    found = model.find_directory()
    if found is not None:
        _check_prediction_type(model, _stated_prediction_type(found))
        return BaseState(True, str(found), find_sha256(source))
    if source.path is None:
        _check_there(source)
        return BaseState(False, f"{source.base} will be fetched and converted, into {cache_folder()}", source.pin)
    return BaseState(False, f"{source.base} will be converted, into {cache_folder()}")


def resolve_base(model: ModelConfig, notify: Notify | None = None) -> Path:
    """Makes a base ready.

    Doing it again is cheap, and so is doing it in two processes at once.

    Args:
        model: Names it, and pins it.
        notify: Called with what is being done.

    Returns:
        The folder that ``model.directory`` is from now on.

    Raises:
        ValueError: The weights are damaged, malicious, of another model, not of the pin, or predict something else than
            ``model.base_prediction_type`` says; one line.
        TransientError: The store could not be read, or the conversion was killed.
    """
    tell = notify or (lambda what: None)
    source = model.source
    if is_in_place(source):
        assert source.path is not None
        in_place, files = local_files(source.path)
        for name in files.names:
            if name.endswith(".safetensors"):
                _check_whole(in_place / name)
        _check_pin(source, in_place, files)
        folder = source.path
    else:
        folder = find_converted(source) or _convert_once(source, tell)
    _check_prediction_type(model, _stated_prediction_type(folder))
    return folder


def _check_whole(path: Path) -> None:
    """Refuses what is used as it is if it is no safetensors file or was cut; what is converted is looked at closely.

    Raises:
        ValueError: Names the file.
    """
    num_bytes = path.stat().st_size
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > num_bytes:
                raise ValueError
            header = json.loads(file.read(header_bytes))
        end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        is_whole = num_bytes == 8 + header_bytes + end
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(
            f"model.base: {path} is no safetensors file (a Git LFS pointer, or a page of errors?); download it again"
        ) from None
    if not is_whole:
        raise ValueError(f"model.base: {path} is truncated or damaged: its size is not what its header says")


# --------------------------------------------------------------------------------------------------------- conversion


def _convert_once(source: BaseSource, tell: Notify) -> Path:
    pointer = pointer_path(source)
    with _locked(pointer.with_suffix(".lock"), tell):
        found = find_converted(source)  # by whoever held the lock before
        if found is not None:
            return found
        work = cache_folder() / f".work-{pointer.stem}"
        shutil.rmtree(work, ignore_errors=True)  # of one that was killed
        work.mkdir(parents=True)
        try:
            return _convert(source, pointer, work, tell)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _convert(source: BaseSource, pointer: Path, work: Path, tell: Notify) -> Path:
    if source.path is None:
        tell(f"fetch {source.base}")
        path = _fetch(source, work / "fetched")
    else:
        path = source.path
    folder, files = local_files(path)
    tell(f"hash {source.base}")
    sha256 = files_sha256(folder, files)
    pinned = _check_pin(source, folder, files, sha256)
    target = converted_folder(sha256)
    if not target.is_dir():
        tell(f"convert {source.base}")
        _run_child(source, path, work, sha256)
        _check_unchanged(source, pointer)  # before anything of it can be found under the hash of what it was
        with contextlib.suppress(OSError):  # another source of the same content was faster: equal folders
            os.rename(work / "base", target)
        if not target.is_dir():
            raise TransientError(f"model.base: {target} could not be made; is the disk full?")
    _check_unchanged(source, pointer)
    scratch = work / "pointer.json"
    scratch.write_text(json.dumps({"folder": target.name, "sha256": pinned, "source": source.base}), encoding="utf-8")
    os.replace(scratch, pointer)
    LOGGER.info("model.base: %s is now %s", source.base, target)
    return target


def _check_unchanged(source: BaseSource, pointer: Path) -> None:
    if source.path is not None and pointer_path(source) != pointer:
        raise ContractError(f"model.base: {source.base!r} changed while it was read; let it be whole, and try again")


def _run_child(source: BaseSource, path: Path, work: Path, sha256: dict[str, str]) -> None:
    spec = {"source": str(path), "target": str(work / "base"), "name": source.base, "sha256": sha256}
    spec_path, log_path = work / "conversion.json", work / "conversion.log"
    spec_path.write_text(json.dumps(spec), encoding="utf-8")
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), env.get("PYTHONPATH")]))
    argv = [sys.executable, "-P", "-m", "preprocessing.base_conversion", "--run", str(spec_path)]
    code = run_guarded(argv, env=env, log_path=log_path, timeout_s=_TIMEOUT_S)
    if code == EXIT_BAD_INPUT and (work / ANSWER_NAME).is_file():
        message = json.loads((work / ANSWER_NAME).read_text(encoding="utf-8"))["error"]
        message = message.replace(str(path), source.base.rstrip("/")).replace(str(work), cache_folder().name)
        raise ValueError(message if message.startswith("model.base") else f"model.base: {message}")
    if code < 0:
        reason = " (out of memory?)" if code == -9 else ""
        raise TransientError(f"model.base: converting {source.base!r} was killed by signal {-code}{reason}")
    if code:
        tail = "\n".join(log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
        raise RuntimeError(f"model.base: converting {source.base!r} failed with exit code {code}:\n{tail}")


@contextlib.contextmanager
def _locked(path: Path, tell: Notify) -> Iterator[None]:
    """Within, no other process of this machine converts the same source; a killed one's lock goes with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("wait for another process that converts the same weights")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --------------------------------------------------------------------------------------------------------------- store


def _open(source: BaseSource) -> tuple[ObjectStore, str | None]:
    """The store whose root is the base's folder, and the file's name if the base is one."""
    folder_uri, _, name = source.base.rstrip("/").rpartition("/")
    return (open_store(folder_uri), name) if source.is_file else (open_store(source.base.rstrip("/")), None)


def _check_there(source: BaseSource) -> None:
    store, single = _open(source)
    is_there = store.exists(single) if single is not None else next(iter(store.list()), None) is not None
    if not is_there:
        raise ValueError(f"model.base: {source.base!r} is not there")


def _fetch(source: BaseSource, folder: Path) -> Path:
    """Copies the files that are read, and those that lie beside them, from the store; returns the local source."""
    _check_there(source)
    store, single = _open(source)
    names = _names_in(store, single)
    files = choose_files(names, source.base, single=single)
    for file in files.names:
        store.download(file, folder / file)
    return folder if single is None else folder / single


def _names_in(store: ObjectStore, single: str | None) -> list[str]:
    """What lies in a prefix, as `model.base_files.list_names` lists a folder."""
    if single is None:
        return [info.key for info in store.list() if info.key.count("/") <= 1]
    stem = single.rpartition(".")[0]
    wanted = [single, f"{stem}.y", "LICEN", "licen", "License", "Licence"]  # a bucket may hold a million other things
    wanted += [f"{part}/{config}" for part, config in PART_CONFIGS.items()]
    found = {info.key for prefix in wanted for info in store.list(prefix)}
    return sorted(key for key in found if "/" not in key or key in wanted)


# -------------------------------------------------------------------------------------------------------------- checks


def _check_pin(source: BaseSource, folder: Path, files: BaseFiles, sha256: dict[str, str] | None = None) -> str:
    """Returns what a pin is compared with; "" where there is no pin and it would have to be computed first."""
    if source.pin is None and sha256 is None:
        return ""
    actual = pinned_sha256(files, sha256 or files_sha256(folder, files))
    if source.pin not in (None, actual):
        raise ValueError(
            f"model.base_sha256: {source.base!r} has the sha256 {actual}, not {source.pin}; it is not what was pinned"
        )
    return actual


def _stated_prediction_type(folder: Path) -> str | None:
    try:
        return json.loads((folder / "scheduler" / "scheduler_config.json").read_text("utf-8")).get("prediction_type")
    except (OSError, ValueError, AttributeError):
        return None


def _check_prediction_type(model: ModelConfig, stated: Any) -> None:
    if stated is not None and stated != model.base_prediction_type:
        raise ValueError(
            f"model.base_prediction_type: it is {model.base_prediction_type}, but {model.base!r} itself says "
            f"{stated}; set what the base UNet really predicts"
        )
