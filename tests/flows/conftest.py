"""What the flows' tests share: weights that only have to be there, and one Prefect server for the whole session."""

import gc
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def base_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like base weights: enough for configs and digests, which never load them."""
    folder = tmp_path_factory.mktemp("base")
    for part, name in (("unet", "config.json"), ("vae", "config.json"), ("open_clip", "open_clip_config.json")):
        (folder / part).mkdir()
        (folder / part / name).write_text(json.dumps({"part": part}))
    return folder


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
