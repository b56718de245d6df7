"""What is known of a dataset or bundle: for programs, and as a page. No prefect, and no torch at import.

The page itself is `preprocessing.inspection_page`; here is gathered what it shows.
"""

import base64
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from flows.forget_records import read_records
from flows.plan import DATA_STAGES, dataset_lineage
from flows.status import datasets_of_run
from flows.store import base_folder, read_any, read_manifest, run_config
from infra.bundles import MANIFEST_NAME, BundleManifest
from infra.errors import ContractError
from infra.storage import ObjectStore, sha256_of_bytes
from preprocessing.contracts.display import bytes_text, number_text
from preprocessing.contracts.manifest import Manifest, dataset_prefix

if TYPE_CHECKING:
    from preprocessing.contact_sheet import OnProgress
    from preprocessing.contents import Contents

_MAX_GRID_BYTES = 16 << 20


@dataclass(frozen=True)
class Inspected:
    """A dataset or bundle, and what it comes from.

    Attributes:
        store: Where it is.
        prefix: Key of its folder.
        manifest: As it stands there.
        lineage: Key and manifest of the dataset's ancestors and of itself, or of the dataset that the bundle's run was
            trained on; in the order in which they were made.
        missing: Key of the ancestor at which the lineage ends, since it is no longer in the store.
        run: A bundle's run's ``config.json``; empty for datasets, and where it is gone.
    """

    store: ObjectStore
    prefix: str
    manifest: Manifest | BundleManifest
    lineage: tuple[tuple[str, Manifest], ...]
    missing: str | None = None
    run: Mapping[str, Any] = field(default_factory=dict)


def inspect(store: ObjectStore, prefix: str) -> Inspected:
    """Reads the manifest of a dataset or bundle, and those of what it comes from.

    Raises:
        ValueError: There is none.
    """
    manifest = read_any(store, prefix)
    if isinstance(manifest, Manifest):
        lineage = _lineage(store, prefix, manifest)
        return Inspected(store, prefix, manifest, lineage, _missing(lineage))
    run = run_config(store, manifest.run_id)
    lineage = ()
    for dataset in datasets_of_run(run)[:1]:
        try:
            lineage = _lineage(store, dataset, read_manifest(store, dataset))
        except ValueError:  # the dataset is gone; the bundle is no worse for it
            return Inspected(store, prefix, manifest, (), dataset, run)
    return Inspected(store, prefix, manifest, lineage, _missing(lineage), run)


def _lineage(store: ObjectStore, prefix: str, manifest: Manifest) -> tuple[tuple[str, Manifest], ...]:
    return tuple(dataset_lineage(store, prefix, manifest))


def _missing(lineage: tuple[tuple[str, Manifest], ...]) -> str | None:
    parents = lineage[0][1].parents if lineage else {}
    return next((dataset_prefix(name, digest) for name, digest in parents.items() if name in DATA_STAGES), None)


# ------------------------------------------------------------------------------------------------------ for programs


def inspect_json(found: Inspected) -> dict[str, Any]:
    """All that is known, as JSON values; for datasets the schema and bytes a row of each column, too."""
    manifest = found.manifest
    lineage = [
        {
            "prefix": prefix,
            "stage": ancestor.stage,
            "digest": ancestor.digest,
            "num_in": ancestor.num_in,
            "num_out": ancestor.num_out,
            "dropped": ancestor.dropped,
            "created_at": ancestor.created_at,
        }
        for prefix, ancestor in found.lineage
    ]
    uri = found.store.uri_of(found.prefix)
    if isinstance(manifest, BundleManifest):
        values = manifest.model_dump(mode="json")
        forgotten = read_records(found.store).num_in(found.store, found.prefix)
        values |= {"num_bytes": manifest.num_bytes, "num_forgotten_rows": forgotten}
        return {"uri": uri, **values, "lineage": lineage, "missing": found.missing}
    from preprocessing.contents import read_contents

    contents = read_contents(found.store, found.prefix, manifest, with_values=False)
    return {
        "uri": uri,
        "stage": manifest.stage,
        "stage_version": manifest.stage_version,
        "digest": manifest.digest,
        "created_at": manifest.created_at,
        "code_version": manifest.code_version,
        "conditional_writes": manifest.conditional_writes,
        "parents": manifest.parents,
        "num_in": manifest.num_in,
        "num_out": manifest.num_out,
        "dropped": manifest.dropped,
        "num_shards": len(manifest.shards),
        "num_bytes": sum(num_bytes for _, _, num_bytes in contents.storage.values()),
        "storage": {
            kind: dict(zip(("num_files", "num_rows", "num_bytes"), counts, strict=True))
            for kind, counts in contents.storage.items()
        },
        "schema": {column.name: column.dtype for column in contents.columns},
        "columns": [asdict(column) for column in contents.columns],
        "config": manifest.config,
        "specs": manifest.specs,
        "lineage": lineage,
        "missing": found.missing,
    }


