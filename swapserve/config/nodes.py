"""YAML as a tree in which everything knows its line, and the list of what is wrong in it."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from swapserve.errors import ConfigError, ConfigProblem

ScalarKind = Literal["text", "integer", "number", "boolean", "null"]


@dataclass(frozen=True, slots=True)
class Scalar:
    """One value as written; `kind` is what YAML 1.2's core schema makes of it."""

    line: int
    text: str
    kind: ScalarKind


@dataclass(frozen=True, slots=True)
class Items:
    """A list."""

    line: int
    nodes: tuple["Node", ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A mapping; `lines` has the line of each key."""

    line: int
    nodes: dict[str, "Node"] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)


Node = Scalar | Items | Table


class Problems:
    """Everything found wrong in one file so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[ConfigProblem] = []

    def add(self, line: int | None, key: str, found: str, expected: str) -> None:
        """Note one problem at `key`."""
        self.found.append(
            ConfigProblem(path=str(self.path), line=line, key=key, found=found, expected=expected)
        )

    def check(self) -> None:
        """Raise ConfigError with all problems, in the order of their lines, if there is one."""
        if self.found:
            raise ConfigError(sorted(self.found, key=lambda problem: problem.line or 0))


def describe(node: Node) -> str:
    """Return how an error names what was found."""
    match node:
        case Scalar(kind="null"):
            return "nothing"
        case Scalar(kind="text", text=text):
            return f"the text {text!r}"
        case Scalar(kind="boolean", text=text):
            return f"the boolean {text}"
        case Scalar(text=text):
            return f"the number {text}"
        case Items():
            return "a list"
        case Table():
            return "a mapping"


def near(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest known names, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""


def one_of(known: Iterable[str]) -> str:
    """Return `one of a, b, c`, or `nothing (there is none)`."""
    names = sorted(known)
    return f"one of {', '.join(names)}" if names else "nothing (there is none)"


def parse(path: Path, problems: Problems) -> Table:
    """Read a YAML file as a table; what cannot be read is noted and left out.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "bytes that are not UTF-8"
        problems.add(None, "file", str(reason), "a readable YAML file")
        problems.check()
        raise
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else None
        what = getattr(error, "problem", None) or "a character that YAML forbids"
        problems.add(line, "file", f"a YAML syntax error ({what})", "YAML")
        problems.check()
        raise
    if root is None:
        return Table(1)
    tree = _Converter(problems).convert(root, "")
    if not isinstance(tree, Table):
        problems.add(tree.line, "file", describe(tree), "a mapping of sections")
        problems.check()
        return Table(1)
    return tree


class _Loader(yaml.SafeLoader):
    """The YAML 1.2 core schema: `on`, `yes`, dates and `1:30` are texts."""


_KINDS: tuple[tuple[ScalarKind, str, str], ...] = (
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN"),
    ("boolean", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("integer", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("number", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
)
_TAGS: dict[str, ScalarKind] = {f"!core/{kind}": kind for kind, _, _ in _KINDS}
_PLAIN_TAGS = {*_TAGS, *(f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map"))}
_MERGE_TAG = "!core/merge"

_Loader.yaml_implicit_resolvers = {}
for _kind, _pattern, _first in _KINDS:
    _Loader.add_implicit_resolver(
        f"!core/{_kind}", re.compile(_pattern), list(_first) + ([""] if _kind == "null" else [])
    )
_Loader.add_implicit_resolver(_MERGE_TAG, re.compile("^<<$"), ["<"])


class _Converter:
    """Turn PyYAML's nodes into ours, noting duplicate keys, foreign tags and cycles."""

    def __init__(self, problems: Problems) -> None:
        self._problems = problems
        self._open: set[int] = set()

    def convert(self, node: yaml.Node, key: str) -> Node:
        line = node.start_mark.line + 1
        if id(node) in self._open:
            self._problems.add(line, key, "an alias of the value that holds it", "a finite value")
            return Scalar(line, "", "null")
        if node.tag not in _PLAIN_TAGS:
            self._problems.add(line, key, f"the tag {node.tag}", "a plain value")
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.ScalarNode):
                return self._scalar(node, line)
            if isinstance(node, yaml.SequenceNode):
                entries = enumerate(node.value)
                return Items(line, tuple(self.convert(n, f"{key}[{i}]") for i, n in entries))
            if isinstance(node, yaml.MappingNode):
                return self._table(node, line, key)
            raise TypeError(type(node))
        finally:
            self._open.discard(id(node))

    @staticmethod
    def _scalar(node: yaml.ScalarNode, line: int) -> Scalar:
        return Scalar(line, str(node.value), _TAGS.get(node.tag, "text"))

    def _table(self, node: yaml.MappingNode, line: int, key: str) -> Table:
        table = Table(line)
        merged: list[Table] = []
        for name_node, value_node in node.value:
            name_line = name_node.start_mark.line + 1
            if name_node.tag == _MERGE_TAG:
                merged.extend(self._merge(value_node, key))
                continue
            if not isinstance(name_node, yaml.ScalarNode):
                self._problems.add(name_line, key, "a key that is not a text", "a text")
                continue
            name = str(name_node.value)
            path = f"{key}.{name}" if key else name
            if name in table.nodes:
                found = f"the key again (first on line {table.lines[name]})"
                self._problems.add(name_line, path, found, "each key once")
                continue
            table.nodes[name] = self.convert(value_node, path)
            table.lines[name] = name_line
        for other in merged:
            for name, value in other.nodes.items():
                if table.nodes.setdefault(name, value) is value:
                    table.lines.setdefault(name, other.lines[name])
        return table

    def _merge(self, node: yaml.Node, key: str) -> list[Table]:
        """Return the tables that `<<` brings in, the strongest first."""
        value = self.convert(node, f"{key}.<<" if key else "<<")
        tables = value.nodes if isinstance(value, Items) else (value,)
        for table in tables:
            if not isinstance(table, Table):
                self._problems.add(table.line, f"{key}.<<", describe(table), "a mapping")
        return [table for table in tables if isinstance(table, Table)]
