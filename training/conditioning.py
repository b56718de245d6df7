"""Which parts of its conditioning a training reads, and whether a dataset holds them. No torch: the flows ask, too.

What is not read is made in the step, by frozen models, out of what is: `training.online` does it.
"""

from collections.abc import Collection, Iterator

from infra.errors import ContractError
from model.specs import USER_FAMILY
from preprocessing.contracts.config import EncodeConfig
from training.config import TrainConfig
from training.fields import Fields


def fields_of(train: TrainConfig) -> Fields:
    """What a training reads of a dataset's rows; the rest it makes."""
    return Fields(
        text=train.text_source,
        mask="cached" if train.mask_source == "cached" else "none",
        moments=train.moments_source == "cached",
        images="online" in (train.mask_source, train.moments_source),
    )


def is_any_online(fields: Fields) -> bool:
    """Whether a training that reads these has to make the rest, by frozen models."""
    return fields.images or fields.text == "token_ids"


def encoded_columns(encode: EncodeConfig) -> frozenset[str]:
    """The columns, of those that conditioning is made of, that an encoding with this config stores."""
    columns = {f"{name}_{k}" for k in range(encode.num_mask_variants) for name in ("mask", "masked_moments")}
    columns |= set(encode.text_columns)
    columns |= {"moments"} if encode.moments else set()
    return frozenset(columns | ({"image"} if encode.image != "none" else set()))


def check_fields(fields: Fields, columns: Collection[str], dataset: str) -> None:
    """Makes sure that a dataset's rows hold what is asked of them.

    Args:
        fields: What is asked for.
        columns: What the rows hold.
        dataset: What to call it in messages.

    Raises:
        ContractError: They lack something; names both sides.
    """
    for column, remedy in _lacking(fields, columns):
        raise ContractError(
            f"dataset: training asks for {column}, and {dataset} stores {', '.join(sorted(columns))}; "
            f"encode it with {remedy}"
        )


def check_conditioning(train: TrainConfig, columns: Collection[str], mask_family: str, dataset: str) -> None:
    """`check_fields` of a training, in the words of its config; and that the masks that it draws can be drawn.

    Args:
        train: What is asked for.
        columns: What the rows hold.
        mask_family: Of the dataset's masks.
        dataset: What to call it in messages.

    Raises:
        ContractError: The rows lack something; names both sides, and what to change on either.
    """
    fields = fields_of(train)
    # For each column the field that asks for it, what the dataset lacks, and the value that asks for something else.
    asked = {
        "mask_0": ("mask_source", "stores no masks", "online"),
        "image": ("mask_source", "keeps no pictures to put masks on", "cached")
        if fields.mask == "none"
        else ("moments_source", "keeps no pictures to encode", "cached"),
        "text_embeddings": ("text_source", "stores no text embeddings", "token_ids"),
        "token_ids": ("text_source", "stores no token ids", "embeddings"),
        "moments": ("moments_source", "stores no moments", "online"),
    }
    for column, remedy in _lacking(fields, columns):
        field, what, other = asked[column]
        raise ContractError(
            f"train.{field}: {getattr(train, field)!r}, but {dataset} {what}; "
            f"set it to {other!r}, or encode with {remedy}"
        )
    if fields.mask == "none" and train.mask_family is None and mask_family == USER_FAMILY:
        raise ContractError(
            f"train.mask_source: {train.mask_source!r}, but {dataset} does not hold the files that its masks were "
            "(mask family 'user'); set it to 'cached', or train.mask_family to a family that can be drawn"
        )


def _lacking(fields: Fields, columns: Collection[str]) -> Iterator[tuple[str, str]]:
    """The columns that are asked for and not there, each with what an encoding that stores it has in its config."""
    wanted = (
        (fields.mask == "cached", "mask_0", "encode.num_mask_variants of at least 1"),
        (fields.images, "image", "encode.image 'png' or 'jpeg'"),
        (fields.text == "embeddings", "text_embeddings", "encode.text 'embeddings' or 'both'"),
        (fields.text == "token_ids", "token_ids", "encode.text 'token_ids' or 'both'"),
        (fields.moments, "moments", "encode.moments true"),
    )
    for is_wanted, column, remedy in wanted:
        if is_wanted and column not in columns:
            yield column, remedy
