"""The download stage against a real server and a real engine; where only our side is meant, a child stands in."""

import io
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.errors import ContractError, GateError, TransientError
from infra.storage import ObjectStore, open_store
from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.manifest import Manifest, ShardReport, dataset_prefix
from preprocessing.contracts.reasons import Reason
from preprocessing.contracts.schemas import DOWNLOADED
from preprocessing.demo.server import awkward_path, picture_path, running_server
from preprocessing.download import fetch
from preprocessing.download.fetch import REQUESTS, child_environment, fetch_shards
from preprocessing.download.images import NormalizedImage
from preprocessing.download.stage import DownloadStage, ask_again, check_gate, requests_of, shard_output
from preprocessing.stage import Progress, RowsFile, WrittenFile, run_shards, run_stage
from tests.preprocessing.given import Given, rows_of

SEED = 3
CONFIG = DownloadConfig.model_validate(
    {
        "allow_networks": ["127.0.0.0/8"],
        "image_size_px": 48,
        "max_image_area_px": 16_000_000,
        "timeout_s": 8,  # the slow picture takes 20; a busy machine must not fail the others
        "retries": 0,
        "num_threads": 16,
    }
)

KINDS: dict[str, Reason | None] = {
    "missing": Reason.HTTP_CLIENT_ERROR,
    "server_error": Reason.HTTP_SERVER_ERROR,
    "redirect": None,
    "html": Reason.NOT_AN_IMAGE,
    "truncated": Reason.IMAGE_TRUNCATED,
    "empty": Reason.EMPTY_FILE,
    "huge": Reason.IMAGE_TOO_LARGE,
    "alpha": None,
    "cmyk": None,
    "animated": None,
    "gray": None,
    "webp": None,
    "opted_out": Reason.OPTED_OUT,
    "opted_out_noimageai": Reason.OPTED_OUT,
}


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of loopback that refuses connections: bound, but nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def rejected(store: ObjectStore, manifest: Manifest) -> dict[str, tuple[str, str]]:
    """URL → reason and detail."""
    prefix = dataset_prefix(manifest.stage, manifest.digest)
    tables = [pq.read_table(pa.BufferReader(store.read(f"{prefix}/{file.name}"))) for file in manifest.files("rejects")]
    return {row["url"]: (row["reason"], row["detail"]) for table in tables for row in table.to_pylist()}


def arrived(store: ObjectStore, manifest: Manifest, index: int) -> pa.Table:
    prefix = dataset_prefix(manifest.stage, manifest.digest)
    (file,) = [file for file in manifest.shards[index].files if file.kind == "rows"]
    return pq.read_table(pa.BufferReader(store.read(f"{prefix}/{file.name}")))


