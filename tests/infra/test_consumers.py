"""Consumers beside a publisher that publishes and deletes: `lacuna pull`, the client that others copy, a plain shell.

`make test` has four consumers and eight publications; `make soak` eight and fifty, or LACUNA_PUBLICATIONS.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from flows.schemas import MODELS, schema_of, texts
from infra.bundles import MANIFEST_NAME, commit_bundle, list_bundles, load_bundle
from infra.channels import ChannelPointer, move_channel, pointer_to, read_channel
from infra.errors import GateError
from infra.gates import Gate
from infra.presigning import presign
from infra.s3_server import S3Server
from infra.storage import ObjectStore, open_store
from tests.infra.s3_fault_proxy import RATES, FaultPlan, running_proxy, waiting_less
from training.retention import delete_old_exports

REPO = Path(__file__).parents[2]
RUN = "small-000000000000"
MINIMUM = 20.0
CHANNELS = ("latest", "best", "stable")


def psnr_of(step: int) -> float:
    """What the report of a step says: every third is below the gate, and they rise otherwise."""
    return 15.0 if step % 3 == 0 else MINIMUM + step / 10


def content_of(step: int, name: str) -> bytes:
    """What a file of a step holds: none is like that of another step."""
    large = int(os.environ.get("LACUNA_LARGE_BYTES", 1 << 20))  # consumers in other processes know it, too
    num_bytes = {"weights/large": large, "weights/small": 300_000, "README.md": 100}[name]
    seed = hashlib.sha256(f"{step} {name}".encode()).digest()
    return (seed * (num_bytes // len(seed) + 1))[:num_bytes]


NAMES = ("README.md", "weights/large", "weights/small")


class Publisher:
    """Does with small bundles what a publication does with large ones: export, report, channels, retention.

    Attributes:
        deleted: Prefixes of the exports that retention deleted.
        refused: Steps that failed their gate.
    """

    def __init__(self, store: ObjectStore, scratch: Path, run_id: str = RUN) -> None:
        self.store = store
        self.run_id = run_id
        self.deleted: list[str] = []
        self.refused: list[int] = []
        self._scratch = scratch

    def publish(self, step: int, keep: int = 1) -> str:
        """One step, which becomes what the channels' rules let it become."""
        prefix = f"exports/{self.run_id}/step-{step:08d}"
        report = f"runs/{self.run_id}/validation/step-{step:08d}"
        summary = {"psnr": psnr_of(step)}
        self._commit(report, {"report.json": json.dumps(summary).encode()}, "report", step, {"summary": summary})
        self._commit(prefix, {name: content_of(step, name) for name in NAMES}, "export", step, {"license": "x"})
        for channel in CHANNELS:
            pointer = pointer_to(self.store, channel, prefix, summary)
            gate = Gate(report=report, minimum={"psnr": MINIMUM})
            try:
                move_channel(self.store, channel, pointer, self._rule(pointer), gate=gate)
            except GateError:
                self.refused.append(step)
        self.deleted += delete_old_exports(self.store, self.run_id, keep)
        return prefix

    def _rule(self, pointer: ChannelPointer) -> Any:
        def may_replace(current: ChannelPointer | None) -> bool:
            if current is None or pointer.channel != "best":
                return True
            return pointer.metrics["psnr"] > current.metrics["psnr"]

        return may_replace

    def _commit(self, prefix: str, files: dict[str, bytes], kind: Any, step: int, metadata: dict[str, Any]) -> None:
        folder = self._scratch / "made"
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        commit_bundle(self.store, prefix, folder, kind=kind, run_id=self.run_id, step=step, metadata=metadata)
        shutil.rmtree(folder)


def check_folder(folder: Path) -> int:
    """The step of which a folder holds all, and nothing else."""
    step = json.loads((folder / MANIFEST_NAME).read_text())["step"]
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {MANIFEST_NAME, *NAMES}
    for name in NAMES:
        assert (folder / name).read_bytes() == content_of(step, name), f"{name} is not of step {step}"
    return step


# ------------------------------------------------------------------------------------- many consumers, one publisher


_CONSUMER = """
import json, logging, subprocess, sys, time
from pathlib import Path
from tests.infra.test_consumers import CHANNELS, check_folder
kind, number, root, stop = sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
commands = {
    "lacuna": [sys.executable, "-m", "flows.cli", "pull", "--root", root, "--json"],
    "client": [sys.executable, sys.argv[5], root],
}
print("ready", flush=True)
turn, is_last = number, False
while True:
    is_last = stop.exists()  # one more, of what stands at the end
    channel = "stable" if is_last else CHANNELS[turn % 3]
    to = Path(f"{kind}-{number}-{'last' if is_last else channel}")
    options = ["--if-changed"] if kind == "lacuna" and turn % 2 else []
    began = time.monotonic()
    done = subprocess.run(
        [*commands[kind], channel, "--to", str(to), *options], capture_output=True, text=True, timeout=300
    )
    told = {"channel": channel, "code": done.returncode, "seconds": time.monotonic() - began}
    if done.returncode == 0:
        told["step"] = check_folder(to)
        told["restarts"] = done.stderr.count("starts again")
        if kind == "lacuna":
            last = json.loads(done.stdout.splitlines()[-1])
            assert last["step"] == told["step"]
            told["restarts"] = last["num_restarts"]
    else:
        told["error"] = done.stderr[-2000:]
    print(json.dumps(told), flush=True)
    if is_last:
        break
    turn += 1
"""


