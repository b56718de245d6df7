"""Validation of random weights on real pictures of the demo world: what is read, measured, written and shown."""

import io
import json
import sys
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from validation_fixtures import demo_rows, make_spec, with_judge, write_checkpoint, write_dataset

from infra.bundles import verify_bundle
from infra.errors import ContractError
from infra.launch import run_module
from infra.storage import ObjectStore, open_store
from model.tiny.world import scene_at
from preprocessing.contracts.config import ModelConfig
from training.heldout import HeldOutPicture, HeldOutRows
from training.inpainting import mean_fill, square_around, telea_fill
from training.report import Row, Section, display_text, grid_image, render_html
from training.runspec_validation import ValidationSpec
from training.validation import deranged, validate
from training.validation_objects import demo_scene_of, hide_objects, is_demo_row, object_mask


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> tuple[ObjectStore, ValidationSpec]:
    folder = tmp_path_factory.mktemp("validation")
    store = open_store(str(folder / "store"))
    dataset = write_dataset(store, folder / "rows", demo_rows(15))
    checkpoint = write_checkpoint(store, folder / "weights", tiny_model_dir, 100)
    model = with_judge(tiny_model_dir, folder / "model")
    return store, make_spec(store, dataset, checkpoint, model, num_object_samples=6)


@pytest.fixture(scope="module")
def report(world: tuple[ObjectStore, ValidationSpec], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    store, spec = world
    result = validate(spec, tmp_path_factory.mktemp("scratch"))
    assert result["was_done"] is False
    assert result["prefix"] == "runs/test-0123456789ab/validation/step-00000100"
    assert verify_bundle(store, result["prefix"]) == []
    report = json.loads(store.read(f"{result['prefix']}/report.json"))
    assert report["summary"] == result["summary"]
    return report


def test_report_says_everything_for_every_method(report: dict[str, Any]):
    assert set(report["by_mask"]) == {"lama_medium_256", "lama_thick_256"}
    for figures in report["by_mask"].values():
        assert figures["num_samples"] == 3
        for method in ("model", "mean_fill", "telea", "shuffled"):
            assert set(figures[method]) >= {"masked_psnr_db", "masked_ssim", "masked_l1", "image_text_similarity"}
            assert 0 < figures[method]["masked_l1"] < 1
            assert 0 < figures[method]["masked_psnr_db"] < 60
        assert set(figures["original"]) == {"image_text_similarity"}
        assert figures["model"]["known_region_l1"] > 0
    by_mask = [figures["model"]["masked_psnr_db"] for figures in report["by_mask"].values()]
    assert report["summary"]["masked_psnr_db"] == pytest.approx(np.mean(by_mask))
    assert all(isinstance(value, float) for value in report["summary"].values())
    assert report["summary"]["psnr_gain_over_telea_db"] == pytest.approx(
        report["summary"]["masked_psnr_db"] - report["summary"]["telea_masked_psnr_db"]
    )
    conditions = report["prompt_following"]["conditions"]
    assert set(conditions) == {"original", "model", "shuffled", "shuffled_given", "mean_fill", "telea"}
    assert report["prompt_following"]["chance"] == pytest.approx(1 / 48)
    assert report["prompt_following"]["num_samples"] == 6
    for figures in conditions.values():
        assert all(-1 <= value <= 1 if "similarity" in name else 0 <= value <= 1 for name, value in figures.items())
    timesteps = {f"t_{t:04d}" for t in range(50, 1000, 100)}
    assert {kind: set(losses) for kind, losses in report["loss_by_timestep"].items()} == {
        "partial": timesteps,
        "full": timesteps,
    }
    assert report["summary"]["validation_loss"] == pytest.approx(
        np.mean(list(report["loss_by_timestep"]["partial"].values()))
    )


def test_second_validation_finds_the_first(
    world: tuple[ObjectStore, ValidationSpec], report: dict[str, Any], tmp_path: Path
):
    result = validate(world[1], tmp_path)
    assert result == {
        "prefix": "runs/test-0123456789ab/validation/step-00000100",
        "summary": report["summary"],
        "was_done": True,
    }


def test_same_inputs_give_the_same_figures_elsewhere(
    world: tuple[ObjectStore, ValidationSpec], report: dict[str, Any], tmp_path: Path, tiny_model_dir: Path
):
    """In another store, through a real child process."""
    store = open_store(str(tmp_path / "store"))
    dataset = write_dataset(store, tmp_path / "rows", demo_rows(15))
    checkpoint = write_checkpoint(store, tmp_path / "weights", tiny_model_dir, 100)
    spec = world[1].model_copy(update={"store_uri": store.uri})
    assert (dataset, checkpoint) == (spec.dataset_prefix, spec.checkpoint_prefix)
    events: list[dict[str, Any]] = []
    result = run_module(
        "training.validation", spec.model_dump(mode="json"), workdir=tmp_path / "work", on_event=events.append
    )
    assert json.loads(store.read(f"{result['prefix']}/report.json")) == report
    assert [event["what"] for event in events if event["event"] == "validation"] == [
        "repaint lama_medium_256",
        "repaint lama_thick_256",
        "prompt-following",
        "loss",
    ]


def test_other_validation_of_the_same_checkpoint_has_a_folder_of_its_own(
    world: tuple[ObjectStore, ValidationSpec], report: dict[str, Any]
):
    store, spec = world
    other = spec.model_copy(update={"config": spec.config.model_copy(update={"seed": 1})})
    assert spec.report_prefix(store) == "runs/test-0123456789ab/validation/step-00000100"
    assert other.report_prefix(store) == f"runs/test-0123456789ab/validation/step-00000100-{other.digest[:8]}"


def test_a_base_without_a_judge_is_validated_without_prompt_following(
    world: tuple[ObjectStore, ValidationSpec], tmp_path: Path, tiny_model: ModelConfig
):
    store, spec = world
    result = validate(spec.model_copy(update={"run_id": "no-judge", "model": tiny_model}), tmp_path)
    assert json.loads(store.read(f"{result['prefix']}/report.json"))["prompt_following"] is None
    assert "object_agreement" not in result["summary"]


def test_what_does_not_fit_is_refused_by_name(world: tuple[ObjectStore, ValidationSpec], tmp_path: Path):
    store, spec = world
    fresh = spec.model_copy(update={"run_id": "other"})
    with pytest.raises(ContractError, match="prepare the dataset first"):
        validate(fresh.model_copy(update={"dataset_prefix": "datasets/encode/0000"}), tmp_path / "b")
    rows = demo_rows(3)
    empty = write_dataset(store, tmp_path / "rows", rows, num_train=3)
    with pytest.raises(ContractError, match="validation_fraction"):
        validate(fresh.model_copy(update={"dataset_prefix": empty}), tmp_path / "c")
    assert not list(store.list("runs/other/"))


# --------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("backend", ["folder", "s3"])
def test_only_held_out_rows_are_read_in_an_order_of_their_own(
    backend: str, request: pytest.FixtureRequest, tmp_path: Path
):
    store = open_store(str(tmp_path / "store") if backend == "folder" else request.getfixturevalue("s3_root"))
    rows = demo_rows(10)
    prefix = write_dataset(store, tmp_path / "rows", rows)
    held_out = HeldOutRows(store, prefix, tmp_path / "scratch")
    assert len(held_out) == 7
    everything = held_out.choose(100, "validation")
    assert {picture.uid for picture in everything} == {row["uid"] for row in rows[3:]}
    assert [p.uid for p in held_out.choose(4, "validation")] == [p.uid for p in everything[:4]]
    assert [p.uid for p in held_out.choose(100, "objects")] != [p.uid for p in everything]
    by_uid = {row["uid"]: row for row in rows}
    for picture in everything:
        assert picture.caption == by_uid[picture.uid]["caption"]
        with Image.open(io.BytesIO(by_uid[picture.uid]["image"])) as image:
            assert (picture.image == np.asarray(image)).all()
    wanted = rows[5]["caption"]
    assert [p.caption for p in held_out.choose(9, "x", lambda url, caption: caption == wanted)] == [wanted]


def test_damaged_rows_are_refused(tmp_path: Path):
    store = open_store(str(tmp_path / "store"))
    prefix = write_dataset(store, tmp_path / "rows", demo_rows(5))
    key = f"{prefix}/validation-00000.parquet"
    store.put(key, store.read(key)[:-1] + b"x")
    with pytest.raises(ContractError, match="damaged"):
        HeldOutRows(store, prefix, tmp_path / "scratch")


# ---------------------------------------------------------------------------------------------------------- baselines


def test_baselines_fill_the_hole_and_nothing_else():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 24, 24, 3), dtype=np.uint8)
    masks = np.zeros((3, 24, 24), np.uint8)
    masks[0, 4:9, 6:20] = 1
    masks[1, 20:, :] = 1
    masks[2] = 1
    before = images.copy()
    for fill in (mean_fill, telea_fill):
        filled = fill(images, masks)
        assert (filled[masks == 0] == images[masks == 0]).all()
        assert (images == before).all()
    color = mean_fill(images, masks)[0, 5, 7]
    assert color.tolist() == np.round(images[0][masks[0] == 0].mean(axis=0)).tolist()
    gradient = np.repeat(np.linspace(0, 255, 24).astype(np.uint8)[None, :, None], 24, axis=0).repeat(3, axis=2)[None]
    assert np.abs(telea_fill(gradient, masks[:1]).astype(int) - gradient).max() < 30