def kill_engine(folder: Path) -> list[int]:
    """Kills the engine that works below a folder, as the kernel does when memory runs out."""
    killed = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if words[1:2] == ["-P"] and "--job" in words and any(str(folder) in word for word in words):
            os.kill(int(process.name), signal.SIGKILL)
            killed.append(int(process.name))
    return killed


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the child through /proc")
def test_the_stage(
    store: ObjectStore,
    tmp_path: Path,
    closed_port: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{closed_port}")  # must not be used
    with running_server() as port:
        site = f"http://127.0.0.1:{port}"
        good = [f"{site}{picture_path(SEED, index, kind)}" for index, kind in enumerate(["jpg", "png", "webp"] * 2)]
        expected: dict[str, Reason | None] = {
            f"{site}{awkward_path(SEED, kind, 50)}": reason for kind, reason in KINDS.items()
        }
        expected |= {
            f"http://127.0.0.1:{closed_port}/a.jpg": Reason.CONNECTION_FAILED,
            "http://nowhere.invalid/a.jpg": Reason.HOST_UNKNOWN,
            "http://10.0.0.1/a.jpg": Reason.URL_REFUSED,
            "file:///etc/hostname": Reason.URL_REFUSED,
        }
        slow = f"{site}{awkward_path(SEED, 'slow', 51)}"
        refused = ["http://169.254.169.254/latest/meta-data", "http://[::1]/a.jpg"]
        # The slow picture keeps the second shard open while the child is killed; the last two ask for nothing.
        shards = [[*good[:3], *expected], [slow, *good[3:], f"{site}/{SEED}/999999.gif"], refused, []]
        selected = run_stage(store, Given(shards))

        stage = DownloadStage(store, selected, CONFIG)
        manifest = run_stage(store, stage)

        other_store = open_store(str(tmp_path / "other"))
        shutil.copytree(tmp_path / "store" / "datasets" / "select", tmp_path / "other" / "datasets" / "select")
        killed: list[int] = []

        def kill_after_first(progress: Progress) -> None:
            if progress.report is not None and progress.report.index == 0 and not killed:
                killed.extend(kill_engine(tmp_path))

        # More patience, so that the slow picture is still waited for when the child is killed: not part of the digest.
        patient = CONFIG.model_copy(update={"timeout_s": 15})
        with caplog.at_level(logging.WARNING):
            again = run_stage(other_store, DownloadStage(other_store, selected, patient), kill_after_first)

    assert manifest.num_in == sum(map(len, shards))
    for shard, urls in zip(manifest.shards, shards, strict=True):
        assert shard.num_in == len(urls) == shard.num_out + sum(shard.dropped.values())

    found = rejected(store, manifest)
    wanted = {url: reason.value for url, reason in expected.items() if reason is not None}
    wanted |= dict.fromkeys(refused, Reason.URL_REFUSED.value)
    wanted |= {slow: Reason.TIMED_OUT.value, shards[1][-1]: Reason.HTTP_CLIENT_ERROR.value}
    assert {url: reason for url, (reason, _) in found.items()} == wanted
    assert all(detail for _, detail in found.values())

    kept = arrived(store, manifest, 0)
    assert kept.schema.equals(DOWNLOADED)
    assert kept.column("url").to_pylist() == [url for url in shards[0] if url not in wanted]
    assert all(data.startswith(b"\xff\xd8") for data in kept.column("image").to_pylist())
    assert set(kept.column("image_width").to_pylist() + kept.column("image_height").to_pylist()) >= {48}
    assert len(set(kept.column("sha256").to_pylist())) == kept.num_rows

    assert len(killed) == 1, "the child had ended before it could be killed"
    assert "ended with -9 and left 2 shards undone (1, 2), attempt 1 of 2" in " ".join(caplog.messages)
    assert again.digest == manifest.digest
    assert [file.sha256 for file in again.files()] == [file.sha256 for file in manifest.files()]
    assert again.dropped == manifest.dropped


# A child that does what the engine does, as far as it is told: `made` shards, then what `then` says.
_STAND_IN = """
import json, os, pathlib, sys, time
import pyarrow as pa, pyarrow.parquet as pq
job = json.loads(pathlib.Path(sys.argv[2]).read_text())
results = pathlib.Path(job["output"])
requests = sorted(pathlib.Path(job["input"]).iterdir())
integers = ("width", "height", "original_width", "original_height")
strings = ("uid", "sha256", "status", "error_message", "reason")
schema = pa.schema([(n, "string") for n in strings] + [(n, "int32") for n in integers] + [("jpg", "binary")])
for number, file in enumerate(requests[:{made}]):
    rows = [
        dict.fromkeys(integers, 1) | dict(uid=r["uid"], sha256="0", **{row})
        for r in pq.read_table(file).to_pylist()
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), results / f"{{number:08d}}.parquet")
    (results / f"{{number:08d}}_stats.json").write_text("{{}}")
(results / f"{{len(requests) - 1:08d}}_stats.json").touch()  # begun, and never finished
print("these are my last words", flush=True)
{then}
"""
_ARRIVED = 'dict(jpg=r["url"].encode(), status="success", reason=None, error_message=None)'
_REFUSED = 'dict(jpg=None, status="failed_to_download", reason="connection_failed", error_message="refused")'


def stand_in(made: int, then: str, row: str = _ARRIVED) -> list[str]:
    return ["-c", _STAND_IN.format(made=made, then=then, row=row)]


def requests(*indices: int) -> dict[int, pa.Table]:
    return {
        index: pa.Table.from_pylist([{"uid": f"u{index}", "url": f"http://{index}"}], schema=REQUESTS)
        for index in indices
    }


def test_shards_that_the_first_child_left_are_done_by_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_ENGINE", stand_in(made=2, then="sys.exit(0)"))
    # The child's own numbers start at 0 in each run: the rows tell that ours are kept apart.
    found = {}
    for shard in fetch_shards(requests(4, 7, 9), CONFIG, tmp_path):
        assert shard.index not in found
        found[shard.index] = [row for batch in shard.batches() for row in batch]
    assert {index: (rows[0].uid, rows[0].result) for index, rows in found.items()} == {
        index: (f"u{index}", NormalizedImage(f"http://{index}".encode(), 1, 1, 1, 1, "0")) for index in (4, 7, 9)
    }
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_does_nothing_is_a_transient_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_ENGINE", stand_in(made=0, then="sys.exit(0)"))
    with pytest.raises(
        TransientError, match=r"(?s)ended with 0 and left 2 shards undone \(3, 5\).*these are my last words"
    ):
        list(fetch_shards(requests(3, 5), CONFIG, tmp_path))


def test_a_child_that_stalls_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_ENGINE", ["-c", "import time; time.sleep(600)"])
    config = CONFIG.model_copy(update={"stall_timeout_s": 0.5})
    with pytest.raises(TransientError, match=r"made no progress for 0\.5 s \(download\.stall_timeout_s\)"):
        list(fetch_shards(requests(0), config, tmp_path))
    assert kill_engine(tmp_path) == []


def test_a_listener_that_leaves_takes_the_child_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_ENGINE", stand_in(made=1, then="time.sleep(600)"))
    shards = fetch_shards(requests(0, 1), CONFIG, tmp_path)
    assert next(shards).index == 0
    shards.close()  # pyright: ignore[reportAttributeAccessIssue]  # it is a generator
    assert kill_engine(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_the_engine_never_mentions_is_lost_and_counted() -> None:
    output = shard_output(5, rows_of(["http://a.example/1", "http://a.example/2"]), {})
    (rows,) = output.rows
    assert isinstance(rows, RowsFile)
    assert rows.table.num_rows == 0
    assert rows.table.schema.equals(DOWNLOADED)
    assert not isinstance(output.rejects, WrittenFile)
    assert output.rejects.column("reason").to_pylist() == [Reason.LOST_BY_DOWNLOADER] * 2


def test_hashes_are_handed_on_where_the_selected_rows_have_them() -> None:
    table = rows_of(["http://a.example/1"])
    without = table.select([name for name in table.column_names if not name.startswith("expected_")])
    assert requests_of(without).schema.equals(REQUESTS)
    assert requests_of(without).column("expected_md5").to_pylist() == [None]
    given = without.append_column("expected_md5", pa.array(["ab"])).append_column("expected_sha256", pa.array(["cd"]))
    assert requests_of(given).column("expected_md5").to_pylist() == ["ab"]
    assert requests_of(given).column("expected_sha256").to_pylist() == ["cd"]


def test_nothing_is_refused_for_ever_while_nobody_answers(
    store: ObjectStore, tmp_path: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is down: no shard is committed, so that the same command works once it is up."""
    monkeypatch.setattr(fetch, "_ENGINE", stand_in(made=9, then="", row=_REFUSED))
    site = f"http://127.0.0.1:{closed_port}"
    selected = run_stage(store, Given([[f"{site}/{index}.jpg"] for index in range(2)]))
    stage = DownloadStage(store, selected, CONFIG)
    seen: list[Progress] = []
    with pytest.raises(TransientError, match=r"0 of 2 pictures arrived \(connection_failed 2\): is the server up"):
        run_stage(store, stage, seen.append)
    assert list(store.list(f"{dataset_prefix('download', stage.digest)}/")) == []
    with pytest.raises(TransientError):  # nor for a part of the shards
        run_shards(store, stage, [1])
    # Once somebody has answered, in this run or an earlier one, these are dead links.
    monkeypatch.setattr(fetch, "_ENGINE", stand_in(made=9, then="", row=_ARRIVED))
    run_shards(store, stage, [0])
    monkeypatch.setattr(fetch, "_ENGINE", stand_in(made=9, then="", row=_REFUSED))
    assert run_stage(store, stage).dropped == {"connection_failed": 1}


def test_the_digest_names_what_changes_the_result(store: ObjectStore) -> None:
    selected = run_stage(store, Given([[]]))
    digest = DownloadStage(store, selected, CONFIG).digest
    for same in ({"num_threads": 3}, {"timeout_s": 1.5}, {"retries": 9}, {"stall_timeout_s": 1.0}):
        assert DownloadStage(store, selected, CONFIG.model_copy(update=same)).digest == digest
    for other in ({"image_size_px": 49}, {"allow_networks": ()}, {"encode_quality": 90}):
        assert DownloadStage(store, selected, CONFIG.model_copy(update=other)).digest != digest


def test_a_changed_shard_of_the_selection_is_refused(store: ObjectStore, tmp_path: Path) -> None:
    selected = run_stage(store, Given([["http://10.0.0.1/"]]))
    name = f"{dataset_prefix('select', selected.digest)}/shard-00000.parquet"
    store.put(name, store.read(name) + b"!")
    with pytest.raises(ContractError, match="its manifest says"):
        list(DownloadStage(store, selected, CONFIG).outputs([0], tmp_path))


def manifest_of(num_out: int, dropped: dict[str, int]) -> Manifest:
    report = ShardReport.model_construct(
        index=0, num_in=num_out + sum(dropped.values()), num_out=num_out, dropped=dropped, files=()
    )
    return Manifest.model_construct(stage="download", shards=(report,))


def test_the_gate() -> None:
    with pytest.raises(GateError) as refused:
        check_gate(manifest_of(0, {"connection_failed": 3900}), CONFIG)
    assert str(refused.value) == (
        "download: 0 of 3,900 pictures arrived (connection_failed 3,900): "
        "is the server up, are the networks allowed? see download.allow_networks"
    )
    half = CONFIG.model_copy(update={"min_success_rate": 0.5})
    check_gate(manifest_of(1, {"timed_out": 1}), half)
    check_gate(manifest_of(1, {"timed_out": 99}), CONFIG)
    with pytest.raises(GateError, match=r"1 of 3 pictures arrived .* under download\.min_success_rate = 0\.5"):
        check_gate(manifest_of(1, {"timed_out": 2}), half)


def test_what_the_gate_refuses_is_not_complete_and_is_not_downloaded_again(store: ObjectStore) -> None:
    def make(least: float, told: list[Progress] | None = None) -> Manifest:
        config = CONFIG.model_copy(update={"min_success_rate": least})
        stage = DownloadStage(store, selected, config)
        return run_stage(store, stage, None if told is None else told.append, lambda found: check_gate(found, config))

    with running_server() as port:
        site = f"http://127.0.0.1:{port}"
        good = [f"{site}{picture_path(SEED, index)}" for index in range(3)]
        selected = run_stage(store, Given([[*good[:2], f"{site}{awkward_path(SEED, 'missing', 50)}"], good[2:]]))
        with pytest.raises(
            GateError, match=r"3 of 4 .*0\.750 is under download\.min_success_rate = 0\.9; what arrived is"
        ):
            make(0.9)
    prefix = dataset_prefix("download", DownloadStage(store, selected, CONFIG).digest)
    before = {info.key: info.etag for info in store.list(f"{prefix}/")}
    assert f"{prefix}/MANIFEST.json" not in before
    told: list[Progress] = []
    with pytest.raises(GateError, match=r"min_success_rate = 0\.8"):
        make(0.8, told)  # the server is gone: nothing is asked for
    assert {info.key: info.etag for info in store.list(f"{prefix}/")} == before
    manifest = make(0.7, told)
    assert [progress.num_done for progress in told] == [2, 2]  # both shards were done, in both runs
    assert (manifest.num_in, manifest.num_out) == (4, 3)
    after = {info.key: info.etag for info in store.list(f"{prefix}/")}
    assert {key: etag for key, etag in after.items() if key in before} == before
    assert set(after) - set(before) == {f"{prefix}/MANIFEST.json"}


class _Answers(BaseHTTPRequestHandler):
    """A picture, or 503 as long as there is an outage."""

    picture = b""
    is_out = True

    def do_GET(self) -> None:
        self.send_response(503 if type(self).is_out else 200)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(0 if type(self).is_out else len(self.picture)))
        self.end_headers()
        if not type(self).is_out:
            self.wfile.write(self.picture)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class' name
        pass


def test_an_outage_that_is_over_leaves_nothing_behind(store: ObjectStore) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(buffer, "JPEG")
    _Answers.picture, _Answers.is_out = buffer.getvalue(), True
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    site = f"http://127.0.0.1:{server.server_port}"
    selected = run_stage(store, Given([[f"{site}/{shard}-{index}.jpg" for index in range(3)] for shard in range(2)]))

    def make() -> Manifest:
        stage = DownloadStage(store, selected, CONFIG)

        def gate(found: Manifest) -> None:
            try:
                check_gate(found, CONFIG)
            except GateError:
                ask_again(store, stage, found)
                raise

        return run_stage(store, stage, gate=gate)

    try:
        with pytest.raises(GateError, match="0 of 6"):
            make()
        _Answers.is_out = False
        manifest = make()
    finally:
        server.shutdown()
        server.server_close()
    assert (manifest.num_in, manifest.num_out) == (6, 6)
    prefix = dataset_prefix("download", manifest.digest)
    there = {info.key for info in store.list(f"{prefix}/") if info.key.endswith(".parquet")}
    assert there == {f"{prefix}/{file.name}" for shard in manifest.shards for file in shard.files}


def test_the_childs_environment() -> None:
    given = {
        "PATH": "/bin",
        "HTTPS_PROXY": "x",
        "all_proxy": "x",
        "no_proxy": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "PREFECT_API_URL": "x",
        "WANDB_API_KEY": "x",
        "MY_TOKEN": "x",
    }
    root = str(Path(fetch.__file__).resolve().parents[2])
    assert child_environment(given) == {"PATH": "/bin", "PYTHONPATH": root, "no_proxy": "*"}
    assert child_environment({"PYTHONPATH": "/a:/b"})["PYTHONPATH"] == f"{root}{os.pathsep}/a:/b"