@dataclass
class Campaign:
    """What became of many pulls.

    Attributes:
        pulls: One a pull, in order for each consumer.
        publisher: Who published meanwhile.
        faults: Kind → how often.
        num_requests: Of all.
        seconds: It took.
    """

    pulls: list[list[dict[str, Any]]]
    publisher: Publisher
    faults: Counter[str]
    num_requests: int
    seconds: float

    def __str__(self) -> str:
        done = [pull for pulls in self.pulls for pull in pulls]
        seconds = sorted(pull["seconds"] for pull in done)
        versions, restarts = {pull["step"] for pull in done}, sum(pull["restarts"] for pull in done)
        return (
            f"{len(done)} pulls of {len(versions)} versions by {len(self.pulls)} consumers, {restarts} started again; "
            f"{len(self.publisher.deleted)} exports deleted, {len(self.publisher.refused)} refused; "
            f"{self.num_requests} requests, {sum(self.faults.values())} faults {dict(self.faults)}; "
            f"a pull {seconds[len(seconds) // 2]:.1f} s in the median, {seconds[-1]:.1f} at most; {self.seconds:.0f} s"
        )


def run_campaign(
    root: str,
    server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    publications: int,
    consumers: int,
    faults: float = 1.0,
) -> Campaign:
    """Consumers pull, each in a process of its own, while this one publishes; all through a proxy that fails."""
    began = time.monotonic()
    stop = tmp_path / "stop"
    copied = tmp_path / "elsewhere" / "lacuna_pull.py"
    copied.parent.mkdir()
    shutil.copy(REPO / "infra" / "lacuna_pull.py", copied)
    rates = {fault: faults * rate for fault, rate in RATES.items()}
    plan = FaultPlan(1, rates, stall_s=0.5)
    with waiting_less(60), running_proxy(server.endpoint_url, plan) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
        publisher = Publisher(open_store(root), tmp_path)
        for step in (1, 2):
            publisher.publish(step)
        environment = {**os.environ, "PYTHONPATH": str(REPO)}
        processes = []
        for n in range(consumers):
            command = [
                sys.executable,
                "-c",
                _CONSUMER,
                ("lacuna", "client")[n % 2],
                str(n),
                root,
                str(stop),
                str(copied),
            ]
            with open(tmp_path / f"{n}.log", "w") as log:
                processes.append(
                    subprocess.Popen(
                        command, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.PIPE, text=True
                    )
                )
        try:
            while not all((tmp_path / f"{n}.log").read_text() for n in range(consumers)):
                assert all(process.poll() is None for process in processes)
                time.sleep(0.05)
            for step in range(3, publications + 1):
                publisher.publish(step)
                allowed = read_channel(publisher.store, "stable")
                assert allowed is not None
                assert psnr_of(allowed.step) >= MINIMUM
            stop.touch()
            for process in processes:
                _, stderr = process.communicate(timeout=500)
                assert process.returncode == 0, stderr[-4000:]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        logs = [(tmp_path / f"{n}.log").read_text().splitlines()[1:] for n in range(consumers)]
        pulls = [[json.loads(line) for line in lines] for lines in logs]
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint_url)
        publisher.store = open_store(root)  # for those who look afterwards: without the proxy
        return Campaign(pulls, publisher, proxy.done, proxy.num_requests, time.monotonic() - began)


def check_campaign(campaign: Campaign, publications: int) -> None:
    """What must hold, whatever failed; that each pull is whole and of one version its consumer has checked."""
    store = campaign.publisher.store
    for pulls in campaign.pulls:
        assert pulls
        assert [pull for pull in pulls if pull["code"] != 0] == []
        assert all(psnr_of(pull["step"]) >= MINIMUM for pull in pulls if pull["channel"] == "stable")
        for channel in CHANNELS:  # each moves forward only: so steps and metrics rise together
            steps = [pull["step"] for pull in pulls if pull["channel"] == channel]
            assert steps == sorted(steps)
    good = [step for step in range(1, publications + 1) if psnr_of(step) >= MINIMUM]
    assert {pulls[-1]["step"] for pulls in campaign.pulls} == {good[-1]}
    assert campaign.publisher.refused == [step for step in range(1, publications + 1) if step not in good]
    named = {pointer.bundle for pointer in (read_channel(store, name) for name in CHANNELS) if pointer is not None}
    left = set(list_bundles(store, "exports"))
    assert named <= left
    assert len(left) + len(campaign.publisher.deleted) >= publications
    assert campaign.publisher.deleted
    assert sum(campaign.faults.values()) > 0


