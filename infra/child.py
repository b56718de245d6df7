"""The child's side of `infra.launch`: how a child process says how far it is, and how it ends.

A child is started as ``python -m MODULE --run FILE [--workdir DIR]``. On stdout a line ``@lacuna {json}`` is an event
for the launcher; everything else is log. Its last event is ``done`` with its result, or ``error``.
"""

import argparse
import json
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_GATE_REFUSED,
    EXIT_INTERRUPTED,
    EXIT_OUTSIDE_WORLD,
    EXIT_WALLTIME,
    ContractError,
    GateError,
    TransientError,
    WalltimeError,
)

EVENT_PREFIX = "@lacuna "


def emit(event: dict[str, Any]) -> None:
    """Tells the launcher something, as one line of stdout.

    Args:
        event: JSON values; ``event["event"]`` says what kind it is.
    """
    sys.stdout.write(f"{EVENT_PREFIX}{json.dumps(event)}\n")
    sys.stdout.flush()


def run_as_child(main: Callable[[dict[str, Any], Path], dict[str, Any] | None]) -> int:
    """Runs a child's work, and turns how it ends into the last event and an exit code.

    SIGTERM is a `KeyboardInterrupt`, as SIGINT is, unless `main` decides otherwise. What is neither the user's nor the
    outside world's fault is not caught: the traceback goes to the log, and the launcher shows the log's end.

    Args:
        main: Takes the spec that the launcher was given, as a dict, and the folder it may use for scratch; returns what
            goes into the ``done`` event, or None if this process has nothing to report.

    Returns:
        The exit code, as `infra.errors` lists them.
    """
    parser = argparse.ArgumentParser()
    # Two names: torchrun takes --run, wherever it stands, for the beginning of an option of its own.
    parser.add_argument("--run", "--run-file", type=Path, required=True, metavar="FILE", help="JSON: what to do")
    # Unknown arguments pass: the launchers of torch and DeepSpeed may add --local_rank.
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="scratch of this machine; default: FILE's folder")
    options = parser.parse_known_args()[0]
    path: Path = options.run
    workdir: Path = options.workdir or path.parent
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = main(json.loads(path.read_text(encoding="utf-8")), workdir.resolve())
    except KeyboardInterrupt:
        return _fail("KeyboardInterrupt", "interrupted", EXIT_INTERRUPTED)
    except ContractError as error:
        return _fail("ContractError", str(error), EXIT_BAD_INPUT)
    except ValueError as error:
        return _fail("ValueError", str(error), EXIT_BAD_INPUT)
    except GateError as error:
        return _fail("GateError", str(error), EXIT_GATE_REFUSED)
    except TransientError as error:
        return _fail("TransientError", str(error), EXIT_OUTSIDE_WORLD)
    except WalltimeError as error:
        return _fail("WalltimeError", str(error), EXIT_WALLTIME)
    if result is not None:
        emit({"event": "done", **result})
    return EXIT_DONE


def _fail(kind: str, message: str, code: int) -> int:
    traceback.print_exc()  # to the log: a ValueError may come from deep inside a library
    emit({"event": "error", "type": kind, "message": message})
    return code
