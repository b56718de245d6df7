"""The model card of an export: what the model is, what it was made from, how to load it, what it cannot do."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jinja2
import yaml

from preprocessing.contracts.manifest import Manifest
from training.licenses import License
from training.runspec_validation import ExportSpec

TEMPLATES: Final = Path(__file__).with_name("templates")


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """What an export was made from.

    Attributes:
        manifests: of the datasets, in the order in which they were made.
        weights: sha256 over the files of each part of the base: `unet`, `vae`, `open_clip`.
        base: what the base folder's `base.json` says: `source`, `sha256` of the source's files, `recognized_as`,
            `notes`; empty if there is none.
        license: of the base weights.
        gaps: why CompVis' own classes cannot hold the model, from `model.single_file.ldm_gaps`.
    """

    manifests: list[Manifest]
    weights: Mapping[str, str]
    base: Mapping[str, Any]
    license: License
    gaps: list[str]

    @property
    def latents(self) -> Mapping[str, Any]:
        """The spec of the latents that were trained on, as JSON; empty if no dataset has any."""
        return next((m.specs["latents"] for m in self.manifests if "latents" in m.specs), {})


def model_card(
    spec: ExportSpec, lineage: Lineage, summary: Mapping[str, float], *, single_file: str | None = None
) -> str:
    """The card, in Markdown, with the YAML front matter that Hugging Face's hub reads.

    Args:
        spec: what is published.
        lineage: what it was made from.
        summary: of the validation report.
        single_file: name of the file that holds all weights, if there is one.
    """
    environment = jinja2.Environment(  # noqa: S701 - Markdown, not HTML: strings from outside go through `code`
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = _code
    body = environment.get_template("model_card.md.j2").render(
        spec=spec,
        base_name=base_name(spec, lineage.base),
        train=spec.train.model_dump(mode="json"),
        lineage=lineage,
        summary=summary,
        single_file=single_file,
        resolution_px=lineage.latents.get("resolution_px", 512),
    )
    return f"---\n{yaml.safe_dump(front_matter(spec, lineage), sort_keys=False, allow_unicode=True)}---\n\n{body}"


def front_matter(spec: ExportSpec, lineage: Lineage) -> dict[str, Any]:
    """What the hub reads of a card. Inpainting has no `pipeline_tag` of its own there: it is an image-to-image task."""
    said: dict[str, Any] = {"license": lineage.license.id}
    if lineage.license.id == "other":
        slug = re.sub(r"[^a-z0-9.]+", "-", lineage.license.name.lower()).strip("-")
        said |= {"license_name": slug or "other", "license_link": "LICENSE"}
    said |= {"library_name": "diffusers", "pipeline_tag": "image-to-image"}
    if spec.config.base_model is not None:
        said["base_model"] = spec.config.base_model
    said["tags"] = ["stable-diffusion", "stable-diffusion-2", "inpainting", spec.train.prediction_type]
    return said


def base_name(spec: ExportSpec, base: Mapping[str, Any]) -> str:
    """What the base is called: its name on the hub, or that of the file or folder it came from, never a whole path."""
    if spec.config.base_model is not None:
        return spec.config.base_model
    source = str(base.get("source") or spec.model.base)
    return source.rstrip("/").rpartition("/")[2]


def _code(value: object) -> str:
    """A value as a Markdown code span, in which nothing is markup."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.replace("`", "'").replace("|", "¦").split())
    return f"`{text}`" if text else "–"