def test_consumers_beside_a_publisher(
    s3_root: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    campaign = run_campaign(s3_root, s3_server, tmp_path, monkeypatch, publications=8, consumers=4, faults=0.4)
    logging.getLogger(__name__).warning("%s", campaign)
    check_campaign(campaign, 8)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_many_consumers_beside_a_publisher(
    s3_root: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LACUNA_LARGE_BYTES", str(9 << 20))  # so large that it is fetched in pieces
    publications = int(os.environ.get("LACUNA_PUBLICATIONS", "50"))
    campaign = run_campaign(s3_root, s3_server, tmp_path, monkeypatch, publications=publications, consumers=8)
    logging.getLogger(__name__).warning("%s", campaign)
    check_campaign(campaign, publications)


# ---------------------------------------------------------------------------------------------- the documented layout


def example(name: str) -> str:
    """A block of docs/consumers.md: the one after a comment that names it."""
    text = (REPO / "docs" / "consumers.md").read_text()
    (found,) = re.findall(rf"<!-- example: {name} -->\n```\w+\n(.*?)```\n", text, re.DOTALL)
    return found


@pytest.fixture
def aws() -> str:
    """The AWS command line: of the machine, or the one that `make aws` installs."""
    found = shutil.which("aws") or shutil.which("aws", path=str(REPO / "var" / "tools" / "aws" / "bin"))
    if found is None:
        pytest.skip("no AWS command line on PATH, and none in var/tools/aws (make aws)")
    return found


@pytest.fixture
def published(s3_root: str, tmp_path: Path) -> Publisher:
    publisher = Publisher(open_store(s3_root), tmp_path)
    publisher.publish(1)
    return publisher


def test_a_shell_with_aws_and_sha256sum_is_enough(published: Publisher, tmp_path: Path, aws: str):
    script = example("shell")
    assert "python" not in script
    environment = {**os.environ, "PATH": f"{Path(aws).parent}:{os.environ['PATH']}"}

    def consume() -> subprocess.CompletedProcess[str]:
        arguments = ["sh", "-c", script, "consume", published.store.uri, "stable", "model"]
        return subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    done = consume()
    assert done.returncode == 0, done.stderr
    assert check_folder(tmp_path / "model") == 1
    large = f"exports/{RUN}/step-00000001/weights/large"
    published.store.put(large, content_of(2, "weights/large"))
    done = consume()
    assert done.returncode != 0
    assert "weights/large: FAILED" in done.stdout
    assert check_folder(tmp_path / "model") == 1  # what was there stays


def test_the_python_examples_are_true(published: Publisher, tmp_path: Path):
    shutil.copy(REPO / "infra" / "lacuna_pull.py", tmp_path)
    code = example("python").replace("s3://bucket/prefix", published.store.uri)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert check_folder(tmp_path / "models" / "stable") == 1


def test_published_schemas_are_what_the_models_say():
    folder = REPO / "docs" / "schemas"
    assert {path.name for path in folder.iterdir()} == set(texts())
    for name, text in texts().items():
        assert (folder / name).read_text() == text, "say: python -m flows.schemas docs/schemas"


def test_what_is_written_is_of_the_published_schemas(published: Publisher):
    store = published.store
    prefix = f"exports/{RUN}/step-00000001"
    written = {
        "bundle.v1": store.read(f"{prefix}/{MANIFEST_NAME}"),
        "channel.v1": store.read("channels/stable.json"),
        "presigned.v1": presign(store, "stable", 60).model_dump_json().encode(),
    }
    assert written.keys() | {"manifest.v1"} == MODELS.keys()
    for name, data in written.items():
        validator = jsonschema.Draft202012Validator(schema_of(name))
        assert list(validator.iter_errors(json.loads(data))) == []
        newer = {**json.loads(data), "format_version": 2}
        assert list(validator.iter_errors(newer)) != []
    jsonschema.Draft202012Validator.check_schema(schema_of("manifest.v1"))
    # One value a line, in this order: a shell reads it without a parser.
    lines = written["bundle.v1"].decode().splitlines()
    begin = lines.index(' "files": [')
    assert [line.split('"')[1] for line in lines[begin + 2 : begin + 5]] == ["name", "num_bytes", "sha256"]
    assert lines[begin + 1] == "  {"
    assert load_bundle(store, prefix).files[0].name == lines[begin + 2].split('"')[3]


# ------------------------------------------------------------------------------------------------------- command line


def lacuna(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_pull_and_presign_on_the_command_line(published: Publisher, tmp_path: Path):
    root = published.store.uri
    done = lacuna("pull", "stable", "--to", "model", "--root", root, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'model'}\n"), done.stderr
    assert "verified" in done.stderr
    again = lacuna("pull", "stable", "--to", "model", "--root", root, "--if-changed", "--json", cwd=tmp_path)
    told = json.loads(again.stdout)
    assert (told["is_changed"], told["step"], told["to"]) == (False, 1, str(tmp_path / "model"))
    assert "unchanged" in again.stderr
    signed = lacuna("presign", "stable", "--expires", "600", "--root", root, cwd=tmp_path)
    assert json.loads(signed.stdout)["bundle"] == told["bundle"]
    refused = lacuna("presign", "stable", "--root", str(tmp_path / "store"), cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert len(refused.stderr.splitlines()) == 1
