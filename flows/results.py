"""What the stages and flows return: small, JSON-able references and counts; never tables or tensors. No prefect."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Result(BaseModel):
    """Frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StageSummary(Result):
    """What became of one data stage. It holds that ``num_in == num_out + sum(dropped.values())``.

    Attributes:
        stage: ``select``, ``download`` or ``encode``.
        manifest_uri: Of the dataset's ``MANIFEST.json``.
        prefix: Key of the dataset's folder in the store.
        digest: sha256 of what determines the dataset.
        num_in: Rows read.
        num_out: Rows kept.
        dropped: Refused rows by reason, most frequent first.
        was_done: Whether the dataset stood there before.
        seconds: How long it took.
    """

    stage: str
    manifest_uri: str
    prefix: str
    digest: str
    num_in: int
    num_out: int
    dropped: dict[str, int]
    was_done: bool
    seconds: float


class PrepareResult(Result):
    """A dataset that is ready to train on, and how it came about."""

    datasets: dict[str, str] = Field(description="Stage → URI of its manifest.")
    stages: dict[str, StageSummary]

    @property
    def dataset_prefix(self) -> str:
        """Key of the encoded dataset's folder."""
        return self.stages["encode"].prefix


class TrainSummary(Result):
    """A training's last checkpoint."""

    run_id: str
    step: int
    prefix: str = Field(description="Key of the checkpoint's folder in the store.")
    checkpoint: str = Field(description="URI of the checkpoint's folder.")
    dataset_prefix: str
    was_done: bool
    seconds: float


class ValidationSummary(Result):
    """What a checkpoint's validation measured."""

    run_id: str
    step: int
    prefix: str = Field(description="Key of the report's folder in the store.")
    report: str = Field(description="URI of report.html.")
    grid: str = Field(description="URI of grid.png.")
    summary: dict[str, Any] = Field(description="The report's `summary`.")
    num_samples: int = Field(description="Held-out pictures for each kind of mask.")
    num_object_samples: int = Field(
        description="Pictures with one whole object hidden, for prompt-following; 0 if it was not tried."
    )
    was_done: bool
    seconds: float


class PublishSummary(Result):
    """What was published, and which channels point to it now."""

    run_id: str
    step: int
    prefix: str = Field(description="Key of the export's folder in the store.")
    export: str = Field(description="URI of the export's folder.")
    channel: dict[str, str] = Field(description="Channel → what became of it.")
    was_done: bool
    seconds: float


class RunResult(Result):
    """The whole pipeline's result; with ``--json`` this is the last line of stdout."""

    run_id: str
    datasets: dict[str, str] = Field(description="Stage → URI of its manifest.")
    stages: dict[str, StageSummary]
    checkpoint: str
    report: str
    grid: str
    export: str
    channel: dict[str, str]
    summary: dict[str, Any]
    train: TrainSummary
    validation: ValidationSummary
    publish: PublishSummary


class RefreshResult(Result):
    """What a refresh found.

    Attributes:
        datasets: Stage → URI of its manifest.
        stages: What became of each stage.
        changed: Whether the encoded dataset is another one than the last refresh's.
        previous_digest: The last refresh's encoded dataset; None for the first refresh.
        num_new: Rows that were not in it.
        num_gone: Rows of it that are no longer there.
        num_kept: Rows in both.
        num_opted_out: Rows of it whose servers say no to training by now.
        num_forgotten: Rows of it that the source has withdrawn, or block lists name by now.
        report: URI of the page that says what has changed; None where nothing has.
        train: The training that followed, if one was asked for.
    """

    datasets: dict[str, str]
    stages: dict[str, StageSummary]
    changed: bool
    previous_digest: str | None
    num_new: int
    num_gone: int
    num_kept: int
    num_opted_out: int = 0
    num_forgotten: int = 0
    report: str | None = None
    train: TrainSummary | None = None
