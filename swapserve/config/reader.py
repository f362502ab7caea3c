"""Turn a table of nodes into values, by the keys of a dataclass."""

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swapserve.config.fields import Key
from swapserve.config.nodes import Items, Node, Problems, Scalar, Table, describe, near
from swapserve.config.schema import REMOVED
from swapserve.config.values import DURATION_WORDS, SIZE_WORDS, parse_duration, parse_size

_KEY_WORDS = "a key, ${env:NAME} or {file: path}"
_ENV = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")


class _WrongError(Exception):
    """A value is not what its key expects; the caller notes it and goes on."""

    def __init__(self, node: Node, expected: str, *, found: str | None = None) -> None:
        self.node = node
        self.expected = expected
        self.found = describe(node) if found is None else found
        self.at = ""
        """Where below the key."""
        super().__init__(expected)


@dataclass(slots=True)
class Section:
    """The values read from one table.

    `values` has fields that were given and good; `bad` those given but wrong or missing.
    """

    key: str
    line: int
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)

    def line_of(self, name: str) -> int:
        """Return the line of a field's key, or the section's if it was not given."""
        return self.lines.get(name, self.line)


@dataclass(slots=True)
class Reader:
    """Reads one file's values; relative paths start at the file's directory."""

    problems: Problems
    secrets: bool = True
    """Whether `${env:...}` and `{file: ...}` are looked up; else secrets stay as written."""
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def section(self, node: Node | None, key: str, keys: Iterable[Key], line: int = 1) -> Section:
        """Read a mapping; unknown keys, wrong values and missing required keys are noted."""
        table = self.table(node, key)
        keys = tuple(keys)
        result = Section(key, node.line if node is not None else line)
        if isinstance(node, Items) or (isinstance(node, Scalar) and node.kind != "null"):
            result.bad.update(item.field for item in keys)
            return result
        self.unknown(table, key, [item.name for item in keys])
        for item in keys:
            value = table.nodes.get(item.name)
            if value is None:
                self._missing(item, result)
            else:
                result.lines[item.field] = table.lines[item.name]
                self._value(item, value, result)
        return result

    def table(self, node: Node | None, key: str) -> Table:
        """Return a node as a mapping; nothing is an empty one."""
        if isinstance(node, Table):
            return node
        if node is not None and not (isinstance(node, Scalar) and node.kind == "null"):
            self.problems.add(node.line, key, describe(node), "a mapping")
        return Table(node.line if node is not None else 1)

    def unknown(self, table: Table, key: str, known: Iterable[str]) -> None:
        """Note each key of a table that is not known, with near misses or its successor."""
        known = list(known)
        for name, line in table.lines.items():
            where = join(key, name)
            if where in REMOVED:
                self.problems.add(line, where, "a key of an earlier version", REMOVED[where])
            elif name not in known:
                expected = f"one of {', '.join(known)}{near(name, known)}"
                self.problems.add(line, where, "an unknown key", expected)

    def check_name(self, name: str, pattern: str, line: int, key: str) -> None:
        """Note a key chosen by the user that cannot be a name."""
        if re.fullmatch(pattern, name) is None:
            found = f"the name {name!r}"
            self.problems.add(line, key, found, f"a name that matches {pattern}")

    def _missing(self, item: Key, result: Section) -> None:
        if item.required:
            result.bad.add(item.field)
            key = join(result.key, item.name)
            self.problems.add(result.line, key, "nothing", expectation(item))

    def _value(self, item: Key, node: Node, result: Section) -> None:
        if isinstance(node, Scalar) and node.kind == "null":
            if item.required or not (item.nullable or item.default_words is not None):
                result.bad.add(item.field)
                key = join(result.key, item.name)
                self.problems.add(node.line, key, "nothing", expectation(item))
            return
        try:
            result.values[item.field] = self._read(item, node)
        except _WrongError as wrong:
            result.bad.add(item.field)
            key = f"{join(result.key, item.name)}{wrong.at}"
            self.problems.add(wrong.node.line, key, wrong.found, wrong.expected)

    def _read(self, item: Key, node: Node) -> object:
        value: object
        match item.kind:
            case "boolean":
                value = _boolean(node)
            case "size" | "duration" | "integer" | "number":
                value = _within(item, node, _quantity(item, node))
            case "choice":
                value = _choice(item, node)
            case "text":
                value = _matching(item, node, _text(node))
            case "path":
                value = self._path(node)
            case "pairs":
                value = _pairs(node)
            case "names":
                value = self._names(item, node)
            case "secret":
                value = self._secret(node)
            case "api_keys" | "choices" | "paths" | "secrets" | "texts":
                value = self._list(item, node)
        return value

    def _list(self, item: Key, node: Node) -> tuple[object, ...]:
        if not isinstance(node, Items):
            raise _WrongError(node, expectation(item))
        values = []
        for index, entry in enumerate(node.nodes):
            try:
                values.append(self._element(item, entry))
            except _WrongError as wrong:
                wrong.at = f"[{index}]{wrong.at}"
                raise
        return tuple(values)

    def _names(self, item: Key, node: Node) -> tuple[object, ...]:
        """Read one name, or a list of at least one."""
        if not isinstance(node, Items):
            return (_matching(item, node, _text(node)),)
        if not node.nodes:
            raise _WrongError(node, expectation(item), found="an empty list")
        return self._list(item, node)

    def _element(self, item: Key, node: Node) -> object:
        match item.kind:
            case "api_keys":
                return node  # `api_keys.py` reads it
            case "secrets":
                return self._secret(node)
            case "paths":
                return self._path(node)
            case "choices":
                return _choice(item, node)
            case _:
                return _matching(item, node, _any_text(node))

    def _path(self, node: Node) -> Path:
        text = _text(node)
        if not text:
            raise _WrongError(node, "a path")
        return absolute(text, self.problems.path.parent)

    def _secret(self, node: Node) -> str:
        expected = _KEY_WORDS
        if isinstance(node, Table) and set(node.nodes) == {"file"}:
            path = self._path(node.nodes["file"])
            return self._secret_file(node, path) if self.secrets else f"{{file: {path}}}"
        if not isinstance(node, Scalar) or node.kind != "text" or not node.text.strip():
            raise _WrongError(node, expected, found=_hidden(node))
        match = _ENV.fullmatch(node.text)
        if match is None:
            if "${" in node.text:
                raise _WrongError(node, expected, found=f"the text {node.text!r}")
            return node.text
        if not self.secrets:
            return node.text
        value = self.environ.get(match[1], "").strip()
        if not value:
            raise _WrongError(
                node, f"the environment variable {match[1]} to be set", found="no value for it"
            )
        return value

    def _secret_file(self, node: Node, path: Path) -> str:
        try:
            value = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            found = f"{path}, which cannot be read ({error})"
            raise _WrongError(node, "a readable text file", found=found) from error
        if not value or "\n" in value:
            raise _WrongError(node, "a file with one line, the key", found=f"{path}, which has not")
        return value


