"""img2dataset's reader, downloader, writers and distributors, without the rest of it.

Importing the package imports its command line, and with it albumentations, wandb, pandas, fire, OpenCV and (for tar
files) torch: ten seconds and 800 MB in each of its processes. The parts used here need none of that, so the package
itself is not run, only its modules, with empty ones in the place of what they import and, used like this, never touch.

Source: img2dataset 1.47.0, ``__init__.py``, ``main.py``, ``reader.py``, ``downloader.py``, ``writer.py``,
``logger.py``.
"""

import importlib
import importlib.machinery
import sys
import types

_NEVER_TOUCHED = ("wandb", "pandas")  # for its own logger process, and for JSON input
_TAR_ONLY = "webdataset"  # touched when a tar file is written; imported then


class _Late(types.ModuleType):
    """A module that is imported when it is first touched."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            raise AttributeError(f"{self.__name__}.{name} is touched while img2dataset is imported")
        return getattr(importlib.import_module(self.__name__), name)


def _run_only_its_modules() -> None:
    """Puts the package in place without running its ``__init__``."""
    if "img2dataset" in sys.modules:
        return  # somebody has imported all of it already
    spec = importlib.machinery.PathFinder.find_spec("img2dataset")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("img2dataset is not installed; say `make setup`")
    package = types.ModuleType("img2dataset")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    sys.modules["img2dataset"] = package


def _import() -> None:
    _run_only_its_modules()
    stand_ins = [name for name in (*_NEVER_TOUCHED, _TAR_ONLY) if name not in sys.modules]
    for name in stand_ins:
        sys.modules[name] = _Late(name)
    try:
        for name in ("reader", "downloader", "writer", "distributor"):
            importlib.import_module(f"img2dataset.{name}")
    finally:
        for name in stand_ins:  # nobody else must find them; whoever imported one keeps it
            del sys.modules[name]


_import()

from img2dataset.distributor import (  # noqa: E402 - after the stand-ins are in place
    multiprocessing_distributor,
    pyspark_distributor,
    ray_distributor,
)
from img2dataset.downloader import Downloader, compute_key, is_disallowed  # noqa: E402
from img2dataset.logger import CappedCounter, write_stats  # noqa: E402
from img2dataset.reader import Reader  # noqa: E402
from img2dataset.writer import FilesSampleWriter, ParquetSampleWriter, WebDatasetSampleWriter  # noqa: E402

DISTRIBUTORS = {
    "multiprocessing": multiprocessing_distributor,
    "pyspark": pyspark_distributor,
    "ray": ray_distributor,
}
WRITERS = {"parquet": ParquetSampleWriter, "webdataset": WebDatasetSampleWriter, "files": FilesSampleWriter}

__all__ = [
    "DISTRIBUTORS",
    "WRITERS",
    "CappedCounter",
    "Downloader",
    "Reader",
    "compute_key",
    "is_disallowed",
    "write_stats",
]
