"""Peers that cannot share Lacuna's environment run in virtual environments of their own, under ``var/``."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def peers_python(name: str, packages: Sequence[str]) -> str:
    """The interpreter of an environment that has some packages; it is made when it is first asked for.

    Args:
        name: Of the environment: ``var/bench-{name}``.
        packages: Requirements; pin them, so that everybody measures the same.
    """
    folder = REPOSITORY / "var" / f"bench-{name}"
    python, made_of = folder / "bin" / "python", folder / "packages.txt"
    if made_of.exists() and made_of.read_text() == "\n".join(packages):
        return str(python)
    uv = str(Path(sys.executable).with_name("uv"))
    environment = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True)
    subprocess.run([uv, "pip", "install", "--quiet", "--python", str(python), *packages], check=True, env=environment)
    made_of.write_text("\n".join(packages))
    return str(python)
