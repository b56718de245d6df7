"""Where base weights are found: what a user names, what pins it, and the folder in the cache that it was converted to.

No torch: the flows ask at start-up. A base that is not yet one folder of Lacuna's own form is converted once
(`preprocessing.base_weights`) into a cache; here is only how that folder is found again.

    {cache}/bases/{digest[:16]}/         a converted base; named by its content, and never changed
    {cache}/bases/found/{key}.json       which of them a user's `model.base` is: by path, size and time of each file, or
                                         by URI and pin
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import unquote, urlsplit

from model.base_files import BaseFiles, is_weight_file, local_files
from preprocessing.contracts.digests import canonical_json, file_sha256

CONVERSION_VERSION: Final = 1
"""Raised by hand whenever the same source gives another folder."""

CACHE_VARIABLE: Final = "LACUNA_CACHE"
TINY: Final = "tiny"
_TINY_FOLDER: Final = Path(__file__).resolve().parents[2] / "model" / "tiny" / "weights"
_BASE_NAME: Final = "base.json"


@dataclass(frozen=True)
class BaseSource:
    """What ``model.base`` names.

    Attributes:
        base: As the user wrote it.
        kind: ``local`` or ``store``.
        path: The file or folder; None in a store.
        pin: ``base_sha256``.
    """

    base: str
    kind: Literal["local", "store"]
    path: Path | None
    pin: str | None

    @property
    def name(self) -> str:
        """The last part of its name, for people."""
        return self.base.rstrip("/").rpartition("/")[2] or self.base

    @property
    def is_file(self) -> bool:
        """Whether it is one file rather than a folder, or a prefix, of several."""
        return is_weight_file(self.base) if self.path is None else self.path.is_file()


def parse_base(base: str, pin: str | None) -> BaseSource:
    """Reads ``model.base``.

    Raises:
        ValueError: It is not there, has no scheme that is known, or lacks the pin that it must have.
    """
    if base == TINY:
        return BaseSource(base, "local", _TINY_FOLDER, pin)
    scheme, separator, rest = base.partition("://")
    if separator and scheme == "s3":
        if not rest.partition("/")[0] or not rest.partition("/")[2].strip("/"):
            raise ValueError(f"model.base: {base!r} names no object; write s3://bucket/key of a file or of a folder")
        if pin is None:
            raise ValueError(
                f"model.base: {base!r} can change without notice: set model.base_sha256 to its sha256 "
                "(of a file what sha256sum says, of a folder what `lacuna plan` says of a converted local copy)"
            )
        return BaseSource(base, "store", None, pin)
    if separator and scheme == "file":
        parts = urlsplit(base)
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"model.base: {base!r} names another host; write file:///absolute/path")
        return _local(base, Path(unquote(parts.path)), pin)
    if separator:
        raise ValueError(f"model.base: {base!r} has the unknown scheme {scheme!r}; give a path, file:///… or s3://…")
    return _local(base, Path(base).expanduser(), pin)


def _local(base: str, path: Path, pin: str | None) -> BaseSource:
    if not path.exists():
        raise ValueError(
            f"model.base: {base!r} is not there; give 'tiny', a diffusers folder, a .safetensors or .ckpt file, or an "
            "s3:// URI of one"
        )
    return BaseSource(base, "local", path, pin)


def files_sha256(folder: Path, files: BaseFiles) -> dict[str, str]:
    """The sha256 of each file of a source, by name."""
    return {name: file_sha256(folder / name) for name in files.names}


def pinned_sha256(files: BaseFiles, sha256: dict[str, str]) -> str:
    """What ``base_sha256`` is compared with.

    Of a single file its own sha256, as ``sha256sum`` gives it. Of a folder one over the names and contents of the files
    that are read, as `digests.weights_sha256` makes it, the licence left out.
    """
    if files.layout == "single":
        return sha256[files.weights["single"]]
    total = hashlib.sha256()
    for name in files.names:
        if name != files.license:
            total.update(f"{name}\0{sha256[name]}\n".encode())
    return total.hexdigest()


# --------------------------------------------------------------------------------------------------------------- cache


def cache_folder() -> Path:
    """Where converted bases are: ``$LACUNA_CACHE/bases``, or ``~/.cache/lacuna/bases``."""
    root = os.environ.get(CACHE_VARIABLE)
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "lacuna") / "bases"


def converted_folder(sha256: dict[str, str]) -> Path:
    """The folder in the cache that a source of these files is converted to."""
    digest = hashlib.sha256(canonical_json({"version": CONVERSION_VERSION, "files": sha256}).encode()).hexdigest()
    return cache_folder() / digest[:16]


def pointer_path(source: BaseSource) -> Path:
    """The file in the cache that says which converted base a source is; it changes when a local file does."""
    identity: dict[str, Any] = {"version": CONVERSION_VERSION}
    if source.path is None:
        identity |= {"uri": source.base, "pin": source.pin}
    else:
        folder, files = local_files(source.path)
        identity |= {"folder": str(folder.resolve()), "files": {name: _stat(folder / name) for name in files.names}}
    return cache_folder() / "found" / f"{hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:32]}.json"


def find_converted(source: BaseSource) -> Path | None:
    """The converted base of a source; None if there is none yet, or not of this pin."""
    try:
        found = json.loads(pointer_path(source).read_text(encoding="utf-8"))
        folder, pinned = cache_folder() / found["folder"], found["sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    if source.pin not in (None, pinned) or not (folder / _BASE_NAME).is_file():
        return None
    return folder


def find_sha256(source: BaseSource) -> str | None:
    """What would pin a source, if it has been converted: it was hashed then."""
    try:
        return str(json.loads(pointer_path(source).read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def is_in_place(source: BaseSource) -> bool:
    """Whether a source is a folder of Lacuna's own form, used as it is."""
    return source.path is not None and source.path.is_dir() and local_files(source.path)[1].layout == "canonical"


def _stat(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]
