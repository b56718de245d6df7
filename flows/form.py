"""The deployments' parameters as a form for people: the config's sections with their bounds, choices, descriptions.

Prefect's UI draws a form from a flow's JSON schema. The config's own schema would make a poor one: its defaults would
override the recipe's values, and each "this or nothing" would be a choice between two forms. Here no field is required
and none has a default, so that an empty field is what the recipe says. The schema is only the outer fence: `resolve`
reads what comes through it, and says in one line what is wrong.
"""

from typing import Annotated, Any

from pydantic import Field, SkipValidation, WithJsonSchema

from flows.config import PipelineConfig, recipe_names
from model.specs import MASK_FAMILIES, USER_FAMILY

_BEHIND = ("operations",)
_ALL = tuple(name for name in PipelineConfig.model_fields if name not in ("recipe", *_BEHIND))
_DATA = tuple(name for name in _ALL if name not in ("refresh", "train", "validation", "publish"))
_CHOICES: dict[str, list[str]] = {  # names that a validator checks, of which the schema does not know
    "encode.mask_family": [*MASK_FAMILIES, USER_FAMILY],
    "train.mask_family": [*MASK_FAMILIES],
    "validation.mask_families": [*MASK_FAMILIES],
}
_KEPT = ("type", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "pattern")
_KEPT += ("minItems", "maxItems", "minLength", "maxLength")


def form_schema(*sections: str) -> dict[str, Any]:
    """The JSON schema of a flow's ``config``.

    Args:
        sections: Those that are drawn field by field, in order, after the recipe; the others follow as JSON, for all of
            them may matter to a run: they say, for example, which dataset it is that is trained on.

    Returns:
        A schema without references, definitions, defaults or required fields.
    """
    whole = PipelineConfig.model_json_schema()
    properties = _recipe_fields()
    others = [name for name in whole["properties"] if name != "recipe" and name not in (*sections, *_BEHIND)]
    for name in (*sections, *_BEHIND):
        properties[name] = _field(name, whole["properties"][name], whole.get("$defs", {}))
    for name in others:
        about = _described(_resolved(whole["properties"][name], whole.get("$defs", {})).get("description"), None)
        description = f"{about} As JSON; empty: as the recipe says.".strip()
        properties[name] = {"type": "object", "title": name, "description": description}
    return _object(properties)


def _recipe_fields() -> dict[str, Any]:
    return {
        "recipe": {
            "type": "string",
            "enum": recipe_names(),
            "title": "recipe",
            "description": "What to start from; whatever is left empty below is as this recipe says.",
        },
        "recipe_file": {
            "type": "string",
            "title": "recipe_file",
            "description": "A recipe of your own instead: path of a YAML file that the worker can read.",
        },
        "name": {
            "type": "string",
            "title": "name",
            "pattern": r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
            "description": "Names the runs in the store; empty: the recipe's name.",
        },
    }


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    for position, schema in enumerate(properties.values()):  # databases do not keep the order of keys
        schema["position"] = position
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _field(path: str, schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """One field, with what it refers to in its place."""
    default = schema.get("default")
    schema = _resolved(schema, definitions)
    name = path.rpartition(".")[2]
    if "properties" in schema:
        drawn = _object({key: _field(f"{path}.{key}", one, definitions) for key, one in schema["properties"].items()})
    else:
        drawn = {key: schema[key] for key in _KEPT if key in schema}
        if "items" in schema:
            drawn["items"] = _item(path, schema["items"], definitions)
        elif path in _CHOICES:
            drawn["enum"] = _CHOICES[path]
        elif drawn.get("type") == "boolean":
            drawn["enum"] = [True, False]  # a switch cannot be left as it is, a choice can
    description = _described(schema.get("description"), default)
    return {"title": name, **({"description": description} if description else {}), **drawn}


def _item(path: str, schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    schema = _resolved(schema, definitions)
    drawn = {key: schema[key] for key in _KEPT if key in schema}
    return {**drawn, "enum": _CHOICES[path]} if path in _CHOICES else drawn


def _resolved(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """A schema without ``$ref``, and without "or null", which an empty field says as well."""
    if "$ref" in schema:
        target = definitions[schema["$ref"].rpartition("/")[2]]
        return {**_resolved(target, definitions), **{key: value for key, value in schema.items() if key != "$ref"}}
    if "anyOf" in schema:
        something = [one for one in schema["anyOf"] if one.get("type") != "null"]
        if len(something) == 1:
            rest = {key: value for key, value in schema.items() if key != "anyOf"}
            return {**_resolved(something[0], definitions), **rest}
    return schema


def _described(description: str | None, default: object) -> str:
    """A field's description, with the default where there is one to tell."""
    text = (description or "").split("\n\n", 1)[0].replace("\n", " ")
    if isinstance(default, (dict, type(None))) or default == [] or default == "":
        return text
    shown = str(default).lower() if isinstance(default, bool) else ", ".join(map(str, _as_list(default)))
    return f"{text} [{shown}]".strip()


def _as_list(value: object) -> list[object]:
    return list(value) if isinstance(value, list) else [value]


_Given = PipelineConfig | dict[str, Any] | str

PipelineForm = Annotated[_Given, SkipValidation, WithJsonSchema(form_schema(*_ALL))]
"""``config`` of the flow that does everything."""

PrepareForm = Annotated[_Given, SkipValidation, WithJsonSchema(form_schema(*_DATA))]
"""``config`` of flows that prepare data."""

RefreshForm = Annotated[_Given, SkipValidation, WithJsonSchema(form_schema("refresh", *_DATA))]
"""``config`` of the flow that a schedule runs."""

TrainForm = Annotated[_Given, SkipValidation, WithJsonSchema(form_schema("train", "model"))]
"""``config`` of the flow that trains."""

ValidateForm = Annotated[_Given, SkipValidation, WithJsonSchema(form_schema("validation", "model"))]
"""``config`` of the flow that validates."""

PublishForm = Annotated[_Given, SkipValidation, WithJsonSchema(form_schema("publish", "validation"))]
"""``config`` of the flow that publishes."""

TextOrNothing = Annotated[str | None, SkipValidation, WithJsonSchema({"type": "string"})]
"""An optional reference: one field to fill in, instead of a choice between two; over the API left out, never null."""

ROOT: Any = Field(default="var/store", json_schema_extra={"position": -2})
"""The default of ``root``, which the form asks for before the long ``config``."""

NOTHING: Any = Field(default=None, json_schema_extra={"position": -1})
"""The default of an optional reference, which the form asks for there, too."""
