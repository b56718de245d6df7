"""What the engine is told: the one thing that its two sides share."""

from pathlib import Path
from typing import Literal

from preprocessing.contracts.config import Config, DownloadConfig


class EngineJob(Config):
    """What is to be fetched, and where to.

    Attributes:
        input: A Parquet file, or a folder of them, which are taken in the order of their names.
        output: A folder; shards that are done there already are left.
        config: How to fetch.
        output_format: img2dataset's.
        url_column: Where the URLs stand.
        caption_column: Where the captions stand, if the output is to have them.
        columns: Others that the output is to have.
        rows_per_shard: At most.
        num_digits: Of a shard's number in file names.
        opted_out: A file in which all processes of the run note what said no; by default beside the shards.
    """

    input: Path
    output: Path
    config: DownloadConfig
    output_format: Literal["parquet", "webdataset", "files"] = "parquet"
    url_column: str = "url"
    caption_column: str | None = None
    columns: tuple[str, ...] = ()
    rows_per_shard: int = 10_000
    num_digits: int = 5
    opted_out: Path | None = None
