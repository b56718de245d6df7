"""The child that converts base weights: torch stays out of the process of the flows.

``python -m preprocessing.base_conversion --run FILE``. FILE says what to convert, and is answered in a file beside it:
``{"error": "one line"}`` for a user's mistake, ``{}`` when the folder is whole.
"""

import argparse
import json
import sys
from pathlib import Path

from infra.errors import EXIT_BAD_INPUT, EXIT_DONE

ANSWER_NAME = "answer.json"


def main() -> int:
    """Converts, and answers; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, required=True, metavar="FILE")
    path: Path = parser.parse_args().run
    spec = json.loads(path.read_text(encoding="utf-8"))
    from model.base_weights import convert_base

    try:
        convert_base(spec["source"], spec["target"], name=spec["name"], sha256=spec["sha256"])
    except ValueError as error:
        return _answer(path, {"error": " ".join(str(error).split())}, EXIT_BAD_INPUT)
    return _answer(path, {}, EXIT_DONE)


def _answer(path: Path, answer: dict[str, str], code: int) -> int:
    (path.parent / ANSWER_NAME).write_text(json.dumps(answer), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
