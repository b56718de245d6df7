"""The validation report, for people: ``report.json``, ``grid.png``, and ``report.html``, which needs nothing else.

Captions come from strangers. They are escaped by the template engine, shown without control characters and cut to a
length; the page has no script, and its policy forbids it to load anything.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import jinja2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from preprocessing.contracts.display import display_text
from training.heldout import HeldOutPicture
from training.validation_objects import ObjectTest

if TYPE_CHECKING:
    from training.validation import FamilyTest

TEMPLATES: Final = Path(__file__).with_name("templates")
_UPSCALE: Final = 3
_MAX_TILE_PX: Final = 256
_GAP_PX: Final = 6
_HEADER_PX: Final = 34
_CAPTION_PX: Final = 20
_METHOD_LABELS: Final = {
    "model": "Ours",
    "mean_fill": "Mean fill",
    "telea": "OpenCV Telea",
    "shuffled": "Ours, another picture's caption",
    "shuffled_given": "… against the caption it was given",
    "original": "Original picture",
}
_LOWER_IS_BETTER: Final = {"masked_l1"}


@dataclass(frozen=True)
class Row:
    """One row of pictures, under a caption.

    Attributes:
        caption: Fit for display.
        tiles: (side, side, 3) uint8 each.
        notes: A line under each tile; empty where there is none.
    """

    caption: str
    tiles: tuple[np.ndarray, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """Rows of pictures with common headers."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class TableRow:
    """One row of figures: a label, and (text, whether it is the best of its column) for each."""

    label: str
    cells: tuple[tuple[str, bool], ...]


