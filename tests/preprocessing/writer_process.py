"""Writers of an encoded dataset, as processes that can be killed and paused.

``python -m tests.preprocessing.writer_process CONFIG MODEL FOLDER`` loads the models once; then each line on stdin is
answered by one line of JSON on stdout:

* ``start ROOT EVENTS`` forks a writer, which runs the stage into a store and, each time before and after it touches the
  store, writes one byte to the named pipe EVENTS (``-``: none); answer: its pid;
* ``wait PID`` answers with its exit code (negative: the signal) and, where it came to an end, the manifest's sha256.

FOLDER takes scratch and logs.
"""

import contextlib
import gc
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from infra.storage import ObjectStore, open_store
from preprocessing.contracts.config import EncodeConfig, ModelConfig
from preprocessing.contracts.manifest import MANIFEST_NAME, dataset_prefix
from preprocessing.encode.stage import EncodeStage
from preprocessing.stage import load_manifest, run_stage
from tests.preprocessing.pictures import Downloaded

WRITES = ("upload", "put", "put_if_absent", "compare_and_swap", "delete")


def announce(store: ObjectStore, events: str) -> ObjectStore:
    """A store that tells when it is about to write, and when it has written."""
    descriptor = os.open(events, os.O_WRONLY)

    def announced(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            os.write(descriptor, b".")
            result = write(*args, **kwargs)
            os.write(descriptor, b".")
            return result

        return call

    for name in WRITES:
        setattr(store, name, announced(getattr(store, name)))
    return store


class Writers:
    """The process that forks writers.

    Args:
        config: Of the stage.
        model: The models.
        folder: For scratch and logs.
    """

    def __init__(self, config: EncodeConfig, model: ModelConfig, folder: Path) -> None:
        torch.set_num_threads(1)
        self._config, self._model, self._folder = config, model, folder
        self._loaded: dict[str, Any] = {}
        self._folders: dict[int, Path] = {}

    def load(self, root: str) -> None:
        """Loads the models and all code, before anything is forked, by a run of the stage; no thread outlives it."""
        given = open_store(root)
        store = open_store(str(self._folder / "warm"))
        for info in given.list("datasets/"):
            store.put(info.key, given.read(info.key))
        stage = self._stage(store)
        run_stage(store, stage)
        self._loaded = {"_weights": stage._weights, "encoders": stage.encoders}
        gc.freeze()

    def _stage(self, store: ObjectStore) -> EncodeStage:
        downloaded = load_manifest(store, dataset_prefix(Downloaded.name, Downloaded.digest))
        stage = EncodeStage(store, downloaded, self._config, self._model, device="cpu")
        stage.__dict__.update(self._loaded)  # its cached properties
        return stage

    def start(self, root: str, events: str) -> dict[str, Any]:
        """Forks a writer."""
        if not self._loaded:
            self.load(root)
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        pid = os.fork()
        if pid:
            self._folders[pid] = folder
            return {"pid": pid}
        status = 1
        try:
            self._write(root, events, folder)
            status = 0
        except BaseException:
            (folder / "error").write_text(traceback.format_exc())
        finally:
            os._exit(status)

    def _write(self, root: str, events: str, folder: Path) -> None:
        tempfile.tempdir = str(folder)
        store = open_store(root)
        stage = self._stage(store if events == "-" else announce(store, events))
        run_stage(store, stage)
        data = store.read(f"{dataset_prefix(stage.name, stage.digest)}/{MANIFEST_NAME}")
        (folder / "manifest").write_text(hashlib.sha256(data).hexdigest())

    def wait(self, pid: int) -> dict[str, Any]:
        """How a writer ended."""
        _, status = os.waitpid(pid, 0)
        answer: dict[str, Any] = {"code": os.waitstatus_to_exitcode(status)}
        folder = self._folders.pop(pid)
        for name in ("manifest", "error"):
            with contextlib.suppress(FileNotFoundError):
                answer[name] = (folder / name).read_text()
        shutil.rmtree(folder)
        return answer


def main() -> None:
    """Answers until stdin ends."""
    config, model, folder = sys.argv[1:]
    logging.disable()
    writers = Writers(EncodeConfig.model_validate_json(config), ModelConfig.model_validate_json(model), Path(folder))
    for line in sys.stdin:
        action, *arguments = line.split()
        answer = writers.start(*arguments) if action == "start" else writers.wait(int(arguments[0]))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
