"""What `lacuna inspect` shows of a dataset: figures, pictures, and a page that strangers' text cannot break."""

import base64
import io
import re
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.storage import ObjectStore, open_store
from model.encoders import decode_latents, load_vae, mean_latents, pixels_to_images
from preprocessing.contact_sheet import Card, make_contact_sheet
from preprocessing.contents import read_contents
from preprocessing.contracts.display import bytes_text, display_text, number_text, share_text
from preprocessing.contracts.manifest import Manifest
from preprocessing.contracts.schemas import SELECTED
from preprocessing.inspection_page import Fact, ListedFile, Page, Step, render_page
from preprocessing.known_bases import find_base
from preprocessing.stored_parquet import first_rows
from tests.preprocessing.looked_at import (
    HOSTILE,
    downloaded_dataset,
    encoded_dataset,
    selected_dataset,
    write_dataset,
)

VOID = frozenset({"meta", "img", "br"})


class PageReader(HTMLParser):
    """Reads a page as a browser would, and notes what could do harm or be left out."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def read_harmless(page: str) -> PageReader:
    """The page, if it is well-formed, loads and runs nothing, and names every picture."""
    found = PageReader(page)
    assert not found.open
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    for tag, attrs in found.tags:
        assert tag not in {"script", "iframe", "object", "embed", "link", "form", "base"}
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href", "srcset", "xlink:href"):
            value = attrs.get(name) or ""
            assert name not in attrs or value.startswith("data:image/") or value.removeprefix("#") in ids
        assert tag != "img" or attrs["alt"]
        assert tag != "svg" or attrs["aria-label"]
    assert "default-src 'none'" in page
    bad = {c for c in page if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\n"}
    assert not bad - {"\u200d"}
    return found


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "store"))


def _page(store: ObjectStore, prefix: str, manifest: Manifest, num_rows: int = 9) -> str:
    contents = read_contents(store, prefix, manifest, limits={"max_punsafe": 0.1})
    sheet = make_contact_sheet(store, prefix, manifest, num_rows)
    step = Step(
        manifest.stage, prefix, manifest.num_in, manifest.num_out, manifest.dropped, manifest.created_at, is_this=True
    )
    files = [ListedFile(file.name, file.num_rows, file.num_bytes, file.sha256) for file in manifest.files()]
    tables = {"Specs": manifest.specs, "Config": manifest.config, "Hostile": {"<b>": "<i>", "list": [1, HOSTILE[0]]}}
    facts = [Fact("URI", store.uri_of(prefix), True)]
    page = Page("dataset", "<name>", [("rows", "9")], facts, [step], "", sheet, contents, tables, files)
    return render_page(page)


# ------------------------------------------------------------------------------------------------------------- figures


def test_the_figures_are_those_of_the_rows(store: ObjectStore, tmp_path: Path) -> None:
    prefix, manifest = encoded_dataset(store, tmp_path / "rows")
    found = read_contents(store, prefix, manifest, limits={"max_punsafe": 0.1, "min_similarity": None})
    histograms = {histogram.name: histogram for histogram in found.histograms}
    assert (found.num_rows, found.num_rows_read, found.is_whole) == (9, 9, True)
    assert histograms["punsafe"].limit == ("below", 0.1)
    assert histograms["punsafe"].quantiles[2] == pytest.approx(0.05)
    assert histograms["similarity"].limit is None
    assert (histograms["similarity"].num_missing, sum(histograms["similarity"].counts)) == (1, 8)
    assert histograms["pwatermark"].num_missing == 1
    assert histograms["metadata_side"].quantiles[0] == 90
    assert histograms["caption_chars"].quantiles[-1] == 10_000
    assert found.hosts == (("<b>evil<", 9),)
    assert found.storage["train"][:2] == (2, 7)
    assert found.storage["validation"][:2] == (2, 2)


def test_bytes_a_row_are_those_of_the_files(store: ObjectStore, tmp_path: Path) -> None:
    prefix, manifest = encoded_dataset(store, tmp_path / "rows")
    by_name = {column.name: column for column in read_contents(store, prefix, manifest).columns}
    assert 1024 < by_name["moments"].bytes_per_row < 1024 + 40  # a page's header a file
    assert 8 < by_name["mask_1"].bytes_per_row < 8 + 40
    assert by_name["moments"].dtype == "fixed_size_binary[1024]"
    stored = sum(column.bytes_per_row for column in by_name.values()) * 9
    assert stored < sum(file.num_bytes for file in manifest.files()) < 2 * stored


def test_many_files_are_sampled_evenly(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preprocessing.contents.MAX_FILES", 4)
    table = pa.Table.from_pylist([], schema=SELECTED)
    tables = [
        {None: pa.concat_tables([table, pa.table({**{n: [None] for n in SELECTED.names}, **row}).cast(SELECTED)])}
        for row in (
            {"uid": [f"{i}"], "url": [f"http://h{i}/"], "caption": [""], "punsafe": [0.0], "split": [""]}
            for i in range(12)
        )
    ]
    prefix, manifest = write_dataset(store, "select", tables, scratch=tmp_path / "rows")
    found = read_contents(store, prefix, manifest)
    assert (found.num_files, found.num_files_read, found.is_whole) == (12, 4, False)
    assert {host for host, _ in found.hosts} == {"h0", "h3", "h6", "h9"}
    assert "4 of 12 files" in _page(store, prefix, manifest)


@pytest.mark.parametrize("num_rows", [0, 1, 3, 100])
def test_first_rows_are_what_pyarrow_reads(tmp_path: Path, any_root: str, num_rows: int) -> None:
    store = open_store(any_root)
    prefix, manifest = encoded_dataset(store, tmp_path / "rows")
    name = manifest.files()[0].name
    whole = pq.read_table(io.BytesIO(store.read(f"{prefix}/{name}")))
    columns = ["uid", "masked_moments_1", "nothing", "mask_0", "image"]
    found = first_rows(store, f"{prefix}/{name}", num_rows, columns)
    assert (
        found.to_pylist() == whole.slice(0, num_rows).select(["uid", "masked_moments_1", "mask_0", "image"]).to_pylist()
    )


def test_tensors_that_another_tool_wrote_are_read_all_the_same(store: ObjectStore, tmp_path: Path) -> None:
    prefix, manifest = encoded_dataset(store, tmp_path / "rows")
    table = pq.read_table(io.BytesIO(store.read(f"{prefix}/{manifest.files()[0].name}")))
    pq.write_table(table, tmp_path / "other.parquet", compression="snappy", row_group_size=2)
    store.upload("datasets/other.parquet", tmp_path / "other.parquet")
    found = first_rows(store, "datasets/other.parquet", 2, ["moments"])
    assert found.to_pylist() == table.slice(0, 2).select(["moments"]).to_pylist()


# ------------------------------------------------------------------------------------------------------------ pictures


def _pixels(source: str | None) -> np.ndarray:
    assert source is not None
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
        return np.array(image.convert("RGB"))


def test_what_is_decoded_is_what_is_stored(store: ObjectStore, tmp_path: Path) -> None:
    prefix, manifest = encoded_dataset(store, tmp_path / "rows")
    (card,) = make_contact_sheet(store, prefix, manifest, 1).cards
    row = pq.read_table(io.BytesIO(store.read(f"{prefix}/{manifest.files()[0].name}"))).slice(0, 1).to_pylist()[0]
    assert [tile.label for tile in card.tiles] == ["picture", "decoded moments"]
    assert len(card.variants) == 2
    with Image.open(io.BytesIO(row["image"])) as image:
        assert np.array_equal(_pixels(card.tiles[0].source), np.array(image))
    base = find_base({"vae": manifest.specs["latents"]["weights_sha256"]})
    assert base is not None
    vae = load_vae(base / "vae")
    scaling_factor = manifest.specs["latents"]["scaling_factor"]
    for name, tile in (("moments", card.tiles[1]), ("masked_moments_1", card.variants[1][1])):
        import torch

        moments = torch.from_numpy(np.frombuffer(row[name], "<f2").reshape(1, 8, 8, 8).astype(np.float32))
        expected = pixels_to_images(decode_latents(vae, mean_latents(moments, scaling_factor), scaling_factor))[0]
        difference = np.abs(_pixels(tile.source).astype(int) - expected.numpy().astype(int))
        assert difference.max() <= 1  # another batch size, other last bits
    mask = np.unpackbits(np.frombuffer(row["mask_1"], np.uint8)).reshape(8, 8)
    assert np.array_equal(_pixels(card.variants[1][0].source)[..., 0] // 255, mask)


def test_the_same_rows_each_time_and_held_out_ones_too(store: ObjectStore, tmp_path: Path) -> None:
    prefix, manifest = encoded_dataset(store, tmp_path / "rows", num_variants=0, moments=False)
    uids = [[card.uid for card in make_contact_sheet(store, prefix, manifest, 6).cards] for _ in range(2)]
    assert uids[0] == uids[1]
    assert len(set(uids[0])) == 6
    splits = [card.split for card in make_contact_sheet(store, prefix, manifest, 6).cards]
    assert set(splits) == {"train", "validation"}


def _labels(card: Card) -> list[str]:
    return [tile.label for part in (card.tiles, *card.variants) for tile in part]


MASKED = ["mask 0", "decoded masked latents 0", "mask 1", "decoded masked latents 1"]


@pytest.mark.parametrize(
    ("columns", "labels", "remark"),
    [
        ({"image": "none"}, ["decoded moments", *MASKED], "crops are not stored"),
        ({"image": "jpeg", "moments": False}, ["picture", *MASKED], "moments are not stored"),
        ({"num_variants": 0}, ["picture", "decoded moments"], "No masks are stored"),
        ({"num_variants": 0, "moments": False, "text": ("token_ids",)}, ["picture"], "No masks are stored"),
        ({"num_variants": 6, "text": ("text_embeddings", "token_ids")}, None, "first 4 of 6 masks"),
    ],
)
def test_what_is_not_stored_is_not_missed(
    store: ObjectStore, tmp_path: Path, columns: dict, labels: list[str] | None, remark: str
) -> None:
    prefix, manifest = encoded_dataset(store, tmp_path / "rows", captions=HOSTILE[:3], **columns)
    sheet = make_contact_sheet(store, prefix, manifest, 1)
    assert remark in " ".join(sheet.notes)
    assert labels is None or _labels(sheet.cards[0]) == labels
    read_harmless(_page(store, prefix, manifest, 1))


def test_damaged_rows_are_shown_as_such(store: ObjectStore, tmp_path: Path) -> None:
    prefix, manifest = encoded_dataset(store, tmp_path / "rows", broken=True)
    (card,) = make_contact_sheet(store, prefix, manifest, 1).cards
    assert [tile.source for tile in card.tiles] == [None, None]
    page = read_harmless(_page(store, prefix, manifest, 1))
    assert "neither PNG nor JPEG" in page.text
    assert "not finite" in page.text


def test_without_the_vae_the_page_says_so(store: ObjectStore, tmp_path: Path) -> None:
    prefix, manifest = encoded_dataset(store, tmp_path / "rows")
    latents = {**manifest.specs["latents"], "weights_sha256": "0" * 64}
    other = manifest.model_copy(update={"specs": {**manifest.specs, "latents": latents}})
    sheet = make_contact_sheet(store, prefix, other, 2)
    assert _labels(sheet.cards[0]) == ["picture", "mask 0", "mask 1"]
    assert "--base" in sheet.notes[0]


def test_specs_of_another_version_hide_nothing_else(store: ObjectStore, tmp_path: Path) -> None:
    prefix, manifest = encoded_dataset(store, tmp_path / "rows")
    sheet = make_contact_sheet(store, prefix, manifest.model_copy(update={"specs": {"latents": {"new": 1}}}), 1)
    assert _labels(sheet.cards[0]) == ["picture"]


# ---------------------------------------------------------------------------------------------------------------- page


def test_strangers_text_is_text(store: ObjectStore, tmp_path: Path) -> None:
    selected = selected_dataset(store, tmp_path / "select")
    downloaded = downloaded_dataset(store, tmp_path / "download", selected[1])
    for prefix, manifest in (
        selected,
        downloaded,
        encoded_dataset(store, tmp_path / "encode", moments=False, num_variants=0),
    ):
        source = _page(store, prefix, manifest)
        page = read_harmless(source)
        for caption in HOSTILE:
            assert display_text(caption, 400) in page.text
        assert "<script>" in page.text
        assert "7 * 7" in page.text
        assert "caption of 10,000 characters" in page.text
        assert not re.search(r"long (long ){100}", source)
        assert "<b>evil" in page.text
        assert "http" not in source.replace("http-equiv", "")


def test_a_page_of_nothing(store: ObjectStore, tmp_path: Path) -> None:
    for prefix, manifest in (
        encoded_dataset(store, tmp_path / "no-rows", captions=()),
        write_dataset(store, "select", [{None: SELECTED.empty_table()}], scratch=tmp_path / "empty-file"),
        write_dataset(store, "download", [], scratch=tmp_path / "no-shards"),
    ):
        page = read_harmless(_page(store, prefix, manifest))
        assert "There is no row to show." in page.text


def test_figures_without_a_spread_are_drawn(store: ObjectStore, tmp_path: Path) -> None:
    row = {"uid": "u", "url": "", "caption": "", "punsafe": 0.0, "split": "train", "width": 1, "height": 1}
    tables = [{None: pa.Table.from_pylist([row] * 3, schema=SELECTED)}]
    prefix, manifest = write_dataset(store, "select", tables, scratch=tmp_path / "rows")
    read_harmless(_page(store, prefix, manifest))


def test_looking_at_figures_needs_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys, preprocessing.contact_sheet, preprocessing.inspection_page; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'prefect')))"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (bytes_text(0), "0 bytes"),
        (bytes_text(999), "999 bytes"),
        (bytes_text(1000), "1 kB"),
        (bytes_text(83_684_540), "83.7 MB"),
        (bytes_text(5e15), "5e+03 TB"),
        (number_text(12345), "12,345"),
        (number_text(0.03121), "0.0312"),
        (number_text(1e-9), "< 0.0001"),
        (share_text(1, 100_000), "< 0.1 %"),
        (share_text(99_999, 100_000), "> 99.9 %"),
        (share_text(0, 5), "0 %"),
        (share_text(1, 0), "–"),
    ],
)
def test_numbers_for_people(text: str, shown: str) -> None:
    assert text == shown
