"""The configuration as a JSON Schema, for editors and other tools.

It says what one key alone can say; `load.py` also checks keys against each other and the machine.
"""

from collections.abc import Iterable
from typing import Any

from swapserve.config.fields import Key, keys_of
from swapserve.config.layout import Part, nested, parts, top_keys
from swapserve.config.recipes import Recipe
from swapserve.config.reference import default_text
from swapserve.config.schema import DEVICE_PATTERN
from swapserve.config.values import DURATION_PATTERN, SIZE_PATTERN

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SCALAR = {"type": ["string", "number", "boolean"]}
_NOTHING = {"type": "null"}

Schema = dict[str, Any]


def json_schema() -> Schema:
    """Return the schema of a configuration file (draft 2020-12)."""
    body = _object(top_keys())
    for part in parts():
        body["properties"][part.name] = _part(part)
    return {"$schema": _DIALECT, "title": "SwapServe configuration", **body}


def recipe_schema() -> Schema:
    """Return the schema of a recipe file."""
    return {"$schema": _DIALECT, "title": "SwapServe recipe", **_object(keys_of(Recipe))}


def _part(part: Part) -> Schema:
    one = _object(part.keys)
    names = {"pattern": _whole(DEVICE_PATTERN)}
    shapes: dict[str, Schema] = {
        "section": one,
        "mapping": {"type": "object", "propertyNames": names, "additionalProperties": one},
        "list": {"type": "array", "items": one},
    }
    return {"description": part.doc, "anyOf": [shapes[part.shape], _NOTHING]}


def _object(keys: Iterable[Key]) -> Schema:
    keys = tuple(keys)
    schema: Schema = {
        "type": "object",
        "additionalProperties": False,
        "properties": {key.name: _property(key) for key in keys},
    }
    required = [key.name for key in keys if key.required]
    return schema | ({"required": required} if required else {})


def _property(key: Key) -> Schema:
    schema = _value(key)
    if not key.required and (key.nullable or key.default_words is not None):
        schema = {"anyOf": [schema, _NOTHING]}
    default = _default(key)
    extra = {} if default is None else {"default": default}
    return {"description": key.doc, **schema, **extra}


def _value(key: Key) -> Schema:
    if key.kind == "api_keys":
        entry = _object(nested()["server"].keys)
        return {"type": "array", "items": {"anyOf": [*_secret()["anyOf"], entry]}}
    text: Schema = {"type": "string"}
    if key.pattern is not None:
        text["pattern"] = _whole(key.pattern)
    schemas: dict[str, Schema] = {
        "boolean": {"type": "boolean"},
        "choice": {"enum": list(key.choices)},
        "choices": {"type": "array", "items": {"enum": list(key.choices)}},
        "duration": _measure("number", DURATION_PATTERN, key),
        "integer": {"type": "integer", **_bounds(key)},
        "names": {"anyOf": [text, {"type": "array", "minItems": 1, "items": text}]},
        "number": {"type": "number", **_bounds(key)},
        "pairs": {"type": "object", "additionalProperties": _SCALAR},
        "path": {"type": "string", "minLength": 1},
        "paths": {"type": "array", "items": {"type": "string", "minLength": 1}},
        "secret": _secret(),
        "secrets": {"type": "array", "items": _secret()},
        "size": _measure("integer", SIZE_PATTERN, key),
        "text": text,
        "texts": {"type": "array", "items": text if key.pattern is not None else _SCALAR},
    }
    return schemas[key.kind]


def _measure(number: str, pattern: str, key: Key) -> Schema:
    low = 0 if key.low is None else key.low
    as_number = {"type": number, **_bounds(key), "minimum": low}
    return {"anyOf": [as_number, {"type": "string", "pattern": _whole(pattern)}]}


def _bounds(key: Key) -> Schema:
    bounds = {"minimum": key.low, "maximum": key.high}
    return {name: limit for name, limit in bounds.items() if limit is not None}


def _secret() -> Schema:
    file = {
        "type": "object",
        "additionalProperties": False,
        "required": ["file"],
        "properties": {"file": {"type": "string", "minLength": 1}},
    }
    return {"anyOf": [{"type": "string", "minLength": 1}, file]}


def _default(key: Key) -> object:
    if key.kind in {"size", "duration"}:
        return default_text(key) or None
    return list(key.default) if isinstance(key.default, tuple) else key.default


def _whole(pattern: str) -> str:
    return f"^(?:{pattern})$"
