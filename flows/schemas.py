"""The published formats as JSON schemas: ``python -m flows.schemas DIR`` writes them, ``--check`` compares.

They are made from the models that read and write the files, so that programs in other languages can hold to the same.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from infra.bundles import BundleManifest
from infra.channels import ChannelPointer
from infra.presigning import PresignedBundle
from preprocessing.contracts.manifest import Manifest

MODELS: Final[dict[str, type[BaseModel]]] = {
    "manifest.v1": Manifest,
    "bundle.v1": BundleManifest,
    "channel.v1": ChannelPointer,
    "presigned.v1": PresignedBundle,
}
"""Name of the file, without its end → what it describes."""


def schema_of(name: str) -> dict[str, Any]:
    """One schema, as JSON schema of draft 2020-12."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **MODELS[name].model_json_schema()}


def texts() -> dict[str, str]:
    """File name → content."""
    return {f"{name}.schema.json": json.dumps(schema_of(name), indent=1, ensure_ascii=False) + "\n" for name in MODELS}


def main() -> int:
    """Writes the schemas, or compares them with what is there; exit code 1 if they differ."""
    parser = argparse.ArgumentParser(description="Write the published formats as JSON schemas.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="docs/schemas")
    parser.add_argument("--check", action="store_true", help="write nothing, say which differ")
    arguments = parser.parse_args()
    differ = [name for name, text in texts().items() if _read(arguments.folder / name) != text]
    if arguments.check:
        for name in differ:
            sys.stderr.write(f"{arguments.folder / name} is not what the models say; write it anew without --check\n")
        return 1 if differ else 0
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in differ:
        (arguments.folder / name).write_text(texts()[name], encoding="utf-8")
    return 0


def _read(path: Path) -> str | None:
    return path.read_text("utf-8") if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
