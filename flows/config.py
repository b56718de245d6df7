"""What a user may say about the whole pipeline, and how a recipe and ``--set`` become it."""

import difflib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import ErrorDetails

from preprocessing.contracts.config import (
    Config,
    DownloadConfig,
    EncodeConfig,
    ModelConfig,
    RefreshConfig,
    RetentionConfig,
    SelectConfig,
    SourceConfig,
)
from training.config import PublishConfig, TrainConfig, ValidationConfig

RECIPES = Path(__file__).with_name("recipes")
MAX_RECIPE_BYTES = 1 << 20
_LONGEST_VALUE = 80


class OperationsConfig(Config):
    """How a run is spread over machines and watched. Nothing in it changes a result."""

    stages: Literal["inline", "deployments"] = Field(
        default="inline",
        description="Run each stage in the flow's own process, or as its own deployment, on the work pool of that.",
    )
    task_runner: Literal["threads", "processes", "dask", "ray"] | None = Field(
        default=None,
        description="Map shards of download and encode over tasks of this engine; unset: one task does them all.",
    )
    task_runner_address: str | None = Field(
        default=None, description="Of a Dask scheduler or a Ray head that runs already; unset: one on this machine."
    )
    max_tasks: int = Field(default=2, ge=1, le=1000, description="Tasks of one stage at a time.")
    stall_timeout_s: float = Field(
        default=3600,
        gt=0,
        description="No new row, shard or step for so long ends the stage with a diagnosis (code 4). Tasks of "
        "processes, dask or ray tell of rows through the store, each minute or four times within it; the time in which "
        "all of them wait in a queue or load their models counts as no progress.",
    )


