"""Base weights on this machine, found again by their sha256: a dataset says which they were, not where they are."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from preprocessing.contracts.bases import TINY, cache_folder, parse_base
from preprocessing.contracts.digests import weights_sha256


def find_base(sha256s: Mapping[str, str], bases: Sequence[Path] = ()) -> Path | None:
    """The folder of base weights that a dataset was encoded with.

    Args:
        sha256s: Of its parts, ``vae`` and ``open_clip``, as the dataset's specs say; one of them will do.
        bases: Folders to look at first; then the shipped tiny ones, and the cache of converted ones.

    Returns:
        The folder; None if no folder has all of these parts.
    """
    tiny = parse_base(TINY, None).path
    assert tiny is not None
    cached = sorted(path for path in cache_folder().glob("*") if (path / "vae").is_dir())
    for base in (*bases, tiny, *cached):
        if all((base / part).is_dir() and weights_sha256(base / part) == value for part, value in sha256s.items()):
            return base
    return None