def test_square_lies_in_the_picture_and_holds_the_hole():
    rng = np.random.default_rng(1)
    for _ in range(200):
        mask = np.zeros((40, 40), np.uint8)
        top, left = rng.integers(0, 36, size=2)
        mask[top : top + rng.integers(1, 40 - top + 1), left : left + rng.integers(1, 40 - left + 1)] = 1
        top, left, side = square_around(mask)
        assert top >= 0
        assert left >= 0
        assert max(top, left) + side <= 40
        assert side >= 16
        assert mask[top : top + side, left : left + side].sum() == mask.sum()


# ------------------------------------------------------------------------------------------------------------ captions


def test_no_picture_keeps_its_caption():
    assert deranged(["a", "b", "c"]) == ["c", "a", "b"]
    shuffled = deranged(["a", "a", "b", "b"])
    assert shuffled == ["b", "b", "a", "a"]
    assert deranged(["a"]) is None
    assert deranged(["a", "a"]) is None


def test_demo_urls_name_their_scene():
    assert demo_scene_of("http://127.0.0.1:8763/7/000012.jpg") == scene_at(7, 12)
    assert demo_scene_of("https://cdn.example/7/000012.webp") == scene_at(7, 12)
    for url in ("http://x/7/12.jpg", "http://x/a/7/000012.jpg", "http://x/7/000012.gif", "http://x/-7/000012.jpg"):
        assert demo_scene_of(url) is None
    caption = scene_at(7, 12).caption
    assert is_demo_row("http://h/7/000012.png", caption)
    assert not is_demo_row("http://h/7/000013.png", caption)


