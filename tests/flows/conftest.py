"""What the flows' tests share: base weights outside the package, and one Prefect server a module."""

import gc
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import model.tiny

TINY_WEIGHTS = Path(model.tiny.__file__).with_name("weights")


@pytest.fixture(scope="session")
def base_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base in a folder of the user's own."""
    return Path(shutil.copytree(TINY_WEIGHTS, tmp_path_factory.mktemp("base"), dirs_exist_ok=True))


@pytest.fixture
def with_base(base_weights: Path) -> list[str]:
    """Overrides that let the demo recipe use them."""
    return [f"model.base={base_weights}"]


@pytest.fixture(scope="module")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prefect's own server with a history of its own, for the module that needs it."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
    from prefect.testing.utilities import prefect_test_harness

    harness = prefect_test_harness(server_startup_timeout=300)
    harness.__enter__()
    yield
    with warnings.catch_warnings():
        # Prefect leaves its clients' sockets to the garbage collector: here, not in the middle of another test.
        warnings.simplefilter("ignore", ResourceWarning)
        harness.__exit__(None, None, None)
        gc.collect()
    patch.undo()