class PipelineConfig(Config):
    """Everything that determines a run, from metadata to published checkpoint."""

    recipe: str = Field("custom", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Names the runs.")
    source: SourceConfig = SourceConfig()  # pyright: ignore[reportCallIssue]  # every field has a default
    select: SelectConfig = SelectConfig()  # pyright: ignore[reportCallIssue]  # every field has a default
    download: DownloadConfig = DownloadConfig()  # pyright: ignore[reportCallIssue]  # every field has a default
    encode: EncodeConfig = EncodeConfig()  # pyright: ignore[reportCallIssue]  # every field has a default
    model: ModelConfig
    train: TrainConfig
    validation: ValidationConfig = ValidationConfig()  # pyright: ignore[reportCallIssue]  # every field has a default
    publish: PublishConfig = PublishConfig()  # pyright: ignore[reportCallIssue]  # every field has a default
    retention: RetentionConfig = RetentionConfig()  # pyright: ignore[reportCallIssue]  # every field has a default
    refresh: RefreshConfig = RefreshConfig()  # pyright: ignore[reportCallIssue]  # every field has a default
    operations: OperationsConfig = OperationsConfig()  # pyright: ignore[reportCallIssue]  # every field has a default


def recipe_names() -> list[str]:
    """The recipes that are shipped."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_config(recipe: str, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Reads a recipe, applies overrides, and checks all of it.

    Args:
        recipe: A shipped recipe's name, or a YAML file's path.
        overrides: ``dotted.key=value`` each, the value in YAML.

    Raises:
        ValueError: One line for the first thing that is wrong: field, value, what is allowed.
    """
    path = _recipe_path(recipe)
    values = _read_yaml(path)
    values.setdefault("recipe", path.stem)
    for override in overrides:
        _apply(values, override)
    try:
        return PipelineConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(explain(error, PipelineConfig)) from None


def resolve(config: PipelineConfig | Mapping[str, Any] | str) -> PipelineConfig:
    """A config as it is, or the one that a recipe's name or a form's settings stand for.

    Raises:
        ValueError: One line for the first thing that is wrong: field, value, what is allowed.
    """
    if isinstance(config, PipelineConfig):
        return config
    return load_config(config) if isinstance(config, str) else load_settings(config)


def load_settings(settings: Mapping[str, Any]) -> PipelineConfig:
    """Reads what a deployment's form gives: a recipe, and settings over it.

    Args:
        settings: ``recipe``, a shipped recipe's name, or ``recipe_file``, a YAML file's path; ``name``, which names the
            runs and is the recipe's by default; and any section of `PipelineConfig`, or a part of one. Without a recipe
            the sections must say all that has no default.

    Raises:
        ValueError: One line for the first thing that is wrong: field, value, what is allowed.
    """
    values, sections = {}, dict(settings)
    recipe, file, name = (sections.pop(key, None) for key in ("recipe", "recipe_file", "name"))
    if recipe is not None and not isinstance(recipe, str):
        raise ValueError(f"recipe: {recipe!r} is no recipe's name; choose one of {', '.join(recipe_names())}")
    if file is not None or recipe is not None:
        path = _recipe_path(str(file or recipe))
        values = _read_yaml(path)
        values.setdefault("recipe", path.stem)
    if name is not None:
        values["recipe"] = name
    _lay_over(values, sections, PipelineConfig)
    try:
        return PipelineConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(explain(error, PipelineConfig)) from None


def as_settings(config: PipelineConfig) -> dict[str, Any]:
    """A whole config as the settings of a form, which `load_settings` reads as that config on any machine."""
    values = config.model_dump(mode="json", exclude_defaults=True)
    return {"name": config.recipe, **{key: value for key, value in values.items() if key != "recipe"}}


def _lay_over(values: dict[str, Any], settings: Mapping[str, Any], model: type[BaseModel]) -> None:
    """Puts settings into a recipe's values, section by section; a value that is no section replaces what is there."""
    for key, value in settings.items():
        field, below = model.model_fields.get(key), values.get(key)
        inner = None if field is None else _model_of(field.annotation)
        if inner is not None and isinstance(value, Mapping) and isinstance(below, dict):
            _lay_over(below, value, inner)
        elif inner is None or value is not None:  # a section that a form leaves empty says nothing
            values[key] = dict(value) if isinstance(value, Mapping) else value


def _recipe_path(recipe: str) -> Path:
    shipped = RECIPES / f"{recipe}.yaml"
    if "/" not in recipe and shipped.is_file():
        return shipped
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    names = recipe_names()
    near = difflib.get_close_matches(recipe, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"recipe: {recipe!r} is neither a file nor one of {', '.join(names)}{hint}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_RECIPE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"recipe: {str(path)!r} cannot be read: {error.strerror}") from None
    if len(text) > MAX_RECIPE_BYTES:
        raise ValueError(f"recipe: {str(path)!r} is larger than {MAX_RECIPE_BYTES} bytes; is it a recipe?")
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe: {str(path)!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"recipe: {str(path)!r} is not a mapping of sections such as `train:`")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    """Puts one ``dotted.key=value`` into a recipe's values."""
    dotted, separator, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not separator or not all(keys):
        raise ValueError(f"--set: {override!r} is not dotted.key=value, such as train.num_steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"--set: the value in {override!r} is not YAML; put strings with : or [ in quotes") from None
    at = values
    for depth, key in enumerate(keys[:-1], start=1):
        child = at.get(key)
        if child is None:
            child = at[key] = {}
        elif not isinstance(child, dict):
            raise ValueError(f"{'.'.join(keys[:depth])}: it has no keys of its own, and {override!r} sets one")
        at = child
    at[keys[-1]] = value


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Says in one line what is wrong first: field, value, what is allowed.

    Args:
        error: What pydantic found.
        model: The class that was being validated.
    """
    # An unknown key is the likeliest cause of another one missing, so it is told first.
    found = sorted(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
    return _explain_one(found[0], model)


def _explain_one(item: ErrorDetails, model: type[BaseModel]) -> str:
    location = tuple(part for part in item["loc"] if part != "__root__")
    dotted = ".".join(map(str, location))
    if item["type"] == "extra_forbidden":
        return f"{dotted}: unknown key{_did_you_mean(location, model)}"
    if item["type"] == "missing":
        return f"{dotted}: missing, and it has no default on purpose; set {dotted}=…"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if item["type"] == "value_error" and (not dotted or message.startswith(dotted)):
        return message  # a validator of ours, which names its field itself
    value = repr(item["input"])
    shown = value if len(value) <= _LONGEST_VALUE else f"{value[: _LONGEST_VALUE - 1]}…"
    return f"{dotted}: {message[:1].lower()}{message[1:]}, not {shown}"


def _did_you_mean(location: Sequence[int | str], model: type[BaseModel]) -> str:
    """The nearest known key, in the same section or, failing that, in any."""
    owner = _section(model, location[:-1])
    parent = ".".join(map(str, location[:-1]))
    name = str(location[-1])
    if owner is None:
        return ""
    near = difflib.get_close_matches(name, owner.model_fields, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {f'{parent}.' if parent else ''}{near[0]}?"
    elsewhere = [
        f"{section}.{name}"
        for section, field in model.model_fields.items()
        if (inner := _model_of(field.annotation)) is not None and name in inner.model_fields
    ]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; known are {', '.join(sorted(owner.model_fields))}"


def _section(model: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel] | None:
    for part in location:
        field = model.model_fields.get(str(part))
        inner = None if field is None else _model_of(field.annotation)
        if inner is None:
            return None
        model = inner
    return model


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The config class in a field's annotation, also where it may be None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        return next((found for part in get_args(annotation) if (found := _model_of(part))), None)
    return None