def test_other_caption_names_another_object():
    pictures = [
        HeldOutPicture(row["uid"], row["url"], row["caption"], np.zeros((8, 8, 3), np.uint8)) for row in demo_rows(30)
    ]
    hidden = hide_objects(pictures, seed=0)
    assert len(hidden) == 30
    assert hidden == hide_objects(pictures, seed=0)
    num_same_place = 0
    for one in hidden:
        assert one.item in scene_at(5, int(one.picture.url[-10:-4])).objects
        assert one.other_item.color != one.item.color
        assert one.other_item.shape != one.item.shape
        assert one.other_item.phrase() in one.other_caption
        num_same_place += one.other_item.place == one.item.place
    assert num_same_place > 20


def test_object_mask_hides_the_whole_object():
    for index in range(20):
        scene = scene_at(5, index)
        for item in scene.objects:
            mask = object_mask(item.box, 64)
            left, top, right, bottom = (edge * 64 for edge in item.box)
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            assert rows[0] <= max(0, top - 2) + 1e-9
            assert rows[-1] + 1 >= min(64, bottom + 2) - 1e-9
            assert columns[0] <= max(0, left - 2) + 1e-9
            assert columns[-1] + 1 >= min(64, right + 2) - 1e-9
            assert mask.mean() < 0.6


# ---------------------------------------------------------------------------------------------------------------- page

