"""The manifest: the list of shards that makes a dataset true. Nothing without one is believed."""

from collections import Counter
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from infra.errors import ContractError
from infra.storage import ObjectNotFoundError, ObjectStore

FORMAT_VERSION = 1
MANIFEST_NAME = "MANIFEST.json"
DRIFT_PREFIX = "reports/drift-"  # of reports beside a manifest: how a dataset differs from an earlier one

Split = Literal["train", "validation"]


class Record(BaseModel):
    """Frozen, and a key that it does not know is an error: a newer format is refused, not half understood.

    Keys of `only_if_set` are written only where they say something: without them a file is that of earlier versions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    only_if_set: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_what_is_not_set(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = handler(self)
        return {name: value for name, value in values.items() if value or name not in self.only_if_set}


class DatasetFile(Record):
    """One file of a dataset.

    Attributes:
        name: Relative to the dataset's folder.
        num_bytes: Size.
        sha256: Of the content.
        num_rows: Rows, for Parquet files; 0 otherwise.
        kind: ``rows`` (what the next stage reads), ``rejects`` (refused rows) or ``extra`` (constants of the dataset).
        split: Which split its rows belong to; None where rows are not yet split by file.
        folder: Key of the folder of the dataset in which it stands, where that is another one than the manifest's: a
            file may be named by several datasets, and whoever deletes one looks for the others.
        removed: Places of the rows that were forgotten, among those that the file held when it was made, ascending.
            They are not in it any more; what depends on places, such as the order of a training, still counts them.
        without: Columns that were deleted from it: ``image``, once the pictures were encoded.
    """

    only_if_set: ClassVar[frozenset[str]] = frozenset({"folder", "removed", "without"})

    name: str
    num_bytes: int
    sha256: str
    num_rows: int = 0
    kind: Literal["rows", "rejects", "extra"] = "rows"
    split: Split | None = None
    folder: str | None = None
    removed: tuple[int, ...] = ()
    without: tuple[str, ...] = ()

    @property
    def num_places(self) -> int:
        """Rows that it held when it was made."""
        return self.num_rows + len(self.removed)

    def key(self, prefix: str) -> str:
        """Its key in the store.

        Args:
            prefix: Of the dataset whose manifest names it.
        """
        return f"{self.folder or prefix}/{self.name}"


class ShardReport(Record):
    """What became of one shard. It holds that ``num_in == num_out + sum(dropped.values())``.

    Each dropped row stands in a file of kind ``rejects``; a stage that was told to count only writes no such file.

    Attributes:
        index: Of the shard in its dataset.
        num_in: Rows read.
        num_out: Rows kept.
        dropped: Refused rows by reason.
        files: Where they are.
        digest: sha256 of what determines this shard, whatever dataset it is in; None where the stage does not say.
    """

    only_if_set: ClassVar[frozenset[str]] = frozenset({"digest"})

    index: int
    num_in: int
    num_out: int
    dropped: dict[str, int]
    files: tuple[DatasetFile, ...]
    digest: str | None = None

    def standing_in(self, prefix: str, index: int) -> "ShardReport":
        """The same shard, as another dataset names it: its files stay where they are.

        Args:
            prefix: Of the dataset whose manifest this report is of.
            index: Of the shard in the other dataset.
        """
        files = tuple(file.model_copy(update={"folder": file.folder or prefix}) for file in self.files)
        return self.model_copy(update={"index": index, "files": files})

    @model_validator(mode="after")
    def _accounts_for_every_row(self) -> "ShardReport":
        num_rows = sum(f.num_rows for f in self.files if f.kind == "rows")
        rejects = [f.num_rows for f in self.files if f.kind == "rejects"]
        if self.num_in != self.num_out + sum(self.dropped.values()) or num_rows != self.num_out:
            raise ValueError(
                f"shard {self.index}: num_in {self.num_in} != num_out {self.num_out} (rows in files {num_rows}) "
                f"+ dropped {sum(self.dropped.values())}"
            )
        if rejects and sum(rejects) != sum(self.dropped.values()):
            raise ValueError(f"shard {self.index}: {sum(rejects)} rejected rows written, {self.dropped} counted")
        return self


class CommittedShard(Record):
    """What stands in ``reports/``: a shard's report, and of which dataset it is; a copy in another folder is noticed.

    Attributes:
        format_version: Of this record.
        stage: As in the manifest.
        stage_version: As in the manifest.
        digest: Of the dataset: over the config, the stage's version, and the digests of the input.
        parents: Stage → digest of the input.
        report: What became of the shard.
    """

    format_version: Literal[1] = FORMAT_VERSION
    stage: str
    stage_version: int
    digest: str
    parents: dict[str, str]
    report: ShardReport


class Manifest(Record):
    """A complete dataset.

    Attributes:
        format_version: Of this record.
        stage: ``select``, ``download`` or ``encode``.
        stage_version: The stage's ``STAGE_VERSION``.
        digest: sha256 of what determines the result.
        parents: Stage → digest of what it was made from.
        config: The config fields that changed the result.
        shards: What became of each shard, in order of index.
        extra_files: Files that belong to the whole dataset, such as constants.
        specs: ``LatentSpec``, ``TextSpec`` and ``MaskSpec`` as JSON, where tensors are stored.
        created_at: ISO 8601, UTC.
        code_version: Version of Lacuna that wrote it.
        conditional_writes: Whether the store enforced put-if-absent when this was written.
    """

    format_version: Literal[1] = FORMAT_VERSION
    stage: str
    stage_version: int
    digest: str
    parents: dict[str, str]
    config: dict[str, Any]
    shards: tuple[ShardReport, ...]
    extra_files: tuple[DatasetFile, ...] = ()
    specs: dict[str, dict[str, Any]] = Field(default_factory=dict)
    created_at: str
    code_version: str
    conditional_writes: bool = True

    @property
    def num_in(self) -> int:
        """Rows read."""
        return sum(shard.num_in for shard in self.shards)

    @property
    def num_out(self) -> int:
        """Rows kept."""
        return sum(shard.num_out for shard in self.shards)

    @property
    def dropped(self) -> dict[str, int]:
        """Refused rows by reason, most frequent first."""
        total: Counter[str] = Counter()
        for shard in self.shards:
            total.update(shard.dropped)
        return dict(total.most_common())

    def files(self, kind: str = "rows", split: Split | None = None) -> list[DatasetFile]:
        """The files of one kind, in order; of one split where given."""
        found = [f for shard in self.shards for f in shard.files if f.kind == kind]
        return [f for f in found if split is None or f.split == split]


def dataset_prefix(stage: str, digest: str) -> str:
    """The key of a dataset's folder in the store, without trailing slash."""
    return f"datasets/{stage}/{digest[:16]}"


def parse_manifest(data: bytes, uri: str) -> Manifest:
    """Reads a manifest's bytes.

    Args:
        data: The content of a ``MANIFEST.json``.
        uri: Where it was found, for the message.

    Raises:
        ContractError: It is not a manifest of a format that this version reads.
    """
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise ContractError(
            f"{uri}: not a manifest of format {FORMAT_VERSION} "
            f"({'.'.join(map(str, first['loc'])) or 'whole'}: {first['msg']}); make the dataset again with this version"
        ) from error


def load_manifest(store: ObjectStore, prefix: str) -> Manifest:
    """Reads a dataset's manifest.

    Raises:
        ObjectNotFoundError: There is none: the dataset is not complete.
        ContractError: It is not a manifest of a format that this version reads.
    """
    key = f"{prefix}/{MANIFEST_NAME}"
    return parse_manifest(store.read(key), store.uri_of(key))


def find_manifest(store: ObjectStore, prefix: str) -> Manifest | None:
    """The dataset's manifest, or None where the dataset is not complete."""
    try:
        return load_manifest(store, prefix)
    except ObjectNotFoundError:
        return None