# ------------------------------------------------------------------------------------------------------------- as page


def inspect_page(
    found: Inspected, num_rows: int, *, base: str | None = None, on_progress: "OnProgress | None" = None
) -> str:
    """A self-contained page.

    Args:
        found: What to show.
        num_rows: Rows of a dataset to show as pictures; 0 for none, and then nothing needs the VAE.
        base: Base weights, as ``model.base``, whose VAE may be the one that the dataset was encoded with.
        on_progress: Told how many pictures are decoded.

    Raises:
        ValueError: The base cannot be used.
    """
    if isinstance(found.manifest, BundleManifest):
        return _bundle_page(found, found.manifest)
    return _dataset_page(found, found.manifest, num_rows, base, on_progress)


def _dataset_page(
    found: Inspected, manifest: Manifest, num_rows: int, base: str | None, on_progress: "OnProgress | None"
) -> str:
    from preprocessing.contact_sheet import make_contact_sheet
    from preprocessing.contents import read_contents
    from preprocessing.inspection_page import Fact, ListedFile, Page, moment_text, render_page

    store, prefix = found.store, found.prefix
    limits = next((ancestor.config for _, ancestor in found.lineage if ancestor.stage == "select"), {})
    contents = read_contents(store, prefix, manifest, limits=limits)
    bases = [] if base is None else [base_folder(base)]
    sheet = make_contact_sheet(store, prefix, manifest, num_rows, bases=bases, on_progress=on_progress)
    files = [*(file for shard in manifest.shards for file in shard.files), *manifest.extra_files]
    parents = [
        Fact("made from", f"{dataset_prefix(name, digest)}, digest {digest}", True)
        if name in DATA_STAGES
        else Fact("made from", f"metadata, digest {digest}", True)
        for name, digest in manifest.parents.items()
    ]
    page = Page(
        kind=f"{manifest.stage} dataset",
        name=manifest.digest[:16],
        summary=[
            ("rows", number_text(manifest.num_out)),
            ("refused", number_text(sum(manifest.dropped.values()))),
            ("shards", number_text(len(manifest.shards))),
            ("bytes", bytes_text(sum(file.num_bytes for file in files))),
            *_per_row(contents),
        ],
        facts=[
            Fact("URI", store.uri_of(prefix), True),
            Fact("digest", manifest.digest, True),
            *parents,
            Fact("made", moment_text(manifest.created_at)),
            Fact("by", f"Lacuna {manifest.code_version}, {manifest.stage} version {manifest.stage_version}"),
            *_without_pictures(manifest),
            *_unconditional(manifest.conditional_writes),
        ],
        steps=_steps(found),
        steps_note=_steps_note(found),
        sheet=sheet if num_rows else None,
        contents=contents,
        tables={
            **{f"Spec of the {name}": spec for name, spec in manifest.specs.items()},
            "What determined it": manifest.config,
        },
        files=[ListedFile(f.name, None if f.kind == "extra" else f.num_rows, f.num_bytes, f.sha256) for f in files],
    )
    return render_page(page)


