"""Four top-level packages with plain names: nobody else may own one of them, and the rooms stay light to enter."""

import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest

ROOMS = ("flows", "infra", "model", "preprocessing", "training")


def test_no_other_distribution_owns_our_names():
    owners = packages_distributions()
    for room in ROOMS:
        assert set(owners.get(room, [])) <= {"lacuna-inpainting"}, f"{room} is shadowed by {owners[room]}"


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("flows.pipeline", {"torch", "pyarrow"}),
        ("flows.cli", {"torch", "pyarrow", "prefect"}),
        ("preprocessing.contracts.schemas", {"torch", "prefect"}),
        ("preprocessing.encode.stage", {"torch", "prefect"}),
        ("model.specs", {"torch", "numpy"}),
        ("training.launch", {"torch", "prefect"}),
        ("training.step", {"prefect", "deepspeed"}),
        ("model.encoders", {"prefect", "pyarrow", "deepspeed", "pydantic"}),
    ],
)
def test_importing_a_room_does_not_drag_in(module: str, forbidden: set[str]):
    code = f"import sys, {module}; print(*sorted({forbidden!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