_SHELLS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "'><iframe src=javascript:alert(1)>",
    "</td></tr></table><h1>owned",
    "</div><style>*{display:none}</style>",
    "<!-- --><b>bold</b>",
    "<a href=http://evil.example>x</a>",
    "![](http://evil.example/beacon.png)",
    "<base href=http://evil.example>",
    '<meta http-equiv=refresh content="0;url=http://evil.example">',
    "<link rel=stylesheet href=http://evil.example/x.css>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "\x1b[31mred\x1b[0m",
    "\u202egnp.exe",
    "]]><script>x</script>",
    "<math><mi//xlink:href='data:x,<script>alert(1)</script>'>",
    "\u0000<scr\u0000ipt>alert(1)</scr\u0000ipt>",
    "＜script＞alert(1)＜/script＞",
)
PAYLOADS = [
    wrap.format(shell)
    for shell in _SHELLS
    for wrap in ("{}", "a cat {} b", "{0}{0}", '" {}', "' onclick=x {}", "`{}`", "{}" + "x" * 5000, "\n{}\n")
]


class Page(HTMLParser):
    """All tags with the names of their attributes, and the values that could lead outside."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self.sources: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags[tag, tuple(name for name, _ in attrs)] += 1
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]


def page_with(report: dict[str, Any], captions: Sequence[str]) -> str:
    tile = np.zeros((4, 4, 3), np.uint8)
    rows = tuple(Row(display_text(caption), (tile,), (display_text(caption),)) for caption in captions)
    return render_html(report, [Section(captions[0], (captions[0],), rows)])


def test_hostile_captions_change_no_tag_of_the_page(report: dict[str, Any]):
    assert len(PAYLOADS) >= 150
    benign = Page(page_with(report, ["a cat on a mat"] * len(PAYLOADS)))
    hostile_html = page_with(report, PAYLOADS)
    hostile = Page(hostile_html)
    assert hostile.tags == benign.tags
    assert all(source.startswith("data:image/png;base64,") for source in hostile.sources)
    tags = {tag for tag, _ in hostile.tags}
    assert not tags & {"script", "iframe", "svg", "object", "embed", "base", "link", "form", "a"}
    assert not [name for _, names in hostile.tags for name in names if name.startswith("on")]
    assert "49" not in hostile_html.split("{{ 7 * 7 }}")[1][:20]
    for character in ("\x1b", "\x00", "\u202e"):
        assert character not in "".join(display_text(payload) for payload in PAYLOADS)
    assert "default-src &#39;none&#39;" in hostile_html or "default-src 'none'" in hostile_html


def test_hostile_run_survives_the_whole_way(
    world: tuple[ObjectStore, ValidationSpec], report: dict[str, Any], tmp_path: Path
):
    """Captions from the dataset's rows to the page: the same tags as the benign twin's."""
    spec = world[1].model_copy(update={"config": world[1].config.model_copy(update={"num_object_samples": 0})})
    tags = []
    for name, captions in {"benign": ["a cat", "a dog", "a cow"], "hostile": PAYLOADS[::60][:3]}.items():
        store = open_store(str(tmp_path / name))
        rows = [row | {"caption": captions[i % 3]} for i, row in enumerate(demo_rows(6))]
        dataset = write_dataset(store, tmp_path / f"{name}-rows", rows)
        write_checkpoint(store, tmp_path / f"{name}-weights", spec.model.directory, 100)
        result = validate(
            spec.model_copy(update={"store_uri": store.uri, "dataset_prefix": dataset}), tmp_path / f"{name}-scratch"
        )
        html = store.read(f"{result['prefix']}/report.html").decode()
        tags.append(Page(html).tags)
        if name == "hostile":
            with Image.open(io.BytesIO(store.read(f"{result['prefix']}/grid.png"))) as grid:
                assert grid.width > 500
    assert tags[0] == tags[1]


def test_display_text_is_short_and_one_line():
    assert display_text("a\n\tb  c") == "a b c"
    assert display_text("e\u0301") == "é"
    assert display_text("x" * 1000) == "x" * 299 + "…"
    assert display_text("\u202e\x1b\x07") == ""


def test_small_pictures_are_shown_large():
    tile = np.zeros((64, 64, 3), np.uint8)
    tile[0, 0] = (255, 0, 0)
    grid = grid_image([Section("title", ("one", "two"), (Row("a caption", (tile, tile), ("", "")),))])
    colors = grid.getcolors(1 << 20)
    assert colors is not None
    assert {color: count for count, color in colors}[255, 0, 0] == 2 * 3 * 3
