"""Read the dataclasses of the configuration as a table of YAML keys.

One source for loader, JSON Schema and documentation: a field's annotation gives the kind of
value, its name the key (`ttl_s` is `ttl`, `memory_bytes` is `memory`), its attribute docstring
the description. What a type cannot say stands in `Annotated[..., Yaml(...)]`.
"""

import ast
import inspect
import textwrap
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NewType, Union, get_args, get_origin, get_type_hints

Kind = Literal[
    "api_keys",
    "boolean",
    "choice",
    "choices",
    "duration",
    "integer",
    "names",
    "number",
    "pairs",
    "path",
    "paths",
    "secret",
    "secrets",
    "size",
    "text",
    "texts",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Yaml:
    """What a field's type cannot say about its YAML key."""

    skip: bool = False
    """Not a key: the loader finds the value itself."""
    section: str | None = None
    """Top-level section that holds the key, for fields of `Config` itself."""
    key: str | None = None
    kind: Kind | None = None
    choices: tuple[str, ...] | None = None
    low: float | None = None
    high: float | None = None
    pattern: str | None = None
    """Regular expression that the whole text (or each text of a list) must match."""
    default: str | None = None
    """Words for a default that the loader computes; makes the key optional."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One YAML key and the field it fills."""

    name: str
    field: str
    kind: Kind
    doc: str
    required: bool
    nullable: bool
    choices: tuple[str, ...]
    low: float | None
    high: float | None
    pattern: str | None
    default: Any
    """The field's default; None also where the loader computes one."""
    default_words: str | None
    section: str | None


@cache
def keys_of(cls: type) -> tuple[Key, ...]:
    """Return the YAML keys of a dataclass, in the order of its fields."""
    hints = get_type_hints(cls, include_extras=True)
    docs = attribute_docs(cls)
    found = []
    for item in fields(cls):
        hint, yaml = _annotation(hints[item.name])
        if not yaml.skip and (yaml.kind is not None or _is_value(hint)):
            found.append(_key(item, hint, yaml, docs.get(item.name, "")))
    return tuple(found)


@cache
def attribute_docs(cls: type) -> Mapping[str, str]:
    """Return the string that follows each attribute in the class's source, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    if not isinstance(body, ast.ClassDef):
        return {}
    docs: dict[str, str] = {}
    for before, after in zip(body.body, body.body[1:], strict=False):
        match before, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                value=ast.Constant(value=str(text))
            ):
                docs[name] = " ".join(text.split())
            case _:
                pass
    return docs


def class_doc(cls: type) -> str:
    """Return the class's docstring on one line."""
    return " ".join((inspect.getdoc(cls) or "").split())


def _annotation(hint: object) -> tuple[object, Yaml]:
    if get_origin(hint) is Annotated:
        base, *extras = get_args(hint)
        return base, next((extra for extra in extras if isinstance(extra, Yaml)), Yaml())
    return hint, Yaml()


def _without_none(hint: object) -> tuple[object, bool]:
    if get_origin(hint) in {Union, types.UnionType}:
        (rest,) = [arm for arm in get_args(hint) if arm is not type(None)]
        return rest, True
    return hint, False


def _is_value(hint: object) -> bool:
    """Whether a field is a value rather than a section of its own."""
    if get_origin(hint) is Mapping:
        return get_args(hint)[1] is str
    return not (isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"))


def _key(item: "Field[Any]", hint: object, yaml: Yaml, doc: str) -> Key:
    base, nullable = _without_none(hint)
    has_default = item.default is not MISSING or item.default_factory is not MISSING
    default = item.default if item.default is not MISSING else None
    if item.default_factory is not MISSING:
        default = item.default_factory()
    return Key(
        name=yaml.key or item.name.removesuffix("_bytes").removesuffix("_s"),
        field=item.name,
        kind=yaml.kind or _kind(item.name, base),
        doc=doc,
        required=not has_default and yaml.default is None,
        nullable=nullable,
        choices=yaml.choices or _choices(base),
        low=yaml.low,
        high=yaml.high,
        pattern=yaml.pattern,
        default=default,
        default_words=yaml.default,
        section=yaml.section,
    )


def _choices(base: object) -> tuple[str, ...]:
    if get_origin(base) is Literal:
        return tuple(get_args(base))
    if get_origin(base) is tuple:
        base = get_args(base)[0]
    if isinstance(base, type) and issubclass(base, StrEnum):
        return tuple(base)
    return ()


def _kind(name: str, base: object) -> Kind:
    if get_origin(base) is Literal:
        return "choice"
    if get_origin(base) is Mapping:
        return "pairs"
    if get_origin(base) is tuple:
        return _list_kind(get_args(base)[0])
    if isinstance(base, NewType):
        base = base.__supertype__
    kinds: dict[object, Kind] = {
        bool: "boolean",
        int: "size" if name.endswith("_bytes") else "integer",
        float: "duration" if name.endswith("_s") else "number",
        Path: "path",
        str: "text",
    }
    return kinds[base]


def _list_kind(element: object) -> Kind:
    if element is Path:
        return "paths"
    if isinstance(element, type) and issubclass(element, StrEnum):
        return "choices"
    return "texts"
