"""sha256 of big files, computed once while they stay as they are.

Selecting from terabytes starts with their hashes, and so does every plan. What was computed is remembered in
``$LACUNA_CACHE_DIR`` (else ``$XDG_CACHE_HOME/lacuna``, else ``~/.cache/lacuna``), one small file each, under what the
system says of the content: path, inode, size and times of a file; URI, etag and size of an object. A file that changed
less than two seconds ago is not remembered: another change might leave its times as they are. Where nothing can be
remembered, everything works, only slower.
"""

import contextlib
import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from infra.storage import ObjectInfo, ObjectStore, sha256_of_file

LOGGER = logging.getLogger(__name__)
_SETTLED_S = 2.0
_PART_BYTES = 16 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


def sha256_of_local(path: Path) -> str:
    """sha256 of a local file's content."""
    found = path.stat()
    name = f"{path.resolve()}\n{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
    is_settled = time.time() - max(found.st_mtime, found.st_ctime) > _SETTLED_S
    return _remembered(name, lambda: sha256_of_file(path), is_settled=is_settled)


def sha256_of_object(store: ObjectStore, info: ObjectInfo) -> str:
    """sha256 of an object's content, read in parts."""

    def compute() -> str:
        total = hashlib.sha256()
        for start in range(0, info.num_bytes, _PART_BYTES):
            total.update(store.read_range(info.key, start, _PART_BYTES))
        return total.hexdigest()

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3", os.environ.get("AWS_ENDPOINT_URL", ""))
    return _remembered(f"{endpoint} {store.uri_of(info.key)}\n{info.etag} {info.num_bytes}", compute, is_settled=True)


def _remembered(name: str, compute: Callable[[], str], *, is_settled: bool) -> str:
    file = _folder() / hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        known = file.read_text("ascii")
        if _SHA256.fullmatch(known):
            return known
    computed = compute()
    if is_settled:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as target:
                target.write(computed)
            os.replace(target.name, file)
        except OSError as error:
            LOGGER.debug("the hash of a metadata file was not remembered: %s", error)
    return computed


def _folder() -> Path:
    given = os.environ.get("LACUNA_CACHE_DIR")
    if given:
        return Path(given) / "content-hashes"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path(os.path.expanduser("~")) / ".cache") / "lacuna" / "content-hashes"
