"""What determines a result, as one sha256; and what names a row, as 128 bits."""

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(
    stage: str,
    version: int,
    config: Mapping[str, Any],
    parents: Sequence[str],
    weights: Mapping[str, str] | None = None,
) -> str:
    """The digest of a stage's result.

    Args:
        stage: Its name.
        version: Its ``STAGE_VERSION``: raised by hand whenever the code's result changes.
        config: The config fields that change the result.
        parents: Digests of what it reads.
        weights: sha256 of each model's weights that it uses.

    Returns:
        64 hexadecimal digits.
    """
    determined_by = {
        "stage": stage,
        "version": version,
        "config": dict(config),
        "parents": list(parents),
        "weights": dict(weights or {}),
    }
    return hashlib.sha256(canonical_json(determined_by).encode()).hexdigest()


def uid_of(url: str, caption: str) -> str:
    """The 128-bit id of a (url, caption) pair, stable over refreshes: 32 hexadecimal digits.

    XXH3-128 (seed 0) of the URL's length in bytes, a colon, URL and caption, in UTF-8. It is uniform, and the same on
    every machine and in every version of XXH3 since 0.8; it is no cryptographic hash. ``preprocessing.uids`` has the
    same for columns.
    """
    address = url.encode("utf-8", "surrogatepass")
    return xxhash.xxh3_128_hexdigest(b"%d:%b%b" % (len(address), address, caption.encode("utf-8", "surrogatepass")))


def is_held_out(uid: str, fraction: float) -> bool:
    """Whether a row belongs to the validation split: a pure function of its uid, uniform over uids.

    The lower half of the uid decides; the upper half orders rows, so that a subsample has as many held-out ones.
    """
    return int(uid[16:], 16) < math.ceil(fraction * 2**64)


def weights_sha256(directory: Path) -> str:
    """One sha256 for a model's folder: over the names and contents of its ``*.json`` and ``*.safetensors`` files.

    Raises:
        ValueError: The folder has no such file.
    """
    files = sorted(p for p in directory.rglob("*") if p.suffix in (".json", ".safetensors") and p.is_file())
    if not files:
        raise ValueError(f"model: {str(directory)!r} has no weights (*.safetensors, *.json); give a folder that has")
    total = hashlib.sha256()
    for path in files:
        total.update(f"{path.relative_to(directory).as_posix()}\0{file_sha256(path)}\n".encode())
    return total.hexdigest()


def file_sha256(path: Path) -> str:
    """A file's sha256, 64 hexadecimal digits; not computed again while its size and time stay."""
    found = path.stat()
    return _file_sha256(path, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _file_sha256(path: Path, num_bytes: int, mtime_ns: int) -> str:
    """A file's sha256, computed once while its size and time stay: a run asks for gigabytes of weights many times."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