def _per_row(contents: "Contents") -> list[tuple[str, str]]:
    stored = sum(column.bytes_per_row for column in contents.columns)
    return [("a row", bytes_text(stored))] if contents.num_rows_read else []


def _bundle_page(found: Inspected, manifest: BundleManifest) -> str:
    from preprocessing.inspection_page import Fact, ListedFile, Page, moment_text, render_page

    store, prefix = found.store, found.prefix
    metadata = dict(manifest.metadata)
    tables = {"Measured": metadata.pop("summary", {}), "Trained with": metadata.pop("config", {}), "Metadata": metadata}
    if manifest.kind != "checkpoint":
        tables["The run's config"] = dict(found.run)
    datasets = [Fact("trained on", dataset, True) for dataset in datasets_of_run(dict(found.run))]
    page = Page(
        kind=manifest.kind,
        name=f"{manifest.run_id}, step {manifest.step:,}",
        summary=[
            ("step", number_text(manifest.step)),
            ("files", number_text(len(manifest.files))),
            ("bytes", bytes_text(manifest.num_bytes)),
        ],
        facts=[
            Fact("URI", store.uri_of(prefix), True),
            Fact("run", manifest.run_id, True),
            *datasets,
            *(Fact(name, str(metadata[name]), True) for name in ("checkpoint", "report") if metadata.get(name)),
            Fact("manifest's sha256", sha256_of_bytes(store.read(f"{prefix}/{MANIFEST_NAME}")), True),
            Fact("made", moment_text(manifest.created_at)),
            *_forgotten(store, prefix),
            *_unconditional(manifest.conditional_writes),
        ],
        steps=_steps(found),
        steps_note=_steps_note(found),
        tables={title: values for title, values in tables.items() if isinstance(values, dict)},
        files=[ListedFile(file.name, None, file.num_bytes, file.sha256) for file in manifest.files],
        picture=_grid(store, prefix, manifest),
    )
    return render_page(page)


def _steps(found: Inspected) -> list[Any]:
    from preprocessing.inspection_page import Step

    return [
        Step(
            manifest.stage,
            prefix,
            manifest.num_in,
            manifest.num_out,
            manifest.dropped,
            manifest.created_at,
            is_this=prefix == found.prefix,
        )
        for prefix, manifest in found.lineage
    ]


def _steps_note(found: Inspected) -> str:
    return "" if found.missing is None else f"{found.missing}, from which it was made, is no longer in the store."


def _unconditional(conditional_writes: bool) -> list[Any]:
    from preprocessing.inspection_page import Fact

    return [] if conditional_writes else [Fact("caution", "written to a store that does not decide races of writers")]


def _forgotten(store: ObjectStore, prefix: str) -> list[Any]:
    from preprocessing.inspection_page import Fact

    num = read_records(store).num_in(store, prefix)
    return [Fact("caution", f"it holds {number_text(num)} rows that were forgotten since")] if num else []


def _without_pictures(manifest: Manifest) -> list[Any]:
    from preprocessing.inspection_page import Fact

    gone = any("image" in file.without for file in manifest.files("rows"))
    return [Fact("pictures", "deleted once they were encoded; what is known of each row stays")] if gone else []


def _grid(store: ObjectStore, prefix: str, manifest: BundleManifest) -> tuple[str, str] | None:
    """A validation report's own pictures, if they are what its manifest says."""
    file = next((file for file in manifest.files if file.name == "grid.png"), None)
    if manifest.kind != "report" or file is None or file.num_bytes > _MAX_GRID_BYTES:
        return None
    data = store.read(f"{prefix}/{file.name}")
    if sha256_of_bytes(data) != file.sha256:
        raise ContractError(
            f"{store.uri_of(prefix)}/{file.name}: its sha256 is not the manifest's; run `lacuna verify`"
        )
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return source, "Held-out pictures: originals, masks, and what was painted; report.html has the captions."
