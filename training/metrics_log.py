"""``metrics.jsonl``: one line a step, the truth about a run's course, and the trackers that show it."""

import contextlib
import json
from pathlib import Path
from typing import Any

from infra.storage import ObjectNotFoundError, ObjectStore
from training.runspec import run_prefix
from training.trackers import Trackers

NAME = "metrics.jsonl"


class MetricsLog:
    """Written locally at every step, and put to the store at every checkpoint. On rank 0.

    A line is of a step that was taken, or a note of what happened at a position of the order: samples that were passed
    over, a rollback.

    Args:
        folder: Local scratch.
        store: Where the run is.
        run_id: The run.
        trackers: Are told every step.
    """

    def __init__(self, folder: Path, store: ObjectStore, run_id: str, trackers: Trackers) -> None:
        self._path, self._store, self._prefix = folder / NAME, store, run_prefix(run_id)
        self._trackers = trackers

    def start(self, step: int, position: int) -> None:
        """Goes on where a checkpoint stands: of an earlier session, what came before it stays, the rest is cut off.

        Args:
            step: Steps taken.
            position: Samples seen, and passed over.
        """
        lines: list[str] = []
        if position:
            with contextlib.suppress(ObjectNotFoundError):
                lines = self._store.read(f"{self._prefix}/{NAME}").decode().splitlines()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._go_on(lines, step, position)

    def go_back(self, step: int, position: int) -> None:
        """Likewise, of this session: the steps beyond ``step`` are taken anew, of samples from ``position`` on."""
        self._go_on(self._path.read_text(encoding="utf-8").splitlines(), step, position)

    def append(self, *, step: int, **values: Any) -> None:
        """Adds the line of a step that was taken; ``values`` are JSON values."""
        self._write({"step": step, **values})
        self._trackers.log(step, values)

    def note(self, *, step: int, position: int, **values: Any) -> None:
        """Adds a note.

        Args:
            step: Which was about to be taken.
            position: Where in the order.
            values: JSON values.
        """
        self._write({"step": step, "position": position, **values})

    def objects(self) -> dict[str, bytes]:
        """Keys and contents, as they are now; what has not changed since the last call may be missing."""
        kept = {NAME: self._path.read_bytes(), **self._trackers.objects()}
        return {f"{self._prefix}/{name}": content for name, content in kept.items()}

    def put(self) -> None:
        """Puts them to the store."""
        for key, content in self.objects().items():
            self._store.put(key, content)

    def close(self, *, is_done: bool) -> None:
        """The process ends, the run done or not."""
        self._trackers.close(is_done=is_done)

    def _go_on(self, lines: list[str], step: int, position: int) -> None:
        kept = [line for line in lines if _is_before(json.loads(line), step, position)]
        self._path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._trackers.start(step)

    def _write(self, line: dict[str, Any]) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _is_before(line: dict[str, Any], step: int, position: int) -> bool:
    return line["position"] < position if "position" in line else line["step"] <= step
