"""What a flow-run page shows, under a real Prefect server, and what the world outside may not do to it."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
import pytest
from PIL import Image

from flows.artifacts import class_of, inline_picture, link, previous_measures
from flows.results import PublishSummary, StageSummary, TrainSummary, ValidationSummary
from infra.bundles import commit_bundle
from infra.channels import move_channel, pointer_to
from infra.storage import ObjectStore, open_store
from preprocessing.contracts.manifest import DatasetFile, Manifest, ShardReport
from preprocessing.stage import rejects_table

pytestmark = [
    pytest.mark.usefixtures("prefect_api"),
    # Prefect leaves its clients' sockets to the garbage collector, which may come by during any test here.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

PREFIX = "datasets/download/0123456789abcdef"
TRAINED = TrainSummary(
    run_id="demo-1", step=20, prefix="runs/demo-1/checkpoints/step-00000020", checkpoint="/s/c", dataset_prefix=PREFIX,
    was_done=False, seconds=75.0,
)  # fmt: skip


def in_a_flow(function: Callable[[], None]) -> None:
    from prefect import flow

    flow(name="any")(function)()


def artifact(key: str) -> Any:
    from prefect.artifacts import Artifact

    found = cast("Artifact | None", Artifact.get(key))  # typed for async callers, too
    assert found is not None
    return found


def downloaded(store: ObjectStore, folder: Path) -> tuple[StageSummary, Manifest]:
    """A dataset of which four of five rows were lost."""
    lost = [
        ("http://a.example/1.jpg", "http_client_error", "HTTP 404 Not Found"),
        ("http://a.example/2.jpg", "http_client_error", "HTTP 404 Not Found"),
        ("http://b.example/3.jpg", "timed_out", "no answer from b.example within 5 s"),
        ("http://evil|host/4.jpg", "bad_response", "![x](http://beacon.example/p.png) | <script>"),
    ]
    table = rejects_table([str(i) for i in range(4)], *(list(column) for column in zip(*lost, strict=True)))
    pq.write_table(table, folder / "rejects.parquet")
    store.upload(f"{PREFIX}/rejects-00000.parquet", folder / "rejects.parquet")
    dropped = {"http_client_error": 2, "timed_out": 1, "bad_response": 1}
    size = (folder / "rejects.parquet").stat().st_size
    files = (
        DatasetFile(name="shard-00000.parquet", num_bytes=1, sha256="0" * 64, num_rows=1),
        DatasetFile(name="rejects-00000.parquet", num_bytes=size, sha256="0" * 64, num_rows=4, kind="rejects"),
    )
    manifest = Manifest(
        stage="download", stage_version=1, digest="0123456789abcdef" * 4, parents={}, config={}, code_version="0",
        shards=(ShardReport(index=0, num_in=5, num_out=1, dropped=dropped, files=files),), created_at="2026-11-23",
    )  # fmt: skip
    summary = StageSummary(
        stage="download", manifest_uri=store.uri_of(f"{PREFIX}/MANIFEST.json"), prefix=PREFIX, digest=manifest.digest,
        num_in=5, num_out=1, dropped=dropped, was_done=False, seconds=1.0,
    )  # fmt: skip
    return summary, manifest


def validated(store: ObjectStore, folder: Path, run_id: str, step: int, psnr: float) -> ValidationSummary:
    """A report that stands in the store."""
    prefix = f"runs/{run_id}/validation/step-{step:08d}"
    scratch = folder / f"{run_id}-{step}"
    scratch.mkdir()
    (scratch / "report.json").write_text(json.dumps({"summary": {"masked_psnr_db": psnr}}))
    Image.effect_noise((900, 700), 90).convert("RGB").save(scratch / "grid.png")
    commit_bundle(store, prefix, scratch, kind="report", run_id=run_id, step=step)
    return ValidationSummary(
        run_id=run_id, step=step, prefix=prefix, report=store.uri_of(f"{prefix}/report.html"),
        grid=store.uri_of(f"{prefix}/grid.png"), summary={"masked_psnr_db": psnr, "families": {}}, num_samples=2,
        num_object_samples=0, was_done=False, seconds=2.0,
    )  # fmt: skip


def test_lost_pictures_are_told_by_kind_reason_words_and_host(tmp_path: Path) -> None:
    from flows import artifacts

    store = open_store(str(tmp_path / "store"))
    summary, manifest = downloaded(store, tmp_path)
    in_a_flow(lambda: artifacts.stage_report(summary, store, manifest))
    text = str(artifact("download-errors").data)
    assert text.startswith("# 4 of 5 pictures did not arrive")
    assert "| HTTP | 3 | 60.0 % |" in text
    assert "| network | `timed_out` | 1 | 20.0 % |" in text
    assert "| `http_client_error` | HTTP 404 Not Found | 2 |" in text
    assert "| a.example | 2 | `http_client_error` |" in text
    assert "<script>" not in text
    assert "![x]" not in text


def test_validation_is_held_against_the_one_before(tmp_path: Path) -> None:
    from flows import artifacts

    store = open_store(str(tmp_path / "store"))
    first = validated(store, tmp_path, "demo-1", 10, psnr=20.0)
    assert previous_measures(store, first) == ({}, "")
    second = validated(store, tmp_path, "demo-1", 20, psnr=21.5)
    in_a_flow(lambda: artifacts.report(second, store))
    text = str(artifact("validation-report").data)
    assert "| masked_psnr_db | 21.5 | 20 | +1.5 |" in text
    assert "`step-00000010` of the same run" in text
    assert "families" not in text
    picture = str(artifact("validation-samples").data)
    assert picture.startswith("data:image/jpeg;base64,")
    assert len(picture) < 410_000


def test_a_runs_first_validation_is_held_against_the_channel(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    other = validated(store, tmp_path, "demo-0", 10, psnr=19.0)
    pointer = pointer_to(store, "latest", other.prefix, {"masked_psnr_db": 19.0})
    move_channel(store, "latest", pointer, lambda current: True)
    first = validated(store, tmp_path, "demo-1", 10, psnr=20.0)
    measures, whose = previous_measures(store, first)
    assert measures == {"masked_psnr_db": 19.0}
    assert "demo-0" in whose


def test_the_story_has_rows_measures_channels_and_links(tmp_path: Path) -> None:
    from flows import artifacts

    store = open_store(str(tmp_path / "store"))
    _, manifest = downloaded(store, tmp_path)
    report = validated(store, tmp_path, "demo-1", 20, psnr=21.5)
    published = PublishSummary(
        run_id="demo-1", step=20, prefix="exports/e", export="/s/exports/e", channel={"latest": "moved to exports/e"},
        was_done=False, seconds=1.0,
    )  # fmt: skip
    in_a_flow(lambda: artifacts.story(store, [(PREFIX, manifest)], TRAINED, report, published))
    text = str(artifact("story").data)
    assert text.startswith("# demo-1, step 20")
    assert "| download | 5 | 1 | 20.0 % |" in text
    assert "`latest` moved to exports/e" in text
    assert "[exports/e](file:///s/exports/e)" in text
    assert "| masked_psnr_db | 21.5 |" in text


@pytest.mark.parametrize(
    ("uri", "markdown"),
    [
        ("/a b/r.html", "[a b/r.html](file:///a%20b/r.html)"),
        ("https://x.example/r.html", "[x.example/r.html](https://x.example/r.html)"),
        ("s3://b/k/r.html", "[k/r.html](https://console.aws.amazon.com/s3/object/b?prefix=k/r.html)"),
        ("s3://b/k", "[b/k](https://console.aws.amazon.com/s3/buckets/b?prefix=k/)"),
    ],
)
def test_links_can_be_clicked(uri: str, markdown: str) -> None:
    assert link(uri) == markdown


def test_a_store_of_ones_own_has_no_console(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert link("s3://b/k") == "`s3://b/k`"


def test_a_small_picture_stays_as_it_is_and_a_large_one_fits() -> None:
    data = io.BytesIO()
    Image.effect_noise((600, 600), 90).save(data, "PNG")
    assert base64.b64decode(inline_picture(data.getvalue(), 10**7).partition(",")[2]) == data.getvalue()
    small = inline_picture(data.getvalue(), 20_000)
    with Image.open(io.BytesIO(base64.b64decode(small.partition(",")[2]))) as picture:
        assert picture.width < 600
    with pytest.raises(ValueError, match="over 10 bytes"):
        inline_picture(data.getvalue(), 10)


def test_details_that_differ_in_names_and_numbers_are_of_one_class() -> None:
    assert class_of("no answer from b.example:8080 in 5 s", "b.example") == "no answer from … in 5 s"
    assert class_of("got 12345 of 23456 bytes", "h") == class_of("got 99999 of 10000 bytes", "h")
    assert class_of("HTTP 404 Not Found", "h") != class_of("HTTP 410 Gone", "h")
    assert class_of(None, "h") == ""
