"""Which parts of its conditioning a training reads, and whether a dataset holds them. No torch: the flows ask, too.

What is not read is made in the step, by frozen models, out of what is: `training.online` does it.
"""

from collections.abc import Collection

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


def check_conditioning(train: TrainConfig, columns: Collection[str], mask_family: str, dataset: str) -> None:
    """Makes sure that what a training asks for can be read, or made of what can be read.

    Args:
        train: What is asked for.
        columns: What the rows hold.
        mask_family: Of the dataset's masks.
        dataset: What to call it in messages.

    Raises:
        ContractError: The rows lack something; names both sides, and what to change on either.
    """
    fields = fields_of(train)
    other_text = "token_ids" if train.text_source == "embeddings" else "embeddings"
    own_masks = fields.mask == "none" and train.mask_family is None and mask_family == USER_FAMILY
    # The field that asks, whether it asks in vain, what the dataset lacks, and what to do about it.
    lacks = (
        (
            "mask_source",
            fields.mask == "cached" and "mask_0" not in columns,
            "stores no masks",
            "set it to 'online', or encode with encode.num_mask_variants of at least 1",
        ),
        (
            "mask_source",
            fields.mask == "none" and "image" not in columns,
            "keeps no pictures to put masks on",
            "set it to 'cached', or encode with encode.image 'png' or 'jpeg'",
        ),
        (
            "mask_source",
            own_masks,
            "does not hold the files that its masks were (mask family 'user')",
            "set it to 'cached', or train.mask_family to a family that can be drawn",
        ),
        (
            "text_source",
            {"embeddings": "text_embeddings"}.get(fields.text, fields.text) not in columns,
            f"stores no {'text embeddings' if fields.text == 'embeddings' else 'token ids'}",
            f"set it to {other_text!r}, or encode with encode.text {fields.text!r} or 'both'",
        ),
        (
            "moments_source",
            fields.moments and "moments" not in columns,
            "stores no moments",
            "set it to 'online', or encode with encode.moments true",
        ),
        (
            "moments_source",
            not fields.moments and "image" not in columns,
            "keeps no pictures to encode",
            "set it to 'cached', or encode with encode.image 'png' or 'jpeg'",
        ),
    )
    for field, is_lacking, what, remedy in lacks:
        if is_lacking:
            raise ContractError(f"train.{field}: {getattr(train, field)!r}, but {dataset} {what}; {remedy}")