def join(key: str, name: str) -> str:
    """Return the path of a key within a section."""
    return f"{key}.{name}" if key else name


def absolute(text: str, base: Path) -> Path:
    """Return a path with `~` resolved, made absolute from `base`; links are kept."""
    return Path(os.path.normpath(base.absolute() / Path(text).expanduser()))


def expectation(item: Key) -> str:
    """Return what a key expects, in words."""
    words = {
        "boolean": "true or false",
        "size": SIZE_WORDS,
        "duration": DURATION_WORDS,
        "integer": "a whole number",
        "names": "a name or a list of names",
        "number": "a number",
        "text": "a text",
        "path": "a path",
        "pairs": "a mapping of names to values",
        "texts": "a list of texts",
        "paths": "a list of paths",
        "secret": _KEY_WORDS,
        "secrets": "a list of keys",
        "api_keys": "a list of keys, each as it is or as a mapping with `key`",
    }
    if item.kind == "choice":
        return f"one of {', '.join(item.choices)}"
    if item.kind == "choices":
        return f"a list of {', '.join(item.choices)}"
    if item.kind == "text" and item.pattern is not None:
        return f"a text that matches {item.pattern}"
    return words[item.kind] + _bounds(item)


def _bounds(item: Key) -> str:
    low, high = (None if limit is None else f"{limit:g}" for limit in (item.low, item.high))
    if low is not None and high is not None:
        return f" from {low} to {high}"
    if low is not None:
        return f", at least {low}"
    return f", at most {high}" if high is not None else ""


def _hidden(node: Node) -> str:
    """Describe a node that may be a secret without showing it."""
    return "an empty text" if isinstance(node, Scalar) and node.kind == "text" else describe(node)


def _text(node: Node) -> str:
    if isinstance(node, Scalar) and node.kind == "text":
        return node.text
    if isinstance(node, Scalar) and node.kind != "null":
        raise _WrongError(node, "a text (put it in quotes)")
    raise _WrongError(node, "a text")


def _any_text(node: Node) -> str:
    """Return any plain value as it was written, such as 8000 in a list of arguments."""
    if isinstance(node, Scalar) and node.kind != "null":
        return node.text
    raise _WrongError(node, "a text or a number")


def _boolean(node: Node) -> bool:
    if isinstance(node, Scalar) and node.kind == "boolean":
        return node.text.lower() == "true"
    raise _WrongError(node, "true or false")


def _choice(item: Key, node: Node) -> str:
    text = node.text if isinstance(node, Scalar) and node.kind == "text" else None
    if text in item.choices:
        return text
    expected = f"one of {', '.join(item.choices)}"
    raise _WrongError(node, expected + (near(text, item.choices) if text else ""))


def _matching(item: Key, node: Node, text: str) -> str:
    if item.pattern is not None and re.fullmatch(item.pattern, text) is None:
        raise _WrongError(node, f"a text that matches {item.pattern}")
    return text


def _quantity(item: Key, node: Node) -> float:
    wrong = _WrongError(node, expectation(item))
    if not isinstance(node, Scalar) or node.kind in {"boolean", "null"}:
        raise wrong
    try:
        match item.kind:
            case "size":
                return parse_size(node.text)
            case "duration":
                return parse_duration(node.text)
            case "integer" if node.kind == "integer":
                return int(node.text)
            case "number" if node.kind in {"integer", "number"}:
                return float(node.text)
    except ValueError:
        pass
    raise wrong


def _within(item: Key, node: Node, value: float) -> float:
    low = -math.inf if item.low is None else item.low
    high = math.inf if item.high is None else item.high
    if not (low <= value <= high and math.isfinite(value)):
        raise _WrongError(node, expectation(item))
    return value


def _pairs(node: Node) -> dict[str, str]:
    if not isinstance(node, Table):
        raise _WrongError(node, "a mapping of names to values")
    pairs = {}
    for name, value in node.nodes.items():
        try:
            pairs[name] = _any_text(value)
        except _WrongError as wrong:
            wrong.at = f".{name}"
            raise
    return pairs
