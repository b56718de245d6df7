"""What became of the channels when a checkpoint was published: one object in the store, beside the run's reports.

A channel that its rule has kept where it was points elsewhere, and only the rule can say why. So the answer is written
down, and with it what the rule was asked about: as long as that is the same, nobody has to ask again. No prefect.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from infra.bundles import find_bundle, manifest_sha256
from infra.channels import ChannelPointer, read_channel
from infra.storage import ObjectNotFoundError, ObjectStore
from preprocessing.contracts.digests import digest_of
from training.runspec import run_prefix, step_name
from training.runspec_validation import ExportSpec

FORMAT_VERSION = 1
_STANDS = "kept: points to this export already"


class Publication(BaseModel):
    """The outcome of one publishing.

    Attributes:
        format_version: Of this record.
        export_sha256: Of the manifest of the export.
        rules: Digest of the report and the settings that the channels' rules read.
        stood: Channel → where it pointed before it was asked, and since when; None where it did not point anywhere.
        channels: Channel → what became of it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format_version: Literal[1] = FORMAT_VERSION
    export_sha256: str
    rules: str
    stood: dict[str, str | None]
    channels: dict[str, str]


def publication_key(spec: ExportSpec) -> str:
    """Key of the outcome of a checkpoint's publishing."""
    return f"{run_prefix(spec.run_id)}/publication/{step_name(spec.step)}.json"


def pointers(store: ObjectStore, spec: ExportSpec) -> dict[str, str | None]:
    """Channel → where it points, and since when; to be asked before a publishing and given to `record_publication`."""
    return {name: _place(read_channel(store, name)) for name in spec.config.channels}


def _place(pointer: ChannelPointer | None) -> str | None:
    return None if pointer is None else f"{pointer.bundle} {pointer.moved_at}"


def record_publication(
    store: ObjectStore, spec: ExportSpec, stood: dict[str, str | None], channels: dict[str, str]
) -> None:
    """Writes down what a publishing has done.

    Args:
        store: Where the export is.
        spec: What was published.
        stood: What `pointers` said before. A channel that was moved between then and the rule is asked again.
        channels: Channel → what became of it.
    """
    made = Publication(
        export_sha256=manifest_sha256(store, spec.export_prefix),
        rules=_rules(spec),
        stood=stood,
        channels=channels,
    )
    store.put(publication_key(spec), made.model_dump_json(indent=1).encode())


def find_publication(store: ObjectStore, spec: ExportSpec) -> Publication | None:
    """The outcome of the last publishing by these rules; None where there is none, or its export is gone."""
    try:
        made = Publication.model_validate_json(store.read(publication_key(spec)))
    except (ObjectNotFoundError, ValidationError):
        return None
    if made.rules != _rules(spec) or find_bundle(store, spec.export_prefix) is None:
        return None
    return made if made.export_sha256 == manifest_sha256(store, spec.export_prefix) else None


def settled_channels(store: ObjectStore, spec: ExportSpec) -> dict[str, str] | None:
    """What stands to be said of the channels, if the export is there and no rule has to be asked; None otherwise.

    That is so of a channel that points to the export, and of one whose rule has kept it where it is still.
    """
    if find_bundle(store, spec.export_prefix) is None:
        return None
    sha256, made = manifest_sha256(store, spec.export_prefix), find_publication(store, spec)
    settled: dict[str, str] = {}
    for name in spec.config.channels:
        pointer = read_channel(store, name)
        if pointer is not None and (pointer.bundle, pointer.manifest_sha256) == (spec.export_prefix, sha256):
            settled[name] = _STANDS
        elif (
            made is not None
            and made.channels.get(name, "").startswith("kept")
            and name in made.stood
            and made.stood[name] == _place(pointer)
        ):
            settled[name] = made.channels[name]
        else:
            return None
    return settled


def _rules(spec: ExportSpec) -> str:
    asked = {"report": spec.report_prefix, **spec.config.model_dump(mode="json", exclude={"channels"})}
    return digest_of("publication", FORMAT_VERSION, asked, [])