def write_report(
    folder: Path,
    report: Mapping[str, Any],
    pictures: Sequence[HeldOutPicture],
    families: "Sequence[FamilyTest]",
    objects: ObjectTest | None,
    *,
    num_rows: int,
) -> None:
    """Writes the three files of a report.

    Args:
        folder: The folder to make.
        report: What ``report.json`` holds.
        pictures: The held-out pictures of the mask families.
        families: Their results.
        objects: The prompt-following test's, if it was made.
        num_rows: Rows of pictures to show of each.
    """
    folder.mkdir(parents=True)
    sections = [repaint_section(pictures, families, num_rows)]
    if objects is not None:
        sections.append(object_section(objects, num_rows))
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    grid_image(sections).save(folder / "grid.png", optimize=True)
    (folder / "report.html").write_text(render_html(report, sections), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- pictures


def repaint_section(pictures: Sequence[HeldOutPicture], families: "Sequence[FamilyTest]", num_rows: int) -> Section:
    """The original beside, for each mask family, the masked picture, Telea's and ours."""
    headers = ["original"]
    for family in families:
        headers += [f"{_short(family.name)}: masked", "Telea", "ours"]
    rows = []
    for i, picture in enumerate(pictures[:num_rows]):
        tiles = [picture.image]
        for family in families:
            tiles += [_holed(picture.image, family.masks[i]), family.images["telea"][i], family.images["model"][i]]
        rows.append(Row(display_text(picture.caption), tuple(tiles), ("",) * len(tiles)))
    return Section("Held-out pictures, repainted", tuple(headers), tuple(rows))


def object_section(objects: ObjectTest, num_rows: int) -> Section:
    """One object hidden: the original, what was left, and what was painted under the true and under another caption."""
    rows = []
    for i, hidden in enumerate(objects.hidden[:num_rows]):
        image = hidden.picture.image
        tiles = (
            image,
            _holed(image, objects.masks[i]),
            objects.images["telea"][i],
            objects.images["model"][i],
            objects.images["shuffled"][i],
        )
        saw = objects.verdicts
        notes = (
            f"hidden: {hidden.item.color} {hidden.item.shape}",
            "",
            f"judge: {saw['telea'][i]}",
            f"judge: {saw['model'][i]}",
            f"asked for: {hidden.other_item.color} {hidden.other_item.shape}; judge: {saw['shuffled'][i]}",
        )
        caption = f"{display_text(hidden.picture.caption)} | other caption: {display_text(hidden.other_caption)}"
        rows.append(Row(caption, tiles, notes))
    headers = ("original", "object hidden", "Telea", "ours", "ours, other caption")
    return Section("One object hidden: does it paint what the caption names?", headers, tuple(rows))


def grid_image(sections: Sequence[Section]) -> Image.Image:
    """All sections below each other in one picture that can be read without a page around it."""
    first = sections[0].rows[0].tiles[0]
    tile_px = _tile_px(first.shape[0])
    step = tile_px + _GAP_PX
    width = _GAP_PX + step * max(len(section.headers) for section in sections)
    heights = [2 * _HEADER_PX + len(section.rows) * (step + _CAPTION_PX) for section in sections]
    canvas = Image.new("RGB", (width, sum(heights) + _GAP_PX), "white")
    pen = ImageDraw.Draw(canvas)
    small, large = (ImageFont.load_default(size=size) for size in (13, 18))
    y = _GAP_PX
    for section in sections:
        pen.text((_GAP_PX, y + 6), _fitted(pen, section.title, large, width - 2 * _GAP_PX), fill="black", font=large)
        y += _HEADER_PX
        for column, header in enumerate(section.headers):
            text = _fitted(pen, header, small, tile_px)
            pen.text((_GAP_PX + column * step, y + 14), text, fill="black", font=small)
        y += _HEADER_PX
        for row in section.rows:
            for column, tile in enumerate(row.tiles):
                canvas.paste(_scaled(tile, tile_px), (_GAP_PX + column * step, y))
            text = _fitted(pen, _latin(row.caption), small, width - 2 * _GAP_PX)
            pen.text((_GAP_PX, y + tile_px + 2), text, fill="dimgray", font=small)
            y += step + _CAPTION_PX
    return canvas


def _holed(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture with its hole in a colour that no one takes for a part of it."""
    return np.where(mask[..., None] > 0, np.array([255, 0, 255], np.uint8), image)


def _tile_px(side_px: int) -> int:
    return min(side_px * _UPSCALE, max(_MAX_TILE_PX, side_px // 2))


def _scaled(tile: np.ndarray, tile_px: int) -> Image.Image:
    image = Image.fromarray(tile)
    grows = tile_px > image.width
    return image.resize((tile_px, tile_px), Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS)


def _latin(text: str) -> str:
    """What the built-in font can draw; the page shows the rest."""
    return text.encode("latin-1", "replace").decode("latin-1")


def _fitted(pen: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(f"{text}...", font) > width:
        text = text[:-1]
    return f"{text}..."


def _short(family: str) -> str:
    """``thick`` of ``lama_thick_512``."""
    parts = family.split("_")
    return parts[1] if parts[0] == "lama" and len(parts) == 3 else family


# --------------------------------------------------------------------------------------------------------------- page


def render_html(report: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """The page: self-contained, without script, everything escaped.

    Args:
        report: What ``report.json`` holds.
        sections: The pictures.
    """
    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        tables=[
            ("All masks", report["num_samples"], method_table(report["by_method"])),
            *((family, figures["num_samples"], method_table(figures)) for family, figures in report["by_mask"].items()),
        ],
        objects=object_table(report["prompt_following"]),
        sections=[
            {
                "title": section.title,
                "headers": section.headers,
                "rows": [
                    {"caption": row.caption, "tiles": list(zip(map(_data_uri, row.tiles), row.notes, strict=True))}
                    for row in section.rows
                ],
            }
            for section in sections
        ],
        config=json.dumps(report["config"], indent=1, ensure_ascii=False),
    )


def method_table(by_method: Mapping[str, Any]) -> list[TableRow]:
    """PSNR, SSIM, L1 and similarity of each method; the best of ours, mean fill and Telea is marked."""
    formats = {
        "masked_psnr_db": "{:.2f}",
        "masked_ssim": "{:.3f}",
        "masked_l1": "{:.4f}",
        "image_text_similarity": "{:.3f}",
    }
    contenders = ("model", "mean_fill", "telea")
    best = {}
    for key in formats:
        values = [by_method[method][key] for method in contenders if key in by_method[method]]
        if values:
            best[key] = min(values) if key in _LOWER_IS_BETTER else max(values)
    rows = []
    for method, label in _METHOD_LABELS.items():
        figures = by_method.get(method)
        if not figures:
            continue
        cells = []
        for key, pattern in formats.items():
            value = figures.get(key)
            text = "" if value is None else pattern.format(value)
            cells.append((text, value is not None and method in contenders and value == best[key]))
        rows.append(TableRow(label, tuple(cells)))
    return rows


def object_table(prompt_following: Mapping[str, Any] | None) -> list[TableRow]:
    """Colour, shape and both, in per cent, and the cosines of picture and hole with their captions, by condition."""
    if prompt_following is None:
        return []
    rows = []
    for method in ("model", "shuffled", "shuffled_given", "mean_fill", "telea", "original"):
        figures = prompt_following["conditions"][method]
        keys = ("color_agreement", "shape_agreement", "object_agreement")
        shares = [f"{100 * figures[key]:.1f} %" for key in keys]
        cosines = [figures.get(key) for key in ("image_text_similarity", "hole_text_similarity")]
        cells = [*shares, *("" if cosine is None else f"{cosine:.3f}" for cosine in cosines)]
        rows.append(TableRow(_METHOD_LABELS[method], tuple((cell, False) for cell in cells)))
    return rows


def _data_uri(tile: np.ndarray) -> str:
    image = Image.fromarray(tile)
    if image.width > _MAX_TILE_PX:
        image = _scaled(tile, _MAX_TILE_PX)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
